// A 1x1 convolution without bias on a CPU, forward and backward: the projections to queries, keys and values.
//
// It is one matrix product per image, and Paddle's own takes two to three times as long for want of a recent BLAS.
// Panels of pixels are copied to contiguous memory, which also does away with a stride and with rows of odd length.
// The gradient of the weights adds up images and pixels in their order, whatever the number of threads.
#pragma once

#include "simd.h"

namespace halo {

constexpr int kPanel = 64;                             // columns that are multiplied at a time
constexpr int kDepth = 256;                            // and terms: such a panel stays in the second-level cache

// (B, channels, H, W), of which the operator reads or writes every stride-th pixel: `pixels()` of them, `width` to a row.
template <class T>
struct Map {
  T* data;
  int channels, H, W, stride;

  int width() const { return (W + stride - 1) / stride; }
  int pixels() const { return (H + stride - 1) / stride * width(); }
  T* plane(int image, int channel) const { return data + (static_cast<ptrdiff_t>(image) * channels + channel) * H * W; }
  ptrdiff_t offset(int pixel) const { return static_cast<ptrdiff_t>(pixel / width()) * stride * W + pixel % width() * stride; }
  // Pixels [first, first + count) of a plane, to and from contiguous memory.
  void read(int image, int channel, int first, int count, std::remove_const_t<T>* to) const {
    const T* from = plane(image, channel);
    if (stride == 1) std::copy_n(from + first, count, to);
    else for (int i = 0; i < count; ++i) to[i] = from[offset(first + i)];
  }
  void write(int image, int channel, int first, int count, const T* from) const {
    T* to = plane(image, channel);
    if (stride == 1) std::copy_n(from, count, to + first);
    else for (int i = 0; i < count; ++i) to[offset(first + i)] = from[i];
  }
};

// One thread of out[o, p] = sum_c weight[o, c] in[c, p], weight (O, C); a task is a panel of pixels of one image.
template <class T>
class Project {
 public:
  Project(const T* weight, Map<const T> in, Map<T> out)
      : weight(weight), in(in), out(out), panel(memory.take(kDepth * kPanel)), result(memory.take(out.channels * kPanel)) {}

  static int panels(const Map<T>& out) { return (out.pixels() + kPanel - 1) / kPanel; }

  void operator()(int task) {
    const int image = task / panels(out), first = task % panels(out) * kPanel, count = std::min(kPanel, out.pixels() - first);
    const int columns = round_up<T>(count);
    for (int c = 0; c < in.channels; c += kDepth) {
      const int depth = std::min(kDepth, in.channels - c);
      for (int k = 0; k < depth; ++k)
        in.read(image, c + k, first, count, panel + k * kPanel);
      multiply<T, Layout::kRows>(out.channels, columns, depth, weight + c, in.channels, panel, kPanel, result, kPanel, c > 0);
    }
    for (int o = 0; o < out.channels; ++o)
      out.write(image, o, first, count, result + o * kPanel);
  }

 private:
  Arena<T> memory;
  const T* weight;
  const Map<const T> in;
  const Map<T> out;
  T *panel, *result;                                   // (kDepth, kPanel), (O, kPanel)
};

// One thread of dweight[o, c] = sum over images and pixels of dout[o, p] in[c, p]; a task is `rows` of o and a panel of c.
template <class T>
class WeightGradient {
 public:
  WeightGradient(int images, Map<const T> in, Map<const T> dout, T* dweight)
      : images(images), in(in), dout(dout), rows(std::clamp(dout.channels * panels() / 8, 24, 192)), dweight(dweight),
        lines(memory.take(kPanel * kDepth)), panel(memory.take(kDepth * kPanel)), sum(memory.take(rows * kPanel)) {}

  int tasks() const { return (dout.channels + rows - 1) / rows * panels(); }

  void operator()(int task) {
    const int o = task / panels() * rows, c = task % panels() * kPanel;
    const int height = std::min(rows, dout.channels - o), count = std::min(kPanel, in.channels - c), columns = round_up<T>(count);
    bool add = false;
    for (int image = 0; image < images; ++image)
      for (int first = 0; first < dout.pixels(); first += kDepth, add = true) {
        const int depth = std::min(kDepth, dout.pixels() - first);
        for (int k = 0; k < count; ++k)
          in.read(image, c + k, first, depth, lines + k * kDepth);
        transpose(lines, kDepth, panel, kPanel, count, depth);
        const T* left = dout.plane(image, o) + first;
        multiply<T, Layout::kRows>(height, columns, depth, left, dout.pixels(), panel, kPanel, sum, kPanel, add);
      }
    for (int m = 0; m < height; ++m)
      std::copy_n(sum + m * kPanel, count, dweight + static_cast<ptrdiff_t>(o + m) * in.channels + c);
  }

 private:
  int panels() const { return (in.channels + kPanel - 1) / kPanel; }

  Arena<T> memory;
  const int images;
  const Map<const T> in, dout;
  const int rows;                                      // few enough that all cores find work, else many, which share a panel
  T *dweight, *lines, *panel, *sum;                    // (O, C), (kPanel, kDepth), (kDepth, kPanel), (rows, kPanel)
};

// in (B, C, H, W), weight (O, C) -> out (B, O, H/stride, W/stride), rounded up
template <class T>
void project(int B, Map<const T> in, const T* weight, Map<T> out) {
  parallel(B * Project<T>::panels(out), [&] { return Project<T>(weight, in, out); });
}

// dout -> din as in, dweight as weight
template <class T>
void project_backward(int B, Map<const T> in, const T* weight, Map<const T> dout, Map<T> din, T* dweight) {
  Arena<T> memory;
  T* transposed = memory.take(static_cast<size_t>(in.channels) * dout.channels);
  transpose(weight, in.channels, transposed, dout.channels, dout.channels, in.channels);
  if (din.stride > 1) std::fill_n(din.data, static_cast<size_t>(B) * din.channels * din.H * din.W, T(0));
  project(B, dout, transposed, din);
  parallel(WeightGradient<T>(B, in, dout, dweight).tasks(), [&] { return WeightGradient<T>(B, in, dout, dweight); });
}

}  // namespace halo
