// Masked multi-head attention over keys spliced from segments; float32 arithmetic. Forward and backward never hold a
// score matrix: backward computes it again from the statistics of every query's softmax. Masked keys are left out before anything else.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/shapes.h"
#include "cpu/attention.h"
#include "cpu/operations.h"

namespace fastmmkd {

constexpr float LN2 = 0.693147180559945f;

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/cross_attention_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t PAIRS = 16384;  // of a query and a key: worth a thread
constexpr int64_t OVERHEAD = 8;   // queries, and keys, that a task takes as long as besides its own

View view_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

Result result_of(const at::Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1)};
}

// Every tensor that the kernel reads, alive while it does.
struct Inputs {
  at::Tensor query, starts;
  std::vector<at::Tensor> tensors;
  std::vector<Segment> segments;
};

Attention attention_of(Inputs& inputs, const at::Tensor& query, at::TensorList keys, at::TensorList values,
                       at::TensorList key_masks, const at::Tensor& starts, at::TensorList key_starts,
                       at::IntArrayRef longest, int64_t heads) {
  check_dtype(query, "query");
  check_attention(query, keys, values, key_masks, starts, key_starts, longest, heads);
  Attention a{};
  inputs.query = with_adjacent_features(query);
  inputs.starts = starts.contiguous();
  check_starts(inputs.starts, query.size(1), longest[0], "query");
  a.query = view_of(inputs.query);
  a.groups = query.size(0);
  a.rows = query.size(1);
  a.width = query.size(2);
  a.heads = heads;
  a.scale = attention_scale(a.width, heads);
  a.half = query.scalar_type() == at::kBFloat16;
  a.layout = layout_of(inputs.starts, a.groups);
  inputs.tensors.reserve(3 * keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    const at::Tensor &key = inputs.tensors.emplace_back(with_adjacent_features(keys[i])),
                     &value = inputs.tensors.emplace_back(with_adjacent_features(values[i])),
                     &begins = inputs.tensors.emplace_back(key_starts[i].contiguous()), &mask = key_masks[i];
    check_starts(begins, key.size(1), longest[i + 1], "keys");
    const int64_t mask_groups = std::max<int64_t>(a.groups / mask.size(0), 1);
    inputs.segments.push_back({view_of(key), view_of(value), mask.const_data_ptr<bool>(), mask.stride(0),
                               mask.stride(1), mask_groups, layout_of(begins, a.groups), key.size(1), {}, {}});
    a.longest += longest[i + 1];
  }
  a.segments = inputs.segments.data();
  a.segment_count = static_cast<int64_t>(inputs.segments.size());
  return a;
}

// Appends the sums of the work of every head of every sample, [G, B, h], up to and with it.
void add_work(const Attention& a, std::vector<int64_t>& ends) {
  int64_t sum = ends.empty() ? 0 : ends.back();
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t sample = 0; sample < a.layout.samples; ++sample) {
      int64_t keys = 0;
      for (int64_t i = 0; i < a.segment_count; ++i) {
        const Segment& segment = a.segments[i];
        const int64_t* range = segment.layout.of(group, sample);
        const bool* mask = segment.mask_of(group);
        for (int64_t row = range[0]; row < range[1]; ++row) {
          keys += mask[row * segment.mask_row];
        }
      }
      const int64_t* range = a.layout.of(group, sample);
      for (int64_t head = 0; head < a.heads; ++head) {
        sum += (range[1] - range[0] + OVERHEAD) * (keys + OVERHEAD);
        ends.push_back(sum);
      }
    }
  }
}

// Tasks from `begin` up to `end` of an attention.
void run_tasks(const Attention& a, int64_t begin, int64_t end) {
  const int64_t features = a.width / a.heads;
  const int64_t room = (a.longest + 15) / 16 * 16, arrays = 4 * features + 10;  // [features or a block of queries, keys]
  const Scratch memory(arrays * room + 12 * features + 6 * a.segment_count);
  FASTMMKD_CALL(attention, a, begin, end, memory.floats());
}

// Zeros in the rows of nobody, which come last, of [G, R, `width` elements of `bytes`].
void clear_end(const Result& x, int64_t groups, int64_t rows, int64_t width, int64_t bytes, const Layout& layout) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t row = layout.end(group); row < rows; ++row) {
      std::memset(static_cast<char*>(x.data) + (group * x.group + row * x.row) * bytes, 0, width * bytes);
    }
  }
}

void clear_ends(const Attention& a) {
  const int64_t bytes = a.half ? 2 : 4;
  clear_end(a.result, a.groups, a.rows, a.width, bytes, a.layout);
  if (!a.backward) {
    const Layout of_heads{a.layout.starts, a.layout.samples, a.layout.groups * a.heads * 2};
    clear_end({a.statistics, a.rows, 1}, a.groups * a.heads * 2, a.rows, 1, sizeof(float), of_heads);
    return;
  }
  for (int64_t i = 0; i < a.segment_count; ++i) {
    const Segment& segment = a.segments[i];
    clear_end(segment.grad_key, a.groups, segment.rows, a.width, bytes, segment.layout);
    clear_end(segment.grad_value, a.groups, segment.rows, a.width, bytes, segment.layout);
  }
}

}  // namespace

float attention_scale(int64_t width, int64_t heads) {
  return static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(width / heads)));
}

Layout layout_of(const at::Tensor& starts, int64_t groups) {
  return {starts.const_data_ptr<int64_t>(), starts.size(1) - 1, std::max<int64_t>(groups / starts.size(0), 1)};
}

void attend(const std::vector<Attention>& attentions) {
  std::vector<int64_t> ends;
  for (const Attention& a : attentions) {
    add_work(a, ends);
  }
  parallel_by_work(ends, PAIRS, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Attention& a : attentions) {
      const int64_t tasks = a.groups * a.layout.samples * a.heads;
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, tasks);
      if (from < to) {
        run_tasks(a, from, to);
      }
      first += tasks;
    }
  });
  for (const Attention& a : attentions) {
    clear_ends(a);
  }
}

std::tuple<at::Tensor, at::Tensor> cross_attention(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                                                   at::TensorList key_masks, const at::Tensor& starts,
                                                   at::TensorList key_starts, at::IntArrayRef longest, int64_t heads) {
  Inputs inputs;
  Attention a = attention_of(inputs, query, keys, values, key_masks, starts, key_starts, longest, heads);
  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor statistics = at::empty({a.groups, heads, 2, a.rows}, query.options().dtype(at::kFloat));
  a.result = result_of(out);
  a.statistics = statistics.mutable_data_ptr<float>();
  attend({a});
  return {out, statistics};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> cross_attention_backward(
    const at::Tensor& grad_any, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    at::TensorList key_masks, const at::Tensor& starts, at::TensorList key_starts, at::IntArrayRef longest,
    const at::Tensor& out_any, const at::Tensor& statistics_any, int64_t heads) {
  Inputs inputs;
  Attention a = attention_of(inputs, query, keys, values, key_masks, starts, key_starts, longest, heads);
  const at::Tensor grad = with_adjacent_features(grad_any.to(query.scalar_type()));
  const at::Tensor out = with_adjacent_features(out_any);
  TORCH_CHECK(grad.sizes() == query.sizes() && out.sizes() == query.sizes(), "grad is ", grad.sizes(), ", out is ",
              out.sizes(), "; query is ", query.sizes());
  TORCH_CHECK(statistics_any.scalar_type() == at::kFloat &&
                  statistics_any.sizes() == at::IntArrayRef({a.groups, heads, 2, a.rows}),
              "statistics are ", statistics_any.sizes(), " ", statistics_any.scalar_type(), "; query is ",
              query.sizes());
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  std::vector<at::Tensor> grad_keys, grad_values;
  for (size_t i = 0; i < keys.size(); ++i) {
    grad_keys.push_back(at::empty(keys[i].sizes(), query.options()));
    grad_values.push_back(at::empty(values[i].sizes(), query.options()));
    inputs.segments[i].grad_key = result_of(grad_keys.back());
    inputs.segments[i].grad_value = result_of(grad_values.back());
  }
  const at::Tensor statistics = statistics_any.contiguous();
  a.backward = true;
  a.grad = view_of(grad);
  a.out = view_of(out);
  a.statistics = const_cast<float*>(statistics.const_data_ptr<float>());
  a.result = result_of(grad_query);
  attend({a});
  return {grad_query, grad_keys, grad_values};
}

}  // namespace fastmmkd
