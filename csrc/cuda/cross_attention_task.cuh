// What part of an attention a block has, and where its tensors are.
#pragma once

#include "cuda/device.cuh"

namespace fastmmkd::cuda {

constexpr int THREADS = 128;

__device__ __forceinline__ float minus_infinity() {
  return __int_as_float(0xff800000);
}

template <typename N>
__device__ __forceinline__ N smaller(N a, N b) {
  return a < b ? a : b;
}

// One head of one sample, and a tile of its rows. Sample B is nobody.
struct Task {
  Size group, sample, tile;
  int head, width;  // of the head

  __device__ __forceinline__ Task(const Attention& a, Size tile_count) {
    const Size above = blockIdx.x / tile_count, whose = above / a.heads;
    tile = blockIdx.x % tile_count;
    head = static_cast<int>(above % a.heads);
    group = whose / (a.batch + 1);
    sample = whose % (a.batch + 1);
    width = static_cast<int>(a.width / a.heads);
  }
};

// Rows that follow each other.
struct Rows {
  Size first;
  int count;
};

// Of the task's sample.
__device__ __forceinline__ Rows rows_of(const Attention& a, const Layout& layout, const Task& task) {
  const Size* start = layout.starts + task.group / layout.sharing * (a.batch + 1) + task.sample;
  const Size end = task.sample < a.batch ? start[1] : layout.rows;
  return {start[0], static_cast<int>(end - start[0])};
}

// A row of this head.
template <typename T>
__device__ __forceinline__ const T* head_of(const View& view, const Task& task, Size row) {
  return static_cast<const T*>(view.data) + task.group / view.sharing * view.group + row * view.row +
         task.head * task.width;
}

// A row of this head in a result, which has the layout's rows and is contiguous.
template <typename T>
__device__ __forceinline__ T* result_of(const Attention& a, void* data, const Layout& layout, const Task& task,
                                        Size row) {
  return static_cast<T*>(data) + (task.group * layout.rows + row) * a.width + task.head * task.width;
}

__device__ __forceinline__ float* delta_of(const Attention& a, const Task& task, Size row) {
  return a.delta + (task.group * a.heads + task.head) * a.layout.rows + row;
}

// The largest score of a row; the sum's inverse comes a.layout.rows later.
__device__ __forceinline__ float* statistics_of(const Attention& a, const Task& task, Size row) {
  return a.statistics + (task.group * a.heads + task.head) * 2 * a.layout.rows + row;
}

__device__ __forceinline__ bool is_present(const Segment& segment, const Task& task, Size row) {
  const View& mask = segment.mask;
  return static_cast<const unsigned char*>(mask.data)[task.group / mask.sharing * mask.group + row * mask.row] != 0;
}

// Zeros to this head in rows, which the blocks of a head divide among themselves.
template <typename T>
__device__ __forceinline__ void clear(const Attention& a, void* data, const Layout& layout, const Task& task,
                                      const Rows& rows, Size tile_count) {
  T* to = result_of<T>(a, data, layout, task, rows.first);
  const Size count = Size{rows.count} * task.width;
  for (Size i = task.tile * THREADS + threadIdx.x; i < count; i += tile_count * THREADS) {
    assign(to[i / task.width * a.width + i % task.width], 0.0f);
  }
}

// The same to the output and its statistics.
template <typename T>
__device__ __forceinline__ void clear_output(const Attention& a, const Task& task, const Rows& rows, Size tile_count) {
  clear<T>(a, a.result, a.layout, task, rows, tile_count);
  float* statistics = statistics_of(a, task, rows.first);
  for (Size i = task.tile * THREADS + threadIdx.x; i < rows.count; i += tile_count * THREADS) {
    statistics[i] = statistics[a.layout.rows + i] = 0.0f;
  }
}

// The same to the gradients of keys and values.
template <typename T>
__device__ __forceinline__ void clear_keys(const Attention& a, const Segment& segment, const Task& task,
                                           const Rows& rows, Size tile_count) {
  clear<T>(a, segment.grad_key, segment.layout, task, rows, tile_count);
  clear<T>(a, segment.grad_value, segment.layout, task, rows, tile_count);
}

// Tiles of `size` rows of the longest samples, none of which spans two segments.
FASTMMKD_HOST_DEVICE inline Size key_tiles(const Attention& a, Size size) {
  Size count = 0;
  for (int s = 0; s < a.segment_count; ++s) {
    count += tiles(a.segments[s].layout.longest, size);
  }
  return count;
}

// The segment of a tile, which becomes the tile within that segment.
__device__ __forceinline__ int segment_of(const Attention& a, Size size, Size& tile) {
  int s = 0;
  while (tile >= tiles(a.segments[s].layout.longest, size)) {
    tile -= tiles(a.segments[s].layout.longest, size);
    ++s;
  }
  return s;
}

// Rows of a window of a segment that may be attended to, in order; in shared memory.
struct Present {
  int rows[THREADS], counts[THREADS / WARP];

  // Of the window's first `size` rows, size <= THREADS; returns how many. The whole block takes part, and has been done
  // with the rows found before, and with what was read through them, once it returns.
  __device__ __forceinline__ int find(const Segment& segment, const Task& task, const Rows& window, int size) {
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const bool here = thread < smaller(window.count, size) && is_present(segment, task, window.first + thread);
    const unsigned votes = __ballot_sync(ALL_LANES, here);
    if (lane == 0) {
      counts[warp] = __popc(votes);
    }
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < THREADS / WARP; ++w) {
      before += w < warp ? counts[w] : 0;
      total += counts[w];
    }
    if (here) {
      rows[before + __popc(votes & ((1u << lane) - 1))] = thread;
    }
    __syncthreads();
    return total;
  }
};

}  // namespace fastmmkd::cuda
