// Distances of one tile of rows and one panel of others, see distances.h, and what the pairs pull at the rows.
#include "cpu/pairs_kernel.h"

constexpr float CANCELLED = 1.0f / 16;  // of both squared lengths: a smaller squared distance is no longer exact
constexpr float UNDERFLOWN = 1e-30f;    // nor is one below this

struct Product {
  static inline __attribute__((always_inline)) Vector add(Vector total, float row, Vector other, float) {
    return total + row * other;
  }
};

// Squared distances of a row to LANES others, by differences.
inline Vector squared_differences(const float* row, const float* others, int64_t stride) {
  Vector total[LANES]{};
  for (int64_t k = 0; k < stride; k += LANES) {
    const Vector values = load<LANES>(row + k);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      const Vector difference = values - load<LANES>(others + i * stride + k);
      total[i] += difference * difference;
    }
  }
  float squared[LANES + SLACK];
  fold<add, LANES>(total, squared);
  return load<LANES>(squared);
}

// squared [TILE, PANEL]: the squared distances. Whether products cancel in some; then `near` [TILE, PANEL] is 1 there
// and 0 elsewhere, otherwise it is not written.
inline bool squared_distances(const Points& tile, const Points& panel, float* squared, float* near) {
  using Int = Lanes<LANES>::Int;
  join_tile<Product>(tile.centred, tile.stride, panel.panels, tile.width, nullptr, squared);
  Int cancelled{};
  for (int64_t i = 0; i < TILE; ++i) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Vector lengths = load<LANES>(panel.squares + j) + tile.squares[i];
      const Vector distance = lengths - 2.0f * load<LANES>(squared + i * PANEL + j);
      cancelled |= ~(distance > lengths * CANCELLED + UNDERFLOWN);  // a NaN counts
      store<LANES>(squared + i * PANEL + j, distance);
    }
  }
  if (!any(cancelled)) {
    return false;
  }
  for (int64_t i = 0; i < TILE; ++i) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Vector lengths = load<LANES>(panel.squares + j) + tile.squares[i];
      const Vector distance = load<LANES>(squared + i * PANEL + j);
      const Int far = distance > lengths * CANCELLED + UNDERFLOWN;
      store<LANES>(near + i * PANEL + j, far ? Vector{} : Vector{} + 1.0f);
      if (any(~far)) {
        const Vector exact =
            squared_differences(tile.rows + i * tile.stride, panel.rows + j * tile.stride, tile.stride);
        store<LANES>(squared + i * PANEL + j, far ? distance : exact);
      }
    }
  }
  return true;
}

// V vectors of columns of the first SUB_ROWS rows of pull_by_products.
template <int V>
FASTMMKD_INLINE void product_columns(const float* pull, const float* total_pull, const float* rows,
                                     const float* others, int64_t count, int64_t stride, float* gradient) {
  Vector total[SUB_ROWS][V];
#pragma GCC unroll 8
  for (int i = 0; i < SUB_ROWS; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = i * stride + v * LANES;
      total[i][v] = load<LANES>(gradient + at) + total_pull[i] * load<LANES>(rows + at);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    Vector other[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      other[v] = load<LANES>(others + j * stride + v * LANES);
    }
#pragma GCC unroll 8
    for (int i = 0; i < SUB_ROWS; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        total[i][v] -= pull[i * PANEL + j] * other[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < SUB_ROWS; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store<LANES>(gradient + i * stride + v * LANES, total[i][v]);
    }
  }
}

// As pull_tile, by products.
inline void pull_by_products(const float* pull, const float* rows, const float* others, int64_t count, int64_t stride,
                             float* gradient) {
  Vector parts[TILE]{};
  Lanes<LANES>::Int pulls{};
  for (int64_t i = 0; i < TILE; ++i) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Vector of_pairs = load<LANES>(pull + i * PANEL + j);
      parts[i] += of_pairs;
      pulls |= of_pairs != 0.0f;
    }
  }
  if (!any(pulls)) {
    return;
  }
  float total_pull[TILE + SLACK];
  fold<add, TILE>(parts, total_pull);
  for (int64_t i = 0; i < TILE; i += SUB_ROWS) {
    const float *of_rows = pull + i * PANEL, *from = rows + i * stride;
    float* to = gradient + i * stride;
    int64_t k = 0;
    for (; k + 2 * LANES <= stride; k += 2 * LANES) {
      product_columns<2>(of_rows, total_pull + i, from + k, others + k, count, stride, to + k);
    }
    for (; k < stride; k += LANES) {
      product_columns<1>(of_rows, total_pull + i, from + k, others + k, count, stride, to + k);
    }
  }
}

// gradient [TILE, stride] += sum over j < count of pull [TILE, PANEL], zero beyond, times (row - other_j); `near` is
// what squared_distances wrote, or nothing. Destroys both.
inline void pull_pairs(const Points& tile, const Points& panel, int64_t count, float* pull, float* near,
                       float* gradient) {
  if (near) {
    for (int64_t i = 0; i < TILE * PANEL; i += LANES) {
      const Vector of_pairs = load<LANES>(pull + i), is_near = load<LANES>(near + i);
      store<LANES>(near + i, is_near == 0.0f ? Vector{} : of_pairs);
      store<LANES>(pull + i, is_near == 0.0f ? of_pairs : Vector{});
    }
    pull_tile(near, tile.rows, panel.rows, count, tile.stride, gradient);
  }
  pull_by_products(pull, tile.centred, panel.centred, count, tile.stride, gradient);
}
