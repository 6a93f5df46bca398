// What the decoder is asked to do: a plain record that Python fills in place, so that a new epoch or image size
// compiles nothing. Field for field data.native_decoder.Settings; every field is eight bytes wide.
#pragma once
#include <cstdint>

namespace loader {

struct FailureLog;

enum PolicyKind : int64_t { NO_POLICY = 0, RAND = 1, TRIVIAL_WIDE = 2, THREE_AUGMENT = 3 };

struct Settings {
    int64_t seed, epoch;
    int64_t image_size;               // side of the output, px
    int64_t evaluate;                 // 1: resize and centre crop, nothing drawn
    int64_t filter;                   // BILINEAR, BICUBIC, or 0: drawn per sample
    // evaluation
    int64_t resized_side;             // of the short side, or of both with squash
    int64_t squash;
    // training
    int64_t random_crop, pad_crop;
    double scale[2], ratio[2];
    double hflip;
    int64_t policy;
    int64_t layers, increasing;       // RandAugment
    double prob, magnitude, magnitude_std, magnitude_max;
    double jitter;
    int64_t fill[3];
    // what to do about an image that cannot be read
    int64_t substitute;               // 1: decode the next readable one in its place
    int64_t num_samples;
    const uint8_t *file;              // the whole .beton, mapped
    int64_t file_size;
    const uint8_t *metadata;          // first sample's image record
    int64_t metadata_stride;          // bytes from one sample's record to the next one's
    FailureLog *failures;             // where unreadable samples are noted, or null
};

}  // namespace loader
