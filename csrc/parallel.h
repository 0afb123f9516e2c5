// Work over torch's intra-op threads (torch.set_num_threads is respected). Every parallel region of the CPU
// backend goes through `parallel_blocks` or `parallel_rows`.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "small_regions.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace diffnl {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether this process came from fork(). The threads of OpenMP exist in the parent only, but the child's copy of
// the OpenMP runtime believes in them, and a parallel region would wait for them for ever.
inline std::atomic<bool> is_forked_child{false};
#if !defined(_WIN32)
inline const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });
#endif

// Work is measured in nanoseconds that one thread needs. On an idle machine two threads take as long as one for
// 5 to 20 us of work, and 0.7 to 0.9 of the time from 90 us on. With more of them a list of 64 atoms takes 0.61 of
// the time on 4 or 8, one of 343 atoms 0.45 on 4 and 0.32 on 8; 16 are no better than 8. Where other programs keep
// the cores busy, each region waits for the system to run the other threads: 4 to 16 ms, however small the work.
// Below the first number, for each thread, there are no threads; up to the second, while they come in time; above
// it, always.
constexpr double kLeastForEachThread = 10e3, kAlwaysThreads = 1e6;
// A region is late if it takes this much longer than one thread should. An estimate that is as far off is late
// too.
constexpr double kLate = 1e6;

inline int64_t num_threads() { return int64_t(torch::stable::get_num_threads()); }

inline bool pays_for_threads(double work) {
  // Tiny work does not ask torch, which takes longer than the comparison.
  return work >= kLeastForEachThread && work >= kLeastForEachThread * static_cast<double>(num_threads());
}
inline bool is_small(double work) { return pays_for_threads(work) && work < kAlwaysThreads; }
inline SmallRegions small_regions;

inline int64_t threads_for(double work) {
  const bool alone = (work < kAlwaysThreads && (!is_small(work) || small_regions.alone())) ||
                     is_forked_child.load(std::memory_order_relaxed);
  return alone ? 1 : num_threads();
}

// Calls f(first, last) on consecutive blocks of [0, size), handed to threads as they become free: rows are
// uneven (a slab has empty regions). `work` is about how many nanoseconds one thread needs for all of them. Who
// runs a block never shows in a result. f must not throw: an exception would lose its text on the way through
// torch's C interface.
//
// `divisible`: threads would share the work if small regions were not in a pause.
template <typename F>
inline void parallel_region(int64_t size, int64_t block, bool divisible, double work, const F& f) {
  const int64_t num_blocks = ceil_div(size, block);
  std::atomic<int64_t> next{0};
  const auto take_blocks = [&](int64_t, int64_t) {
    for (int64_t b = next++; b < num_blocks; b = next++) f(b * block, std::min(size, (b + 1) * block));
  };
  const int64_t threads = std::min(threads_for(work), num_blocks);
  if (threads <= 1) {
    if (divisible && is_small(work)) small_regions.ran_alone();
    take_blocks(0, 1);
    return;
  }
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  torch::stable::parallel_for(0, threads, 1, take_blocks);
  const std::chrono::duration<double, std::nano> took = Clock::now() - begin;
  if (is_small(work)) small_regions.ran_on_threads(took.count() > work + kLate);
}

template <typename F>
inline void parallel_blocks(int64_t size, int64_t block, double work, const F& f) {
  parallel_region(size, block, size > block, work, f);
}

// The same over rows, in blocks of a size that suits the threads: all of them have some to the end. What rows
// share is done once a block, so one thread takes many at once, in a pause too.
template <typename F>
inline void parallel_rows(int64_t num_rows, double work, const F& f) {
  constexpr int64_t fewest = 16, most = 512;
  const int64_t threads = threads_for(work);
  const int64_t block = threads == 1 ? most : std::clamp(num_rows / (8 * threads), fewest, most);
  parallel_region(num_rows, block, num_rows > fewest, work, f);
}

}  // namespace diffnl
