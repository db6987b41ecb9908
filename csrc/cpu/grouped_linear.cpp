// x W + b per group, or relu of it; float32 arithmetic.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/check.h"
#include "cpu/layer.h"
#include "cpu/operations.h"

namespace fastmmkd {

namespace {

int64_t groups_of_weight(const at::Tensor& weight) {
  return c10::multiply_integers(weight.sizes().slice(0, weight.dim() - 2));
}

// [G, ..., n], or with G as several axes, as float32 [G, R, n].
at::Tensor rows_of(const at::Tensor& x, int64_t groups) {
  const at::Tensor rows = x.to(at::kFloat).contiguous();
  const int64_t of_rows = std::max<int64_t>(groups * x.size(-1), 1);
  return rows.view({groups, x.numel() / of_rows, x.size(-1)});
}

void check_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_dtype(x, "x");
  TORCH_CHECK(x.dim() >= 3 && weight.dim() >= 3 && weight.size(-2) == x.size(-1), "x is ", x.sizes(), ", weight is ",
              weight.sizes(), "; expected [G, ..., n] and [*groups, n, m]");
  const auto groups = weight.sizes().slice(0, weight.dim() - 2);
  TORCH_CHECK(x.size(0) == groups_of_weight(weight) ||
                  (x.dim() > static_cast<int64_t>(groups.size()) && x.sizes().slice(0, groups.size()) == groups),
              "x is ", x.sizes(), ", weight is ", weight.sizes());
  TORCH_CHECK(!bias || (bias->size(-1) == weight.size(-1) && bias->numel() == groups_of_weight(weight) * weight.size(-1)),
              "bias is ",
              bias ? bias->sizes() : at::IntArrayRef(), ", weight is ", weight.sizes());
}

}  // namespace

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          bool relu) {
  check_linear(x, weight, bias);
  TORCH_CHECK(bias || !relu, "relu needs a bias");
  const at::Tensor w = grouped(weight, 2), rows = rows_of(x, w.size(0));
  const at::Tensor out = at::empty({rows.size(0), rows.size(1), w.size(2)}, rows.options());
  multiply(out, rows, w);
  if (bias) {
    add_bias(out, grouped(*bias, 1), relu);
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = w.size(2);
  return out.view(sizes).to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                       const at::Tensor& weight,
                                                                       const at::Tensor& out, bool relu,
                                                                       std::array<bool, 3> wanted) {
  check_linear(x, weight, std::nullopt);
  const at::Tensor w = grouped(weight, 2), rows = rows_of(x, w.size(0));
  at::Tensor of_sum = rows_of(grad, w.size(0));
  TORCH_CHECK(of_sum.size(0) == rows.size(0) && of_sum.size(1) == rows.size(1) && of_sum.size(2) == w.size(2),
              "grad is ", grad.sizes(), "; x is ", x.sizes(), ", weight is ", weight.sizes());
  if (relu && of_sum.data_ptr() == grad.data_ptr()) {
    of_sum = of_sum.clone();
  }
  at::Tensor grad_x = at::empty({0}, x.options()), grad_weight = at::empty({0}, weight.options()),
             grad_bias = at::empty({0}, weight.options());
  if (relu || wanted[2]) {
    const at::Tensor sums = at::empty({w.size(0), w.size(2)}, w.options());
    add_bias_backward(relu ? rows_of(out, w.size(0)) : out, of_sum, relu, sums);
    std::vector<int64_t> sizes = weight.sizes().vec();  // the bias' are those without n
    sizes.erase(sizes.end() - 2);
    grad_bias = sums.view(sizes).to(weight.scalar_type());
  }
  if (wanted[1]) {
    const at::Tensor product = at::empty(w.sizes(), w.options());
    multiply(product, turned(rows), of_sum);
    grad_weight = product.view(weight.sizes()).to(weight.scalar_type());
  }
  if (wanted[0]) {
    const at::Tensor product = at::empty(rows.sizes(), rows.options());
    multiply(product, of_sum, turned(w));
    grad_x = product.view(x.sizes()).to(x.scalar_type());
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fastmmkd
