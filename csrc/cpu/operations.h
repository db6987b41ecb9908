// The CPU implementations, in the order and with the schemas of fastmmkd/ops/library.py.
#pragma once

#include <ATen/ATen.h>

namespace fastmmkd {

std::tuple<at::Tensor, at::Tensor> cross_attention(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                                                   at::TensorList key_masks, int64_t heads);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> cross_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    at::TensorList key_masks, const at::Tensor& out, const at::Tensor& statistics, int64_t heads);

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x, const at::Tensor& residual,
                                                                   const at::Tensor& weight, const at::Tensor& bias,
                                                                   double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd);

}  // namespace fastmmkd
