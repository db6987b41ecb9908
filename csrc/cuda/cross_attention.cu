// Masked multi-head attention over keys spliced from segments; float32 arithmetic, no score matrix, no atomics.
//
// Heads are narrow (4 to 16 features), so tensor cores have nothing to multiply and a score costs E FMA, an exponential
// and E more FMA against 2 E floats of key and value. A block has 128 threads, one head of one sample and 64 of its
// queries (32 for E = 16): four lanes share a query, each with every fourth key, and a lane has two queries (one),
// which halves the reads of shared memory per score. Up to 128 keys and values at a time are in shared memory, the
// present ones only, in order, found by ballot: 8.5 KB for E = 5, 20.5 KB for E = 16, so that registers and not shared
// memory limit how many blocks an sm_70 runs. At 50 queries, 32 samples, 8 heads and 3 groups there are 768 blocks; at
// 375 queries 4,608. Four neighbouring keys are 16 bytes of different banks each, and 8 rows of a warp read the same.
//
// How many rows a sample has is read on the device: there are blocks for the longest one, and those past the end of
// theirs return at once. Nobody is one sample more, whose blocks write zeros.
//
// Backward has a pass over the keys for the queries and one over the queries for the keys, 64 rows (32) a block: the
// order of every sum is fixed, and a window of rows without a key is left once its mask is read.
#include "cuda/cross_attention_kernel.cuh"
#include "cuda/cross_attention_wide_kernel.cuh"

namespace fastmmkd::cuda {

namespace {

template <typename Kernel>
void launch(const Kernel& kernel, const Attention& a, Size tile_count, cudaStream_t stream) {
  const Size blocks = a.groups * (a.batch + 1) * a.heads * tile_count;
  if (blocks > 0) {
    FASTMMKD_LAUNCH(kernel, blocks, THREADS, 0, stream, a);
  }
}

template <int E, typename T>
void run(const Attention& a, bool backward, cudaStream_t stream) {
  const Size query_tiles = tiles(a.layout.longest, BLOCK_ROWS<E>);
  if (backward) {
    launch(differentiate_queries<E, T>, a, query_tiles, stream);
    launch(differentiate_keys<E, T>, a, key_tiles(a, BLOCK_ROWS<E>), stream);
  } else {
    launch(attend_rows<E, T>, a, query_tiles, stream);
  }
}

template <typename T>
void run_wide(const Attention& a, bool backward, cudaStream_t stream) {
  if (backward) {
    launch(differentiate_wide_queries<T>, a, tiles(a.layout.longest, WARPS), stream);
    launch(differentiate_wide_keys<T>, a, key_tiles(a, WARPS), stream);
  } else {
    launch(attend_wide<T>, a, tiles(a.layout.longest, WARPS), stream);
  }
}

template <typename T>
void run_of_width(const Attention& a, bool backward, cudaStream_t stream) {
  const Size width = a.width / a.heads;
  if (width <= 4) {
    run<4, T>(a, backward, stream);
  } else if (width == 5) {
    run<5, T>(a, backward, stream);
  } else if (width <= 8) {
    run<8, T>(a, backward, stream);
  } else if (width <= 10) {
    run<10, T>(a, backward, stream);
  } else if (width <= 16) {
    run<16, T>(a, backward, stream);
  } else {
    run_wide<T>(a, backward, stream);
  }
}

}  // namespace

cudaError_t attend(const Attention& a, Dtype dtype, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) { run_of_width<decltype(zero)>(a, false, stream); });
  return cudaGetLastError();
}

cudaError_t differentiate_attention(const Attention& a, Dtype dtype, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) { run_of_width<decltype(zero)>(a, true, stream); });
  return cudaGetLastError();
}

}  // namespace fastmmkd::cuda
