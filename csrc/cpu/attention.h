// Masked attention over rows, for the operations that contain it; cross_attention.cpp has it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastmmkd {

struct View {  // [G, R, d], adjacent features, other strides in elements
  const void* data;
  int64_t group, row;
};

struct Result {  // the same, to be written
  void* data;
  int64_t group, row;
};

struct Layout {  // of R rows: sample b of model s has those from starts[s, b] up to starts[s, b + 1]
  const int64_t* starts;
  int64_t samples, groups;  // B; groups that follow each other and are a model's

  const int64_t* of(int64_t group, int64_t sample) const { return starts + group / groups * (samples + 1) + sample; }
  int64_t end(int64_t group) const { return *of(group, samples); }
};

struct Segment {
  View key, value;
  const bool* mask;
  int64_t mask_group, mask_row, mask_groups;  // strides; groups that follow each other and share a mask
  Layout layout;
  int64_t rows;
  Result grad_key, grad_value;

  const bool* mask_of(int64_t group) const { return mask + group / mask_groups * mask_group; }
};

struct Attention {
  int64_t groups, rows, width, heads, longest;  // longest: keys of a sample in all segments together, at most
  float scale;                                  // log2(e) / sqrt(head width)
  bool half, backward;                          // half: bfloat16, not float32
  Layout layout;                                // of queries
  View query, grad, out;
  const Segment* segments;
  int64_t segment_count;
  float* statistics;  // [G, h, 2, R]: a query's largest score, in units of ln 2, and 1 / the sum of its softmax
  Result result;      // out or, backward, the query's gradient
};

// log2(e) / sqrt(d / heads)
float attention_scale(int64_t width, int64_t heads);
Layout layout_of(const at::Tensor& starts, int64_t groups);
// All of them together, divided among the threads.
void attend(const std::vector<Attention>& attentions);

}  // namespace fastmmkd
