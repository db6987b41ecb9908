// Attention with heads of more than 16 and up to WIDEST_HEAD features: a warp per row, its lanes the features.
// The papers have no such heads; this is here so that no configuration fails.
#pragma once

#include "cuda/cross_attention_task.cuh"

namespace fastmmkd::cuda {

constexpr int SLICES = WIDEST_HEAD / WARP;  // features of a lane
constexpr int WARPS = THREADS / WARP;       // rows of a block

struct WideRow {
  float at[SLICES];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      at[i] = 0.0f;
    }
  }

  template <typename T>
  __device__ __forceinline__ void read(const T* from, int width, float scale) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      const int e = threadIdx.x % WARP + i * WARP;
      at[i] = e < width ? scale * to_float(from[e]) : 0.0f;
    }
  }

  template <typename T>
  __device__ __forceinline__ void write(T* to, int width, float scale) const {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      const int e = threadIdx.x % WARP + i * WARP;
      if (e < width) {
        assign(to[e], scale * at[i]);
      }
    }
  }

  __device__ __forceinline__ float dot(const WideRow& other) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      total += at[i] * other.at[i];
    }
    return lane_sum(total);
  }

  __device__ __forceinline__ void multiply(float factor) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      at[i] *= factor;
    }
  }

  __device__ __forceinline__ void add(float factor, const WideRow& other) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      at[i] += factor * other.at[i];
    }
  }
};

// f(key, value) for every present key of a head; returns whether there was one.
template <typename T, typename F>
__device__ __forceinline__ bool for_wide_keys(const Attention& a, const Task& task, const F& f) {
  const int lane = threadIdx.x % WARP;
  bool any = false;
  for (int s = 0; s < a.segment_count; ++s) {
    const Segment& segment = a.segments[s];
    for (Rows window = rows_of(a, segment.layout, task); window.count > 0; window.first += WARP, window.count -= WARP) {
      const bool here = lane < window.count && is_present(segment, task, window.first + lane);
      for (unsigned left = __ballot_sync(ALL_LANES, here); left != 0; left &= left - 1) {
        const Size row = window.first + __ffs(static_cast<int>(left)) - 1;
        WideRow key, value;
        key.read(head_of<T>(segment.key, task, row), task.width, 1.0f);
        value.read(head_of<T>(segment.value, task, row), task.width, 1.0f);
        f(key, value);
        any = true;
      }
    }
  }
  return any;
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) attend_wide(const __grid_constant__ Attention a) {
  const Size tile_count = tiles(a.layout.longest, WARPS);
  const Task task(a, tile_count);
  const Rows rows = rows_of(a, a.layout, task);
  if (task.sample == a.batch) {
    return clear_output<T>(a, task, rows, tile_count);
  }
  const Size number = task.tile * WARPS + threadIdx.x / WARP, t = rows.first + number;
  if (number >= rows.count) {
    return;
  }
  WideRow query, sum;
  query.read(head_of<T>(a.query, task, t), task.width, a.scale);
  sum.clear();
  float top = minus_infinity(), total = 0.0f;
  const bool any = for_wide_keys<T>(a, task, [&](const WideRow& key, const WideRow& value) {
    const float score = query.dot(key), most = fmaxf(top, score);
    const float factor = exp2f(top - most), p = exp2f(score - most);
    sum.multiply(factor);
    sum.add(p, value);
    total = total * factor + p;
    top = most;
  });
  if (any) {
    sum.multiply(1.0f / total);
  }
  sum.write(result_of<T>(a, a.result, a.layout, task, t), task.width, 1.0f);
  if (threadIdx.x % WARP == 0) {
    statistics_of(a, task, t)[0] = any ? top : 0.0f;
    statistics_of(a, task, t)[a.layout.rows] = any ? 1.0f / total : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) differentiate_wide_queries(const __grid_constant__ Attention a) {
  const Size tile_count = tiles(a.layout.longest, WARPS);
  const Task task(a, tile_count);
  const Rows rows = rows_of(a, a.layout, task);
  if (task.sample == a.batch) {
    return clear<T>(a, a.result, a.layout, task, rows, tile_count);
  }
  const Size number = task.tile * WARPS + threadIdx.x / WARP, t = rows.first + number;
  if (number >= rows.count) {
    return;
  }
  WideRow query, grad, sum;
  query.read(head_of<T>(a.query, task, t), task.width, a.scale);
  grad.read(head_of<T>(a.grad, task, t), task.width, 1.0f);
  sum.read(head_of<T>(a.out, task, t), task.width, 1.0f);
  const float delta = grad.dot(sum);
  const float top = statistics_of(a, task, t)[0], share = statistics_of(a, task, t)[a.layout.rows];
  sum.clear();
  for_wide_keys<T>(a, task, [&](const WideRow& key, const WideRow& value) {
    const float p = exp2f(query.dot(key) - top) * share;
    sum.add(p * (grad.dot(value) - delta), key);
  });
  sum.write(result_of<T>(a, a.result, a.layout, task, t), task.width, LN2 * a.scale);
  if (threadIdx.x % WARP == 0) {
    *delta_of(a, task, t) = delta;
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) differentiate_wide_keys(const __grid_constant__ Attention a) {
  Task task(a, key_tiles(a, WARPS));
  const Segment& segment = a.segments[segment_of(a, WARPS, task.tile)];
  const Rows rows = rows_of(a, segment.layout, task);
  if (task.sample == a.batch) {
    return clear_keys<T>(a, segment, task, rows, tiles(segment.layout.longest, WARPS));
  }
  const Size number = task.tile * WARPS + threadIdx.x / WARP, row = rows.first + number;
  if (number >= rows.count) {
    return;
  }
  WideRow key_sum, value_sum;
  key_sum.clear();
  value_sum.clear();
  if (is_present(segment, task, row)) {
    WideRow key, value, query, grad;
    key.read(head_of<T>(segment.key, task, row), task.width, 1.0f);
    value.read(head_of<T>(segment.value, task, row), task.width, 1.0f);
    const Rows queries = rows_of(a, a.layout, task);
    for (Size t = queries.first; t < queries.first + queries.count; ++t) {
      query.read(head_of<T>(a.query, task, t), task.width, a.scale);
      grad.read(head_of<T>(a.grad, task, t), task.width, 1.0f);
      const float* statistics = statistics_of(a, task, t);
      const float p = exp2f(query.dot(key) - statistics[0]) * statistics[a.layout.rows];
      key_sum.add(p * (grad.dot(value) - *delta_of(a, task, t)), query);
      value_sum.add(p, grad);
    }
  }
  key_sum.write(result_of<T>(a, segment.grad_key, segment.layout, task, row), task.width, LN2);
  value_sum.write(result_of<T>(a, segment.grad_value, segment.layout, task, row), task.width, 1.0f);
}

}  // namespace fastmmkd::cuda
