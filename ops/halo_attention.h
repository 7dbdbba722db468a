// Halo attention on a CPU, forward and backward, with no framework in sight: `forward` and `backward` at the end.
//
// Axes, as in model/attention.py: B batch, N heads, d and v widths of a key and a value head, H and W of the map in pixels;
// Y, X grid of blocks; b side of a block of queries; w side of its window (block + 2 * halo).
// Inside a block: i runs over its queries (b*b of them, padded to whole vectors: `lanes`), j over the keys of its window,
// r over the R = b + w - 1 rows of a position table that the block reaches.
//
// Everything is stored with queries along the vectors: logits (j, i), softmax down the columns, one query per lane. Then
// no product needs a transposed operand and no reduction crosses lanes, and rows of the map are gathered as they lie.
// The gradient of the keys and values is the exception: overlapping windows add to it, and it is summed pixel by pixel,
// channels along the vectors, in one padded map per head. One thread owns a (batch, head), so the order of additions,
// and with it every bit of the result, depends neither on the number of threads nor on their luck.
//
// The map need not divide into blocks: a window is cut where the padded map, `halo` zeros around it, ends.
#pragma once

#include <limits>

#include "shape.h"
#include "simd.h"

namespace halo {

// Channels of one head, planes of height x width.
template <class T>
struct Planes {
  T* data;
  int channels, height, width;
};

// planes[c, y + i, x + j] -> out[c * ld + i * columns + j], zero outside the plane; writes up to a vector past the end.
template <class T>
void gather(Planes<const T> planes, int y, int x, int rows, int columns, T* out, int ld) {
  constexpr int L = kLanes<T>;
  const int left = -x, right = std::min(planes.width - x, columns);
  const Part whole = part<T>(left, right);
  for (int c = 0; c < planes.channels; ++c) {
    const T* from = planes.data + (static_cast<ptrdiff_t>(c) * planes.height + y) * planes.width + x;
    T* to = out + static_cast<ptrdiff_t>(c) * ld;
    for (int i = 0; i < rows; ++i, from += planes.width, to += columns) {
      const bool inside = y + i >= 0 && y + i < planes.height;
      store(to, inside ? load(from, whole) : Vec<T>{});
      for (int j = L; j < columns; j += L) store(to + j, inside ? load(from + j, part<T>(left - j, right - j)) : Vec<T>{});
    }
  }
}

// in[c * ld + i * columns + j] -> planes[c, y + i, x + j]
template <class T>
void scatter(const T* in, int ld, Planes<T> planes, int y, int x, int rows, int columns) {
  for (int c = 0; c < planes.channels; ++c)
    for (int i = 0; i < rows; ++i) {
      const T* from = in + static_cast<ptrdiff_t>(c) * ld + i * columns;
      T* to = planes.data + (static_cast<ptrdiff_t>(c) * planes.height + y + i) * planes.width + x;
      for (int j = 0; j < columns; j += kLanes<T>) store(to + j, load(from + j), part<T>(0, columns - j));
    }
}

// The softmax of one block at a time: what forward and backward share.
template <class T>
class Softmax {
 public:
  Softmax(const Shape& shape, const Inputs<T>& inputs, Arena<T>& memory)
      : s(shape), b(shape.b()), R(shape.R()), in(inputs), lanes(round_up<T>(b * b)) {
    const size_t w = s.w(), keys = w * w, n = lanes;
    q = memory.take(s.d * n);
    kv = memory.take((s.d + s.v) * keys);
    weights = memory.take(keys * n);
    inverse = memory.take(n);
    for (auto& table : relative) table = memory.take(R * n);
    for (auto& axis : logits) axis = memory.take(w * n);
  }

  // Gathers the block's window; leaves e^(logit - largest logit of the query) in `weights`, one over their sum in `inverse`.
  void compute(int head, const Block& block) {
    gather(queries_of(head), block.qy, block.qx, block.by, block.bx, q, lanes);
    gather(keys_values_of(head), block.y, block.x, block.wy, block.wx, kv, block.keys());
    multiply<T, Layout::kColumns>(block.keys(), lanes, s.d, kv, block.keys(), q, lanes, weights, lanes, false);
    position_logits(block);
    for (int lane = 0; lane < lanes; lane += kLanes<T>) normalise(block, lane);
  }

  const T* values(const Block& block) const { return kv + static_cast<ptrdiff_t>(s.d) * block.keys(); }
  // The row of a relative table for key row j seen from query row i is j - i + w - 1; from the table's first used row on:
  int relative_row(int key, int query) const { return key - query + b - 1; }
  const T* used(const T* table) const { return table + static_cast<ptrdiff_t>(s.first_relative()) * s.d; }

  const Shape s;
  const int b, R;
  const Inputs<T> in;
  const int lanes;
  T *q, *kv, *weights, *inverse;                       // (d, lanes), (d+v, keys), (keys, lanes), (lanes)
  T *relative[2], *logits[2];                          // rows and columns: (R, lanes), (w, lanes)

 private:
  Planes<const T> queries_of(int head) const {
    return {in.q + static_cast<ptrdiff_t>(head) * s.d * s.Hq * s.Wq, s.d, s.Hq, s.Wq};
  }
  Planes<const T> keys_values_of(int head) const {
    return {in.kv + static_cast<ptrdiff_t>(head) * (s.d + s.v) * s.H * s.W, s.d + s.v, s.H, s.W};
  }

  void position_logits(const Block& block) {
    const T* tables[] = {in.height_rel, in.width_rel};
    for (int axis = 0; axis < 2; ++axis)
      multiply<T, Layout::kRows>(R, lanes, s.d, used(tables[axis]), s.d, q, lanes, relative[axis], lanes, false);
    for (int j = 0; j < block.wy; ++j)
      for (int i = 0; i < block.by; ++i)
        std::copy_n(relative[0] + relative_row(j, i) * lanes + i * block.bx, block.bx, logits[0] + j * lanes + i * block.bx);
    for (int j = 0; j < block.wx; ++j)
      for (int i = 0; i < block.bx; ++i)
        for (int y = 0; y < block.by; ++y)
          logits[1][j * lanes + y * block.bx + i] = relative[1][relative_row(j, i) * lanes + y * block.bx + i];
  }

  void normalise(const Block& block, int lane) {
    const T scale = T(1) / std::sqrt(T(s.d));
    T* const column = weights + lane;
    Vec<T> largest = fill(-std::numeric_limits<T>::infinity());
    for (int y = 0, j = 0; y < block.wy; ++y) {
      const Vec<T> row = load(logits[0] + y * lanes + lane);
      for (int x = 0; x < block.wx; ++x, ++j) {
        const Vec<T> logit = load(column + j * lanes) * scale + (row + load(logits[1] + x * lanes + lane));
        largest = maximum(logit, largest);
        store(column + j * lanes, logit);
      }
    }
    Vec<T> sum{};
    for (int j = 0; j < block.keys(); ++j) {
      const Vec<T> weight = exp(load(column + j * lanes) - largest);
      sum += weight;
      store(column + j * lanes, weight);
    }
    store(inverse + lane, T(1) / sum);
  }
};

// x[c, i] *= factor[i]
template <class T>
void scale_lanes(T* x, int rows, int lanes, const T* factor) {
  for (int c = 0; c < rows; ++c)
    for (int i = 0; i < lanes; i += kLanes<T>) store(x + c * lanes + i, load(x + c * lanes + i) * load(factor + i));
}

// One thread's forward pass; a task is so many blocks, one after the other.
template <class T>
class Forward {
 public:
  Forward(const Shape& shape, const Inputs<T>& inputs, T* out_map, int blocks)
      : s(shape), softmax(shape, inputs, memory), o(memory.take(static_cast<size_t>(s.v) * softmax.lanes)), out(out_map),
        count(blocks) {}

  void operator()(int task) {
    for (int i = task * count; i < (task + 1) * count; ++i) attend(i / (s.Y() * s.X()), i % (s.Y() * s.X()));
  }

 private:
  void attend(int head, int i) {
    const int lanes = softmax.lanes;
    const Block block(s, softmax.b, i / s.X(), i % s.X());
    softmax.compute(head, block);
    multiply<T, Layout::kRows>(s.v, lanes, block.keys(), softmax.values(block), block.keys(), softmax.weights, lanes, o, lanes,
                               false);
    scale_lanes(o, s.v, lanes, softmax.inverse);
    const Planes<T> planes{out + static_cast<ptrdiff_t>(head) * s.v * s.Hq * s.Wq, s.v, s.Hq, s.Wq};
    scatter(o, lanes, planes, block.qy, block.qx, block.by, block.bx);
  }

  Arena<T> memory;
  const Shape s;
  Softmax<T> softmax;
  T *o, *out;                                          // (v, lanes), (B, N*v, Hq, Wq)
  const int count;
};

// One thread's backward pass, one (batch, head) at a time.
template <class T>
class Backward {
 public:
  Backward(const Shape& shape, const Inputs<T>& inputs, const T* dout_map, const Gradients<T>& out, T* tables)
      : s(shape), dmap(dout_map), gradients(out), dtables(tables), softmax(shape, inputs, memory),
        lanes(softmax.lanes), dp(round_up<T>(s.d)), vp(round_up<T>(s.v)),
        width((s.X() - 1) * s.block + s.w()), height((s.Y() - 1) * s.block + s.w()) {
    const size_t keys = s.w() * s.w(), n = lanes;
    dout = memory.take(s.v * n);
    dlogits = memory.take(keys * n);
    dq = memory.take(s.d * n);
    q_t = memory.take(n * dp);
    dout_t = memory.take(n * vp);
    pixels = memory.take(static_cast<size_t>(height) * width * (dp + vp));
    for (auto& axis : dsum) axis = memory.take(s.w() * n);
    for (auto& axis : drelative) axis = memory.take(softmax.R * n);
  }

  void operator()(int head) {
    std::memset(pixels, 0, sizeof(T) * height * width * (dp + vp));
    const ptrdiff_t queries = static_cast<ptrdiff_t>(s.Hq) * s.Wq;
    for (int row = 0; row < s.Y(); ++row)
      for (int column = 0; column < s.X(); ++column) {
        const Block block(s, softmax.b, row, column);
        softmax.compute(head, block);
        const Planes<const T> out{dmap + head * s.v * queries, s.v, s.Hq, s.Wq};
        gather(out, block.qy, block.qx, block.by, block.bx, dout, lanes);
        scale_lanes(dout, s.v, lanes, softmax.inverse);
        multiply<T, Layout::kColumns>(block.keys(), lanes, s.v, softmax.values(block), block.keys(), dout, lanes, dlogits, lanes,
                                      false);
        for (int lane = 0; lane < lanes; lane += kLanes<T>) logit_gradient(block, lane);
        key_value_gradient(block);
        position_gradient(block, dtables + static_cast<ptrdiff_t>(head) * 2 * softmax.R * dp);
        query_gradient(block);
        const Planes<T> q{gradients.q + head * s.d * queries, s.d, s.Hq, s.Wq};
        scatter(dq, lanes, q, block.qy, block.qx, block.by, block.bx);
      }
    write_pixels(gradients.kv + static_cast<ptrdiff_t>(head) * (s.d + s.v) * s.H * s.W);
  }

 private:
  // `dlogits` holds the gradient of the probabilities over the sum of weights: turn it into that of the logits, and add up its
  // rows and columns, the gradients of the position logits.
  void logit_gradient(const Block& block, int lane) {
    const T* weights = softmax.weights + lane;
    T* column = dlogits + lane;
    Vec<T> mean{};
    for (int j = 0; j < block.keys(); ++j) mean += load(weights + j * lanes) * load(column + j * lanes);
    mean *= load(softmax.inverse + lane);
    for (int x = 0; x < block.wx; ++x) store(dsum[1] + x * lanes + lane, Vec<T>{});
    for (int y = 0, j = 0; y < block.wy; ++y) {
      Vec<T> row{};
      for (int x = 0; x < block.wx; ++x, ++j) {
        const Vec<T> gradient = load(weights + j * lanes) * (load(column + j * lanes) - mean);
        store(column + j * lanes, gradient);
        row += gradient;
        T* sum = dsum[1] + x * lanes + lane;
        store(sum, load(sum) + gradient);
      }
      store(dsum[0] + y * lanes + lane, row);
    }
  }

  void key_value_gradient(const Block& block) {
    const int n = block.queries(), ld = dp + vp;
    transpose(softmax.q, lanes, q_t, dp, s.d, n);
    transpose(dout, lanes, dout_t, vp, s.v, n);
    for (int y = 0; y < block.wy; ++y) {
      T* pixel = pixels + (static_cast<ptrdiff_t>(block.y + s.halo + y) * width + block.x + s.halo) * ld;
      const ptrdiff_t row = static_cast<ptrdiff_t>(y) * block.wx * lanes;
      multiply<T, Layout::kRows>(block.wx, dp, n, dlogits + row, lanes, q_t, dp, pixel, ld, true);
      multiply<T, Layout::kRows>(block.wx, vp, n, softmax.weights + row, lanes, dout_t, vp, pixel + dp, ld, true);
    }
  }

  void position_gradient(const Block& block, T* dtable) {
    for (auto* axis : drelative) std::memset(axis, 0, sizeof(T) * softmax.R * lanes);
    for (int y = 0; y < block.by; ++y)
      for (int x = 0; x < block.bx; ++x) {
        const int i = y * block.bx + x;
        for (int j = 0; j < block.wy; ++j) drelative[0][softmax.relative_row(j, y) * lanes + i] = dsum[0][j * lanes + i];
        for (int j = 0; j < block.wx; ++j) drelative[1][softmax.relative_row(j, x) * lanes + i] = dsum[1][j * lanes + i];
      }
    for (int axis = 0; axis < 2; ++axis)
      multiply<T, Layout::kRows>(softmax.R, dp, block.queries(), drelative[axis], lanes, q_t, dp,
                                 dtable + static_cast<ptrdiff_t>(axis) * softmax.R * dp, dp, true);
  }

  void query_gradient(const Block& block) {
    multiply<T, Layout::kRows>(s.d, lanes, block.keys(), softmax.kv, block.keys(), dlogits, lanes, dq, lanes, false);
    const Vec<T> scale = fill(T(1) / std::sqrt(T(s.d)));
    for (int i = 0; i < s.d * lanes; i += kLanes<T>) store(dq + i, load(dq + i) * scale);
    const T* tables[] = {softmax.in.height_rel, softmax.in.width_rel};
    for (int axis = 0; axis < 2; ++axis)
      multiply<T, Layout::kColumns>(s.d, lanes, softmax.R, softmax.used(tables[axis]), s.d, drelative[axis], lanes, dq, lanes,
                                    true);
  }

  // pixels (height, width, dp + vp) without their padding -> (d + v, H, W)
  void write_pixels(T* out) const {
    const T scale = T(1) / std::sqrt(T(s.d));
    const ptrdiff_t ld = dp + vp, plane = static_cast<ptrdiff_t>(s.H) * s.W;
    for (int y = 0; y < s.H; ++y) {
      T* row = pixels + (static_cast<ptrdiff_t>(y + s.halo) * width + s.halo) * ld;
      for (int x = 0; x < s.W; ++x)
        for (int c = 0; c < dp; c += kLanes<T>) store(row + x * ld + c, load(row + x * ld + c) * scale);
      transpose(row, ld, out + y * s.W, plane, s.W, s.d);
      transpose(row + dp, ld, out + s.d * plane + y * s.W, plane, s.W, s.v);
    }
  }

  Arena<T> memory;
  const Shape s;
  const T* dmap;                                       // gradient of the output (B, N*v, Hq, Wq)
  const Gradients<T> gradients;
  T* dtables;                                          // what each head adds to the rows r of both tables (B*N, 2, R, dp)
  Softmax<T> softmax;
  const int lanes, dp, vp, width, height;              // dp, vp: d and v padded to whole vectors; map with its padding
  T *dout, *dlogits, *dq, *q_t, *dout_t, *pixels;      // (v, i), (j, i), (d, i), (i, dp), (i, vp), (height, width, dp + vp)
  T *dsum[2], *drelative[2];                           // (w, i), (R, i)
};

// out (B, N*v, Hq, Wq)
template <class T>
void forward(const Shape& s, const Inputs<T>& in, T* out) {
  const int heads = s.B * s.N, blocks = s.Y() * s.X();
  if (blocks == 0) return;
  const int run = heads >= 4 * thread_count() ? blocks : 1;                   // neighbours read the same lines of the maps
  parallel(heads * blocks / run, [&] { return Forward<T>(s, in, out, run); });
}

// dout (B, N*v, Hq, Wq) -> gradients
template <class T>
void backward(const Shape& s, const Inputs<T>& in, const T* dout, const Gradients<T>& gradients) {
  const int heads = s.B * s.N, R = s.R(), dp = round_up<T>(s.d);
  std::vector<T> dtables(static_cast<size_t>(heads) * 2 * R * dp);             // (B*N, 2, R, dp)
  parallel(heads, [&] { return Backward<T>(s, in, dout, gradients, dtables.data()); });
  std::vector<double> sums(static_cast<size_t>(2) * R * dp);
  for (int head = 0; head < heads; ++head)
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += dtables[head * sums.size() + i];
  T* const tables[] = {gradients.height_rel, gradients.width_rel};
  for (int axis = 0; axis < 2; ++axis) {
    std::fill_n(tables[axis], static_cast<size_t>(2 * s.w() - 1) * s.d, T(0));
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < s.d; ++c)
        tables[axis][(s.first_relative() + r) * s.d + c] = static_cast<T>(sums[(static_cast<size_t>(axis) * R + r) * dp + c]);
  }
}

}  // namespace halo
