// Vectors of 32-bit lanes in the compiler's own notation; included once per instruction set by each_isa.h.

#define FASTMMKD_INLINE static inline __attribute__((always_inline))

constexpr int LANES = FASTMMKD_LANES;  // of the widest register

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef uint32_t Word __attribute__((vector_size(4 * W)));
  typedef uint16_t Half __attribute__((vector_size(2 * W)));
};

template <int W>
using Floats = typename Lanes<W>::Float;
using Vector = Floats<LANES>;

template <int W>
FASTMMKD_INLINE Floats<W> load(const float* from) {
  Floats<W> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// bfloat16 is the upper half of a float32.
template <int W>
FASTMMKD_INLINE Floats<W> load(const c10::BFloat16* from) {
  typename Lanes<W>::Half half;
  __builtin_memcpy(&half, from, sizeof half);
  return (Floats<W>)(__builtin_convertvector(half, typename Lanes<W>::Word) << 16);
}

template <int W>
FASTMMKD_INLINE void store(float* to, Floats<W> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

// Rounds to nearest even; a NaN stays one.
template <int W>
FASTMMKD_INLINE void store(c10::BFloat16* to, Floats<W> x) {
  using Word = typename Lanes<W>::Word;
  const Word bits = (Word)x;
  const Word rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const auto half = __builtin_convertvector(x == x ? rounded : rounded - rounded + 0x7FC0, typename Lanes<W>::Half);
  __builtin_memcpy(to, &half, sizeof half);
}

FASTMMKD_INLINE float scalar(float x) {
  return x;
}

FASTMMKD_INLINE float scalar(c10::BFloat16 x) {
  uint32_t word = (uint32_t)x.x << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

FASTMMKD_INLINE void assign(float& to, float x) {
  to = x;
}

FASTMMKD_INLINE void assign(c10::BFloat16& to, float x) {
  store<1>(&to, Floats<1>{x});
}

template <int W>
FASTMMKD_INLINE float sum(Floats<W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    Floats<W / 2> low, high;
    __builtin_memcpy(&low, &x, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return sum<W / 2>(low + high);
  }
}
