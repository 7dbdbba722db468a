// The maximum over windows of 3 x 3 pixels, two apart, on a CPU, forward and backward: the pool of a ResNet's stem.
//
// Window (y, x) holds rows 2y - 1 .. 2y + 1 and columns 2x - 1 .. 2x + 1, as far as the map has them. A NaN is larger than any
// number. The gradient goes to the first of equal pixels, row by row; what windows that overlap give to a pixel is added in
// their order. A task is a plane.
#pragma once

#include <limits>

#include "maps.h"

namespace halo {

// The three rows of a plane that a row of windows sees, less than any number beyond the plane.
template <class T>
class WindowRows {
 public:
  explicit WindowRows(int W)
      : W(W), size((W + 1) / 2 + 2 * kLanes<T>), pixels(6 * size, lowest()) {}

  // Window row y.
  void read(const T* plane, int H, int y) {
    constexpr int L = kLanes<T>;
    for (int i = 0; i < 3; ++i) {
      const int from_y = 2 * y - 1 + i;
      if (from_y < 0 || from_y >= H) {
        std::fill_n(odd(i), 2 * size, lowest());
        continue;
      }
      const T* from = plane + static_cast<ptrdiff_t>(from_y) * W;
      for (int x = 0; x < W; x += 2 * L)
        unzip<T>(load(from + x, part<T>(0, W - x)), load(from + x + L, part<T>(0, W - x - L)), even(i) + x / 2, odd(i) + x / 2 + 1);
      odd(i)[0] = lowest();
      if (W % 2) odd(i)[(W + 1) / 2] = lowest();
    }
  }

  // Pixel t = 0..8, row by row, of a vector of windows from column x on.
  Vec<T> pixel(int t, int x) const {
    const T* row = pixels.data() + 2 * size * (t / 3);
    return t % 3 == 1 ? load(row + size + x) : load(row + x + t % 3 / 2);
  }

  static constexpr T lowest() { return -std::numeric_limits<T>::infinity(); }

 private:
  T* odd(int i) { return pixels.data() + 2 * size * i; }                     // columns -1, 1, 3 ...
  T* even(int i) { return odd(i) + size; }                                   // columns 0, 2, 4 ...

  const int W, size;
  std::vector<T> pixels;                               // (3, odd and even, size)
};

template <class V>
inline auto exceeds(V a, V b) {
  return (a > b) | (a != a);
}

// in (B, C, H, W) -> out (B, C, H/2, W/2), rounded up
template <class T>
void max_pool(Map<const T> in, Map<T> out) {
  if (in.empty()) return;
  parallel(in.images * in.channels, [&] {
    return [&, rows = WindowRows<T>(in.W)](int plane) mutable {
      T* to = out.plane(0, plane);
      for (int y = 0; y < out.H; ++y, to += out.W) {
        rows.read(in.plane(0, plane), in.H, y);
        for (int x = 0; x < out.W; x += kLanes<T>) {
          Vec<T> most = rows.pixel(0, x);
          for (int t = 1; t < 9; ++t) most = exceeds(rows.pixel(t, x), most) ? rows.pixel(t, x) : most;
          store(to + x, most, part<T>(0, out.W - x));
        }
      }
    };
  });
}

// in, dout -> din (B, C, H, W)
template <class T>
void max_pool_gradient(Map<const T> in, Map<const T> dout, Map<T> din) {
  if (in.empty()) return;
  parallel(in.images * in.channels, [&] {
    return [&, rows = WindowRows<T>(in.W)](int plane) mutable {
      constexpr int L = kLanes<T>;
      const T* given = dout.plane(0, plane);
      T* to = din.plane(0, plane);
      std::fill_n(to, static_cast<ptrdiff_t>(in.H) * in.W, T(0));
      for (int y = 0; y < dout.H; ++y, to += 2 * in.W, given += dout.W) {
        rows.read(in.plane(0, plane), in.H, y);
        for (int x = 0; x < dout.W; x += L) {
          Vec<T> most = fill(WindowRows<T>::lowest()), which = fill(T(4));     // the middle, which the map has
          for (int t = 0; t < 9; ++t) {
            const auto more = exceeds(rows.pixel(t, x), most);
            most = more ? rows.pixel(t, x) : most;
            which = more ? fill(T(t)) : which;
          }
          for (int lane = 0; lane < std::min(L, dout.W - x); ++lane) {
            const int t = static_cast<int>(which[lane]);
            to[(t / 3 - 1) * in.W + 2 * (x + lane) + t % 3 - 1] += given[x + lane];
          }
        }
      }
    };
  });
}

}  // namespace halo
