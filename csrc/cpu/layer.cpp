// The parts of a layer besides attention. A product is BLAS' over all rows of a group; what follows it is one pass, in
// blocks of rows, so that sums over rows depend on no number of threads.
#include "cpu/layer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "common/check.h"

#define FASTMMKD_KERNEL "cpu/layer_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t ROWS_PER_BLOCK = 64;
constexpr int64_t GRAIN = 32768;  // elements worth a thread

// body(group, begin, end, block) for blocks of rows of every group.
template <typename Body>
void each_block(int64_t groups, int64_t rows, int64_t width, const Body& body) {
  const int64_t blocks = at::divup(rows, ROWS_PER_BLOCK);
  at::parallel_for(0, groups * blocks, GRAIN / (ROWS_PER_BLOCK * width) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % blocks * ROWS_PER_BLOCK;
      body(block / blocks, first, std::min(first + ROWS_PER_BLOCK, rows), block);
    }
  });
}

// to[i] = the sum of the blocks' parts[block, i], for `count` blocks that lie `stride` apart.
void add_up(const float* parts, int64_t count, int64_t stride, int64_t width, float* to) {
  std::memset(to, 0, width * sizeof(float));
  for (int64_t block = 0; block < count; ++block, parts += stride) {
    for (int64_t i = 0; i < width; ++i) {
      to[i] += parts[i];
    }
  }
}

void clear(float* rows, int64_t begin, int64_t end, int64_t width) {
  if (begin < end) {
    std::memset(rows + begin * width, 0, (end - begin) * width * sizeof(float));
  }
}

at::Tensor of_rows(const at::Tensor& x, int64_t width) {
  return at::empty({x.size(0), x.size(1), width}, x.options());
}

Joined joined(const FeedForward& weights, const FeedForwardKept& kept, const at::Tensor& x, const Layout& layout) {
  Joined a{};
  a.groups = x.size(0);
  a.rows = x.size(1);
  a.width = a.parameter_group = x.size(2);
  a.layout = layout;
  a.bias = weights.contract_bias.const_data_ptr<float>();
  a.weight = weights.norm.const_data_ptr<float>();
  a.shift = weights.norm_bias.const_data_ptr<float>();
  a.sum = static_cast<float*>(kept.sum.data_ptr());
  a.moments = static_cast<float*>(kept.moments.data_ptr());
  return a;
}

}  // namespace

void join(const Joined& a) {
  each_block(a.groups, a.rows, a.width, [&](int64_t group, int64_t begin, int64_t end, int64_t) {
    const int64_t last = std::max(std::min(end, a.layout.end(group)), begin);
    FASTMMKD_CALL(join_block, a, group, begin, last);
    clear(a.sum + group * a.rows * a.width, last, end, a.width);
    clear(a.out[group], last, end, a.width);
    clear(a.moments + group * a.rows * 2, last, end, 2);
  });
}

void join_backward(const Joined& a) {
  const int64_t blocks = at::divup(a.rows, ROWS_PER_BLOCK), size = 3 * a.width;
  const Scratch partials(a.groups * blocks * size + 1);
  each_block(a.groups, a.rows, a.width, [&](int64_t group, int64_t begin, int64_t end, int64_t block) {
    const Scratch work(2 * a.width);
    float* partial = partials.floats() + block * size;
    std::memset(partial, 0, size * sizeof(float));
    const int64_t last = std::max(std::min(end, a.layout.end(group)), begin);
    FASTMMKD_CALL(join_block_backward, a, group, begin, last, work.floats(), partial);
    clear(a.grad_sum + group * a.rows * a.width, last, end, a.width);
  });
  for (int64_t group = 0; group < a.groups; ++group) {
    const float* parts = partials.floats() + group * blocks * size;
    for (float* to : {a.grad_bias, a.grad_weight, a.grad_shift}) {
      add_up(parts, blocks, size, a.width, to + group * a.parameter_group);
      parts += a.width;
    }
  }
}

void add_bias(const at::Tensor& x, const at::Tensor& bias, bool relu) {
  const int64_t rows = x.size(1), width = x.size(2);
  float* to = x.mutable_data_ptr<float>();
  const float* added = bias.const_data_ptr<float>();
  each_block(x.size(0), rows, width, [&](int64_t group, int64_t begin, int64_t end, int64_t) {
    float* block = to + (group * rows + begin) * width;
    FASTMMKD_CALL(add_bias_to_block, block, added + group * width, end - begin, width, relu);
  });
}

void add_bias_backward(const at::Tensor& out, const at::Tensor& grad, bool relu, const at::Tensor& grad_bias) {
  const int64_t groups = grad.size(0), rows = grad.size(1), width = grad.size(2);
  const int64_t blocks = at::divup(rows, ROWS_PER_BLOCK);
  const Scratch partials(groups * blocks * width + 1);
  const float* x = relu ? out.const_data_ptr<float>() : nullptr;
  float* to = grad.mutable_data_ptr<float>();
  each_block(groups, rows, width, [&](int64_t group, int64_t begin, int64_t end, int64_t block) {
    const int64_t first = (group * rows + begin) * width;
    float* partial = partials.floats() + block * width;
    std::memset(partial, 0, width * sizeof(float));
    FASTMMKD_CALL(add_bias_to_block_backward, x == nullptr ? nullptr : x + first, to + first, end - begin, width, relu,
                  partial);
  });
  float* sums = grad_bias.mutable_data_ptr<float>();
  for (int64_t group = 0; group < groups; ++group) {
    add_up(partials.floats() + group * blocks * width, blocks, width, width, sums + group * width);
  }
}

FeedForwardKept feed_forward(const FeedForward& weights, const at::Tensor& x, const Layout& layout, float eps,
                             const std::vector<float*>& out) {
  const int64_t width = weights.expand.size(2);
  const FeedForwardKept kept{of_rows(x, width), of_rows(x, x.size(2)), of_rows(x, 2)};
  multiply(kept.hidden, x, weights.expand);
  add_bias(kept.hidden, weights.expand_bias, true);
  multiply(kept.sum, kept.hidden, weights.contract);
  const std::vector<const float*> residual = read_groups_of(x);
  Joined a = joined(weights, kept, x, layout);
  a.eps = eps;
  a.residual = residual.data();
  a.out = out.data();
  join(a);
  return kept;
}

at::Tensor feed_forward_backward(const FeedForward& weights, const FeedForwardKept& kept, const at::Tensor& x,
                                 const Layout& layout, const std::vector<const float*>& grad, FeedForward& grads) {
  const at::Tensor grad_sum = of_rows(x, x.size(2)), grad_hidden = of_rows(x, weights.expand.size(2));
  Joined a = joined(weights, kept, x, layout);
  a.grad = grad.data();
  a.grad_sum = grad_sum.mutable_data_ptr<float>();
  a.grad_bias = grads.contract_bias.mutable_data_ptr<float>();
  a.grad_weight = grads.norm.mutable_data_ptr<float>();
  a.grad_shift = grads.norm_bias.mutable_data_ptr<float>();
  join_backward(a);
  multiply(grads.contract, turned(kept.hidden), grad_sum);
  multiply(grad_hidden, grad_sum, turned(weights.contract));
  add_bias_backward(kept.hidden, grad_hidden, true, grads.expand_bias);
  multiply(grads.expand, turned(x), grad_hidden);
  multiply_add(grad_sum, grad_hidden, turned(weights.expand));
  return grad_sum;
}

FeedForward like(const FeedForward& weights) {
  const auto empty = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
  return {empty(weights.expand),        empty(weights.expand_bias), empty(weights.contract),
          empty(weights.contract_bias), empty(weights.norm),        empty(weights.norm_bias)};
}

std::vector<float*> groups_of(const at::Tensor& x) {
  std::vector<float*> groups;
  for (int64_t group = 0; group < x.size(0); ++group) {
    groups.push_back(x.mutable_data_ptr<float>() + group * x.size(1) * x.size(2));
  }
  return groups;
}

std::vector<const float*> read_groups_of(const at::Tensor& x) {
  std::vector<const float*> groups;
  for (int64_t group = 0; group < x.size(0); ++group) {
    groups.push_back(x.const_data_ptr<float>() + group * x.size(1) * x.size(2));
  }
  return groups;
}

at::Tensor grouped(const at::Tensor& parameter, int64_t axes) {
  const at::Tensor x = parameter.to(at::kFloat).contiguous();
  int64_t groups = 1;
  for (int64_t axis = 0; axis < x.dim() - axes; ++axis) {
    groups *= x.size(axis);
  }
  std::vector<int64_t> sizes{groups};
  sizes.insert(sizes.end(), x.sizes().end() - axes, x.sizes().end());
  return x.view(sizes);
}

void multiply(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = c;
  at::cpu::bmm_out(out, a, b);
}

void multiply_add(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = c;
  at::cpu::baddbmm_(out, a, b);
}

}  // namespace fastmmkd
