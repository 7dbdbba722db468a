// A convolution with half padding and without bias on a CPU, forward and backward, for odd kernels of any size and any stride.
//
// But for those that winograd.h takes, each is a matrix product over panels of pixels, copied to contiguous memory as they are
// needed: that brings in the zeros of the padding, does away with strides and with rows of odd length, and never holds more than
// one panel. A panel is wide, so that channels are read and written in long stretches: they lie whole pages apart. Sums are added
// up in an order that the shapes alone decide, whatever the number of threads.
#pragma once

#include "maps.h"
#include "winograd.h"

namespace halo {

constexpr int kPanel = 512;                            // pixels that are multiplied at a time, or fewer,
constexpr int kDepth = 64;                             // and terms: such a panel stays in the second-level cache
constexpr int kResult = 128 * kPanel;                  // numbers, which stay there too

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

// Copies lines of a view to contiguous memory, or to strips of `width` pixels that lie `distance` apart. What a row of the grid sees
// is the same stretch of the plane for all channels.
template <class T>
class Lines {
 public:
  explicit Lines(const View<const T>& view) : Lines(view, view.pixels(), 0) {}
  Lines(const View<const T>& view, int width, ptrdiff_t distance)
      : view(view), width(width), distance(distance), runs(view.offsets.size()) {}

  // From now on, pixels [first, first + count).
  void select(int first, int count) {
    for (size_t i = 0; i < runs.size(); ++i) {
      runs[i].clear();
      for (int start = 0; start < count; start += width)
        each_row(view.columns, first + start, std::min(width, count - start), [&](int y, int begin, int end, int place) {
          runs[i].push_back(run(view.offsets[i], y, begin, end, start / width * distance + place));
        });
    }
  }

  // `to` has room for a vector more than the pixels selected.
  void read(int image, int line, T* to) const {
    constexpr int L = kLanes<T>;
    const int stride = view.stride, offsets = static_cast<int>(runs.size()), offset = line % offsets;
    const T* plane = view.map.plane(image, line / offsets);
    for (const Run& run : runs[offset]) {
      T* at = to + run.to;
      const T* from = plane + run.from;
      if (offset == 0) prefetch(from, (run.right - run.left) * stride);
      for (int i = 0; i < run.left; ++i) at[i] = 0;
      if (stride == 1) {
        int i = run.left;
        for (; run.right - i >= L; i += L, from += L) store(at + i, load(from));
        if (i < run.right) store(at + i, load(from, part<T>(0, run.right - i)));
      } else if (stride == 2) {                        // a number that the compiler knows makes it use vectors
        for (int i = 0; i < run.right - run.left; ++i) at[run.left + i] = from[i * 2];
      } else {
        for (int i = 0; i < run.right - run.left; ++i) at[run.left + i] = from[i * stride];
      }
      for (int i = run.right; i < run.end; ++i) at[i] = 0;
    }
  }

 private:
  struct Run {
    ptrdiff_t to, from;                                // where it starts, and the first pixel seen in the plane
    int left, right, end;                              // zeros, pixels from `left` on, zeros from `right` on
  };

  Run run(Offset offset, int y, int begin, int end, ptrdiff_t to) const {
    const int from_y = y * view.stride + offset.y, W = view.map.W;
    const bool outside = from_y < 0 || from_y >= view.map.H;
    const int left = outside ? end : std::clamp((view.stride - 1 - offset.x) / view.stride, begin, end);      // first x to see the map
    const int right = outside ? end : std::clamp((W - 1 - offset.x + view.stride) / view.stride, left, end);  // first x beyond it
    return {to, static_cast<ptrdiff_t>(from_y) * W + offset.x + left * view.stride, left - begin, right - begin, end - begin};
  }

  // The same of a later channel, planes apart, which no hardware foresees. It may lie beyond the map: this reads nothing.
  void prefetch(const T* from, int count) const {
    from += static_cast<ptrdiff_t>(runs.size() == 1 ? 4 : 1) * view.map.H * view.map.W;
    for (int i = 0; i < count; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(from + i);
  }

  const View<const T>& view;
  const int width;
  const ptrdiff_t distance;
  std::vector<std::vector<Run>> runs;                  // for each offset
};

// out[m, p] = sum_l matrix[m, l] in[l, p]
template <class T>
struct Product {
  const T* matrix;                                     // (channels of out, lines of in)
  View<const T> in;
};

// Where `stride` products over one grid go: pixel (y, x) of product i is pixel (y * stride + top, x * stride + i) of the map, if it
// has that.
template <class T>
struct Target {
  Map<T> map;
  int stride, top;

  // Contiguous memory of each product to pixels [first, first + count) of the grid, `columns` wide.
  void write(int image, int channel, int columns, int first, int count, const std::vector<const T*>& from) const {
    each_row(columns, first, count, [&](int y, int begin, int end, int place) {
      T* row = map.plane(image, channel) + static_cast<ptrdiff_t>(y * stride + top) * map.W;
      int x = begin;
      if (stride == 1) {
        std::copy_n(from[0] + place, end - begin, row + begin);
        x = end;
      } else if (stride == 2 && from.size() == 2) {    // so that the compiler uses vectors
        const T *even = from[0] + place - begin, *odd = from[1] + place - begin;
        for (; x < std::min(end, map.W / 2); ++x) row[2 * x] = even[x], row[2 * x + 1] = odd[x];
      }
      for (; x < end; ++x)
        for (size_t i = 0; i < from.size() && x * stride + static_cast<int>(i) < map.W; ++i)
          row[x * stride + i] = from[i][place + x - begin];
    });
  }
};

// One thread of some products; a task is a panel of pixels of one image and some of its channels. The panel lies in strips as wide
// as a tile, each line of a strip beside the next.
template <class T>
class Convolve {
 public:
  Convolve(const std::vector<Product<T>>& products, const Target<T>& to, const Finish<T>* finish, int threads)
      : products(products), to(to), finish(finish), pixels(products[0].in.pixels()), M(to.map.channels) {
    // Two tasks for each thread at least. To cut panels repeats nothing, to cut channels repeats the copying.
    const int wanted = (2 * threads + to.map.images - 1) / to.map.images;
    for (panel = kPanel; panel > 2 * kStrip<T> && (pixels + panel - 1) / panel < wanted;) panel /= 2;
    panels = (pixels + panel - 1) / panel;
    blocks = std::max((M * std::min(panel, pixels) + kResult - 1) / kResult, std::clamp(wanted / panels, 1, (M + 23) / 24));
  }

  int tasks() const { return to.map.images * panels * blocks; }

  void operator()(int task) {
    if (!strip) allocate();
    const int block = task % blocks;
    image = task / blocks / panels, top = M * block / blocks, height = M * (block + 1) / blocks - top;
    first = task / blocks % panels * panel, count = std::min(panel, pixels - first);
    for (size_t i = 0; i < products.size(); ++i) multiply(products[i], lines[i], results[i]);
    for (int s = 0; s * kStrip<T> < count; ++s)
      if (!in_place(s)) write(s);
  }

 private:
  void allocate() {
    const int strips = (std::min(pixels, panel) + kStrip<T> - 1) / kStrip<T>;
    for (const Product<T>& product : products) {
      results.push_back(memory.take(static_cast<size_t>(strips) * rows() * kStrip<T>));
      lines.emplace_back(product.in, kStrip<T>, kDistance);
    }
    strip = memory.take(strips * kDistance);
    from.resize(products.size());
  }

  int rows() const { return (M + blocks - 1) / blocks; }
  int width(int s) const { return std::min(kStrip<T>, count - s * kStrip<T>); }
  size_t result_at(int s, int m) const { return (static_cast<size_t>(s) * rows() + m) * kStrip<T>; }
  // Where it goes, with a stride of 1.
  T* in_map(int s, int m) const { return to.map.plane(image, top + m) + first + s * kStrip<T>; }
  // Whether the tiles of a strip may write to the map: its pixels lie there as in the strip, in whole vectors.
  bool in_place(int s) const { return to.stride == 1 && width(s) % kLanes<T> == 0; }

  void multiply(const Product<T>& product, Lines<T>& lines, T* result) {
    const int K = product.in.lines(), strips = (count + kStrip<T> - 1) / kStrip<T>;
    if (K == 0) std::fill_n(result, result_at(strips, 0), T(0));
    lines.select(first, count);
    for (int l = 0; l < K; l += kDepth) {
      const int depth = std::min(kDepth, K - l);
      for (int k = 0; k < depth; ++k) lines.read(image, l + k, strip + k * kStrip<T>);
      const int tiles = (height + kHeight - 1) / kHeight;
      for (int t = 0; t < tiles; ++t) {
        const int m = height * t / tiles, next = height * (t + 1) / tiles;
        for (int i = next; i < std::min(height, next + kHeight); ++i)         // rows lie far apart: no hardware foresees the next ones
          for (int k = 0; k < depth; k += 64 / static_cast<int>(sizeof(T)))
            __builtin_prefetch(product.matrix + static_cast<ptrdiff_t>(top + i) * K + l + k);
        for (int s = 0; s < strips; ++s) multiply_tile(product.matrix + l, K, l > 0, l + depth == K, depth, s, m, next - m, result);
      }
    }
  }

  // `depth` terms of rows m .. m + tile_rows - 1 in strip s; those before them, if any, have been added up in `result`.
  void multiply_tile(const T* matrix, int K, bool add, bool last, int depth, int s, int m, int tile_rows, T* result) {
    static constexpr auto kernels = all_tiles<T>(std::make_integer_sequence<int, kVectors>());
    const ptrdiff_t plane = static_cast<ptrdiff_t>(to.map.H) * to.map.W;
    const bool straight = last && in_place(s);
    T* sums = result + result_at(s, m);
    kernels[(width(s) + kLanes<T> - 1) / kLanes<T> - 1][tile_rows - 1](
        depth, matrix + static_cast<ptrdiff_t>(top + m) * K, K, strip + s * kDistance, kStrip<T>, add ? sums : nullptr, kStrip<T>,
        straight ? in_map(s, m) : sums, straight ? plane : kStrip<T>);
    for (int i = 0; finish && straight && i < tile_rows; ++i)
      (*finish)(top + m + i, in_map(s, m + i) - to.map.data, width(s), in_map(s, m + i));
  }

  void write(int s) {
    for (int m = 0; m < height; ++m) {
      if (finish) (*finish)(top + m, in_map(s, m) - to.map.data, width(s), results[0] + result_at(s, m));
      for (size_t i = 0; i < products.size(); ++i) from[i] = results[i] + result_at(s, m);
      to.write(image, top + m, products[0].in.columns, first + s * kStrip<T>, width(s), from);
    }
  }

  static constexpr ptrdiff_t kDistance = (kDepth + 1) * kStrip<T>;   // of strips

  Arena<T> memory;
  const std::vector<Product<T>>& products;
  const Target<T> to;
  const Finish<T>* finish;                             // null: nothing follows
  const int pixels, M;
  int panel, panels, blocks;                           // pixels of a panel, panels of an image, blocks of channels
  std::vector<Lines<T>> lines;                         // of each product
  std::vector<T*> results;                             // (strips, rows, kStrip) for each product
  T* strip = nullptr;                                  // (kDepth, kStrip) and a line more for each strip
  std::vector<const T*> from;
  int image = 0, top = 0, height = 0, first = 0, count = 0;   // of the task: channels [top, top + height), pixels [first, first + count)
};

template <class T>
void convolve(const std::vector<Product<T>>& products, const Target<T>& to, const Finish<T>* finish = nullptr) {
  if (to.map.empty()) return;
  const int threads = thread_count();                  // a thread may be told another, as by OMP_NUM_THREADS=4,1
  parallel(Convolve<T>(products, to, finish, threads).tasks(), [&] { return Convolve<T>(products, to, finish, threads); });
}

// One thread of sums[part, m, n] = sum over the part's images and all pixels of tall[m, p] wide[n, p]; a task is a part of the
// images and a panel of n. The lines of `wide` are transposed, so it had better be the view that has fewer.
template <class T>
class Products {
 public:
  Products(const View<const T>& tall, const View<const T>& wide, int parts, T* sums)
      : tall(tall), tall_lines(tall), wide_lines(wide), M(tall.lines()), N(wide.lines()), panels((N + kColumns - 1) / kColumns),
        parts(parts), sums(sums) {}

  int tasks() const { return parts * panels; }

  void operator()(int task) {
    if (!result) allocate();
    const int p = task / panels, n = task % panels * kColumns, count = std::min(kColumns, N - n), columns = round_up<T>(count);
    const int images = tall.map.images;
    bool add = false;
    for (int image = images * p / parts; image < images * (p + 1) / parts; ++image)
      for (int first = 0; first < tall.pixels(); first += kPixels, add = true) {
        const int depth = std::min(kPixels, tall.pixels() - first);
        wide_lines.select(first, depth);
        tall_lines.select(first, depth);
        for (int k = 0; k < count; ++k) wide_lines.read(image, n + k, right + k * kPixels);
        transpose(right, kPixels, panel, kColumns, count, depth);
        for (int m = 0; m < M; m += kRows) {
          const int rows = std::min(kRows, M - m);
          for (int k = 0; k < rows; ++k) tall_lines.read(image, m + k, left + k * kPixels);
          multiply<T, Layout::kRows>(rows, columns, depth, left, kPixels, panel, kColumns, result + m * kColumns, kColumns, add);
        }
      }
    for (int m = 0; m < M; ++m)
      std::copy_n(result + m * kColumns, count, sums + (static_cast<ptrdiff_t>(p) * M + m) * N + n);
  }

 private:
  void allocate() {
    right = memory.take((kColumns + 1) * kPixels);
    panel = memory.take(kPixels * kColumns);
    left = memory.take((kRows + 1) * kPixels);
    result = memory.take(static_cast<size_t>(M) * kColumns);
  }

  static constexpr int kColumns = 128, kRows = 48;     // of the result: in a task, and of a tall panel in the cache
  static constexpr int kPixels = 128;                  // terms

  Arena<T> memory;
  const View<const T>& tall;
  Lines<T> tall_lines, wide_lines;
  const int M, N, panels, parts;
  T *sums, *right, *panel, *left, *result = nullptr;   // ., (kColumns, kPixels), (kPixels, kColumns), (kRows, kPixels), (M, kColumns)
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
void convolution(Map<const T> in, const T* weight, int k, int stride, Map<T> out, const Finish<T>* finish = nullptr) {
  if (winograd_serves(k, stride, in.channels, out.channels)) {
    const auto entry = [&](int o, int c, int i) { return weight[(static_cast<ptrdiff_t>(o) * in.channels + c) * 9 + i]; };
    return winograd(in, entry, out, finish);
  }
  convolve<T>({{weight, seen_through(k, stride, in)}}, {out, 1, 0}, finish);
}

// weight (O, C, k, k) -> (C, O, taps): those of the kernel's k * k places that are named
template <class T>
void pick(const T* weight, int O, int C, int places, const std::vector<int>& taps, T* matrix) {
  const ptrdiff_t width = static_cast<ptrdiff_t>(C) * places, count = taps.size();
  parallel((C + 15) / 16, [&] {
    return [&](int block) {
      const int first = block * 16, last = std::min(C, first + 16);
      if (places == 1 && count == 1) return transpose(weight + first, C, matrix + static_cast<ptrdiff_t>(first) * O, O, O, last - first);
      for (int o = 0; o < O; ++o)
        for (int c = first; c < last; ++c)
          for (int t = 0; t < count; ++t) matrix[(static_cast<ptrdiff_t>(c) * O + o) * count + t] = weight[o * width + c * places + taps[t]];
    };
  });
}

// dout (B, O, H/stride, W/stride) -> din (B, C, H, W)
template <class T>
void input_gradient(const T* weight, int k, int stride, Map<const T> dout, Map<T> din) {
  if (winograd_serves(k, stride, dout.channels, din.channels)) {
    const auto turned = [&](int c, int o, int i) { return weight[(static_cast<ptrdiff_t>(o) * din.channels + c) * 9 + 8 - i]; };
    return winograd(dout, turned, din);
  }
  if (k == 1 && stride == 1) dout.W *= dout.H, din.W *= din.H, dout.H = din.H = 1;
  // Pixels (y, x) * stride + (top, left) of the input were seen through the same taps of the kernel.
  for (int top = 0; top < std::min(stride, din.H); ++top) {
    Arena<T> memory;
    std::vector<Product<T>> products;
    for (int left = 0; left < std::min(stride, din.W); ++left) {
      View<const T> from{dout, (din.H - top + stride - 1) / stride, (din.W + stride - 1) / stride, 1, {}};
      std::vector<int> taps;
      for (int i = 0; i < k * k; ++i) {
        const int y = top + k / 2 - i / k, x = left + k / 2 - i % k;
        if (y % stride == 0 && x % stride == 0) taps.push_back(i), from.offsets.push_back({y / stride, x / stride});
      }
      T* matrix = memory.take(static_cast<size_t>(din.channels) * from.lines());
      pick(weight, dout.channels, din.channels, k * k, taps, matrix);
      products.push_back({matrix, from});
    }
    convolve(products, Target<T>{din, stride, top});
  }
}

// in, dout -> dweight (O, C, k, k)
template <class T>
void weight_gradient(Map<const T> in, int k, int stride, Map<const T> dout, T* dweight) {
  const View<const T> seen = seen_through(k, stride, in), given = all_of(dout, seen);
  const int K = seen.lines(), O = given.lines();
  Arena<T> memory;
  if (in.empty()) std::fill_n(dweight, static_cast<size_t>(O) * K, T(0));
  else if (O <= K) transpose(products(seen, given, memory), O, dweight, K, K, O);
  else std::copy_n(products(given, seen, memory), static_cast<size_t>(O) * K, dweight);
}

}  // namespace halo
