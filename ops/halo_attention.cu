// Halo attention on a GPU, forward and backward: float, half or bfloat16 in memory, float in every sum.
//
// STATE: exact on an H200 (dev/cuda_kernels.py, with PyTorch as host), and on a CPU through tests/helpers/cuda_emulation.h, which
// runs the kernels thread by thread. They save memory and not time: docs/attention.md has the figures. So only MODEL.ATTENTION
// fused asks for them, not auto. Paddle has not run them on a GPU.
//
// Flash style: a softmax in one sweep with a running maximum, and nothing of the size (queries x keys) in memory. A thread
// block owns 64 queries of one block of one head; a warp owns some of these, a lane one key at a time, and in the weighted sum
// some channels. The gradient of keys and values turns this round: a thread block owns 64 pixels of one block, a warp some
// of these, a lane one query at a time. So every number is written by one warp, in one order: no atomics, same bits every run.
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include "halo_attention_gpu.h"
#else
#include "cuda_emulation.h"
#endif

#include "shape.h"

#ifndef HALO_PARTS
#define HALO_PARTS 512                                  // thread blocks that sum the tables' gradients, each its share of the tiles
#endif

namespace halo {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTile = 64, kOwn = kTile / kWarps;    // kOwn: queries or pixels per warp
constexpr unsigned kAll = 0xffffffffu;

// Thread blocks that a multiprocessor holds at once: with two, a thread has 128 registers, too few for 4 channels of a head.
constexpr int resident(int U) { return U < 4 ? 2 : 1; }

__device__ inline float warp_sum(float x) {
  for (int k = 16; k; k /= 2) x += __shfl_xor_sync(kAll, x, k);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int k = 16; k; k /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, k));
  return x;
}

// Offset of pixel i of a block `columns` wide whose corner is (y, x), in a plane `width` wide.
__device__ inline int pixel(int i, int columns, int y, int x, int width) { return (y + i / columns) * width + x + i % columns; }

// Element (c, i) for c < channels, i < kTile or `count`, as to[i * ld + c]; zero where `at(i)` is negative.
template <class T, class At>
__device__ void fetch(const T* planes, ptrdiff_t plane, int channels, int count, float* to, int ld, At at) {
  for (int n = threadIdx.x; n < channels * count; n += kThreads) {
    const int c = n / count, i = n % count, offset = at(i);
    to[i * ld + c] = offset < 0 ? 0.0f : static_cast<float>(planes[c * plane + offset]);
  }
}

__device__ inline float dot(const float* a, const float* b, int n) {
  float sum = 0;
#pragma unroll 8
  for (int c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

// A tile of queries, with the logits of their relative positions, in shared memory.
template <class T>
struct Queries {
  const Shape s;
  const int b, head;
  const Block block;
  const int first, count;                              // queries first .. first + count - 1 of the block
  float *q, *rows, *columns;                           // (kTile, d + 1), (kTile, w), (kTile, w)

  HALO_BOTH static int tiles(const Shape& s) { return (s.b() * s.b() + kTile - 1) / kTile; }         // of a block
  HALO_BOTH static int places(const Shape& s) { return s.Y() * s.X() * tiles(s); }                   // tiles of a head
  HALO_BOTH static int floats(const Shape& s) { return kTile * (s.d + 1 + 2 * s.w()); }

  __device__ Queries(const Shape& shape, int place, int head, float* shared)
      : s(shape), b(shape.b()), head(head), block(s, b, place / tiles(s) / s.X(), place / tiles(s) % s.X()),
        first(place % tiles(s) * kTile), count(min(kTile, block.queries() - first)),
        q(shared), rows(q + kTile * (s.d + 1)), columns(rows + kTile * s.w()) {}

  __device__ int offset(int i) const {
    return i < count ? pixel(first + i, block.bx, block.qy, block.qx, s.Wq) : -1;
  }
  __device__ int row(int i) const { return (first + i) / block.bx; }
  __device__ int column(int i) const { return (first + i) % block.bx; }

  __device__ void load(const Inputs<T>& in) {
    const ptrdiff_t plane = static_cast<ptrdiff_t>(s.Hq) * s.Wq;
    fetch(in.q + head * s.d * plane, plane, s.d, kTile, q, s.d + 1, [&](int i) { return offset(i); });
    __syncthreads();
    for (int n = threadIdx.x; n < kTile * s.w(); n += kThreads) {
      const int i = n / s.w(), j = n % s.w();
      if (i >= count) continue;
      const T* down = in.height_rel + (j - row(i) + s.w() - 1) * s.d;
      const T* across = in.width_rel + (j - column(i) + s.w() - 1) * s.d;
      float y = 0, x = 0;
      for (int c = 0; c < s.d; ++c) {
        y += q[i * (s.d + 1) + c] * static_cast<float>(down[c]);
        x += q[i * (s.d + 1) + c] * static_cast<float>(across[c]);
      }
      rows[n] = y, columns[n] = x;
    }
  }
  // 32 keys of the window from key j on, and their values, as (32, d + v + 1).
  __device__ void load_keys(const Inputs<T>& in, int j, float* kv) const {
    const ptrdiff_t plane = static_cast<ptrdiff_t>(s.H) * s.W;
    fetch(in.kv + head * (s.d + s.v) * plane, plane, s.d + s.v, 32, kv, s.d + s.v + 1, [&](int k) {
      const int y = block.y + (j + k) / block.wx, x = block.x + (j + k) % block.wx;
      return j + k < block.keys() && y >= 0 && y < s.H && x >= 0 && x < s.W ? y * s.W + x : -1;
    });
  }
  __device__ float logit(int i, int j, const float* key) const {
    if (j >= block.keys()) return -INFINITY;
    return dot(q + i * (s.d + 1), key, s.d) * rsqrtf(s.d) + rows[i * s.w() + j / block.wx] + columns[i * s.w() + j % block.wx];
  }
};

// grid (places, B * N); a warp takes up to 32 * U channels
template <class T, int U>
__global__ void __launch_bounds__(kThreads, resident(U)) forward_kernel(Shape s, Inputs<T> in, T* out) {
  extern __shared__ float shared[];
  Queries<T> queries(s, blockIdx.x, blockIdx.y, shared);
  float* kv = shared + Queries<T>::floats(s);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ld = s.d + s.v + 1;
  float largest[kOwn], total[kOwn], o[kOwn][U] = {};
  for (int n = 0; n < kOwn; ++n) largest[n] = -INFINITY, total[n] = 0;
  queries.load(in);
  for (int j = 0; j < queries.block.keys(); j += 32) {
    __syncthreads();
    queries.load_keys(in, j, kv);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int i = warp * kOwn + n;
      if (i >= queries.count) continue;
      const float logit = queries.logit(i, j + lane, kv + lane * ld), before = largest[n];
      largest[n] = fmaxf(before, warp_max(logit));
      const float weight = expf(logit - largest[n]), keep = expf(before - largest[n]);
      total[n] = total[n] * keep + warp_sum(weight);
      for (int u = 0; u < U; ++u) o[n][u] *= keep;
#pragma unroll 4
      for (int k = 0; k < 32; ++k) {
        const float p = __shfl_sync(kAll, weight, k);
        for (int u = 0; u < U; ++u)
          if (u * 32 + lane < s.v) o[n][u] += p * kv[k * ld + s.d + u * 32 + lane];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kOwn; ++n)
    for (int u = 0; u < U; ++u)
      if (warp * kOwn + n < queries.count && u * 32 + lane < s.v)
        out[(static_cast<ptrdiff_t>(blockIdx.y) * s.v + u * 32 + lane) * s.Hq * s.Wq + queries.offset(warp * kOwn + n)] =
            static_cast<T>(o[n][u] / total[n]);
}

// As forward_kernel, twice over the keys. Leaves log sum exp and the mean gradient of the probabilities of each query in
// `statistics` (2, B*N, Hq, Wq) for the last kernel. A thread block takes every gridDim.x-th tile of all heads, one after another,
// and leaves the sum of their gradients of the tables in `tables` (grid, 2, 2w-1, d).
template <class T, int U>
__global__ void __launch_bounds__(kThreads, resident(U))
    query_gradient_kernel(Shape s, Inputs<T> in, const T* dout, T* dq, float* statistics, float* tables) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ld = s.d + s.v + 1, w = s.w(), heads = s.B * s.N;
  const int places = Queries<T>::places(s), size = (2 * w - 1) * s.d;
  const ptrdiff_t plane = static_cast<ptrdiff_t>(s.Hq) * s.Wq;
  float *kv = shared + Queries<T>::floats(s), *g = kv + 32 * ld, *drows = g + kTile * (s.v + 1), *dcolumns = drows + kTile * w;
  tables += static_cast<ptrdiff_t>(blockIdx.x) * 2 * size;
  for (int tile = blockIdx.x; tile < places * heads; tile += gridDim.x) {
    const int head = tile / places;
    Queries<T> queries(s, tile % places, head, shared);
    const int keys = queries.block.keys();
    __syncthreads();                                   // the tile before has been read
    queries.load(in);
    fetch(dout + static_cast<ptrdiff_t>(head) * s.v * plane, plane, s.v, kTile, g, s.v + 1, [&](int i) { return queries.offset(i); });
    for (int n = threadIdx.x; n < kTile * w; n += kThreads) drows[n] = dcolumns[n] = 0;
    float largest[kOwn], total[kOwn], mean[kOwn], sum[kOwn][U] = {};
    for (int n = 0; n < kOwn; ++n) largest[n] = -INFINITY, total[n] = mean[n] = 0;
    for (int sweep = 0; sweep < 2; ++sweep)
      for (int j = 0; j < keys; j += 32) {
        __syncthreads();
        queries.load_keys(in, j, kv);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
          const int i = warp * kOwn + n;
          if (i >= queries.count) continue;
          const float* key = kv + lane * ld;
          const float logit = queries.logit(i, j + lane, key), dp = dot(g + i * (s.v + 1), key + s.d, s.v);
          if (sweep == 0) {
            const float before = largest[n];
            largest[n] = fmaxf(before, warp_max(logit));
            const float weight = expf(logit - largest[n]), keep = expf(before - largest[n]);
            total[n] = total[n] * keep + warp_sum(weight);
            mean[n] = mean[n] * keep + warp_sum(weight * dp);
            continue;
          }
          const float ds = expf(logit - largest[n]) / total[n] * (dp - mean[n] / total[n]);
#pragma unroll 4
          for (int k = 0; k < 32 && j + k < keys; ++k) {
            const float x = __shfl_sync(kAll, ds, k);
            for (int u = 0; u < U; ++u)
              if (u * 32 + lane < s.d) sum[n][u] += x * kv[k * ld + u * 32 + lane];
            if (lane == 0) drows[i * w + (j + k) / queries.block.wx] += x;
            if (lane == 1) dcolumns[i * w + (j + k) % queries.block.wx] += x;
          }
        }
      }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      if (warp * kOwn + n >= queries.count) continue;
      const int i = warp * kOwn + n, at = queries.offset(i);
      for (int u = 0; u < U; ++u) {
        const int c = u * 32 + lane;
        if (c >= s.d) continue;
        float x = sum[n][u] * rsqrtf(s.d);
        for (int j = 0; j < w; ++j)
          x += drows[i * w + j] * static_cast<float>(in.height_rel[(j - queries.row(i) + w - 1) * s.d + c]) +
               dcolumns[i * w + j] * static_cast<float>(in.width_rel[(j - queries.column(i) + w - 1) * s.d + c]);
        dq[(static_cast<ptrdiff_t>(head) * s.d + c) * plane + at] = static_cast<T>(x);
      }
      if (lane == 0) {
        statistics[head * plane + at] = largest[n] + logf(total[n]);
        statistics[(heads + head) * plane + at] = mean[n] / total[n];
      }
    }
    for (int n = threadIdx.x; n < 2 * size; n += kThreads) {
      const int row = n % size / s.d, c = n % s.d;
      float x = 0;
      for (int i = 0; i < queries.count; ++i) {
        const int j = row + (n < size ? queries.row(i) : queries.column(i)) - w + 1;      // the key that sees this row from i
        if (j >= 0 && j < w) x += (n < size ? drows : dcolumns)[i * w + j] * queries.q[i * (s.d + 1) + c];
      }
      tables[n] = tile == blockIdx.x ? x : tables[n] + x;
    }
  }
}

// table[n] = sum over parts of parts[part, n], for the two tables side by side. A warp sums every 8th part, a lane one n.
template <class T>
__global__ void table_gradient_kernel(const float* parts, int count, int size, T* height_rel, T* width_rel) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.x * 32 + lane;
  float sum = 0;
  for (int part = warp; part < count && n < 2 * size; part += kWarps) sum += parts[static_cast<ptrdiff_t>(part) * 2 * size + n];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp || n >= 2 * size) return;
  for (int other = 1; other < kWarps; ++other) sum += shared[other * 32 + lane];
  (n < size ? height_rel[n] : width_rel[n - size]) = static_cast<T>(sum);
}

// grid (key blocks * tiles of pixels, B * N). A lane takes a query of one of the blocks whose window holds the pixel.
template <class T, int U>
__global__ void __launch_bounds__(kThreads, resident(U))
    key_value_gradient_kernel(Shape s, Inputs<T> in, const T* dout, const float* statistics, T* dkv) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ld = s.d + s.v + 1, w = s.w(), b = s.b(), head = blockIdx.y;
  const int tiles = (s.block * s.block + kTile - 1) / kTile, place = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  const int Y = place / s.X() * s.block, X = place % s.X() * s.block;
  const int width = min(s.block, s.W - X), height = min(s.block, s.H - Y);
  const int count = min(kTile, height * width - first), reach = (s.halo + s.block - 1) / s.block;
  const ptrdiff_t pixels = static_cast<ptrdiff_t>(s.H) * s.W, plane = static_cast<ptrdiff_t>(s.Hq) * s.Wq;
  float *own = shared, *other = own + kTile * ld, *down = other + 32 * ld, *across = down + (2 * w - 1) * s.d;
  fetch(in.kv + head * (s.d + s.v) * pixels, pixels, s.d + s.v, kTile, own, ld,
        [&](int i) { return i < count ? pixel(first + i, width, Y, X, s.W) : -1; });
  for (int n = threadIdx.x; n < (2 * w - 1) * s.d; n += kThreads)
    down[n] = static_cast<float>(in.height_rel[n]), across[n] = static_cast<float>(in.width_rel[n]);
  float dk[kOwn][U] = {}, dv[kOwn][U] = {};
  for (int row = max(0, place / s.X() - reach); row <= min(s.Y() - 1, place / s.X() + reach); ++row)
    for (int column = max(0, place % s.X() - reach); column <= min(s.X() - 1, place % s.X() + reach); ++column) {
      const Block block(s, b, row, column);
      for (int start = 0; start < block.queries(); start += 32) {
        const auto at = [&](int i) {
          return start + i < block.queries() ? pixel(start + i, block.bx, block.qy, block.qx, s.Wq) : -1;
        };
        __syncthreads();
        fetch(in.q + head * s.d * plane, plane, s.d, 32, other, ld, at);
        fetch(dout + head * s.v * plane, plane, s.v, 32, other + s.d, ld, at);
        __syncthreads();
        const int query = start + lane, where = at(lane);
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
          const int i = warp * kOwn + n;
          if (i >= count) continue;
          const int y = Y + (first + i) / width - block.y, x = X + (first + i) % width - block.x;   // in the window
          if (y < 0 || y >= block.wy || x < 0 || x >= block.wx) continue;                           // all lanes alike
          float p = 0, ds = 0;
          if (where >= 0) {
            const float *q = other + lane * ld, *key = own + i * ld;
            const float logit = dot(q, key, s.d) * rsqrtf(s.d) + dot(q, down + (y - query / block.bx + w - 1) * s.d, s.d) +
                                dot(q, across + (x - query % block.bx + w - 1) * s.d, s.d);
            p = expf(logit - statistics[head * plane + where]);
            ds = p * (dot(q + s.d, key + s.d, s.v) - statistics[(gridDim.y + head) * plane + where]);
          }
#pragma unroll 4
          for (int k = 0; k < 32; ++k) {
            const float weight = __shfl_sync(kAll, p, k), slope = __shfl_sync(kAll, ds, k);
            for (int u = 0; u < U; ++u)
              if (u * 32 + lane < s.d) dk[n][u] += slope * other[k * ld + u * 32 + lane];
            for (int u = 0; u < U; ++u)
              if (u * 32 + lane < s.v) dv[n][u] += weight * other[k * ld + s.d + u * 32 + lane];
          }
        }
      }
    }
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    if (warp * kOwn + n >= count) continue;
    T* to = dkv + static_cast<ptrdiff_t>(head) * (s.d + s.v) * pixels + pixel(first + warp * kOwn + n, width, Y, X, s.W);
    for (int u = 0; u < U; ++u)
      if (u * 32 + lane < s.d) to[(u * 32 + lane) * pixels] = static_cast<T>(dk[n][u] * rsqrtf(s.d));
    for (int u = 0; u < U; ++u)
      if (u * 32 + lane < s.v) to[(s.d + u * 32 + lane) * pixels] = static_cast<T>(dv[n][u]);
  }
}

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, size_t floats, cudaStream_t stream, Arguments... arguments) {
  const size_t bytes = floats * sizeof(float);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;              // the window or the heads are too wide for this GPU's shared memory
  kernel<<<grid, kThreads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
#endif

// Thread blocks of query_gradient_kernel, and the parts of the tables' gradients.
inline int parts(const Shape& s) { return smaller(HALO_PARTS, Queries<float>::places(s) * s.B * s.N); }

size_t workspace(const Shape& s) {
  return static_cast<size_t>(2) * s.B * s.N * s.Hq * s.Wq + static_cast<size_t>(parts(s)) * 2 * (2 * s.w() - 1) * s.d;
}

template <class T, int U>
cudaError_t forward_of(const Shape& s, const Inputs<T>& in, T* out, cudaStream_t stream) {
  return launch(forward_kernel<T, U>, dim3(Queries<T>::places(s), s.B * s.N), Queries<T>::floats(s) + 32 * (s.d + s.v + 1), stream, s, in, out);
}

template <class T, int U>
cudaError_t backward_of(const Shape& s, const Inputs<T>& in, const T* dout, const Gradients<T>& gradients, float* workspace,
                        cudaStream_t stream) {
  const int ld = s.d + s.v + 1, size = (2 * s.w() - 1) * s.d, tiles = (s.block * s.block + kTile - 1) / kTile;
  float* tables = workspace + static_cast<size_t>(2) * s.B * s.N * s.Hq * s.Wq;
  const size_t floats = Queries<T>::floats(s) + 32 * ld + kTile * (s.v + 1 + 2 * s.w());
  cudaError_t error = launch(query_gradient_kernel<T, U>, dim3(parts(s)), floats, stream, s, in, dout, gradients.q, workspace, tables);
  if (error != cudaSuccess) return error;
  error = launch(table_gradient_kernel<T>, dim3((2 * size + 31) / 32), kThreads, stream, static_cast<const float*>(tables),
                 parts(s), size, gradients.height_rel, gradients.width_rel);
  if (error != cudaSuccess) return error;
  return launch(key_value_gradient_kernel<T, U>, dim3(s.Y() * s.X() * tiles, s.B * s.N), (kTile + 32) * ld + 2 * size, stream,
                s, in, dout, static_cast<const float*>(workspace), gradients.kv);
}

template <class T>
cudaError_t forward(const Shape& s, const Inputs<T>& in, T* out, cudaStream_t stream) {
  const int channels = s.d > s.v ? s.d : s.v;
  if (channels <= 32) return forward_of<T, 1>(s, in, out, stream);
  if (channels <= 64) return forward_of<T, 2>(s, in, out, stream);
  if (channels <= 128) return forward_of<T, 4>(s, in, out, stream);
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t backward(const Shape& s, const Inputs<T>& in, const T* dout, const Gradients<T>& gradients, float* workspace,
                     cudaStream_t stream) {
  const int channels = s.d > s.v ? s.d : s.v;
  if (channels <= 32) return backward_of<T, 1>(s, in, dout, gradients, workspace, stream);
  if (channels <= 64) return backward_of<T, 2>(s, in, dout, gradients, workspace, stream);
  if (channels <= 128) return backward_of<T, 4>(s, in, dout, gradients, workspace, stream);
  return cudaErrorInvalidValue;
}

#define HALO_INSTANCES(T)                                                                  \
  template cudaError_t forward<T>(const Shape&, const Inputs<T>&, T*, cudaStream_t);      \
  template cudaError_t backward<T>(const Shape&, const Inputs<T>&, const T*, const Gradients<T>&, float*, cudaStream_t);
HALO_INSTANCES(float)
#ifdef __CUDACC__
HALO_INSTANCES(__half)
HALO_INSTANCES(__nv_bfloat16)
#endif

}  // namespace halo
