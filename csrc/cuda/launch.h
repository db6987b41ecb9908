// What the CUDA kernels work on, and their launchers: no torch here, so that nvcc takes seconds. A launcher neither
// waits, nor allocates, nor looks at data, and returns what cudaGetLastError says.
#pragma once

#ifndef __CUDACC_RTC__
#include <cuda_runtime_api.h>
#endif

#ifdef __CUDACC__
#define FASTMMKD_HOST_DEVICE __host__ __device__
#else
#define FASTMMKD_HOST_DEVICE
#endif

namespace fastmmkd::cuda {

using Size = long long;  // NVRTC has no <cstdint>

enum class Dtype { float32, float16, bfloat16 };

constexpr int MAX_SEGMENTS = 3;
constexpr int WIDEST_HEAD = 256;
constexpr Size WIDEST_NORM = 6144;  // of which backward keeps two rows in 48 KB

struct View {  // [X, R, d] (masks: [X, R]), adjacent features
  const void* data;
  Size sharing;     // groups that share one of X
  Size group, row;  // strides over X and R, in elements
};

// Whose rows are whose: sample b of a model has those from starts[b] up to starts[b + 1], and nobody those from
// starts[B] up to `rows`.
struct Layout {
  const Size* starts;  // [S, B + 1]
  Size sharing;        // groups of a model
  Size rows;           // R
  Size longest;        // no sample has more rows
};

struct Segment {
  View key, value, mask;
  Layout layout;
  void *grad_key, *grad_value;  // [G, R, d]
};

struct Attention {
  Size groups, batch, width;
  int heads, segment_count;
  float scale;  // log2(e) / sqrt(head width)
  View query, grad, out;
  Layout layout;  // of the queries
  Segment segments[MAX_SEGMENTS];
  float* statistics;  // [G, h, 2, R]: a query's largest score, in units of ln 2, and 1 / the sum of its softmax
  float* delta;       // [G, h, R] scratch of backward: grad . out
  void* result;       // [G, R, d]: out or, backward, the query's gradient
};

struct Norm {
  Size groups, rows, width;  // rows of one group; all contiguous
  const void *x, *residual;
  const float *weight, *bias;
  float eps;
  void* out;
  float *mean, *rstd;
  const void* grad;  // of x's dtype
  void* grad_sum;    // float32 unless both have one dtype
  float* partial;    // [G, tiles(rows, NORM_ROWS), 2, d] scratch of backward
  float *grad_weight, *grad_bias;
};

// One side's rows of every group against the other's.
struct Contrast {
  Size groups, rows, others, width;
  Size shift;  // from a row to its own among the others
  float eta, own_weight, scale;
  const void *row, *other;  // [G, rows, d] and [G, others, d]
  double* partial;          // [G, tiles(rows, CONTRAST_ROWS)] scratch: the loss of a tile; or nothing
  float* gradient;          // [G, rows, d] or nothing
};

// Student (0) and teacher (1).
struct Prototypes {
  Size groups, rows, width, count;
  const Size* classes;  // [G, rows]
  const void* x[2];     // [G, rows, d]
  float* loss;          // [G]
  float* gradient[2];   // [G, rows, d] or nothing
  float* scratch;       // [G, prototype_scratch(...)]
};

constexpr int NORM_ROWS = 64;      // in one partial sum
constexpr int CONTRAST_ROWS = 32;  // in a tile

FASTMMKD_HOST_DEVICE constexpr Size tiles(Size count, Size size) {
  return (count + size - 1) / size;
}

// Floats of a group: of both networks the lengths of prototypes [K, 2] and rows [N, 2], prototypes and pulls [2, K, d];
// then class sizes [K] and differences [N, K].
FASTMMKD_HOST_DEVICE constexpr Size prototype_scratch(Size rows, Size width, Size count) {
  return 2 * (2 * count + 2 * rows + 2 * count * width) + count + rows * count;
}

#ifndef __CUDACC_RTC__
cudaError_t attend(const Attention& a, Dtype dtype, cudaStream_t stream);
cudaError_t differentiate_attention(const Attention& a, Dtype dtype, cudaStream_t stream);
cudaError_t norm(const Norm& a, Dtype x, Dtype residual, cudaStream_t stream);
cudaError_t differentiate_norm(const Norm& a, Dtype x, Dtype residual, cudaStream_t stream);
cudaError_t contrast(const Contrast& a, Dtype dtype, cudaStream_t stream);
// loss [groups] = the sum of the groups' partial losses, divided.
cudaError_t sum_contrast(const double* partial, Size groups, Size rows, double divisor, float* loss,
                         cudaStream_t stream);
cudaError_t compare_with_prototypes(const Prototypes& a, Dtype dtype, cudaStream_t stream);
#endif

}  // namespace fastmmkd::cuda
