// Attention over the present keys of one head, for heads of at most E features; see cross_attention.cu.
#pragma once

#include "cuda/cross_attention_task.cuh"

namespace fastmmkd::cuda {

constexpr int SPLIT = 4;  // lanes that share a row, each with every fourth key
constexpr int CHUNK = 4;  // keys of a lane between two looks at the largest score

// Rows (queries, or keys in the last kernel) of a lane: a vector of shared memory serves that many.
template <int E>
constexpr int LANE_ROWS = E <= 10 ? 2 : 1;
template <int E>
constexpr int BLOCK_ROWS = THREADS / SPLIT * LANE_ROWS<E>;

// Floats from one row to the next in shared memory: whole 16 bytes, and four neighbouring rows in different banks.
template <int E>
constexpr int STRIDE = (E + 3) / 4 * 4 + (E > 12 ? 4 : 0);

template <int E>
struct alignas(16) SharedRows {
  float at[THREADS * STRIDE<E>];

  __device__ __forceinline__ void read(int row, float (&to)[E]) const {
    const float* from = at + row * STRIDE<E>;
#pragma unroll
    for (int e = 0; e + 4 <= E; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + e);
      to[e] = four.x;
      to[e + 1] = four.y;
      to[e + 2] = four.z;
      to[e + 3] = four.w;
    }
#pragma unroll
    for (int e = E / 4 * 4; e < E; ++e) {
      to[e] = from[e];
    }
  }

  // Row i is row `place(i)` of `from`, times `scale`; the block shares the work.
  template <typename T, typename F>
  __device__ __forceinline__ void fill(const T* from, Size stride, int width, float scale, int count, const F& place) {
#pragma unroll 2
    for (int i = threadIdx.x; i < count * E; i += THREADS) {
      const int row = i / E, e = i % E;
      at[row * STRIDE<E> + e] = e < width ? scale * to_float(from[place(row) * stride + e]) : 0.0f;
    }
  }
};

template <int E, typename T>
__device__ __forceinline__ void read_row(const T* from, int width, float scale, float (&to)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) {
    to[e] = e < width ? scale * to_float(from[e]) : 0.0f;
  }
}

// Every lane of a row has all of it, and writes its share.
template <int E, typename T>
__device__ __forceinline__ void write_row(T* to, int width, float scale, const float (&from)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) {
    if (e % SPLIT == threadIdx.x % SPLIT && e < width) {
      assign(to[e], scale * from[e]);
    }
  }
}

template <int E>
__device__ __forceinline__ float dot(const float (&a)[E], const float (&b)[E]) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    total += a[e] * b[e];
  }
  return total;
}

// The present keys and values of a head, up to THREADS of them at a time, in shared memory.
template <int E>
struct SharedKeys {
  Present present;
  SharedRows<E> key, value;
};

// f(count) for every window of keys that is not empty; the whole block takes part. Returns whether there was one.
template <int E, typename T, typename F>
__device__ __forceinline__ bool for_keys(const Attention& a, const Task& task, SharedKeys<E>& shared, const F& f) {
  bool any = false;
  for (int s = 0; s < a.segment_count; ++s) {
    const Segment& segment = a.segments[s];
    for (Rows window = rows_of(a, segment.layout, task); window.count > 0;
         window.first += THREADS, window.count -= THREADS) {
      const int count = shared.present.find(segment, task, window, THREADS);
      if (count > 0) {
        const auto place = [&](int i) { return shared.present.rows[i]; };
        const T* key = head_of<T>(segment.key, task, window.first);
        const T* value = head_of<T>(segment.value, task, window.first);
        shared.key.fill(key, segment.key.row, task.width, 1.0f, count, place);
        shared.value.fill(value, segment.value.row, task.width, 1.0f, count, place);
        __syncthreads();
        f(count);
        any = true;
      }
    }
  }
  return any;
}

// The softmax of a lane's rows over the keys that it has met.
template <int E>
struct Softmax {
  float top[LANE_ROWS<E>], total[LANE_ROWS<E>], sum[LANE_ROWS<E>][E];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < LANE_ROWS<E>; ++i) {
      top[i] = minus_infinity();
      total[i] = 0.0f;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        sum[i][e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void raise(int i, float to) {
    const float factor = exp2f(top[i] - to);
    top[i] = to;
    total[i] *= factor;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      sum[i][e] *= factor;
    }
  }

  __device__ __forceinline__ void add(const float (&query)[LANE_ROWS<E>][E], const SharedKeys<E>& keys, int count) {
    for (int first = threadIdx.x % SPLIT; first < count; first += SPLIT * CHUNK) {
      float score[LANE_ROWS<E>][CHUNK], row[E];
#pragma unroll
      for (int c = 0; c < CHUNK; ++c) {
        const int j = first + c * SPLIT;
        keys.key.read(j < count ? j : first, row);
#pragma unroll
        for (int i = 0; i < LANE_ROWS<E>; ++i) {
          score[i][c] = j < count ? dot(query[i], row) : minus_infinity();
        }
      }
#pragma unroll
      for (int i = 0; i < LANE_ROWS<E>; ++i) {
        float most = top[i];
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) {
          most = fmaxf(most, score[i][c]);
        }
        raise(i, most);
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) {
          score[i][c] = exp2f(score[i][c] - most);
          total[i] += score[i][c];
        }
      }
#pragma unroll
      for (int c = 0; c < CHUNK; ++c) {
        const int j = first + c * SPLIT;
        keys.value.read(j < count ? j : first, row);
#pragma unroll
        for (int i = 0; i < LANE_ROWS<E>; ++i) {
#pragma unroll
          for (int e = 0; e < E; ++e) {
            sum[i][e] += score[i][c] * row[e];
          }
        }
      }
    }
  }

  // All lanes of a row get the whole of it.
  __device__ __forceinline__ void join() {
#pragma unroll
    for (int i = 0; i < LANE_ROWS<E>; ++i) {
      raise(i, lane_maximum<SPLIT>(top[i]));
      total[i] = lane_sum<SPLIT>(total[i]);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        sum[i][e] = lane_sum<SPLIT>(sum[i][e]);
      }
    }
  }
};

// The first row of this lane within the block.
template <int E>
__device__ __forceinline__ int lane_row() {
  return threadIdx.x / SPLIT * LANE_ROWS<E>;
}

// The first row of this warp, which has nothing to do where there is none.
template <int E>
__device__ __forceinline__ int warp_row() {
  return threadIdx.x / WARP * (WARP / SPLIT) * LANE_ROWS<E>;
}

template <int E, typename T>
__global__ void __launch_bounds__(THREADS, 1) attend_rows(const __grid_constant__ Attention a) {
  FASTMMKD_SHARED(shared, SharedKeys<E>);
  const Size tile_count = tiles(a.layout.longest, BLOCK_ROWS<E>);
  const Task task(a, tile_count);
  const Rows rows = rows_of(a, a.layout, task);
  if (task.sample == a.batch) {
    return clear_output<T>(a, task, rows, tile_count);
  }
  if (task.tile * BLOCK_ROWS<E> >= rows.count) {
    return;
  }
  const int start = static_cast<int>(task.tile) * BLOCK_ROWS<E>, first = start + lane_row<E>();
  float query[LANE_ROWS<E>][E];
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    const Size t = rows.first + smaller(first + i, rows.count - 1);
    read_row(head_of<T>(a.query, task, t), task.width, a.scale, query[i]);
  }
  Softmax<E> softmax;
  softmax.clear();
  const bool busy = start + warp_row<E>() < rows.count;
  const bool any = for_keys<E, T>(a, task, shared, [&](int count) {
    if (busy) {
      softmax.add(query, shared, count);
    }
  });
  softmax.join();
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    if (first + i < rows.count) {
      const float share = 1.0f / softmax.total[i];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        softmax.sum[i][e] = any ? softmax.sum[i][e] * share : 0.0f;
      }
      const Size t = rows.first + first + i;
      write_row(result_of<T>(a, a.result, a.layout, task, t), task.width, 1.0f, softmax.sum[i]);
      if (threadIdx.x % SPLIT == 0) {
        float* statistics = statistics_of(a, task, t);
        statistics[0] = any ? softmax.top[i] : 0.0f;
        statistics[a.layout.rows] = any ? share : 0.0f;
      }
    }
  }
}

// Also leaves a.delta to the next kernel.
template <int E, typename T>
__global__ void __launch_bounds__(THREADS, 1) differentiate_queries(const __grid_constant__ Attention a) {
  FASTMMKD_SHARED(shared, SharedKeys<E>);
  const Size tile_count = tiles(a.layout.longest, BLOCK_ROWS<E>);
  const Task task(a, tile_count);
  const Rows rows = rows_of(a, a.layout, task);
  if (task.sample == a.batch) {
    return clear<T>(a, a.result, a.layout, task, rows, tile_count);
  }
  if (task.tile * BLOCK_ROWS<E> >= rows.count) {
    return;
  }
  const int start = static_cast<int>(task.tile) * BLOCK_ROWS<E>, first = start + lane_row<E>();
  float query[LANE_ROWS<E>][E], grad[LANE_ROWS<E>][E], sum[LANE_ROWS<E>][E];
  float top[LANE_ROWS<E>], share[LANE_ROWS<E>], delta[LANE_ROWS<E>];
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    const Size t = rows.first + smaller(first + i, rows.count - 1);
    read_row(head_of<T>(a.query, task, t), task.width, a.scale, query[i]);
    read_row(head_of<T>(a.grad, task, t), task.width, 1.0f, grad[i]);
    read_row(head_of<T>(a.out, task, t), task.width, 1.0f, sum[i]);
    delta[i] = dot(grad[i], sum[i]);
    top[i] = statistics_of(a, task, t)[0];
    share[i] = statistics_of(a, task, t)[a.layout.rows];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      sum[i][e] = 0.0f;
    }
  }
  const bool busy = start + warp_row<E>() < rows.count;
  for_keys<E, T>(a, task, shared, [&](int count) {
    for (int j = threadIdx.x % SPLIT; busy && j < count; j += SPLIT) {
      float key[E], value[E];
      shared.key.read(j, key);
      shared.value.read(j, value);
#pragma unroll
      for (int i = 0; i < LANE_ROWS<E>; ++i) {
        const float p = exp2f(dot(query[i], key) - top[i]) * share[i];
        const float pull = p * (dot(grad[i], value) - delta[i]);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          sum[i][e] += pull * key[e];
        }
      }
    }
  });
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      sum[i][e] = lane_sum<SPLIT>(sum[i][e]);
    }
    if (first + i < rows.count) {
      const Size t = rows.first + first + i;
      write_row(result_of<T>(a, a.result, a.layout, task, t), task.width, LN2 * a.scale, sum[i]);
      if (threadIdx.x % SPLIT == 0) {
        *delta_of(a, task, t) = delta[i];
      }
    }
  }
}

// Up to THREADS queries of a head with all that backward wants of them.
template <int E>
struct SharedQueries {
  Present present;
  SharedRows<E> query, grad;
  float top[THREADS], share[THREADS], delta[THREADS];
};

// Keys and values of one tile of rows; rows that are not present get zeros.
template <int E, typename T>
__global__ void __launch_bounds__(THREADS, 1) differentiate_keys(const __grid_constant__ Attention a) {
  FASTMMKD_SHARED(shared, SharedQueries<E>);
  Task task(a, key_tiles(a, BLOCK_ROWS<E>));
  const Segment& segment = a.segments[segment_of(a, BLOCK_ROWS<E>, task.tile)];
  Rows rows = rows_of(a, segment.layout, task);
  if (task.sample == a.batch) {
    return clear_keys<T>(a, segment, task, rows, tiles(segment.layout.longest, BLOCK_ROWS<E>));
  }
  if (task.tile * BLOCK_ROWS<E> >= rows.count) {
    return;
  }
  rows.first += task.tile * BLOCK_ROWS<E>;
  rows.count -= static_cast<int>(task.tile) * BLOCK_ROWS<E>;
  const int count = shared.present.find(segment, task, rows, BLOCK_ROWS<E>);
  T* grad_key = result_of<T>(a, segment.grad_key, segment.layout, task, rows.first);
  T* grad_value = result_of<T>(a, segment.grad_value, segment.layout, task, rows.first);
  for (int i = threadIdx.x; i < smaller(rows.count, BLOCK_ROWS<E>) * task.width; i += THREADS) {
    const int row = i / task.width;
    if (!is_present(segment, task, rows.first + row)) {
      assign(grad_key[row * a.width + i % task.width], 0.0f);
      assign(grad_value[row * a.width + i % task.width], 0.0f);
    }
  }
  if (count == 0) {
    return;
  }
  float key[LANE_ROWS<E>][E], value[LANE_ROWS<E>][E], key_sum[LANE_ROWS<E>][E], value_sum[LANE_ROWS<E>][E];
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    const Size row = rows.first + shared.present.rows[smaller(lane_row<E>() + i, count - 1)];
    read_row(head_of<T>(segment.key, task, row), task.width, 1.0f, key[i]);
    read_row(head_of<T>(segment.value, task, row), task.width, 1.0f, value[i]);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      key_sum[i][e] = value_sum[i][e] = 0.0f;
    }
  }
  const bool busy = warp_row<E>() < count;
  for (Rows window = rows_of(a, a.layout, task); window.count > 0; window.first += THREADS, window.count -= THREADS) {
    const int queries = smaller(window.count, THREADS);
    const auto place = [](int i) { return i; };
    __syncthreads();  // the queries before these are done with
    const T* head_query = head_of<T>(a.query, task, window.first);
    const T* head_grad = head_of<T>(a.grad, task, window.first);
    shared.query.fill(head_query, a.query.row, task.width, a.scale, queries, place);
    shared.grad.fill(head_grad, a.grad.row, task.width, 1.0f, queries, place);
    if (threadIdx.x < queries) {
      const Size t = window.first + threadIdx.x;
      shared.top[threadIdx.x] = statistics_of(a, task, t)[0];
      shared.share[threadIdx.x] = statistics_of(a, task, t)[a.layout.rows];
      shared.delta[threadIdx.x] = *delta_of(a, task, t);
    }
    __syncthreads();
    for (int j = threadIdx.x % SPLIT; busy && j < queries; j += SPLIT) {
      float query[E], grad[E];
      shared.query.read(j, query);
      shared.grad.read(j, grad);
#pragma unroll
      for (int i = 0; i < LANE_ROWS<E>; ++i) {
        const float p = exp2f(dot(query, key[i]) - shared.top[j]) * shared.share[j];
        const float pull = p * (dot(grad, value[i]) - shared.delta[j]);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          key_sum[i][e] += pull * query[e];
          value_sum[i][e] += p * grad[e];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      key_sum[i][e] = lane_sum<SPLIT>(key_sum[i][e]);
      value_sum[i][e] = lane_sum<SPLIT>(value_sum[i][e]);
    }
    if (lane_row<E>() + i < count) {
      const int row = shared.present.rows[lane_row<E>() + i];
      write_row(grad_key + row * a.width, task.width, LN2, key_sum[i]);
      write_row(grad_value + row * a.width, task.width, 1.0f, value_sum[i]);
    }
  }
}

}  // namespace fastmmkd::cuda
