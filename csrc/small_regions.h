// Whether threads are asked for where the work is small.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace diffnl {

// Small regions gain from threads on an idle machine only. Where other programs keep the cores busy, each waits
// until the system runs the other thread. After a region that was late the next ones run on the calling thread:
// 8 of them, then twice as many each time, up to 4096. A region in time halves that number.
// Host threads that call at once may lose a count. Who runs a block never shows in a result.
class SmallRegions {
 public:
  bool alone() const { return left_.load(std::memory_order_relaxed) > 0; }

  void ran_alone() {
    if (alone()) left_.fetch_sub(1, std::memory_order_relaxed);
  }

  void ran_on_threads(bool late) {
    const int32_t before = pause_.load(std::memory_order_relaxed);
    const int32_t pause = late ? std::clamp(2 * before, 8, 4096) : before / 2;
    pause_.store(pause, std::memory_order_relaxed);
    if (late) left_.store(pause, std::memory_order_relaxed);
  }

 private:
  std::atomic<int32_t> left_{0}, pause_{0};
};

}  // namespace diffnl
