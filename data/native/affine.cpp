// Affine transforms in double precision, term by term as Pillow computes them, so that the bytes are the same.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "pixel_ops.h"

namespace loader {

namespace {

typedef double Four __attribute__((vector_size(32)));     // the channels of one pixel
typedef int32_t FourInt __attribute__((vector_size(16)));
typedef uint8_t FourByte __attribute__((vector_size(4)));

constexpr int BORDER = 2;  // repeated edge pixels on each side: what clamping every tap's coordinate would read

struct Padded {
    std::vector<uint32_t> pixels;
    int stride = 0;
    const uint32_t *at(int x, int y) const { return pixels.data() + (size_t)(y + BORDER) * stride + x + BORDER; }

    void copy(Image image) {
        const int n = image.size;
        stride = n + 2 * BORDER;
        pixels.resize((size_t)stride * stride);
        for (int y = 0; y < n; y++) {
            uint32_t *row = pixels.data() + (size_t)(y + BORDER) * stride;
            const uint8_t *p = image.rgb + (size_t)y * n * 3;
            for (int x = 0; x < n; x++, p += 3) row[x + BORDER] = p[0] | p[1] << 8 | p[2] << 16;
            row[0] = row[1] = row[BORDER];
            row[n + BORDER] = row[n + BORDER + 1] = row[n + BORDER - 1];
        }
        const size_t bytes = (size_t)stride * 4;
        for (int i = 0; i < BORDER; i++) {
            memcpy(pixels.data() + (size_t)i * stride, pixels.data() + (size_t)BORDER * stride, bytes);
            memcpy(pixels.data() + (size_t)(n + BORDER + i) * stride, pixels.data() + (size_t)(n + BORDER - 1) * stride, bytes);
        }
    }
};

INLINE Four load(const uint32_t *p) {
    FourByte v;
    memcpy(&v, p, 4);
    return __builtin_convertvector(v, Four);
}

INLINE void store(uint8_t *p, Four v) {
    const FourInt i = __builtin_convertvector(v, FourInt);  // truncates
    p[0] = (uint8_t)i[0];
    p[1] = (uint8_t)i[1];
    p[2] = (uint8_t)i[2];
}

INLINE Four lerp(Four a, Four b, double d) { return a + (b - a) * d; }

INLINE Four cubic(Four v1, Four v2, Four v3, Four v4, double d) {
    const Four p2 = v3 - v1, p3 = 2.0 * (v1 - v2) + v3 - v4, p4 = v2 - v1 - v3 + v4;
    return v2 + d * (p2 + d * (p3 + d * p4));
}

INLINE int floor_int(double v) {
    const int i = (int)v;
    return i - (v < i);
}

// FLAT_X (FLAT_Y): the source column (row) is the output's, so nothing is interpolated along it.
template <bool CUBIC, bool FLAT_X, bool FLAT_Y>
INLINE void affine_rows(Image image, const Padded &source, const double m[6]) {
    const int n = image.size, stride = source.stride;
    for (int y = 0; y < n; y++) {
        uint8_t *out = image.rgb + (size_t)y * n * 3;
        const double yin = y + 0.5;
        for (int x = 0; x < n; x++, out += 3) {
            const double xin = x + 0.5;
            double xs = FLAT_X ? xin : m[0] * xin + m[1] * yin + m[2], ys = FLAT_Y ? yin : m[3] * xin + m[4] * yin + m[5];
            if (xs < 0.0 || xs >= n || ys < 0.0 || ys >= n) continue;  // keeps the fill
            xs -= 0.5;
            ys -= 0.5;
            const int xi = floor_int(xs), yi = floor_int(ys);
            const double dx = xs - xi, dy = ys - yi;
            const uint32_t *p = source.at(xi, yi);
            const auto row = [&](const uint32_t *q) __attribute__((always_inline)) {
                if (FLAT_X) return load(q);
                if (!CUBIC) return lerp(load(q), load(q + 1), dx);
                return cubic(load(q - 1), load(q), load(q + 1), load(q + 2), dx);
            };
            Four v;
            if (FLAT_Y)
                v = row(p);
            else if (!CUBIC)
                v = lerp(row(p), row(p + stride), dy);
            else
                v = cubic(row(p - stride), row(p), row(p + stride), row(p + 2 * stride), dy);
            if (CUBIC) {
                v = v > 0.0 ? v : Four{};
                v = v < 255.0 ? v : Four{} + 255.0;
            }
            store(out, v);
        }
    }
}

CLONES void affine_filtered(Image image, const Padded &source, const double m[6], bool bicubic) {
    const bool flat_x = m[0] == 1.0 && m[1] == 0.0 && m[2] == 0.0, flat_y = m[3] == 0.0 && m[4] == 1.0 && m[5] == 0.0;
    if (bicubic) {
        if (flat_x)
            affine_rows<true, true, false>(image, source, m);
        else if (flat_y)
            affine_rows<true, false, true>(image, source, m);
        else
            affine_rows<true, false, false>(image, source, m);
    } else {
        if (flat_x)
            affine_rows<false, true, false>(image, source, m);
        else if (flat_y)
            affine_rows<false, false, true>(image, source, m);
        else
            affine_rows<false, false, false>(image, source, m);
    }
}

// Nearest neighbour in 16.16 fixed point.
void affine_nearest(Image image, const Padded &source, const double m[6]) {
    const auto fixed = [](double v) { return floor_int(v * 65536.0 + 0.5); };
    const int n = image.size;
    int x_row = fixed(m[2] + m[0] * 0.5 + m[1] * 0.5), y_row = fixed(m[5] + m[3] * 0.5 + m[4] * 0.5);
    for (int y = 0; y < n; y++, x_row += fixed(m[1]), y_row += fixed(m[4])) {
        uint8_t *out = image.rgb + (size_t)y * n * 3;
        for (int x = 0, xs = x_row, ys = y_row; x < n; x++, out += 3, xs += fixed(m[0]), ys += fixed(m[3])) {
            const int xi = xs >> 16, yi = ys >> 16;
            if (xi >= 0 && xi < n && yi >= 0 && yi < n) memcpy(out, source.at(xi, yi), 3);
        }
    }
}

thread_local Padded padded;

}  // namespace

void affine(Image image, const double matrix[6], Filter filter, const uint8_t fill[3]) {
    padded.copy(image);
    for (int i = 0; i < image.size * image.size; i++) memcpy(image.rgb + 3 * i, fill, 3);
    if (filter == NEAREST)
        affine_nearest(image, padded, matrix);
    else
        affine_filtered(image, padded, matrix, filter == BICUBIC);
}

void rotate(Image image, double degrees, Filter filter, const uint8_t fill[3]) {
    const int n = image.size;
    double turn = std::fmod(degrees, 360.0);
    if (turn < 0.0) turn += 360.0;
    if (turn == 0.0) return;
    if (turn == 90.0 || turn == 180.0 || turn == 270.0) {
        padded.copy(image);
        for (int y = 0; y < n; y++) {
            for (int x = 0; x < n; x++) {
                const int xs = turn == 90.0 ? n - 1 - y : turn == 180.0 ? n - 1 - x : y;
                const int ys = turn == 90.0 ? x : turn == 180.0 ? n - 1 - y : n - 1 - x;
                memcpy(image.rgb + 3 * ((size_t)y * n + x), padded.at(xs, ys), 3);
            }
        }
        return;
    }
    const auto round15 = [](double v) { return std::nearbyint(v * 1e15) / 1e15; };
    const double angle = -(turn * (M_PI / 180.0)), center = n / 2.0;
    double m[6] = {round15(std::cos(angle)), round15(std::sin(angle)), 0.0, round15(-std::sin(angle)), round15(std::cos(angle)), 0.0};
    m[2] = m[0] * -center + m[1] * -center + m[2] + center;
    m[5] = m[3] * -center + m[4] * -center + m[5] + center;
    affine(image, m, filter, fill);
}

}  // namespace loader
