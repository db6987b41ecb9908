// The CUDA kernels as operations of PyTorch: `fastmmkd_cuda::<op>` has the schema of `fastmmkd::<op>`, which
// fastmmkd/ops/<op>.py declares; fastmmkd/ops/dispatch.py routes here.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "common/shapes.h"
#include "cuda/launch.h"

#ifndef FASTMMKD_DEVICE  // tests/cuda/host runs the kernels, and with them this file, on a CPU
#define FASTMMKD_DEVICE CUDA
#define FASTMMKD_LIBRARY fastmmkd_cuda
#endif
#define FASTMMKD_DEFINE(name, m) TORCH_LIBRARY(name, m)  // which takes the name as it is written

namespace fastmmkd::cuda {

namespace {

Dtype dtype_of(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kHalf:
      return Dtype::float16;
    case at::kBFloat16:
      return Dtype::bfloat16;
    default:
      TORCH_CHECK(false, name, " is ", x.scalar_type(), "; expected float32, float16 or bfloat16");
  }
}

// The device of `x` is the current one for as long as this lives; its stream is that of the kernels.
class Here {
 public:
  explicit Here(const at::Tensor& x) : guard_(x.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}
  cudaStream_t stream() const { return stream_.stream(); }

 private:
  const c10::cuda::CUDAGuard guard_;
  const c10::cuda::CUDAStream stream_;
};

at::Tensor floats(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().dtype(at::kFloat));
}

// An attention, and its tensors for as long as the kernels are being launched.
struct Inputs {
  Attention attention{};
  std::vector<at::Tensor> tensors;

  Inputs(const at::Tensor& query, at::TensorList keys, at::TensorList values, at::TensorList key_masks,
         const at::Tensor& starts, at::TensorList key_starts, at::IntArrayRef longest, int64_t heads) {
    check_attention(query, keys, values, key_masks, starts, key_starts, longest, heads);
    TORCH_CHECK(keys.size() <= MAX_SEGMENTS, keys.size(), " segments; expected at most ", MAX_SEGMENTS);
    TORCH_CHECK(query.size(2) / heads <= WIDEST_HEAD, "heads are ", query.size(2) / heads,
                " wide; expected at most ", WIDEST_HEAD);
    Attention& a = attention;
    a.groups = query.size(0);
    a.batch = starts.size(1) - 1;
    a.width = query.size(2);
    a.heads = static_cast<int>(heads);
    a.segment_count = static_cast<int>(keys.size());
    a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(a.width / heads)));
    a.query = keep(query);
    a.layout = keep(starts, query, longest[0]);
    for (size_t i = 0; i < keys.size(); ++i) {
      const Layout layout = keep(key_starts[i], keys[i], longest[i + 1]);
      a.segments[i] = {keep(keys[i]), keep(values[i]), view_of(key_masks[i]), layout, nullptr, nullptr};
    }
  }

  View view_of(const at::Tensor& x) const {
    return {x.const_data_ptr(), attention.groups / std::max<int64_t>(x.size(0), 1), x.stride(0), x.stride(1)};
  }

  View keep(const at::Tensor& x) {
    tensors.push_back(with_adjacent_features(x));
    return view_of(tensors.back());
  }

  Layout keep(const at::Tensor& starts, const at::Tensor& x, int64_t longest) {
    tensors.push_back(starts.contiguous());
    const auto* data = reinterpret_cast<const Size*>(tensors.back().const_data_ptr<int64_t>());
    return {data, attention.groups / starts.size(0), x.size(1), longest};
  }
};

std::tuple<at::Tensor, at::Tensor> cross_attention(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                                                   at::TensorList key_masks, const at::Tensor& starts,
                                                   at::TensorList key_starts, at::IntArrayRef longest, int64_t heads) {
  const Dtype dtype = dtype_of(query, "query");
  const Here here(query);
  Inputs inputs(query, keys, values, key_masks, starts, key_starts, longest, heads);
  Attention& a = inputs.attention;
  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor statistics = floats(query, {a.groups, heads, 2, a.layout.rows});
  a.result = out.mutable_data_ptr();
  a.statistics = statistics.mutable_data_ptr<float>();
  C10_CUDA_CHECK(attend(a, dtype, here.stream()));
  return {out, statistics};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> cross_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, at::TensorList keys, at::TensorList values,
    at::TensorList key_masks, const at::Tensor& starts, at::TensorList key_starts, at::IntArrayRef longest,
    const at::Tensor& out, const at::Tensor& statistics_any, int64_t heads) {
  const Dtype dtype = dtype_of(query, "query");
  const Here here(query);
  Inputs inputs(query, keys, values, key_masks, starts, key_starts, longest, heads);
  Attention& a = inputs.attention;
  TORCH_CHECK(grad.sizes() == query.sizes() && out.sizes() == query.sizes(), "grad is ", grad.sizes(), ", out is ",
              out.sizes(), "; query is ", query.sizes());
  const at::Tensor statistics = statistics_any.contiguous();
  const at::Tensor delta = floats(query, {a.groups, heads, a.layout.rows});
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  std::vector<at::Tensor> grad_keys, grad_values;
  for (size_t i = 0; i < keys.size(); ++i) {
    grad_keys.push_back(at::empty(keys[i].sizes(), query.options()));
    grad_values.push_back(at::empty(values[i].sizes(), query.options()));
    a.segments[i].grad_key = grad_keys.back().mutable_data_ptr();
    a.segments[i].grad_value = grad_values.back().mutable_data_ptr();
  }
  a.grad = inputs.keep(grad.to(query.scalar_type()));
  a.out = inputs.keep(out);
  a.statistics = const_cast<float*>(statistics.const_data_ptr<float>());
  a.delta = delta.mutable_data_ptr<float>();
  a.result = grad_query.mutable_data_ptr();
  C10_CUDA_CHECK(differentiate_attention(a, dtype, here.stream()));
  return {grad_query, grad_keys, grad_values};
}

// x and residual, contiguous; the kernels have no mixture of float16 and bfloat16.
std::array<at::Tensor, 2> norm_inputs(const at::Tensor& x, const at::Tensor& residual) {
  const bool is_mixed = x.scalar_type() != residual.scalar_type() && x.scalar_type() != at::kFloat;
  return {x.contiguous(), (is_mixed ? residual.to(at::kFloat) : residual).contiguous()};
}

Norm norm_of(const std::array<at::Tensor, 2>& inputs, const at::Tensor& weight) {
  const at::Tensor &x = inputs[0], &residual = inputs[1];
  check_norm(x, residual, weight);
  TORCH_CHECK(x.size(-1) <= WIDEST_NORM, "x is ", x.sizes(), "; expected rows of at most ", WIDEST_NORM);
  Norm a{};
  a.groups = x.size(0);
  a.width = x.size(-1);
  a.rows = rows_of_group(x);
  a.x = x.const_data_ptr();
  a.residual = residual.const_data_ptr();
  a.weight = weight.const_data_ptr<float>();
  return a;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x_any,
                                                                   const at::Tensor& residual_any,
                                                                   const at::Tensor& weight_any,
                                                                   const at::Tensor& bias_any, double eps) {
  const Here here(x_any);
  const Dtype dtype = dtype_of(x_any, "x");
  const auto inputs = norm_inputs(x_any, residual_any);
  const at::Tensor weight = weight_any.to(at::kFloat).contiguous(), bias = bias_any.to(at::kFloat).contiguous();
  Norm a = norm_of(inputs, weight);
  TORCH_CHECK(bias.sizes() == weight.sizes(), "bias is ", bias.sizes(), "; expected ", weight.sizes());
  const at::Tensor out = at::empty(x_any.sizes(), x_any.options());
  const auto of_rows = x_any.sizes().slice(0, x_any.dim() - 1);
  const at::Tensor mean = floats(x_any, of_rows), rstd = floats(x_any, of_rows);
  a.bias = bias.const_data_ptr<float>();
  a.eps = static_cast<float>(eps);
  a.out = out.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr<float>();
  a.rstd = rstd.mutable_data_ptr<float>();
  C10_CUDA_CHECK(norm(a, dtype, dtype_of(inputs[1], "residual"), here.stream()));
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_layer_norm_backward(
    const at::Tensor& grad_any, const at::Tensor& x_any, const at::Tensor& residual_any, const at::Tensor& weight_any,
    const at::Tensor& mean, const at::Tensor& rstd) {
  const Here here(x_any);
  const Dtype dtype = dtype_of(x_any, "x");
  const auto inputs = norm_inputs(x_any, residual_any);
  const at::Tensor grad = grad_any.to(x_any.scalar_type()).contiguous();
  const at::Tensor weight = weight_any.to(at::kFloat).contiguous();
  Norm a = norm_of(inputs, weight);
  const auto of_sum = at::promote_types(x_any.scalar_type(), residual_any.scalar_type());
  const at::Tensor grad_sum = at::empty(x_any.sizes(), x_any.options().dtype(of_sum));
  const at::Tensor grad_weight = floats(x_any, weight.sizes()), grad_bias = floats(x_any, weight.sizes());
  const at::Tensor partial = floats(x_any, {a.groups, tiles(a.rows, NORM_ROWS), 2, a.width});
  a.mean = const_cast<float*>(mean.const_data_ptr<float>());
  a.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  a.grad = grad.const_data_ptr();
  a.grad_sum = grad_sum.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  a.grad_weight = grad_weight.mutable_data_ptr<float>();
  a.grad_bias = grad_bias.mutable_data_ptr<float>();
  C10_CUDA_CHECK(differentiate_norm(a, dtype, dtype_of(inputs[1], "residual"), here.stream()));
  const auto of_parameters = weight_any.scalar_type();
  return {grad_sum, grad_weight.to(of_parameters), grad_bias.to(of_parameters)};
}

// Two inputs of a loss, contiguous and of one dtype: float32 unless they agree on another.
std::array<at::Tensor, 2> of_one_dtype(const at::Tensor& left, const at::Tensor& right) {
  const auto dtype = left.scalar_type() == right.scalar_type() ? left.scalar_type() : at::kFloat;
  return {left.to(dtype).contiguous(), right.to(dtype).contiguous()};
}

float* data_of(const at::Tensor& gradient, bool wanted) {
  return wanted ? gradient.mutable_data_ptr<float>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_contrastive(const at::Tensor& student_any,
                                                                    const at::Tensor& teacher_any, double eta,
                                                                    int64_t offset, bool mean,
                                                                    std::array<bool, 2> wanted) {
  const Here here(student_any);
  check_contrast(student_any, teacher_any, offset);
  const auto [student, teacher] = of_one_dtype(student_any, teacher_any);
  const Dtype dtype = dtype_of(student, "student");
  const int64_t groups = student.size(0), own = student.size(1), all = teacher.size(1);
  const at::Tensor loss = floats(student, {groups});
  const at::Tensor grad_student = gradient_of(student, wanted[0]), grad_teacher = gradient_of(teacher, wanted[1]);
  const at::Tensor partial =
      at::empty({groups, tiles(own, CONTRAST_ROWS)}, student.options().dtype(at::kDouble));
  const double divisor = mean ? std::max<double>(double(own) * double(all - 1), 1.0) : 1.0;

  Contrast a{};
  a.groups = groups;
  a.width = student.size(2);
  a.eta = static_cast<float>(eta);
  a.own_weight = static_cast<float>(all - 1);
  a.scale = static_cast<float>(2.0 / divisor);
  const auto pass = [&](const at::Tensor& side, const at::Tensor& other, int64_t shift, float* gradient) {
    a.rows = side.size(1);
    a.others = other.size(1);
    a.shift = shift;
    a.row = side.const_data_ptr();
    a.other = other.const_data_ptr();
    a.gradient = gradient;
    C10_CUDA_CHECK(contrast(a, dtype, here.stream()));
  };
  if (wanted[1]) {
    pass(teacher, student, -offset, data_of(grad_teacher, true));
  }
  a.partial = partial.mutable_data_ptr<double>();
  pass(student, teacher, offset, data_of(grad_student, wanted[0]));
  C10_CUDA_CHECK(sum_contrast(a.partial, groups, own, divisor, loss.mutable_data_ptr<float>(), here.stream()));
  return {loss, grad_student, grad_teacher};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_similarity(const at::Tensor& student_any,
                                                                    const at::Tensor& teacher_any,
                                                                    const at::Tensor& classes_any, int64_t count,
                                                                    std::array<bool, 2> wanted) {
  const Here here(student_any);
  check_prototypes(student_any, teacher_any, classes_any, count);
  const auto [student, teacher] = of_one_dtype(student_any, teacher_any);
  const at::Tensor classes = classes_any.contiguous();
  const at::Tensor loss = floats(student, {student.size(0)});
  const at::Tensor grad_student = gradient_of(student, wanted[0]), grad_teacher = gradient_of(teacher, wanted[1]);

  Prototypes a{};
  a.groups = student.size(0);
  a.rows = student.size(1);
  a.width = student.size(2);
  a.count = count;
  const at::Tensor scratch = floats(student, {a.groups, prototype_scratch(a.rows, a.width, a.count)});
  a.classes = reinterpret_cast<const Size*>(classes.const_data_ptr<int64_t>());
  a.x[0] = student.const_data_ptr();
  a.x[1] = teacher.const_data_ptr();
  a.loss = loss.mutable_data_ptr<float>();
  a.gradient[0] = data_of(grad_student, wanted[0]);
  a.gradient[1] = data_of(grad_teacher, wanted[1]);
  a.scratch = scratch.mutable_data_ptr<float>();
  C10_CUDA_CHECK(compare_with_prototypes(a, dtype_of(student, "student"), here.stream()));
  return {loss, grad_student, grad_teacher};
}

}  // namespace

FASTMMKD_DEFINE(FASTMMKD_LIBRARY, m) {
  m.def(
      "cross_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks, Tensor starts,"
      " Tensor[] key_starts, SymInt[] longest, int heads) -> (Tensor out, Tensor statistics)");
  m.def(
      "cross_attention_backward(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks,"
      " Tensor starts, Tensor[] key_starts, SymInt[] longest, Tensor out, Tensor statistics, int heads)"
      " -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values)");
  m.def(
      "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "residual_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd)"
      " -> (Tensor grad_sum, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "pairwise_contrastive(Tensor student, Tensor teacher, float eta, int offset, bool mean, bool[2] wanted)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
  m.def(
      "prototype_similarity(Tensor student, Tensor teacher, Tensor classes, int count, bool[2] wanted)"
      " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)");
}

TORCH_LIBRARY_IMPL(FASTMMKD_LIBRARY, FASTMMKD_DEVICE, m) {
  m.impl("cross_attention", cross_attention);
  m.impl("cross_attention_backward", cross_attention_backward);
  m.impl("residual_layer_norm", residual_layer_norm);
  m.impl("residual_layer_norm_backward", residual_layer_norm_backward);
  m.impl("pairwise_contrastive", pairwise_contrastive);
  m.impl("prototype_similarity", prototype_similarity);
}

}  // namespace fastmmkd::cuda
