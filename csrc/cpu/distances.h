// The sides of a loss over the distances of all pairs of rows: rows as they are, and around a centre that both share.
//
// Around the centre distances and pulls are matrix products, |s|^2 + |t|^2 - 2 s.t; where these cancel, a pair is taken
// from the rows as they are, by differences.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/pairs.h"

namespace fastmmkd {

// Rows of a side in one group, from one of them on: as they are and centred, [rows, stride], the squared lengths of the
// centred ones, [rows], and their panels, see Side.
struct Points {
  int64_t width, stride;
  const float *rows, *centred, *squares, *panels;

  // From a row on; panels only where it begins one.
  Points from(int64_t row) const {
    return {width, stride, rows + row * stride, centred + row * stride, squares + row, panels + row * width};
  }
};

// [groups, width]: the mean row of both sides; 0 where it is not finite.
inline std::vector<float> common_centre(const Side& a, const Side& b) {
  std::vector<float> centre(a.groups * a.width, 0.0f);
  for (int64_t group = 0; group < a.groups; ++group) {
    float* mean = centre.data() + group * a.width;
    for (const Side* side : {&a, &b}) {
      for (int64_t row = 0; row < side->count; ++row) {
        const float* values = side->rows(group) + row * side->stride;
        for (int64_t k = 0; k < side->width; ++k) {
          mean[k] += values[k];
        }
      }
    }
    for (int64_t k = 0; k < a.width; ++k) {
      mean[k] /= static_cast<float>(a.count + b.count);
      mean[k] = std::isfinite(mean[k]) ? mean[k] : 0.0f;
    }
  }
  return centre;
}

// A side, which must outlive it, around a centre [groups, width].
class Centred {
 public:
  Centred(const Side& side, const std::vector<float>& centre, bool panels)
      : side_(side),
        rows_(side.groups * side.panel_count * PANEL),
        centred_(rows_ * side.stride),
        squares_(rows_),
        panels_(panels ? rows_ * side.width : 0) {
    std::memset(centred_.floats(), 0, rows_ * side.stride * sizeof(float));
    std::memset(squares_.floats(), 0, rows_ * sizeof(float));
    for (int64_t group = 0; group < side.groups; ++group) {
      const int64_t first = group * side.panel_count * PANEL;
      for (int64_t row = 0; row < side.count; ++row) {
        const float* from = side.rows(group) + row * side.stride;
        float* to = centred_.floats() + (first + row) * side.stride;
        for (int64_t k = 0; k < side.width; ++k) {
          to[k] = from[k] - centre[group * side.width + k];
        }
        squares_.floats()[first + row] = squared_length(to, side.stride);
      }
      if (panels) {
        transpose_panels(centred_.floats() + first * side.stride, side.panel_count, side.width, side.stride,
                         panels_.floats() + first * side.width);
      }
    }
  }

  Points points(int64_t group) const {
    const int64_t first = group * side_.panel_count * PANEL;
    return {side_.width,
            side_.stride,
            side_.rows(group),
            centred_.floats() + first * side_.stride,
            squares_.floats() + first,
            panels_.floats() + first * side_.width};
  }

 private:
  static float squared_length(const float* row, int64_t stride) {
    float parts[16]{}, total = 0.0f;
    for (int64_t k = 0; k < stride; k += 16) {
      for (int64_t l = 0; l < 16; ++l) {
        parts[l] += row[k + l] * row[k + l];
      }
    }
    for (const float part : parts) {
      total += part;
    }
    return total;
  }

  const Side& side_;
  const int64_t rows_;
  const Scratch centred_, squares_, panels_;
};

}  // namespace fastmmkd
