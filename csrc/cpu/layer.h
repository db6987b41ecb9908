// What the operations that are a whole layer are made of; float32, rows [G, R, d] of a layout.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/attention.h"

namespace fastmmkd {

// LN(product + bias + residual), of a product [G, R, d]. Rows of nobody are 0, and their gradients too.
struct Joined {
  int64_t groups, rows, width;
  Layout layout;
  float eps;
  int64_t parameter_group;             // stride of the parameters and their gradients, [G, d] with adjacent features
  const float *bias, *weight, *shift;  // of the product; the affine map
  const float* const* residual;        // [R, d] of each group
  float* sum;                          // [G, R, d], in forward the product at first
  float* moments;                      // [G, R, 2]: mean and 1 / deviation
  float* const* out;                   // [R, d] of each group
  const float* const* grad;            // of out
  float* grad_sum;                     // [G, R, d]: the gradient of the product, and of the residual
  float *grad_bias, *grad_weight, *grad_shift;
};

void join(const Joined& a);
void join_backward(const Joined& a);

// `LN(X + W_2 relu(W_1 X + b_1) + b_2)`, all of it [G, ...] and contiguous.
struct FeedForward {
  at::Tensor expand, expand_bias, contract, contract_bias, norm, norm_bias;
};

// What forward keeps for backward.
struct FeedForwardKept {
  at::Tensor hidden, sum, moments;
};

FeedForwardKept feed_forward(const FeedForward& weights, const at::Tensor& x, const Layout& layout, float eps,
                             const std::vector<float*>& out);
// The gradient of x; into `grads` those of the weights.
at::Tensor feed_forward_backward(const FeedForward& weights, const FeedForwardKept& kept, const at::Tensor& x,
                                 const Layout& layout, const std::vector<const float*>& grad, FeedForward& grads);
FeedForward like(const FeedForward& weights);

// x = x + bias, or relu of it, [G, R, n] and [G, n].
void add_bias(const at::Tensor& x, const at::Tensor& bias, bool relu);
// From the gradient of `out`, what that was, that of the bias; `relu`: and, in place, that of the sum.
void add_bias_backward(const at::Tensor& out, const at::Tensor& grad, bool relu, const at::Tensor& grad_bias);

// The groups of [G, R, d], contiguous.
std::vector<float*> groups_of(const at::Tensor& x);
std::vector<const float*> read_groups_of(const at::Tensor& x);

// A parameter [*groups, ...] as float32 [G, ...], its last `axes` axes kept.
at::Tensor grouped(const at::Tensor& parameter, int64_t axes);

// c = a b, or c += a b: [G, n, k], [G, k, m], [G, n, m].
void multiply(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b);
void multiply_add(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b);
inline at::Tensor turned(const at::Tensor& x) {
  return x.transpose(1, 2);
}

}  // namespace fastmmkd
