// See jsd_mutual_information.cpp.
#include "common/elementary.h"
#include "cpu/pairs_kernel.h"

struct HiddenUnit {
  static inline __attribute__((always_inline)) Vector add(Vector total, float row, Vector other, float weight) {
    const Vector before = row + other;
    return total + weight * (before < 0.0f ? Vector{} : before);  // a NaN stays
  }
};

// The scores of one row with `count` others turn into the bound's gradient in them, whose sum is returned; `own` is the
// column of its joint pair. Adds to terms [2] the row's part of the joint and of the marginal sum.
FASTMMKD_INLINE double bound_row(const BoundPairs& a, int64_t own, int64_t count, float* pairs, double* terms) {
  float lost[PANEL];
  const bool has_own = own >= 0 && own < count;
  for (int64_t j = 0; j < PANEL; j += LANES) {
    const Vector score = load<LANES>(pairs + j) + a.bias;
    const Vector tail = exponential(score < 0.0f ? score : -score);
    const Vector logged = log_one_plus(tail), sigmoid_away = tail / (tail + 1.0f), sigmoid_along = 1.0f / (tail + 1.0f);
    store<LANES>(lost + j, (score < 0.0f ? Vector{} : score) + logged);  // softplus
    store<LANES>(pairs + j, (score < 0.0f ? sigmoid_away : sigmoid_along) * -a.marginal_weight);
    if (has_own && own >= j && own < j + LANES) {
      float joint[LANES], gradient[LANES];
      store<LANES>(joint, (score < 0.0f ? score : Vector{}) - logged);
      store<LANES>(gradient, (score < 0.0f ? sigmoid_along : sigmoid_away) * a.joint_weight);
      terms[0] += joint[own - j];
      lost[own] = 0.0f;
      pairs[own] = gradient[own - j];
    }
  }
  for (int64_t j = count; j < PANEL; ++j) {
    lost[j] = pairs[j] = 0.0f;
  }
  Vector total{}, gradient{};
  for (int64_t j = 0; j < PANEL; j += LANES) {
    total += load<LANES>(lost + j);
    gradient += load<LANES>(pairs + j);
  }
  terms[1] += (double)sum<LANES>(total);
  return sum<LANES>(gradient);
}

// V vectors of hidden units of a tile: input [TILE, stride] += sum over j of g_ij [before > 0], and
// weight [stride] += sum over i and j of g_ij relu(before).
template <int V>
FASTMMKD_INLINE void hidden_columns(const float* pairs, const float* rows, const float* others, int64_t count,
                                    int64_t stride, float* input, float* weight) {
  for (int64_t i = 0; i < TILE; ++i) {
    Vector row[V], inputs[V]{}, weights[V]{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      row[v] = load<LANES>(rows + i * stride + v * LANES);
    }
    for (int64_t j = 0; j < count; ++j) {
      const float gradient = pairs[i * PANEL + j];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vector before = row[v] + load<LANES>(others + j * stride + v * LANES);
        inputs[v] += before > 0.0f ? Vector{} + gradient : Vector{};
        weights[v] += gradient * (before < 0.0f ? Vector{} : before);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store<LANES>(input + i * stride + v * LANES, load<LANES>(input + i * stride + v * LANES) + inputs[v]);
      store<LANES>(weight + v * LANES, load<LANES>(weight + v * LANES) + weights[v]);
    }
  }
}

// Rows begin to end, at most CHUNK, of a group; `work` holds [CHUNK, stride] and [CHUNK / TILE, stride].
void bound_rows(const BoundPairs& a, int64_t begin, int64_t end, float* work) {
  float pairs[TILE * PANEL];
  float* weights = work + CHUNK * a.stride;
  for (int64_t row = begin; row < end; ++row) {
    for (int term = 0; term < 3; ++term) {
      a.terms[row * 3 + term] = 0.0;
    }
  }
  if (a.grad_rows || a.grad_weight) {
    std::memset(work, 0, (CHUNK + CHUNK / TILE) * a.stride * sizeof(float));
  }
  for (int64_t panel = 0; panel < a.count; panel += PANEL) {
    const int64_t count = a.count - panel < PANEL ? a.count - panel : PANEL;
    for (int64_t tile = begin; tile < end; tile += TILE) {
      const float* rows = a.rows + tile * a.stride;
      const float* others = a.other_rows + panel * a.stride;
      join_tile<HiddenUnit>(rows, a.stride, a.panels + panel * a.width, a.width, a.weight, pairs);
      for (int64_t i = 0; i < TILE; ++i) {
        if (tile + i < end) {
          double* terms = a.terms + (tile + i) * 3;
          terms[2] += bound_row(a, tile + i - panel, count, pairs + i * PANEL, terms);
        } else {
          std::memset(pairs + i * PANEL, 0, PANEL * sizeof(float));
        }
      }
      if (a.grad_rows || a.grad_weight) {
        float* input = work + (tile - begin) * a.stride;
        float* weight = weights + (tile - begin) / TILE * a.stride;
        int64_t k = 0;
        for (; k + 4 * LANES <= a.stride; k += 4 * LANES) {
          hidden_columns<4>(pairs, rows + k, others + k, count, a.stride, input + k, weight + k);
        }
        for (; k < a.stride; k += LANES) {
          hidden_columns<1>(pairs, rows + k, others + k, count, a.stride, input + k, weight + k);
        }
      }
    }
  }
  for (int64_t row = begin; a.grad_rows && row < end; ++row) {
    for (int64_t k = 0; k < a.width; ++k) {
      a.grad_rows[row * a.width + k] = work[(row - begin) * a.stride + k] * a.weight[k];
    }
  }
  for (int64_t tile = begin; a.grad_weight && tile < end; tile += TILE) {
    const float* of_tile = weights + (tile - begin) / TILE * a.stride;
    std::memcpy(a.grad_weight + tile / TILE * a.width, of_tile, a.width * sizeof(float));
  }
}
