// See cross_attention.cpp. A task is one head of one sample. Its keys and values that are present are laid out feature by
// feature, [E, n] with n filled up to whole vectors, so that one vector holds one feature of LANES keys; a block of
// queries meets them vector by vector, and no score is ever stored. E is the head width filled up with zeros, or 0 for a
// width that is known only at run time.

constexpr int REGISTERS = LANES == 16 ? 22 : 10;  // for sums

// Queries in a block: as many as leave their sums (E each) in registers.
template <int E>
constexpr int BLOCK = E == 0 || E > REGISTERS ? 1 : REGISTERS / E > 4 ? 4 : REGISTERS / E;

// Floats of a row of run-time width with its slack, in whole vectors.
FASTMMKD_INLINE int64_t row_room(int64_t width) {
  return (width + SLACK + LANES - 1) / LANES * LANES;
}

struct Task {
  int64_t group, row, head;
  int64_t keys, stride;  // keys present; the same in whole vectors
  int width;             // of the head, without filling
  float *filler, *key, *value, *grad_key, *grad_value;
  float* rows;  // query, grad, out, result and sums of a width known at run time

  template <int E>
  int features() const {
    return E == 0 ? width : E;
  }
};

// The frames of every segment that may be attended to; returns how many.
FASTMMKD_INLINE int64_t find_present(const Attention& a, int64_t group, int64_t row, int32_t* frames, int64_t* counts) {
  int64_t total = 0;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const View& mask = a.segments[s].mask;
    const bool* present = static_cast<const bool*>(mask.data) + group * mask.group + row * mask.row;
    int64_t count = 0;
    for (int64_t t = 0; t < a.segments[s].length; ++t) {
      frames[total + count] = static_cast<int32_t>(t);
      count += present[t * mask.frame];
    }
    counts[s] = count;
    total += count;
  }
  return total;
}

template <typename T>
FASTMMKD_INLINE const T* head_of(const View& view, const Task& task) {
  return static_cast<const T*>(view.data) + task.group * view.group + task.row * view.row + task.head * task.width;
}

template <typename T>
FASTMMKD_INLINE void transpose(const T* from, int64_t row_stride, const int32_t* frames, int64_t count, int width,
                               float* to, int64_t stride) {
  for (int64_t j = 0; j < count; ++j) {
    const T* x = from + frames[j] * row_stride;
    for (int e = 0; e < width; ++e) {
      to[e * stride + j] = scalar(x[e]);
    }
  }
}

// Lay out the present keys and values of a head.
template <int E, typename T>
void gather(const Attention& a, const Task& task, const int32_t* frames, const int64_t* counts) {
  for (int e = 0; e < task.features<E>(); ++e) {
    const int64_t filled = e < task.width ? task.keys : 0;
    for (int64_t j = filled; j < task.stride; ++j) {
      task.key[e * task.stride + j] = task.value[e * task.stride + j] = 0.0f;
    }
  }
  int64_t done = 0;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const View &key = a.segments[s].key, &value = a.segments[s].value;
    const T *keys = head_of<T>(key, task), *values = head_of<T>(value, task);
    if (task.width == E) {  // a constant, and so no inner loop
      transpose(keys, key.frame, frames + done, counts[s], E, task.key + done, task.stride);
      transpose(values, value.frame, frames + done, counts[s], E, task.value + done, task.stride);
    } else {
      transpose(keys, key.frame, frames + done, counts[s], task.width, task.key + done, task.stride);
      transpose(values, value.frame, frames + done, counts[s], task.width, task.value + done, task.stride);
    }
    done += counts[s];
  }
}

template <typename T>
FASTMMKD_INLINE void transpose_back(const float* from, int64_t stride, const int32_t* frames, int64_t count, int width,
                                    float scale, T* to, int64_t row_stride, int64_t rows) {
  int64_t j = 0;
  for (int64_t t = 0; t < rows; ++t) {
    T* x = to + t * row_stride;
    if (j < count && frames[j] == t) {
      for (int e = 0; e < width; ++e) {
        assign(x[e], scale * from[e * stride + j]);
      }
      ++j;
    } else {
      for (int e = 0; e < width; ++e) {
        assign(x[e], 0.0f);
      }
    }
  }
}

// Bring the gradients of the present keys and values back to their frames, and zeros to the others.
template <int E, typename T>
void scatter(const Attention& a, const Task& task, const int32_t* frames, const int64_t* counts) {
  int64_t done = 0;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const Segment& segment = a.segments[s];
    const int64_t first = (task.group * a.batch + task.row) * segment.length * a.width + task.head * task.width;
    T* keys = static_cast<T*>(segment.grad_key) + first;
    T* values = static_cast<T*>(segment.grad_value) + first;
    const int width = task.width == E ? E : task.width;
    transpose_back(task.grad_key + done, task.stride, frames + done, counts[s], width, LN2, keys, a.width,
                   segment.length);
    transpose_back(task.grad_value + done, task.stride, frames + done, counts[s], width, 1.0f, values, a.width,
                   segment.length);
    done += counts[s];
  }
}

// Q rows of a head, times `scale`, as [Q, E].
template <int E, int Q, typename T>
FASTMMKD_INLINE void read_rows(const View& view, const Task& task, int64_t t, float scale, float* to) {
  const T* from = head_of<T>(view, task) + t * view.frame;
  const int features = task.features<E>();
  for (int i = 0; i < Q; ++i) {
    for (int e = 0; e < features; ++e) {
      to[i * features + e] = e < task.width ? scale * scalar(from[i * view.frame + e]) : 0.0f;
    }
  }
}

// [Q, E] times `scale` into the same rows of a.result.
template <int E, int Q, typename T>
FASTMMKD_INLINE void write_rows(const Attention& a, const Task& task, int64_t t, float scale, const float* from) {
  const int64_t sample = task.group * a.batch + task.row;
  T* to = static_cast<T*>(a.result) + (sample * a.queries + t) * a.width + task.head * task.width;
  for (int i = 0; i < Q; ++i) {
    for (int e = 0; e < task.width; ++e) {
      assign(to[i * a.width + e], scale * from[i * task.features<E>() + e]);
    }
  }
}

// Scores of Q queries and the LANES keys from j on, in units of ln 2; -infinite where there is no key.
template <int E, int Q>
FASTMMKD_INLINE void score(const Task& task, int64_t j, const float* query, Vector* scores) {
  const Vector filler = load<LANES>(task.filler + j);
  const int features = task.features<E>();
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
    scores[i] = filler;
  }
#pragma GCC unroll 16
  for (int e = 0; e < features; ++e) {
    const Vector key = load<LANES>(task.key + e * task.stride + j);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      scores[i] += key * query[i * features + e];
    }
  }
}

template <int E, int Q>
FASTMMKD_INLINE void clear(const Task& task, Vector* sums) {
  const int count = Q * task.features<E>();
#pragma GCC unroll 32
  for (int i = 0; i < count; ++i) {
    sums[i] = Vector{};
  }
}

template <int E, int Q>
FASTMMKD_INLINE void fold_sums(const Task& task, const Vector* sums, float* to) {
  if constexpr (E != 0) {
    fold<add, Q * E>(sums, to);
  } else {
    for (int i = 0; i < task.width; ++i) {
      fold<add, 1>(sums + i, to + i);
    }
  }
}

// out: [Q, E], not yet divided by the sums of the softmax. top: the largest scores; share: 1 / the sums, both [Q].
template <int E, int Q>
FASTMMKD_INLINE void attend(const Task& task, const float* query, Vector* sums, float* out, float* top, float* share) {
  const int features = task.features<E>();
  Vector best[Q], total[Q];
  for (int i = 0; i < Q; ++i) {
    best[i] = Vector{} - INFINITY;
    total[i] = Vector{};
  }
  for (int64_t j = 0; j < task.stride; j += LANES) {
    Vector scores[Q];
    score<E, Q>(task, j, query, scores);
    for (int i = 0; i < Q; ++i) {
      best[i] = maximum(best[i], scores[i]);
    }
  }
  fold<maximum, Q>(best, top);
  clear<E, Q>(task, sums);
  for (int64_t j = 0; j < task.stride; j += LANES) {
    Vector p[Q];
    score<E, Q>(task, j, query, p);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      p[i] = exp2(p[i] - top[i]);
      total[i] += p[i];
    }
#pragma GCC unroll 16
    for (int e = 0; e < features; ++e) {
      const Vector value = load<LANES>(task.value + e * task.stride + j);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) {
        sums[i * features + e] += p[i] * value;
      }
    }
  }
  fold<add, Q>(total, share);
  fold_sums<E, Q>(task, sums, out);
  for (int i = 0; i < Q; ++i) {
    share[i] = 1.0f / share[i];
  }
}

// grad: [Q, E] of out; delta: [Q], grad . out; grad_query: [Q, E]. Adds to the task's gradients of keys and values.
template <int E, int Q>
FASTMMKD_INLINE void differentiate(const Task& task, const float* query, const float* grad, const float* top,
                                   const float* share, const float* delta, Vector* sums, float* grad_query) {
  const int features = task.features<E>();
  clear<E, Q>(task, sums);
  for (int64_t j = 0; j < task.stride; j += LANES) {
    Vector p[Q], ds[Q];
    score<E, Q>(task, j, query, p);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      p[i] = exp2(p[i] - top[i]) * share[i];
      ds[i] = Vector{} - delta[i];
    }
#pragma GCC unroll 16
    for (int e = 0; e < features; ++e) {
      const Vector value = load<LANES>(task.value + e * task.stride + j);
      Vector grad_value = load<LANES>(task.grad_value + e * task.stride + j);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) {
        ds[i] += value * grad[i * features + e];
        grad_value += p[i] * grad[i * features + e];
      }
      store<LANES>(task.grad_value + e * task.stride + j, grad_value);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      ds[i] *= p[i];
    }
#pragma GCC unroll 16
    for (int e = 0; e < features; ++e) {
      const Vector key = load<LANES>(task.key + e * task.stride + j);
      Vector grad_key = load<LANES>(task.grad_key + e * task.stride + j);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) {
        sums[i * features + e] += ds[i] * key;
        grad_key += ds[i] * query[i * features + e];
      }
      store<LANES>(task.grad_key + e * task.stride + j, grad_key);
    }
  }
  fold_sums<E, Q>(task, sums, grad_query);
}

// Queries t to t + Q of a task.
template <int E, int Q, typename T>
__attribute__((noinline)) void run_block(const Attention& a, const Task& task, int64_t t) {
  constexpr int ROOM = E == 0 ? 1 : Q * E + SLACK;
  const int64_t room = row_room(task.width);
  float local[4][ROOM];
  Vector local_sums[E == 0 ? 1 : Q * E];
  float* query = E == 0 ? task.rows : local[0];
  float* result = E == 0 ? task.rows + room : local[1];
  Vector* sums = E == 0 ? reinterpret_cast<Vector*>(task.rows + 4 * room) : local_sums;
  float* tops = a.statistics + ((task.group * a.batch + task.row) * a.heads + task.head) * 2 * a.queries + t;
  float* shares = tops + a.queries;
  read_rows<E, Q, T>(a.query, task, t, a.scale, query);
  if (!a.backward) {
    float top[Q + SLACK], share[Q + SLACK];
    attend<E, Q>(task, query, sums, result, top, share);
    for (int i = 0; i < Q; ++i) {
      tops[i] = top[i];
      shares[i] = share[i];
      for (int e = 0; e < task.features<E>(); ++e) {
        result[i * task.features<E>() + e] *= share[i];
      }
    }
    write_rows<E, Q, T>(a, task, t, 1.0f, result);
  } else {
    float* grad = E == 0 ? task.rows + 2 * room : local[2];
    float* out = E == 0 ? task.rows + 3 * room : local[3];
    read_rows<E, Q, T>(a.grad, task, t, 1.0f, grad);
    read_rows<E, Q, T>(a.out, task, t, 1.0f, out);
    float delta[Q] = {};
    for (int i = 0; i < Q; ++i) {
      for (int e = 0; e < task.features<E>(); ++e) {
        delta[i] += grad[i * task.features<E>() + e] * out[i * task.features<E>() + e];
      }
    }
    differentiate<E, Q>(task, query, grad, tops, shares, delta, sums, result);
    write_rows<E, Q, T>(a, task, t, LN2 * a.scale, result);
  }
}

// The results of queries that have no key.
template <typename T>
void clear_results(const Attention& a, const Task& task) {
  const int64_t sample = task.group * a.batch + task.row;
  T* result = static_cast<T*>(a.result) + sample * a.queries * a.width + task.head * task.width;
  for (int64_t t = 0; t < a.queries; ++t) {
    for (int e = 0; e < task.width; ++e) {
      assign(result[t * a.width + e], 0.0f);
    }
  }
  if (!a.backward) {
    std::memset(a.statistics + (sample * a.heads + task.head) * 2 * a.queries, 0, 2 * a.queries * sizeof(float));
  }
}

template <int E, typename T>
void run_tasks(const Attention& a, int64_t begin, int64_t end, float* memory) {
  Task task{};
  task.width = static_cast<int>(a.width / a.heads);
  const int64_t room = (a.longest + LANES - 1) / LANES * LANES, features = task.features<E>();
  task.filler = memory;
  task.key = task.filler + room;
  task.value = task.key + features * room;
  task.grad_key = task.value + features * room;
  task.grad_value = task.grad_key + features * room;
  task.rows = task.grad_value + features * room;
  int64_t* counts = reinterpret_cast<int64_t*>(task.rows + (E == 0 ? 4 * row_room(features) + features * LANES : 0));
  int32_t* frames = reinterpret_cast<int32_t*>(counts + a.segment_count);
  int64_t sample_before = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / a.heads;
    task.group = sample / a.batch;
    task.row = sample % a.batch;
    task.head = i % a.heads;
    if (sample != sample_before) {
      task.keys = find_present(a, task.group, task.row, frames, counts);
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
      gather<E, T>(a, task, frames, counts);
      int64_t t = 0;
      for (; t + BLOCK<E> <= a.queries; t += BLOCK<E>) {
        run_block<E, BLOCK<E>, T>(a, task, t);
      }
      for (; t < a.queries; ++t) {
        run_block<E, 1, T>(a, task, t);
      }
    }
    if (a.backward) {
      scatter<E, T>(a, task, frames, counts);
    }
  }
}

template <typename T>
void run_of_width(const Attention& a, int64_t begin, int64_t end, float* memory) {
  const int64_t width = a.width / a.heads;
  if (width <= 4) {
    run_tasks<4, T>(a, begin, end, memory);
  } else if (width == 5) {
    run_tasks<5, T>(a, begin, end, memory);
  } else if (width <= 8) {
    run_tasks<8, T>(a, begin, end, memory);
  } else if (width <= 10) {
    run_tasks<10, T>(a, begin, end, memory);
  } else if (width <= 16) {
    run_tasks<16, T>(a, begin, end, memory);
  } else {
    run_tasks<0, T>(a, begin, end, memory);
  }
}

void attention(const Attention& a, int64_t begin, int64_t end, float* memory) {
  a.half ? run_of_width<c10::BFloat16>(a, begin, end, memory) : run_of_width<float>(a, begin, end, memory);
}
