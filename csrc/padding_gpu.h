// What pairs leave of a padded list, for the kernels that write lists.
#pragma once

#include "gpu.h"
#include "neighbors_gpu.h"

namespace diffnl {

// The number of pairs is on the device, as it is told in ops.cpp.
struct Padding {
  const int64_t* num_pairs;  // ()
  int64_t capacity, num_atoms;
  double cutoff;

  __device__ bool has_failed() const {
    return static_cast<uint64_t>(*num_pairs) > static_cast<uint64_t>(capacity);
  }
};

namespace {

// By all threads of a grid. An empty slot holds the last atom with itself, at the length of the cutoff: rows stay
// in order, and a smooth envelope makes nothing of such a pair. The vectors of a list that has failed are NaN.
template <typename T>
__device__ inline void pad_slots(const Padding& padding, const GpuPairs<T>& out) {
  const bool failed = padding.has_failed();
  const int64_t last_atom = padding.num_atoms > 0 ? padding.num_atoms - 1 : 0, capacity = padding.capacity;
  const T length = failed ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(padding.cutoff);
  int64_t p = (failed ? 0 : *padding.num_pairs) + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; p < capacity; p += int64_t(gridDim.x) * blockDim.x) {
    out.mapping[p] = out.mapping[capacity + p] = last_atom;
    for (int k = 0; k < 3; ++k) {
      out.shifts[3 * p + k] = 0;
      out.vectors[3 * p + k] = k == 0 ? length : 0 * length;
    }
  }
}

}  // namespace

}  // namespace diffnl
