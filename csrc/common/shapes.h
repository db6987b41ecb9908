// What the operations ask of their tensors' shapes, on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace fastmmkd {

inline void check_attention(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                            at::TensorList key_masks, const at::Tensor& starts, at::TensorList key_starts,
                            at::IntArrayRef longest, int64_t heads) {
  TORCH_CHECK(query.dim() == 3, "query is ", query.sizes(), "; expected [G, R, d]");
  TORCH_CHECK(keys.size() == values.size() && keys.size() == key_masks.size() && keys.size() == key_starts.size() &&
                  keys.size() + 1 == longest.size() && !keys.empty(),
              keys.size(), " key, ", values.size(), " value and ", key_masks.size(), " mask segments, ",
              key_starts.size(), " key_starts and ", longest.size(), " longest; expected one longest more");
  TORCH_CHECK(heads > 0 && query.size(2) % heads == 0, heads, " heads do not divide the width ", query.size(2));
  const auto divides = [&](const at::Tensor& x) { return x.size(0) > 0 && query.size(0) % x.size(0) == 0; };
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.dim() == 2 && starts.size(1) > 0 && divides(starts),
              "starts are ", starts.sizes(), " ", starts.scalar_type(), "; query ", query.sizes(),
              " needs [S, B + 1] int64, S a divisor of ", query.size(0));
  for (size_t i = 0; i < keys.size(); ++i) {
    const at::Tensor &mask = key_masks[i], &begins = key_starts[i];
    TORCH_CHECK(begins.scalar_type() == at::kLong && begins.dim() == 2 && begins.size(1) == starts.size(1) &&
                    divides(begins),
                "key_starts ", i, " are ", begins.sizes(), " ", begins.scalar_type(), "; starts are ", starts.sizes(),
                ", query is ", query.sizes());
    TORCH_CHECK(mask.scalar_type() == at::kBool && mask.dim() == 2 && divides(mask), "mask ", i, " is ", mask.sizes(),
                " ", mask.scalar_type(), "; query is ", query.sizes());
    for (const at::Tensor& x : {keys[i], values[i]}) {
      TORCH_CHECK(x.scalar_type() == query.scalar_type(), "segment ", i, " is ", x.scalar_type(), ", query is ",
                  query.scalar_type());
      TORCH_CHECK(x.dim() == 3 && x.size(0) == query.size(0) && x.size(1) == mask.size(1) &&
                      x.size(2) == query.size(2),
                  "segment ", i, " is ", x.sizes(), " with a mask ", mask.sizes(), "; query is ", query.sizes());
    }
  }
}

inline void check_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 2 && x.sizes() == residual.sizes(), "x is ", x.sizes(), ", residual is ", residual.sizes(),
              "; expected [G, ..., d] twice");
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == x.size(0) && weight.size(1) == x.size(-1), "weight is ",
              weight.sizes(), "; x ", x.sizes(), " needs [", x.size(0), ", ", x.size(-1), "]");
}

inline void check_contrast(const at::Tensor& student, const at::Tensor& teacher, int64_t offset) {
  TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3 && student.size(0) == teacher.size(0) &&
                  student.size(2) == teacher.size(2) && offset >= 0 && offset + student.size(1) <= teacher.size(1),
              "student is ", student.sizes(), ", teacher is ", teacher.sizes(), ", offset is ", offset,
              "; expected [G, n, d] and [G, N, d], offset + n <= N");
}

inline void check_prototypes(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& classes,
                             int64_t count) {
  TORCH_CHECK(student.dim() == 3 && student.sizes() == teacher.sizes() &&
                  classes.sizes() == student.sizes().slice(0, 2) && classes.scalar_type() == at::kLong && count >= 0,
              "student is ", student.sizes(), ", teacher is ", teacher.sizes(), ", classes are ", classes.sizes(), " ",
              classes.scalar_type(), ", count is ", count, "; expected [G, N, d] twice, and [G, N] int64");
}

// Rows of one group of [G, ..., d].
inline int64_t rows_of_group(const at::Tensor& x) {
  const int64_t of_row = x.size(0) * x.size(-1);
  return of_row == 0 ? 0 : x.numel() / of_row;
}

inline at::Tensor with_adjacent_features(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// The gradient that an input wants, float32 in its shape; nothing otherwise.
inline at::Tensor gradient_of(const at::Tensor& x, bool wanted) {
  const auto options = x.options().dtype(at::kFloat);
  return wanted ? at::empty(x.sizes(), options) : at::empty({0}, options);
}

}  // namespace fastmmkd
