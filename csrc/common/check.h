// What every operation asks of its tensors, and the memory that a thread works in.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/alloc_cpu.h>

namespace fastmmkd {

inline void check_dtype(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name, " is ", x.scalar_type(),
              "; expected float32 or bfloat16");
}

// Uninitialised memory for as long as it lives, aligned for vectors.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(c10::alloc_cpu(floats * sizeof(float))) {}
  ~Scratch() { c10::free_cpu(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(memory_); }

 private:
  void* memory_;
};

}  // namespace fastmmkd
