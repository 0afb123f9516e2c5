// Vectors of a list that exists, and their adjoint, on a GPU.
//
//   v_p = (r_j - r_i) + S_p @ h        grad r_k = sum_{j_p = k} g_p - sum_{i_p = k} g_p
//                                      grad h_b = sum_{p in b} outer(S_p, g_p)
//
// The adjoint gathers, so that it needs no atomics: whoever owns row k reads all g that concern k. The pairs with
// i = k are a row of the list. Those with j = k are
//   - in a linked list, their reverses: link p knows where (j, i, -S) stands in row j, and grad r_k is a sum of
//     g_reverse - g over row k;
//   - in any other list, found by sorting the pairs by j.
// 32 lanes share a row and add up in a fixed order. The cell's gradient is summed by chunks of rows of one system,
// then over the chunks, in float64. So the bits depend on the input alone.

#include "gpu.h"
#include "neighbors_gpu.h"

namespace diffnl {

namespace {

constexpr int kLanes = 32;  // that share a row: not the wave, so that sums have the same order on every device
constexpr int kRowsAtOnce = kThreads / kLanes;
constexpr int kAhead = 3;  // pairs of a lane that are read before the first is used: loads depend on loads here
constexpr int kCellThreads = 1024;

// -------------------------------------------------------------------------------------------- vectors

__device__ inline bool atoms_in_range(const GpuPairList& list, int64_t i, int64_t j) {
  const uint64_t n = static_cast<uint64_t>(list.num_atoms);
  return static_cast<uint64_t>(i) < n && static_cast<uint64_t>(j) < n;
}

// Whether this is a padded list that has failed (ops.cpp). Its vectors are NaN, and so is what comes of them.
__device__ inline bool has_failed(const GpuPairList& list) {
  if (list.offsets != nullptr) return list.offsets[0] < 0;
  return list.live != nullptr && static_cast<uint64_t>(*list.live) > static_cast<uint64_t>(list.num_pairs);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void vectors_of_mapping(GpuPairList list, const T* positions, const T* cell,
                                                               T* vectors) {
  __shared__ T stages[3 * kThreads];
  const int64_t wave_first = int64_t(blockIdx.x) * kThreads + wave_of_thread() * wave_width();
  const int64_t p = wave_first + lane_of_thread();
  Vec3<T> v{0, 0, 0};
  if (has_failed(list)) {
    v.x = v.y = v.z = std::numeric_limits<T>::quiet_NaN();
  } else if (p < (list.live == nullptr ? list.num_pairs : *list.live)) {
    const int64_t i = list.mapping[p], j = list.mapping[list.num_pairs + p];
    bool in_range = atoms_in_range(list, i, j);
    int64_t b = 0;
    if (in_range && cell != nullptr && list.system_idx != nullptr) {
      b = list.system_idx[i];
      in_range = static_cast<uint64_t>(b) < static_cast<uint64_t>(list.num_systems) && b == list.system_idx[j];
    }
    if (in_range) {
      Vec3<T> t{0, 0, 0};
      if (cell != nullptr) {
        const int32_t* S = list.shifts + 3 * p;
        t = translation(cell + 9 * b, static_cast<T>(S[0]), static_cast<T>(S[1]), static_cast<T>(S[2]));
      }
      v = pair_vector<T>(load_triple(positions + 3 * i), load_triple(positions + 3 * j), t);
    } else {
      // Nobody waits for this kernel, so nobody could raise; but nothing may pass in silence either.
      v.x = v.y = v.z = std::numeric_limits<T>::quiet_NaN();
    }
  }
  const int64_t left = list.num_pairs - wave_first;
  if (left <= 0) return;
  const int count = static_cast<int>(std::min<int64_t>(left, wave_width()));
  store_triples(vectors + 3 * wave_first, count, v.x, v.y, v.z, stages + 3 * wave_of_thread() * wave_width());
}

// A wave a row, and then another: the grid is laid out for the narrowest waves. Then what is left of a padded
// list.
template <typename T>
__global__ __launch_bounds__(kThreads) void vectors_of_links(GpuPairList list, const T* positions, const T* cell,
                                                             T* vectors) {
  __shared__ T stages[3 * kThreads];
  T* stage = stages + 3 * wave_of_thread() * wave_width();
  const int lane = lane_of_thread();
  const int waves = kThreads / wave_width();
  const bool failed = has_failed(list);
  const T empty = failed ? std::numeric_limits<T>::quiet_NaN() : T(0);
  const int64_t num_rows = failed ? 0 : list.num_atoms, live = failed ? 0 : list.offsets[list.num_atoms];
  for (int64_t p = 3 * live + int64_t(blockIdx.x) * kThreads + threadIdx.x; p < 3 * list.num_pairs;
       p += int64_t(gridDim.x) * kThreads)
    vectors[p] = empty;
  for (int64_t i = int64_t(blockIdx.x) * waves + wave_of_thread(); i < num_rows; i += gridDim.x * waves) {
    const int64_t first = list.offsets[i], last = list.offsets[i + 1];
    const Vec3<T> ri = load_triple(positions + 3 * i);
    const T* h = cell == nullptr ? nullptr : cell + 9 * (list.system_idx == nullptr ? 0 : list.system_idx[i]);
    for (int64_t p0 = first; p0 < last; p0 += wave_width()) {
      const int count = static_cast<int>(std::min<int64_t>(last - p0, wave_width()));
      Vec3<T> v{0, 0, 0};
      if (lane < count) {
        const Link link = list.links[p0 + lane];
        Vec3<T> t{0, 0, 0};
        if (h != nullptr)
          t = translation(h, static_cast<T>(link.shift(0)), static_cast<T>(link.shift(1)),
                          static_cast<T>(link.shift(2)));
        v = pair_vector<T>(ri, load_triple(positions + 3 * int64_t(link.j())), t);
      }
      store_triples(vectors + 3 * p0, count, v.x, v.y, v.z, stage);
    }
  }
}

// -------------------------------------------------------------------------------------------- adjoint

// First index of `sorted` with a value not below `value`.
template <typename Value>
__device__ inline int64_t lower_bound(const Value* sorted, int64_t size, int64_t value) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Rows of a chunk: few where rows are few, so that all of the device takes part.
DIFFNL_HD inline int64_t rows_in_chunk(int64_t num_atoms) {
  return num_atoms <= (1 << 16) ? kRowsAtOnce : 8 * kRowsAtOnce;
}

__device__ inline int64_t first_of(const RowOrder& order, int64_t b, int64_t num_atoms) {
  return order.first_of_system == nullptr ? b * num_atoms : order.first_of_system[b];
}

// A chunk holds rows of one system. System b owns the chunks first_of(b) / rows + b and on, which never overlap
// and number at most N / rows + B in all; some stay empty.
__device__ inline int64_t first_chunk_of(const RowOrder& order, int64_t b, int64_t num_atoms) {
  return first_of(order, b, num_atoms) / rows_in_chunk(num_atoms) + b;
}

template <typename T>
struct RowSums {
  Vec3<T> row{0, 0, 0};
  T cell[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0};

  __device__ void add(Vec3<T> g) { row = {row.x + g.x, row.y + g.y, row.z + g.z}; }
  __device__ void subtract(Vec3<T> g) { row = {row.x - g.x, row.y - g.y, row.z - g.z}; }
  __device__ void add_outer(T s0, T s1, T s2, Vec3<T> g) {
    const T s[3] = {s0, s1, s2};
    for (int k = 0; k < 3; ++k) {
      cell[3 * k] += s[k] * g.x;
      cell[3 * k + 1] += s[k] * g.y;
      cell[3 * k + 2] += s[k] * g.z;
    }
  }
};

// One lane's share of row k.
template <typename T>
__device__ inline void sum_linked_row(const GpuPairList& list, const T* grad, int64_t k, bool positions, bool cell,
                                      RowSums<T>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t last = list.offsets[k + 1];
  for (int64_t p0 = list.offsets[k] + lane; p0 < last; p0 += kAhead * kLanes) {
    Link links[kAhead];
    int64_t reverse[kAhead];
    DIFFNL_UNROLL(kAhead)
    for (int u = 0; u < kAhead; ++u) links[u].bits = p0 + u * kLanes < last ? list.links[p0 + u * kLanes].bits : 0;
    DIFFNL_UNROLL(kAhead)
    for (int u = 0; u < kAhead; ++u) reverse[u] = list.offsets[links[u].j()] + links[u].rank();
    DIFFNL_UNROLL(kAhead)
    for (int u = 0; u < kAhead; ++u) {
      if (p0 + u * kLanes >= last) continue;
      const Vec3<T> g = load_triple(grad + 3 * (p0 + u * kLanes));
      if (positions) {
        sums.add(load_triple(grad + 3 * reverse[u]));
        sums.subtract(g);
      }
      if (cell && links[u].shifted())
        sums.add_outer(static_cast<T>(links[u].shift(0)), static_cast<T>(links[u].shift(1)),
                       static_cast<T>(links[u].shift(2)), g);
    }
  }
}

template <typename T>
__device__ inline void sum_sorted_row(const GpuPairList& list, const SortedEnds& ends, const T* grad, int64_t k,
                                      bool positions, bool cell, RowSums<T>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t i_last = lower_bound(ends.i_sorted, list.num_pairs, k + 1);
  for (int64_t n = lower_bound(ends.i_sorted, list.num_pairs, k) + lane; n < i_last; n += kLanes) {
    const int64_t p = ends.i_pair[n];
    const Vec3<T> g = load_triple(grad + 3 * p);
    if (positions) sums.subtract(g);
    if (!cell) continue;
    const int32_t* S = list.shifts + 3 * p;
    sums.add_outer(static_cast<T>(S[0]), static_cast<T>(S[1]), static_cast<T>(S[2]), g);
  }
  if (!positions) return;
  const int64_t j_last = lower_bound(ends.j_sorted, list.num_pairs, k + 1);
  for (int64_t n = lower_bound(ends.j_sorted, list.num_pairs, k) + lane; n < j_last; n += kLanes)
    sums.add(load_triple(grad + 3 * ends.j_pair[n]));
}

template <typename T, bool kLinked>
__global__ __launch_bounds__(kThreads) void adjoint_rows(GpuPairList list, SortedEnds ends, RowOrder order,
                                                         const T* grad, AdjointOutput<T> out) {
  const int64_t chunk = blockIdx.x, n = list.num_atoms;
  if (has_failed(list)) {
    if (out.grad_positions == nullptr) return;
    for (int64_t k = chunk * kThreads + threadIdx.x; k < 3 * n; k += int64_t(gridDim.x) * kThreads)
      out.grad_positions[k] = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  int64_t b = 0;  // the last system whose chunks start at or before this one
  if (order.first_of_system != nullptr) {
    int64_t high = list.num_systems;
    while (high - b > 1) {
      const int64_t middle = b + (high - b) / 2;
      if (first_chunk_of(order, middle, n) <= chunk)
        b = middle;
      else
        high = middle;
    }
  }
  const int64_t rows = rows_in_chunk(n), last = first_of(order, b + 1, n);
  const int64_t first = first_of(order, b, n) + (chunk - first_chunk_of(order, b, n)) * rows;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, group = static_cast<int>(threadIdx.x) / kLanes;
  const bool positions = out.grad_positions != nullptr, cell = out.grad_cell != nullptr;
  RowSums<T> sums;
  for (int64_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
    const int64_t r = first + r0 + group;
    const int64_t k = r >= last ? -1 : order.rows == nullptr ? r : order.rows[r];
    sums.row = {0, 0, 0};
    if (k >= 0) {
      if constexpr (kLinked)
        sum_linked_row(list, grad, k, positions, cell, sums);
      else
        sum_sorted_row(list, ends, grad, k, positions, cell, sums);
    }
    if (!positions) continue;
    for (int mask = 1; mask < kLanes; mask *= 2) {
      sums.row.x += lane_xor(sums.row.x, mask, kLanes);
      sums.row.y += lane_xor(sums.row.y, mask, kLanes);
      sums.row.z += lane_xor(sums.row.z, mask, kLanes);
    }
    if (k >= 0 && lane < 3)
      out.grad_positions[3 * k + lane] = lane == 0 ? sums.row.x : lane == 1 ? sums.row.y : sums.row.z;
  }
  if (!cell) return;
  // Three by three: nine doubles at once would cost registers, which the rows need.
  DIFFNL_UNROLL(3)
  for (int k = 0; k < 3; ++k) {
    double values[3] = {static_cast<double>(sums.cell[3 * k]), static_cast<double>(sums.cell[3 * k + 1]),
                        static_cast<double>(sums.cell[3 * k + 2])};
    const double sum = block_sums<kThreads>(values);
    if (threadIdx.x < 3) out.partial_cell[9 * chunk + 3 * k + threadIdx.x] = sum;
  }
}

template <typename T>
__global__ __launch_bounds__(kCellThreads) void sum_chunks(GpuPairList list, RowOrder order,
                                                           AdjointOutput<T> out) {
  const int64_t b = blockIdx.x, n = list.num_atoms;
  if (has_failed(list)) {
    if (threadIdx.x < 9) out.grad_cell[9 * b + threadIdx.x] = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  const int64_t first = first_chunk_of(order, b, n);
  const int64_t num_rows = first_of(order, b + 1, n) - first_of(order, b, n);
  const int64_t chunks = (num_rows + rows_in_chunk(n) - 1) / rows_in_chunk(n);
  double sums[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kCellThreads)
    for (int c = 0; c < 9; ++c) sums[c] += out.partial_cell[9 * (first + chunk) + c];
  const double sum = block_sums<kCellThreads>(sums, static_cast<int>(std::min<int64_t>(chunks, kCellThreads)));
  if (threadIdx.x < 9) out.grad_cell[9 * b + threadIdx.x] = static_cast<T>(sum);
}

__global__ __launch_bounds__(kThreads) void pair_ends(GpuPairList list, int row, int32_t* ends) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= list.num_pairs) return;
  if (list.live != nullptr && p >= *list.live) {
    ends[p] = -1;
    return;
  }
  const int64_t i = list.mapping[p], j = list.mapping[list.num_pairs + p];
  ends[p] = atoms_in_range(list, i, j) ? static_cast<int32_t>(row == 0 ? i : j) : -1;
}

__global__ __launch_bounds__(kThreads) void first_of_each(const int64_t* sorted, int64_t size, int64_t num_systems,
                                                          int64_t* first) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b <= num_systems) first[b] = lower_bound(sorted, size, b);
}

}  // namespace

template <typename T>
void pair_vectors_gpu(const GpuPairList& list, const T* positions, const T* cell, T* vectors, GpuStream stream) {
  if (list.num_pairs == 0) return;
  if (list.offsets != nullptr) {
    const int64_t blocks =
        std::max<int64_t>(blocks_in_turns(list.num_atoms, kThreads / kNarrowestWave, kThreads), 1);
    DIFFNL_LAUNCH(vectors_of_links<T>, blocks, kThreads, stream, list, positions, cell, vectors);
  } else {
    const int64_t blocks = blocks_for(list.num_pairs, kThreads);
    DIFFNL_LAUNCH(vectors_of_mapping<T>, blocks, kThreads, stream, list, positions, cell, vectors);
  }
}

int64_t adjoint_chunks(int64_t num_atoms, int64_t num_systems) {
  return num_atoms / rows_in_chunk(num_atoms) + num_systems;
}

template <typename T>
void adjoint_gpu(const GpuPairList& list, const SortedEnds& ends, const RowOrder& order, const T* grad,
                 const AdjointOutput<T>& out, GpuStream stream) {
  // Positions alone need no systems, but one chunk for the rows that are left over.
  const int64_t systems = order.first_of_system == nullptr ? 1 : list.num_systems;
  const int64_t chunks = adjoint_chunks(list.num_atoms, systems);
  if (list.offsets != nullptr) {
    DIFFNL_LAUNCH((adjoint_rows<T, true>), chunks, kThreads, stream, list, ends, order, grad, out);
  } else {
    DIFFNL_LAUNCH((adjoint_rows<T, false>), chunks, kThreads, stream, list, ends, order, grad, out);
  }
  if (out.grad_cell != nullptr)
    DIFFNL_LAUNCH(sum_chunks<T>, list.num_systems, kCellThreads, stream, list, order, out);
}

void pair_ends_gpu(const GpuPairList& list, int row, int32_t* ends, GpuStream stream) {
  if (list.num_pairs == 0) return;
  DIFFNL_LAUNCH(pair_ends, blocks_for(list.num_pairs, kThreads), kThreads, stream, list, row, ends);
}

void first_of_each_gpu(const int64_t* sorted, int64_t size, int64_t num_systems, int64_t* first,
                       GpuStream stream) {
  const int64_t blocks = blocks_for(num_systems + 1, kThreads);
  DIFFNL_LAUNCH(first_of_each, blocks, kThreads, stream, sorted, size, num_systems, first);
}

#define DIFFNL_INSTANTIATE(T)                                                                 \
  template void pair_vectors_gpu(const GpuPairList&, const T*, const T*, T*, GpuStream);      \
  template void adjoint_gpu(const GpuPairList&, const SortedEnds&, const RowOrder&, const T*, \
                            const AdjointOutput<T>&, GpuStream);
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
