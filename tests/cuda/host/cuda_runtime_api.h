// CUDA as seen by the kernels, on a CPU: every thread of a block is a fiber, and blocks run one after another.
//
// Fibers run from one barrier or warp operation to the next, in an order that the test chooses, so that a barrier that
// is missing gives another result. Shared memory starts as NaN with guards around every object; a thread that ends, or
// waits elsewhere, while others wait is an error, and so is what the smallest architecture (sm_70) does not allow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __global__ __attribute__((noinline))
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
cudaError_t cudaGetLastError();

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Extent {
  unsigned x;
};

namespace emulation {

enum class Operation { block_barrier, warp_barrier, shuffle, ballot };

Extent thread_index();
Extent block_index();
Extent block_size();
// Shared memory of the calling thread's next declaration, the same for all threads of the block.
void* shared(std::size_t bytes, std::size_t alignment);
void* dynamic_shared();
void launch(std::int64_t blocks, std::int64_t threads, std::int64_t dynamic_bytes, const std::function<void()>& kernel);
// Waits for the warp or the block; gives each thread what `lane` of its warp, or a vote of all its lanes, brought.
std::uint32_t meet(Operation operation, std::uint32_t mask, std::uint32_t value, int lane);

}  // namespace emulation

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define blockDim emulation::block_size()

#define FASTMMKD_SHARED(name, ...) \
  __VA_ARGS__& name = *static_cast<__VA_ARGS__*>(emulation::shared(sizeof(__VA_ARGS__), alignof(__VA_ARGS__)))
#define FASTMMKD_DYNAMIC_SHARED(name) float* name = static_cast<float*>(emulation::dynamic_shared())
#define FASTMMKD_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  emulation::launch(blocks, threads, bytes, [&] { (kernel)(__VA_ARGS__); })

inline void __syncthreads() {
  emulation::meet(emulation::Operation::block_barrier, ~0u, 0, 0);
}
inline void __syncwarp() {
  emulation::meet(emulation::Operation::warp_barrier, ~0u, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulation::meet(emulation::Operation::ballot, mask, vote, 0);
}
inline bool __any_sync(unsigned mask, bool vote) {
  return __ballot_sync(mask, vote) != 0;
}
inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const int lane = static_cast<int>(threadIdx.x % 32) ^ distance;
  bits = emulation::meet(emulation::Operation::shuffle, mask, bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline float __int_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
