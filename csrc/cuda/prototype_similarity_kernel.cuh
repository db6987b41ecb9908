// See prototype_similarity.cu.
#pragma once

#include "cuda/device.cuh"

namespace fastmmkd::cuda {

constexpr int PROTOTYPE_THREADS = 512;
constexpr int PROTOTYPE_WARPS = PROTOTYPE_THREADS / WARP;

// The length of a vector in two factors, whose product may be out of range; 0 and 0 of a zero vector.
struct Length {
  float largest, scaled;

  // Dividing by the largest element first keeps the squares in range.
  __device__ __forceinline__ float direction(float x) const { return scaled == 0.0f ? 0.0f : x / largest / scaled; }

  // From the gradient in a direction to that in the vector; `along` is its product with the direction.
  __device__ __forceinline__ float through(float gradient, float direction, float along) const {
    return scaled == 0.0f ? 0.0f : (gradient - along * direction) / scaled / largest;
  }
};

// Of x(0) .. x(width - 1); a warp takes part and has it in every lane.
template <typename F>
__device__ __forceinline__ Length length_of(Size width, const F& x) {
  float most = 0.0f;
  bool has_nan = false;
#pragma unroll 1
  for (Size i = threadIdx.x % WARP; i < width; i += WARP) {
    most = fmaxf(most, fabsf(x(i)));
    has_nan |= x(i) != x(i);
  }
  const float largest = lane_maximum(most);
  if (!__any_sync(ALL_LANES, has_nan) && largest < 1.17549435e-38f) {
    return {0.0f, 0.0f};
  }
  float squares = 0.0f;
#pragma unroll 1
  for (Size i = threadIdx.x % WARP; i < width; i += WARP) {
    const float scaled = x(i) / largest;
    squares += scaled * scaled;
  }
  return {largest, sqrtf(lane_sum(squares))};
}

// A group's part of the scratch, see prototype_scratch.
struct Space {
  float *members, *difference;  // [K]; [N, K], the student's similarity less the teacher's
  float *prototype[2], *pull[2];
  Length *length[2], *row_length[2];

  __device__ Space(const Prototypes& a, Size group) {
    float* at = a.scratch + group * prototype_scratch(a.rows, a.width, a.count);
    for (int network = 0; network < 2; ++network) {
      length[network] = reinterpret_cast<Length*>(at);
      row_length[network] = length[network] + a.count;
      prototype[network] = reinterpret_cast<float*>(row_length[network] + a.rows);
      pull[network] = prototype[network] + a.count * a.width;
      at = pull[network] + a.count * a.width;
    }
    members = at;
    difference = members + a.count;
  }
};

// Class sizes, and the sums of rows by class; a warp has 32 columns of one class of one network.
template <typename T>
__device__ __forceinline__ void sum_classes(const Prototypes& a, Size group, const Space& space) {
  const int lane = threadIdx.x % WARP;
  const Size chunks = tiles(a.width, WARP), tasks = 2 * a.count * chunks;
  for (Size task = threadIdx.x / WARP; task < tasks; task += PROTOTYPE_WARPS) {
    const int network = task % 2;
    const Size k = task / 2 % a.count, column = task / 2 / a.count * WARP + lane;
    const T* x = static_cast<const T*>(a.x[network]) + group * a.rows * a.width;
    float total = 0.0f;
    int members = 0;
    for (Size first = 0; first < a.rows; first += WARP) {
      const bool is_member = first + lane < a.rows && a.classes[group * a.rows + first + lane] == k;
      const unsigned votes = __ballot_sync(ALL_LANES, is_member);
      float sum = 0.0f;  // of a few rows, so that long sums lose little
      for (unsigned left = votes; left != 0 && column < a.width; left &= left - 1) {
        const Size row = first + __ffs(static_cast<int>(left)) - 1;
        sum += to_float(x[row * a.width + column]);
      }
      total += sum;
      members += __popc(votes);
    }
    if (column < a.width) {
      space.prototype[network][k * a.width + column] = total / static_cast<float>(members > 1 ? members : 1);
    }
    if (network == 0 && column == 0) {
      space.members[k] = static_cast<float>(members);
    }
  }
}

// The means become directions; a warp has one.
__device__ __forceinline__ void direct_prototypes(const Prototypes& a, const Space& space) {
  for (Size task = threadIdx.x / WARP; task < 2 * a.count; task += PROTOTYPE_WARPS) {
    const int network = task % 2;
    float* prototype = space.prototype[network] + task / 2 * a.width;
    const Length length = length_of(a.width, [&](Size i) { return prototype[i]; });
    for (Size i = threadIdx.x % WARP; i < a.width; i += WARP) {
      prototype[i] = length.direction(prototype[i]);
    }
    if (threadIdx.x % WARP == 0) {
      space.length[network][task / 2] = length;
    }
  }
}

// The sum of squares of this warp's rows, and the gradients in these rows as such. Unrolled, the loops over a few
// columns and classes would take 128 registers.
template <typename T>
__device__ __forceinline__ double compare_rows(const Prototypes& a, Size group, const Space& space, float scale) {
  const int lane = threadIdx.x % WARP;
  double total = 0.0;
  for (Size row = threadIdx.x / WARP; row < a.rows; row += PROTOTYPE_WARPS) {
    const Size first = (group * a.rows + row) * a.width;
    const T* x[2] = {static_cast<const T*>(a.x[0]) + first, static_cast<const T*>(a.x[1]) + first};
    const Length length[2] = {length_of(a.width, [&](Size i) { return to_float(x[0][i]); }),
                              length_of(a.width, [&](Size i) { return to_float(x[1][i]); })};
    float along[2] = {}, squares = 0.0f;
#pragma unroll 1
    for (Size k = 0; k < a.count; ++k) {
      float similarity[2] = {};
#pragma unroll
      for (int network = 0; network < 2; ++network) {
#pragma unroll 1
        for (Size i = lane; i < a.width; i += WARP) {
          const float direction = length[network].direction(to_float(x[network][i]));
          similarity[network] += direction * space.prototype[network][k * a.width + i];
        }
        similarity[network] = lane_sum(similarity[network]);
      }
      const float difference = similarity[0] - similarity[1];
      squares += difference * difference;
      along[0] += scale * difference * similarity[0];
      along[1] -= scale * difference * similarity[1];
      if (lane == 0) {
        space.difference[row * a.count + k] = difference;
      }
    }
    total += squares;
    __syncwarp();  // lane 0 has written what all now read
#pragma unroll
    for (int network = 0; network < 2; ++network) {
#pragma unroll 1
      for (Size i = lane; a.gradient[network] && i < a.width; i += WARP) {
        float gradient = 0.0f;
#pragma unroll 1
        for (Size k = 0; k < a.count; ++k) {
          gradient += space.difference[row * a.count + k] * space.prototype[network][k * a.width + i];
        }
        gradient *= network == 0 ? scale : -scale;
        const float direction = length[network].direction(to_float(x[network][i]));
        a.gradient[network][first + i] = length[network].through(gradient, direction, along[network]);
      }
      if (lane == 0) {
        space.row_length[network][row] = length[network];
      }
    }
  }
  return total;
}

// The gradients in the prototypes' directions; a thread has one column of one class of one network.
template <typename T>
__device__ __forceinline__ void pull_prototypes(const Prototypes& a, Size group, const Space& space, float scale) {
  for (Size task = threadIdx.x; task < 2 * a.count * a.width; task += PROTOTYPE_THREADS) {
    const int network = task / (a.count * a.width);
    const Size at = task % (a.count * a.width), k = at / a.width, column = at % a.width;
    const T* x = static_cast<const T*>(a.x[network]) + group * a.rows * a.width + column;
    float total = 0.0f;
    for (Size first = 0; a.gradient[network] && first < a.rows; first += WARP) {
      float sum = 0.0f;
      for (Size row = first; row < a.rows && row < first + WARP; ++row) {
        const float direction = space.row_length[network][row].direction(to_float(x[row * a.width]));
        sum += space.difference[row * a.count + k] * direction;
      }
      total += sum;
    }
    space.pull[network][at] = network == 0 ? scale * total : -scale * total;
  }
}

// They become what each member receives; a warp has one prototype.
__device__ __forceinline__ void pull_through_lengths(const Prototypes& a, const Space& space) {
  for (Size task = threadIdx.x / WARP; task < 2 * a.count; task += PROTOTYPE_WARPS) {
    const int network = task % 2;
    const Size k = task / 2;
    const float* prototype = space.prototype[network] + k * a.width;
    float* pull = space.pull[network] + k * a.width;
    float along = 0.0f;
    for (Size i = threadIdx.x % WARP; i < a.width; i += WARP) {
      along += pull[i] * prototype[i];
    }
    along = lane_sum(along);
    const float members = space.members[k] > 1.0f ? space.members[k] : 1.0f;
    for (Size i = threadIdx.x % WARP; i < a.width; i += WARP) {
      pull[i] = space.length[network][k].through(pull[i], prototype[i], along) / members;
    }
  }
}

__device__ __forceinline__ void pull_members(const Prototypes& a, Size group, const Space& space) {
  for (Size i = threadIdx.x; i < a.rows * a.width; i += PROTOTYPE_THREADS) {
    const Size k = a.classes[group * a.rows + i / a.width];
    for (int network = 0; network < 2; ++network) {
      if (a.gradient[network] && k >= 0 && k < a.count) {
        a.gradient[network][group * a.rows * a.width + i] += space.pull[network][k * a.width + i % a.width];
      }
    }
  }
}

struct SharedLosses {
  double of_warp[PROTOTYPE_WARPS];
};

template <typename T>
__global__ void __launch_bounds__(PROTOTYPE_THREADS, 1) compare_group(const __grid_constant__ Prototypes a) {
  FASTMMKD_SHARED(shared, SharedLosses);
  const Size group = blockIdx.x;
  const Space space(a, group);
  sum_classes<T>(a, group, space);
  __syncthreads();
  direct_prototypes(a, space);
  float present = 0.0f;
  for (Size k = threadIdx.x % WARP; k < a.count; k += WARP) {
    present += space.members[k] > 0.0f ? 1.0f : 0.0f;
  }
  const float pairs = lane_sum(present) * static_cast<float>(a.rows), divisor = pairs > 1.0f ? pairs : 1.0f;
  const float scale = 2.0f / divisor;
  __syncthreads();
  const double squares = compare_rows<T>(a, group, space, scale);
  if (threadIdx.x % WARP == 0) {
    shared.of_warp[threadIdx.x / WARP] = squares;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int warp = 0; warp < PROTOTYPE_WARPS; ++warp) {
      total += shared.of_warp[warp];
    }
    a.loss[group] = static_cast<float>(total / divisor);
  }
  if (a.gradient[0] || a.gradient[1]) {
    pull_prototypes<T>(a, group, space, scale);
    __syncthreads();
    pull_through_lengths(a, space);
    __syncthreads();
    pull_members(a, group, space);
  }
}

}  // namespace fastmmkd::cuda
