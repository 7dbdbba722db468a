// A convolution with half padding and without bias on a CPU, forward and backward, for odd kernels and any stride.
//
// Except for those that winograd.h computes, each is a matrix product (GEMM) over panels of pixels. A panel is copied
// to contiguous memory when it is needed. The copy adds the zeros of the padding and removes strides and odd row
// lengths; one panel at a time is held. Panels are wide because channels lie whole memory pages apart: they are read
// and written in long runs. Only the shapes decide the order of all sums, so the number of threads changes no bit.
#pragma once

#include "maps.h"
#include "winograd.h"

namespace halo {

constexpr int kPanel = 512;                            // most pixels of a panel
constexpr int kDepth = 64;                             // most terms of it: such a panel stays in the second-level cache
constexpr int kResult = 128 * kPanel;                  // most numbers of its result, which stay there too
constexpr int kSplitLines = 512;                       // fewer lines than this give too few tasks, so the images are split
constexpr int kMaxParts = 8;                           // most parts that the images are split into

struct Offset {
  int y, x;
};

// The inputs of a grid of pixels (`rows` x `columns`) in a feature map: pixel (y, x) at `offset` reads the map at
// (y, x) * stride + offset, or zero outside the map. A line is one channel read at one offset, for all pixels. Line l is
// channel l / offsets.size() at offset l % offsets.size().
template <class T>
struct View {
  Map<T> map;
  int rows, columns, stride;
  std::vector<Offset> offsets;

  int pixels() const { return rows * columns; }
  int lines() const { return map.channels * static_cast<int>(offsets.size()); }
};

// Copies lines of a view to contiguous memory, or to strips of `width` pixels that lie `distance` apart. A row of the
// grid reads the same part of the plane for all channels.
template <class T>
class Lines {
 public:
  explicit Lines(const View<const T>& view) : Lines(view, view.pixels(), 0) {}
  Lines(const View<const T>& view, int width, ptrdiff_t distance)
      : view(view), width(width), distance(distance), runs(view.offsets.size()) {}

  // Selects pixels [first, first + count) for `read`.
  void select(int first, int count) {
    for (size_t i = 0; i < runs.size(); ++i) {
      runs[i].clear();
      for (int start = 0; start < count; start += width)
        each_row(view.columns, first + start, std::min(width, count - start), [&](int y, int begin, int end, int index) {
          runs[i].push_back(run(view.offsets[i], y, begin, end, start / width * distance + index));
        });
    }
  }

  // Copies the selected pixels of a line. `to` must have room for one vector more.
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
      } else if (stride == 2) {                        // with this known number the compiler uses vectors
        for (int i = 0; i < run.right - run.left; ++i) at[run.left + i] = from[i * 2];
      } else {
        for (int i = 0; i < run.right - run.left; ++i) at[run.left + i] = from[i * stride];
      }
      for (int i = run.right; i < run.end; ++i) at[i] = 0;
    }
  }

 private:
  struct Run {
    ptrdiff_t to, from;                                // its start in memory, its first pixel in the plane
    int left, right, end;                              // zeros, pixels from `left` on, zeros from `right` on
  };

  Run run(Offset offset, int y, int begin, int end, ptrdiff_t to) const {
    const int from_y = y * view.stride + offset.y, W = view.map.W;
    const bool outside = from_y < 0 || from_y >= view.map.H;
    int left = end, right = end;                       // x of the first pixel inside the map, and of the first after it
    if (!outside) {
      left = std::clamp((view.stride - 1 - offset.x) / view.stride, begin, end);
      right = std::clamp((W - 1 - offset.x + view.stride) / view.stride, left, end);
    }
    const ptrdiff_t from = static_cast<ptrdiff_t>(from_y) * W + offset.x + left * view.stride;
    return {to, from, left - begin, right - begin, end - begin};
  }

  // Prefetches the same pixels of a later channel: it is planes apart, so the hardware does not. Any address is allowed.
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
struct Gemm {
  const T* matrix;                                     // (channels of out, lines of in)
  View<const T> in;
};

// The output of `stride` GEMMs over one grid: pixel (y, x) of GEMM i goes to pixel (y * stride + top, x * stride + i) of
// the map, if the map has it.
template <class T>
struct Target {
  Map<T> map;
  int stride, top;

  // Writes the contiguous results of each GEMM for pixels [first, first + count) of the grid, `columns` wide.
  void write(int image, int channel, int columns, int first, int count, const std::vector<const T*>& from) const {
    each_row(columns, first, count, [&](int y, int begin, int end, int index) {
      T* row = map.plane(image, channel) + static_cast<ptrdiff_t>(y * stride + top) * map.W;
      int x = begin;
      if (stride == 1) {
        std::copy_n(from[0] + index, end - begin, row + begin);
        x = end;
      } else if (stride == 2 && from.size() == 2) {    // so that the compiler uses vectors
        const T *even = from[0] + index - begin, *odd = from[1] + index - begin;
        for (; x < std::min(end, map.W / 2); ++x) row[2 * x] = even[x], row[2 * x + 1] = odd[x];
      }
      for (; x < end; ++x)
        for (size_t i = 0; i < from.size() && x * stride + static_cast<int>(i) < map.W; ++i)
          row[x * stride + i] = from[i][index + x - begin];
    });
  }
};

// One thread of some GEMMs. A task is a panel of pixels of one image and a block of output channels. The panel is stored
// in strips as wide as a tile, line after line.
template <class T>
class Convolve {
 public:
  Convolve(const std::vector<Gemm<T>>& gemms, const Target<T>& to, const Finish<T>* finish, int threads)
      : gemms(gemms), to(to), finish(finish), pixels(gemms[0].in.pixels()), M(to.map.channels) {
    // At least two tasks for each thread. Smaller panels repeat no work; more blocks of channels repeat the copying.
    const int wanted = (2 * threads + to.map.images - 1) / to.map.images;
    for (panel = kPanel; panel > 2 * kStrip<T> && (pixels + panel - 1) / panel < wanted;) panel /= 2;
    panels = (pixels + panel - 1) / panel;
    const int fitting = (M * std::min(panel, pixels) + kResult - 1) / kResult;
    blocks = std::max(fitting, std::clamp(wanted / panels, 1, (M + kMinChannels - 1) / kMinChannels));
  }

  int tasks() const { return to.map.images * panels * blocks; }

  void operator()(int task) {
    if (!strip) allocate();
    const int block = task % blocks;
    image = task / blocks / panels, top = M * block / blocks, height = M * (block + 1) / blocks - top;
    first = task / blocks % panels * panel, count = std::min(panel, pixels - first);
    for (size_t i = 0; i < gemms.size(); ++i) multiply(gemms[i], lines[i], results[i]);
    for (int s = 0; s * kStrip<T> < count; ++s)
      if (!in_place(s)) write(s);
  }

 private:
  void allocate() {
    const int strips = (std::min(pixels, panel) + kStrip<T> - 1) / kStrip<T>;
    for (const Gemm<T>& gemm : gemms) {
      results.push_back(memory.take(static_cast<size_t>(strips) * rows() * kStrip<T>));
      lines.emplace_back(gemm.in, kStrip<T>, kDistance);
    }
    strip = memory.take(strips * kDistance);
    from.resize(gemms.size());
  }

  int rows() const { return (M + blocks - 1) / blocks; }
  int width(int s) const { return std::min(kStrip<T>, count - s * kStrip<T>); }
  size_t result_at(int s, int m) const { return (static_cast<size_t>(s) * rows() + m) * kStrip<T>; }
  // The output of a strip's row in the map, for a stride of 1.
  T* in_map(int s, int m) const { return to.map.plane(image, top + m) + first + s * kStrip<T>; }
  // True if the tiles of a strip can write to the map: its pixels lie there as in the strip, in whole vectors.
  bool in_place(int s) const { return to.stride == 1 && width(s) % kLanes<T> == 0; }

  void multiply(const Gemm<T>& gemm, Lines<T>& lines, T* result) {
    const int K = gemm.in.lines(), strips = (count + kStrip<T> - 1) / kStrip<T>;
    if (K == 0) std::fill_n(result, result_at(strips, 0), T(0));
    lines.select(first, count);
    for (int l = 0; l < K; l += kDepth) {
      const int depth = std::min(kDepth, K - l);
      for (int k = 0; k < depth; ++k) lines.read(image, l + k, strip + k * kStrip<T>);
      const int tiles = (height + kHeight - 1) / kHeight;
      for (int t = 0; t < tiles; ++t) {
        const int m = height * t / tiles, next = height * (t + 1) / tiles;
        for (int i = next; i < std::min(height, next + kHeight); ++i)         // rows are far apart: the hardware does not
          for (int k = 0; k < depth; k += 64 / static_cast<int>(sizeof(T)))
            __builtin_prefetch(gemm.matrix + static_cast<ptrdiff_t>(top + i) * K + l + k);
        for (int s = 0; s < strips; ++s)
          multiply_tile(gemm.matrix + l, K, l > 0, l + depth == K, depth, s, m, next - m, result);
      }
    }
  }

  // Multiplies `depth` terms of rows m .. m + tile_rows - 1 in strip s. With `add`, `result` has the sums so far.
  void multiply_tile(const T* matrix, int K, bool add, bool last, int depth, int s, int m, int tile_rows, T* result) {
    static constexpr auto kernels = all_tiles<T>(std::make_integer_sequence<int, kVectors>());
    const ptrdiff_t plane = static_cast<ptrdiff_t>(to.map.H) * to.map.W;
    const bool straight = last && in_place(s);
    T* sums = result + result_at(s, m);
    kernels[(width(s) + kLanes<T> - 1) / kLanes<T> - 1][tile_rows - 1](
        depth, matrix + static_cast<ptrdiff_t>(top + m) * K, K, strip + s * kDistance, kStrip<T>,
        add ? sums : nullptr, kStrip<T>, straight ? in_map(s, m) : sums, straight ? plane : kStrip<T>);
    for (int i = 0; finish && straight && i < tile_rows; ++i)
      (*finish)(top + m + i, in_map(s, m + i) - to.map.data, width(s), in_map(s, m + i));
  }

  void write(int s) {
    for (int m = 0; m < height; ++m) {
      if (finish) (*finish)(top + m, in_map(s, m) - to.map.data, width(s), results[0] + result_at(s, m));
      for (size_t i = 0; i < gemms.size(); ++i) from[i] = results[i] + result_at(s, m);
      to.write(image, top + m, gemms[0].in.columns, first + s * kStrip<T>, width(s), from);
    }
  }

  static constexpr ptrdiff_t kDistance = (kDepth + 1) * kStrip<T>;   // from one strip to the next
  static constexpr int kMinChannels = 24;              // fewest channels of a block, unless its results would be too many

  Arena<T> memory;
  const std::vector<Gemm<T>>& gemms;
  const Target<T> to;
  const Finish<T>* finish;                             // null: nothing follows
  const int pixels, M;
  int panel, panels, blocks;                           // pixels of a panel, panels of an image, blocks of channels
  std::vector<Lines<T>> lines;                         // of each GEMM
  std::vector<T*> results;                             // (strips, rows, kStrip) for each GEMM
  T* strip = nullptr;                                  // (kDepth, kStrip) and a line more for each strip
  std::vector<const T*> from;
  int image = 0;                                       // of the task,
  int top = 0, height = 0;                             // its channels [top, top + height)
  int first = 0, count = 0;                            // its pixels [first, first + count)
};

template <class T>
void convolve(const std::vector<Gemm<T>>& gemms, const Target<T>& to, const Finish<T>* finish = nullptr) {
  if (to.map.empty()) return;
  const int threads = thread_count();                  // inside a thread it may be another number: OMP_NUM_THREADS=4,1
  parallel(Convolve<T>(gemms, to, finish, threads).tasks(), [&] { return Convolve<T>(gemms, to, finish, threads); });
}

// One thread of sums[part, m, n] = sum over the part's images and all pixels of tall[m, p] wide[n, p]. A task is a part
// of the images and a panel of n. The lines of `wide` are transposed, so it should be the view with fewer lines.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const View<const T>& tall, const View<const T>& wide, int parts, T* sums)
      : tall(tall), tall_lines(tall), wide_lines(wide), M(tall.lines()), N(wide.lines()),
        panels((N + kColumns - 1) / kColumns), parts(parts), sums(sums) {}

  int tasks() const { return parts * panels; }

  void operator()(int task) {
    if (!result) allocate();
    const int p = task / panels, n = task % panels * kColumns;
    const int count = std::min(kColumns, N - n), columns = round_up<T>(count);
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
          multiply<T, Layout::kRows>(rows, columns, depth, left, kPixels, panel, kColumns, result + m * kColumns, kColumns,
                                     add);
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

  static constexpr int kColumns = 128;                 // columns of the result in a task
  static constexpr int kRows = 48;                     // rows of it at a time, whose lines stay in the cache
  static constexpr int kPixels = 128;                  // terms at a time

  Arena<T> memory;
  const View<const T>& tall;
  Lines<T> tall_lines, wide_lines;
  const int M, N, panels, parts;
  T* sums;                                             // (parts, M, N)
  T *right, *panel, *left;                             // (kColumns, kPixels), (kPixels, kColumns), (kRows, kPixels)
  T* result = nullptr;                                 // (M, kColumns)
};

// Sums products of every line of `tall` and every line of `wide` over images and pixels: (lines of tall, lines of wide).
// Few lines give few tasks, so the images are split into parts, whose sums are added up at the end.
template <class T>
T* correlate(const View<const T>& tall, const View<const T>& wide, Arena<T>& memory) {
  const size_t size = static_cast<size_t>(tall.lines()) * wide.lines();
  const int parts = std::clamp(kSplitLines / wide.lines(), 1, std::min(tall.map.images, kMaxParts));
  T* sums = memory.take(parts * size);
  parallel(WeightGradient<T>(tall, wide, parts, sums).tasks(),
           [&] { return WeightGradient<T>(tall, wide, parts, sums); });
  for (int p = 1; p < parts; ++p)
    for (size_t i = 0; i < size; ++i) sums[i] += sums[p * size + i];
  return sums;
}

// The inputs of the output map through a kernel of k x k: line c * k * k + (row of the kernel) * k + column, in the order
// of the weights.
template <class T>
View<const T> receptive_field(int k, int stride, Map<const T> in) {
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
  if (winograd_applies(k, stride, in.channels, out.channels)) {
    const auto entry = [&](int o, int c, int i) {
      return weight[(static_cast<ptrdiff_t>(o) * in.channels + c) * 9 + i];
    };
    return winograd(in, entry, out, finish);
  }
  convolve<T>({{weight, receptive_field(k, stride, in)}}, {out, 1, 0}, finish);
}

// Copies some taps of a kernel, indices into its k * k positions: weight (O, C, k, k) -> (C, O, taps)
template <class T>
void copy_taps(const T* weight, int O, int C, int positions, const std::vector<int>& taps, T* matrix) {
  const ptrdiff_t width = static_cast<ptrdiff_t>(C) * positions, count = taps.size();
  parallel((C + 15) / 16, [&] {
    return [&](int block) {
      const int first = block * 16, last = std::min(C, first + 16);
      if (positions == 1 && count == 1)
        return transpose(weight + first, C, matrix + static_cast<ptrdiff_t>(first) * O, O, O, last - first);
      for (int o = 0; o < O; ++o)
        for (int c = first; c < last; ++c)
          for (int t = 0; t < count; ++t)
            matrix[(static_cast<ptrdiff_t>(c) * O + o) * count + t] = weight[o * width + c * positions + taps[t]];
    };
  });
}

// dout (B, O, H/stride, W/stride) -> din (B, C, H, W)
template <class T>
void input_gradient(const T* weight, int k, int stride, Map<const T> dout, Map<T> din) {
  if (winograd_applies(k, stride, dout.channels, din.channels)) {
    const auto turned = [&](int c, int o, int i) {     // by 180 degrees
      return weight[(static_cast<ptrdiff_t>(o) * din.channels + c) * 9 + 8 - i];
    };
    return winograd(dout, turned, din);
  }
  if (k == 1 && stride == 1) dout.W *= dout.H, din.W *= din.H, dout.H = din.H = 1;
  // Pixels (y, x) * stride + (top, left) of the input were read by the same taps of the kernel.
  for (int top = 0; top < std::min(stride, din.H); ++top) {
    Arena<T> memory;
    std::vector<Gemm<T>> gemms;
    for (int left = 0; left < std::min(stride, din.W); ++left) {
      View<const T> from{dout, (din.H - top + stride - 1) / stride, (din.W + stride - 1) / stride, 1, {}};
      std::vector<int> taps;
      for (int i = 0; i < k * k; ++i) {
        const int y = top + k / 2 - i / k, x = left + k / 2 - i % k;
        if (y % stride == 0 && x % stride == 0) taps.push_back(i), from.offsets.push_back({y / stride, x / stride});
      }
      T* matrix = memory.take(static_cast<size_t>(din.channels) * from.lines());
      copy_taps(weight, dout.channels, din.channels, k * k, taps, matrix);
      gemms.push_back({matrix, from});
    }
    convolve(gemms, Target<T>{din, stride, top});
  }
}

// in, dout -> dweight (O, C, k, k)
template <class T>
void weight_gradient(Map<const T> in, int k, int stride, Map<const T> dout, T* dweight) {
  const View<const T> inputs = receptive_field(k, stride, in), outputs = all_of(dout, inputs);
  const int K = inputs.lines(), O = outputs.lines();
  Arena<T> memory;
  if (in.empty()) std::fill_n(dweight, static_cast<size_t>(O) * K, T(0));
  else if (O <= K) transpose(correlate(inputs, outputs, memory), O, dweight, K, K, O);
  else std::copy_n(correlate(outputs, inputs, memory), static_cast<size_t>(O) * K, dweight);
}

}  // namespace halo
