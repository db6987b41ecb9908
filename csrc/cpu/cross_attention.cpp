// Masked multi-head attention over keys spliced from segments; float32 arithmetic. Forward and backward never hold a
// score matrix: backward computes it again from the statistics of every query's softmax. Masked keys are left out before anything else.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/operations.h"

namespace fastmmkd {

constexpr float LN2 = 0.693147180559945f;

struct View {  // [G, B, T, d] (masks: [G, B, T]), adjacent features, other strides in elements
  const void* data;
  int64_t group, row, frame;
};

struct Segment {
  View key, value, mask;
  int64_t length;
  void *grad_key, *grad_value;  // contiguous
};

struct Attention {
  int64_t batch, queries, width, heads, longest;  // longest: keys of all segments together
  float scale;                                    // log2(e) / sqrt(head width)
  bool half, backward;                            // half: bfloat16, not float32
  View query, grad, out;
  const Segment* segments;
  int64_t segment_count;
  float* statistics;  // [G, B, h, 2, T]: a query's largest score, in units of ln 2, and 1 / the sum of its softmax
  void* result;       // out or, backward, the query's gradient; contiguous
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/cross_attention_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t PAIRS = 16384;  // of a query and a key: worth a thread

View view_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Every tensor that the kernel reads, alive while it does.
struct Inputs {
  at::Tensor query;
  std::vector<at::Tensor> tensors;
  std::vector<Segment> segments;
};

Attention attention_of(Inputs& inputs, const at::Tensor& query, at::TensorList keys, at::TensorList values,
                       at::TensorList key_masks, int64_t heads) {
  check_dtype(query, "query");
  check_attention(query, keys, values, key_masks, heads);
  Attention a{};
  inputs.query = with_adjacent_features(query);
  a.query = view_of(inputs.query);
  a.batch = query.size(1);
  a.queries = query.size(2);
  a.width = query.size(3);
  a.heads = heads;
  a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(a.width / heads)));
  a.half = query.scalar_type() == at::kBFloat16;
  inputs.tensors.reserve(2 * keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    inputs.tensors.push_back(with_adjacent_features(keys[i]));
    inputs.tensors.push_back(with_adjacent_features(values[i]));
    const at::Tensor& mask = key_masks[i];
    const auto last = inputs.tensors.end();
    inputs.segments.push_back({view_of(last[-2]), view_of(last[-1]), view_of(mask), mask.size(2), nullptr, nullptr});
    a.longest += mask.size(2);
  }
  a.segments = inputs.segments.data();
  a.segment_count = static_cast<int64_t>(inputs.segments.size());
  return a;
}

void run(const Attention& a, int64_t groups) {
  const int64_t features = std::max<int64_t>(a.width / a.heads, 4) + 4;  // filled up
  const int64_t room = (a.longest + 15) / 16 * 16, arrays = 4 * features + 2;
  const int64_t grain = PAIRS / (a.queries * a.longest + 1) + 1;
  at::parallel_for(0, groups * a.batch * a.heads, grain, [&](int64_t begin, int64_t end) {
    const Scratch memory(arrays * room + 20 * (features + 32) + 2 * a.segment_count);
    FASTMMKD_CALL(attention, a, begin, end, memory.floats());
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> cross_attention(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                                                   at::TensorList key_masks, int64_t heads) {
  Inputs inputs;
  Attention a = attention_of(inputs, query, keys, values, key_masks, heads);
  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor statistics =
      at::empty({query.size(0), a.batch, heads, 2, a.queries}, query.options().dtype(at::kFloat));
  a.result = out.mutable_data_ptr();
  a.statistics = statistics.mutable_data_ptr<float>();
  run(a, query.size(0));
  return {out, statistics};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> cross_attention_backward(
    const at::Tensor& grad_any, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    at::TensorList key_masks, const at::Tensor& out_any, const at::Tensor& statistics_any, int64_t heads) {
  Inputs inputs;
  Attention a = attention_of(inputs, query, keys, values, key_masks, heads);
  const at::Tensor grad = with_adjacent_features(grad_any.to(query.scalar_type()));
  const at::Tensor out = with_adjacent_features(out_any);
  TORCH_CHECK(grad.sizes() == query.sizes() && out.sizes() == query.sizes(), "grad is ", grad.sizes(), ", out is ",
              out.sizes(), "; query is ", query.sizes());
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  std::vector<at::Tensor> grad_keys, grad_values;
  for (size_t i = 0; i < keys.size(); ++i) {
    grad_keys.push_back(at::empty(keys[i].sizes(), query.options()));
    grad_values.push_back(at::empty(values[i].sizes(), query.options()));
    inputs.segments[i].grad_key = grad_keys.back().mutable_data_ptr();
    inputs.segments[i].grad_value = grad_values.back().mutable_data_ptr();
  }
  const at::Tensor statistics = statistics_any.contiguous();
  a.backward = true;
  a.grad = view_of(grad);
  a.out = view_of(out);
  a.statistics = const_cast<float*>(statistics.const_data_ptr<float>());
  a.result = grad_query.mutable_data_ptr();
  run(a, query.size(0));
  return {grad_query, grad_keys, grad_values};
}

}  // namespace fastmmkd
