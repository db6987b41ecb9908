// A layer of multi-grained crossmodal interaction over streams that share a layout; float32 arithmetic.
//
// Everything that a modality's stream is multiplied by lies side by side, [S, d, 15 d]: per target keys and values of the
// coarse attention, then those of the fine attentions of its own target, then those of the two fine attentions of other
// targets that it is a source of, and its coarse queries. So a product per modality makes all of it, and one each way
// back; attention reads columns.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/attention.h"
#include "cpu/layer.h"
#include "cpu/operations.h"

namespace fastmmkd {

namespace {

enum Weight { QUERY, KEY_VALUE, OUT, OUT_BIAS, NORM, NORM_BIAS, EXPAND, EXPAND_BIAS, CONTRACT, CONTRACT_BIAS, LAST_NORM,
              LAST_NORM_BIAS, WEIGHTS };
enum Kept { PROJECTED, COARSE_ATTENDED, COARSE_SUM, COARSE_MOMENTS, COARSE, FINE_QUERY, FINE_ATTENDED, FINE_SUM,
            FINE_MOMENTS, STATISTICS, MIDDLE, HIDDEN, LAST_SUM, LAST_MOMENTS, KEPT };

constexpr int64_t TARGETS = 3, BLOCKS = 3, FINE = 2, COLUMNS = 15, QUERY_COLUMN = 14;
constexpr int64_t OTHERS[TARGETS][FINE] = {{1, 2}, {0, 2}, {0, 1}};

struct Use {  // of a modality's stream, as keys and values of an attention
  int64_t target, block, column;
};

int64_t coarse_column(int64_t target) {
  return 2 * target;
}

int64_t own_column(int64_t fine) {
  return 6 + 2 * fine;
}

// Where modality OTHERS[target][fine] has the keys of that attention: the first or the second of the other targets.
int64_t other_column(int64_t target, int64_t fine) {
  const int64_t source = OTHERS[target][fine];
  return 10 + 2 * (OTHERS[source][0] == target ? 0 : 1);
}

std::vector<Use> uses_of(int64_t source) {
  std::vector<Use> uses;
  for (int64_t target = 0; target < TARGETS; ++target) {
    uses.push_back({target, 0, coarse_column(target)});
    for (int64_t fine = 0; fine < FINE; ++fine) {
      if (target == source) {
        uses.push_back({target, 1 + fine, own_column(fine)});
      } else if (OTHERS[target][fine] == source) {
        uses.push_back({target, 1 + fine, other_column(target, fine)});
      }
    }
  }
  return uses;
}

// A layer's tensors, float32 and contiguous: groups are (model, target).
struct Crossmodal {
  std::vector<at::Tensor> streams, masks;
  at::Tensor starts, query, key_value, out, out_bias, norm, norm_bias;
  FeedForward feed_forward;
  int64_t models, rows, width, heads, longest;
  Layout layout, of_models;

  int64_t groups() const { return models * TARGETS; }
  at::Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, streams[0].options()); }
  at::Tensor of_rows(int64_t columns) const { return empty({groups(), rows, columns}); }
  at::Tensor of_fine(int64_t columns) const { return empty({FINE, groups(), rows, columns}); }
};

void check_crossmodal(at::TensorList streams, at::TensorList masks, const at::Tensor& starts, at::TensorList weights,
                      int64_t heads) {
  TORCH_CHECK(streams.size() == TARGETS && masks.size() == TARGETS && weights.size() == WEIGHTS, streams.size(),
              " streams, ", masks.size(), " masks and ", weights.size(), " weights; expected 3, 3 and ",
              static_cast<int64_t>(WEIGHTS));
  TORCH_CHECK(streams[0].dim() == 3, "streams are ", streams[0].sizes(), "; expected [S, R, d]");
  const int64_t models = streams[0].size(0), d = streams[0].size(2), wide = 4 * d;
  TORCH_CHECK(heads > 0 && d % heads == 0, heads, " heads do not divide the width ", d);
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.dim() == 2 && starts.size(0) > 0 && starts.size(1) > 0 &&
                  models % starts.size(0) == 0,
              "starts are ", starts.sizes(), " ", starts.scalar_type(), "; streams ", streams[0].sizes(),
              " need [S, B + 1] int64");
  for (int64_t m = 0; m < TARGETS; ++m) {
    TORCH_CHECK(streams[m].sizes() == streams[0].sizes() && streams[m].scalar_type() == streams[0].scalar_type(),
                "stream ", m, " is ", streams[m].sizes(), " ", streams[m].scalar_type(), ", the first is ",
                streams[0].sizes(), " ", streams[0].scalar_type());
    const at::Tensor& mask = masks[m];
    TORCH_CHECK(mask.scalar_type() == at::kBool && mask.dim() == 2 && mask.size(0) == models &&
                    models % mask.size(0) == 0 && mask.size(1) == streams[0].size(1),
                "mask ", m, " is ", mask.sizes(), " ", mask.scalar_type(), "; streams are ", streams[0].sizes());
  }
  const int64_t attentions = models * TARGETS * BLOCKS, targets = models * TARGETS;
  const std::vector<std::vector<int64_t>> expected{
      {attentions, d, d}, {attentions, d, 2 * d}, {attentions, d, d}, {attentions, d}, {attentions, d}, {attentions, d},
      {targets, d, wide}, {targets, wide},        {targets, wide, d}, {targets, d},    {targets, d},    {targets, d}};
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::IntArrayRef sizes = weights[i].sizes(), of_group = at::IntArrayRef(expected[i]).slice(1);
    TORCH_CHECK(sizes.size() >= of_group.size() && sizes.slice(sizes.size() - of_group.size()) == of_group &&
                    weights[i].numel() == c10::multiply_integers(expected[i]),
                "weight ", i, " is ", sizes, "; streams ", streams[0].sizes(), " need ", at::IntArrayRef(expected[i]));
  }
}

Crossmodal crossmodal_of(at::TensorList streams, at::TensorList masks, const at::Tensor& starts,
                         at::TensorList weights, int64_t longest, int64_t heads) {
  check_crossmodal(streams, masks, starts, weights, heads);
  check_dtype(streams[0], "streams");
  Crossmodal c;
  for (int64_t m = 0; m < TARGETS; ++m) {
    c.streams.push_back(streams[m].to(at::kFloat).contiguous());
    c.masks.push_back(masks[m]);
  }
  c.starts = starts.contiguous();
  c.models = streams[0].size(0);
  c.rows = streams[0].size(1);
  c.width = streams[0].size(2);
  c.heads = heads;
  c.longest = longest;
  check_starts(c.starts, c.rows, longest, "streams");
  c.layout = layout_of(c.starts, c.groups());
  c.of_models = layout_of(c.starts, c.models);
  const auto of_blocks = [&](int which, int64_t axes) {  // [G, 3, ...]
    return grouped(weights[which], axes).unflatten(0, {c.groups(), BLOCKS});
  };
  c.query = of_blocks(QUERY, 2);
  c.key_value = of_blocks(KEY_VALUE, 2);
  c.out = of_blocks(OUT, 2);
  c.out_bias = of_blocks(OUT_BIAS, 1);
  c.norm = of_blocks(NORM, 1);
  c.norm_bias = of_blocks(NORM_BIAS, 1);
  c.feed_forward = {grouped(weights[EXPAND], 2),        grouped(weights[EXPAND_BIAS], 1),
                    grouped(weights[CONTRACT], 2),      grouped(weights[CONTRACT_BIAS], 1),
                    grouped(weights[LAST_NORM], 1), grouped(weights[LAST_NORM_BIAS], 1)};
  return c;
}

// What a modality's stream is multiplied by, [S, d, 15 d].
at::Tensor packed(const Crossmodal& c, int64_t source) {
  const int64_t d = c.width;
  const at::Tensor together = c.empty({c.models, d, COLUMNS * d});
  const at::Tensor key_value = c.key_value.unflatten(0, {c.models, TARGETS});
  for (const Use& use : uses_of(source)) {
    together.narrow(2, use.column * d, 2 * d).copy_(key_value.select(1, use.target).select(1, use.block));
  }
  const at::Tensor query = c.query.unflatten(0, {c.models, TARGETS});
  together.narrow(2, QUERY_COLUMN * d, d).copy_(query.select(1, source).select(1, 0));
  return together;
}

// Columns of a modality's [S, R, 15 d].
template <typename V>
V columns(const Crossmodal& c, const at::Tensor& projected, int64_t source, int64_t column) {
  const int64_t row = COLUMNS * c.width, group = c.rows * row;
  return {static_cast<float*>(projected.data_ptr()) + source * c.models * group + column * c.width, group, row};
}

// The rows of a target in [S * 3, R, d].
template <typename V>
V target_of(const Crossmodal& c, float* data, int64_t target) {
  const int64_t size = c.rows * c.width;
  return {data + target * size, TARGETS * size, c.width};
}

struct Source {  // of an attention's keys and values
  int64_t modality, column;
};

// The attentions of a part, coarse (3) or fine (6), and their segments.
struct Attentions {
  std::vector<std::array<Segment, TARGETS>> segments;
  std::vector<Attention> of;
};

void add_attention(const Crossmodal& c, const at::Tensor& projected, const at::Tensor* grad_projected,
                   const std::vector<Source>& sources, float* statistics, Attentions& attentions) {
  std::array<Segment, TARGETS>& segments = attentions.segments.emplace_back();
  for (size_t i = 0; i < sources.size(); ++i) {
    const auto& [modality, column] = sources[i];
    const at::Tensor& mask = c.masks[modality];
    segments[i] = {columns<View>(c, projected, modality, column),
                   columns<View>(c, projected, modality, column + 1),
                   mask.const_data_ptr<bool>(),
                   mask.stride(0),
                   mask.stride(1),
                   c.models / mask.size(0),
                   c.of_models,
                   c.rows,
                   {},
                   {}};
    if (grad_projected != nullptr) {
      segments[i].grad_key = columns<Result>(c, *grad_projected, modality, column);
      segments[i].grad_value = columns<Result>(c, *grad_projected, modality, column + 1);
    }
  }
  Attention& a = attentions.of.emplace_back();
  a.groups = c.models;
  a.rows = c.rows;
  a.width = c.width;
  a.heads = c.heads;
  a.longest = c.longest * static_cast<int64_t>(sources.size());
  a.scale = attention_scale(c.width, c.heads);
  a.backward = grad_projected != nullptr;
  a.layout = c.of_models;
  a.segment_count = static_cast<int64_t>(sources.size());
  a.statistics = statistics;
}

Attentions attentions_of(const Crossmodal& c, bool fine, const at::Tensor& projected,
                         const at::Tensor* grad_projected, const at::Tensor& statistics) {
  Attentions attentions;
  const int64_t size = c.models * c.heads * 2 * c.rows;
  float* of_attention = static_cast<float*>(statistics.data_ptr()) + (fine ? TARGETS * size : 0);
  for (int64_t j = 0; j < (fine ? FINE : 1); ++j) {
    for (int64_t target = 0; target < TARGETS; ++target, of_attention += size) {
      std::vector<Source> sources;
      if (fine) {
        sources = {{target, own_column(j)}, {OTHERS[target][j], other_column(target, j)}};
      } else {
        for (int64_t source = 0; source < TARGETS; ++source) {
          sources.push_back({source, coarse_column(target)});
        }
      }
      add_attention(c, projected, grad_projected, sources, of_attention, attentions);
    }
  }
  for (size_t i = 0; i < attentions.of.size(); ++i) {
    attentions.of[i].segments = attentions.segments[i].data();
  }
  return attentions;
}

// LN(out(attended) + residual) of one block of every target.
Joined joined(const Crossmodal& c, int64_t block, float* sum, float* moments) {
  Joined a{};
  a.groups = c.groups();
  a.rows = c.rows;
  a.width = c.width;
  a.layout = c.layout;
  a.parameter_group = BLOCKS * c.width;
  a.bias = c.out_bias.const_data_ptr<float>() + block * c.width;
  a.weight = c.norm.const_data_ptr<float>() + block * c.width;
  a.shift = c.norm_bias.const_data_ptr<float>() + block * c.width;
  a.sum = sum;
  a.moments = moments;
  return a;
}

// [S, R, d] of each target as the groups (model, target).
template <typename T>
std::vector<T*> groups_of_targets(const Crossmodal& c, at::TensorList of_targets) {
  std::vector<T*> groups;
  for (int64_t model = 0; model < c.models; ++model) {
    for (const at::Tensor& x : of_targets) {
      groups.push_back(static_cast<float*>(x.data_ptr()) + model * c.rows * c.width);
    }
  }
  return groups;
}

float* data(const at::Tensor& x, int64_t part = 0) {
  return static_cast<float*>(x.data_ptr()) + part * x.stride(0);
}

}  // namespace

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> crossmodal_layer(
    at::TensorList streams, at::TensorList masks, const at::Tensor& starts, at::TensorList weights, int64_t longest,
    int64_t heads, double eps_any) {
  const Crossmodal c = crossmodal_of(streams, masks, starts, weights, longest, heads);
  const int64_t d = c.width;
  const auto eps = static_cast<float>(eps_any);
  const at::Tensor projected = c.empty({TARGETS, c.models, c.rows, COLUMNS * d});
  for (int64_t m = 0; m < TARGETS; ++m) {
    multiply(projected.select(0, m), c.streams[m], packed(c, m));
  }
  const at::Tensor statistics = c.empty({TARGETS * BLOCKS, c.models, heads, 2, c.rows});

  const at::Tensor coarse_attended = c.of_rows(d), coarse_sum = c.of_rows(d), coarse_moments = c.of_rows(2),
                   coarse = c.of_rows(d);
  Attentions attentions = attentions_of(c, false, projected, nullptr, statistics);
  for (int64_t target = 0; target < TARGETS; ++target) {
    attentions.of[target].query = columns<View>(c, projected, target, QUERY_COLUMN);
    attentions.of[target].result = target_of<Result>(c, data(coarse_attended), target);
  }
  attend(attentions.of);
  multiply(coarse_sum, coarse_attended, c.out.select(1, 0));
  const std::vector<const float*> residual = groups_of_targets<const float>(c, c.streams);
  const std::vector<float*> to = groups_of(coarse);
  Joined a = joined(c, 0, data(coarse_sum), data(coarse_moments));
  a.eps = eps;
  a.residual = residual.data();
  a.out = to.data();
  join(a);

  const at::Tensor fine_query = c.of_fine(d), fine_attended = c.of_fine(d), fine_sum = c.of_fine(d),
                   fine_moments = c.of_fine(2), fine = c.of_fine(d);
  attentions = attentions_of(c, true, projected, nullptr, statistics);
  for (int64_t j = 0; j < FINE; ++j) {
    multiply(fine_query.select(0, j), coarse, c.query.select(1, 1 + j));
    for (int64_t target = 0; target < TARGETS; ++target) {
      Attention& attention = attentions.of[j * TARGETS + target];
      attention.query = target_of<View>(c, data(fine_query, j), target);
      attention.result = target_of<Result>(c, data(fine_attended, j), target);
    }
  }
  attend(attentions.of);
  const std::vector<const float*> of_coarse = read_groups_of(coarse);
  for (int64_t j = 0; j < FINE; ++j) {
    multiply(fine_sum.select(0, j), fine_attended.select(0, j), c.out.select(1, 1 + j));
    const std::vector<float*> to_fine = groups_of(fine.select(0, j));
    a = joined(c, 1 + j, data(fine_sum, j), data(fine_moments, j));
    a.eps = eps;
    a.residual = of_coarse.data();
    a.out = to_fine.data();
    join(a);
  }
  const at::Tensor middle = fine.select(0, 0).add(fine.select(0, 1));

  std::vector<at::Tensor> out;
  for (int64_t target = 0; target < TARGETS; ++target) {
    out.push_back(c.empty({c.models, c.rows, d}));
  }
  const FeedForwardKept kept = feed_forward(c.feed_forward, middle, c.layout, eps, groups_of_targets<float>(c, out));
  for (at::Tensor& x : out) {
    x = x.to(streams[0].scalar_type());
  }
  return {out,
          {projected, coarse_attended, coarse_sum, coarse_moments, coarse, fine_query, fine_attended, fine_sum,
           fine_moments, statistics, middle, kept.hidden, kept.sum, kept.moments}};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> crossmodal_layer_backward(
    at::TensorList grads_any, at::TensorList streams, at::TensorList masks, const at::Tensor& starts,
    at::TensorList weights, at::TensorList kept, int64_t longest, int64_t heads) {
  const Crossmodal c = crossmodal_of(streams, masks, starts, weights, longest, heads);
  TORCH_CHECK(grads_any.size() == TARGETS && kept.size() == KEPT, grads_any.size(), " gradients, ", kept.size(),
              " tensors kept; expected 3 and ", static_cast<int64_t>(KEPT));
  std::vector<at::Tensor> grads;
  for (const at::Tensor& grad : grads_any) {
    TORCH_CHECK(grad.sizes() == streams[0].sizes(), "grad is ", grad.sizes(), ", streams are ", streams[0].sizes());
    grads.push_back(grad.to(at::kFloat).contiguous());
  }
  const int64_t d = c.width;
  const auto like_weight = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const at::Tensor grad_query = like_weight(c.query), grad_out = like_weight(c.out),
                   grad_out_bias = like_weight(c.out_bias), grad_norm = like_weight(c.norm),
                   grad_norm_bias = like_weight(c.norm_bias);
  FeedForward grad_feed_forward = like(c.feed_forward);
  const auto join_backward_of = [&](Joined a, int64_t block, const at::Tensor& from, float* to) {
    const std::vector<const float*> grad = read_groups_of(from);
    a.grad = grad.data();
    a.grad_sum = to;
    a.grad_bias = data(grad_out_bias) + block * d;
    a.grad_weight = data(grad_norm) + block * d;
    a.grad_shift = data(grad_norm_bias) + block * d;
    join_backward(a);
  };
  const auto of_block = [&](const at::Tensor& to, int64_t block, const at::Tensor& left, const at::Tensor& right) {
    const at::Tensor product = c.empty({c.groups(), d, d});
    multiply(product, turned(left), right);
    to.select(1, block).copy_(product);
  };

  const at::Tensor grad_middle =
      feed_forward_backward(c.feed_forward, {kept[HIDDEN], kept[LAST_SUM], kept[LAST_MOMENTS]}, kept[MIDDLE], c.layout,
                            groups_of_targets<const float>(c, grads), grad_feed_forward);

  const at::Tensor grad_projected = at::empty(kept[PROJECTED].sizes(), kept[PROJECTED].options());
  const at::Tensor grad_fine = c.of_fine(d), grad_attended = c.of_fine(d), grad_fine_query = c.of_fine(d);
  Attentions attentions = attentions_of(c, true, kept[PROJECTED], &grad_projected, kept[STATISTICS]);
  for (int64_t j = 0; j < FINE; ++j) {
    const at::Tensor of_fine = grad_fine.select(0, j);
    join_backward_of(joined(c, 1 + j, data(kept[FINE_SUM], j), data(kept[FINE_MOMENTS], j)), 1 + j, grad_middle,
                     data(of_fine));
    of_block(grad_out, 1 + j, kept[FINE_ATTENDED].select(0, j), of_fine);
    multiply(grad_attended.select(0, j), of_fine, turned(c.out.select(1, 1 + j)));
    for (int64_t target = 0; target < TARGETS; ++target) {
      Attention& attention = attentions.of[j * TARGETS + target];
      attention.query = target_of<View>(c, data(kept[FINE_QUERY], j), target);
      attention.out = target_of<View>(c, data(kept[FINE_ATTENDED], j), target);
      attention.grad = target_of<View>(c, data(grad_attended, j), target);
      attention.result = target_of<Result>(c, data(grad_fine_query, j), target);
    }
  }
  attend(attentions.of);

  const at::Tensor& coarse = kept[COARSE];
  const at::Tensor grad_coarse = grad_fine.select(0, 0);
  grad_coarse.add_(grad_fine.select(0, 1));
  for (int64_t j = 0; j < FINE; ++j) {
    of_block(grad_query, 1 + j, coarse, grad_fine_query.select(0, j));
    multiply_add(grad_coarse, grad_fine_query.select(0, j), turned(c.query.select(1, 1 + j)));
  }
  const at::Tensor grad_sum = c.of_rows(d), grad_coarse_attended = grad_attended.select(0, 0);
  join_backward_of(joined(c, 0, data(kept[COARSE_SUM]), data(kept[COARSE_MOMENTS])), 0, grad_coarse, data(grad_sum));
  of_block(grad_out, 0, kept[COARSE_ATTENDED], grad_sum);
  multiply(grad_coarse_attended, grad_sum, turned(c.out.select(1, 0)));
  attentions = attentions_of(c, false, kept[PROJECTED], &grad_projected, kept[STATISTICS]);
  for (int64_t target = 0; target < TARGETS; ++target) {
    Attention& attention = attentions.of[target];
    attention.query = columns<View>(c, kept[PROJECTED], target, QUERY_COLUMN);
    attention.out = target_of<View>(c, data(kept[COARSE_ATTENDED]), target);
    attention.grad = target_of<View>(c, data(grad_coarse_attended), target);
    attention.result = columns<Result>(c, grad_projected, target, QUERY_COLUMN);
  }
  attend(attentions.of);

  const at::Tensor grad_key_value = at::zeros(c.key_value.sizes(), c.key_value.options());
  const at::Tensor of_targets = grad_key_value.unflatten(0, {c.models, TARGETS});
  const at::Tensor queries = grad_query.unflatten(0, {c.models, TARGETS});
  const at::Tensor residual = grad_sum.unflatten(0, {c.models, TARGETS});
  std::vector<at::Tensor> grad_streams;
  for (int64_t m = 0; m < TARGETS; ++m) {
    const at::Tensor of_projected = grad_projected.select(0, m), of_packed = c.empty({c.models, d, COLUMNS * d});
    multiply(of_packed, turned(c.streams[m]), of_projected);
    for (const Use& use : uses_of(m)) {
      of_targets.select(1, use.target).select(1, use.block).add_(of_packed.narrow(2, use.column * d, 2 * d));
    }
    queries.select(1, m).select(1, 0).copy_(of_packed.narrow(2, QUERY_COLUMN * d, d));
    const at::Tensor grad_stream = c.empty({c.models, c.rows, d});
    grad_stream.copy_(residual.select(1, m));
    multiply_add(grad_stream, of_projected, turned(packed(c, m)));
    grad_streams.push_back(grad_stream.to(streams[0].scalar_type()));
  }

  std::vector<at::Tensor> of_weights{grad_query,
                                     grad_key_value,
                                     grad_out,
                                     grad_out_bias,
                                     grad_norm,
                                     grad_norm_bias,
                                     grad_feed_forward.expand,
                                     grad_feed_forward.expand_bias,
                                     grad_feed_forward.contract,
                                     grad_feed_forward.contract_bias,
                                     grad_feed_forward.norm,
                                     grad_feed_forward.norm_bias};
  for (size_t i = 0; i < of_weights.size(); ++i) {
    of_weights[i] = of_weights[i].view(weights[i].sizes()).to(weights[i].scalar_type());
  }
  return {grad_streams, of_weights};
}

}  // namespace fastmmkd
