// Work over torch's intra-op threads (torch.set_num_threads is respected).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace diffnl {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(first, last) on consecutive blocks of [0, size), handed to threads as they become free: rows are
// uneven (a slab has empty regions). Who runs a block never shows in a result. f must not throw: an
// exception would lose its text on the way through torch's C interface.
template <typename F>
inline void parallel_blocks(int64_t size, int64_t block, const F& f) {
  const int64_t num_blocks = ceil_div(size, block);
  if (num_blocks <= 1) {
    if (size > 0) f(int64_t(0), size);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t b = next++; b < num_blocks; b = next++) f(b * block, std::min(size, (b + 1) * block));
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), num_blocks);
  torch::stable::parallel_for(0, threads, 1, work);
}

}  // namespace diffnl
