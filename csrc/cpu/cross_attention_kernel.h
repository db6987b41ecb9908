// See cross_attention.cpp. A task is one head of one sample. Its keys and values that are present are laid out feature
// by feature, [E, n] with n filled up to whole vectors, so that one vector holds one feature of LANES keys. Blocks of a
// few queries meet them in products of small matrices, whose sums stay in registers; what lies between two products is
// a row of n scores per query, in the first cache.

constexpr int ROWS = 4;                           // queries in a block
constexpr int FEATURES = 5;                       // that are summed at once, of
constexpr int SUM_ROWS = LANES == 16 ? ROWS : 2;  // queries: 20 of 32 registers, or 10 of 16

struct Task {
  int64_t group, head;
  int64_t first, queries;  // rows of the sample
  int64_t keys, stride;    // keys present; the same in whole vectors
  int width, part;         // features of the head; how many of them are summed at once
  float *filler, *key, *value, *grad_key, *grad_value;
  float *scores, *grad_scores;   // [ROWS, stride]
  float *query, *grad, *result;  // [ROWS, width]
};

struct Piece {  // of a segment: the sample's rows, and how many may be attended to
  int64_t first, rows, present;
};

// The frames of every segment that may be attended to, counted from the sample's first; returns how many.
FASTMMKD_INLINE int64_t find_present(const Attention& a, int64_t group, int64_t sample, int32_t* frames,
                                     Piece* pieces) {
  int64_t total = 0;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const Segment& segment = a.segments[s];
    const int64_t* range = segment.layout.of(group, sample);
    const int64_t first = range[0], rows = range[1] - range[0], stride = segment.mask_row;
    const bool* present = segment.mask_of(group) + first * stride;
    int64_t count = 0;
    for (int64_t t = 0; t < rows; ++t) {
      frames[total + count] = static_cast<int32_t>(t);
      count += present[t * stride];
    }
    pieces[s] = {first, rows, count};
    total += count;
  }
  return total;
}

template <typename T>
FASTMMKD_INLINE const T* head_of(const View& view, const Task& task, int64_t row) {
  return static_cast<const T*>(view.data) + task.group * view.group + row * view.row + task.head * task.width;
}

template <typename T>
FASTMMKD_INLINE T* head_of(const Result& result, const Task& task, int64_t row) {
  return static_cast<T*>(result.data) + task.group * result.group + row * result.row + task.head * task.width;
}

// The rows of `frames`, count x width, as columns.
template <typename T>
void to_columns(const T* from, int64_t row_stride, const int32_t* frames, int64_t count, int width, float* to,
                int64_t stride) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T* x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = from + frames[j + i] * row_stride;
    }
    int e = 0;
    for (; e + 4 <= width; e += 4) {
      Floats<4> tile[4] = {load<4>(x[0] + e), load<4>(x[1] + e), load<4>(x[2] + e), load<4>(x[3] + e)};
      transpose(tile);
      for (int i = 0; i < 4; ++i) {
        store<4>(to + (e + i) * stride + j, tile[i]);
      }
    }
    for (; e < width; ++e) {
      store<4>(to + e * stride + j, Floats<4>{scalar(x[0][e]), scalar(x[1][e]), scalar(x[2][e]), scalar(x[3][e])});
    }
  }
  for (; j < count; ++j) {
    const T* x = from + frames[j] * row_stride;
    for (int e = 0; e < width; ++e) {
      to[e * stride + j] = scalar(x[e]);
    }
  }
}

// Lay out the present keys and values of a head.
template <typename T>
void gather(const Attention& a, const Task& task, const int32_t* frames, const Piece* pieces) {
  for (int e = 0; e < task.width; ++e) {
    for (int64_t j = task.keys; j < task.stride; ++j) {
      task.key[e * task.stride + j] = task.value[e * task.stride + j] = 0.0f;
    }
  }
  int64_t done = 0;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const View &key = a.segments[s].key, &value = a.segments[s].value;
    const T *keys = head_of<T>(key, task, pieces[s].first), *values = head_of<T>(value, task, pieces[s].first);
    const int64_t count = pieces[s].present;
    to_columns(keys, key.row, frames + done, count, task.width, task.key + done, task.stride);
    to_columns(values, value.row, frames + done, count, task.width, task.value + done, task.stride);
    done += count;
  }
}

// The opposite, times `scale`, and zeros in the other `rows`.
template <typename T>
void to_rows(const float* from, int64_t stride, const int32_t* frames, int64_t count, int width, float scale, T* to,
             int64_t row_stride, int64_t rows) {
  for (int64_t t = 0, j = 0; count < rows && t < rows; ++t) {
    if (j < count && frames[j] == t) {
      ++j;
    } else {
      for (int e = 0; e < width; ++e) {
        assign(to[t * row_stride + e], 0.0f);
      }
    }
  }
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    T* x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = to + frames[j + i] * row_stride;
    }
    int e = 0;
    for (; e + 4 <= width; e += 4) {
      Floats<4> tile[4];
      for (int i = 0; i < 4; ++i) {
        tile[i] = load<4>(from + (e + i) * stride + j) * scale;
      }
      transpose(tile);
      for (int i = 0; i < 4; ++i) {
        store<4>(x[i] + e, tile[i]);
      }
    }
    for (; e < width; ++e) {
      for (int i = 0; i < 4; ++i) {
        assign(x[i][e], scale * from[e * stride + j + i]);
      }
    }
  }
  for (; j < count; ++j) {
    T* x = to + frames[j] * row_stride;
    for (int e = 0; e < width; ++e) {
      assign(x[e], scale * from[e * stride + j]);
    }
  }
}

// Bring the gradients of the present keys and values back to their frames, and zeros to the others.
template <typename T>
void scatter(const Attention& a, const Task& task, const int32_t* frames, const Piece* pieces) {
  int64_t done = 0;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const Segment& segment = a.segments[s];
    const Piece& piece = pieces[s];
    to_rows(task.grad_key + done, task.stride, frames + done, piece.present, task.width, LN2,
            head_of<T>(segment.grad_key, task, piece.first), segment.grad_key.row, piece.rows);
    to_rows(task.grad_value + done, task.stride, frames + done, piece.present, task.width, 1.0f,
            head_of<T>(segment.grad_value, task, piece.first), segment.grad_value.row, piece.rows);
    done += piece.present;
  }
}

// A row of a head, times `scale`.
template <typename T>
FASTMMKD_INLINE void read_row(const View& view, const Task& task, int64_t row, float scale, float* to) {
  const T* from = head_of<T>(view, task, row);
  int e = 0;
  for (; e + 4 <= task.width; e += 4) {
    store<4>(to + e, load<4>(from + e) * scale);
  }
  for (; e < task.width; ++e) {
    to[e] = scalar(from[e]) * scale;
  }
}

// The same into the row of a.result.
template <typename T>
FASTMMKD_INLINE void write_row(const Attention& a, const Task& task, int64_t row, float scale, const float* from) {
  T* to = head_of<T>(a.result, task, row);
  int e = 0;
  for (; e + 4 <= task.width; e += 4) {
    store<4>(to + e, load<4>(from + e) * scale);
  }
  for (; e < task.width; ++e) {
    assign(to[e], from[e] * scale);
  }
}

FASTMMKD_INLINE void read_row(bool half, const View& view, const Task& task, int64_t row, float scale, float* to) {
  half ? read_row<c10::BFloat16>(view, task, row, scale, to) : read_row<float>(view, task, row, scale, to);
}

FASTMMKD_INLINE void write_row(const Attention& a, const Task& task, int64_t row, float scale, const float* from) {
  a.half ? write_row<c10::BFloat16>(a, task, row, scale, from) : write_row<float>(a, task, row, scale, from);
}

// rows [Q, width] times columns [width, stride]: V vectors of every row, from column j on. start(i, j) is what is
// added to, finish(i, j, x) gets the result.
template <int Q, int V, typename Start, typename Finish>
FASTMMKD_INLINE void multiply_columns(const Task& task, const float* rows, const float* columns, int64_t j,
                                      const Start& start, const Finish& finish) {
  Vector sums[Q][V];
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sums[i][v] = start(i, j + v * LANES);
    }
  }
  for (int e = 0; e < task.width; ++e) {
    Vector column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      column[v] = load<LANES>(columns + e * task.stride + j + v * LANES);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        sums[i][v] += column[v] * rows[i * task.width + e];
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      finish(i, j + v * LANES, sums[i][v]);
    }
  }
}

template <int Q, typename Start, typename Finish>
FASTMMKD_INLINE void multiply(const Task& task, const float* rows, const float* columns, const Start& start,
                              const Finish& finish) {
  int64_t j = 0;
  for (; j + 2 * LANES <= task.stride; j += 2 * LANES) {
    multiply_columns<Q, 2>(task, rows, columns, j, start, finish);
  }
  if (j < task.stride) {
    multiply_columns<Q, 1>(task, rows, columns, j, start, finish);
  }
}

// The sums over all keys of scores [Q, stride] times F of the columns, as part of `rows` [Q, width].
template <int Q, int F>
FASTMMKD_INLINE void sum_keys(const Task& task, const float* scores, const float* columns, float* rows) {
  Vector sums[Q * F]{};
  for (int64_t j = 0; j < task.stride; j += LANES) {
    Vector score[Q];
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      score[i] = load<LANES>(scores + i * task.stride + j);
    }
#pragma GCC unroll 5
    for (int f = 0; f < F; ++f) {
      const Vector column = load<LANES>(columns + f * task.stride + j);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) {
        sums[i * F + f] += score[i] * column;
      }
    }
  }
  float folded[Q * F + SLACK];
  fold<add, Q * F>(sums, folded);
  for (int i = 0; i < Q; ++i) {
    for (int f = 0; f < F; ++f) {
      rows[i * task.width + f] = folded[i * F + f];
    }
  }
}

// Adds to V vectors of each of F columns the sums over the block's queries of scores [Q, stride] times rows [Q, width].
template <int Q, int F, int V>
FASTMMKD_INLINE void sum_queries(const Task& task, const float* scores, const float* rows, float* columns, int64_t j) {
  Vector sums[F][V];
#pragma GCC unroll 5
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sums[f][v] = load<LANES>(columns + f * task.stride + j + v * LANES);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
    Vector score[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      score[v] = load<LANES>(scores + i * task.stride + j + v * LANES);
    }
#pragma GCC unroll 5
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        sums[f][v] += score[v] * rows[i * task.width + f];
      }
    }
  }
#pragma GCC unroll 5
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      store<LANES>(columns + f * task.stride + j + v * LANES, sums[f][v]);
    }
  }
}

// The first `left` features of rows [Q, width]: scores [Q, stride] times the transposed columns.
template <int Q, int F = FEATURES>
void to_queries(const Task& task, const float* scores, const float* columns, float* rows, int left) {
  constexpr int TOGETHER = Q < SUM_ROWS ? Q : SUM_ROWS;
  if (task.part >= F) {
    for (; left >= F; left -= F, columns += F * task.stride, rows += F) {
      for (int i = 0; i < Q; i += TOGETHER) {
        sum_keys<TOGETHER, F>(task, scores + i * task.stride, columns, rows + i * task.width);
      }
    }
  }
  if constexpr (F > 1) {
    if (left > 0) {
      to_queries<Q, F - 1>(task, scores, columns, rows, left);
    }
  }
}

// Adds to the first `left` columns the transposed scores [Q, stride] times rows [Q, width].
template <int Q, int F = FEATURES>
void to_keys(const Task& task, const float* scores, const float* rows, float* columns, int left) {
  if (task.part >= F) {
    for (; left >= F; left -= F, columns += F * task.stride, rows += F) {
      int64_t j = 0;
      for (; j + 2 * LANES <= task.stride; j += 2 * LANES) {
        sum_queries<Q, F, 2>(task, scores, rows, columns, j);
      }
      if (j < task.stride) {
        sum_queries<Q, F, 1>(task, scores, rows, columns, j);
      }
    }
  }
  if constexpr (F > 1) {
    if (left > 0) {
      to_keys<Q, F - 1>(task, scores, rows, columns, left);
    }
  }
}

// The scores of a block's queries with all keys, in units of ln 2; -infinite where there is no key.
template <int Q, typename Finish>
FASTMMKD_INLINE void score(const Task& task, const Finish& finish) {
  multiply<Q>(task, task.query, task.key, [&](int, int64_t j) { return load<LANES>(task.filler + j); }, finish);
}

// Q queries of a task from `row` on; tops and shares, both [Q]: their statistics.
template <int Q>
__attribute__((noinline)) void attend(const Attention& a, const Task& task, int64_t row, float* tops, float* shares) {
  Vector best[Q], total[Q];
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
    best[i] = Vector{} - INFINITY;
    read_row(a.half, a.query, task, row + i, a.scale, task.query + i * task.width);
  }
  score<Q>(task, [&](int i, int64_t j, Vector x) {
    store<LANES>(task.scores + i * task.stride + j, x);
    best[i] = maximum(best[i], x);
  });
  float top[Q + SLACK], sum[Q + SLACK];
  fold<maximum, Q>(best, top);
  for (int i = 0; i < Q; ++i) {
    float* scores = task.scores + i * task.stride;
    Vector sums{};
    for (int64_t j = 0; j < task.stride; j += LANES) {
      const Vector p = exp2(load<LANES>(scores + j) - top[i]);
      store<LANES>(scores + j, p);
      sums += p;
    }
    total[i] = sums;
  }
  fold<add, Q>(total, sum);
  to_queries<Q>(task, task.scores, task.value, task.result, task.width);
  for (int i = 0; i < Q; ++i) {
    tops[i] = top[i];
    shares[i] = 1.0f / sum[i];
    write_row(a, task, row + i, shares[i], task.result + i * task.width);
  }
}

// The gradient of the same queries. Adds to the task's gradients of keys and values.
template <int Q>
__attribute__((noinline)) void differentiate(const Attention& a, const Task& task, int64_t row, const float* tops,
                                             const float* shares) {
  float delta[Q];  // grad . out
  for (int i = 0; i < Q; ++i) {
    float* grad = task.grad + i * task.width;
    read_row(a.half, a.query, task, row + i, a.scale, task.query + i * task.width);
    read_row(a.half, a.out, task, row + i, 1.0f, task.result);
    read_row(a.half, a.grad, task, row + i, shares[i], grad);  // and so scores need not be divided
    delta[i] = 0.0f;
    for (int e = 0; e < task.width; ++e) {
      delta[i] -= grad[e] * task.result[e];
    }
  }
  score<Q>(task, [&](int i, int64_t j, Vector x) {
    store<LANES>(task.scores + i * task.stride + j, exp2(x - tops[i]));
  });
  multiply<Q>(task, task.grad, task.value, [&](int i, int64_t) { return Vector{} + delta[i]; },
              [&](int i, int64_t j, Vector x) {
                const int64_t at = i * task.stride + j;
                store<LANES>(task.grad_scores + at, x * load<LANES>(task.scores + at));
              });
  to_keys<Q>(task, task.scores, task.grad, task.grad_value, task.width);
  to_keys<Q>(task, task.grad_scores, task.query, task.grad_key, task.width);
  to_queries<Q>(task, task.grad_scores, task.key, task.result, task.width);
  for (int i = 0; i < Q; ++i) {
    write_row(a, task, row + i, LN2 * a.scale, task.result + i * task.width);
  }
}

template <int Q>
FASTMMKD_INLINE void run_block(const Attention& a, const Task& task, int64_t row) {
  float* tops = a.statistics + (task.group * a.heads + task.head) * 2 * a.rows + row;
  float* shares = tops + a.rows;
  a.backward ? differentiate<Q>(a, task, row, tops, shares) : attend<Q>(a, task, row, tops, shares);
}

// The results of queries that have no key.
template <typename T>
void clear_results(const Attention& a, const Task& task) {
  T* result = head_of<T>(a.result, task, task.first);
  for (int64_t t = 0; t < task.queries; ++t) {
    for (int e = 0; e < task.width; ++e) {
      assign(result[t * a.result.row + e], 0.0f);
    }
  }
  if (!a.backward) {
    float* tops = a.statistics + (task.group * a.heads + task.head) * 2 * a.rows + task.first;
    std::memset(tops, 0, task.queries * sizeof(float));
    std::memset(tops + a.rows, 0, task.queries * sizeof(float));
  }
}

template <typename T>
void run_tasks(const Attention& a, int64_t begin, int64_t end, float* memory) {
  Task task{};
  task.width = static_cast<int>(a.width / a.heads);
  const int parts = (task.width + FEATURES - 1) / FEATURES;
  task.part = (task.width + parts - 1) / parts;
  const int64_t room = (a.longest + LANES - 1) / LANES * LANES, features = task.width;
  task.filler = memory;
  task.key = task.filler + room;
  task.value = task.key + features * room;
  task.grad_key = task.value + features * room;
  task.grad_value = task.grad_key + features * room;
  task.scores = task.grad_value + features * room;
  task.grad_scores = task.scores + ROWS * room;
  task.query = task.grad_scores + ROWS * room;
  task.grad = task.query + ROWS * features;
  task.result = task.grad + ROWS * features;
  Piece* pieces = reinterpret_cast<Piece*>(task.result + ROWS * features);
  int32_t* frames = reinterpret_cast<int32_t*>(pieces + a.segment_count);
  int64_t sample_before = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / a.heads;  // of all groups
    task.head = i % a.heads;
    if (sample != sample_before) {
      task.group = sample / a.layout.samples;
      const int64_t* range = a.layout.of(task.group, sample % a.layout.samples);
      task.first = range[0];
      task.queries = range[1] - range[0];
      task.keys = find_present(a, task.group, sample % a.layout.samples, frames, pieces);
      task.stride = (task.keys + LANES - 1) / LANES * LANES;
      for (int64_t j = 0; j < task.stride; ++j) {
        task.filler[j] = j < task.keys ? 0.0f : -INFINITY;
      }
      sample_before = sample;
    }
    if (a.backward) {
      std::memset(task.grad_key, 0, features * task.stride * sizeof(float));
      std::memset(task.grad_value, 0, features * task.stride * sizeof(float));
    }
    if (task.keys == 0) {
      clear_results<T>(a, task);
    } else {
      gather<T>(a, task, frames, pieces);
      int64_t row = task.first;
      const int64_t row_end = task.first + task.queries;
      for (; row + ROWS <= row_end; row += ROWS) {
        run_block<ROWS>(a, task, row);
      }
      for (; row < row_end; ++row) {
        run_block<1>(a, task, row);
      }
    }
    if (a.backward) {
      scatter<T>(a, task, frames, pieces);
    }
  }
}

void attention(const Attention& a, int64_t begin, int64_t end, float* memory) {
  a.half ? run_tasks<c10::BFloat16>(a, begin, end, memory) : run_tasks<float>(a, begin, end, memory);
}
