// Tasks of different sizes, divided among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace fastmmkd {

// body(begin, end) for ranges of tasks, on as many threads as have `grain` of work. ends: the sums of the work of the
// tasks up to and with each; every task has some.
template <typename Body>
void parallel_by_work(const std::vector<int64_t>& ends, int64_t grain, const Body& body) {
  const auto first_after = [&](int64_t sum) { return std::upper_bound(ends.begin(), ends.end(), sum) - ends.begin(); };
  at::parallel_for(0, ends.empty() ? 0 : ends.back(), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = first_after(begin), last = first_after(end);
    if (first < last) {
      body(first, last);
    }
  });
}

}  // namespace fastmmkd
