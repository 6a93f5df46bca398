// The choices for a training image, drawn from its key as data/augment.py draws them, and their application.
#pragma once
#include <cstdint>
#include <vector>

#include "pixel_ops.h"
#include "settings.h"

namespace loader {

struct Box {
    int top, left, height, width;
};

enum OperationName : int32_t {
    IDENTITY, AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS,
    SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, GAUSSIAN_BLUR,
};

struct Operation {
    OperationName name;
    double argument;      // degrees, px, bits or grey levels, or a factor
    Filter resample;      // of the affine operations
};

Box training_box(const Settings &settings, uint64_t key, int height, int width);
Filter training_filter(const Settings &settings, uint64_t key);
bool flips(const Settings &settings, uint64_t key);
void pad_offset(const Settings &settings, uint64_t key, int *top, int *left);
int draw_operations(const Settings &settings, uint64_t key, Operation *operations);  // returns how many, MAX_OPERATIONS at most
void apply(Image image, const Operation &operation, const uint8_t fill[3]);

constexpr int MAX_OPERATIONS = 32;

}  // namespace loader
