// What 3x3 convolutions of padded bfloat16 lines are made of: filters, the stretches they slide over, lines copied and padded.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>

#include "panel_pipeline.h"

namespace mambavision {
namespace {

using at::Tensor;

constexpr int64_t kPixelPad = 32;    // channels of a padded pixel are a multiple of this: whole cache lines and tiles
constexpr int64_t kSmallPixel = 8;   // unless they are so few: images
constexpr int64_t kShortRow = 192;   // up to so many elements all rows of a filter go in one product; longer ones are slower so

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

int64_t padded_pixel(int64_t channels) {
  return channels <= kSmallPixel ? kSmallPixel : round_up(channels, kPixelPad);
}

// A filter (blocks of columns; for each row of the filter three pixels' channels; columns of the block), see pack_filter.
// A row's length is a multiple of kPixelPad: where pixels are small its zeros meet the pixel that comes next.
struct Filter : PackedWeight {
  const float* bias = nullptr;
  int64_t channels, pixel, row_length, columns_used;

  Filter(const Tensor& packed, const Tensor& bias_in, int64_t channels)
      : PackedWeight(packed),
        channels(channels),
        pixel(padded_pixel(channels)),
        row_length(round_up(3 * pixel, kPixelPad)),
        columns_used(bias_in.numel()) {
    TORCH_CHECK(packed.scalar_type() == at::kBFloat16 && inner == 3 * row_length, "the filter is not one for ",
                channels, " channels: ", packed.sizes());
    TORCH_CHECK(bias_in.scalar_type() == at::kFloat && bias_in.is_contiguous() && has_columns(columns_used),
                "a filter's bias is float32, one an output channel");
    bias = bias_in.const_data_ptr<float>();
  }
};

// What a filter slides over: position p has the pixels under row r of the filter at rows[r] + p * step. A line of the
// output is `line` positions, of which the first `width` count; the others straddle the edge and are dropped.
struct Stretch {
  const BFloat16* rows[3];
  int64_t step, line, width, lines;
};

// Where the output goes: elements from line to line and from pixel to pixel.
struct Target {
  BFloat16* out;
  int64_t line, pixel;
  Activation activation = Activation::none;
  const BFloat16* residual = nullptr;
  int64_t residual_line = 0, residual_pixel = 0;
};

// The rows of a panel that starts at this position: only positions inside a line count.
void keep_positions(PanelRows& rows, const Stretch& stretch, int64_t first, const Target& target) {
  int64_t y = first / stretch.line, x = first % stretch.line, count = 0;
  for (int64_t row = 0; row < kPanelRows && y < stretch.lines; y++, x = 0)
    for (; row < kPanelRows && x < stretch.line; row++, x++) {
      if (x >= stretch.width) continue;
      rows.row[count] = row;
      rows.out[count] = y * target.line + x * target.pixel;
      rows.residual[count++] = y * target.residual_line + x * target.residual_pixel;
    }
  rows.count = count;
}

// Positions beyond the last line are computed up to a whole panel and dropped; for them `slack` elements follow each map.
// Several stretches share some blocks of columns while these are in the cache.
void convolve(PanelPipeline& pipeline, const Stretch* stretches, const Target* targets, int64_t count, const Filter& filter) {
  const int64_t some = std::max<int64_t>(1, kWeightBytes / (2 * filter.inner * kPanelColumns));
  const int64_t together = filter.row_length <= kShortRow ? 3 : 1;
  for (int64_t first_block = 0; first_block < filter.blocks; first_block += some)
    for (int64_t s = 0; s < count; s++) {
      const Stretch& stretch = stretches[s];
      const Target& target = targets[s];
      const Finish finish = target.residual ? added_to(target.residual, target.out, filter.bias)
                                            : into(target.out, filter.bias, target.activation);
      const int64_t positions = (stretch.lines - 1) * stretch.line + stretch.width;
      for (int64_t first = 0; first < positions; first += kPanelRows) {
        keep_positions(pipeline.next_rows(), stretch, first, target);
        const int64_t at = first * stretch.step;
        const void* rows[] = {stretch.rows[0] + at, stretch.rows[1] + at, stretch.rows[2] + at};
        for (int64_t block = first_block; block < std::min(first_block + some, filter.blocks); block++) {
          const int64_t column = block * kPanelColumns, columns = std::min(kPanelColumns, filter.columns_used - column);
          for (int64_t row = 0; row < 3; row += together)
            pipeline.multiply({kPanelRows, columns, filter.row_length, rows + row, together, stretch.step,
                               filter.at(block, row * filter.row_length), kPanelColumns, pipeline.sums(), kPanelColumns,
                               row > 0});
          pipeline.finish_later(pipeline.sums(), columns, part_at(finish, 0, column, 0));
        }
      }
    }
  pipeline.flush();
}

void convolve(PanelPipeline& pipeline, const Stretch& stretch, const Filter& filter, const Target& target) {
  convolve(pipeline, &stretch, &target, 1, filter);
}

int64_t slack(int64_t pixel) { return 2 * (kPanelRows + 3) * pixel + kPixelPad; }

// Maps to read from: elements from image to image, line to line, pixel to pixel, channel to channel.
struct Source {
  const void* data;
  bool is_float;
  int64_t channels, height, width, image, line, pixel, channel;

  explicit Source(const Tensor& x)
      : data(x.const_data_ptr()),
        is_float(x.scalar_type() == at::kFloat),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        image(x.stride(0)),
        line(x.stride(2)),
        pixel(x.stride(3)),
        channel(x.stride(1)) {}
};

template <class T>
void gather_pixels(const T* from, const Source& source, BFloat16* to, int64_t pixel) {
  for (int64_t x = 0; x < source.width; x++)
    for (int64_t c = 0; c < source.channels; c++)
      to[x * pixel + c] = static_cast<BFloat16>(from[x * source.pixel + c * source.channel]);
}

// Line y of an image, zeros where it is outside, to pixels `pixel` elements apart. Their padding stays as it is.
void copy_line(const Source& source, int64_t image, int64_t y, BFloat16* to, int64_t pixel) {
  if (y < 0 || y >= source.height) {
    std::memset(static_cast<void*>(to), 0, source.width * pixel * sizeof(BFloat16));
    return;
  }
  const int64_t offset = image * source.image + y * source.line;
  if (source.is_float) return gather_pixels(static_cast<const float*>(source.data) + offset, source, to, pixel);
  const BFloat16* from = static_cast<const BFloat16*>(source.data) + offset;
  if (source.channel != 1) return gather_pixels(from, source, to, pixel);
  if (source.pixel == pixel) {
    std::memcpy(static_cast<void*>(to), from, source.width * pixel * sizeof(BFloat16));
    return;
  }
  int64_t x = 0;
  if (source.channels == 3 && pixel >= 4)  // in one piece: the element behind the last is the next pixel's, and cleared
    for (; x + 1 < source.width; x++) {
      uint64_t values;
      std::memcpy(&values, from + x * source.pixel, sizeof values);
      values &= 0xffffffffffff;
      std::memcpy(static_cast<void*>(to + x * pixel), &values, sizeof values);
    }
  for (; x < source.width; x++)
    std::memcpy(static_cast<void*>(to + x * pixel), from + x * source.pixel, source.channels * sizeof(BFloat16));
}

}  // namespace
}  // namespace mambavision
