// CorrKD eq. 1 over pairs of rows, a tile of distances at a time: no matrix of them is ever in memory. The gradient of
// the teacher is a second pass with the sides exchanged.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>

#include "cpu/distances.h"
#include "cpu/operations.h"

namespace fastmmkd {

// One side's rows of a group against the other's.
struct ContrastivePairs {
  Points side, other;
  int64_t others;
  int64_t shift;  // from a row to its own among the others
  float eta, own_weight, scale;
  double* loss;     // [rows]
  float* gradient;  // [rows, width] or nothing
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/pairwise_contrastive_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_contrastive(const at::Tensor& student_any,
                                                                    const at::Tensor& teacher_any, double eta,
                                                                    int64_t offset, bool mean,
                                                                    std::array<bool, 2> wanted) {
  check_dtype(student_any, "student");
  check_dtype(teacher_any, "teacher");
  check_contrast(student_any, teacher_any, offset);
  const Side student(student_any, false), teacher(teacher_any, false);
  const std::vector<float> centre = common_centre(student, teacher);
  const Centred centred_student(student, centre, wanted[1]), centred_teacher(teacher, centre, true);
  const at::Tensor loss = at::empty({student.groups}, student_any.options().dtype(at::kFloat));
  const at::Tensor grad_student = gradient_of(student_any, wanted[0]);
  const at::Tensor grad_teacher = gradient_of(teacher_any, wanted[1]);
  const double divisor = mean ? std::max<double>(double(student.count) * double(teacher.count - 1), 1.0) : 1.0;

  const auto pass = [&](const Side& side, const Centred& centred, const Centred& other, int64_t others, int64_t shift,
                        double* lost, float* gradient) {
    for_chunks(side, others, side.stride, [&](int64_t group, int64_t begin, int64_t end, float* work) {
      ContrastivePairs a{};
      a.side = centred.points(group);
      a.other = other.points(group);
      a.others = others;
      a.shift = shift;
      a.eta = static_cast<float>(eta);
      a.own_weight = static_cast<float>(teacher.count - 1);
      a.scale = static_cast<float>(2.0 / divisor);
      a.loss = lost + group * side.count;
      a.gradient = gradient ? gradient + group * side.count * side.width : nullptr;
      FASTMMKD_CALL(contrast_rows, a, begin, end, work);
    });
  };
  const Scratch lost(2 * student.groups * teacher.count);
  double* of_row = reinterpret_cast<double*>(lost.floats());
  if (wanted[1]) {
    pass(teacher, centred_teacher, centred_student, student.count, -offset, of_row,
         grad_teacher.mutable_data_ptr<float>());
  }
  pass(student, centred_student, centred_teacher, teacher.count, offset, of_row,
       wanted[0] ? grad_student.mutable_data_ptr<float>() : nullptr);
  for (int64_t group = 0; group < student.groups; ++group) {
    double total = 0.0;
    for (int64_t row = 0; row < student.count; ++row) {
      total += of_row[group * student.count + row];
    }
    loss.mutable_data_ptr<float>()[group] = static_cast<float>(total / divisor);
  }
  return {loss, grad_student, grad_teacher};
}

}  // namespace fastmmkd
