// Runs ops/halo_attention.cu in emulation beside ops/halo_attention.h: exits with 1 where an output or a gradient differs.
// g++ -std=c++17 -O1 -I tests -I ops tests/helpers/cuda_emulation.cc && ./a.out
#include <cstdio>
#include <random>

#define HALO_PARTS 3                                    // fewer than the tiles of queries here
#include "halo_attention.h"
#include "halo_attention.cu"

typedef std::vector<float> Array;

static Array draw(size_t n) {
  static std::mt19937 random(0);
  std::normal_distribution<float> normal;
  Array x(n);
  for (float& y : x) y = normal(random);
  return x;
}

static bool equal(const char* name, const Array& ours, const Array& theirs) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < ours.size(); ++i) difference += std::pow(ours[i] - theirs[i], 2), norm += std::pow(theirs[i], 2);
  const bool good = std::sqrt(difference) <= 3e-6 * std::sqrt(norm);                          // false for a NaN
  if (!good) std::printf("  %s differs: %g of %g\n", name, std::sqrt(difference), std::sqrt(norm));
  return good;
}

static bool check(const halo::Shape& s) {
  const size_t heads = s.B * s.N, queries = s.Hq * s.Wq, pixels = s.H * s.W, table = (2 * s.w() - 1) * s.d;
  const Array q = draw(heads * s.d * queries), kv = draw(heads * (s.d + s.v) * pixels), rows = draw(table), columns = draw(table);
  const Array dout = draw(heads * s.v * queries);
  const halo::Inputs<float> in{q.data(), kv.data(), rows.data(), columns.data()};
  Array results[2][5];
  for (auto& result : results) {
    const size_t sizes[] = {dout.size(), q.size(), kv.size(), table, table};
    for (int i = 0; i < 5; ++i) result[i].assign(sizes[i], NAN);
    const halo::Gradients<float> gradients{result[1].data(), result[2].data(), result[3].data(), result[4].data()};
    if (&result == results) {
      Array scratch(halo::workspace(s), NAN);
      if (halo::forward(s, in, result[0].data(), nullptr) != cudaSuccess) return false;
      if (halo::backward(s, in, dout.data(), gradients, scratch.data(), nullptr) != cudaSuccess) return false;
    } else {
      halo::forward(s, in, result[0].data());
      halo::backward(s, in, dout.data(), gradients);
    }
  }
  bool good = true;
  const char* names[] = {"out", "dq", "dkv", "dheight_rel", "dwidth_rel"};
  for (int i = 0; i < 5; ++i) good &= equal(names[i], results[0][i], results[1][i]);
  std::printf("B%d N%d d%d v%d %dx%d block %d halo %d: %s\n",
              s.B, s.N, s.d, s.v, s.H, s.W, s.block, s.halo, good ? "equal" : "WRONG");
  return good;
}

// The workspace grows with the queries, and not with their product with the tables.
static bool is_bounded() {
  const halo::Shape s{256, 8, 32, 32, 128, 128, 8, 3, 128, 128};
  const size_t statistics = size_t(2) * s.B * s.N * s.Hq * s.Wq, tables = size_t(HALO_PARTS) * 2 * (2 * s.w() - 1) * s.d;
  return halo::workspace(s) == statistics + tables;
}

int main() {
  // B, N, d, v, H, W, block, halo, Hq, Wq
  bool good = check({1, 2, 16, 16, 16, 16, 8, 3, 16, 16});
  good &= check({2, 1, 8, 40, 8, 8, 4, 1, 4, 4});          // stride 2, values wider than a warp
  good &= check({1, 1, 70, 5, 12, 6, 6, 0, 4, 2});         // stride 3, no halo, wide keys
  good &= check({1, 2, 4, 6, 11, 7, 4, 1, 11, 7});         // a map that does not divide into blocks
  good &= check({1, 1, 4, 4, 3, 5, 2, 3, 3, 5});           // a halo wider than the block
  good &= check({1, 1, 8, 8, 10, 10, 10, 1, 10, 10});      // more queries than a thread block takes
  return good && is_bounded() ? 0 : 1;
}
