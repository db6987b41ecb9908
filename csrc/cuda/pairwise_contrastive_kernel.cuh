// See pairwise_contrastive.cu.
#pragma once

#include "cuda/device.cuh"

namespace fastmmkd::cuda {

constexpr int CONTRAST_THREADS = 128;
constexpr int PANEL = 32;    // other rows at a time
constexpr int COLUMNS = 64;  // at a time, and of a block's gradient
constexpr int ACROSS = 8;    // threads along a row, each with every eighth other row or column
constexpr int OWN_ROWS = CONTRAST_ROWS / (CONTRAST_THREADS / ACROSS);
constexpr int OWN_OTHERS = PANEL / ACROSS, OWN_COLUMNS = COLUMNS / ACROSS;

struct SharedPairs {
  float row[CONTRAST_ROWS][COLUMNS + 1], other[PANEL][COLUMNS + 1];  // an odd stride: rows start in different banks
  float pull[CONTRAST_ROWS][PANEL + 1];
  double loss[CONTRAST_THREADS];
};

// 32 rows from `first` on and COLUMNS of their columns; zeros where there are none.
template <typename T>
__device__ __forceinline__ void fill(const T* from, Size count, Size width, Size first, Size column,
                                     float (&to)[PANEL][COLUMNS + 1]) {
  for (int i = threadIdx.x; i < PANEL * COLUMNS; i += CONTRAST_THREADS) {
    const int row = i / COLUMNS, k = i % COLUMNS;
    const bool is_there = first + row < count && column + k < width;
    to[row][k] = is_there ? to_float(from[(first + row) * width + column + k]) : 0.0f;
  }
}
static_assert(PANEL == CONTRAST_ROWS, "fill serves both sides");

// A tile of rows against all others: its loss, and COLUMNS columns of its gradient.
template <typename T>
__global__ void __launch_bounds__(CONTRAST_THREADS) contrast_tile(const __grid_constant__ Contrast a) {
  FASTMMKD_SHARED(shared, SharedPairs);
  const int down = threadIdx.x / ACROSS * OWN_ROWS, across = threadIdx.x % ACROSS;
  const Size chunks = tiles(a.width, COLUMNS), parts = a.gradient ? chunks : 1;
  const Size part = blockIdx.x % parts, above = blockIdx.x / parts;
  const Size row_tiles = tiles(a.rows, CONTRAST_ROWS), first = above % row_tiles * CONTRAST_ROWS;
  const Size group = above / row_tiles;
  const T* rows = static_cast<const T*>(a.row) + group * a.rows * a.width;
  const T* others = static_cast<const T*>(a.other) + group * a.others * a.width;
  float gradient[OWN_ROWS][OWN_COLUMNS] = {};
  double loss = 0.0;
  for (Size panel = 0; panel < a.others; panel += PANEL) {
    float squared[OWN_ROWS][OWN_OTHERS] = {};
    for (Size step = 1; step <= chunks; ++step) {
      const Size column = (part + step) % chunks * COLUMNS;  // its own come last, and stay for the gradient
      __syncthreads();
      fill(rows, a.rows, a.width, first, column, shared.row);
      fill(others, a.others, a.width, panel, column, shared.other);
      __syncthreads();
      const int columns = a.width - column < COLUMNS ? static_cast<int>(a.width - column) : COLUMNS;
      for (int k = 0; k < columns; ++k) {
#pragma unroll
        for (int j = 0; j < OWN_OTHERS; ++j) {
          const float other = shared.other[across + j * ACROSS][k];
#pragma unroll
          for (int i = 0; i < OWN_ROWS; ++i) {
            const float difference = shared.row[down + i][k] - other;
            squared[i][j] += difference * difference;
          }
        }
      }
    }
    float lost = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) {
      const Size row = first + down + i;
#pragma unroll
      for (int j = 0; j < OWN_OTHERS; ++j) {
        const Size other = panel + across + j * ACROSS;
        float pull = 0.0f;
        if (row < a.rows && other == row + a.shift) {
          pull = a.own_weight;
          lost += a.own_weight * squared[i][j];
        } else if (row < a.rows && other < a.others) {
          const float distance = sqrtf(squared[i][j]), inside = a.eta - distance;
          const float margin = inside < 0.0f ? 0.0f : inside;  // a NaN stays one
          pull = squared[i][j] == 0.0f ? 0.0f : -margin / distance;
          lost += margin * margin;
        }
        shared.pull[down + i][across + j * ACROSS] = pull;
      }
    }
    loss += lost;
    __syncthreads();
    for (int j = 0; a.gradient && j < PANEL; ++j) {
#pragma unroll
      for (int i = 0; i < OWN_ROWS; ++i) {
        const float pull = shared.pull[down + i][j];
        if (pull != 0.0f) {
#pragma unroll
          for (int k = 0; k < OWN_COLUMNS; ++k) {
            const int column = across + k * ACROSS;
            gradient[i][k] += pull * (shared.row[down + i][column] - shared.other[j][column]);
          }
        }
      }
    }
  }
  for (int i = 0; a.gradient && i < OWN_ROWS; ++i) {
    for (int k = 0; k < OWN_COLUMNS; ++k) {
      const Size row = first + down + i, column = part * COLUMNS + across + k * ACROSS;
      if (row < a.rows && column < a.width) {
        a.gradient[(group * a.rows + row) * a.width + column] = gradient[i][k] * a.scale;
      }
    }
  }
  if (a.partial && part == 0) {
    shared.loss[threadIdx.x] = loss;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0.0;
      for (int i = 0; i < CONTRAST_THREADS; ++i) {
        total += shared.loss[i];
      }
      a.partial[above] = total;
    }
  }
}

// A thread per group.
__global__ void __launch_bounds__(WARP) sum_tiles(const double* partial, Size groups, Size count, double divisor,
                                                  float* loss) {
  const Size group = static_cast<Size>(blockIdx.x) * WARP + threadIdx.x;
  if (group < groups) {
    double total = 0.0;
    for (Size i = 0; i < count; ++i) {
      total += partial[group * count + i];
    }
    loss[group] = static_cast<float>(total / divisor);
  }
}

}  // namespace fastmmkd::cuda
