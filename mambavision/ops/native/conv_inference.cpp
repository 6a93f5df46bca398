// 3x3 convolutions for inference in bfloat16 on channels-last maps: the block of stages 1 and 2, the stem, downsampling.
//
// A convolution is three matrix products a filter: in a zero-padded copy of some rows the three pixels under a row of the
// filter lie one after the other, so that these overlapping stretches are the rows of a matrix as they are. A thread
// takes a few rows of an image through all steps while they lie in the second-level cache; sums are float32.
#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_lines.h"
#include "scratch.h"

namespace mambavision {
namespace {

// Of padded lines at once: what leaves room for weights in the second-level cache.
constexpr int64_t kBandBytes = 768 << 10;

void check(const Tensor& x, bool may_be_float) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_cpu() && x.size(2) > 0 && x.size(3) > 0 &&
                        (x.scalar_type() == at::kBFloat16 || (may_be_float && x.scalar_type() == at::kFloat)),
                    "fused inference takes bfloat16 maps (B, C, H, W) on the CPU, got ", x.scalar_type(), " ",
                    x.sizes());
  TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()),
              "a model made by fuse_for_inference has no backward; use the model it was made from, or torch.no_grad()");
}

Tensor channels_last(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return at::empty({like.size(0), channels, height, width}, like.options(), at::MemoryFormat::ChannelsLast);
}

// How many parts an image's lines are cut into, so that all threads have work and a part's padded rows fit the cache.
int64_t parts_of(int64_t images, int64_t lines) {
  const int64_t threads = at::get_num_threads();
  if (images % threads == 0 || images >= 4 * threads) return 1;
  return std::min(divide_up(2 * threads, images), lines);
}

// x + conv2(gelu_tanh(conv1(x))), in bands of lines: a band's intermediate rows overlap the last band's by two.
struct ConvBlock {
  const Source& source;
  const Filter &first, &second;
  int64_t band;  // band: output lines at once

  int64_t line() const { return (source.width + 2) * first.pixel; }

  // Output lines [begin, end) of an image, to `out` where the image's output starts.
  void run(int64_t image, BFloat16* out, int64_t begin, int64_t end, BFloat16* input, BFloat16* middle,
           PanelPipeline& pipeline) const {
    const int64_t height = source.height, width = source.width, channels = first.channels, pixel = first.pixel;
    for (int64_t y = begin; y < end; y += band) {
      const int64_t lines = std::min(band, end - y), kept = y == begin ? 0 : 2;
      // `input` starts with line y - 2 of the image, `middle` with line y - 1 of the intermediate map.
      if (kept) {
        std::memmove(static_cast<void*>(input), input + band * line(), 4 * line() * sizeof(BFloat16));
        std::memmove(static_cast<void*>(middle), middle + band * line(), 2 * line() * sizeof(BFloat16));
      }
      for (int64_t i = 2 * kept; i < lines + 4; i++)
        copy_line(source, image, y - 2 + i, input + i * line() + pixel, pixel);
      for (int64_t i = kept; i < lines + 2; i++)
        if (y - 1 + i < 0 || y - 1 + i >= height)
          copy_line(source, image, y - 1 + i, middle + i * line() + pixel, pixel);
      const int64_t from = std::max(y - 1 + kept, int64_t{0}), to = std::min(y + lines + 1, height);
      if (from < to) {
        const BFloat16* top = input + (from + 1 - y) * line();
        convolve(pipeline, {{top, top + line(), top + 2 * line()}, pixel, width + 2, width, to - from}, first,
                 {middle + (from + 1 - y) * line() + pixel, line(), pixel, Activation::gelu_tanh});
      }
      convolve(pipeline, {{middle, middle + line(), middle + 2 * line()}, pixel, width + 2, width, lines}, second,
               {out + y * width * channels, width * channels, channels, Activation::none, input + 2 * line() + pixel,
                line(), pixel});
    }
  }
};

Tensor conv_block_inference(const Tensor& x_in, const Tensor& first_in, const Tensor& first_bias,
                            const Tensor& second_in, const Tensor& second_bias) {
  check(x_in, false);
  const Tensor x = x_in.contiguous(at::MemoryFormat::ChannelsLast);
  const Source source(x);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const Filter first(first_in, first_bias, channels), second(second_in, second_bias, channels);
  TORCH_CHECK(first.columns_used == channels && second.columns_used == channels, "the filters keep the width");
  const Tensor y = channels_last(x, channels, height, width);
  BFloat16* to = y.data_ptr<BFloat16>();
  const int64_t part = divide_up(height, parts_of(images, height)), parts = divide_up(height, part);
  const int64_t line = (width + 2) * first.pixel, line_bytes = line * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t bands = divide_up(part, std::max(kBandBytes / (2 * line_bytes), int64_t{4}));
  const ConvBlock block{source, first, second, divide_up(part, bands)};
  at::parallel_for(0, images * parts, 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    PanelPipeline pipeline(units);
    Scratch scratch;
    BFloat16 *input, *middle;
    const int64_t input_size = (block.band + 4) * line + slack(first.pixel);
    const int64_t middle_size = (block.band + 2) * line + slack(first.pixel);
    scratch.reserve(input, input_size, middle, middle_size);
    std::memset(static_cast<void*>(input), 0, input_size * sizeof(BFloat16));
    std::memset(static_cast<void*>(middle), 0, middle_size * sizeof(BFloat16));
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / parts, top = task % parts * part;
      block.run(image, to + image * height * width * channels, top, std::min(top + part, height), input, middle, pipeline);
    }
  });
  return y;
}

// One convolution in bands of lines. With stride 2 even and odd padded lines lie apart, so that the positions of all
// lines of the output are equally far from each other.
struct Convolution {
  const Source& source;
  const Filter& filter;
  int64_t stride, band;
  Activation activation;

  int64_t out_height() const { return (source.height - 1) / stride + 1; }
  int64_t out_width() const { return (source.width - 1) / stride + 1; }
  int64_t line() const { return round_up(source.width + 2, stride) * filter.pixel; }
  int64_t half() const { return (band + 2) * line() + slack(filter.pixel); }  // elements of one of the `stride` maps

  // Copies what output lines [y, y + lines) need to `maps`, and says what the filter slides over.
  Stretch prepare(int64_t image, int64_t y, int64_t lines, BFloat16* maps) const {
    BFloat16 *even = maps, *odd = maps + half();
    for (int64_t i = 0; i < stride * (lines - 1) + 3; i++) {
      BFloat16* map = stride == 1 ? maps + i * line() : (i % 2 ? odd : even) + i / 2 * line();
      copy_line(source, image, stride * y + i - 1, map + filter.pixel, filter.pixel);
    }
    Stretch stretch{{even, stride == 1 ? even + line() : odd, stride == 1 ? even + 2 * line() : even + line()}};
    stretch.step = stride * filter.pixel, stretch.line = line() / stretch.step;
    stretch.width = out_width(), stretch.lines = lines;
    return stretch;
  }
};

Tensor conv_inference(const Tensor& x_in, const Tensor& filter_in, const Tensor& bias, int64_t stride, bool relu) {
  check(x_in, true);
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, "stride is 1 or 2, got ", stride);
  const bool small = x_in.size(1) <= kSmallPixel;  // images: read as they come
  const Tensor x = small ? x_in : x_in.to(at::kBFloat16).contiguous(at::MemoryFormat::ChannelsLast);
  const Source source(x);
  const Filter filter(filter_in, bias, x.size(1));
  Convolution conv{source, filter, stride, 1, relu ? Activation::relu : Activation::none};
  const int64_t images = x.size(0), height = conv.out_height(), width = conv.out_width(), columns = filter.columns_used;
  const Tensor y = at::empty({images, columns, height, width}, x.options().dtype(at::kBFloat16),
                             at::MemoryFormat::ChannelsLast);
  BFloat16* to = y.data_ptr<BFloat16>();
  const int64_t line_bytes = stride * conv.line() * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t parts = std::max(divide_up(height * line_bytes, kBandBytes), parts_of(images, height));
  conv.band = divide_up(height, parts);
  const int64_t bands = divide_up(height, conv.band), tasks = images * bands;
  // Bands that go through a block of columns together.
  const int64_t share = divide_up(tasks, at::get_num_threads());
  const int64_t group = std::clamp<int64_t>(kBandBytes / (conv.band * line_bytes), 1, std::max(share, int64_t{1}));
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    PanelPipeline pipeline(units);
    Scratch scratch;
    BFloat16* maps;
    const int64_t size = stride * conv.half();
    scratch.reserve(maps, group * size);
    std::memset(static_cast<void*>(maps), 0, group * size * sizeof(BFloat16));
    std::vector<Stretch> stretches(group);
    std::vector<Target> targets(group);
    for (int64_t task = begin; task < end; task += group) {
      const int64_t count = std::min(group, end - task);
      for (int64_t i = 0; i < count; i++) {
        const int64_t image = (task + i) / bands, top = (task + i) % bands * conv.band;
        stretches[i] = conv.prepare(image, top, std::min(conv.band, height - top), maps + i * size);
        targets[i] = {to + (image * height + top) * width * columns, width * columns, columns, conv.activation};
      }
      convolve(pipeline, stretches.data(), targets.data(), count, filter);
    }
  });
  return y;
}

}  // namespace
}  // namespace mambavision

TORCH_LIBRARY_IMPL(mambavision, CPU, library) {
  library.impl("conv_block_inference", mambavision::conv_block_inference);
  library.impl("conv_inference", mambavision::conv_inference);
}


TORCH_LIBRARY_FRAGMENT(mambavision, library) {
  library.def(
      "conv_block_inference(Tensor x, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias) -> Tensor");
  library.def("conv_inference(Tensor x, Tensor filter, Tensor bias, int stride, bool relu) -> Tensor");
}
