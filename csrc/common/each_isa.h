// Compiles FASTMMKD_KERNEL, a header of plain loops over `Vector`, once per instruction set, each in its own namespace.
// No include guard: a source file includes it once per kernel. Everything the kernel needs from elsewhere, the standard
// library too, must be included before: what is compiled in here may use instructions that this machine lacks.
#include "common/isa.h"

#if FASTMMKD_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FASTMMKD_LANES 16
namespace fastmmkd::avx512 {
#include "common/vector.h"
#include FASTMMKD_KERNEL
}  // namespace fastmmkd::avx512
#undef FASTMMKD_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTMMKD_LANES 8
namespace fastmmkd::avx2 {
#include "common/vector.h"
#include FASTMMKD_KERNEL
}  // namespace fastmmkd::avx2
#undef FASTMMKD_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#define FASTMMKD_LANES 4
namespace fastmmkd::baseline {
#include "common/vector.h"
#include FASTMMKD_KERNEL
}  // namespace fastmmkd::baseline
#undef FASTMMKD_LANES
#undef FASTMMKD_KERNEL
