// Just enough of CUDA to run ops/halo_attention.cu on a CPU: every thread of a thread block is a fiber, and a fiber that waits,
// at a barrier or for the other lanes of its warp, lets the next one run. It proves arithmetic and indices, nothing about speed,
// memory races between barriers or a GPU's limits.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
typedef void* cudaStream_t;

static dim3 threadIdx, blockIdx, gridDim;
using std::max;
using std::min;
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace halo {
float shared[1 << 16];
}  // namespace halo

namespace emulation {

constexpr int kMost = 256;
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};
static Fiber fibers[kMost];
static ucontext_t scheduler;
static std::function<void()> body;
static int running, arrived[1 + kMost / 32], generation[1 + kMost / 32];   // barriers: of the block, then of each warp
static float lanes[kMost];

inline void wait(int barrier, int count) {
  const int before = generation[barrier];
  if (++arrived[barrier] == count) {
    arrived[barrier] = 0, ++generation[barrier];
    return;
  }
  while (generation[barrier] == before) swapcontext(&fibers[running].context, &scheduler);
}

inline void entry() {
  body();
  fibers[running].done = true;
}

inline float from_lane(float x, int lane) {
  const int warp = running / 32;
  lanes[running] = x;
  wait(1 + warp, 32);
  const float y = lanes[warp * 32 + lane];
  wait(1 + warp, 32);
  return y;
}

inline void run(int count) {
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (int i = 0; i < count; ++i) {
      if (fibers[i].done) continue;
      left = true, running = i, threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(0, emulation::kMost); }
inline float __shfl_sync(unsigned, float x, int lane) { return emulation::from_lane(x, lane); }
inline float __shfl_xor_sync(unsigned, float x, int mask) { return emulation::from_lane(x, emulation::running % 32 ^ mask); }

namespace halo {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, size_t floats, cudaStream_t, Arguments... arguments) {
  if (floats > sizeof shared / sizeof *shared) return cudaErrorInvalidValue;
  gridDim = grid;
  emulation::body = [&] { kernel(arguments...); };
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      std::fill_n(shared, sizeof shared / sizeof *shared, NAN);                    // nothing may be read before it is written
      emulation::run(emulation::kMost);
    }
  return cudaSuccess;
}

}  // namespace halo
