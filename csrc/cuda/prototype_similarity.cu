// CorrKD eqs. 2 to 4 and their gradients through rows and prototypes, without the [N, K, d] products.
//
// One block has a group, and one launch is all: at N = 64, d = 40, K = 7 the three passes take 100 thousand products
// and the inputs 20 KB, too little to divide, and the steps (class means, their directions, similarities of the rows,
// gradients of the prototypes, gradients of their members) only need the block's barrier between them. What they
// leave to each other is in scratch memory, 2 (2 K d + 2 K + 2 N) + N K + K floats, 7.4 KB at these sizes. A group of
// thousands of rows is computed right, but by one SM.
#include "cuda/prototype_similarity_kernel.cuh"

namespace fastmmkd::cuda {

cudaError_t compare_with_prototypes(const Prototypes& a, Dtype dtype, cudaStream_t stream) {
  if (a.groups > 0) {
    with_type(dtype, [&](auto zero) {
      FASTMMKD_LAUNCH(compare_group<decltype(zero)>, a.groups, PROTOTYPE_THREADS, 0, stream, a);
    });
  }
  return cudaGetLastError();
}

}  // namespace fastmmkd::cuda
