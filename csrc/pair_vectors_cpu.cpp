// Vectors of a list that exists, and their adjoint.
//
//   v_p = (r_j - r_i) + S_p @ h        grad r_k = sum_{j_p = k} g_p - sum_{i_p = k} g_p
//                                      grad h_b = sum_{p in b} outer(S_p, g_p)
//
// The adjoint scatters without atomics. The pairs are cut into chunks whose number depends on the sizes of
// the list alone; each chunk scatters into an accumulator of its own, and the accumulators are added in the
// order of the chunks. So the bits of the result depend neither on the number of threads nor on their luck.
// Pairs with the same i are neighbours in a list made by the search: their sum stays in registers.

#include <vector>

#include "neighbors_cpu.h"

namespace diffnl {

namespace {

constexpr int64_t kPairBlock = 16384;
constexpr int64_t kMostChunks = 64;

[[noreturn]] void index_error(const PairList& list, const std::atomic<int64_t>& bad_pair) {
  const int64_t p = bad_pair;
  const int64_t i = list.mapping[p], j = list.mapping[list.num_pairs + p];
  if (i < 0 || i >= list.num_atoms) data_error("mapping_out_of_range", i, p);
  if (j < 0 || j >= list.num_atoms) data_error("mapping_out_of_range", j, p);
  data_error("system_idx_out_of_range", list.system_idx[i], i);
}

// True when reading atoms i and j and the system of i stays inside the tensors.
inline bool pair_in_range(const PairList& list, int64_t i, int64_t j) {
  const uint64_t n = static_cast<uint64_t>(list.num_atoms), systems = static_cast<uint64_t>(list.num_systems);
  if (static_cast<uint64_t>(i) >= n || static_cast<uint64_t>(j) >= n) return false;
  return list.system_idx == nullptr || static_cast<uint64_t>(list.system_idx[i]) < systems;
}

}  // namespace

template <typename T>
void pair_vectors_cpu(const PairList& list, const T* positions, const T* cell, T* vectors) {
  std::atomic<int64_t> bad_pair{-1};
  parallel_blocks(list.num_pairs, kPairBlock, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t i = list.mapping[p], j = list.mapping[list.num_pairs + p];
      if (!pair_in_range(list, i, j)) {
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

// Chunk c of the list: pairs first .. last, scattered into rows (N, 3) and cells (B, 9) of its own.
template <typename T, bool kPositions, bool kCell>
bool scatter_chunk(const PairList& list, const T* grad, int64_t first, int64_t last, T* rows, double* cells,
                   std::atomic<int64_t>& bad_pair) {
  int64_t row = -1, system = -1;
  T row_sum[3] = {0, 0, 0};
  double cell_sum[9] = {};
  const auto close_row = [&] {
    if (kPositions && row >= 0)
      for (int c = 0; c < 3; ++c) rows[3 * row + c] -= row_sum[c];
  };
  const auto close_system = [&] {
    if (kCell && system >= 0)
      for (int c = 0; c < 9; ++c) cells[9 * system + c] += cell_sum[c];
  };
  for (int64_t p = first; p < last; ++p) {
    const int64_t i = list.mapping[p], j = list.mapping[list.num_pairs + p];
    if (!pair_in_range(list, i, j)) {
      bad_pair = p;
      return false;
    }
    const T* g = grad + 3 * p;
    if (i != row) {
      close_row();
      row = i;
      for (T& sum : row_sum) sum = 0;
      const int64_t b = list.system_idx == nullptr ? 0 : list.system_idx[i];
      if (b != system) {
        close_system();
        system = b;
        for (double& sum : cell_sum) sum = 0;
      }
    }
    if (kPositions) {
      for (int c = 0; c < 3; ++c) {
        row_sum[c] += g[c];
        rows[3 * j + c] += g[c];
      }
    }
    if (kCell) {
      const int32_t* s = list.shifts + 3 * p;
      if ((s[0] | s[1] | s[2]) != 0) {  // most pairs do not cross a face
        for (int k = 0; k < 3; ++k)
          for (int c = 0; c < 3; ++c) cell_sum[3 * k + c] += static_cast<double>(s[k]) * g[c];
      }
    }
  }
  close_row();
  close_system();
  return true;
}

template <typename T, bool kPositions, bool kCell>
void adjoint(const PairList& list, const T* grad, T* grad_positions, T* grad_cell) {
  // Few enough chunks that all accumulators together are no larger than the list, enough to share the work.
  const int64_t accumulator = std::max<int64_t>({list.num_atoms, 3 * list.num_systems, kPairBlock});
  const int64_t chunks = std::clamp<int64_t>(list.num_pairs / accumulator, 1, kMostChunks);
  const int64_t row_size = 3 * list.num_atoms, cell_size = 9 * list.num_systems;
  std::vector<T> rows(static_cast<size_t>(kPositions ? chunks * row_size : 0));
  std::vector<double> cells(static_cast<size_t>(kCell ? chunks * cell_size : 0));
  std::atomic<int64_t> bad_pair{-1};
  parallel_blocks(chunks, 1, [&](int64_t chunk, int64_t) {
    const int64_t first = list.num_pairs * chunk / chunks, last = list.num_pairs * (chunk + 1) / chunks;
    scatter_chunk<T, kPositions, kCell>(list, grad, first, last, rows.data() + chunk * row_size,
                                        cells.data() + chunk * cell_size, bad_pair);
  });
  if (bad_pair >= 0) index_error(list, bad_pair);
  if (kPositions) {
    parallel_blocks(row_size, kPairBlock, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        T sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += rows[static_cast<size_t>(chunk * row_size + k)];
        grad_positions[k] = sum;
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
