// CorrKD eqs. 2 to 4: class means, cosines and squared differences without the [N, K, d] products, and the gradients
// through rows and prototypes. Sums over rows are those of fixed blocks.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/operations.h"
#include "cpu/pairs.h"

namespace fastmmkd {

// Student (0) and teacher (1) of a group.
struct Prototypes {
  int64_t width, stride, count, blocks;  // count: classes there are
  float scale;                           // of the gradient
  const int64_t* classes;                // [rows]
  const int64_t* members;                // [count]
  const float* rows[2];                  // [rows, stride]
  float* partial[2];                     // [blocks, count, stride]
  float* prototypes[2];                  // [count, stride] directions, then the gradients that members receive
  float* lengths[2];                     // [count, 2], see Length
  float* gradient[2];                    // [rows, width] or nothing
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/prototype_similarity_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t ROWS_PER_BLOCK = 64;

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_similarity(const at::Tensor& student_any,
                                                                    const at::Tensor& teacher_any,
                                                                    const at::Tensor& classes_any, int64_t count,
                                                                    std::array<bool, 2> wanted) {
  check_dtype(student_any, "student");
  check_dtype(teacher_any, "teacher");
  check_prototypes(student_any, teacher_any, classes_any, count);
  const Side sides[2] = {Side(student_any, false), Side(teacher_any, false)};
  const at::Tensor classes = classes_any.contiguous();
  const int64_t groups = sides[0].groups, rows = sides[0].count, width = sides[0].width, stride = sides[0].stride;
  const int64_t blocks = at::divup(rows, ROWS_PER_BLOCK);
  const at::Tensor loss = at::empty({groups}, student_any.options().dtype(at::kFloat));
  const at::Tensor gradients[2] = {gradient_of(student_any, wanted[0]), gradient_of(teacher_any, wanted[1])};

  const int64_t of_classes = count * stride;
  const Scratch partials(2 * groups * blocks * of_classes), prototypes(2 * groups * of_classes);
  const Scratch lengths(2 * groups * count * 2);
  std::vector<int64_t> members(groups * count, 0);
  std::vector<double> divisors(groups), squares(groups * blocks);
  std::vector<Prototypes> all(groups);
  for (int64_t group = 0; group < groups; ++group) {
    Prototypes& a = all[group];
    a.width = width;
    a.stride = stride;
    a.count = count;
    a.blocks = blocks;
    a.classes = classes.const_data_ptr<int64_t>() + group * rows;
    a.members = members.data() + group * count;
    for (int64_t row = 0; row < rows; ++row) {
      if (a.classes[row] >= 0 && a.classes[row] < count) {
        ++members[group * count + a.classes[row]];
      }
    }
    const int64_t present = count - std::count(a.members, a.members + count, 0);
    divisors[group] = std::max<double>(double(present) * double(rows), 1.0);
    a.scale = static_cast<float>(2.0 / divisors[group]);
    for (int network = 0; network < 2; ++network) {
      const int64_t place = network * groups + group;
      a.rows[network] = sides[network].rows(group);
      a.partial[network] = partials.floats() + place * blocks * of_classes;
      a.prototypes[network] = prototypes.floats() + place * of_classes;
      a.lengths[network] = lengths.floats() + place * count * 2;
      a.gradient[network] =
          wanted[network] ? gradients[network].mutable_data_ptr<float>() + group * rows * width : nullptr;
    }
  }

  const auto for_blocks = [&](int64_t cost, const auto& f) {
    const int64_t grain = PRODUCTS / std::max<int64_t>(cost * ROWS_PER_BLOCK * stride, 1) + 1;
    at::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i % blocks, first = block * ROWS_PER_BLOCK;
        f(all[i / blocks], i, block, first, std::min(first + ROWS_PER_BLOCK, rows));
      }
    });
  };
  for_blocks(1, [&](const Prototypes& a, int64_t, int64_t block, int64_t first, int64_t end) {
    FASTMMKD_CALL(sum_classes, a, block, first, end);
  });
  for (const Prototypes& a : all) {
    FASTMMKD_CALL(directions_of_prototypes, a);
  }
  for_blocks(4 * count + 4, [&](const Prototypes& a, int64_t i, int64_t block, int64_t first, int64_t end) {
    const Scratch work(3 * stride + 2 * count);
    squares[i] = FASTMMKD_CALL(compare_rows, a, block, first, end, work.floats());
  });
  if (wanted[0] || wanted[1]) {
    const Scratch work(of_classes);
    for (const Prototypes& a : all) {
      FASTMMKD_CALL(pulls_of_prototypes, a, work.floats());
    }
    for_blocks(1, [&](const Prototypes& a, int64_t, int64_t, int64_t first, int64_t end) {
      FASTMMKD_CALL(pull_members, a, first, end);
    });
  }
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      total += squares[group * blocks + block];
    }
    loss.mutable_data_ptr<float>()[group] = static_cast<float>(total / divisors[group]);
  }
  return {loss, gradients[0], gradients[1]};
}

}  // namespace fastmmkd
