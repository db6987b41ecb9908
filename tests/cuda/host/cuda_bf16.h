// bfloat16 on a CPU: the upper half of a float32, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t word = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  std::uint32_t word;
  std::memcpy(&word, &x, 4);
  const std::uint32_t rounded = x == x ? word + 0x7FFF + ((word >> 16) & 1) : 0x7FC00000;
  return {static_cast<std::uint16_t>(rounded >> 16)};
}
