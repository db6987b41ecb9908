// One tile of rows against one panel of others, see pairs.h; included by the kernels of the losses over pairs.

constexpr int SUB_ROWS = LANES == 16 ? 8 : 4;  // rows that fit in registers

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
