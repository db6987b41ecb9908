// One tile of rows against one panel of others, see pairs.h; included by the kernels of the losses over pairs.

constexpr int SUB_ROWS = LANES == 16 ? 8 : 4;  // rows that fit in registers

struct SquaredDifference {
  static inline __attribute__((always_inline)) Vector add(Vector total, float row, Vector other, float) {
    const Vector difference = row - other;
    return total + difference * difference;
  }
};

// joined [TILE, PANEL] = the sum of Join's terms over the columns; `weight` [width] is given to each.
template <typename Join>
void join_tile(const float* rows, int64_t stride, const float* panel, int64_t width, const float* weight,
               float* joined) {
  for (int64_t row = 0; row < TILE; row += SUB_ROWS) {
    for (int64_t column = 0; column < PANEL; column += 2 * LANES) {
      Vector low[SUB_ROWS]{}, high[SUB_ROWS]{};
      for (int64_t k = 0; k < width; ++k) {
        const Vector first = load<LANES>(panel + k * PANEL + column);
        const Vector second = load<LANES>(panel + k * PANEL + column + LANES);
        const float factor = weight ? weight[k] : 0.0f;
#pragma GCC unroll 8
        for (int i = 0; i < SUB_ROWS; ++i) {
          const float value = rows[(row + i) * stride + k];
          low[i] = Join::add(low[i], value, first, factor);
          high[i] = Join::add(high[i], value, second, factor);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < SUB_ROWS; ++i) {
        store<LANES>(joined + (row + i) * PANEL + column, low[i]);
        store<LANES>(joined + (row + i) * PANEL + column + LANES, high[i]);
      }
    }
  }
}

// gradient of the first two rows, V vectors of columns: += sum over j of pull_j (row - other_j).
template <int V>
FASTMMKD_INLINE void pull_columns(const float* pull, const float* rows, const float* others, int64_t count,
                                  int64_t stride, float* gradient) {
  Vector row[2][V], total[2][V]{};
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    row[0][v] = load<LANES>(rows + v * LANES);
    row[1][v] = load<LANES>(rows + stride + v * LANES);
  }
  for (int64_t j = 0; j < count; ++j) {
    const float first = pull[j], second = pull[PANEL + j];
    if (first == 0.0f && second == 0.0f) {
      continue;
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vector other = load<LANES>(others + j * stride + v * LANES);
      total[0][v] += first * (row[0][v] - other);
      total[1][v] += second * (row[1][v] - other);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    store<LANES>(gradient + v * LANES, load<LANES>(gradient + v * LANES) + total[0][v]);
    store<LANES>(gradient + stride + v * LANES, load<LANES>(gradient + stride + v * LANES) + total[1][v]);
  }
}

// gradient [TILE, stride] += sum over j < count of pull [TILE, PANEL] times (row - other_j).
inline void pull_tile(const float* pull, const float* rows, const float* others, int64_t count, int64_t stride,
                      float* gradient) {
  for (int64_t i = 0; i < TILE; i += 2) {
    int64_t k = 0;
    for (; k + 4 * LANES <= stride; k += 4 * LANES) {
      pull_columns<4>(pull + i * PANEL, rows + i * stride + k, others + k, count, stride, gradient + i * stride + k);
    }
    for (; k < stride; k += LANES) {
      pull_columns<1>(pull + i * PANEL, rows + i * stride + k, others + k, count, stride, gradient + i * stride + k);
    }
  }
}
