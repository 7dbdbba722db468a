// Parts of convolution.h and winograd.h: feature maps, their rows, the tiles of a GEMM, and what follows a convolution.
#pragma once

#include "activation.h"

namespace halo {

constexpr int kHeight = 6;                             // channels of a tile, whose sums stay in the registers
constexpr int kVectors = kAccumulators / kHeight;      // vectors of pixels of a tile
template <class T>
constexpr int kStrip = kVectors * kLanes<T>;           // pixels of a tile

// A feature map (images, channels, H, W).
template <class T>
struct Map {
  T* data;
  int images, channels, H, W;

  bool empty() const { return images == 0 || channels == 0 || H == 0 || W == 0; }
  T* plane(int image, int channel) const { return data + (static_cast<ptrdiff_t>(image) * channels + channel) * H * W; }
};

// Calls visit(y, begin, end, index) for each row of a grid that pixels [first, first + count) touch: they are columns
// [begin, end) of row y, and pixel `index` of the `count` is the first of them.
template <class Visit>
void each_row(int columns, int first, int count, Visit visit) {
  for (int index = 0; index < count;) {
    const int y = (first + index) / columns, x = (first + index) % columns;
    const int length = std::min(columns - x, count - index);
    visit(y, x, x + length, index);
    index += length;
  }
}

// The rest of a block after a convolution in inference: act(x * scale + shift + residual).
template <class T>
struct Finish {
  const T *scale, *shift, *residual;                   // (channels), (channels), shaped as the result or null
  Activation act;

  // Finishes `count` pixels of a channel in x. The first of them is number `index` of the result.
  void operator()(int channel, ptrdiff_t index, int count, T* x) const {
    for (int i = 0; i < count; i += kLanes<T>) {
      const Part lanes = part<T>(0, count - i);
      const Vec<T> sum = load(x + i, lanes) * scale[channel] + shift[channel];
      store(x + i, activate<T>(residual ? sum + load(residual + index + i, lanes) : sum, act), lanes);
    }
  }
};

template <class T, int NV, int... I>
constexpr std::array<Tile<T>, sizeof...(I)> tiles_of(std::integer_sequence<int, I...>) {
  return {tile<T, Layout::kRows, I + 1, NV>...};
}
template <class T, int... I>
constexpr std::array<std::array<Tile<T>, kHeight>, sizeof...(I)> all_tiles(std::integer_sequence<int, I...>) {
  return {tiles_of<T, I + 1>(std::make_integer_sequence<int, kHeight>())...};
}

}  // namespace halo
