// Losses over all pairs of the rows of two sides: how the sides lie in memory, and which thread takes which rows.
//
// A tile of rows meets a panel of other rows at a time; sums over the pairs of a row run in the order of the panels and
// never depend on the threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>

#include <cstring>

#include "common/check.h"
#include "common/shapes.h"

namespace fastmmkd {

constexpr int64_t TILE = 8;            // rows
constexpr int64_t PANEL = 32;          // other rows
constexpr int64_t CHUNK = 64;          // rows that meet a panel before the next one is fetched
constexpr int64_t PRODUCTS = 262144;  // pairs times columns worth a thread

// to [panels, width, PANEL]: rows [panels * PANEL, stride], transposed panel by panel.
inline void transpose_panels(const float* rows, int64_t panels, int64_t width, int64_t stride, float* to) {
  for (int64_t row = 0; row < panels * PANEL; ++row) {
    for (int64_t k = 0; k < width; ++k) {
      to[(row / PANEL * width + k) * PANEL + row % PANEL] = rows[row * stride + k];
    }
  }
}

// One side, [groups, count, width], in float32 and in up to two layouts.
class Side {
 public:
  // `panels`: also transposed, panel by panel, for the side whose rows are the others.
  Side(const at::Tensor& x_any, bool panels)
      : groups(x_any.size(0)),
        count(x_any.size(1)),
        width(x_any.size(2)),
        stride((width + 15) / 16 * 16),
        panel_count((count + PANEL - 1) / PANEL),
        rows_(groups * panel_count * PANEL * stride),
        transposed_(panels ? groups * panel_count * PANEL * width : 0) {
    const at::Tensor x = x_any.to(at::kFloat).contiguous();
    const float* from = x.const_data_ptr<float>();
    std::memset(rows_.floats(), 0, groups * panel_count * PANEL * stride * sizeof(float));
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t row = 0; row < count; ++row) {
        const float* source = from + (group * count + row) * width;
        std::memcpy(rows_.floats() + (group * panel_count * PANEL + row) * stride, source, width * sizeof(float));
      }
      if (panels) {
        float* to = transposed_.floats() + group * panel_count * PANEL * width;
        transpose_panels(rows(group), panel_count, width, stride, to);
      }
    }
  }

  // [count, stride]; zero beyond `width` columns, and in the rows that complete the last panel.
  const float* rows(int64_t group) const { return rows_.floats() + group * panel_count * PANEL * stride; }
  // [panels, width, PANEL]; zero where there is no row.
  const float* panels(int64_t group) const { return transposed_.floats() + group * panel_count * PANEL * width; }

  const int64_t groups, count, width, stride, panel_count;

 private:
  const Scratch rows_, transposed_;
};

// f(group, first row, end row, work) for every chunk of rows of `side` and a thread's `floats` of memory per row.
template <typename F>
void for_chunks(const Side& side, int64_t others, int64_t floats, const F& f) {
  const int64_t tiles = at::divup(side.count, TILE);
  const int64_t grain = PRODUCTS / (TILE * std::max<int64_t>(others * side.width, 1)) + 1;
  at::parallel_for(0, side.groups * tiles, grain, [&](int64_t begin, int64_t end) {
    const Scratch work(CHUNK * floats);
    while (begin < end) {
      const int64_t group = begin / tiles;
      const int64_t stop = std::min({end, (group + 1) * tiles, begin + CHUNK / TILE});
      f(group, (begin - group * tiles) * TILE, std::min((stop - group * tiles) * TILE, side.count), work.floats());
      begin = stop;
    }
  });
}

}  // namespace fastmmkd
