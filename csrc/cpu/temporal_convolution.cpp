// A convolution over time with kernel 3, and zeros beyond the ends of every sample; float32 arithmetic. One product of
// all rows with the weights of the three taps side by side, [S, n, 3 m]; then every row adds its own and its neighbours'.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>

#include <cstring>

#include "common/check.h"
#include "cpu/attention.h"
#include "cpu/layer.h"
#include "cpu/operations.h"

namespace fastmmkd {

namespace {

constexpr int64_t TAPS = 3;    // before, itself, after
constexpr int64_t GRAIN = 32768;

at::Tensor side_by_side(const at::Tensor& weight) {  // [S, 3 n, m] -> [S, n, 3 m]
  return grouped(weight, 2).unflatten(1, {TAPS, -1}).transpose(1, 2).flatten(2).contiguous();
}

void check_convolution(const at::Tensor& x, const at::Tensor& starts, const at::Tensor& weight) {
  check_dtype(x, "x");
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && weight.size(0) == x.size(0) && weight.size(1) == TAPS * x.size(2),
              "x is ", x.sizes(), ", weight is ", weight.sizes(), "; expected [S, R, n] and [S, 3 n, m]");
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.dim() == 2 && starts.size(0) > 0 && starts.size(1) > 0 &&
                  x.size(0) % starts.size(0) == 0,
              "starts are ", starts.sizes(), " ", starts.scalar_type(), "; x is ", x.sizes());
}

// body(model, first, last) for the rows of every sample; rows of nobody are those of one more.
template <typename Body>
void each_sample(const at::Tensor& starts, int64_t models, int64_t rows, int64_t width, const Body& body) {
  const Layout layout = layout_of(starts, models);
  const int64_t samples = layout.samples + 1, grain = GRAIN * samples / std::max<int64_t>(rows * width, 1) + 1;
  at::parallel_for(0, models * samples, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t model = task / samples, sample = task % samples;
      const int64_t* range = layout.of(model, sample);
      body(model, range[0], sample == layout.samples ? rows : range[1]);
    }
  });
}

}  // namespace

at::Tensor temporal_convolution(const at::Tensor& x_any, const at::Tensor& starts_any, const at::Tensor& weight,
                                const at::Tensor& bias_any) {
  check_convolution(x_any, starts_any, weight);
  const at::Tensor x = x_any.to(at::kFloat).contiguous(), starts = starts_any.contiguous();
  const at::Tensor bias = grouped(bias_any, 1);
  const int64_t models = x.size(0), rows = x.size(1), width = weight.size(2);
  check_starts(starts, rows, rows, "x");
  const at::Tensor product = at::empty({models, rows, TAPS * width}, x.options());
  multiply(product, x, side_by_side(weight));
  const at::Tensor out = at::empty({models, rows, width}, x.options());
  const float *from = product.const_data_ptr<float>(), *added = bias.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  each_sample(starts, models, rows, width, [&](int64_t model, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* taps = from + (model * rows + row) * TAPS * width;
      const float *own = taps + width, *of_bias = added + model * width;
      float* sum = to + (model * rows + row) * width;
      for (int64_t i = 0; i < width; ++i) {
        sum[i] = own[i] + of_bias[i];
      }
      if (row > first) {
        const float* before = taps - TAPS * width;
        for (int64_t i = 0; i < width; ++i) {
          sum[i] += before[i];
        }
      }
      if (row + 1 < last) {
        const float* after = taps + (TAPS + 2) * width;
        for (int64_t i = 0; i < width; ++i) {
          sum[i] += after[i];
        }
      }
    }
  });
  return out.to(x_any.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution_backward(const at::Tensor& grad_any,
                                                                             const at::Tensor& x_any,
                                                                             const at::Tensor& starts_any,
                                                                             const at::Tensor& weight,
                                                                             bool wants_x) {
  check_convolution(x_any, starts_any, weight);
  const at::Tensor x = x_any.to(at::kFloat).contiguous(), starts = starts_any.contiguous();
  const at::Tensor grad = grad_any.to(at::kFloat).contiguous();
  const int64_t models = x.size(0), rows = x.size(1), width = weight.size(2);
  check_starts(starts, rows, rows, "x");
  TORCH_CHECK(grad.dim() == 3 && grad.size(0) == models && grad.size(1) == rows && grad.size(2) == width, "grad is ",
              grad.sizes(), "; x is ", x.sizes(), ", weight is ", weight.sizes());
  const at::Tensor of_product = at::empty({models, rows, TAPS * width}, x.options());
  const float* from = grad.const_data_ptr<float>();
  float* to = of_product.mutable_data_ptr<float>();
  const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
  each_sample(starts, models, rows, width, [&](int64_t model, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* own = from + (model * rows + row) * width;
      float* taps = to + (model * rows + row) * TAPS * width;
      const auto put = [&](int64_t tap, int64_t of, bool is_there) {
        is_there ? std::memcpy(taps + tap * width, own + of * width, bytes)
                 : std::memset(taps + tap * width, 0, bytes);
      };
      put(0, 1, row + 1 < last);
      put(1, 0, true);
      put(2, -1, row > first);
    }
  });
  const at::Tensor grad_bias = at::empty({models, width}, x.options());
  add_bias_backward(grad, grad, false, grad_bias);
  const at::Tensor of_weight = at::empty({models, x.size(2), TAPS * width}, x.options());
  multiply(of_weight, turned(x), of_product);
  const at::Tensor grad_weight = of_weight.unflatten(2, {TAPS, width}).transpose(1, 2).reshape(weight.sizes());
  at::Tensor grad_x = at::empty({0}, x_any.options());
  if (wants_x) {
    const at::Tensor of_x = at::empty(x.sizes(), x.options());
    multiply(of_x, of_product, turned(side_by_side(weight)));
    grad_x = of_x.to(x_any.scalar_type());
  }
  return {grad_x, grad_weight.to(weight.scalar_type()), grad_bias.to(weight.scalar_type())};
}

}  // namespace fastmmkd
