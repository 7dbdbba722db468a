// What the CPU's and the GPU's code share: the sizes of the problem, its arrays, and how a map divides into blocks.
#pragma once

#ifdef __CUDACC__
#define HALO_BOTH __host__ __device__
#else
#define HALO_BOTH
#endif

namespace halo {

HALO_BOTH inline int smaller(int a, int b) { return a < b ? a : b; }

struct Shape {
  int B, N, d, v, H, W, block, halo;
  int Hq, Wq;                                          // map of queries: H and W over the stride, rounded up

  HALO_BOTH int w() const { return block + 2 * halo; }
  HALO_BOTH int Y() const { return (H + block - 1) / block; }
  HALO_BOTH int X() const { return (W + block - 1) / block; }
  HALO_BOTH int R() const { return b() + w() - 1; }
  HALO_BOTH int first_relative() const { return w() - b(); }     // the table's row that row r = 0 stands for
  // The smallest stride that gives Hq and Wq. Two strides can only do so where one block holds the map: then b is no matter.
  HALO_BOTH int stride() const {
    for (int s = 1; s <= block; ++s)
      if (block % s == 0 && (H + s - 1) / s == Hq && (W + s - 1) / s == Wq) return s;
    return 0;
  }
  HALO_BOTH int b() const { return block / stride(); }
};

// A block's queries [qy, qy + by) x [qx, qx + bx) and its window [y, y + wy) x [x, x + wx), which may start in the padding.
struct Block {
  int qy, qx, by, bx, y, x, wy, wx;

  HALO_BOTH Block(const Shape& s, int b, int row, int column)
      : qy(row * b), qx(column * b), by(smaller(b, s.Hq - qy)), bx(smaller(b, s.Wq - qx)),
        y(row * s.block - s.halo), x(column * s.block - s.halo),
        wy(smaller(s.w(), s.H + s.halo - y)), wx(smaller(s.w(), s.W + s.halo - x)) {}
  HALO_BOTH int queries() const { return by * bx; }
  HALO_BOTH int keys() const { return wy * wx; }
};

template <class T>
struct Inputs {
  const T *q, *kv, *height_rel, *width_rel;            // (B, N*d, Hq, Wq), (B, N*(d+v), H, W), (2w-1, d) twice
};

template <class T>
struct Gradients {
  T *q, *kv, *height_rel, *width_rel;                  // shaped as the inputs
};

}  // namespace halo
