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

// One head of one sample, and a tile of its rows.
struct Task {
  Size group, row, tile;
  int head, width;  // of the head

  __device__ __forceinline__ Task(const Attention& a, Size tile_count) {
    const Size above = blockIdx.x / tile_count, sample = above / a.heads;
    tile = blockIdx.x % tile_count;
    head = static_cast<int>(above % a.heads);
    group = sample / a.batch;
    row = sample % a.batch;
    width = static_cast<int>(a.width / a.heads);
  }
};

template <typename T>
__device__ __forceinline__ const T* head_of(const View& view, const Task& task) {
  return static_cast<const T*>(view.data) + task.group * view.group + task.row * view.row + task.head * task.width;
}

// Row t of this head in a.result.
template <typename T>
__device__ __forceinline__ T* result_of(const Attention& a, const Task& task, Size t) {
  const Size sample = task.group * a.batch + task.row;
  return static_cast<T*>(a.result) + (sample * a.queries + t) * a.width + task.head * task.width;
}

// This head in a gradient of keys or values.
template <typename T>
__device__ __forceinline__ T* key_result_of(const Attention& a, const Task& task, const Segment& segment, void* data) {
  const Size sample = task.group * a.batch + task.row;
  return static_cast<T*>(data) + sample * segment.length * a.width + task.head * task.width;
}

__device__ __forceinline__ float* delta_of(const Attention& a, const Task& task) {
  return a.delta + ((task.group * a.batch + task.row) * a.heads + task.head) * a.queries;
}

__device__ __forceinline__ float* statistics_of(const Attention& a, const Task& task) {
  return a.statistics + ((task.group * a.batch + task.row) * a.heads + task.head) * 2 * a.queries;
}

__device__ __forceinline__ bool is_present(const Segment& segment, const Task& task, Size frame) {
  const View& mask = segment.mask;
  const Size at = task.group * mask.group + task.row * mask.row + frame * mask.frame;
  return static_cast<const unsigned char*>(mask.data)[at] != 0;
}

// Tiles of `size` frames, none of which spans two segments.
FASTMMKD_HOST_DEVICE inline Size key_tiles(const Attention& a, Size size) {
  Size count = 0;
  for (int s = 0; s < a.segment_count; ++s) {
    count += tiles(a.segments[s].length, size);
  }
  return count;
}

// The segment of a tile, which becomes the tile within that segment.
__device__ __forceinline__ int segment_of(const Attention& a, Size size, Size& tile) {
  int s = 0;
  while (tile >= tiles(a.segments[s].length, size)) {
    tile -= tiles(a.segments[s].length, size);
    ++s;
  }
  return s;
}

// Frames of a window of a segment that may be attended to, in order; in shared memory.
struct Present {
  int frames[THREADS], counts[THREADS / WARP];

  // Of the frames [first, first + size), size <= THREADS; returns how many. The whole block takes part, and has been
  // done with the frames found before, and with what was read through them, once it returns.
  __device__ __forceinline__ int find(const Segment& segment, const Task& task, Size first, int size) {
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const bool here = thread < size && first + thread < segment.length && is_present(segment, task, first + thread);
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
      frames[before + __popc(votes & ((1u << lane) - 1))] = thread;
    }
    __syncthreads();
    return total;
  }
};

}  // namespace fastmmkd::cuda
