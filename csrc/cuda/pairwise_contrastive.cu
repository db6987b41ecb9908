// CorrKD eq. 1 over pairs of rows, from differences: near rows lose nothing, and no matrix of distances is in memory.
//
// A block has 32 rows and meets the others 32 at a time, 64 columns of both in shared memory (16.6 KB, 21.9 KB with
// the pulls): 32 x 32 x d differences and squares against 2 x 32 x d floats read, and as many operations again for
// the gradient. A thread has 2 x 4 pairs, so that 6 floats of shared memory serve 8 terms. Rows of more than 64
// columns have a block per 64 columns of gradient, each of which takes the distances again. The teacher's gradient is
// a second pass with the sides exchanged, so that every sum has one owner and a fixed order.
#include "cuda/pairwise_contrastive_kernel.cuh"

namespace fastmmkd::cuda {

cudaError_t contrast(const Contrast& a, Dtype dtype, cudaStream_t stream) {
  const Size parts = a.gradient ? tiles(a.width, COLUMNS) : 1;
  const Size blocks = a.groups * tiles(a.rows, CONTRAST_ROWS) * parts;
  if (blocks > 0) {
    with_type(dtype, [&](auto zero) {
      FASTMMKD_LAUNCH(contrast_tile<decltype(zero)>, blocks, CONTRAST_THREADS, 0, stream, a);
    });
  }
  return cudaGetLastError();
}

cudaError_t sum_contrast(const double* partial, Size groups, Size rows, double divisor, float* loss,
                         cudaStream_t stream) {
  if (groups > 0) {
    FASTMMKD_LAUNCH(sum_tiles, tiles(groups, WARP), WARP, 0, stream, partial, groups, tiles(rows, CONTRAST_ROWS),
                    divisor, loss);
  }
  return cudaGetLastError();
}

}  // namespace fastmmkd::cuda
