// Point operations, blends with a degenerate image, the blur.
#include "pixel_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"

namespace loader {

namespace {

using Table = uint8_t[3][256];

void look_up(Image image, const Table &table) {
    uint8_t *p = image.rgb;
    for (int i = 0; i < image.size * image.size; i++, p += 3) {
        p[0] = table[0][p[0]];
        p[1] = table[1][p[1]];
        p[2] = table[2][p[2]];
    }
}

template <class F>
void look_up_same(Image image, F value) {
    Table table;
    for (int i = 0; i < 256; i++) table[0][i] = table[1][i] = table[2][i] = value(i);
    look_up(image, table);
}

struct Histogram {
    uint32_t count[3][256] = {};
    explicit Histogram(Image image) {
        uint32_t second[3][256] = {};  // neighbours are often equal: two tables keep their additions independent
        const uint8_t *p = image.rgb, *end = p + image.bytes();
        for (; p + 6 <= end; p += 6) {
            for (int c = 0; c < 3; c++) {
                count[c][p[c]]++;
                second[c][p[3 + c]]++;
            }
        }
        if (p < end)
            for (int c = 0; c < 3; c++) count[c][p[c]]++;
        for (int c = 0; c < 3; c++)
            for (int i = 0; i < 256; i++) count[c][i] += second[c][i];
    }
};

inline int luma(const uint8_t *p) { return (p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16; }

// Pillow's Image.blend in single precision, truncated: a + factor * (b - a).
INLINE uint8_t blend(int a, int b, float factor) {
    const float v = (float)a + factor * (float)(b - a);
    return v <= 0.0f ? 0 : v >= 255.0f ? 255 : (uint8_t)(int)v;
}

CLONES void blend_rows(const uint8_t *degenerate, uint8_t *image, int n, float factor) {
    for (int i = 0; i < n; i++) image[i] = blend(degenerate[i], image[i], factor);
}

// 3 x 3 mean with the centre counted five times; exact rounding, as the sum over 13 never lies on a half.
CLONES void smooth_row(const uint8_t *above, const uint8_t *here, const uint8_t *below, uint8_t *out, int bytes) {
    for (int i = 3; i < bytes - 3; i++) {
        const int sum = above[i - 3] + above[i] + above[i + 3] + here[i - 3] + 5 * here[i] + here[i + 3] + below[i - 3] +
                        below[i] + below[i + 3];
        out[i] = (uint8_t)(((2 * sum + 13) * 40330) >> 20);  // (2 sum + 13) / 26
    }
}

// One pass of the extended box blur down the columns (Gwosdek et al., SSVM 2011), 8.24 fixed point.
CLONES void box_blur_columns(const uint8_t *in, uint8_t *out, int rows, int bytes, int radius, uint32_t weight,
                             uint32_t edge_weight, uint32_t *sum) {
    const auto row = [&](int y) { return in + (size_t)std::clamp(y, 0, rows - 1) * bytes; };
    for (int i = 0; i < bytes; i++) sum[i] = 0;
    for (int y = -1 - radius; y < radius; y++) {
        const uint8_t *p = row(y);
        for (int i = 0; i < bytes; i++) sum[i] += p[i];
    }
    for (int y = 0; y < rows; y++) {
        const uint8_t *enter = row(y + radius), *leave = row(y - radius - 1), *after = row(y + radius + 1);
        uint8_t *o = out + (size_t)y * bytes;
        for (int i = 0; i < bytes; i++) {
            sum[i] += (uint32_t)enter[i] - leave[i];
            o[i] = (uint8_t)((sum[i] * weight + (uint32_t)(leave[i] + after[i]) * edge_weight + (1u << 23)) >> 24);
        }
    }
}

void transpose(const uint8_t *in, uint8_t *out, int size) {
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x++) memcpy(out + 3 * ((size_t)x * size + y), in + 3 * ((size_t)y * size + x), 3);
}

thread_local std::vector<uint8_t> scratch, scratch_2;

}  // namespace

void auto_contrast(Image image) {
    const Histogram histogram(image);
    Table table;
    for (int c = 0; c < 3; c++) {
        int low = 0, high = 255;
        while (low < 255 && !histogram.count[c][low]) low++;
        while (high > 0 && !histogram.count[c][high]) high--;
        const double scale = high > low ? 255.0 / (high - low) : 1.0, offset = high > low ? -low * scale : 0.0;
        for (int i = 0; i < 256; i++) table[c][i] = (uint8_t)std::clamp((int)(i * scale + offset), 0, 255);
    }
    look_up(image, table);
}

void equalize(Image image) {
    const Histogram histogram(image);
    Table table;
    for (int c = 0; c < 3; c++) {
        int used = 0, last = 0;
        for (int i = 0; i < 256; i++)
            if (histogram.count[c][i]) used++, last = i;
        const int step = (image.size * image.size - (int)histogram.count[c][last]) / 255;
        int n = step / 2;
        for (int i = 0; i < 256; i++) {
            table[c][i] = used <= 1 || step == 0 ? i : (uint8_t)std::min(255, n / step);
            n += histogram.count[c][i];
        }
    }
    look_up(image, table);
}

void invert(Image image) {
    for (int i = 0; i < image.bytes(); i++) image.rgb[i] = 255 - image.rgb[i];
}

void posterize(Image image, int bits) {
    const uint8_t mask = (uint8_t)(0xFF00 >> std::clamp(bits, 0, 8));
    for (int i = 0; i < image.bytes(); i++) image.rgb[i] &= mask;
}

void solarize(Image image, double threshold) {
    look_up_same(image, [&](int i) { return (uint8_t)(i < threshold ? i : 255 - i); });
}

void solarize_add(Image image, int add) {
    look_up_same(image, [&](int i) { return (uint8_t)(i < 128 ? std::min(255, i + add) : i); });
}

void brightness(Image image, double factor) {
    look_up_same(image, [&](int i) { return blend(0, i, (float)factor); });
}

void contrast(Image image, double factor) {
    int64_t sum = 0;
    for (int i = 0; i < image.size * image.size; i++) sum += luma(image.rgb + 3 * i);
    const int mean = (int)((double)sum / (image.size * image.size) + 0.5);
    look_up_same(image, [&](int i) { return blend(mean, i, (float)factor); });
}

void saturation(Image image, double factor) {
    const int n = image.size * image.size;
    scratch.resize((size_t)n * 3);
    for (int i = 0; i < n; i++) memset(&scratch[3 * i], luma(image.rgb + 3 * i), 3);
    blend_rows(scratch.data(), image.rgb, n * 3, (float)factor);
}

void sharpness(Image image, double factor) {
    const int bytes = image.size * 3;
    scratch.assign(image.rgb, image.rgb + image.bytes());  // the border keeps its pixels
    for (int y = 1; y < image.size - 1; y++) {
        const uint8_t *here = image.rgb + (size_t)y * bytes;
        smooth_row(here - bytes, here, here + bytes, scratch.data() + (size_t)y * bytes, bytes);
    }
    blend_rows(scratch.data(), image.rgb, image.bytes(), (float)factor);
}

void gaussian_blur(Image image, double sigma) {
    // Three extended box blurs of this radius have the Gaussian's variance; single precision as in Pillow.
    const float sigma2 = (float)sigma * (float)sigma / 3;
    const float length = (float)std::sqrt(12.0 * sigma2 + 1.0), whole = (float)std::floor((length - 1.0) / 2.0);
    float fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2);
    fraction /= 6 * (sigma2 - (whole + 1) * (whole + 1));
    const float width = whole + fraction;
    const int radius = (int)width;
    const uint32_t weight = (uint32_t)((float)(1 << 24) / (width * 2 + 1));
    const uint32_t edge_weight = ((1u << 24) - (radius * 2 + 1) * weight) / 2;

    scratch.resize(image.bytes());
    scratch_2.resize(image.bytes());
    thread_local std::vector<uint32_t> sums;
    sums.resize(image.size * 3);
    const auto blur = [&](uint8_t *from, uint8_t *to) {
        box_blur_columns(from, to, image.size, image.size * 3, radius, weight, edge_weight, sums.data());
    };
    transpose(image.rgb, scratch.data(), image.size);  // rows first, as Pillow does, but as columns
    blur(scratch.data(), scratch_2.data());
    blur(scratch_2.data(), scratch.data());
    blur(scratch.data(), scratch_2.data());
    transpose(scratch_2.data(), image.rgb, image.size);
    blur(image.rgb, scratch.data());
    blur(scratch.data(), scratch_2.data());
    blur(scratch_2.data(), image.rgb);
}

void shift(Image image, int dx, int dy) {
    scratch.assign(image.rgb, image.rgb + image.bytes());
    memset(image.rgb, 0, image.bytes());
    const int columns = image.size - std::abs(dx);
    if (columns <= 0) return;
    for (int y = std::max(0, dy); y < std::min(image.size, image.size + dy); y++)
        memcpy(image.rgb + 3 * ((size_t)y * image.size + std::max(0, dx)),
               scratch.data() + 3 * ((size_t)(y - dy) * image.size + std::max(0, -dx)), 3 * columns);
}

}  // namespace loader
