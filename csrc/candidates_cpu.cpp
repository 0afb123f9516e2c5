// Selecting the pairs of a list from candidates, and knowing how long that may go on.
//
// Let F = h_old^-1 h_new carry the old cell into the new one, and u_i = r_i - r_i,old F what is left of the motion
// of atom i. A pair that was v_old apart is v = v_old F + (u_j - u_i) apart now, so
//
//     |v| >= sigma_min(F) |v_old| - 2 max |u|
//
// and no pair that was out of reach, |v_old| >= radius, is a neighbour now while
//
//     sigma_min(F) radius - 2 max |u| >= cutoff
//
// in each system for itself. Both sides leave room for the rounding of vectors in T.

#include "candidates_cpu.h"

#include <map>
#include <memory>
#include <vector>

#include "parallel.h"
#include "tile.h"

namespace diffnl {

namespace {

// ------------------------------------------------------------------------------------------ selection

// Blocks of rows for the threads: large enough to be worth a handshake, small enough to share.
int64_t row_block(int64_t num_rows) {
  return std::clamp<int64_t>(num_rows / (8 * int64_t(torch::stable::get_num_threads())), 16, 512);
}

// Two passes over rows. `choose(i, row)` writes which candidates of row i are pairs, counted from the row's first,
// and returns how many; `write(out, i, first, chosen, count)` writes them as pairs from `first` on.
template <typename T, typename Choose, typename Write>
void select_rows(int64_t num_rows, const int64_t* offsets, const Choose& choose, const Write& write,
                 const std::function<PairOutput<T>(int64_t)>& allocate) {
  const std::unique_ptr<int32_t[]> chosen(new int32_t[static_cast<size_t>(offsets[num_rows])]);
  std::vector<int64_t> first(static_cast<size_t>(num_rows) + 1, 0);
  parallel_blocks(num_rows, row_block(num_rows), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> row;
    for (int64_t i = begin; i < end; ++i) {
      row.resize(static_cast<size_t>(offsets[i + 1] - offsets[i]) + 16);  // select_below writes past the last
      const int count = choose(i, row.data());
      std::copy_n(row.data(), count, chosen.get() + offsets[i]);
      first[static_cast<size_t>(i) + 1] = count;
    }
  });
  for (size_t i = 0; i < static_cast<size_t>(num_rows); ++i) first[i + 1] += first[i];
  const PairOutput<T> out = allocate(first[static_cast<size_t>(num_rows)]);
  parallel_blocks(num_rows, row_block(num_rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = first[static_cast<size_t>(i)];
      write(out, i, at, chosen.get() + offsets[i], static_cast<int>(first[static_cast<size_t>(i) + 1] - at));
    }
  });
}

// Three components and one to spare, read, added and written in one instruction. The spare one holds anything.
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
template <>
struct Lanes<int32_t> {
  typedef int32_t type __attribute__((vector_size(16), aligned(4), may_alias));
};

template <typename T>
typename Lanes<T>::type& lanes_at(T* at) {
  return *reinterpret_cast<typename Lanes<T>::type*>(at);
}
template <typename T>
const typename Lanes<T>::type& lanes_at(const T* at) {
  return *reinterpret_cast<const typename Lanes<T>::type*>(at);
}

// What all rows share: positions and translations by component, for gathers, and in fours, for one at a time.
template <typename T>
class Gathered {
 public:
  Gathered(const Candidates& candidates, const T* positions, const T* cell)
      : images_(candidates.images),
        memory_(static_cast<size_t>(7 * (candidates.num_atoms + candidates.num_images))) {
    const int64_t n = candidates.num_atoms, images = candidates.num_images;
    T *r = memory_.data(), *t = r + 3 * n;
    T *r4 = t + 3 * images, *t4 = r4 + 4 * n;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < 3; ++k) r[k * n + i] = r4[4 * i + k] = positions[3 * i + k];
    for (int64_t m = 0; m < images; ++m) {
      const int32_t* S = candidates.images + 4 * m;
      const T s0 = static_cast<T>(S[0]), s1 = static_cast<T>(S[1]), s2 = static_cast<T>(S[2]);
      for (int k = 0; k < 3; ++k)
        t[k * images + m] = t4[4 * m + k] = cell_translation(s0, s1, s2, cell + 9 * int64_t(S[3]), k);
    }
    by_component = {r, r + n, r + 2 * n, t, t + images, t + 2 * images};
    positions_ = r4;
    translations_ = t4;
  }

  // The chosen candidates of atom i as a row of a list.
  void write(int64_t i, const CandidateRow<T>& row, const int32_t* chosen, int count, int64_t* mapping_j,
             int32_t* shifts, T* vectors) const {
    using V = typename Lanes<T>::type;
    const V ri = lanes_at(positions_ + 4 * i);
    const auto vector_of = [&](int32_t c) {
      return (lanes_at(positions_ + 4 * int64_t(row.j[c])) - ri) +
             lanes_at(translations_ + 4 * int64_t(row.image[c]));
    };
    int n = 0;
    for (; n < count - 1; ++n) {  // the spare component lands where the next pair follows
      const int32_t c = chosen[n];
      mapping_j[n] = row.j[c];
      lanes_at(shifts + 3 * n) = lanes_at(images_ + 4 * int64_t(row.image[c]));
      lanes_at(vectors + 3 * n) = vector_of(c);
    }
    for (; n < count; ++n) {
      const int32_t c = chosen[n];
      const V v = vector_of(c);
      mapping_j[n] = row.j[c];
      for (int k = 0; k < 3; ++k) {
        shifts[3 * n + k] = images_[4 * int64_t(row.image[c]) + k];
        vectors[3 * n + k] = v[k];
      }
    }
  }

  RowSource<T> by_component;

 private:
  const int32_t* images_;
  std::vector<T> memory_;
  const T *positions_, *translations_;  // (N, 4), (K, 4)
};

}  // namespace

template <typename T>
void select_cpu(const Candidates& candidates, const T* positions, const T* cell, double cutoff,
                const std::function<PairOutput<T>(int64_t)>& allocate) {
  const Gathered<T> gathered(candidates, positions, cell);
  const T cutoff2 = static_cast<T>(cutoff * cutoff);
  const auto row_of = [&](int64_t i) {
    const int64_t first = candidates.offsets[i];
    const T* r = positions + 3 * i;
    return CandidateRow<T>{{r[0], r[1], r[2]},
                           candidates.j + first,
                           candidates.image + first,
                           candidates.uniform[i],
                           static_cast<int>(candidates.offsets[i + 1] - first)};
  };
  const auto choose = [&](int64_t i, int32_t* chosen) {
    thread_local std::vector<T> d2;
    const CandidateRow<T> row = row_of(i);
    d2.resize(static_cast<size_t>(row.size));
    measure_candidates(gathered.by_component, row, d2.data());
    return select_below(d2.data(), row.size, cutoff2, chosen);
  };
  const auto write = [&](const PairOutput<T>& out, int64_t i, int64_t first, const int32_t* chosen, int count) {
    std::fill_n(out.mapping + first, count, i);
    gathered.write(i, row_of(i), chosen, count, out.mapping + out.capacity + first, out.shifts + 3 * first,
                   out.vectors + 3 * first);
  };
  select_rows<T>(candidates.num_atoms, candidates.offsets, choose, write, allocate);
}

template <typename T>
void closer_cpu(const PairList& list, const T* vectors, double cutoff,
                const std::function<PairOutput<T>(int64_t)>& allocate) {
  // Any stretches of the list will do for rows.
  constexpr int64_t kStretch = 4096;
  const int64_t stretches = ceil_div(list.num_pairs, kStretch);
  std::vector<int64_t> offsets(static_cast<size_t>(stretches) + 1);
  for (size_t n = 0; n < offsets.size(); ++n)
    offsets[n] = std::min(static_cast<int64_t>(n) * kStretch, list.num_pairs);
  const T cutoff2 = static_cast<T>(cutoff * cutoff);
  const auto choose = [&](int64_t n, int32_t* chosen) {
    std::array<T, kStretch> d2;
    const int64_t first = offsets[static_cast<size_t>(n)];
    const int size = static_cast<int>(offsets[static_cast<size_t>(n) + 1] - first);
    measure_vectors(vectors + 3 * first, size, d2.data());
    return select_below(d2.data(), size, cutoff2, chosen);
  };
  const auto write = [&](const PairOutput<T>& out, int64_t n, int64_t to, const int32_t* chosen, int count) {
    const int64_t first = offsets[static_cast<size_t>(n)];
    const int64_t *i = list.mapping + first, *j = i + list.capacity;
    const int32_t* S = list.shifts + 3 * first;
    const T* v = vectors + 3 * first;
    for (int k = 0; k < count; ++k) out.mapping[to + k] = i[chosen[k]];
    for (int k = 0; k < count; ++k) out.mapping[out.capacity + to + k] = j[chosen[k]];
    int k = 0;
    for (; k < count - 1; ++k) {  // the spare component is the next pair's, and lands where the next one follows
      lanes_at(out.shifts + 3 * (to + k)) = lanes_at(S + 3 * chosen[k]);
      lanes_at(out.vectors + 3 * (to + k)) = lanes_at(v + 3 * chosen[k]);
    }
    for (; k < count; ++k) {
      std::copy_n(S + 3 * chosen[k], 3, out.shifts + 3 * (to + k));
      std::copy_n(v + 3 * chosen[k], 3, out.vectors + 3 * (to + k));
    }
  };
  select_rows<T>(stretches, offsets.data(), choose, write, allocate);
}

void compact(const PairList& list, const CompactList& out, std::vector<int32_t>& images) {
  const int64_t *i = list.mapping, *j = list.mapping + list.capacity;
  std::map<std::array<int32_t, 4>, int32_t> number_of;
  std::array<int32_t, 4> last{0, 0, 0, -1};
  int32_t number = -1;
  int64_t row = 0;
  out.offsets[0] = 0;
  std::fill_n(out.uniform, list.num_atoms, 0);
  for (int64_t p = 0; p < list.num_pairs; ++p) {
    const int32_t* S = list.shifts + 3 * p;
    const int32_t b = list.system_idx == nullptr ? 0 : static_cast<int32_t>(list.system_idx[i[p]]);
    const std::array<int32_t, 4> image{S[0], S[1], S[2], b};
    if (image != last) {
      const auto [found, is_new] = number_of.try_emplace(image, static_cast<int32_t>(number_of.size()));
      if (is_new) images.insert(images.end(), image.begin(), image.end());
      last = image;
      number = found->second;
    }
    while (row < i[p]) out.offsets[++row] = p;
    out.j[p] = static_cast<int32_t>(j[p]);
    out.image[p] = number;
    int32_t& uniform = out.uniform[row];
    uniform = p == out.offsets[row] || uniform == number ? number : -1;
  }
  while (row < list.num_atoms) out.offsets[++row] = list.num_pairs;
}

// ------------------------------------------------------------------------------------------ validity

namespace {

// The least singular value of a 3 x 3 matrix, never too large by more than rounding: the square root of the least
// eigenvalue of M^T M, from the trigonometric solution of its characteristic cubic (O. K. Smith, Commun. ACM 4,
// 168 (1961)).
double least_singular_value(const double* m) {
  double g[6];  // xx, yy, zz, xy, xz, yz of M^T M
  const auto product = [m](int a, int b) { return m[a] * m[b] + m[3 + a] * m[3 + b] + m[6 + a] * m[6 + b]; };
  g[0] = product(0, 0), g[1] = product(1, 1), g[2] = product(2, 2);
  g[3] = product(0, 1), g[4] = product(0, 2), g[5] = product(1, 2);
  const double mean = (g[0] + g[1] + g[2]) / 3.0;
  const double a = g[0] - mean, b = g[1] - mean, c = g[2] - mean;
  const double off = g[3] * g[3] + g[4] * g[4] + g[5] * g[5];
  const double spread = std::sqrt((a * a + b * b + c * c + 2.0 * off) / 6.0);
  if (!(spread > 0.0)) return std::sqrt(std::max(mean, 0.0));
  const double det = a * (b * c - g[5] * g[5]) - g[3] * (g[3] * c - g[5] * g[4]) + g[4] * (g[3] * g[5] - b * g[4]);
  const double half = std::clamp(det / (2.0 * spread * spread * spread), -1.0, 1.0);
  constexpr double third_of_turn = 2.0943951023931953;
  const double least = mean + 2.0 * spread * std::cos(std::acos(half) / 3.0 + third_of_turn);
  return std::sqrt(std::max(least, 0.0));
}

void multiply(const double* a, const double* b, double* out) {
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < 3; ++c)
      out[3 * r + c] = a[3 * r] * b[c] + a[3 * r + 1] * b[3 + c] + a[3 * r + 2] * b[6 + c];
}

// A system on its way.
struct Drift {
  double F[9];
  double stretch = 0.0;  // sigma_min(F)
  double largest = 0.0;  // |component| of a position
  double moved2 = 0.0;   // max |u|^2
  bool known = true;
};

}  // namespace

template <typename T>
bool still_hold(const Motion<T>& motion, double cutoff, double radius) {
  std::vector<Drift> drifts(static_cast<size_t>(motion.num_systems));
  std::vector<SearchCell> cells(drifts.size());
  for (size_t b = 0; b < drifts.size(); ++b) {
    const int64_t at = static_cast<int64_t>(b);
    const bool* pbc = motion.pbc + at * motion.pbc_stride;
    SearchCell before, now;
    if (!make_search_cell(motion.old_cell + 9 * at, pbc, before) ||
        !make_search_cell(motion.cell + 9 * at, pbc, now))
      return false;
    multiply(before.inverse, now.h, drifts[b].F);
    drifts[b].stretch = least_singular_value(drifts[b].F);
    cells[b] = now;
  }
  for (int64_t i = 0; i < motion.num_atoms; ++i) {
    const int64_t b = motion.system_idx == nullptr ? 0 : motion.system_idx[i];
    Drift& drift = drifts[static_cast<size_t>(b)];
    const T *from = motion.old_positions + 3 * i, *to = motion.positions + 3 * i;
    const double x = static_cast<double>(from[0]), y = static_cast<double>(from[1]),
                 z = static_cast<double>(from[2]);
    double moved2 = 0.0;
    for (int c = 0; c < 3; ++c) {
      const double r = static_cast<double>(to[c]);
      const double u = r - (x * drift.F[c] + y * drift.F[3 + c] + z * drift.F[6 + c]);
      moved2 += u * u;
      drift.largest = std::max(drift.largest, std::abs(r));
    }
    drift.known = drift.known && std::isfinite(moved2);  // max would lose a NaN
    drift.moved2 = std::max(drift.moved2, moved2);
  }
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (size_t b = 0; b < drifts.size(); ++b) {
    const Drift& drift = drifts[b];
    if (!drift.known) return false;
    // |S_k| <= |v - (r_j - r_i)| / height_k for any pair that could matter.
    const double apart = radius + 4.0 * drift.largest;
    double translation = 0.0;
    for (int k = 0; k < 3; ++k)
      if (cells[b].periodic[k]) translation += (apart / cells[b].height[k] + 1.0) * cells[b].length[k];
    const double rounding = 16.0 * eps * (translation + apart) + 1e-7 * radius;
    const double reach = drift.stretch * (radius - rounding) - 2.0 * std::sqrt(drift.moved2);
    if (!(reach >= cutoff + rounding)) return false;
  }
  return true;
}

#define DIFFNL_INSTANTIATE(T)                                                                                \
  template void select_cpu(const Candidates&, const T*, const T*, double,                                    \
                           const std::function<PairOutput<T>(int64_t)>&);                                    \
  template void closer_cpu(const PairList&, const T*, double, const std::function<PairOutput<T>(int64_t)>&); \
  template bool still_hold(const Motion<T>&, double, double);
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
