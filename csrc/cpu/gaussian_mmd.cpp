// UMDF eqs. 1 to 3 over pairs of rows. The bandwidth, the mean squared distance of all pairs, follows from the spread
// around the mean and needs no pairs; kernel values and gradients are those of a tile at a time.
#include <ATen/ops/empty.h>

#include <array>
#include <limits>
#include <vector>

#include "cpu/operations.h"
#include "cpu/pairs.h"

namespace fastmmkd {

// One half's rows of a group against its own (0) and the other half's (1).
struct MmdPairs {
  int64_t count, width, stride;
  float exponent;  // -1 / (4 sigma), of the widest kernel
  float scale;     // of the gradient
  const float *rows, *other_rows[2], *panels[2];
  double* sums;     // [rows, 2] kernel values with its own and with the other half
  float* gradient;  // [rows, width] or nothing
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/gaussian_mmd_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

// sum_ij |z_i - z_j|^2 over all M rows of two halves is 2 M sum_i |z_i - mean|^2.
double mean_squared_distance(const Side& x, const Side& y, int64_t group) {
  const double rows = 2.0 * double(x.count);
  std::vector<double> mean(x.width, 0.0);
  double spread = 0.0;
  for (const Side* side : {&x, &y}) {
    for (int64_t row = 0; row < side->count; ++row) {
      const float* values = side->rows(group) + row * side->stride;
      for (int64_t k = 0; k < side->width; ++k) {
        mean[k] += values[k];
      }
    }
  }
  for (double& of_column : mean) {
    of_column /= rows;
  }
  for (const Side* side : {&x, &y}) {
    for (int64_t row = 0; row < side->count; ++row) {
      const float* values = side->rows(group) + row * side->stride;
      double squares = 0.0;
      for (int64_t k = 0; k < side->width; ++k) {
        squares += (values[k] - mean[k]) * (values[k] - mean[k]);
      }
      spread += squares;
    }
  }
  return 2.0 * spread / (rows - 1.0);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> gaussian_mmd(const at::Tensor& x_any, const at::Tensor& y_any,
                                                            std::array<bool, 2> wanted) {
  check_dtype(x_any, "x");
  check_dtype(y_any, "y");
  TORCH_CHECK(x_any.dim() == 3 && x_any.sizes() == y_any.sizes(), "x is ", x_any.sizes(), ", y is ", y_any.sizes(),
              "; expected [G, N, d] twice");
  const Side sides[2] = {Side(x_any, true), Side(y_any, true)};
  const int64_t groups = sides[0].groups, count = sides[0].count, width = sides[0].width;
  const at::Tensor loss = at::empty({groups}, x_any.options().dtype(at::kFloat));
  const at::Tensor gradients[2] = {gradient_of(x_any, wanted[0]), gradient_of(y_any, wanted[1])};
  const double pairs = double(count) * double(count);

  std::vector<double> sigma(groups);
  for (int64_t group = 0; group < groups; ++group) {
    const double mean = mean_squared_distance(sides[0], sides[1], group);
    constexpr double tiny = std::numeric_limits<float>::min();
    sigma[group] = mean < tiny ? tiny : mean;
  }
  const Scratch of_rows(2 * groups * count * 4);
  double* sums = reinterpret_cast<double*>(of_rows.floats());
  for (int half = 0; half < 2; ++half) {
    const Side &side = sides[half], &other = sides[1 - half];
    for_chunks(side, 2 * count, side.stride, [&](int64_t group, int64_t begin, int64_t end, float* work) {
      MmdPairs a{};
      a.count = count;
      a.width = width;
      a.stride = side.stride;
      a.exponent = static_cast<float>(-0.25 / sigma[group]);
      a.scale = static_cast<float>(-1.0 / (pairs * sigma[group]));
      a.rows = a.other_rows[0] = side.rows(group);
      a.other_rows[1] = other.rows(group);
      a.panels[0] = side.panels(group);
      a.panels[1] = other.panels(group);
      a.sums = sums + (half * groups + group) * count * 2;
      a.gradient = wanted[half] ? gradients[half].mutable_data_ptr<float>() + group * count * width : nullptr;
      FASTMMKD_CALL(mmd_rows, a, begin, end, work);
    });
  }
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0.0;
    for (int half = 0; half < 2; ++half) {
      const double* of_half = sums + (half * groups + group) * count * 2;
      for (int64_t row = 0; row < count; ++row) {
        total += of_half[2 * row] - of_half[2 * row + 1];
      }
    }
    loss.mutable_data_ptr<float>()[group] = static_cast<float>(total / pairs);
  }
  return {loss, gradients[0], gradients[1]};
}

}  // namespace fastmmkd
