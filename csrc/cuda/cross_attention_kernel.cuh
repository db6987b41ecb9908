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
    for (Size first = 0; first < segment.length; first += THREADS) {
      const int count = shared.present.find(segment, task, first, THREADS);
      if (count > 0) {
        const auto place = [&](int i) { return first + shared.present.frames[i]; };
        shared.key.fill(head_of<T>(segment.key, task), segment.key.frame, task.width, 1.0f, count, place);
        shared.value.fill(head_of<T>(segment.value, task), segment.value.frame, task.width, 1.0f, count, place);
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
  const Task task(a, tiles(a.queries, BLOCK_ROWS<E>));
  const Size start = task.tile * BLOCK_ROWS<E>, first = start + lane_row<E>();
  float query[LANE_ROWS<E>][E];
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    const Size t = smaller(first + i, a.queries - 1);
    read_row(head_of<T>(a.query, task) + t * a.query.frame, task.width, a.scale, query[i]);
  }
  Softmax<E> softmax;
  softmax.clear();
  const bool busy = start + warp_row<E>() < a.queries;
  const bool any = for_keys<E, T>(a, task, shared, [&](int count) {
    if (busy) {
      softmax.add(query, shared, count);
    }
  });
  softmax.join();
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    if (first + i < a.queries) {
      const float share = 1.0f / softmax.total[i];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        softmax.sum[i][e] = any ? softmax.sum[i][e] * share : 0.0f;
      }
      write_row(result_of<T>(a, task, first + i), task.width, 1.0f, softmax.sum[i]);
      if (threadIdx.x % SPLIT == 0) {
        float* statistics = statistics_of(a, task) + first + i;
        statistics[0] = any ? softmax.top[i] : 0.0f;
        statistics[a.queries] = any ? share : 0.0f;
      }
    }
  }
}

// Also leaves a.delta to the next kernel.
template <int E, typename T>
__global__ void __launch_bounds__(THREADS, 1) differentiate_queries(const __grid_constant__ Attention a) {
  FASTMMKD_SHARED(shared, SharedKeys<E>);
  const Task task(a, tiles(a.queries, BLOCK_ROWS<E>));
  const Size start = task.tile * BLOCK_ROWS<E>, first = start + lane_row<E>();
  float query[LANE_ROWS<E>][E], grad[LANE_ROWS<E>][E], sum[LANE_ROWS<E>][E];
  float top[LANE_ROWS<E>], share[LANE_ROWS<E>], delta[LANE_ROWS<E>];
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    const Size t = smaller(first + i, a.queries - 1);
    read_row(head_of<T>(a.query, task) + t * a.query.frame, task.width, a.scale, query[i]);
    read_row(head_of<T>(a.grad, task) + t * a.grad.frame, task.width, 1.0f, grad[i]);
    read_row(head_of<T>(a.out, task) + t * a.out.frame, task.width, 1.0f, sum[i]);
    delta[i] = dot(grad[i], sum[i]);
    top[i] = statistics_of(a, task)[t];
    share[i] = statistics_of(a, task)[a.queries + t];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      sum[i][e] = 0.0f;
    }
  }
  const bool busy = start + warp_row<E>() < a.queries;
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
    if (first + i < a.queries) {
      write_row(result_of<T>(a, task, first + i), task.width, LN2 * a.scale, sum[i]);
      if (threadIdx.x % SPLIT == 0) {
        delta_of(a, task)[first + i] = delta[i];
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

// Keys and values of one tile of frames; frames that are not present get zeros.
template <int E, typename T>
__global__ void __launch_bounds__(THREADS, 1) differentiate_keys(const __grid_constant__ Attention a) {
  FASTMMKD_SHARED(shared, SharedQueries<E>);
  const Task task(a, key_tiles(a, BLOCK_ROWS<E>));
  Size tile = task.tile;
  const Segment& segment = a.segments[segment_of(a, BLOCK_ROWS<E>, tile)];
  const Size start = tile * BLOCK_ROWS<E>;
  const int count = shared.present.find(segment, task, start, BLOCK_ROWS<E>);
  T* grad_key = key_result_of<T>(a, task, segment, segment.grad_key);
  T* grad_value = key_result_of<T>(a, task, segment, segment.grad_value);
  for (int i = threadIdx.x; i < BLOCK_ROWS<E> * task.width; i += THREADS) {
    const Size frame = start + i / task.width;
    if (frame < segment.length && !is_present(segment, task, frame)) {
      assign(grad_key[frame * a.width + i % task.width], 0.0f);
      assign(grad_value[frame * a.width + i % task.width], 0.0f);
    }
  }
  if (count == 0) {
    return;
  }
  float key[LANE_ROWS<E>][E], value[LANE_ROWS<E>][E], key_sum[LANE_ROWS<E>][E], value_sum[LANE_ROWS<E>][E];
#pragma unroll
  for (int i = 0; i < LANE_ROWS<E>; ++i) {
    const Size frame = start + shared.present.frames[smaller(lane_row<E>() + i, count - 1)];
    read_row(head_of<T>(segment.key, task) + frame * segment.key.frame, task.width, 1.0f, key[i]);
    read_row(head_of<T>(segment.value, task) + frame * segment.value.frame, task.width, 1.0f, value[i]);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      key_sum[i][e] = value_sum[i][e] = 0.0f;
    }
  }
  const bool busy = warp_row<E>() < count;
  for (Size first = 0; first < a.queries; first += THREADS) {
    const int queries = static_cast<int>(smaller(a.queries - first, Size{THREADS}));
    const auto place = [&](int i) { return first + i; };
    __syncthreads();  // the queries before these are done with
    shared.query.fill(head_of<T>(a.query, task), a.query.frame, task.width, a.scale, queries, place);
    shared.grad.fill(head_of<T>(a.grad, task), a.grad.frame, task.width, 1.0f, queries, place);
    if (threadIdx.x < queries) {
      shared.top[threadIdx.x] = statistics_of(a, task)[first + threadIdx.x];
      shared.share[threadIdx.x] = statistics_of(a, task)[a.queries + first + threadIdx.x];
      shared.delta[threadIdx.x] = delta_of(a, task)[first + threadIdx.x];
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
      const Size frame = start + shared.present.frames[lane_row<E>() + i];
      write_row(grad_key + frame * a.width, task.width, LN2, key_sum[i]);
      write_row(grad_value + frame * a.width, task.width, 1.0f, value_sum[i]);
    }
  }
}

}  // namespace fastmmkd::cuda
