// See js_divergence.cpp.
#include "common/elementary.h"

// logits [classes, LANES] become log-probabilities.
FASTMMKD_INLINE void normalise(float* logits, int64_t classes) {
  Vector largest = Vector{} - __builtin_inff(), total{};
  for (int64_t k = 0; k < classes; ++k) {
    const Vector x = load<LANES>(logits + k * LANES);
    largest = x > largest ? x : largest;
  }
  for (int64_t k = 0; k < classes; ++k) {
    total += exponential(load<LANES>(logits + k * LANES) - largest);
  }
  const Vector logged = logarithm(total);
  for (int64_t k = 0; k < classes; ++k) {
    store<LANES>(logits + k * LANES, load<LANES>(logits + k * LANES) - largest - logged);
  }
}

// The sum over the rows begin to end, LANES of them at a time; `work` holds [4, classes, LANES].
double diverge_rows(const Divergence& a, int64_t begin, int64_t end, float* work) {
  const int64_t size = a.classes * LANES;
  double total = 0.0;
  for (int64_t row = begin; row < end; row += LANES) {
    const int64_t rows = end - row < LANES ? end - row : LANES;
    for (int side = 0; side < 2; ++side) {
      float* logits = work + side * size;
      for (int64_t lane = 0; lane < LANES; ++lane) {
        const float* from = a.logits[side] + (row + lane) * a.classes;
        for (int64_t k = 0; k < a.classes; ++k) {
          logits[k * LANES + lane] = lane < rows ? from[k] : 0.0f;
        }
      }
      normalise(logits, a.classes);
    }
    Vector divergence[2]{};
    for (int64_t k = 0; k < a.classes; ++k) {
      float* at = work + k * LANES;
      const Vector log_a = load<LANES>(at), log_b = load<LANES>(at + size);
      // p the larger and q the smaller probability: ln(p/m) = ln(2 / (1 + q/p)), and ln(q/m) = ln(p/m) + ln(q/p).
      const Vector apart = log_a < log_b ? log_a - log_b : log_b - log_a;
      const Vector ratio = exponential(apart);
      const Vector of_larger = log_ratio((1.0f - ratio) / (3.0f + ratio)), of_smaller = of_larger + apart;
      const Vector over_a = log_a < log_b ? of_smaller : of_larger, over_b = log_a < log_b ? of_larger : of_smaller;
      const Vector p_a = exponential(log_a), p_b = exponential(log_b);
      divergence[0] += p_a * over_a;
      divergence[1] += p_b * over_b;
      store<LANES>(at, p_a);
      store<LANES>(at + size, p_b);
      store<LANES>(at + 2 * size, over_a);
      store<LANES>(at + 3 * size, over_b);
    }
    float joined[LANES];
    store<LANES>(joined, divergence[0] + divergence[1]);
    for (int64_t lane = 0; lane < rows; ++lane) {
      total += (double)joined[lane];
    }
    for (int side = 0; side < 2; ++side) {
      if (!a.gradient[side]) {
        continue;
      }
      float* probability = work + side * size;
      for (int64_t k = 0; k < a.classes; ++k) {
        const Vector above = load<LANES>(probability + 2 * size + k * LANES) - divergence[side];
        store<LANES>(probability + k * LANES, load<LANES>(probability + k * LANES) * above * a.scale);
      }
      for (int64_t lane = 0; lane < rows; ++lane) {
        float* to = a.gradient[side] + (row + lane) * a.classes;
        for (int64_t k = 0; k < a.classes; ++k) {
          to[k] = probability[k * LANES + lane];
        }
      }
    }
  }
  return total;
}
