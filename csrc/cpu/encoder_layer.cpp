// A transformer encoder's layer: X = LN(X + SA(X)), X = LN(X + FFN(X)); float32 arithmetic.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/attention.h"
#include "cpu/layer.h"
#include "cpu/operations.h"

namespace fastmmkd {

namespace {

enum Weight { QUERY_KEY_VALUE, OUT, OUT_BIAS, NORM, NORM_BIAS, EXPAND, EXPAND_BIAS, CONTRACT, CONTRACT_BIAS, LAST_NORM, LAST_NORM_BIAS, WEIGHTS };
enum Kept { PROJECTED, ATTENDED, STATISTICS, SUM, MOMENTS, MIDDLE, HIDDEN, LAST_SUM, LAST_MOMENTS, KEPT };

// weights: those that fastmmkd/ops/encoder_layer.py names, in its order, each [*groups, ...].
void check_encoder(const at::Tensor& x, const at::Tensor& mask, const at::Tensor& starts, at::TensorList weights,
                          int64_t heads) {
  TORCH_CHECK(x.dim() == 3 && weights.size() == 11, "x is ", x.sizes(), "; expected [G, R, d], and 11 weights, not ",
              weights.size());
  const int64_t groups = x.size(0), d = x.size(2);
  TORCH_CHECK(heads > 0 && d % heads == 0, heads, " heads do not divide the width ", d);
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.dim() == 2 && starts.size(0) > 0 && starts.size(1) > 0 &&
                  groups % starts.size(0) == 0,
              "starts are ", starts.sizes(), " ", starts.scalar_type(), "; x ", x.sizes(),
              " needs [S, B + 1] int64, S a divisor of ", groups);
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.dim() == 2 && mask.size(0) > 0 && groups % mask.size(0) == 0 &&
                  mask.size(1) == x.size(1),
              "mask is ", mask.sizes(), " ", mask.scalar_type(), "; x is ", x.sizes());
  const int64_t wide = 4 * d;
  const std::vector<std::vector<int64_t>> expected{{d, 3 * d}, {d, d}, {d}, {d}, {d}, {d, wide}, {wide}, {wide, d}, {d},
                                                   {d}, {d}};
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto axes = static_cast<int64_t>(expected[i].size());
    const at::IntArrayRef sizes = weights[i].sizes();
    TORCH_CHECK(weights[i].dim() >= axes && sizes.slice(sizes.size() - axes) == at::IntArrayRef(expected[i]) &&
                    weights[i].numel() == groups * c10::multiply_integers(expected[i]),
                "weight ", i, " is ", sizes, "; x ", x.sizes(), " needs ", groups, " of ", at::IntArrayRef(expected[i]));
  }
}

// A layer's tensors, float32 and contiguous.
struct Encoder {
  at::Tensor x, mask, starts, query_key_value, out, out_bias, norm, norm_bias;
  FeedForward feed_forward;
  int64_t groups, rows, width, heads, longest;
  Layout layout;
};

Encoder encoder_of(const at::Tensor& x, const at::Tensor& mask, const at::Tensor& starts, at::TensorList weights,
                   int64_t longest, int64_t heads) {
  check_dtype(x, "x");
  check_encoder(x, mask, starts, weights, heads);
  Encoder e;
  e.x = x.to(at::kFloat).contiguous();
  e.mask = mask;
  e.starts = starts.contiguous();
  e.groups = x.size(0);
  e.rows = x.size(1);
  e.width = x.size(2);
  e.heads = heads;
  e.longest = longest;
  check_starts(e.starts, e.rows, longest, "x");
  e.layout = layout_of(e.starts, e.groups);
  e.query_key_value = grouped(weights[QUERY_KEY_VALUE], 2);
  e.out = grouped(weights[OUT], 2);
  e.out_bias = grouped(weights[OUT_BIAS], 1);
  e.norm = grouped(weights[NORM], 1);
  e.norm_bias = grouped(weights[NORM_BIAS], 1);
  e.feed_forward = {grouped(weights[EXPAND], 2),        grouped(weights[EXPAND_BIAS], 1),
                    grouped(weights[CONTRACT], 2),      grouped(weights[CONTRACT_BIAS], 1),
                    grouped(weights[LAST_NORM], 1), grouped(weights[LAST_NORM_BIAS], 1)};
  return e;
}

// A third of the features of [G, R, 3 d]: queries, keys or values.
View third(const at::Tensor& x, int64_t which) {
  return {x.const_data_ptr<float>() + which * x.size(2) / 3, x.stride(0), x.stride(1)};
}

Result third_result(const at::Tensor& x, int64_t which) {
  return {x.mutable_data_ptr<float>() + which * x.size(2) / 3, x.stride(0), x.stride(1)};
}

Segment segment_of(const Encoder& e, const at::Tensor& projected) {
  return {third(projected, 1),
          third(projected, 2),
          e.mask.const_data_ptr<bool>(),
          e.mask.stride(0),
          e.mask.stride(1),
          std::max<int64_t>(e.groups / e.mask.size(0), 1),
          e.layout,
          e.rows,
          {},
          {}};
}

Attention attention_of(const Encoder& e, const at::Tensor& projected, const Segment& segment,
                       const at::Tensor& statistics) {
  Attention a{};
  a.groups = e.groups;
  a.rows = e.rows;
  a.width = e.width;
  a.heads = e.heads;
  a.longest = e.longest;
  a.scale = attention_scale(e.width, e.heads);
  a.layout = e.layout;
  a.query = third(projected, 0);
  a.segments = &segment;
  a.segment_count = 1;
  a.statistics = static_cast<float*>(statistics.data_ptr());
  return a;
}

Joined joined(const Encoder& e, const at::Tensor& sum, const at::Tensor& moments) {
  Joined a{};
  a.groups = e.groups;
  a.rows = e.rows;
  a.width = a.parameter_group = e.width;
  a.layout = e.layout;
  a.bias = e.out_bias.const_data_ptr<float>();
  a.weight = e.norm.const_data_ptr<float>();
  a.shift = e.norm_bias.const_data_ptr<float>();
  a.sum = static_cast<float*>(sum.data_ptr());
  a.moments = static_cast<float*>(moments.data_ptr());
  return a;
}

}  // namespace

std::tuple<at::Tensor, std::vector<at::Tensor>> encoder_layer(const at::Tensor& x, const at::Tensor& mask,
                                                              const at::Tensor& starts, at::TensorList weights,
                                                              int64_t longest, int64_t heads, double eps) {
  const Encoder e = encoder_of(x, mask, starts, weights, longest, heads);
  const auto rows = [&](int64_t width) { return at::empty({e.groups, e.rows, width}, e.x.options()); };
  const at::Tensor projected = rows(3 * e.width), attended = rows(e.width), sum = rows(e.width), moments = rows(2),
                   middle = rows(e.width), out = rows(e.width);
  const at::Tensor statistics = at::empty({e.groups, heads, 2, e.rows}, e.x.options());

  multiply(projected, e.x, e.query_key_value);
  const Segment segment = segment_of(e, projected);
  Attention attention = attention_of(e, projected, segment, statistics);
  attention.result = {attended.mutable_data_ptr(), attended.stride(0), attended.stride(1)};
  attend({attention});

  multiply(sum, attended, e.out);
  const std::vector<const float*> residual = read_groups_of(e.x);
  const std::vector<float*> to = groups_of(middle);
  Joined a = joined(e, sum, moments);
  a.eps = static_cast<float>(eps);
  a.residual = residual.data();
  a.out = to.data();
  join(a);

  const FeedForwardKept kept = feed_forward(e.feed_forward, middle, e.layout, static_cast<float>(eps), groups_of(out));
  return {out.to(x.scalar_type()),
          {projected, attended, statistics, sum, moments, middle, kept.hidden, kept.sum, kept.moments}};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> encoder_layer_backward(
    const at::Tensor& grad_any, const at::Tensor& x, const at::Tensor& mask, const at::Tensor& starts,
    at::TensorList weights, at::TensorList kept, int64_t longest, int64_t heads) {
  const Encoder e = encoder_of(x, mask, starts, weights, longest, heads);
  TORCH_CHECK(grad_any.sizes() == x.sizes() && kept.size() == KEPT, "grad is ", grad_any.sizes(), ", x is ", x.sizes(),
              ", ", kept.size(), " tensors were kept; expected ", static_cast<int64_t>(KEPT));
  const at::Tensor grad = grad_any.to(at::kFloat).contiguous();
  const auto like_weight = [&](const at::Tensor& weight) { return at::empty(weight.sizes(), weight.options()); };
  FeedForward grads = like(e.feed_forward);
  const at::Tensor grad_middle =
      feed_forward_backward(e.feed_forward, {kept[HIDDEN], kept[LAST_SUM], kept[LAST_MOMENTS]}, kept[MIDDLE], e.layout,
                            read_groups_of(grad), grads);

  const at::Tensor grad_bias = like_weight(e.out_bias), grad_norm = like_weight(e.norm),
                   grad_norm_bias = like_weight(e.norm_bias), grad_out = like_weight(e.out),
                   grad_query_key_value = like_weight(e.query_key_value);
  const at::Tensor grad_x = at::empty(e.x.sizes(), e.x.options());
  const std::vector<const float*> from = read_groups_of(grad_middle);
  Joined a = joined(e, kept[SUM], kept[MOMENTS]);
  a.grad = from.data();
  a.grad_sum = grad_x.mutable_data_ptr<float>();
  a.grad_bias = grad_bias.mutable_data_ptr<float>();
  a.grad_weight = grad_norm.mutable_data_ptr<float>();
  a.grad_shift = grad_norm_bias.mutable_data_ptr<float>();
  join_backward(a);

  const at::Tensor &projected = kept[PROJECTED], &attended = kept[ATTENDED];
  const at::Tensor grad_attended = grad_middle;  // its memory, which nobody reads any more
  multiply(grad_out, turned(attended), grad_x);
  multiply(grad_attended, grad_x, turned(e.out));
  const at::Tensor grad_projected = at::empty(projected.sizes(), projected.options());
  Segment segment = segment_of(e, projected);
  segment.grad_key = third_result(grad_projected, 1);
  segment.grad_value = third_result(grad_projected, 2);
  Attention attention = attention_of(e, projected, segment, kept[STATISTICS]);
  attention.backward = true;
  attention.grad = {grad_attended.const_data_ptr(), grad_attended.stride(0), grad_attended.stride(1)};
  attention.out = {attended.const_data_ptr(), attended.stride(0), attended.stride(1)};
  attention.result = third_result(grad_projected, 0);
  attend({attention});
  multiply(grad_query_key_value, turned(e.x), grad_projected);
  multiply_add(grad_x, grad_projected, turned(e.query_key_value));

  std::vector<at::Tensor> of_weights{grad_query_key_value, grad_out,          grad_bias,
                                     grad_norm,            grad_norm_bias,    grads.expand,
                                     grads.expand_bias,    grads.contract,    grads.contract_bias,
                                     grads.norm,           grads.norm_bias};
  for (size_t i = 0; i < of_weights.size(); ++i) {
    of_weights[i] = of_weights[i].view(weights[i].sizes()).to(weights[i].scalar_type());
  }
  return {grad_x.to(x.scalar_type()), of_weights};
}

}  // namespace fastmmkd
