// The keyed generator of data/keyed_random.py, bit for bit. The list of purposes and draws is kept there.
#pragma once
#include <cmath>
#include <cstdint>

namespace loader {

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15ULL;
enum Domain : uint64_t { SAMPLE = 1 };
enum Purpose : uint64_t { CROP = 1, INTERPOLATION, FLIP, PAD_CROP, RAND_AUGMENT, TRIVIAL, THREE, JITTER };

inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

inline uint64_t fold(uint64_t key, uint64_t value) { return mix(key + GAMMA * (value + 1)); }

inline uint64_t sample_key(uint64_t seed, uint64_t epoch, uint64_t index) {
    return fold(fold(fold(fold(0, seed), SAMPLE), epoch), index);
}

// The numbered draws of one purpose of one sample.
struct Draws {
    uint64_t key;
    Draws(uint64_t sample, Purpose purpose) : key(fold(sample, purpose)) {}
    uint64_t bits(uint64_t n) const { return fold(key, n); }
    double uniform(uint64_t n) const { return (double)(bits(n) >> 11) * 0x1p-53; }
    double range(uint64_t n, double low, double high) const { return low + (high - low) * uniform(n); }
    int below(uint64_t n, uint64_t count) const { return (int)(((bits(n) >> 32) * count) >> 32); }
    double gauss(uint64_t n) const {
        return std::sqrt(-2.0 * std::log(1.0 - uniform(n))) * std::cos(2.0 * M_PI * uniform(n + 1));
    }
};

}  // namespace loader
