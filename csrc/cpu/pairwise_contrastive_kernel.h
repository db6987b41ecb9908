// See pairwise_contrastive.cpp.
#include "cpu/pairs_kernel.h"

// What one row has of the loss from `count` others, whose squared distances turn into pulls; `own` is its own column.
FASTMMKD_INLINE double contrast(const ContrastivePairs& a, int64_t own, int64_t count, float* pairs) {
  float distance[PANEL], margin[PANEL];
  for (int64_t j = 0; j < PANEL; ++j) {
    distance[j] = __builtin_sqrtf(pairs[j]);
  }
  const bool has_own = own >= 0 && own < count;
  const float own_squared = has_own ? pairs[own] : 0.0f;
  for (int64_t j = 0; j < PANEL; j += LANES) {
    const Vector squared = load<LANES>(pairs + j), far = load<LANES>(distance + j);
    Vector inside = a.eta - far;
    inside = inside < 0.0f ? Vector{} : inside;
    store<LANES>(margin + j, inside * inside);
    store<LANES>(pairs + j, squared == 0.0f ? Vector{} : -inside / far);
  }
  for (int64_t j = count; j < PANEL; ++j) {
    margin[j] = pairs[j] = 0.0f;
  }
  if (has_own) {
    margin[own] = 0.0f;
    pairs[own] = a.own_weight;
  }
  Vector total{};
  for (int64_t j = 0; j < PANEL; j += LANES) {
    total += load<LANES>(margin + j);
  }
  return (double)sum<LANES>(total) + (double)a.own_weight * own_squared;
}

// Rows begin to end, at most CHUNK, of a group; `gradient` [CHUNK, stride] to work in.
void contrast_rows(const ContrastivePairs& a, int64_t begin, int64_t end, float* gradient) {
  float pairs[TILE * PANEL];
  for (int64_t row = begin; row < end; ++row) {
    a.loss[row] = 0.0;
  }
  if (a.gradient) {
    std::memset(gradient, 0, CHUNK * a.stride * sizeof(float));
  }
  for (int64_t panel = 0; panel < a.others; panel += PANEL) {
    const int64_t count = a.others - panel < PANEL ? a.others - panel : PANEL;
    for (int64_t tile = begin; tile < end; tile += TILE) {
      const float* rows = a.rows + tile * a.stride;
      join_tile<SquaredDifference>(rows, a.stride, a.panels + panel * a.width, a.width, nullptr, pairs);
      for (int64_t i = 0; i < TILE; ++i) {
        if (tile + i < end) {
          a.loss[tile + i] += contrast(a, tile + i + a.shift - panel, count, pairs + i * PANEL);
        } else {
          std::memset(pairs + i * PANEL, 0, PANEL * sizeof(float));
        }
      }
      if (a.gradient) {
        pull_tile(pairs, rows, a.other_rows + panel * a.stride, count, a.stride, gradient + (tile - begin) * a.stride);
      }
    }
  }
  for (int64_t row = begin; a.gradient && row < end; ++row) {
    for (int64_t k = 0; k < a.width; ++k) {
      a.gradient[row * a.width + k] = gradient[(row - begin) * a.stride + k] * a.scale;
    }
  }
}
