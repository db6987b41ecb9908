// See prototype_similarity.cpp.

FASTMMKD_INLINE float dot(const float* a, const float* b, int64_t stride) {
  Vector total{};
  for (int64_t k = 0; k < stride; k += LANES) {
    total += load<LANES>(a + k) * load<LANES>(b + k);
  }
  return sum<LANES>(total);
}

FASTMMKD_INLINE void add_scaled(float* to, const float* from, float factor, int64_t stride) {
  for (int64_t k = 0; k < stride; k += LANES) {
    store<LANES>(to + k, load<LANES>(to + k) + factor * load<LANES>(from + k));
  }
}

// The length of a vector in two factors, whose product may be out of range; 0 and 0 of a zero vector.
struct Length {
  float largest, scaled;
};

// direction = x / |x|, or 0: dividing by the largest element first keeps the squares in range.
FASTMMKD_INLINE Length divide_by_length(const float* x, float* direction, int64_t stride) {
  using Int = Lanes<LANES>::Int;
  Vector most{};
  Int is_nan{};
  for (int64_t k = 0; k < stride; k += LANES) {
    const Vector value = load<LANES>(x + k), size = (Vector)((Int)value & 0x7FFFFFFF);
    most = size > most ? size : most;
    is_nan |= value != value;
  }
  float largest = 0.0f;
  bool is_zero = true;
  for (int lane = 0; lane < LANES; ++lane) {
    largest = most[lane] > largest ? most[lane] : largest;
    is_zero = is_zero && most[lane] < 1.17549435e-38f && !is_nan[lane];
  }
  if (is_zero) {
    std::memset(direction, 0, stride * sizeof(float));
    return {0.0f, 0.0f};
  }
  for (int64_t k = 0; k < stride; k += LANES) {
    store<LANES>(direction + k, load<LANES>(x + k) / largest);
  }
  const float scaled = __builtin_sqrtf(dot(direction, direction, stride));
  for (int64_t k = 0; k < stride; k += LANES) {
    store<LANES>(direction + k, load<LANES>(direction + k) / scaled);
  }
  return {largest, scaled};
}

// The gradient in a direction becomes that in its vector, divided by `divisor`; `along` is their product.
FASTMMKD_INLINE void through_length(float* gradient, const float* direction, float along, const Length& length,
                                    float divisor, int64_t stride) {
  if (length.scaled == 0.0f) {
    std::memset(gradient, 0, stride * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < stride; k += LANES) {
    const Vector across = load<LANES>(gradient + k) - along * load<LANES>(direction + k);
    store<LANES>(gradient + k, across / divisor / length.scaled / length.largest);
  }
}

// Sums of the rows begin to end by class.
void sum_classes(const Prototypes& a, int64_t block, int64_t begin, int64_t end) {
  for (int network = 0; network < 2; ++network) {
    float* sums = a.partial[network] + block * a.count * a.stride;
    std::memset(sums, 0, a.count * a.stride * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      if (a.classes[row] >= 0 && a.classes[row] < a.count) {
        add_scaled(sums + a.classes[row] * a.stride, a.rows[network] + row * a.stride, 1.0f, a.stride);
      }
    }
  }
}

// The sum over the blocks, into `total` [count, stride].
FASTMMKD_INLINE void join_blocks(const Prototypes& a, int network, float* total) {
  const int64_t size = a.count * a.stride;
  std::memset(total, 0, size * sizeof(float));
  for (int64_t block = 0; block < a.blocks; ++block) {
    add_scaled(total, a.partial[network] + block * size, 1.0f, size);
  }
}

void directions_of_prototypes(const Prototypes& a) {
  for (int network = 0; network < 2; ++network) {
    join_blocks(a, network, a.prototypes[network]);
    for (int64_t k = 0; k < a.count; ++k) {
      float* prototype = a.prototypes[network] + k * a.stride;
      const float members = a.members[k] ? a.members[k] : 1.0f;
      for (int64_t i = 0; i < a.stride; i += LANES) {
        store<LANES>(prototype + i, load<LANES>(prototype + i) / members);
      }
      const Length length = divide_by_length(prototype, prototype, a.stride);
      a.lengths[network][2 * k] = length.largest;
      a.lengths[network][2 * k + 1] = length.scaled;
    }
  }
}

// The sum of squares of the rows begin to end; the gradients in these rows' directions go on to the rows, those in the
// prototypes' directions into `partial`. `work` holds [3, stride] and [2, count].
double compare_rows(const Prototypes& a, int64_t block, int64_t begin, int64_t end, float* work) {
  float* gradient = work + 2 * a.stride;
  float* similarity[2] = {work + 3 * a.stride, work + 3 * a.stride + a.count};
  double total = 0.0;
  for (int network = 0; network < 2; ++network) {
    if (a.gradient[network]) {
      std::memset(a.partial[network] + block * a.count * a.stride, 0, a.count * a.stride * sizeof(float));
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    Length length[2];
    for (int network = 0; network < 2; ++network) {
      float* direction = work + network * a.stride;
      length[network] = divide_by_length(a.rows[network] + row * a.stride, direction, a.stride);
      for (int64_t k = 0; k < a.count; ++k) {
        similarity[network][k] = dot(direction, a.prototypes[network] + k * a.stride, a.stride);
      }
    }
    float squares = 0.0f;
    for (int64_t k = 0; k < a.count; ++k) {
      const float difference = similarity[0][k] - similarity[1][k];
      squares += difference * difference;
    }
    total += (double)squares;
    for (int network = 0; network < 2; ++network) {
      if (!a.gradient[network]) {
        continue;
      }
      const float* direction = work + network * a.stride;
      float* prototypes = a.partial[network] + block * a.count * a.stride;
      float along = 0.0f;
      std::memset(gradient, 0, a.stride * sizeof(float));
      for (int64_t k = 0; k < a.count; ++k) {
        const float difference = similarity[network][k] - similarity[1 - network][k];
        const float pull = a.scale * difference;
        along += pull * similarity[network][k];
        add_scaled(gradient, a.prototypes[network] + k * a.stride, pull, a.stride);
        add_scaled(prototypes + k * a.stride, direction, pull, a.stride);
      }
      through_length(gradient, direction, along, length[network], 1.0f, a.stride);
      std::memcpy(a.gradient[network] + row * a.width, gradient, a.width * sizeof(float));
    }
  }
  return total;
}

// The prototypes become the gradients that each of their members receives; `work` holds [count, stride].
void pulls_of_prototypes(const Prototypes& a, float* work) {
  for (int network = 0; network < 2; ++network) {
    if (!a.gradient[network]) {
      continue;
    }
    join_blocks(a, network, work);
    for (int64_t k = 0; k < a.count; ++k) {
      float* prototype = a.prototypes[network] + k * a.stride;
      float* gradient = work + k * a.stride;
      const Length length = {a.lengths[network][2 * k], a.lengths[network][2 * k + 1]};
      const float members = a.members[k] ? a.members[k] : 1.0f;
      through_length(gradient, prototype, dot(gradient, prototype, a.stride), length, members, a.stride);
      std::memcpy(prototype, gradient, a.stride * sizeof(float));
    }
  }
}

void pull_members(const Prototypes& a, int64_t begin, int64_t end) {
  for (int network = 0; network < 2; ++network) {
    for (int64_t row = begin; a.gradient[network] && row < end; ++row) {
      if (a.classes[row] >= 0 && a.classes[row] < a.count) {
        const float* pull = a.prototypes[network] + a.classes[row] * a.stride;
        for (int64_t k = 0; k < a.width; ++k) {
          a.gradient[network][row * a.width + k] += pull[k];
        }
      }
    }
  }
}
