// See gaussian_mmd.cpp.
#include "common/elementary.h"
#include "cpu/pairs_kernel.h"

// The kernel values of one row with `count` others, summed; squared distances turn into the pulls, `sign` times
// sum_u 2^(2 - u) k_u. The five bandwidths are squares of one another: k_u = k_2^(2^(2 - u)).
FASTMMKD_INLINE double kernel_row(const MmdPairs& a, int64_t count, float sign, float* pairs) {
  float kernel[PANEL];
  for (int64_t j = 0; j < PANEL; j += LANES) {
    const Vector k2 = exponential(load<LANES>(pairs + j) * a.exponent);
    const Vector k1 = k2 * k2, k0 = k1 * k1, half = k0 * k0, quarter = half * half;
    store<LANES>(kernel + j, quarter + half + k0 + k1 + k2);
    store<LANES>(pairs + j, (16.0f * quarter + 8.0f * half + 4.0f * k0 + 2.0f * k1 + k2) * sign);
  }
  for (int64_t j = count; j < PANEL; ++j) {
    kernel[j] = pairs[j] = 0.0f;
  }
  Vector total{};
  for (int64_t j = 0; j < PANEL; j += LANES) {
    total += load<LANES>(kernel + j);
  }
  return sum<LANES>(total);
}

// Rows begin to end, at most CHUNK, of a group; `gradient` [CHUNK, stride] to work in.
void mmd_rows(const MmdPairs& a, int64_t begin, int64_t end, float* gradient) {
  float pairs[TILE * PANEL];
  if (a.gradient) {
    std::memset(gradient, 0, CHUNK * a.stride * sizeof(float));
  }
  for (int other = 0; other < 2; ++other) {
    for (int64_t row = begin; row < end; ++row) {
      a.sums[2 * row + other] = 0.0;
    }
    for (int64_t panel = 0; panel < a.count; panel += PANEL) {
      const int64_t count = a.count - panel < PANEL ? a.count - panel : PANEL;
      for (int64_t tile = begin; tile < end; tile += TILE) {
        const float* rows = a.rows + tile * a.stride;
        join_tile<SquaredDifference>(rows, a.stride, a.panels[other] + panel * a.width, a.width, nullptr, pairs);
        for (int64_t i = 0; i < TILE; ++i) {
          if (tile + i < end) {
            a.sums[2 * (tile + i) + other] += kernel_row(a, count, other ? -1.0f : 1.0f, pairs + i * PANEL);
          } else {
            std::memset(pairs + i * PANEL, 0, PANEL * sizeof(float));
          }
        }
        if (a.gradient) {
          pull_tile(pairs, rows, a.other_rows[other] + panel * a.stride, count, a.stride,
                    gradient + (tile - begin) * a.stride);
        }
      }
    }
  }
  for (int64_t row = begin; a.gradient && row < end; ++row) {
    for (int64_t k = 0; k < a.width; ++k) {
      a.gradient[row * a.width + k] = gradient[(row - begin) * a.stride + k] * a.scale;
    }
  }
}
