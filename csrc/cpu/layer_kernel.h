// See layer.cpp. W, the vector width, divides the row width. Rows are those of one group.

template <int W>
constexpr int NEXT = W > 4 ? W / 2 : 1;

template <int W>
void join_rows(const Joined& a, int64_t group, int64_t begin, int64_t end) {
  if constexpr (W > 1) {
    if (a.width % W != 0) {
      return join_rows<NEXT<W>>(a, group, begin, end);
    }
  }
  const float over_width = 1.0f / a.width;
  const float* bias = a.bias + group * a.parameter_group;
  const float* weight = a.weight + group * a.parameter_group;
  const float* shift = a.shift + group * a.parameter_group;
  for (int64_t row = begin; row < end; ++row) {
    const float* residual = a.residual[group] + row * a.width;
    float* joined = a.sum + (group * a.rows + row) * a.width;
    Floats<W> total{};
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> value = load<W>(joined + i) + load<W>(bias + i) + load<W>(residual + i);
      store<W>(joined + i, value);
      total += value;
    }
    const float mean = sum<W>(total) * over_width;
    Floats<W> squares{};
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> centred = load<W>(joined + i) - mean;
      squares += centred * centred;
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum<W>(squares) * over_width + a.eps);
    float* out = a.out[group] + row * a.width;
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> normed = (load<W>(joined + i) - mean) * rstd;
      store<W>(out + i, normed * load<W>(weight + i) + load<W>(shift + i));
    }
    float* moments = a.moments + (group * a.rows + row) * 2;
    moments[0] = mean;
    moments[1] = rstd;
  }
}

// Into `partial` [3, width] these rows' part of the gradients of bias, weight and shift; `work` is [2, width].
template <int W>
void join_rows_backward(const Joined& a, int64_t group, int64_t begin, int64_t end, float* work, float* partial) {
  if constexpr (W > 1) {
    if (a.width % W != 0) {
      return join_rows_backward<NEXT<W>>(a, group, begin, end, work, partial);
    }
  }
  const float over_width = 1.0f / a.width;
  float *normed = work, *scaled = work + a.width;
  float *grad_bias = partial, *grad_weight = partial + a.width, *grad_shift = partial + 2 * a.width;
  const float* weight = a.weight + group * a.parameter_group;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t place = group * a.rows + row;
    const float* grad = a.grad[group] + row * a.width;
    const float* joined = a.sum + place * a.width;
    const float mean = a.moments[2 * place], rstd = a.moments[2 * place + 1];
    Floats<W> sum_grad{}, sum_product{};
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> g = load<W>(grad + i);
      const Floats<W> n = (load<W>(joined + i) - mean) * rstd;
      store<W>(normed + i, n);
      store<W>(grad_weight + i, load<W>(grad_weight + i) + g * n);
      store<W>(grad_shift + i, load<W>(grad_shift + i) + g);
      const Floats<W> product = g * load<W>(weight + i);
      store<W>(scaled + i, product);
      sum_grad += product;
      sum_product += product * n;
    }
    const float mean_grad = sum<W>(sum_grad) * over_width, mean_product = sum<W>(sum_product) * over_width;
    float* grad_sum = a.grad_sum + place * a.width;
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> g = rstd * (load<W>(scaled + i) - mean_grad - load<W>(normed + i) * mean_product);
      store<W>(grad_sum + i, g);
      store<W>(grad_bias + i, load<W>(grad_bias + i) + g);
    }
  }
}

// x = x + bias, or relu of it
template <int W, bool RELU>
void add_bias_to_rows(float* x, const float* bias, int64_t rows, int64_t width) {
  if constexpr (W > 1) {
    if (width % W != 0) {
      return add_bias_to_rows<NEXT<W>, RELU>(x, bias, rows, width);
    }
  }
  for (int64_t row = 0; row < rows; ++row, x += width) {
    for (int64_t i = 0; i < width; i += W) {
      const Floats<W> value = load<W>(x + i) + load<W>(bias + i);
      if constexpr (RELU) {
        store<W>(x + i, value < 0.0f ? Floats<W>{} : value);  // a NaN stays
      } else {
        store<W>(x + i, value);
      }
    }
  }
}

// Adds the sums of the rows of grad to `total`; RELU: makes grad 0 first where x is.
template <int W, bool RELU>
void add_bias_to_rows_backward(const float* x, float* grad, int64_t rows, int64_t width, float* total) {
  if constexpr (W > 1) {
    if (width % W != 0) {
      return add_bias_to_rows_backward<NEXT<W>, RELU>(x, grad, rows, width, total);
    }
  }
  for (int64_t row = 0; row < rows; ++row, x += width, grad += width) {
    for (int64_t i = 0; i < width; i += W) {
      Floats<W> g = load<W>(grad + i);
      if constexpr (RELU) {
        g = load<W>(x + i) > 0.0f ? g : Floats<W>{};
        store<W>(grad + i, g);
      }
      store<W>(total + i, load<W>(total + i) + g);
    }
  }
}

void join_block(const Joined& a, int64_t group, int64_t begin, int64_t end) {
  join_rows<LANES>(a, group, begin, end);
}

void join_block_backward(const Joined& a, int64_t group, int64_t begin, int64_t end, float* work, float* partial) {
  join_rows_backward<LANES>(a, group, begin, end, work, partial);
}

void add_bias_to_block(float* x, const float* bias, int64_t rows, int64_t width, bool relu) {
  relu ? add_bias_to_rows<LANES, true>(x, bias, rows, width) : add_bias_to_rows<LANES, false>(x, bias, rows, width);
}

void add_bias_to_block_backward(const float* x, float* grad, int64_t rows, int64_t width, bool relu, float* total) {
  relu ? add_bias_to_rows_backward<LANES, true>(x, grad, rows, width, total)
       : add_bias_to_rows_backward<LANES, false>(x, grad, rows, width, total);
}
