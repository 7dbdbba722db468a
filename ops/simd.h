// Vectors of floats or doubles as wide as the target's registers, the small matrix product that all else is made of, and
// the loop over threads.
//
// GCC and Clang vector types: the compiler maps them to AVX-512, AVX2, NEON or whatever -march names, and to plain
// code elsewhere. Only loads and stores of part of a vector, which the language cannot say, use intrinsics.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace halo {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;  // of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kAccumulators = 24;
#else
constexpr int kVectorBytes = 16, kAccumulators = 12;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline int round_up(int n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = x;
}

template <class T>
inline Vec<T> fill(T x) {
  return Vec<T>{} + x;
}

template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}

// Lanes [first, last) of a vector; the others neither read nor write memory.
struct Part {
  int first, last;
};

template <class T>
inline Part part(int first, int last) {
  return {std::clamp(first, 0, kLanes<T>), std::clamp(last, 0, kLanes<T>)};
}

#if defined(__AVX512F__)
inline unsigned bits(Part p) { return ((1u << p.last) - 1) & ~((1u << p.first) - 1); }
inline Vec<float> load(const float* p, Part lanes) { return (Vec<float>)_mm512_maskz_loadu_ps(bits(lanes), p); }
inline Vec<double> load(const double* p, Part lanes) { return (Vec<double>)_mm512_maskz_loadu_pd(bits(lanes), p); }
inline void store(float* p, Vec<float> x, Part lanes) { _mm512_mask_storeu_ps(p, bits(lanes), (__m512)x); }
inline void store(double* p, Vec<double> x, Part lanes) { _mm512_mask_storeu_pd(p, bits(lanes), (__m512d)x); }
#elif defined(__AVX2__)
inline __m256i mask4(Part p) {  // lanes of 32 bits
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(p.first), lane);
  return _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(p.last), lane));
}
inline __m256i mask8(Part p) { return mask4({2 * p.first, 2 * p.last}); }
inline Vec<float> load(const float* p, Part lanes) { return (Vec<float>)_mm256_maskload_ps(p, mask4(lanes)); }
inline Vec<double> load(const double* p, Part lanes) { return (Vec<double>)_mm256_maskload_pd(p, mask8(lanes)); }
inline void store(float* p, Vec<float> x, Part lanes) { _mm256_maskstore_ps(p, mask4(lanes), (__m256)x); }
inline void store(double* p, Vec<double> x, Part lanes) { _mm256_maskstore_pd(p, mask8(lanes), (__m256d)x); }
#else
template <class T>
inline Vec<T> load(const T* p, Part lanes) {
  Vec<T> x{};
  for (int i = lanes.first; i < lanes.last; ++i) x[i] = p[i];
  return x;
}
template <class T>
inline void store(T* p, Vec<T> x, Part lanes) {
  for (int i = lanes.first; i < lanes.last; ++i) p[i] = x[i];
}
#endif

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// e^x for x <= 0, to 1e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]. Below -87 it is e^-87, nothing beside the
// largest term 1 of a softmax; a NaN stays one.
inline Vec<float> exp(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const float round = 12582912.0f + 127;               // 1.5 * 2^23: it leaves the nearest integer, plus 127, in the low bits
  x = x < -87.0f ? fill(-87.0f) : x;
  const Vec<float> shifted = x * 1.44269504f + round;
  const Vec<float> n = shifted - round;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = fill(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * (Vec<float>)((Ints)shifted << 23);        // 2^n
}

// How a matrix lies in memory: its unit stride runs along the columns (element i, j at i * ld + j) or along the rows.
enum class Layout { kRows, kColumns };

// c[m, n] = sum_k a[m, k] b[k, n] for M rows and NV vectors of columns, all held in registers; plus `from` unless that is null.
template <class T, Layout A, int M, int NV>
void tile(int K, const T* a, ptrdiff_t lda, const T* b, ptrdiff_t ldb, const T* from, ptrdiff_t ld_from, T* c, ptrdiff_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[M][NV];
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = from ? load(from + m * ld_from + n * L) : Vec<T>{};
  for (int k = 0; k < K; ++k) {
    Vec<T> right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load(b + k * ldb + n * L);
#pragma GCC unroll 24
    for (int m = 0; m < M; ++m) {
      const T left = A == Layout::kRows ? a[m * lda + k] : a[k * lda + m];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * L, sum[m][n]);
}

template <class T>
using Tile = void (*)(int, const T*, ptrdiff_t, const T*, ptrdiff_t, const T*, ptrdiff_t, T*, ptrdiff_t);

// Rows 0 .. M-1 by NV vectors of columns, in tiles of nearly equal height.
template <class T, Layout A, int NV, int... I>
void panel(int M, int K, const T* a, ptrdiff_t lda, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, bool add,
           std::integer_sequence<int, I...>) {
  static constexpr Tile<T> tiles[] = {tile<T, A, I + 1, NV>...};
  const int count = (M + static_cast<int>(sizeof...(I)) - 1) / static_cast<int>(sizeof...(I));
  for (int t = 0; t < count; ++t) {
    const int first = M * t / count, rows = M * (t + 1) / count - first;
    T* const to = c + first * ldc;
    tiles[rows - 1](K, A == Layout::kRows ? a + first * lda : a + first, lda, b, ldb, add ? to : nullptr, ldc, to, ldc);
  }
}

// c[m, n] (+)= sum_k a[m, k] b[k, n] with b and c row by row and n running to N, a multiple of the vector's lanes.
template <class T, Layout A>
void multiply(int M, int N, int K, const T* a, ptrdiff_t lda, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, bool add) {
  constexpr int L = kLanes<T>;
  int n = 0;
  const auto run = [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    for (; N - n >= NV * L; n += NV * L)
      panel<T, A, NV>(M, K, a, lda, b + n, ldb, c + n, ldc, add,
                      std::make_integer_sequence<int, std::min(kAccumulators / NV, 12)>());
  };
  if (kAccumulators == 24) run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

// in (rows, columns) -> out (columns, rows); columns of out beyond `rows` are left as they are.
template <class T>
void transpose(const T* in, ptrdiff_t ld, T* out, ptrdiff_t ld_out, int rows, int columns) {
  int whole_rows = 0, whole_columns = 0;
#if defined(__clang__) || __GNUC__ >= 12
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int j = 0; j < whole_columns; j += 4)
    for (int i = 0; i < whole_rows; i += 4) {
      const auto row = [&](int k) { return *reinterpret_cast<const Four*>(in + (i + k) * ld + j); };
      const auto column = [&](int k) -> Four& { return *reinterpret_cast<Four*>(out + (j + k) * ld_out + i); };
      const Four a = row(0), b = row(1), c = row(2), d = row(3);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      column(0) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
      column(1) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
      column(2) = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
      column(3) = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
    }
#endif
  for (int j = 0; j < columns; ++j)
    for (int i = j < whole_columns ? whole_rows : 0; i < rows; ++i) out[j * ld_out + i] = in[i * ld + j];
}

// The vectors a and b, one after the other: numbers 0, 2, 4, ... to `even`, the others to `odd`.
template <class T, int... I>
void unzip(Vec<T> a, Vec<T> b, T* even, T* odd, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  store(even, static_cast<Vec<T>>(__builtin_shufflevector(a, b, (2 * I)...)));
  store(odd, static_cast<Vec<T>>(__builtin_shufflevector(a, b, (2 * I + 1)...)));
#else
  const Vec<T> both[] = {a, b};
  for (int i : {I...}) {
    even[i] = both[2 * i / kLanes<T>][2 * i % kLanes<T>];
    odd[i] = both[(2 * i + 1) / kLanes<T>][(2 * i + 1) % kLanes<T>];
  }
#endif
}
template <class T>
void unzip(Vec<T> a, Vec<T> b, T* even, T* odd) {
  unzip<T>(a, b, even, odd, std::make_integer_sequence<int, kLanes<T>>());
}

// a[0], b[0], a[1], b[1], ...: the first `count` of them, to `to`.
template <class T, int... I>
void zip(Vec<T> a, Vec<T> b, T* to, int count, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  constexpr int L = kLanes<T>;
  store(to, static_cast<Vec<T>>(__builtin_shufflevector(a, b, (I / 2 + I % 2 * L)...)), part<T>(0, count));
  store(to + L, static_cast<Vec<T>>(__builtin_shufflevector(a, b, (L / 2 + I / 2 + I % 2 * L)...)), part<T>(0, count - L));
#else
  for (int i = 0; i < count && i < 2 * kLanes<T>; ++i) to[i] = (i % 2 ? b : a)[i / 2];
#endif
}
template <class T>
void zip(Vec<T> a, Vec<T> b, T* to, int count) {
  zip<T>(a, b, to, count, std::make_integer_sequence<int, kLanes<T>>());
}

// One thread's memory, cut into arrays that start on a vector's boundary; zero at first.
template <class T>
class Arena {
 public:
  T* take(size_t n) {
    const size_t bytes = (n * sizeof(T) / kVectorBytes + 2) * kVectorBytes;    // room for a vector past the end
    blocks_.emplace_back(static_cast<T*>(std::aligned_alloc(kVectorBytes, bytes)), &std::free);
    if (!blocks_.back()) throw std::bad_alloc();
    std::memset(blocks_.back().get(), 0, bytes);
    return blocks_.back().get();
  }

 private:
  std::vector<std::unique_ptr<T, decltype(&std::free)>> blocks_;
};

// As many as `parallel` will run.
inline int thread_count() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Runs prepare() once in every thread and what it returns on the numbers 0 .. count-1, each in one thread. A counter of our
// own and no `omp for`: of the OpenMP library that Paddle ships (an old one, and two in one process do not mix) that would
// take entry points it lacks.
template <class Prepare>
void parallel(int count, Prepare prepare) {
  std::atomic<int> next{0};
#pragma omp parallel
  {
    auto work = prepare();
    for (int i; (i = next.fetch_add(1)) < count;) work(i);
  }
}

}  // namespace halo
