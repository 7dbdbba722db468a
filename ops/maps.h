// What the ways to compute a convolution share: maps, their rows, tiles of products, and what follows.
#pragma once

#include "activation.h"

namespace halo {

constexpr int kHeight = 6;                             // channels and vectors of pixels of a tile, which the registers hold
constexpr int kVectors = kAccumulators / kHeight;
template <class T>
constexpr int kStrip = kVectors * kLanes<T>;           // its pixels

// (images, channels, H, W)
template <class T>
struct Map {
  T* data;
  int images, channels, H, W;

  bool empty() const { return images == 0 || channels == 0 || H == 0 || W == 0; }
  T* plane(int image, int channel) const { return data + (static_cast<ptrdiff_t>(image) * channels + channel) * H * W; }
};

// Calls visit(y, first column, last column, place) for each row that pixels [first, first + count) of a grid touch; `place` is the
// pixel that starts it, counted from the first one.
template <class Visit>
void each_row(int columns, int first, int count, Visit visit) {
  for (int place = 0; place < count;) {
    const int y = (first + place) / columns, x = (first + place) % columns, length = std::min(columns - x, count - place);
    visit(y, x, x + length, place);
    place += length;
  }
}

// What follows a convolution in a network whose statistics are settled: act(x * scale + shift + residual).
template <class T>
struct Finish {
  const T *scale, *shift, *residual;                   // (channels), (channels), shaped as the result or null
  Activation act;

  // `count` pixels of a channel, the first of them being number `place` of the result.
  void operator()(int channel, ptrdiff_t place, int count, T* x) const {
    for (int i = 0; i < count; i += kLanes<T>) {
      const Part lanes = part<T>(0, count - i);
      const Vec<T> sum = load(x + i, lanes) * scale[channel] + shift[channel];
      store(x + i, activate<T>(residual ? sum + load(residual + place + i, lanes) : sum, act), lanes);
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
