// Tables, the portable kernels and the streaming driver of the resize.
#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "resample_x86.h"

namespace loader {

namespace {

inline double triangle(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

// Keys' cubic with a = -0.5 (Keys, Cubic convolution interpolation, 1981), evaluated in Pillow's order.
inline double cubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

inline uint8_t saturate(int32_t sum) {
    int32_t v = sum >> WEIGHT_BITS;
    return v < 0 ? 0 : v > 255 ? 255 : (uint8_t)v;
}

void horizontal_plain(const Axis &axis, int base, const uint8_t *source, uint8_t *out) {
    for (int o = 0; o < axis.out; o++) {
        const int32_t *w = &axis.weight[(size_t)o * axis.stride];
        const uint8_t *p = source + (size_t)(axis.first[o] - base) * 4;
        int32_t r, g, b;
        r = g = b = 1 << (WEIGHT_BITS - 1);
        for (int t = 0; t < axis.count[o]; t++, p += 4) {
            r += p[0] * w[t];
            g += p[1] * w[t];
            b += p[2] * w[t];
        }
        out[3 * o] = saturate(r);
        out[3 * o + 1] = saturate(g);
        out[3 * o + 2] = saturate(b);
    }
}

void vertical_plain(const uint8_t *first, size_t stride, const int32_t *weight, int count, int bytes, uint8_t *out) {
    constexpr int BLOCK = 64;
    for (int start = 0; start < bytes; start += BLOCK) {
        const int n = std::min(BLOCK, bytes - start);
        int32_t sum[BLOCK];
        for (int i = 0; i < BLOCK; i++) sum[i] = 1 << (WEIGHT_BITS - 1);
        const uint8_t *p = first + start;  // packed rows are padded, so whole blocks may be read
        for (int t = 0; t < count; t++, p += stride)
            for (int i = 0; i < BLOCK; i++) sum[i] += p[i] * weight[t];
        for (int i = 0; i < n; i++) out[start + i] = saturate(sum[i]);
    }
}

void vertical(const uint8_t *first, size_t stride, const int32_t *weight, int count, int bytes, uint8_t *out) {
#ifdef LOADER_X86
    if (active_isa == AVX2) return x86::vertical(first, stride, weight, count, bytes, out);
#endif
    vertical_plain(first, stride, weight, count, bytes, out);
}

}  // namespace

Isa detect_isa() {
#ifdef LOADER_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return GENERIC;
}

Isa active_isa = detect_isa();

int Axis::begin() const { return *std::min_element(first.begin(), first.begin() + out); }

int Axis::end() const {
    int last = 0;
    for (int i = 0; i < out; i++) last = std::max(last, first[i] + count[i]);
    return last;
}

void make_axis(Axis &axis, int in, double box0, double box1, int out, int out_first, int out_count, Filter filter, bool flip) {
    const double scale = (box1 - box0) / out, filter_scale = std::max(scale, 1.0), inverse = 1.0 / filter_scale;
    const double support = (filter == BICUBIC ? 2.0 : 1.0) * filter_scale;
    axis.out = out_count;
    axis.stride = (int)std::ceil(support) * 2 + 1;
    axis.first.resize(out_count);
    axis.count.resize(out_count);
    axis.weight.assign((size_t)out_count * axis.stride, 0);
    thread_local std::vector<double> taps;
    taps.resize(axis.stride);
    for (int i = 0; i < out_count; i++) {
        const double center = box0 + (out_first + i + 0.5) * scale;
        const int low = std::max(0, (int)(center - support + 0.5)), high = std::min(in, (int)(center + support + 0.5));
        double total = 0.0;
        for (int t = 0; t < high - low; t++) {
            const double at = (t + low - center + 0.5) * inverse;
            taps[t] = filter == BICUBIC ? cubic(at) : triangle(at);
            total += taps[t];
        }
        const int slot = flip ? out_count - 1 - i : i;
        axis.first[slot] = low;
        axis.count[slot] = high - low;
        int32_t *w = &axis.weight[(size_t)slot * axis.stride];
        for (int t = 0; t < high - low; t++) {
            const double v = (total != 0.0 ? taps[t] / total : taps[t]) * (1 << WEIGHT_BITS);
            w[t] = (int)(v < 0 ? v - 0.5 : v + 0.5);
        }
        // A last tap of weight zero is common (bilinear without scaling); dropping it changes nothing and saves work.
        while (axis.count[slot] > 1 && w[axis.count[slot] - 1] == 0) axis.count[slot]--;
    }
}

void Resampler::start(int row_pixels, int pixel_offset, bool vertical_first, uint8_t *destination,
                      size_t destination_stride) {
    pixel_offset_ = pixel_offset;
    vertical_first_ = vertical_first;
    destination_ = destination;
    destination_stride_ = destination_stride;
    rows_in_ = rows_out_ = rows_held_ = 0;
    rows_total_ = y.end() - y.begin();
    rows_room_ = vertical_first ? 2 * y.stride + 4 * ROWS_AT_ONCE : ROWS_AT_ONCE;
    row_stride_ = (((size_t)row_pixels + x.stride) * 4 + ROW_START + ROW_SLACK + 63) / 64 * 64;
    packed_stride_ = ((size_t)x.out * 3 + STORE_SPILL + 63) / 64 * 64;
    const auto reserve = [](std::vector<uint8_t> &buffer, size_t bytes) {
        if (buffer.size() < bytes) buffer.resize(bytes);
    };
    reserve(rows_, row_stride_ * rows_room_);
    if (vertical_first) reserve(squeezed_, row_stride_ * ROWS_AT_ONCE);
    reserve(packed_, packed_stride_ * ((vertical_first ? ROWS_AT_ONCE : rows_total_) + 1) + STORE_SPILL);
    prepare_horizontal();
}

int Resampler::rows_wanted() const { return std::min(ROWS_AT_ONCE, rows_total_ - rows_in_); }

void Resampler::push(int count) {
    if (vertical_first_) return push_vertical_first(count);
    horizontal(rows_.data() + ROW_START + (size_t)pixel_offset_ * 4, count, packed_.data() + (size_t)rows_in_ * packed_stride_);
    rows_in_ += count;
    vertical_ready();
}

void Resampler::push_vertical_first(int count) {
    rows_in_ += count;
    rows_held_ += count;
    const int base = y.begin(), bytes = (x.end() - x.begin()) * 4;
    const uint8_t *held = rows_.data() + ROW_START + (size_t)pixel_offset_ * 4;
    int done = 0;
    while (rows_out_ + done < y.out && y.first[rows_out_ + done] - base + y.count[rows_out_ + done] <= rows_in_) {
        const int o = rows_out_ + done, at = y.first[o] - base - (rows_in_ - rows_held_);
        vertical(held + at * row_stride_, row_stride_, &y.weight[(size_t)o * y.stride], y.count[o], bytes,
                 squeezed_.data() + done * row_stride_);
        if (++done == ROWS_AT_ONCE) {
            flush(done);
            done = 0;
        }
    }
    flush(done);
    if (rows_room_ - rows_held_ < ROWS_AT_ONCE) {  // move what is still needed to the front
        const int first = rows_out_ < y.out ? y.first[rows_out_] - base : rows_in_;
        const int drop = std::min(rows_held_, first - (rows_in_ - rows_held_));
        memmove(rows_.data(), rows_.data() + drop * row_stride_, (rows_held_ - drop) * row_stride_);
        rows_held_ -= drop;
    }
}

void Resampler::flush(int count) {
    horizontal(squeezed_.data(), count, packed_.data());
    for (int i = 0; i < count; i++)
        memcpy(destination_ + (rows_out_ + i) * destination_stride_, packed_.data() + i * packed_stride_, (size_t)x.out * 3);
    rows_out_ += count;
}

void Resampler::prepare_horizontal() {
#ifdef LOADER_X86
    if (active_isa == AVX2) groups_ = x86::prepare(x, x.begin(), bases_, table_);
#endif
}

void Resampler::horizontal(const uint8_t *source, int count, uint8_t *out) {
#ifdef LOADER_X86
    if (active_isa == AVX2)
        return x86::horizontal((x.out + 3) / 4, groups_, bases_.data(), table_.data(), source, row_stride_, count, out,
                               packed_stride_);
#endif
    const int base = x.begin();
    for (int i = 0; i < count; i++) horizontal_plain(x, base, source + i * row_stride_, out + i * packed_stride_);
}

void Resampler::vertical_ready() {
    const int base = y.begin(), bytes = x.out * 3;
    while (rows_out_ < y.out && y.first[rows_out_] - base + y.count[rows_out_] <= rows_in_) {
        const uint8_t *first = packed_.data() + (size_t)(y.first[rows_out_] - base) * packed_stride_;
        const int32_t *weight = &y.weight[(size_t)rows_out_ * y.stride];
        const int count = y.count[rows_out_];
        uint8_t *out = destination_ + rows_out_ * destination_stride_;
        vertical(first, packed_stride_, weight, count, bytes, out);
        rows_out_++;
    }
}

}  // namespace loader
