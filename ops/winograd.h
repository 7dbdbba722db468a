// A 3x3 convolution of stride 1 on a CPU with 2.25 times fewer multiplications: F(2x2, 3x3) of Lavin and Gray 2015,
// 'Fast Algorithms for Convolutional Neural Networks', arXiv 1509.09308.
//
// A tile of 4x4 input pixels gives 2x2 output pixels. Tiles and kernels are transformed by additions and halving only,
// so the rounding error is that of a direct convolution; larger tiles save more but lose precision. In between are 16
// matrix products over channels, one for each position in a transformed tile, with tiles along the vectors.
#pragma once

#include "maps.h"

namespace halo {

constexpr int kPositions = 16;                         // of a transformed tile
constexpr int kMinWinograd = 16;                       // fewest channels for which it is faster
constexpr int kMaxWinograd = 128;                      // most input channels: a strip must fit the second-level cache

// True if this convolution can be computed so, and is faster so.
inline bool winograd_applies(int k, int stride, int in_channels, int out_channels) {
  return k == 3 && stride == 1 && in_channels >= kMinWinograd && in_channels <= kMaxWinograd &&
         out_channels >= kMinWinograd;
}

// Transforms kernels, entry(o, c, i) being entry i of the 3x3 kernel from channel c to channel o -> (kPositions, O, C)
template <class T, class Entry>
void transform_kernels(int O, int C, Entry entry, T* out) {
  constexpr int L = kLanes<T>;
  parallel(O, [&] {
    return [&](int o) {
      for (int c = 0; c < C; c += L) {
        T kernel[9][L] = {};                           // of channels [c, c + L)
        for (int lane = 0; lane < std::min(L, C - c); ++lane)
          for (int i = 0; i < 9; ++i) kernel[i][lane] = entry(o, c + lane, i);
        Vec<T> rows[4][3];                             // G times the kernel
        for (int j = 0; j < 3; ++j) {
          const Vec<T> a = load(kernel[j]), b = load(kernel[3 + j]), d = load(kernel[6 + j]);
          rows[0][j] = a, rows[1][j] = (a + b + d) / 2, rows[2][j] = (a - b + d) / 2, rows[3][j] = d;
        }
        for (int i = 0; i < 4; ++i) {
          const Vec<T>* r = rows[i];
          const Vec<T> columns[4] = {r[0], (r[0] + r[1] + r[2]) / 2, (r[0] - r[1] + r[2]) / 2, r[2]};
          for (int j = 0; j < 4; ++j)
            store(out + (static_cast<size_t>(i * 4 + j) * O + o) * C + c, columns[j], part<T>(0, C - c));
        }
      }
    };
  });
}

// One thread. A task is a strip of tiles of one image.
template <class T>
class Winograd {
 public:
  Winograd(const Map<const T>& in, const T* kernels, const Map<T>& out, const Finish<T>* finish)
      : in(in), out(out), kernels(kernels), finish(finish), rows((out.H + 1) / 2), columns((out.W + 1) / 2),
        strips((rows * columns + kStrip<T> - 1) / kStrip<T>) {}

  int tasks() const { return out.images * strips; }

  void operator()(int task) {
    if (!tiles) allocate();
    const int image = task / strips, first = task % strips * kStrip<T>;
    const int count = std::min(kStrip<T>, rows * columns - first);
    for (int c = 0; c < in.channels; ++c)
      each_row(columns, first, count, [&](int y, int begin, int end, int index) {
        transform(in.plane(image, c), y, begin, end - begin, tiles + static_cast<ptrdiff_t>(c) * kStrip<T> + index);
      });
    const int blocks = (out.channels + kHeight - 1) / kHeight;
    for (int block = 0; block < blocks; ++block) {
      const int top = out.channels * block / blocks, height = out.channels * (block + 1) / blocks - top;
      multiply(top, height, count);
      for (int o = top; o < top + height; ++o)
        each_row(columns, first, count, [&](int y, int begin, int end, int index) {
          transform_back(sums + (o - top) * kStrip<T> + index, image, o, y, begin, end - begin);
        });
    }
  }

 private:
  void allocate() {
    tiles = memory.take(static_cast<size_t>(kPositions) * in.channels * kStrip<T>);
    sums = memory.take(static_cast<size_t>(kPositions) * kHeight * kStrip<T>);
    zeros = memory.take(in.W);
    for (auto* half : {&even, &odd})
      for (T*& line : *half) line = memory.take(kStrip<T> + 1);
  }

  // Transforms tiles [begin, begin + count) of a row of tiles: four rows of pixels
  // -> to[position * channels * kStrip + tile]
  void transform(const T* plane, int tile_row, int begin, int count, T* to) {
    constexpr int L = kLanes<T>;
    const int x = 2 * begin - 1, width = 2 * count + 2;                    // pixels [x, x + width); from x on,
    const int left = std::max(-x, 0), right = std::min(in.W - x, width);   // [left, right) are inside the map
    const T* lines[4];
    for (int i = 0; i < 4; ++i) {
      const int y = 2 * tile_row - 1 + i;
      lines[i] = (y >= 0 && y < in.H ? plane + static_cast<ptrdiff_t>(y) * in.W : zeros) + x;
    }
    for (int i = 0; i < width; i += 2 * L) {
      const Part low = part<T>(left - i, right - i), high = part<T>(left - i - L, right - i - L);
      Vec<T> a[4], b[4];
      for (int j = 0; j < 4; ++j) a[j] = load(lines[j] + i, low), b[j] = load(lines[j] + i + L, high);
      const Vec<T> rows[4][2] = {{a[0] - a[2], b[0] - b[2]}, {a[1] + a[2], b[1] + b[2]}, {a[2] - a[1], b[2] - b[1]},
                                 {a[1] - a[3], b[1] - b[3]}};
      for (int j = 0; j < 4; ++j) unzip<T>(rows[j][0], rows[j][1], even[j] + i / 2, odd[j] + i / 2);
    }
    const ptrdiff_t position = static_cast<ptrdiff_t>(in.channels) * kStrip<T>;      // from one to the next
    for (int i = 0; i < 4; ++i, to += 4 * position)
      for (int t = 0; t < count; t += L) {
        const Vec<T> a = load(even[i] + t), b = load(odd[i] + t), c = load(even[i] + t + 1), d = load(odd[i] + t + 1);
        const Vec<T> columns[4] = {a - c, b + c, c - b, b - d};
        for (int j = 0; j < 4; ++j) store(to + j * position + t, columns[j], part<T>(0, count - t));
      }
  }

  // Computes `sums` of output channels [top, top + height) for `count` tiles.
  void multiply(int top, int height, int count) {
    static constexpr auto multiply_tile = all_tiles<T>(std::make_integer_sequence<int, kVectors>());
    const int C = in.channels;
    for (int i = 0; i < kPositions; ++i)
      multiply_tile[(count + kLanes<T> - 1) / kLanes<T> - 1][height - 1](
          C, kernels + (static_cast<size_t>(i) * out.channels + top) * C, C,
          tiles + static_cast<size_t>(i) * C * kStrip<T>, kStrip<T>, nullptr, 0, sums + i * kHeight * kStrip<T>,
          kStrip<T>);
  }

  // Transforms back: from[position * kHeight * kStrip + tile] -> two rows of pixels
  void transform_back(const T* from, int image, int channel, int tile_row, int begin, int count) {
    constexpr int L = kLanes<T>;
    const int width = std::min(2 * count, out.W - 2 * begin);
    T* const row = out.plane(image, channel) + static_cast<ptrdiff_t>(2 * tile_row) * out.W + 2 * begin;
    const bool both = 2 * tile_row + 1 < out.H;
    for (int t = 0; t < count; t += L) {
      Vec<T> rows[2][4];
      for (int j = 0; j < 4; ++j) {
        Vec<T> m[4];
        for (int i = 0; i < 4; ++i) m[i] = load(from + (4 * i + j) * kHeight * kStrip<T> + t);
        rows[0][j] = m[0] + m[1] + m[2], rows[1][j] = m[1] - m[2] - m[3];
      }
      for (int i = 0; i < 1 + both; ++i)
        zip<T>(rows[i][0] + rows[i][1] + rows[i][2], rows[i][1] - rows[i][2] - rows[i][3], row + i * out.W + 2 * t,
               width - 2 * t);
    }
    for (int i = 0; finish && i < 1 + both; ++i)
      (*finish)(channel, row + i * out.W - out.data, width, row + i * out.W);
  }

  Arena<T> memory;
  const Map<const T> in;
  const Map<T> out;
  const T* kernels;                                    // (kPositions, out.channels, in.channels)
  const Finish<T>* finish;                             // null: nothing follows
  const int rows, columns, strips;                     // of tiles
  T* tiles = nullptr;                                  // transformed, (kPositions, in.channels, kStrip)
  T* sums = nullptr;                                   // over the input channels, (kPositions, kHeight, kStrip)
  T* zeros = nullptr;                                  // a row of pixels outside the map, (W)
  T *even[4], *odd[4];                                 // every other pixel of four rows, one more than a strip
};

// entry as for transform_kernels
template <class T, class Entry>
void winograd(Map<const T> in, Entry entry, Map<T> out, const Finish<T>* finish = nullptr) {
  Arena<T> memory;
  T* kernels = memory.take(static_cast<size_t>(kPositions) * out.channels * in.channels);
  transform_kernels(out.channels, in.channels, entry, kernels);
  parallel(Winograd<T>(in, kernels, out, finish).tasks(), [&] { return Winograd<T>(in, kernels, out, finish); });
}

}  // namespace halo
