// The instruction set that the CPU kernels use: every kernel is compiled for each of these, one runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTMMKD_X86 1
#include <immintrin.h>
#else
#define FASTMMKD_X86 0
#endif

namespace fastmmkd {

enum class Isa { baseline, avx2, avx512 };

// The best that this CPU has, unless FASTMMKD_ISA or set_isa says otherwise.
Isa isa();
// "avx512", "avx2", "baseline", or "" for the best; throws std::runtime_error for one that cannot run here.
void set_isa(const std::string& name);
std::string isa_name();
// Those that were compiled and that this CPU has, the best first.
std::vector<std::string> isa_names();

}  // namespace fastmmkd

#if FASTMMKD_X86
#define FASTMMKD_CALL(function, ...)                                                    \
  (fastmmkd::isa() == fastmmkd::Isa::avx512 ? fastmmkd::avx512::function(__VA_ARGS__)   \
   : fastmmkd::isa() == fastmmkd::Isa::avx2 ? fastmmkd::avx2::function(__VA_ARGS__)     \
                                            : fastmmkd::baseline::function(__VA_ARGS__))
#else
#define FASTMMKD_CALL(function, ...) fastmmkd::baseline::function(__VA_ARGS__)
#endif
