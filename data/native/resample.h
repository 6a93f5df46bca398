// Antialiased separable resize of 8-bit images, bit for bit Pillow's: horizontal pass into bytes, then vertical,
// with weights of 22 fractional bits. Rows come in as 4-byte pixels (R, G, B, anything), go out as packed RGB.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace loader {

enum Filter { NEAREST = 0, BILINEAR = 1, BICUBIC = 2 };  // as in data/augment.py; NEAREST only for affine transforms
enum Isa { GENERIC = 0, AVX2 = 1 };

constexpr int WEIGHT_BITS = 22;   // fractional bits of a weight, Pillow's choice
constexpr int SPLIT_BITS = 15;    // a weight is high * 2^15 + low, both 16-bit signed: exact sums from 16-bit multiplies
constexpr int ROWS_AT_ONCE = 8;   // source rows resized together, so that a table entry is loaded once for all
constexpr int ROW_SLACK = 128;    // bytes beyond a source row that kernels may read (besides taps of weight zero)
// libjpeg-turbo writes pixels past the caches (non-temporal stores) if a row is aligned; reading them back at once then
// waits for memory, a third of the whole decoding time. So rows begin off any alignment.
constexpr int ROW_START = 4;
constexpr int STORE_SPILL = 16;   // bytes beyond a packed row that kernels may overwrite

Isa detect_isa();
extern Isa active_isa;

// One axis of a resize: output i is the weighted sum of `count[i]` inputs from `first[i]` on.
struct Axis {
    int out = 0, stride = 0;         // outputs; weights kept per output (largest count)
    std::vector<int> first, count;
    std::vector<int32_t> weight;     // (out, stride)
    int begin() const;               // the inputs that any output reads: [begin, end)
    int end() const;
};

// Outputs [out_first, out_first + out_count) of the resize of the span [box0, box1) of `in` inputs to `out` outputs.
// flip: the outputs in reverse order.
void make_axis(Axis &axis, int in, double box0, double box1, int out, int out_first, int out_count, Filter filter, bool flip);

// Pillow (from 13.0) begins with the pass that leaves less for the other one.
inline bool vertical_goes_first(int height, int width, int out_height, int out_width) {
    return height > out_height && height - out_height > 2 * (width - out_width);
}

// Resizes an image whose rows arrive one after the other. Reused for many images; owns its scratch.
class Resampler {
public:
    // x and y have been made; columns x.begin() .. x.end() and rows y.begin() .. y.end() of the source will be pushed.
    Axis x, y;
    // row_pixels: pixels of each pushed row; pixel_offset: index in it of the source's column x.begin().
    void start(int row_pixels, int pixel_offset, bool vertical_first, uint8_t *destination, size_t destination_stride);
    int rows_wanted() const;                            // how many rows to put into row(0), row(1), ... now; 0: finished
    uint8_t *row(int i) { return rows_.data() + ROW_START + (size_t)(rows_held_ + i) * row_stride_; }
    void push(int count);

private:
    void prepare_horizontal();
    void horizontal(const uint8_t *source, int count, uint8_t *out);
    void push_vertical_first(int count);
    void flush(int count);
    void vertical_ready();

    bool vertical_first_ = false;
    int pixel_offset_ = 0, rows_in_ = 0, rows_total_ = 0, rows_out_ = 0;
    int rows_held_ = 0, rows_room_ = 0;                 // vertical first: source rows kept, and how many there is room for
    size_t row_stride_ = 0, packed_stride_ = 0, destination_stride_ = 0;
    uint8_t *destination_ = nullptr;
    std::vector<uint8_t> rows_, squeezed_, packed_;     // source rows; vertically, horizontally resized rows
    int groups_ = 0;                                    // AVX2: groups of four taps
    std::vector<int> bases_;                            // AVX2: first source pixel of each output
    std::vector<uint8_t> table_;                        // AVX2: weights in the kernel's order
};

}  // namespace loader
