// Image operations on square packed RGB images, in place, equal to Pillow's.
#pragma once
#include <cstdint>

#include "resample.h"

namespace loader {

struct Image {
    uint8_t *rgb;  // (size, size, 3)
    int size;
    int bytes() const { return size * size * 3; }
};

void auto_contrast(Image image);
void equalize(Image image);
void invert(Image image);
void posterize(Image image, int bits);
void solarize(Image image, double threshold);
void solarize_add(Image image, int add);
void brightness(Image image, double factor);
void contrast(Image image, double factor);
void saturation(Image image, double factor);   // Pillow's ImageEnhance.Color
void sharpness(Image image, double factor);
void gaussian_blur(Image image, double radius);

// out(x, y) = in(m0 x + m1 y + m2, m3 x + m4 y + m5) at pixel centres; fill where that is outside.
void affine(Image image, const double matrix[6], Filter filter, const uint8_t fill[3]);
void rotate(Image image, double degrees, Filter filter, const uint8_t fill[3]);   // counter-clockwise
void shift(Image image, int dx, int dy);                                              // zeros move in

}  // namespace loader
