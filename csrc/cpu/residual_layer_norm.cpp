// LN(x + residual) over rows [groups * rows, width] with one weight and bias per group; float32 arithmetic.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/operations.h"

namespace fastmmkd {

struct Rows {
  int64_t groups, rows, width;  // rows of one group
  bool half_x, half_residual;   // bfloat16, not float32
  const void *x, *residual;
  const float *weight, *bias;
  float eps;
  void* out;
  float *mean, *rstd;
  const void* grad;
  void* grad_sum;
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/residual_layer_norm_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t ROWS_PER_BLOCK = 64;  // of the sums over rows; fixed, so that they do not depend on the threads
constexpr int64_t GRAIN = 32768;        // elements worth a thread

Rows rows_of(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight) {
  check_dtype(x, "x");
  check_dtype(residual, "residual");
  check_norm(x, residual, weight);
  Rows a{};
  a.groups = x.size(0);
  a.width = x.size(-1);
  a.rows = rows_of_group(x);
  a.half_x = x.scalar_type() == at::kBFloat16;
  a.half_residual = residual.scalar_type() == at::kBFloat16;
  a.x = x.const_data_ptr();
  a.residual = residual.const_data_ptr();
  a.weight = weight.const_data_ptr<float>();
  return a;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x_any,
                                                                   const at::Tensor& residual_any,
                                                                   const at::Tensor& weight_any,
                                                                   const at::Tensor& bias_any, double eps) {
  const at::Tensor x = x_any.contiguous(), residual = residual_any.contiguous();
  const at::Tensor weight = weight_any.to(at::kFloat).contiguous(), bias = bias_any.to(at::kFloat).contiguous();
  Rows a = rows_of(x, residual, weight);
  TORCH_CHECK(bias.sizes() == weight.sizes(), "bias is ", bias.sizes(), "; expected ", weight.sizes());
  const at::Tensor out = at::empty(x.sizes(), x.options());
  const auto statistics = x.sizes().slice(0, x.dim() - 1);
  const at::Tensor mean = at::empty(statistics, weight.options()), rstd = at::empty(statistics, weight.options());
  a.bias = bias.const_data_ptr<float>();
  a.eps = static_cast<float>(eps);
  a.out = out.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr<float>();
  a.rstd = rstd.mutable_data_ptr<float>();
  at::parallel_for(0, a.groups * a.rows, GRAIN / std::max<int64_t>(a.width, 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch row(a.width);
    FASTMMKD_CALL(norm, a, begin, end, row.floats());
  });
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm_backward(
    const at::Tensor& grad_any, const at::Tensor& x_any, const at::Tensor& residual_any, const at::Tensor& weight_any,
    const at::Tensor& mean, const at::Tensor& rstd) {
  const at::Tensor x = x_any.contiguous(), residual = residual_any.contiguous();
  const at::Tensor grad = grad_any.to(x.scalar_type()).contiguous();
  const at::Tensor weight = weight_any.to(at::kFloat).contiguous();
  Rows a = rows_of(x, residual, weight);
  const auto dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  const at::Tensor grad_sum = at::empty(x.sizes(), x.options().dtype(dtype));
  const at::Tensor grad_weight = at::empty(weight.sizes(), weight.options());
  const at::Tensor grad_bias = at::empty(weight.sizes(), weight.options());
  const int64_t blocks = at::divup(a.rows, ROWS_PER_BLOCK);
  const at::Tensor partials = at::empty({a.groups, blocks, 2, a.width}, weight.options());
  float* partial = partials.mutable_data_ptr<float>();
  a.grad = grad.const_data_ptr();
  a.grad_sum = grad_sum.mutable_data_ptr();
  a.mean = const_cast<float*>(mean.const_data_ptr<float>());
  a.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  const int64_t grain = GRAIN / std::max<int64_t>(a.width * ROWS_PER_BLOCK, 1) + 1;
  at::parallel_for(0, a.groups * blocks, grain, [&](int64_t begin, int64_t end) {
    const Scratch row(2 * a.width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % blocks * ROWS_PER_BLOCK, offset = block / blocks * a.rows;
      FASTMMKD_CALL(differentiate, a, offset + first, offset + std::min(first + ROWS_PER_BLOCK, a.rows), row.floats(),
                    partial + block * 2 * a.width);
    }
  });
  float* weights = grad_weight.mutable_data_ptr<float>();
  float* biases = grad_bias.mutable_data_ptr<float>();
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t i = 0; i < a.width; ++i) {
      weights[group * a.width + i] = biases[group * a.width + i] = 0.0f;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const float* part = partial + (group * blocks + block) * 2 * a.width;
      for (int64_t i = 0; i < a.width; ++i) {
        weights[group * a.width + i] += part[i];
        biases[group * a.width + i] += part[a.width + i];
      }
    }
  }
  const auto of_parameters = weight_any.scalar_type();
  return {grad_sum, grad_weight.to(of_parameters), grad_bias.to(of_parameters)};
}

}  // namespace fastmmkd
