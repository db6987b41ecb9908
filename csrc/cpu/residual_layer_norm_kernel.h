// See residual_layer_norm.cpp. W, the vector width, divides the row width.

template <int W>
constexpr int NARROWER = W > 4 ? W / 2 : 1;

template <int W, typename X, typename R>
void norm_rows(const Rows& a, int64_t begin, int64_t end, float* joined) {
  const float over_width = 1.0f / a.width;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.width;
    const R* residual = static_cast<const R*>(a.residual) + row * a.width;
    Floats<W> total{};
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> value = load<W>(x + i) + load<W>(residual + i);
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
    const float* weight = a.weight + row / a.rows * a.width;
    const float* bias = a.bias + row / a.rows * a.width;
    X* out = static_cast<X*>(a.out) + row * a.width;
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> normed = (load<W>(joined + i) - mean) * rstd;
      store<W>(out + i, normed * load<W>(weight + i) + load<W>(bias + i));
    }
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// The gradient of the sum, with `normed` [2, width] to work in, and into `partial` [2, width] these rows' part of the gradients of weight and bias.
template <int W, typename X, typename R, typename S>
void differentiate_rows(const Rows& a, int64_t begin, int64_t end, float* normed, float* partial) {
  const float over_width = 1.0f / a.width;
  float* scaled = normed + a.width;
  float* grad_weight = partial;
  float* grad_bias = partial + a.width;
  std::memset(partial, 0, 2 * a.width * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const X* grad = static_cast<const X*>(a.grad) + row * a.width;
    const X* x = static_cast<const X*>(a.x) + row * a.width;
    const R* residual = static_cast<const R*>(a.residual) + row * a.width;
    const float* weight = a.weight + row / a.rows * a.width;
    const float mean = a.mean[row], rstd = a.rstd[row];
    Floats<W> sum_grad{}, sum_product{};
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> g = load<W>(grad + i);
      const Floats<W> n = (load<W>(x + i) + load<W>(residual + i) - mean) * rstd;
      store<W>(normed + i, n);
      store<W>(grad_weight + i, load<W>(grad_weight + i) + g * n);
      store<W>(grad_bias + i, load<W>(grad_bias + i) + g);
      const Floats<W> product = g * load<W>(weight + i);
      store<W>(scaled + i, product);
      sum_grad += product;
      sum_product += product * n;
    }
    const float mean_grad = sum<W>(sum_grad) * over_width;
    const float mean_product = sum<W>(sum_product) * over_width;
    S* grad_sum = static_cast<S*>(a.grad_sum) + row * a.width;
    for (int64_t i = 0; i < a.width; i += W) {
      const Floats<W> centred = load<W>(scaled + i) - mean_grad;
      store<W>(grad_sum + i, rstd * (centred - load<W>(normed + i) * mean_product));
    }
  }
}

template <int W>
void norm_by(const Rows& a, int64_t begin, int64_t end, float* row) {
  if (W > 1 && a.width % W != 0) {
    return norm_by<NARROWER<W>>(a, begin, end, row);
  }
  using c10::BFloat16;
  if (a.half_x) {
    a.half_residual ? norm_rows<W, BFloat16, BFloat16>(a, begin, end, row)
                    : norm_rows<W, BFloat16, float>(a, begin, end, row);
  } else {
    a.half_residual ? norm_rows<W, float, BFloat16>(a, begin, end, row)
                    : norm_rows<W, float, float>(a, begin, end, row);
  }
}

template <int W>
void differentiate_by(const Rows& a, int64_t begin, int64_t end, float* row, float* partial) {
  if (W > 1 && a.width % W != 0) {
    return differentiate_by<NARROWER<W>>(a, begin, end, row, partial);
  }
  using c10::BFloat16;
  if (a.half_x) {
    a.half_residual ? differentiate_rows<W, BFloat16, BFloat16, BFloat16>(a, begin, end, row, partial)
                    : differentiate_rows<W, BFloat16, float, float>(a, begin, end, row, partial);
  } else {
    a.half_residual ? differentiate_rows<W, float, BFloat16, float>(a, begin, end, row, partial)
                    : differentiate_rows<W, float, float, float>(a, begin, end, row, partial);
  }
}

void norm(const Rows& a, int64_t begin, int64_t end, float* row) {
  norm_by<LANES>(a, begin, end, row);
}

void differentiate(const Rows& a, int64_t begin, int64_t end, float* row, float* partial) {
  differentiate_by<LANES>(a, begin, end, row, partial);
}
