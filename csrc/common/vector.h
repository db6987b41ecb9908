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

// Whether a lane of a comparison holds.
FASTMMKD_INLINE bool any(Lanes<LANES>::Int x) {
  int32_t found = 0;
  for (int l = 0; l < LANES; ++l) {
    found |= x[l];
  }
  return found != 0;
}

FASTMMKD_INLINE Vector add(Vector a, Vector b) {
  return a + b;
}

FASTMMKD_INLINE Vector maximum(Vector a, Vector b) {  // of a NaN and a number: b
  return a > b ? a : b;
}

typedef Vector (*Join)(Vector, Vector);

constexpr int SLACK = LANES;  // floats that `fold` may write behind its results

// Lane i of the result is lane I[i] of a and b one behind the other.
template <int... I>
FASTMMKD_INLINE Floats<sizeof...(I)> shuffle(Floats<sizeof...(I)> a, Floats<sizeof...(I)> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename Lanes<sizeof...(I)>::Int{I...});
#endif
}

// Rows and columns of 4 x 4 floats change places.
FASTMMKD_INLINE void transpose(Floats<4>* x) {
  const Floats<4> low = shuffle<0, 4, 1, 5>(x[0], x[1]), high = shuffle<2, 6, 3, 7>(x[0], x[1]);
  const Floats<4> next_low = shuffle<0, 4, 1, 5>(x[2], x[3]), next_high = shuffle<2, 6, 3, 7>(x[2], x[3]);
  x[0] = shuffle<0, 1, 4, 5>(low, next_low);
  x[1] = shuffle<2, 3, 6, 7>(low, next_low);
  x[2] = shuffle<0, 1, 4, 5>(high, next_high);
  x[3] = shuffle<2, 3, 6, 7>(high, next_high);
}

// Lanes l with (l & H) == 0: a[l] joined with a[l ^ H]; the others: the same of b.
template <Join JOIN, int H, int... L>
FASTMMKD_INLINE Vector fold_two(Vector a, Vector b, std::integer_sequence<int, L...>) {
  return JOIN(shuffle<(L & H ? LANES + L : L)...>(a, b), shuffle<(L & H ? LANES + (L ^ H) : L ^ H)...>(a, b));
}

// Joins all lanes of each of N vectors, N a power of 2: lane i of the result is that of vector i % N.
template <Join JOIN, int N, int H = LANES / 2>
FASTMMKD_INLINE Vector fold_power(const Vector* x) {
  constexpr std::make_integer_sequence<int, LANES> lanes{};
  if constexpr (H == 0) {
    return x[0];
  } else if constexpr (H >= N) {
    const Vector folded = fold_power<JOIN, N, H / 2>(x);
    return fold_two<JOIN, H>(folded, folded, lanes);
  } else {
    Vector halves[H];
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
      halves[i] = fold_two<JOIN, H>(x[i], x[i + H], lanes);
    }
    return fold_power<JOIN, H, H / 2>(halves);
  }
}

// to[i]: all lanes of x[i] joined. Writes SLACK floats more.
template <Join JOIN, int N>
FASTMMKD_INLINE void fold(const Vector* x, float* to) {
  constexpr int POWER = N >= LANES ? LANES : N >= 8 ? 8 : N >= 4 ? 4 : N >= 2 ? 2 : 1;
  store<LANES>(to, fold_power<JOIN, POWER>(x));
  if constexpr (N > POWER) {
    fold<JOIN, N - POWER>(x + POWER, to + POWER);
  }
}

// 2^x within 2 ulp; 0, or at most 2^-126, below the range; infinite above it. What is left out is exactly 0: products with
// subnormal numbers take a hundred times as long.
FASTMMKD_INLINE Vector exp2(Vector x) {
#if FASTMMKD_LANES == 16
  const Vector f = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  Vector p = f * 1.8775770963e-3f + 8.9893396703e-3f;
  p = p * f + 5.5826317810e-2f;
  p = p * f + 2.4015361751e-1f;
  p = p * f + 6.9315307294e-1f;
  p = p * f + 9.9999992511e-1f;
  return _mm512_maskz_scalef_ps(0xFFFF, p, x);
#else
  using Int = Lanes<LANES>::Int;
  x = maximum(Vector{} - 127.0f, x);  // which becomes exactly 0; a NaN stays
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const Vector f = x - (shifted - 12582912.0f);
  Vector p = f * 1.327647497e-3f + 9.675541782e-3f;
  p = p * f + 5.550713271e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469670e-1f;
  p = p * f + 1.0f;
  return (Vector)((Int)p + ((Int)shifted << 23));
#endif
}
