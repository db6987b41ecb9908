// UMDF eqs. 4 and 5, a vector of rows at a time, from logits to gradients in one pass.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "cpu/operations.h"

namespace fastmmkd {

// The two distributions of a group.
struct Divergence {
  int64_t classes;
  float scale;             // of the gradient
  const float* logits[2];  // [rows, classes]
  float* gradient[2];      // the same, or nothing
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/js_divergence_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t ROWS_PER_BLOCK = 64;  // of the sum over rows
constexpr int64_t WIDEST = 16;          // lanes

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> js_divergence(const at::Tensor& a_any, const at::Tensor& b_any,
                                                             std::array<bool, 2> wanted) {
  check_dtype(a_any, "logits_a");
  check_dtype(b_any, "logits_b");
  TORCH_CHECK(a_any.dim() == 3 && a_any.sizes() == b_any.sizes(), "logits are ", a_any.sizes(), " and ", b_any.sizes(),
              "; expected [G, N, K] twice");
  const at::Tensor logits[2] = {a_any.to(at::kFloat).contiguous(), b_any.to(at::kFloat).contiguous()};
  const at::Tensor gradients[2] = {
      wanted[0] ? at::empty_like(logits[0]) : at::empty({0}, logits[0].options()),
      wanted[1] ? at::empty_like(logits[1]) : at::empty({0}, logits[1].options()),
  };
  const int64_t groups = a_any.size(0), rows = a_any.size(1), classes = a_any.size(2);
  const int64_t blocks = at::divup(rows, ROWS_PER_BLOCK);
  const at::Tensor loss = at::empty({groups}, logits[0].options());
  std::vector<double> sums(groups * blocks);
  const int64_t grain = 8192 / std::max<int64_t>(ROWS_PER_BLOCK * classes, 1) + 1;
  at::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
    const Scratch work(4 * classes * WIDEST);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, first = i % blocks * ROWS_PER_BLOCK;
      Divergence a{};
      a.classes = classes;
      a.scale = static_cast<float>(0.5 / double(rows));
      for (int side = 0; side < 2; ++side) {
        a.logits[side] = logits[side].const_data_ptr<float>() + group * rows * classes;
        a.gradient[side] = wanted[side] ? gradients[side].mutable_data_ptr<float>() + group * rows * classes : nullptr;
      }
      sums[i] = FASTMMKD_CALL(diverge_rows, a, first, std::min(first + ROWS_PER_BLOCK, rows), work.floats());
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      total += sums[group * blocks + block];
    }
    loss.mutable_data_ptr<float>()[group] = static_cast<float>(0.5 * total / double(rows));
  }
  return {loss, gradients[0], gradients[1]};
}

}  // namespace fastmmkd
