#include "augment.h"

#include <algorithm>
#include <cmath>

#include "keyed_random.h"

namespace loader {

namespace {

constexpr OperationName RAND_OPERATIONS[] = {AUTO_CONTRAST, EQUALIZE, INVERT,     ROTATE,    POSTERIZE, SOLARIZE,    SOLARIZE_ADD, COLOR,
                                             CONTRAST,      BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y,   TRANSLATE_X, TRANSLATE_Y};
constexpr OperationName TRIVIAL_OPERATIONS[] = {IDENTITY,   SHEAR_X,   SHEAR_Y,  TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR,
                                                CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE,    AUTO_CONTRAST, EQUALIZE};
constexpr OperationName JITTER_OPERATIONS[] = {BRIGHTNESS, CONTRAST, COLOR};
constexpr int JITTER_ORDERS[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
constexpr double MAX_LEVEL = 10.0, TRANSLATE_SHARE = 0.45;
constexpr int TRIVIAL_BINS = 31;

bool is_affine(OperationName name) {
    return name == ROTATE || name == SHEAR_X || name == SHEAR_Y || name == TRANSLATE_X || name == TRANSLATE_Y;
}

// Python's round: halves to even, the default rounding mode.
int round_even(double v) { return (int)std::nearbyint(v); }

double rand_argument(OperationName name, double level, double sign, int image_size, bool increasing) {
    switch (name) {
        case ROTATE:
            return sign * (level * 30.0);
        case SHEAR_X:
        case SHEAR_Y:
            return sign * (level * 0.3);
        case TRANSLATE_X:
        case TRANSLATE_Y:
            return sign * (level * TRANSLATE_SHARE) * image_size;
        case POSTERIZE: {
            const int bits = (int)(level * 4.0);
            return increasing ? 4 - bits : bits;
        }
        case SOLARIZE: {
            const int threshold = std::min(256, (int)(level * 256.0));
            return increasing ? 256 - threshold : threshold;
        }
        case SOLARIZE_ADD:
            return std::min(128, (int)(level * 110.0));
        case COLOR:
        case CONTRAST:
        case BRIGHTNESS:
        case SHARPNESS:
            return increasing ? std::max(0.1, 1.0 + sign * (level * 0.9)) : level * 1.8 + 0.1;
        default:
            return 0.0;
    }
}

int rand_augment(const Settings &s, uint64_t key, Operation *out) {
    const Draws draws(key, RAND_AUGMENT);
    int count = 0;
    for (int64_t layer = 0; layer < s.layers; layer++) {
        const uint64_t n = 8 * layer;
        const OperationName name = RAND_OPERATIONS[draws.below(n, std::size(RAND_OPERATIONS))];
        if (draws.uniform(n + 1) >= s.prob) continue;
        double level = s.magnitude;
        if (s.magnitude_std > 100.0)
            level = draws.range(n + 2, 0.0, level);
        else if (s.magnitude_std > 0.0)
            level = level + s.magnitude_std * draws.gauss(n + 2);
        level = std::max(0.0, std::min(level, s.magnitude_max)) / MAX_LEVEL;
        const double sign = draws.uniform(n + 4) < 0.5 ? -1.0 : 1.0;
        Filter resample = NEAREST;
        if (is_affine(name)) resample = s.filter ? (Filter)s.filter : draws.below(n + 5, 2) ? BICUBIC : BILINEAR;
        out[count++] = {name, rand_argument(name, level, sign, (int)s.image_size, s.increasing), resample};
    }
    return count;
}

Operation trivial(uint64_t key) {
    const Draws draws(key, TRIVIAL);
    const OperationName name = TRIVIAL_OPERATIONS[draws.below(0, std::size(TRIVIAL_OPERATIONS))];
    const double share = (double)draws.below(1, TRIVIAL_BINS) / (TRIVIAL_BINS - 1);
    const double sign = draws.below(2, 2) ? -1.0 : 1.0;
    switch (name) {
        case SHEAR_X:
        case SHEAR_Y:
            return {name, sign * (share * 0.99), NEAREST};
        case TRANSLATE_X:
        case TRANSLATE_Y:
            return {name, -sign * std::floor(share * 32.0), NEAREST};
        case ROTATE:
            return {name, sign * (share * 135.0), NEAREST};
        case BRIGHTNESS:
        case COLOR:
        case CONTRAST:
        case SHARPNESS:
            return {name, 1.0 + sign * (share * 0.99), NEAREST};
        case POSTERIZE:
            return {name, 8.0 - round_even(share * 6.0), NEAREST};
        case SOLARIZE:
            return {name, 255.0 - share * 255.0, NEAREST};
        default:
            return {name, 0.0, NEAREST};
    }
}

Operation three(uint64_t key) {
    const Draws draws(key, THREE);
    const int choice = draws.below(0, 3);
    if (choice == 0) return {SOLARIZE, 128.0, NEAREST};
    if (choice == 1) return {COLOR, 0.0, NEAREST};
    return {GAUSSIAN_BLUR, draws.range(1, 0.1, 2.0), NEAREST};
}

}  // namespace

Box training_box(const Settings &s, uint64_t key, int height, int width) {
    if (!s.random_crop) return {0, 0, height, width};
    const Draws draws(key, CROP);
    const double area = (double)((int64_t)height * width), log0 = std::log(s.ratio[0]), log1 = std::log(s.ratio[1]);
    for (int t = 0; t < 10; t++) {
        const double target = area * draws.range(4 * t, s.scale[0], s.scale[1]);
        const double ratio = std::exp(draws.range(4 * t + 1, log0, log1));
        const int w = round_even(std::sqrt(target * ratio)), h = round_even(std::sqrt(target / ratio));
        if (w > 0 && w <= width && h > 0 && h <= height)
            return {draws.below(4 * t + 2, height - h + 1), draws.below(4 * t + 3, width - w + 1), h, w};
    }
    int w = width, h = height;
    const double ratio = (double)width / height;
    if (ratio < s.ratio[0])
        h = round_even(w / s.ratio[0]);
    else if (ratio > s.ratio[1])
        w = round_even(h * s.ratio[1]);
    h = std::max(1, std::min(h, height));
    w = std::max(1, std::min(w, width));
    return {(height - h) / 2, (width - w) / 2, h, w};
}

Filter training_filter(const Settings &s, uint64_t key) {
    if (s.filter) return (Filter)s.filter;
    return Draws(key, INTERPOLATION).below(0, 2) ? BICUBIC : BILINEAR;
}

bool flips(const Settings &s, uint64_t key) { return Draws(key, FLIP).uniform(0) < s.hflip; }

void pad_offset(const Settings &s, uint64_t key, int *top, int *left) {
    const Draws draws(key, PAD_CROP);
    *top = draws.below(0, 2 * s.pad_crop + 1);
    *left = draws.below(1, 2 * s.pad_crop + 1);
}

int draw_operations(const Settings &s, uint64_t key, Operation *out) {
    int count = 0;
    if (s.policy == RAND) return rand_augment(s, key, out);
    if (s.policy == TRIVIAL_WIDE) out[count++] = trivial(key);
    if (s.policy == THREE_AUGMENT) out[count++] = three(key);
    if (s.jitter > 0.0) {
        const Draws draws(key, JITTER);
        for (int which : JITTER_ORDERS[draws.below(3, 6)])
            out[count++] = {JITTER_OPERATIONS[which], draws.range(which, std::max(0.0, 1.0 - s.jitter), 1.0 + s.jitter), NEAREST};
    }
    return count;
}

void apply(Image image, const Operation &operation, const uint8_t fill[3]) {
    const double v = operation.argument;
    const auto transform = [&](double m1, double m2, double m3, double m5) {
        const double matrix[6] = {1.0, m1, m2, m3, 1.0, m5};
        affine(image, matrix, operation.resample, fill);
    };
    switch (operation.name) {
        case IDENTITY: return;
        case AUTO_CONTRAST: return auto_contrast(image);
        case EQUALIZE: return equalize(image);
        case INVERT: return invert(image);
        case ROTATE: return rotate(image, v, operation.resample, fill);
        case POSTERIZE: return posterize(image, (int)v);
        case SOLARIZE: return solarize(image, v);
        case SOLARIZE_ADD: return solarize_add(image, (int)v);
        case COLOR: return saturation(image, v);
        case CONTRAST: return contrast(image, v);
        case BRIGHTNESS: return brightness(image, v);
        case SHARPNESS: return sharpness(image, v);
        case SHEAR_X: return transform(v, 0.0, 0.0, 0.0);
        case SHEAR_Y: return transform(0.0, 0.0, v, 0.0);
        case TRANSLATE_X: return transform(0.0, v, 0.0, 0.0);
        case TRANSLATE_Y: return transform(0.0, 0.0, 0.0, v);
        case GAUSSIAN_BLUR: return gaussian_blur(image, v);
    }
}

}  // namespace loader
