// What every operation asks of its tensors, and the memory that a thread works in.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/alloc_cpu.h>

namespace fastmmkd {

inline void check_dtype(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name, " is ", x.scalar_type(),
              "; expected float32 or bfloat16");
}

// starts: [S, B + 1], contiguous; of `rows` rows, `longest` of a sample at most. Reads them: on the CPU only.
inline void check_starts(const at::Tensor& starts, int64_t rows, int64_t longest, const char* name) {
  const int64_t batch = starts.size(1) - 1, *first = starts.const_data_ptr<int64_t>();
  for (int64_t model = 0; model < starts.size(0); ++model, first += batch + 1) {
    TORCH_CHECK(first[0] == 0, name, ": rows of model ", model, " start at ", first[0], "; expected 0");
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t begin = first[b], end = first[b + 1];
      TORCH_CHECK(begin <= end && end <= rows && end - begin <= longest, name, ": sample ", b, " of model ", model,
                  " has the rows from ", begin, " up to ", end, "; expected at most ", longest, " of ", rows);
    }
  }
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
