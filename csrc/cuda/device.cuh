// What every kernel needs: dtypes, sums over a warp, and the two things that the emulation on a CPU does otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"

#ifndef FASTMMKD_SHARED  // tests/cuda/host defines them, to run the kernels on a CPU
#define FASTMMKD_SHARED(name, ...) __shared__ __VA_ARGS__ name
#define FASTMMKD_DYNAMIC_SHARED(name) extern __shared__ float name[]
#define FASTMMKD_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  (kernel)<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(__VA_ARGS__)
#endif

namespace fastmmkd::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LN2 = 0.693147180559945f;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

__device__ __forceinline__ void assign(float& to, float x) {
  to = x;
}
__device__ __forceinline__ void assign(__half& to, float x) {
  to = __float2half_rn(x);
}
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
}

// The sum over `lanes` neighbouring lanes, the same in all of them; every lane of the warp calls it.
template <int LANES = WARP>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    x += __shfl_xor_sync(ALL_LANES, x, distance);
  }
  return x;
}

template <int LANES = WARP>
__device__ __forceinline__ float lane_maximum(float x) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
  }
  return x;
}

#ifndef __CUDACC_RTC__
// f(T{}) for the C++ type of a dtype.
template <typename F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float16:
      return f(__half{});
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
  }
}
#endif

}  // namespace fastmmkd::cuda
