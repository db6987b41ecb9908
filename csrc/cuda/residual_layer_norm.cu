// LN(x + residual) and its gradients; float32 arithmetic.
//
// A warp has a row: at d = 40 that is 160 bytes of each input, read once from memory and then twice more from the L1
// cache, against some 10 FLOP per element: the memory's speed decides, so rows are neither staged nor vectorised.
// Gradients of weight and bias are sums over all rows, taken in three fixed steps: the rows of a warp in shared memory
// (2 d floats), the four warps of a block (64 rows), and the blocks.
#include "cuda/residual_layer_norm_kernel.cuh"

namespace fastmmkd::cuda {

namespace {

// f(X{}, R{}) for the pairs there are: one dtype, or float32 with another.
template <typename F>
void with_types(Dtype x, Dtype residual, const F& f) {
  with_type(x, [&](auto of_x) {
    if (residual == Dtype::float32) {
      f(of_x, float{});
    } else if (x == Dtype::float32) {
      with_type(residual, [&](auto of_residual) { f(float{}, of_residual); });
    } else {
      f(of_x, of_x);
    }
  });
}

}  // namespace

cudaError_t norm(const Norm& a, Dtype x, Dtype residual, cudaStream_t stream) {
  const Size blocks = tiles(a.groups * a.rows, NORM_WARPS);
  if (blocks > 0) {
    with_types(x, residual, [&](auto of_x, auto of_residual) {
      const auto kernel = norm_rows<decltype(of_x), decltype(of_residual)>;
      FASTMMKD_LAUNCH(kernel, blocks, NORM_WARPS * WARP, 0, stream, a);
    });
  }
  return cudaGetLastError();
}

cudaError_t differentiate_norm(const Norm& a, Dtype x, Dtype residual, cudaStream_t stream) {
  const Size blocks = a.groups * tiles(a.rows, NORM_ROWS);
  const Size warps = a.width * NORM_WARPS > WIDEST_NORM ? WIDEST_NORM / a.width : NORM_WARPS;
  if (blocks > 0) {
    with_types(x, residual, [&](auto of_x, auto of_residual) {
      const auto kernel = differentiate_rows<decltype(of_x), decltype(of_residual)>;
      const Size shared = warps * 2 * a.width * static_cast<Size>(sizeof(float));
      FASTMMKD_LAUNCH(kernel, blocks, static_cast<unsigned>(warps) * WARP, shared, stream, a);
    });
  }
  if (a.groups > 0) {
    FASTMMKD_LAUNCH(sum_partials, tiles(a.groups * 2 * a.width, NORM_WARPS), NORM_WARPS * WARP, 0, stream, a);
  }
  return cudaGetLastError();
}

}  // namespace fastmmkd::cuda
