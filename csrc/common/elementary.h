// Elementary functions of vectors, within 2 ulp; kernel headers include this in the namespace of an instruction set.

// e^x for x <= 88; 0 below e^-87, exactly 1 for 0.
FASTMMKD_INLINE Vector exponential(Vector x) {
  using Int = Lanes<LANES>::Int;
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vector power = p * (Vector)(((Int)shifted - 0x4B400000 + 127) << 23);
  return x < -87.0f ? Vector{} : power;
}

// ln((1 + z) / (1 - z)) for |z| <= 1/3.
FASTMMKD_INLINE Vector log_ratio(Vector z) {
  const Vector square = z * z;
  Vector p = square * (2.0f / 17) + 2.0f / 15;
  p = p * square + 2.0f / 13;
  p = p * square + 2.0f / 11;
  p = p * square + 2.0f / 9;
  p = p * square + 2.0f / 7;
  p = p * square + 2.0f / 5;
  p = p * square + 2.0f / 3;
  return p * (square * z) + (z + z);
}

// ln(1 + x) for x in [0, 1].
FASTMMKD_INLINE Vector log_one_plus(Vector x) {
  return log_ratio(x / (x + 2.0f));
}

// ln(x) for normal x > 0.
FASTMMKD_INLINE Vector logarithm(Vector x) {
  using Int = Lanes<LANES>::Int;
  const Int exponent = ((Int)x - 0x3F3504F3) >> 23;  // the fraction is in [sqrt 1/2, sqrt 2)
  const Vector fraction = (Vector)((Int)x - (exponent << 23));
  return log_ratio((fraction - 1.0f) / (fraction + 1.0f)) + __builtin_convertvector(exponent, Vector) * 0.693147181f;
}
