// CorrKD eq. 6 over pairs of rows: scores, log-sigmoids and gradients of a tile at a time, so that neither the hidden
// units [N, N, h] nor the scores are ever in memory. The gradient of `right` is a second pass with the sides exchanged.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>

#include "cpu/operations.h"
#include "cpu/pairs.h"

namespace fastmmkd {

// One side's rows of a group against the other's.
struct BoundPairs {
  int64_t count, width, stride;
  float bias, joint_weight, marginal_weight;
  const float *weight, *rows, *other_rows, *panels;
  double* terms;       // [rows, 3]: sums of the joint and marginal terms, and of the gradient in the scores
  float* grad_rows;    // [rows, width] or nothing
  float* grad_weight;  // [tiles, width] or nothing
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/jsd_mutual_information_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> jsd_mutual_information(
    const at::Tensor& left_any, const at::Tensor& right_any, const at::Tensor& weight_any, const at::Tensor& bias_any,
    std::array<bool, 4> wanted) {
  check_dtype(left_any, "left");
  check_dtype(right_any, "right");
  TORCH_CHECK(left_any.dim() == 3 && left_any.sizes() == right_any.sizes() && weight_any.dim() == 2 &&
                  weight_any.size(0) == left_any.size(0) && weight_any.size(1) == left_any.size(2) &&
                  bias_any.dim() == 1 && bias_any.size(0) == left_any.size(0),
              "left is ", left_any.sizes(), ", right is ", right_any.sizes(), ", weight is ", weight_any.sizes(),
              ", bias is ", bias_any.sizes(), "; expected [G, N, h] twice, [G, h] and [G]");
  const Side left(left_any, wanted[1]), right(right_any, true);
  const at::Tensor weight = weight_any.to(at::kFloat).contiguous(), bias = bias_any.to(at::kFloat).contiguous();
  const int64_t groups = left.groups, count = left.count, width = left.width, tiles = at::divup(count, TILE);
  const at::Tensor loss = at::empty({groups}, weight.options());
  const at::Tensor grad_left = gradient_of(left_any, wanted[0]), grad_right = gradient_of(right_any, wanted[1]);
  const at::Tensor grad_weight = gradient_of(weight_any, wanted[2]), grad_bias = gradient_of(bias_any, wanted[3]);
  const double pairs = std::max<double>(double(count) * double(count - 1), 1.0);

  const auto pass = [&](const Side& side, const Side& other, double* terms, float* grad_rows, float* grad_weights) {
    for_chunks(side, count, side.stride + side.stride / TILE,
               [&](int64_t group, int64_t begin, int64_t end, float* work) {
                 BoundPairs a{};
                 a.count = count;
                 a.width = width;
                 a.stride = side.stride;
                 a.bias = bias.const_data_ptr<float>()[group];
                 a.joint_weight = static_cast<float>(1.0 / double(count));
                 a.marginal_weight = static_cast<float>(1.0 / pairs);
                 a.weight = weight.const_data_ptr<float>() + group * width;
                 a.rows = side.rows(group);
                 a.other_rows = other.rows(group);
                 a.panels = other.panels(group);
                 a.terms = terms + group * count * 3;
                 a.grad_rows = grad_rows ? grad_rows + group * count * width : nullptr;
                 a.grad_weight = grad_weights ? grad_weights + group * tiles * width : nullptr;
                 FASTMMKD_CALL(bound_rows, a, begin, end, work);
               });
  };
  const Scratch of_rows(2 * groups * count * 3), of_tiles(wanted[2] ? groups * tiles * width : 0);
  double* terms = reinterpret_cast<double*>(of_rows.floats());
  if (wanted[1]) {
    pass(right, left, terms, grad_right.mutable_data_ptr<float>(), nullptr);
  }
  pass(left, right, terms, wanted[0] ? grad_left.mutable_data_ptr<float>() : nullptr,
       wanted[2] ? of_tiles.floats() : nullptr);
  for (int64_t group = 0; group < groups; ++group) {
    double joint = 0.0, marginal = 0.0, gradient = 0.0;
    for (int64_t row = 0; row < count; ++row) {
      const double* of_row = terms + (group * count + row) * 3;
      joint += of_row[0];
      marginal += of_row[1];
      gradient += of_row[2];
    }
    loss.mutable_data_ptr<float>()[group] = static_cast<float>(joint / double(count) - marginal / pairs);
    if (wanted[3]) {
      grad_bias.mutable_data_ptr<float>()[group] = static_cast<float>(gradient);
    }
    for (int64_t k = 0; wanted[2] && k < width; ++k) {
      double total = 0.0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        total += of_tiles.floats()[(group * tiles + tile) * width + k];
      }
      grad_weight.mutable_data_ptr<float>()[group * width + k] = static_cast<float>(total);
    }
  }
  return {loss, grad_left, grad_right, grad_weight, grad_bias};
}

}  // namespace fastmmkd
