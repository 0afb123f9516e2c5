// Vectors of a list that exists, and their adjoint.
//
//   v_p = (r_j - r_i) + S_p @ h        grad r_k = sum_{j_p = k} g_p - sum_{i_p = k} g_p
//                                      grad h_b = sum_{p in b} outer(S_p, g_p)
//
// The adjoint scatters without atomics. The pairs are cut into chunks whose number depends on the sizes of
// the list alone; each chunk scatters into an accumulator of its own, and the accumulators are added in the
// order of the chunks. So the bits of the result depend neither on the number of threads nor on their luck.
// Pairs with the same i are neighbours in a list made by the search: their sum stays in registers.

#include <memory>

#include "large_pages.h"
#include "neighbors_cpu.h"

namespace diffnl {

namespace {

constexpr int64_t kPairBlock = 16384;
constexpr int64_t kMostChunks = 64;

// Nanoseconds for all pairs, in the vectors and in the adjoint alike.
double work_of(const PairList& list) { return 5.0 * static_cast<double>(list.num_pairs); }

[[noreturn]] void index_error(const PairList& list, const std::atomic<int64_t>& bad_pair) {
  const int64_t p = bad_pair;
  const int64_t i = list.mapping[p], j = list.mapping[list.capacity + p];
  if (i < 0 || i >= list.num_atoms) data_error("mapping_out_of_range", i, p);
  if (j < 0 || j >= list.num_atoms) data_error("mapping_out_of_range", j, p);
  for (const int64_t atom : {i, j})
    if (list.system_idx[atom] < 0 || list.system_idx[atom] >= list.num_systems)
      data_error("system_idx_out_of_range", list.system_idx[atom], atom);
  data_error("mapping_across_systems", i, j);
}

// True when reading atoms i and j and the system of i stays inside the tensors.
inline bool pair_in_range(const PairList& list, int64_t i, int64_t j) {
  const uint64_t n = static_cast<uint64_t>(list.num_atoms), systems = static_cast<uint64_t>(list.num_systems);
  if (static_cast<uint64_t>(i) >= n || static_cast<uint64_t>(j) >= n) return false;
  return list.system_idx == nullptr || static_cast<uint64_t>(list.system_idx[i]) < systems;
}

// Of atoms in range. A pair across systems has no cell of its own.
inline bool pair_in_one_system(const PairList& list, int64_t i, int64_t j) {
  return list.system_idx == nullptr || list.system_idx[i] == list.system_idx[j];
}

}  // namespace

template <typename T>
void pair_vectors_cpu(const PairList& list, const T* positions, const T* cell, T* vectors) {
  std::atomic<int64_t> bad_pair{-1};
  parallel_blocks(list.num_pairs, kPairBlock, work_of(list), [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t i = list.mapping[p], j = list.mapping[list.capacity + p];
      if (!pair_in_range(list, i, j) || !pair_in_one_system(list, i, j)) {
        bad_pair = p;
        return;
      }
      Vec3<T> t{0, 0, 0};
      if (cell != nullptr) {
        const T* h = cell + 9 * (list.system_idx == nullptr ? 0 : list.system_idx[i]);
        const int32_t* s = list.shifts + 3 * p;
        const T s0 = static_cast<T>(s[0]), s1 = static_cast<T>(s[1]), s2 = static_cast<T>(s[2]);
        t = {cell_translation(s0, s1, s2, h, 0), cell_translation(s0, s1, s2, h, 1),
             cell_translation(s0, s1, s2, h, 2)};
      }
      const T *ri = positions + 3 * i, *rj = positions + 3 * j;
      const Vec3<T> v = pair_vector<T>({ri[0], ri[1], ri[2]}, {rj[0], rj[1], rj[2]}, t);
      vectors[3 * p] = v.x;
      vectors[3 * p + 1] = v.y;
      vectors[3 * p + 2] = v.z;
    }
  });
  if (bad_pair >= 0) index_error(list, bad_pair);
}

namespace {

// Three components and one lane to spare, added in one instruction. The spare lane holds anything.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(32), aligned(8), may_alias));
};

// Sums of the pairs first .. last of the list, into rows (N, 4) and cells (B, 9) of their own, both zero at
// the start. The cell's sums are kept in T for at most kCellBlock pairs, then added up in float64.
template <typename T, bool kPositions, bool kCell>
void scatter_chunk(const PairList& list, const T* grad, int64_t first, int64_t last, T* rows, double* cells,
                   std::atomic<int64_t>& bad_pair) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kCellBlock = 256;
  constexpr int64_t kAhead = 24;  // pairs: rows of j lie anywhere, so they are asked for before their turn
  const int64_t *row_of = list.mapping, *column_of = list.mapping + list.capacity;
  int64_t row = -1, system = 0;
  V row_sum = {}, cell_sum[3] = {};

  const auto close_row = [&] {
    if (kPositions && row >= 0) *reinterpret_cast<V*>(rows + 4 * row) -= row_sum;
    row_sum = V{};
  };
  const auto close_cell = [&] {
    if (!kCell) return;
    for (int k = 0; k < 3; ++k) {
      for (int c = 0; c < 3; ++c) cells[9 * system + 3 * k + c] += static_cast<double>(cell_sum[k][c]);
      cell_sum[k] = V{};
    }
  };
  const auto take = [&](int64_t p, V g) {
    const int64_t i = row_of[p], j = column_of[p];
    if (i != row) {
      close_row();
      if (!pair_in_range(list, i, j)) return false;
      row = i;
      const int64_t b = list.system_idx == nullptr ? 0 : list.system_idx[i];
      if (b != system) {
        close_cell();
        system = b;
      }
    }
    if (static_cast<uint64_t>(j) >= static_cast<uint64_t>(list.num_atoms)) return false;
    if (kPositions) {
      row_sum += g;
      *reinterpret_cast<V*>(rows + 4 * j) += g;
    }
    if (kCell) {
      const int32_t* s = list.shifts + 3 * p;
      for (int k = 0; k < 3; ++k) cell_sum[k] += static_cast<T>(s[k]) * g;
    }
    return true;
  };

  for (int64_t begin = first; begin < last; begin += kCellBlock) {
    const int64_t end = std::min(last, begin + kCellBlock);
    int64_t p = begin;
    for (; p < end - 1; ++p) {  // the spare lane reads the next pair's gradient
      if (kPositions && p + kAhead < last) __builtin_prefetch(rows + 4 * column_of[p + kAhead], 1);
      if (!take(p, *reinterpret_cast<const V*>(grad + 3 * p))) break;
    }
    const T* g = grad + 3 * p;
    if (p < end - 1 || !take(p, V{g[0], g[1], g[2], 0})) {
      bad_pair = p;
      return;
    }
    close_cell();
  }
  close_row();
}

template <typename T, bool kPositions, bool kCell>
void adjoint(const PairList& list, const T* grad, T* grad_positions, T* grad_cell) {
  // Enough chunks to share the work among threads, few enough that clearing and adding the accumulators is
  // small next to reading the list.
  const int64_t row_size = kPositions ? 4 * list.num_atoms : 0, cell_size = kCell ? 9 * list.num_systems : 0;
  const int64_t chunks =
      std::clamp<int64_t>(list.num_pairs / std::max(2 * (row_size + cell_size), kPairBlock / 2), 1, kMostChunks);
  const std::unique_ptr<T[]> rows(new T[static_cast<size_t>(chunks * row_size)]);
  const std::unique_ptr<double[]> cells(new double[static_cast<size_t>(chunks * cell_size)]);
  prefer_large_pages(rows.get(), chunks * row_size * static_cast<int64_t>(sizeof(T)));
  std::atomic<int64_t> bad_pair{-1};
  parallel_blocks(chunks, 1, work_of(list), [&](int64_t chunk, int64_t) {
    const int64_t first = list.num_pairs * chunk / chunks, last = list.num_pairs * (chunk + 1) / chunks;
    T* own_rows = rows.get() + chunk * row_size;
    double* own_cells = cells.get() + chunk * cell_size;
    std::fill_n(own_rows, row_size, T(0));
    std::fill_n(own_cells, cell_size, 0.0);
    scatter_chunk<T, kPositions, kCell>(list, grad, first, last, own_rows, own_cells, bad_pair);
  });
  if (bad_pair >= 0) index_error(list, bad_pair);
  if (kPositions) {
    const double work = 2.0 * static_cast<double>(list.num_atoms * chunks);
    parallel_blocks(list.num_atoms, kPairBlock / 4, work, [&](int64_t first, int64_t last) {
      using V = typename Lanes<T>::type;
      for (int64_t i = first; i < last; ++i) {
        V sum = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          sum += *reinterpret_cast<const V*>(rows.get() + chunk * row_size + 4 * i);
        for (int c = 0; c < 3; ++c) grad_positions[3 * i + c] = sum[c];
      }
    });
  }
  if (kCell) {
    for (int64_t k = 0; k < cell_size; ++k) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += cells[static_cast<size_t>(chunk * cell_size + k)];
      grad_cell[k] = static_cast<T>(sum);
    }
  }
}

}  // namespace

template <typename T>
void pair_vectors_adjoint_cpu(const PairList& list, const T* grad, T* grad_positions, T* grad_cell) {
  if (grad_positions != nullptr && grad_cell != nullptr) {
    adjoint<T, true, true>(list, grad, grad_positions, grad_cell);
  } else if (grad_positions != nullptr) {
    adjoint<T, true, false>(list, grad, grad_positions, grad_cell);
  } else if (grad_cell != nullptr) {
    adjoint<T, false, true>(list, grad, grad_positions, grad_cell);
  }
}

template void pair_vectors_cpu(const PairList&, const float*, const float*, float*);
template void pair_vectors_cpu(const PairList&, const double*, const double*, double*);
template void pair_vectors_adjoint_cpu(const PairList&, const float*, float*, float*);
template void pair_vectors_adjoint_cpu(const PairList&, const double*, double*, double*);

}  // namespace diffnl
