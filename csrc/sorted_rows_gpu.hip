// Rows in order of (j, S), on a GPU.

#include "gpu.h"
#include "neighbors_gpu.h"

namespace diffnl {

namespace {

// (j, S) in the order of sorted rows.
struct RowKey {
  int32_t j, s0, s1, s2;
};

__device__ inline bool operator<(const RowKey& a, const RowKey& b) {
  if (a.j != b.j) return a.j < b.j;
  if (a.s0 != b.s0) return a.s0 < b.s0;
  if (a.s1 != b.s1) return a.s1 < b.s1;
  return a.s2 < b.s2;
}

template <typename T>
__device__ inline RowKey row_key(const GpuPairs<T>& pairs, int64_t p) {
  const int32_t* S = pairs.shifts + 3 * p;
  return {static_cast<int32_t>(pairs.mapping[pairs.num_pairs + p]), S[0], S[1], S[2]};
}

// A block a row: each entry counts the smaller ones. Rows are short; longer ones come from a copy, piece by piece.
template <typename T>
__global__ __launch_bounds__(kThreads) void sort_row(GpuSearch<T> s, GpuPairs<T> from, GpuPairs<T> pairs) {
  __shared__ RowKey keys[kSortedInPlace];
  const int thread = static_cast<int>(threadIdx.x);
  if (has_failed(s)) return;
  for (int64_t i = blockIdx.x; i < s.num_atoms; i += gridDim.x) {
    const int64_t first = s.offsets[i], length = s.offsets[i + 1] - first;
    for (int64_t e0 = 0; e0 < length; e0 += kThreads) {
      const int64_t e = e0 + thread;
      RowKey own{0, 0, 0, 0};
      int64_t smaller = 0;
      // A row that fits is read once, before anything of it is overwritten.
      for (int64_t begin = 0; begin < length; begin += kSortedInPlace) {
        const int64_t size = std::min(length - begin, int64_t(kSortedInPlace));
        if (e0 == 0 || length > kSortedInPlace) {
          __syncthreads();
          for (int64_t k = thread; k < size; k += kThreads) keys[k] = row_key(from, first + begin + k);
          __syncthreads();
        }
        if (e >= length) continue;
        own = length > kSortedInPlace ? row_key(from, first + e) : keys[e];
        for (int64_t k = 0; k < size; ++k) smaller += keys[k] < own;
      }
      if (e >= length) continue;
      const int64_t p = first + smaller;
      pairs.mapping[p] = i;
      pairs.mapping[pairs.num_pairs + p] = own.j;
      pairs.shifts[3 * p] = own.s0;
      pairs.shifts[3 * p + 1] = own.s1;
      pairs.shifts[3 * p + 2] = own.s2;
    }
    __syncthreads();
  }
}

// Finds the reverse of each pair by bisection in its sorted row.
template <typename T>
__global__ __launch_bounds__(kThreads) void link_sorted(GpuSearch<T> s, GpuPairs<T> pairs) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (has_failed(s) || p >= (s.capacity >= 0 ? *s.num_pairs : pairs.num_pairs)) return;
  const RowKey key = row_key(pairs, p);
  const RowKey reverse{static_cast<int32_t>(pairs.mapping[p]), -key.s0, -key.s1, -key.s2};
  const int64_t first = s.offsets[key.j];
  int64_t low = first, high = s.offsets[int64_t(key.j) + 1];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (row_key(pairs, middle) < reverse)
      low = middle + 1;
    else
      high = middle;
  }
  pairs.links[p] = Link::make(key.j, static_cast<uint32_t>(low - first), key.s0, key.s1, key.s2);
}

}  // namespace

template <typename T>
void sort_rows(const GpuSearch<T>& s, const GpuPairs<T>& from, const GpuPairs<T>& pairs, GpuStream stream) {
  if (pairs.num_pairs == 0 || s.num_atoms == 0) return;
  const int64_t blocks = blocks_in_turns(std::min<int64_t>(s.num_atoms, int64_t(1) << 20), 1, kThreads);
  DIFFNL_LAUNCH(sort_row<T>, blocks, kThreads, stream, s, from, pairs);
  const GpuPairList list{pairs.mapping, pairs.shifts,    nullptr,     nullptr,      s.system_idx,
                         s.num_pairs,   pairs.num_pairs, s.num_atoms, s.num_systems};
  pair_vectors_gpu(list, s.positions, s.cell, pairs.vectors, stream);
  if (pairs.links != nullptr)
    DIFFNL_LAUNCH(link_sorted<T>, blocks_for(pairs.num_pairs, kThreads), kThreads, stream, s, pairs);
}

template void sort_rows(const GpuSearch<float>&, const GpuPairs<float>&, const GpuPairs<float>&, GpuStream);
template void sort_rows(const GpuSearch<double>&, const GpuPairs<double>&, const GpuPairs<double>&, GpuStream);

}  // namespace diffnl
