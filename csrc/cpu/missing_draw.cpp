// From the resident data set to a batch with missing modalities and frames: one pass over the rows that are drawn, the
// words of fastmmkd/ops/philox.py bit for bit.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "cpu/operations.h"

namespace fastmmkd {

struct DrawKey {
  uint32_t sample, epoch, version;
  uint32_t low, high;  // of the seed
};

}  // namespace fastmmkd

#define FASTMMKD_KERNEL "cpu/missing_draw_kernel.h"
#include "common/each_isa.h"

namespace fastmmkd {

namespace {

constexpr int64_t WIDEST = 16;           // lanes
constexpr int64_t BYTES_PER_THREAD = 65536;

// mask [steps] of one row and modality becomes what a draw with ratio p keeps; `uniforms` are of the frames.
void drop(bool* mask, int64_t steps, const float* uniforms, float p, bool exact, std::vector<int64_t>& order) {
  if (!exact) {
    for (int64_t t = 0; t < steps; ++t) {
      mask[t] = mask[t] && !(uniforms[t] < p);
    }
    return;
  }
  order.clear();
  for (int64_t t = 0; t < steps; ++t) {
    if (mask[t]) {
      order.push_back(t);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return uniforms[a] < uniforms[b]; });
  const float wanted = std::nearbyint(p * static_cast<float>(order.size()));
  for (size_t rank = 0; rank < order.size() && static_cast<float>(rank) < wanted; ++rank) {
    mask[order[rank]] = false;
  }
}

// The frames that `mask` keeps; zeros elsewhere. `frame` is in bytes.
void copy_frames(char* to, const char* from, const bool* mask, int64_t steps, int64_t frame) {
  for (int64_t t = 0; t < steps;) {
    int64_t end = t + 1;
    while (end < steps && mask[end] == mask[t]) {
      ++end;
    }
    if (mask[t]) {
      std::memcpy(to + t * frame, from + t * frame, (end - t) * frame);
    } else {
      std::memset(to + t * frame, 0, (end - t) * frame);
    }
    t = end;
  }
}

}  // namespace

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> missing_draw(
    at::TensorList features_any, at::TensorList frame_masks_any, const at::Tensor& present_any,
    const at::Tensor& sample_any, const at::Tensor& seed_any, const at::Tensor& epoch_any, int64_t versions,
    double p_max, bool exact) {
  const int64_t modalities = features_any.size();
  TORCH_CHECK(present_any.dim() == 2 && present_any.size(1) >= modalities && present_any.scalar_type() == at::kBool &&
                  static_cast<int64_t>(frame_masks_any.size()) == modalities,
              "present is ", present_any.sizes(), " ", present_any.scalar_type(), " and there are ",
              frame_masks_any.size(), " masks; expected [N, ", modalities, "] bool and ", modalities);
  TORCH_CHECK(sample_any.dim() == 2 && sample_any.scalar_type() == at::kLong && seed_any.dim() == 1 &&
                  seed_any.scalar_type() == at::kLong && seed_any.size(0) == sample_any.size(0) &&
                  epoch_any.numel() == 1 && epoch_any.scalar_type() == at::kLong,
              "sample is ", sample_any.sizes(), ", seed is ", seed_any.sizes(), ", epoch is ", epoch_any.sizes(),
              "; expected [S, B], [S] and [], int64");
  const at::Tensor present = present_any.contiguous(), sample = sample_any.contiguous(), seed = seed_any.contiguous();
  const int64_t count = present.size(0), width = present.size(1), seeds = sample.size(0), batch = sample.size(1);
  const int64_t* rows = sample.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < seeds * batch; ++i) {
    TORCH_CHECK_INDEX(-count <= rows[i] && rows[i] < count, "sample has ", rows[i], "; the split has ", count, " rows");
  }
  const uint32_t epoch = static_cast<uint32_t>(epoch_any.item<int64_t>());

  std::vector<at::Tensor> features, frame_masks, drawn, masks;
  int64_t longest = 0, bytes = 1;
  for (int64_t m = 0; m < modalities; ++m) {
    const at::Tensor &x = features.emplace_back(features_any[m].contiguous()),
                     &mask = frame_masks.emplace_back(frame_masks_any[m].contiguous());
    TORCH_CHECK(x.dim() == 3 && x.size(0) == count && mask.sizes() == x.sizes().slice(0, 2) &&
                    mask.scalar_type() == at::kBool,
                "features of modality ", m, " are ", x.sizes(), ", their mask is ", mask.sizes(), " ",
                mask.scalar_type(), "; expected [", count, ", T, d] and [", count, ", T] bool");
    drawn.push_back(at::empty({seeds, versions * batch, x.size(1), x.size(2)}, x.options()));
    masks.push_back(at::empty({seeds, versions * batch, x.size(1)}, mask.options()));
    longest = std::max(longest, x.size(1));
    bytes += x.size(1) * x.size(2) * x.element_size();
  }
  const int64_t grain = BYTES_PER_THREAD / bytes + 1;
  at::parallel_for(0, seeds * versions * batch, grain, [&](int64_t begin, int64_t end) {
    const Scratch uniforms((longest / 4 + 1 + WIDEST) * 4);
    std::vector<int64_t> order;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / (versions * batch), version = i / batch % versions, named = rows[s * batch + i % batch];
      const int64_t row = named < 0 ? named + count : named;
      const uint64_t key = static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[s]);
      const DrawKey draw{static_cast<uint32_t>(named), epoch, static_cast<uint32_t>(version),
                         static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
      uint32_t words[2];
      FASTMMKD_CALL(draw_pattern, draw, words);
      const bool* has = present.const_data_ptr<bool>() + row * width;
      const uint64_t subsets = (uint64_t{1} << std::count(has, has + width, true)) - 1;
      const uint64_t subset = (words[0] * subsets >> 32) + 1;  // uniform over 1 .. subsets
      const float p = static_cast<float>(words[1] >> 8) * 0x1p-24f * static_cast<float>(p_max);
      for (int64_t m = 0, rank = 0; m < modalities; rank += has[m], ++m) {
        const at::Tensor& x = features[m];
        const int64_t steps = x.size(1), frame = x.size(2) * x.element_size();
        bool* mask = masks[m].mutable_data_ptr<bool>() + i * steps;
        if (has[m] && (subset >> rank & 1)) {
          std::memcpy(mask, frame_masks[m].const_data_ptr<bool>() + row * steps, steps);
          FASTMMKD_CALL(draw_uniforms, draw, 1 + (static_cast<uint32_t>(m) << 24), (steps + 3) / 4, uniforms.floats());
          drop(mask, steps, uniforms.floats(), p, exact, order);
        } else {
          std::memset(mask, 0, steps);
        }
        copy_frames(static_cast<char*>(drawn[m].mutable_data_ptr()) + i * steps * frame,
                    static_cast<const char*>(x.const_data_ptr()) + row * steps * frame, mask, steps, frame);
      }
    }
  });
  return {drawn, masks};
}

}  // namespace fastmmkd
