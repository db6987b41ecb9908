// See pairwise_contrastive.cpp.
#include "cpu/distances_kernel.h"

// Adds to loss [rows] what a tile's `rows` rows have of it from `count` others; squared distances turn into pulls.
// `own` is the first row's column.
FASTMMKD_INLINE void contrast(const ContrastivePairs& a, int64_t own, int64_t rows, int64_t count, float* pairs,
                              double* loss) {
  using Int = Lanes<LANES>::Int;
  Int lane;
  for (int l = 0; l < LANES; ++l) {
    lane[l] = l;
  }
  Vector parts[TILE]{};
  for (int64_t i = 0; i < TILE; ++i) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Vector squared = load<LANES>(pairs + i * PANEL + j);
      float distance[LANES];
      for (int l = 0; l < LANES; ++l) {
        distance[l] = __builtin_sqrtf(pairs[i * PANEL + j + l]);
      }
      const Vector far = load<LANES>(distance);
      Vector inside = a.eta - far;
      inside = inside < 0.0f ? Vector{} : inside;  // a NaN stays
      const Int column = lane + (int32_t)j, is_own = column == (int32_t)(own + i);
      const Int counts = column < (int32_t)(i < rows ? count : 0);
      const Vector term = is_own ? squared * a.own_weight : inside * inside;
      const Vector pull = is_own ? Vector{} + a.own_weight : squared == 0.0f ? Vector{} : -inside / far;
      parts[i] += counts ? term : Vector{};
      store<LANES>(pairs + i * PANEL + j, counts ? pull : Vector{});
    }
  }
  float terms[TILE + SLACK];
  fold<add, TILE>(parts, terms);
  for (int64_t i = 0; i < rows; ++i) {
    loss[i] += terms[i];
  }
}

// Rows begin to end, at most CHUNK, of a group; `gradient` [CHUNK, stride] to work in.
void contrast_rows(const ContrastivePairs& a, int64_t begin, int64_t end, float* gradient) {
  const int64_t stride = a.side.stride, width = a.side.width;
  float pairs[TILE * PANEL], near[TILE * PANEL];
  for (int64_t row = begin; row < end; ++row) {
    a.loss[row] = 0.0;
  }
  if (a.gradient) {
    std::memset(gradient, 0, CHUNK * stride * sizeof(float));
  }
  for (int64_t panel = 0; panel < a.others; panel += PANEL) {
    const Points others = a.other.from(panel);
    const int64_t count = a.others - panel < PANEL ? a.others - panel : PANEL;
    for (int64_t tile = begin; tile < end; tile += TILE) {
      const Points rows = a.side.from(tile);
      const bool some_near = squared_distances(rows, others, pairs, near);
      contrast(a, tile + a.shift - panel, end - tile < TILE ? end - tile : TILE, count, pairs, a.loss + tile);
      if (a.gradient) {
        pull_pairs(rows, others, count, pairs, some_near ? near : nullptr, gradient + (tile - begin) * stride);
      }
    }
  }
  for (int64_t row = begin; a.gradient && row < end; ++row) {
    for (int64_t k = 0; k < width; ++k) {
      a.gradient[row * width + k] = gradient[(row - begin) * stride + k] * a.scale;
    }
  }
}
