// Affine transforms in double precision, term by term as Pillow computes them, so that the bytes are the same.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "clones.h"
#include "pixel_ops.h"

namespace loader {

namespace {

typedef double Four __attribute__((vector_size(32)));     // the channels of one pixel
typedef double StoredFour __attribute__((vector_size(32), aligned(8), may_alias));  // where alignment is not promised
typedef int32_t FourInt __attribute__((vector_size(16)));

constexpr int BORDER = 2;  // repeated edge pixels on each side: what clamping every tap's coordinate would read

// The source as doubles, so that a tap is one load.
struct Padded {
    std::vector<double> values;
    int stride = 0;
    StoredFour *pixels() { return (StoredFour *)values.data(); }
    const StoredFour *at(int x, int y) const {
        return (const StoredFour *)values.data() + (size_t)(y + BORDER) * stride + x + BORDER;
    }
};

CLONES void copy_padded(Padded &padded, Image image) {
    const int n = image.size, stride = n + 2 * BORDER;
    padded.stride = stride;
    padded.values.resize((size_t)stride * stride * 4);
    StoredFour *pixels = padded.pixels();
    for (int y = 0; y < n; y++) {
        StoredFour *row = pixels + (size_t)(y + BORDER) * stride;
        const uint8_t *p = image.rgb + (size_t)y * n * 3;
        for (int x = 0; x < n; x++, p += 3) {
            const FourInt v = {p[0], p[1], p[2], 0};
            row[x + BORDER] = __builtin_convertvector(v, Four);
        }
        row[0] = row[1] = row[BORDER];
        row[n + BORDER] = row[n + BORDER + 1] = row[n + BORDER - 1];
    }
    const size_t bytes = (size_t)stride * sizeof(StoredFour);
    for (int i = 0; i < BORDER; i++) {
        memcpy(pixels + (size_t)i * stride, pixels + (size_t)BORDER * stride, bytes);
        memcpy(pixels + (size_t)(n + BORDER + i) * stride, pixels + (size_t)(n + BORDER - 1) * stride, bytes);
    }
}

// Writes `bytes` bytes, 3 or 4: the fourth belongs to the next pixel.
INLINE void store(uint8_t *p, Four v, int bytes) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    const Bytes whole = (Bytes)__builtin_convertvector(v, FourInt);  // truncates
#ifdef __clang__
    const Bytes packed = __builtin_shufflevector(whole, whole, 0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
#else
    const Bytes packed = __builtin_shuffle(whole, Bytes{0, 4, 8, 12});
#endif
    memcpy(p, &packed, bytes);
}

INLINE Four lerp(Four a, Four b, double d) { return a + (b - a) * d; }

INLINE Four cubic(Four v1, Four v2, Four v3, Four v4, double d) {
    const Four p2 = v3 - v1, p3 = 2.0 * (v1 - v2) + v3 - v4, p4 = v2 - v1 - v3 + v4;
    return v2 + d * (p2 + d * (p3 + d * p4));
}

// The same where all values are whole numbers: sums are exact then, and may be taken in the order that needs fewest.
INLINE Four cubic_of_bytes(Four v1, Four v2, Four v3, Four v4, double d) {
    const Four fall = v1 - v2, p4 = (v4 - v3) - fall, p3 = fall - p4;
    return v2 + d * ((v3 - v1) + d * (p3 + d * p4));
}

INLINE int floor_int(double v) {
    const int i = (int)v;
    return i - (v < i);
}

// For the pixels of one row: where the taps begin, and how far the wanted point lies beyond the first.
struct Places {
    std::vector<int> at;
    std::vector<double> dx, dy;
};

// FLAT_X (FLAT_Y): the source column (row) is the output's, so nothing is interpolated along it.
template <bool CUBIC, bool FLAT_X, bool FLAT_Y>
INLINE void affine_rows(Image image, const Padded &source, const double m[6], Places &places) {
    const int n = image.size, stride = source.stride;
    const double m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3], m4 = m[4], m5 = m[5];  // nothing that is written is these
    int *at = places.at.data();
    double *dx = places.dx.data(), *dy = places.dy.data();
    for (int y = 0; y < n; y++) {
        const double yin = y + 0.5;
        const auto x_of = [&](int x) { return FLAT_X ? x + 0.5 : m0 * (x + 0.5) + m1 * yin + m2; };
        const auto y_of = [&](int x) { return FLAT_Y ? yin : m3 * (x + 0.5) + m4 * yin + m5; };
        const auto outside = [&](int x) { return x_of(x) < 0.0 || x_of(x) >= n || y_of(x) < 0.0 || y_of(x) >= n; };
        // What lies inside is in one piece, as rounding keeps the order of numbers. The rest keeps the fill.
        int begin = 0, end = n;
        while (begin < end && outside(begin)) begin++;
        while (begin < end && outside(end - 1)) end--;
        for (int x = begin; x < end; x++) {
            const double xs = x_of(x) - 0.5, ys = y_of(x) - 0.5;
            const double left = std::floor(xs), top = std::floor(ys);
            at[x] = (int)top * stride + (int)left;
            dx[x] = xs - left;
            dy[x] = ys - top;
        }
        const auto pixel = [&](int x) __attribute__((always_inline)) -> Four {
            const StoredFour *p = source.at(0, 0) + at[x];
            const auto row = [&](const StoredFour *q) __attribute__((always_inline)) -> Four {
                if (FLAT_X) return (Four)q[0];
                if (!CUBIC) return lerp(q[0], q[1], dx[x]);
                return cubic_of_bytes(q[-1], q[0], q[1], q[2], dx[x]);
            };
            Four v;
            if (FLAT_Y)
                v = row(p);
            else if (!CUBIC)
                v = lerp(row(p), row(p + stride), dy[x]);
            else
                v = cubic(row(p - stride), row(p), row(p + stride), row(p + 2 * stride), dy[x]);
            if (CUBIC) {
                v = v > 0.0 ? v : Four{};
                v = v < 255.0 ? v : Four{} + 255.0;
            }
            return v;
        };
        uint8_t *out = image.rgb + (size_t)y * n * 3;
        for (int x = begin; x < end - 1; x++) store(out + 3 * x, pixel(x), 4);
        if (begin < end) store(out + 3 * (end - 1), pixel(end - 1), 3);
    }
}

CLONES void affine_filtered(Image image, const Padded &source, const double m[6], bool bicubic, Places &places) {
    const bool flat_x = m[0] == 1.0 && m[1] == 0.0 && m[2] == 0.0, flat_y = m[3] == 0.0 && m[4] == 1.0 && m[5] == 0.0;
    if (bicubic) {
        if (flat_x)
            affine_rows<true, true, false>(image, source, m, places);
        else if (flat_y)
            affine_rows<true, false, true>(image, source, m, places);
        else
            affine_rows<true, false, false>(image, source, m, places);
    } else {
        if (flat_x)
            affine_rows<false, true, false>(image, source, m, places);
        else if (flat_y)
            affine_rows<false, false, true>(image, source, m, places);
        else
            affine_rows<false, false, false>(image, source, m, places);
    }
}

thread_local Padded padded;
thread_local Places places;
thread_local std::vector<uint8_t> original;

void fill_all(Image image, const uint8_t fill[3]) {
    const size_t row = (size_t)image.size * 3;
    for (int x = 0; x < image.size; x++) memcpy(image.rgb + 3 * x, fill, 3);
    for (int y = 1; y < image.size; y++) memcpy(image.rgb + y * row, image.rgb, row);
}

// Nearest neighbour in 16.16 fixed point.
void affine_nearest(Image image, const uint8_t *source, const double m[6]) {
    const auto fixed = [](double v) { return floor_int(v * 65536.0 + 0.5); };
    const int n = image.size, x_step = fixed(m[0]), y_step = fixed(m[3]);
    int x_row = fixed(m[2] + m[0] * 0.5 + m[1] * 0.5), y_row = fixed(m[5] + m[3] * 0.5 + m[4] * 0.5);
    for (int y = 0; y < n; y++, x_row += fixed(m[1]), y_row += fixed(m[4])) {
        uint8_t *out = image.rgb + (size_t)y * n * 3;
        for (int x = 0, xs = x_row, ys = y_row; x < n; x++, out += 3, xs += x_step, ys += y_step) {
            const int xi = xs >> 16, yi = ys >> 16;
            if (xi >= 0 && xi < n && yi >= 0 && yi < n) memcpy(out, source + 3 * ((size_t)yi * n + xi), 3);
        }
    }
}

}  // namespace

void affine(Image image, const double matrix[6], Filter filter, const uint8_t fill[3]) {
    if (filter == NEAREST) {
        original.assign(image.rgb, image.rgb + image.bytes());
        fill_all(image, fill);
        affine_nearest(image, original.data(), matrix);
    } else {
        copy_padded(padded, image);
        fill_all(image, fill);
        places.at.resize(image.size);
        places.dx.resize(image.size);
        places.dy.resize(image.size);
        affine_filtered(image, padded, matrix, filter == BICUBIC, places);
    }
}

void rotate(Image image, double degrees, Filter filter, const uint8_t fill[3]) {
    const int n = image.size;
    double turn = std::fmod(degrees, 360.0);
    if (turn < 0.0) turn += 360.0;
    if (turn == 0.0) return;
    if (turn == 90.0 || turn == 180.0 || turn == 270.0) {
        original.assign(image.rgb, image.rgb + image.bytes());
        for (int y = 0; y < n; y++) {
            for (int x = 0; x < n; x++) {
                const int xs = turn == 90.0 ? n - 1 - y : turn == 180.0 ? n - 1 - x : y;
                const int ys = turn == 90.0 ? x : turn == 180.0 ? n - 1 - y : n - 1 - x;
                memcpy(image.rgb + 3 * ((size_t)y * n + x), &original[3 * ((size_t)ys * n + xs)], 3);
            }
        }
        return;
    }
    const auto round15 = [](double v) {  // Python's round(v, 15), through decimal digits like it
        char digits[32];
        snprintf(digits, sizeof digits, "%.15f", v);
        return strtod(digits, nullptr);
    };
    const double angle = -(turn * (M_PI / 180.0)), center = n / 2.0;
    double m[6] = {round15(std::cos(angle)), round15(std::sin(angle)), 0.0, round15(-std::sin(angle)), round15(std::cos(angle)), 0.0};
    m[2] = m[0] * -center + m[1] * -center + m[2] + center;
    m[5] = m[3] * -center + m[4] * -center + m[5] + center;
    affine(image, m, filter, fill);
}

}  // namespace loader
