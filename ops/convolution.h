// A convolution with half padding and without bias on a CPU, forward and backward, for odd kernels of any size and any stride.
//
// Each is a matrix product over panels of pixels, copied to contiguous memory as they are needed: that brings in the zeros of
// the padding, does away with strides and with rows of odd length, and never holds more than one panel. Sums are added up
// in an order that the shapes alone decide, whatever the number of threads.
#pragma once

#include "simd.h"

namespace halo {

constexpr int kPanel = 64;                             // pixels that are multiplied at a time
constexpr int kDepth = 128;                            // and terms: such a panel stays in the first-level cache

// (images, channels, H, W)
template <class T>
struct Map {
  T* data;
  int images, channels, H, W;

  T* plane(int image, int channel) const { return data + (static_cast<ptrdiff_t>(image) * channels + channel) * H * W; }
};

struct Offset {
  int y, x;
};

// What a grid of pixels (`rows` x `columns`) sees of a map: pixel (y, x) at `offset` sees (y, x) * stride + offset, and zero beyond
// the map. A line is a channel seen at one offset; line l is channel l / offsets.size() at offset l % offsets.size().
template <class T>
struct View {
  Map<T> map;
  int rows, columns, stride;
  std::vector<Offset> offsets;

  int pixels() const { return rows * columns; }
  int lines() const { return map.channels * static_cast<int>(offsets.size()); }
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

// Copies lines of a view to contiguous memory. What a row of the grid sees is the same stretch of the plane for all channels.
template <class T>
class Lines {
 public:
  explicit Lines(const View<const T>& view) : view(view), runs(view.offsets.size()) {}

  // From now on, pixels [first, first + count).
  void select(int first, int count) {
    for (size_t i = 0; i < runs.size(); ++i) {
      const Offset offset = view.offsets[i];
      const int H = view.map.H, W = view.map.W, stride = view.stride;
      runs[i].clear();
      each_row(view.columns, first, count, [&](int y, int begin, int end, int place) {
        const int from_y = y * stride + offset.y;
        const bool outside = from_y < 0 || from_y >= H;
        const int left = outside ? end : std::clamp((stride - 1 - offset.x) / stride, begin, end);     // first x to see the map
        const int right = outside ? end : std::clamp((W - 1 - offset.x + stride) / stride, left, end);  // first x beyond it
        runs[i].push_back({place, place + left - begin, place + right - begin, place + end - begin,
                           static_cast<ptrdiff_t>(from_y) * W + offset.x + left * stride});
      });
    }
  }

  // `to` has room for a vector more than the pixels selected.
  void read(int image, int line, T* to) const {
    constexpr int L = kLanes<T>;
    const int offsets = static_cast<int>(runs.size()), stride = view.stride;
    const T* plane = view.map.plane(image, line / offsets);
    for (const Run& run : runs[line % offsets]) {
      for (int i = run.begin; i < run.left; ++i) to[i] = 0;
      const T* from = plane + run.from;
      if (stride == 1) {
        int i = run.left;
        for (; run.right - i >= L; i += L, from += L) store(to + i, load(from));
        if (i < run.right) store(to + i, load(from, part<T>(0, run.right - i)));
      } else {
        for (int i = 0; i < run.right - run.left; ++i) to[run.left + i] = from[i * stride];
      }
      for (int i = run.right; i < run.end; ++i) to[i] = 0;
    }
  }

 private:
  struct Run {
    int begin, left, right, end;                       // places in the line: zeros, pixels from `left` on, zeros again
    ptrdiff_t from;                                    // of the first of these in the plane
  };

  const View<const T>& view;
  std::vector<std::vector<Run>> runs;                  // for each offset
};

// Contiguous memory to pixels [first, first + count) of a channel, for a view with one offset, within the map.
template <class T>
void write(const View<T>& view, int image, int channel, int first, int count, const T* from) {
  T* plane = view.map.plane(image, channel) + static_cast<ptrdiff_t>(view.offsets[0].y) * view.map.W + view.offsets[0].x;
  each_row(view.columns, first, count, [&](int y, int begin, int end, int place) {
    T* row = plane + static_cast<ptrdiff_t>(y) * view.stride * view.map.W;
    if (view.stride == 1) std::copy(from + place, from + place + end - begin, row + begin);
    else for (int x = begin; x < end; ++x) row[x * view.stride] = from[place + x - begin];
  });
}

// One thread of out[m, p] = sum_l matrix[m, l] in[l, p], matrix (channels of out, lines of in); a task is a panel of pixels of
// one image and some rows m.
template <class T>
class Convolve {
 public:
  Convolve(const T* matrix, const View<const T>& in, const View<T>& out)
      : matrix(matrix), in(in), out(out), lines(in), panels((out.pixels() + kPanel - 1) / kPanel), M(out.map.channels), K(in.lines()),
        blocks(std::clamp(16 / (panels * out.map.images), 1, (M + 23) / 24)),          // more of them where pixels are few
        panel(memory.take((kDepth + 1) * kPanel)), result(memory.take((M + blocks - 1) / blocks * kPanel)) {}

  int tasks() const { return out.map.images * panels * blocks; }

  void operator()(int task) {
    const int block = task % blocks, first = task / blocks % panels * kPanel, image = task / blocks / panels;
    const int top = M * block / blocks, rows = M * (block + 1) / blocks - top;
    const int count = std::min(kPanel, out.pixels() - first), columns = round_up<T>(count);
    lines.select(first, count);
    for (int l = 0; l < K; l += kDepth) {
      const int depth = std::min(kDepth, K - l);
      for (int k = 0; k < depth; ++k) lines.read(image, l + k, panel + k * kPanel);
      multiply<T, Layout::kRows>(rows, columns, depth, matrix + static_cast<ptrdiff_t>(top) * K + l, K, panel, kPanel, result,
                                 kPanel, l > 0);
    }
    for (int m = 0; m < rows; ++m) write(out, image, top + m, first, count, result + m * kPanel);
  }

 private:
  Arena<T> memory;
  const T* matrix;
  const View<const T>& in;
  const View<T>& out;
  Lines<T> lines;
  const int panels, M, K, blocks;
  T *panel, *result;                                   // (kDepth, kPanel), (rows, kPanel)
};

template <class T>
void convolve(const T* matrix, const View<const T>& in, const View<T>& out) {
  parallel(Convolve<T>(matrix, in, out).tasks(), [&] { return Convolve<T>(matrix, in, out); });
}

// One thread of sums[part, m, n] = sum over the part's images and all pixels of tall[m, p] wide[n, p]; a task is a part of the
// images and a panel of n. The lines of `wide` are transposed, so it had better be the view that has fewer.
template <class T>
class Products {
 public:
  Products(const View<const T>& tall, const View<const T>& wide, int parts, T* sums)
      : tall(tall), tall_lines(tall), wide_lines(wide), M(tall.lines()), N(wide.lines()), panels((N + kColumns - 1) / kColumns),
        parts(parts), sums(sums), right(memory.take((kColumns + 1) * kDepth)), panel(memory.take(kDepth * kColumns)), left(memory.take((kRows + 1) * kDepth)),
        result(memory.take(static_cast<size_t>(M) * kColumns)) {}

  int tasks() const { return parts * panels; }

  void operator()(int task) {
    const int p = task / panels, n = task % panels * kColumns, count = std::min(kColumns, N - n), columns = round_up<T>(count);
    const int images = tall.map.images;
    bool add = false;
    for (int image = images * p / parts; image < images * (p + 1) / parts; ++image)
      for (int first = 0; first < tall.pixels(); first += kDepth, add = true) {
        const int depth = std::min(kDepth, tall.pixels() - first);
        wide_lines.select(first, depth);
        tall_lines.select(first, depth);
        for (int k = 0; k < count; ++k) wide_lines.read(image, n + k, right + k * kDepth);
        transpose(right, kDepth, panel, kColumns, count, depth);
        for (int m = 0; m < M; m += kRows) {
          const int rows = std::min(kRows, M - m);
          for (int k = 0; k < rows; ++k) tall_lines.read(image, m + k, left + k * kDepth);
          multiply<T, Layout::kRows>(rows, columns, depth, left, kDepth, panel, kColumns, result + m * kColumns, kColumns, add);
        }
      }
    for (int m = 0; m < M; ++m)
      std::copy_n(result + m * kColumns, count, sums + (static_cast<ptrdiff_t>(p) * M + m) * N + n);
  }

 private:
  static constexpr int kColumns = 128, kRows = 48;     // of the result: in a task, and of a tall panel in the cache

  Arena<T> memory;
  const View<const T>& tall;
  Lines<T> tall_lines, wide_lines;
  const int M, N, panels, parts;
  T *sums, *right, *panel, *left, *result;             // ., (kColumns, kDepth), (kDepth, kColumns), (kRows, kDepth), (M, kColumns)
};

// -> (lines of tall, lines of wide), in memory of the arena
template <class T>
T* products(const View<const T>& tall, const View<const T>& wide, Arena<T>& memory) {
  const size_t size = static_cast<size_t>(tall.lines()) * wide.lines();
  const int parts = std::clamp(512 / wide.lines(), 1, std::min(tall.map.images, 8));   // to give all cores work
  T* sums = memory.take(parts * size);
  parallel(Products<T>(tall, wide, parts, sums).tasks(), [&] { return Products<T>(tall, wide, parts, sums); });
  for (int p = 1; p < parts; ++p)
    for (size_t i = 0; i < size; ++i) sums[i] += sums[p * size + i];
  return sums;
}

// What the output map sees through a kernel of k x k: line c * k * k + (row of the kernel) * k + column, as the weights lie.
template <class T>
View<const T> seen_through(int k, int stride, Map<const T> in) {
  if (k == 1 && stride == 1) return {{in.data, in.images, in.channels, 1, in.H * in.W}, 1, in.H * in.W, 1, {{0, 0}}};
  View<const T> view{in, (in.H + stride - 1) / stride, (in.W + stride - 1) / stride, stride, {}};
  for (int i = 0; i < k * k; ++i) view.offsets.push_back({i / k - k / 2, i % k - k / 2});
  return view;
}

// All pixels of a map, as a grid of the same shape as `grid`.
template <class T, class U>
View<T> all_of(Map<T> map, const View<U>& grid) {
  return {{map.data, map.images, map.channels, grid.rows, grid.columns}, grid.rows, grid.columns, 1, {{0, 0}}};
}

// in (B, C, H, W), weight (O, C, k, k) -> out (B, O, H/stride, W/stride), rounded up
template <class T>
void convolution(Map<const T> in, const T* weight, int k, int stride, Map<T> out) {
  const View<const T> seen = seen_through(k, stride, in);
  convolve(weight, seen, all_of(out, seen));
}

// weight (O, C, k, k) -> (C, O, taps): those of the kernel's k * k places that are named
template <class T>
void pick(const T* weight, int O, int C, int places, const std::vector<int>& taps, T* matrix) {
  const ptrdiff_t width = static_cast<ptrdiff_t>(C) * places, count = taps.size();
  parallel((C + 15) / 16, [&] {
    return [&](int block) {
      for (int o = 0; o < O; ++o)
        for (int c = block * 16; c < std::min(C, block * 16 + 16); ++c)
          for (int t = 0; t < count; ++t) matrix[(static_cast<ptrdiff_t>(c) * O + o) * count + t] = weight[o * width + c * places + taps[t]];
    };
  });
}

// dout (B, O, H/stride, W/stride) -> din (B, C, H, W)
template <class T>
void input_gradient(const T* weight, int k, int stride, Map<const T> dout, Map<T> din) {
  if (k == 1 && stride == 1) dout.W *= dout.H, din.W *= din.H, dout.H = din.H = 1;
  // Pixels (y, x) * stride + (top, left) of the input were seen through the same taps of the kernel.
  for (int top = 0; top < std::min(stride, din.H); ++top)
    for (int left = 0; left < std::min(stride, din.W); ++left) {
      View<const T> from{dout, (din.H - top + stride - 1) / stride, (din.W - left + stride - 1) / stride, 1, {}};
      std::vector<int> taps;
      for (int i = 0; i < k * k; ++i) {
        const int y = top + k / 2 - i / k, x = left + k / 2 - i % k;
        if (y % stride == 0 && x % stride == 0) taps.push_back(i), from.offsets.push_back({y / stride, x / stride});
      }
      Arena<T> memory;
      T* matrix = memory.take(static_cast<size_t>(din.channels) * from.lines());
      pick(weight, dout.channels, din.channels, k * k, taps, matrix);
      convolve(static_cast<const T*>(matrix), from, View<T>{din, from.rows, from.columns, stride, {{top, left}}});
    }
}

// in, dout -> dweight (O, C, k, k)
template <class T>
void weight_gradient(Map<const T> in, int k, int stride, Map<const T> dout, T* dweight) {
  const View<const T> seen = seen_through(k, stride, in), given = all_of(dout, seen);
  const int K = seen.lines(), O = given.lines();
  Arena<T> memory;
  if (O <= K) transpose(products(seen, given, memory), O, dweight, K, K, O);
  else std::copy_n(products(given, seen, memory), static_cast<size_t>(O) * K, dweight);
}

}  // namespace halo
