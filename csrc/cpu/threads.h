// Threads that share the work of one call. They are started when first needed, live on, and block when there is nothing
// to do, because polling threads would take the processor from the caller's next work, in BLAS for example.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace resm::cpu {

// Calls `share` once on this thread and, at the same time, once on each of up to `others` more threads that come free
// before this one is done. It returns when all these calls have returned, and throws the first of their exceptions.
// Several threads may call this at the same time. `share` must not call it.
void share_out(int others, const std::function<void()>& share);

// Calls work(i, scratch) for every i below n, on up to `threads` threads, this one among them, with one
// `Scratch(make())` each. The thread that gets an i differs from call to call, but each thread takes runs of them in
// ascending order. After an exception no further work begins, and the first one is thrown when all threads have stopped.
template <class Make, class Work>
void parallel_for(int64_t n, int threads, Make make, Work work) {
  if (threads <= 1 || n <= 1) {
    auto scratch = make();
    for (int64_t i = 0; i < n; ++i) work(i, scratch);
    return;
  }
  // Runs, so that threads seldom touch the same (huge) page of an output for the first time together.
  const int64_t grain = std::clamp<int64_t>(n / (int64_t(8) * threads), 1, 16), runs = (n + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  const auto share = [&] {
    try {
      int64_t begin = next.fetch_add(grain);
      if (begin >= n) return;  // came too late: no scratch
      auto scratch = make();
      for (; begin < n; begin = next.fetch_add(grain))
        for (int64_t i = begin; i < std::min(begin + grain, n); ++i) work(i, scratch);
    } catch (...) {
      next.store(n);
      throw;
    }
  };
  share_out(static_cast<int>(std::min<int64_t>(threads, runs) - 1), std::ref(share));
}

}  // namespace resm::cpu
