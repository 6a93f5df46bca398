// Work for all threads where each takes its next item when it has done one: at::parallel_for deals equal shares, and waits
// for the thread whose core another process has its hands on.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace mambavision {

// Calls work(item) once for every item below `count`; which thread takes which is open, so no sum may depend on it.
template <class Work>
void parallel_items(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t item = next++; item < count; item = next++) work(item);
  });
}

}  // namespace mambavision
