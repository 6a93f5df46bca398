// The C interface: one stored image in, one augmented or centre-cropped square out.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "augment.h"
#include "jpeg_region.h"
#include "keyed_random.h"
#include "resample.h"
#include "thread_pool.h"

using namespace loader;

namespace {

enum Mode { JPG = 0, RAW = 1 };

struct Stored {
    const uint8_t *bytes;
    int64_t size;
    int mode, width, height;
};

// The part of the source that one axis of the output is made from, and how.
struct Span {
    int low, extent;          // the filter sees [low, low + extent) only
    int out, out_first;       // the span becomes `out` outputs, of which image_size from out_first on are wanted
};

struct Thread {
    JpegRegion jpeg;
    Resampler resampler;
};

Thread &this_thread() {
    thread_local Thread instance;
    return instance;
}

// Largest power of two by which the decoder may shrink the image. It keeps twice the wanted pixels, so that the exact
// resize still does the last half of the work: the decoder's own shrinking is another filter, sharper than the resize's.
int dct_denominator(const Span &x, const Span &y) {
    int d = 1;
    while (d < 8 && x.extent >= 4 * d * x.out && y.extent >= 4 * d * y.out) d *= 2;
    return d;
}

// Makes one axis for the source shrunk by `denominator`; returns the first source position it counts from.
int make_scaled_axis(Axis &axis, const Span &span, int image_size, int denominator, int full, Filter filter, bool flip) {
    const double d = denominator;
    const int low = span.low / denominator;
    const int high = std::min((span.low + span.extent + denominator - 1) / denominator, (full + denominator - 1) / denominator);
    const double box0 = denominator == 1 ? 0.0 : span.low / d - low;
    make_axis(axis, high - low, box0, box0 + span.extent / d, span.out, span.out_first, image_size, filter, flip);
    return low;
}

Status resize(const Stored &image, const Span &x, const Span &y, int image_size, Filter filter, bool flip, bool shrink,
              uint8_t *out) {
    Thread &thread = this_thread();
    Resampler &r = thread.resampler;
    const size_t out_stride = (size_t)image_size * 3;
    if (image.mode == RAW) {
        if (image.size != (int64_t)image.width * image.height * 3) return WRONG_SIZE;
        make_scaled_axis(r.x, x, image_size, 1, image.width, filter, flip);
        make_scaled_axis(r.y, y, image_size, 1, image.height, filter, false);
        const int left = x.low + r.x.begin(), columns = r.x.end() - r.x.begin();
        const uint8_t *source = image.bytes + 3 * ((size_t)(y.low + r.y.begin()) * image.width + left);
        r.start(columns, 0, vertical_goes_first(y.extent, x.extent, y.out, x.out), out, out_stride);
        while (const int rows = r.rows_wanted()) {
            for (int i = 0; i < rows; i++, source += 3 * (size_t)image.width) {
                uint8_t *row = r.row(i);
                for (int c = 0; c < columns; c++) memcpy(row + 4 * c, source + 3 * c, 3);
            }
            r.push(rows);
        }
        return OK;
    }
    JpegRegion &jpeg = thread.jpeg;
    if (Status status = jpeg.open(image.bytes, image.size)) return status;
    if (jpeg.width() != image.width || jpeg.height() != image.height) {
        jpeg.finish();
        return WRONG_SIZE;
    }
    const int d = shrink ? dct_denominator(x, y) : 1;
    const int left = make_scaled_axis(r.x, x, image_size, d, image.width, filter, flip);
    const int top = make_scaled_axis(r.y, y, image_size, d, image.height, filter, false);
    if (Status status = jpeg.start(d, left + r.x.begin(), left + r.x.end(), top + r.y.begin())) {
        jpeg.finish();
        return status;
    }
    r.start(jpeg.row_pixels(), jpeg.pixel_offset(), vertical_goes_first(y.extent / d, x.extent / d, y.out, x.out), out, out_stride);
    while (const int rows = r.rows_wanted()) {
        if (Status status = jpeg.read(r.row(0), r.row(1) - r.row(0), rows)) {
            jpeg.finish();
            return status;
        }
        r.push(rows);
    }
    return jpeg.finish();
}

Status decode_training(const Settings &s, uint64_t key, const Stored &image, uint8_t *out) {
    const int size = (int)s.image_size;
    const Box box = training_box(s, key, image.height, image.width);
    const bool flip = flips(s, key);
    const Span x{box.left, box.width, size, 0}, y{box.top, box.height, size, 0};
    if (Status status = resize(image, x, y, size, training_filter(s, key), flip, true, out)) return status;
    const Image pixels{out, size};
    if (s.pad_crop && !s.random_crop) {
        int top, left;
        pad_offset(s, key, &top, &left);
        const int dx = (int)s.pad_crop - left;
        shift(pixels, flip ? -dx : dx, (int)s.pad_crop - top);
    }
    Operation operations[MAX_OPERATIONS];
    const int count = draw_operations(s, key, operations);
    const bool black = s.policy == TRIVIAL_WIDE;
    const uint8_t fill[3] = {(uint8_t)(black ? 0 : s.fill[0]), (uint8_t)(black ? 0 : s.fill[1]), (uint8_t)(black ? 0 : s.fill[2])};
    for (int i = 0; i < count; i++) apply(pixels, operations[i], fill);
    return OK;
}

Status decode_evaluation(const Settings &s, const Stored &image, uint8_t *out) {
    const int size = (int)s.image_size, side = (int)s.resized_side;
    int height = side, width = side;
    if (!s.squash && image.width <= image.height)
        height = (int)((double)((int64_t)side * image.height) / image.width);
    else if (!s.squash)
        width = (int)((double)((int64_t)side * image.width) / image.height);
    const Span x{0, image.width, width, (int)std::nearbyint((width - size) / 2.0)};
    const Span y{0, image.height, height, (int)std::nearbyint((height - size) / 2.0)};
    return resize(image, x, y, size, (Filter)s.filter, false, false, out);
}

Status decode(const Settings &s, uint64_t key, const Stored &image, uint8_t *out) {
    if (image.width <= 0 || image.height <= 0) return WRONG_SIZE;
    try {
        return s.evaluate ? decode_evaluation(s, image, out) : decode_training(s, key, image, out);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}

// The stored image of a sample, looked up in the mapped file: only for substitutes, so a linear search will do.
bool find_stored(const Settings &s, int64_t sample, Stored *stored) {
    uint64_t at, table;
    const uint8_t *record = s.metadata + sample * s.metadata_stride;
    uint16_t width, height;
    memcpy(&width, record + 1, 2);
    memcpy(&height, record + 3, 2);
    memcpy(&at, record + 5, 8);
    memcpy(&table, s.file + 16, 8);
    for (const uint8_t *entry = s.file + table, *end = s.file + s.file_size; entry + 24 <= end; entry += 24) {
        uint64_t pointer, size;
        memcpy(&pointer, entry + 8, 8);
        memcpy(&size, entry + 16, 8);
        if (pointer != at) continue;
        if (at > table || size > table - at) return false;
        *stored = {s.file + at, (int64_t)size, record[0], width, height};
        return true;
    }
    return false;
}

}  // namespace

struct loader::FailureLog {
    struct Entry {
        int64_t sample, replacement, status;
    };
    std::mutex mutex;
    std::vector<Entry> entries;
};

extern "C" {

// Decodes `sample` (numbers at or above num_samples are repetitions, keyed by the whole number) into place `slot` of a
// batch of packed (image_size, image_size, 3) images. Never leaves old bytes there: what cannot be read is replaced or zero.
int64_t loader_decode(const Settings *settings, const uint8_t *bytes, int64_t size, int64_t mode, int64_t width,
                      int64_t height, int64_t sample, uint8_t *batch, int64_t slot) {
    const Settings &s = *settings;
    const size_t bytes_out = (size_t)s.image_size * s.image_size * 3;
    uint8_t *out = batch + slot * bytes_out;
    const uint64_t key = sample_key(s.seed, s.epoch, sample);
    const Status status = decode(s, key, {bytes, size, (int)mode, (int)width, (int)height}, out);
    if (status == OK) return OK;
    int64_t replacement = -1;
    for (int64_t step = 1; s.substitute && replacement < 0 && step < s.num_samples; step++) {
        const int64_t candidate = (sample + step) % s.num_samples;
        Stored stored;
        if (find_stored(s, candidate, &stored) && decode(s, key, stored, out) == OK) replacement = candidate;
    }
    if (replacement < 0) memset(out, 0, bytes_out);
    if (s.failures) {
        const std::lock_guard<std::mutex> guard(s.failures->mutex);
        s.failures->entries.push_back({sample, replacement, status});
    }
    return status;
}

// Decodes `count` samples into a batch. Stored image i: its address, bytes, mode, width and height at places 5 i ... 5 i + 4.
void loader_decode_batch(const Settings *settings, ThreadPool *pool, int64_t count, const int64_t *samples,
                         const int64_t *stored, uint8_t *batch) {
    pool->run(count, [=](int64_t i) {
        const int64_t *s = stored + 5 * i;
        loader_decode(settings, (const uint8_t *)s[0], s[1], s[2], s[3], s[4], samples[i], batch, i);
    });
}

ThreadPool *loader_new_pool(int64_t workers) { return new ThreadPool((int)workers); }
void loader_delete_pool(ThreadPool *pool) { delete pool; }

FailureLog *loader_new_log() { return new FailureLog; }
void loader_delete_log(FailureLog *log) { delete log; }

// Moves up to `room` entries (sample, replacement, status) to `out`, oldest first, and returns how many.
int64_t loader_take_failures(FailureLog *log, int64_t *out, int64_t room) {
    const std::lock_guard<std::mutex> guard(log->mutex);
    const int64_t count = std::min(room, (int64_t)log->entries.size());
    if (count) memcpy(out, log->entries.data(), count * sizeof(FailureLog::Entry));
    log->entries.erase(log->entries.begin(), log->entries.begin() + count);
    return count;
}

int64_t loader_settings_size() { return sizeof(Settings); }
int64_t loader_usable() { return this_thread().jpeg.usable(); }

// The instruction set in use, after asking for `isa` (GENERIC, AVX2; anything else: the best here).
int64_t loader_use_isa(int64_t isa) {
    const Isa best = detect_isa();
    active_isa = isa >= GENERIC && isa <= best ? (Isa)isa : best;
    return active_isa;
}

// What tests look at: the choices drawn for a sample, and each part by itself.
// choices: top, left, height, width, filter, flip, pad top, pad left, number of operations; operations: name, argument, filter.
void loader_draw(const Settings *settings, int64_t sample, int64_t height, int64_t width, int64_t *choices, double *operations) {
    const Settings &s = *settings;
    const uint64_t key = sample_key(s.seed, s.epoch, sample);
    const Box box = training_box(s, key, (int)height, (int)width);
    int top, left;
    pad_offset(s, key, &top, &left);
    Operation drawn[MAX_OPERATIONS];
    const int count = draw_operations(s, key, drawn);
    const int64_t values[] = {box.top, box.left, box.height, box.width, training_filter(s, key), flips(s, key), top, left, count};
    memcpy(choices, values, sizeof values);
    for (int i = 0; i < count; i++, operations += 3) {
        operations[0] = drawn[i].name;
        operations[1] = drawn[i].argument;
        operations[2] = drawn[i].resample;
    }
}

void loader_apply(uint8_t *rgb, int64_t size, int64_t name, double argument, int64_t filter, const uint8_t *fill) {
    apply({rgb, (int)size}, {(OperationName)name, argument, (Filter)filter}, fill);
}

// A box of a packed RGB image to a packed square.
int64_t loader_resize(const uint8_t *rgb, int64_t height, int64_t width, int64_t top, int64_t left, int64_t box_height,
                      int64_t box_width, int64_t size, int64_t filter, int64_t flip, uint8_t *out) {
    const Span x{(int)left, (int)box_width, (int)size, 0}, y{(int)top, (int)box_height, (int)size, 0};
    return resize({rgb, height * width * 3, RAW, (int)width, (int)height}, x, y, (int)size, (Filter)filter, flip, false, out);
}

// The whole image by plain libjpeg, discarding the pixels: the bound that a full decode sets.
int64_t loader_decode_whole(const uint8_t *bytes, int64_t size) {
    JpegRegion &jpeg = this_thread().jpeg;
    if (Status status = jpeg.open(bytes, size)) return status;
    const int width = jpeg.width(), height = jpeg.height();
    thread_local std::vector<uint8_t> rows;
    rows.resize((size_t)width * 4 * ROWS_AT_ONCE);
    if (Status status = jpeg.start(1, 0, width, 0)) return status;
    for (int row = 0; row < height; row += ROWS_AT_ONCE)
        if (Status status = jpeg.read(rows.data(), (size_t)width * 4, std::min(ROWS_AT_ONCE, height - row))) return status;
    return jpeg.finish();
}

}  // extern "C"
