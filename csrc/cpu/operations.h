// The CPU implementations, with the schemas that fastmmkd/ops/<op>.py declares.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

namespace fastmmkd {

std::tuple<at::Tensor, at::Tensor> cross_attention(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                                                   at::TensorList key_masks, const at::Tensor& starts,
                                                   at::TensorList key_starts, at::IntArrayRef longest, int64_t heads);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> cross_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    at::TensorList key_masks, const at::Tensor& starts, at::TensorList key_starts, at::IntArrayRef longest,
    const at::Tensor& out, const at::Tensor& statistics, int64_t heads);

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x, const at::Tensor& residual,
                                                                   const at::Tensor& weight, const at::Tensor& bias,
                                                                   double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd);

// Layers and what their gradients need; weights in the order of fastmmkd/ops/composition.py.
std::tuple<at::Tensor, std::vector<at::Tensor>> encoder_layer(const at::Tensor& x, const at::Tensor& mask,
                                                              const at::Tensor& starts, at::TensorList weights,
                                                              int64_t longest, int64_t heads, double eps);
std::tuple<at::Tensor, std::vector<at::Tensor>> encoder_layer_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mask, const at::Tensor& starts,
    at::TensorList weights, at::TensorList kept, int64_t longest, int64_t heads);

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> crossmodal_layer(
    at::TensorList streams, at::TensorList masks, const at::Tensor& starts, at::TensorList weights, int64_t longest,
    int64_t heads, double eps);
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> crossmodal_layer_backward(
    at::TensorList grads, at::TensorList streams, at::TensorList masks, const at::Tensor& starts,
    at::TensorList weights, at::TensorList kept, int64_t longest, int64_t heads);

// Products, and the gradients that are wanted of x, weight and bias; the others are empty.
at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          bool relu);
std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                       const at::Tensor& weight,
                                                                       const at::Tensor& out, bool relu,
                                                                       std::array<bool, 3> wanted);
at::Tensor temporal_convolution(const at::Tensor& x, const at::Tensor& starts, const at::Tensor& weight,
                                const at::Tensor& bias);
std::tuple<at::Tensor, at::Tensor, at::Tensor> temporal_convolution_backward(const at::Tensor& grad,
                                                                             const at::Tensor& x,
                                                                             const at::Tensor& starts,
                                                                             const at::Tensor& weight, bool wants_x);

// Losses, and the gradients of the inputs that `wanted` names, see declare_loss in fastmmkd/ops/declaration.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_contrastive(const at::Tensor& student,
                                                                    const at::Tensor& teacher, double eta,
                                                                    int64_t offset, bool mean,
                                                                    std::array<bool, 2> wanted);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> jsd_mutual_information(
    const at::Tensor& left, const at::Tensor& right, const at::Tensor& weight, const at::Tensor& bias,
    std::array<bool, 4> wanted);
std::tuple<at::Tensor, at::Tensor, at::Tensor> gaussian_mmd(const at::Tensor& x, const at::Tensor& y,
                                                            std::array<bool, 2> wanted);
std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_similarity(const at::Tensor& student,
                                                                    const at::Tensor& teacher,
                                                                    const at::Tensor& classes, int64_t count,
                                                                    std::array<bool, 2> wanted);
std::tuple<at::Tensor, at::Tensor, at::Tensor> js_divergence(const at::Tensor& logits_a, const at::Tensor& logits_b,
                                                             std::array<bool, 2> wanted);

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> missing_draw(
    at::TensorList features, at::TensorList frame_masks, at::TensorList starts, const at::Tensor& present,
    const at::Tensor& sample, const at::Tensor& seed, const at::Tensor& epoch, at::TensorList batch_starts,
    at::IntArrayRef rows, at::IntArrayRef longest, int64_t versions, double p_max, bool exact);

}  // namespace fastmmkd
