// From the resident data set to a batch with missing modalities and frames: one pass over the rows that are drawn, the
// words of fastmmkd/ops/philox.py bit for bit.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
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

namespace {

struct Rows {  // of one modality: in the split, and in the batch
  at::Tensor features, mask, starts, batch_starts;
  int64_t total, bytes;  // rows of the batch; of a row
  char* drawn;
  bool* drawn_mask;
};

}  // namespace

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> missing_draw(
    at::TensorList features_any, at::TensorList frame_masks_any, at::TensorList starts_any,
    const at::Tensor& present_any, const at::Tensor& sample_any, const at::Tensor& seed_any,
    const at::Tensor& epoch_any, at::TensorList batch_starts_any, at::IntArrayRef rows, at::IntArrayRef longest,
    int64_t versions, double p_max, bool exact) {
  const size_t modalities = features_any.size();
  TORCH_CHECK(frame_masks_any.size() == modalities && starts_any.size() == modalities &&
                  batch_starts_any.size() == modalities && rows.size() == modalities && longest.size() == modalities,
              modalities, " features, ", frame_masks_any.size(), " masks, ", starts_any.size(), " starts, ",
              batch_starts_any.size(), " batch_starts, ", rows.size(), " rows and ", longest.size(),
              " longest; expected as many");
  TORCH_CHECK(present_any.dim() == 2 && present_any.size(1) >= static_cast<int64_t>(modalities) &&
                  present_any.scalar_type() == at::kBool,
              "present is ", present_any.sizes(), " ", present_any.scalar_type(), "; expected [N, ", modalities,
              "] bool");
  TORCH_CHECK(sample_any.dim() == 2 && sample_any.scalar_type() == at::kLong && seed_any.dim() == 1 &&
                  seed_any.scalar_type() == at::kLong && seed_any.size(0) == sample_any.size(0) &&
                  epoch_any.numel() == 1 && epoch_any.scalar_type() == at::kLong,
              "sample is ", sample_any.sizes(), ", seed is ", seed_any.sizes(), ", epoch is ", epoch_any.sizes(),
              "; expected [S, B], [S] and [], int64");
  const at::Tensor present = present_any.contiguous(), sample = sample_any.contiguous(), seed = seed_any.contiguous();
  const int64_t count = present.size(0), width = present.size(1), models = sample.size(0), batch = sample.size(1);
  const int64_t* named = sample.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < models * batch; ++i) {
    TORCH_CHECK_INDEX(0 <= named[i] && named[i] < count, "sample has ", named[i], "; the split has ", count,
                      " samples");
  }
  const uint32_t epoch = static_cast<uint32_t>(epoch_any.item<int64_t>());

  std::vector<at::Tensor> drawn, masks;
  std::vector<Rows> of_modality;
  int64_t most = 0;  // stored rows of a sample
  for (size_t m = 0; m < modalities; ++m) {
    const at::Tensor &x = features_any[m], &mask = frame_masks_any[m], &starts = starts_any[m],
                     &batch_starts = batch_starts_any[m];
    TORCH_CHECK(x.dim() == 2 && mask.sizes() == x.sizes().slice(0, 1) && mask.scalar_type() == at::kBool,
                "features of modality ", m, " are ", x.sizes(), ", their mask is ", mask.sizes(), " ",
                mask.scalar_type(), "; expected [R, d] and [R] bool");
    TORCH_CHECK(starts.sizes() == at::IntArrayRef({count + 1}) && starts.scalar_type() == at::kLong &&
                    batch_starts.sizes() == at::IntArrayRef({models, versions * batch + 1}) &&
                    batch_starts.scalar_type() == at::kLong,
                "starts of modality ", m, " are ", starts.sizes(), " in the split and ", batch_starts.sizes(),
                " in the batch; expected ", count + 1, " and [", models, ", ", versions * batch + 1, "] int64");
    drawn.push_back(at::empty({models, rows[m], x.size(1)}, x.options()));
    masks.push_back(at::empty({models, rows[m]}, mask.options()));
    const Rows& of = of_modality.emplace_back(
        Rows{x.contiguous(), mask.contiguous(), starts.contiguous(), batch_starts.contiguous(), rows[m],
             x.size(1) * static_cast<int64_t>(x.element_size()), static_cast<char*>(drawn[m].mutable_data_ptr()),
             masks[m].mutable_data_ptr<bool>()});
    check_starts(of.batch_starts, rows[m], longest[m], "batch");
    const int64_t* begins = of.starts.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < models * batch; ++i) {
      const int64_t first = begins[named[i]], end = begins[named[i] + 1];
      TORCH_CHECK(0 <= first && first <= end && end <= x.size(0), "modality ", m, ": sample ", named[i],
                  " has the rows from ", first, " up to ", end, " of ", x.size(0));
      most = std::max(most, end - first);
    }
  }

  const int64_t items = versions * batch;
  std::vector<int64_t> work;
  work.reserve(models * items);
  for (int64_t i = 0, bytes = 0; i < models * items; ++i) {
    for (const Rows& of : of_modality) {
      const int64_t* range = of.batch_starts.const_data_ptr<int64_t>() + i / items * (items + 1) + i % items;
      bytes += (range[1] - range[0]) * of.bytes;
    }
    work.push_back(++bytes);
  }
  parallel_by_work(work, BYTES_PER_THREAD, [&](int64_t begin, int64_t end) {
    const Scratch uniforms((most / 4 + 1 + WIDEST) * 4);
    std::vector<int64_t> order;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t model = i / items, item = i % items, version = item / batch,
                    row = named[model * batch + item % batch];
      const uint64_t key = static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[model]);
      const DrawKey draw{static_cast<uint32_t>(row), epoch, static_cast<uint32_t>(version), static_cast<uint32_t>(key),
                         static_cast<uint32_t>(key >> 32)};
      uint32_t words[2];
      FASTMMKD_CALL(draw_pattern, draw, words);
      const bool* has = present.const_data_ptr<bool>() + row * width;
      const uint64_t subsets = (uint64_t{1} << std::count(has, has + width, true)) - 1;
      const uint64_t subset = (words[0] * subsets >> 32) + 1;  // uniform over 1 .. subsets
      const float p = static_cast<float>(words[1] >> 8) * 0x1p-24f * static_cast<float>(p_max);
      for (size_t m = 0, rank = 0; m < modalities; rank += has[m], ++m) {
        const Rows& of = of_modality[m];
        const int64_t* range = of.batch_starts.const_data_ptr<int64_t>() + model * (items + 1) + item;
        const int64_t* stored = of.starts.const_data_ptr<int64_t>() + row;
        const int64_t room = range[1] - range[0], frames = stored[1] - stored[0], taken = std::min(room, frames);
        bool* mask = of.drawn_mask + model * of.total + range[0];
        char* to = of.drawn + (model * of.total + range[0]) * of.bytes;
        std::memset(mask, 0, room - taken);
        std::memset(to, 0, (room - taken) * of.bytes);
        mask += room - taken;
        to += (room - taken) * of.bytes;
        if (has[m] && (subset >> rank & 1)) {
          std::memcpy(mask, of.mask.const_data_ptr<bool>() + stored[1] - taken, taken);
          FASTMMKD_CALL(draw_uniforms, draw, 1 + (static_cast<uint32_t>(m) << 24), (frames + 3) / 4, uniforms.floats());
          drop(mask, taken, uniforms.floats() + frames - taken, p, exact, order);
        } else {
          std::memset(mask, 0, taken);
        }
        const char* from = static_cast<const char*>(of.features.const_data_ptr()) + (stored[1] - taken) * of.bytes;
        copy_frames(to, from, mask, taken, of.bytes);
      }
    }
  });
  for (const Rows& of : of_modality) {
    for (int64_t model = 0; model < models; ++model) {  // rows of nobody
      const int64_t end = of.batch_starts.const_data_ptr<int64_t>()[model * (items + 1) + items];
      std::memset(of.drawn_mask + model * of.total + end, 0, of.total - end);
      std::memset(of.drawn + (model * of.total + end) * of.bytes, 0, (of.total - end) * of.bytes);
    }
  }
  return {drawn, masks};
}

}  // namespace fastmmkd
