// See residual_layer_norm.cu. X and R: the types of x and the residual.
#pragma once

#include "cuda/device.cuh"

namespace fastmmkd::cuda {

constexpr int NORM_WARPS = 4;

// The type of the gradient of the sum.
template <typename X, typename R>
struct Promoted {
  using Type = float;
};
template <typename X>
struct Promoted<X, X> {
  using Type = X;
};

template <typename X, typename R>
struct Sum {
  const X* x;
  const R* residual;

  __device__ __forceinline__ Sum(const Norm& a, Size row)
      : x(static_cast<const X*>(a.x) + row * a.width), residual(static_cast<const R*>(a.residual) + row * a.width) {}

  __device__ __forceinline__ float operator[](Size i) const { return to_float(x[i]) + to_float(residual[i]); }
};

template <typename X, typename R>
__global__ void __launch_bounds__(NORM_WARPS* WARP) norm_rows(const __grid_constant__ Norm a) {
  const int lane = threadIdx.x % WARP;
  const Size row = static_cast<Size>(blockIdx.x) * NORM_WARPS + threadIdx.x / WARP;
  if (row >= a.groups * a.rows) {
    return;
  }
  const Sum<X, R> sum(a, row);
  const float over_width = 1.0f / static_cast<float>(a.width);
  float total = 0.0f, squares = 0.0f;
  for (Size i = lane; i < a.width; i += WARP) {
    total += sum[i];
  }
  const float mean = lane_sum(total) * over_width;
  for (Size i = lane; i < a.width; i += WARP) {
    const float centred = sum[i] - mean;
    squares += centred * centred;
  }
  const float rstd = 1.0f / sqrtf(lane_sum(squares) * over_width + a.eps);
  const float* weight = a.weight + row / a.rows * a.width;
  const float* bias = a.bias + row / a.rows * a.width;
  X* out = static_cast<X*>(a.out) + row * a.width;
  for (Size i = lane; i < a.width; i += WARP) {
    assign(out[i], (sum[i] - mean) * rstd * weight[i] + bias[i]);
  }
  if (lane == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// Up to NORM_ROWS rows of a group: the gradient of their sums, and their part of the gradients of weight and bias.
template <typename X, typename R>
__global__ void __launch_bounds__(NORM_WARPS* WARP) differentiate_rows(const __grid_constant__ Norm a) {
  FASTMMKD_DYNAMIC_SHARED(sums);  // [warps, 2, width]
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const Size blocks = tiles(a.rows, NORM_ROWS), group = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const Size first = block * NORM_ROWS, end = first + NORM_ROWS < a.rows ? first + NORM_ROWS : a.rows;
  const float* weight = a.weight + group * a.width;
  const float over_width = 1.0f / static_cast<float>(a.width);
  float* grad_weight = sums + threadIdx.x / WARP * 2 * a.width;  // of this warp, a lane's own columns
  float* grad_bias = grad_weight + a.width;
  for (Size i = lane; i < a.width; i += WARP) {
    grad_weight[i] = grad_bias[i] = 0.0f;
  }
  for (Size in_group = first + threadIdx.x / WARP; in_group < end; in_group += warps) {
    const Size row = group * a.rows + in_group;
    const Sum<X, R> sum(a, row);
    const X* grad = static_cast<const X*>(a.grad) + row * a.width;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float along_one = 0.0f, along_normed = 0.0f;
    for (Size i = lane; i < a.width; i += WARP) {
      const float g = to_float(grad[i]), normed = (sum[i] - mean) * rstd;
      grad_weight[i] += g * normed;
      grad_bias[i] += g;
      along_one += g * weight[i];
      along_normed += g * weight[i] * normed;
    }
    along_one = lane_sum(along_one) * over_width;
    along_normed = lane_sum(along_normed) * over_width;
    using S = typename Promoted<X, R>::Type;
    S* grad_sum = static_cast<S*>(a.grad_sum) + row * a.width;
    for (Size i = lane; i < a.width; i += WARP) {
      const float normed = (sum[i] - mean) * rstd;
      assign(grad_sum[i], rstd * (to_float(grad[i]) * weight[i] - along_one - normed * along_normed));
    }
  }
  __syncthreads();
  float* partial = a.partial + static_cast<Size>(blockIdx.x) * 2 * a.width;
  for (Size i = threadIdx.x; i < 2 * a.width; i += blockDim.x) {
    float total = 0.0f;
    for (int warp = 0; warp < warps; ++warp) {
      total += sums[warp * 2 * a.width + i];
    }
    partial[i] = total;
  }
}

// A warp per column of a group's weight or bias.
__global__ void __launch_bounds__(NORM_WARPS* WARP) sum_partials(const __grid_constant__ Norm a) {
  const int lane = threadIdx.x % WARP;
  const Size column = static_cast<Size>(blockIdx.x) * NORM_WARPS + threadIdx.x / WARP, columns = 2 * a.width;
  if (column >= a.groups * columns) {
    return;
  }
  const Size blocks = tiles(a.rows, NORM_ROWS), group = column / columns, within = column % columns;
  float total = 0.0f;
  for (Size block = lane; block < blocks; block += WARP) {
    total += a.partial[(group * blocks + block) * columns + within];
  }
  total = lane_sum(total);
  if (lane == 0) {
    float* to = within < a.width ? a.grad_weight : a.grad_bias;
    to[group * a.width + within % a.width] = total;
  }
}

}  // namespace fastmmkd::cuda
