// Builds a CellList: group atoms by system, wrap them, choose a grid a system, sort atoms into bins.
// Everything here is float64 and approximate; nothing here decides whether a pair is listed.

#include "cell_list.h"

namespace diffnl {

namespace {

// f(first, last) for blocks of the atoms, of which each needs about 60 ns.
template <typename F>
void for_blocks_of_atoms(int64_t num_atoms, const F& f) {
  parallel_blocks(num_atoms, 4096, 60.0 * static_cast<double>(num_atoms), f);
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  bool finite = true;
  for (int64_t k = 0; k < count; ++k) finite &= std::isfinite(values[k]);
  return finite;
}

// The number of T nearest to a value; any number for NaN.
template <typename T>
T bounded(double value) {
  constexpr double most = static_cast<double>(std::numeric_limits<T>::max());
  return static_cast<T>(std::min(most, std::max(-most, value)));
}

}  // namespace

template <typename T>
CellList<T>::CellList(const SearchInput<T>& in) : systems_(static_cast<size_t>(in.num_systems)) {
  if (!all_finite(in.positions, 3 * in.num_atoms)) {
    for (int64_t i = 0; i < in.num_atoms; ++i)
      if (!all_finite(in.positions + 3 * i, 3)) data_error("positions_not_finite", i);
  }
  for (int64_t b = 0; b < in.num_systems; ++b) {
    if (!all_finite(in.cell + 9 * b, 9)) data_error("cell_not_finite", b);
    if (!make_search_cell(in.cell + 9 * b, in.pbc + in.pbc_stride * b, systems_[static_cast<size_t>(b)].cell))
      data_error("cell_singular", b);
  }
  group_by_system(in);
  wrap(in);
  choose_grids(in);
  sort_into_bins(in);
}

template <typename T>
void CellList<T>::group_by_system(const SearchInput<T>& in) {
  if (in.system_idx != nullptr) {
    for (int64_t i = 0; i < in.num_atoms; ++i) {
      const int64_t b = in.system_idx[i];
      if (b < 0 || b >= in.num_systems) data_error("system_idx_out_of_range", b, i);
      ++systems_[static_cast<size_t>(b)].num_atoms;
    }
  } else if (in.num_systems > 0) {
    systems_[0].num_atoms = in.num_atoms;
  }
  int64_t first = 0;
  for (System& s : systems_) {
    s.first_atom = first;
    first += s.num_atoms;
  }
  if (in.num_systems <= 1) return;
  grouped_.resize(static_cast<size_t>(in.num_atoms));
  system_.resize(static_cast<size_t>(in.num_atoms));
  std::vector<int64_t> next(systems_.size());
  for (size_t b = 0; b < systems_.size(); ++b) next[b] = systems_[b].first_atom;
  for (int64_t i = 0; i < in.num_atoms; ++i) {
    const int64_t b = in.system_idx == nullptr ? 0 : in.system_idx[i];
    const size_t g = static_cast<size_t>(next[static_cast<size_t>(b)]++);
    grouped_[g] = i;
    system_[g] = static_cast<int32_t>(b);
  }
}

template <typename T>
void CellList<T>::wrap(const SearchInput<T>& in) {
  q_.resize(static_cast<size_t>(in.num_atoms));
  w_.resize(static_cast<size_t>(in.num_atoms));
  for_blocks_of_atoms(in.num_atoms, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const T* p = in.positions + 3 * atom_at(g);
      const Vec3<double> r{static_cast<double>(p[0]), static_cast<double>(p[1]), static_cast<double>(p[2])};
      diffnl::wrap(system(system_at(g)).cell, r, q_[static_cast<size_t>(g)], w_[static_cast<size_t>(g)]);
    }
  });
}

template <typename T>
void CellList<T>::choose_grids(const SearchInput<T>& in) {
  int64_t table = 0;
  for (size_t b = 0; b < systems_.size(); ++b) {
    System& s = systems_[b];
    if (s.num_atoms == 0) continue;
    constexpr double inf = std::numeric_limits<double>::infinity();
    AtomRange range{{inf, inf, inf}, {-inf, -inf, -inf}, {inf, inf, inf}, {-inf, -inf, -inf}, 0.0};
    for (int64_t g = s.first_atom; g < s.first_atom + s.num_atoms; ++g) {
      const Vec3<double>&q = q_[static_cast<size_t>(g)], &w = w_[static_cast<size_t>(g)];
      const double qk[3] = {q.x, q.y, q.z}, wk[3] = {w.x, w.y, w.z};
      const T* r = in.positions + 3 * atom_at(g);
      for (int k = 0; k < 3; ++k) {
        range.q_low[k] = std::min(range.q_low[k], qk[k]);
        range.q_high[k] = std::max(range.q_high[k], qk[k]);
        range.w_low[k] = std::min(range.w_low[k], wk[k]);
        range.w_high[k] = std::max(range.w_high[k], wk[k]);
        range.largest = std::max(range.largest, static_cast<double>(std::abs(r[k])));
      }
    }

    constexpr SearchPrices prices{200.0, 4.0, 0.0, 1.0, 3};
    const Reach reach = make_grid<T>(s.cell, range, in.cutoff, static_cast<double>(s.num_atoms), prices, s);
    if (reach.shift_overflows) data_error("shift_overflows", static_cast<int64_t>(b));
    if (reach.images_blur) data_error("images_blur", static_cast<int64_t>(b));
    fewest_pairs_ += diffnl::fewest_pairs(s.cell, range, in.cutoff, static_cast<double>(s.num_atoms));
    std::copy_n(range.w_low, 3, s.lowest_wrap);
    double num_bins = 1.0;
    for (const AxisBins& axis : s.axis) num_bins *= static_cast<double>(axis.bins);
    if (num_bins <= 4.0 * static_cast<double>(s.num_atoms) + 64.0) {
      s.table = table;
      table += static_cast<int64_t>(num_bins) + 1;
    }
  }
  starts_.assign(static_cast<size_t>(table), 0);
}

template <typename T>
void CellList<T>::sort_into_bins(const SearchInput<T>& in) {
  const size_t n = static_cast<size_t>(in.num_atoms);
  std::vector<int64_t> key(n), order(n);
  for_blocks_of_atoms(in.num_atoms, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const System& s = system(system_at(g));
      key[static_cast<size_t>(g)] = bin_key(s, q_[static_cast<size_t>(g)]);
    }
  });

  // order[a] = the grouped number of the a-th sorted atom: by system, bin, and number.
  for (const System& s : systems_) {
    const int64_t end = s.first_atom + s.num_atoms;
    if (s.num_atoms == 0) continue;
    if (s.table < 0) {
      for (int64_t g = s.first_atom; g < end; ++g) order[static_cast<size_t>(g)] = g;
      std::sort(order.begin() + s.first_atom, order.begin() + end, [&](int64_t g, int64_t other) {
        const int64_t a = key[static_cast<size_t>(g)], c = key[static_cast<size_t>(other)];
        return a != c ? a < c : g < other;
      });
      continue;
    }
    // Counting sort: the table counts the atoms of each bin, then becomes the first atom of each.
    int64_t* starts = starts_.data() + s.table;
    const int64_t num_bins = s.axis[0].bins * s.axis[1].bins * s.axis[2].bins;
    for (int64_t g = s.first_atom; g < end; ++g) ++starts[key[static_cast<size_t>(g)]];
    int64_t sum = s.first_atom;
    for (int64_t k = 0; k <= num_bins; ++k) {
      const int64_t count = k < num_bins ? starts[k] : 0;
      starts[k] = sum;
      sum += count;
    }
    std::vector<int64_t> next(starts, starts + num_bins);
    for (int64_t g = s.first_atom; g < end; ++g)
      order[static_cast<size_t>(next[static_cast<size_t>(key[static_cast<size_t>(g)])]++)] = g;
  }

  for (int k = 0; k < 3; ++k) {
    atoms_.r[k].resize(n);
    atoms_.wrapped[k].resize(n);
    atoms_.w[k].resize(n);
  }
  atoms_.index.resize(n);
  atoms_.key.resize(n);
  atoms_.system.resize(n);
  for_blocks_of_atoms(in.num_atoms, [&](int64_t first, int64_t last) {
    for (int64_t a = first; a < last; ++a) {
      const size_t to = static_cast<size_t>(a), from = static_cast<size_t>(order[to]);
      const int64_t i = atom_at(static_cast<int64_t>(from));
      const System& s = system(system_at(static_cast<int64_t>(from)));
      const Vec3<double>&w = w_[from], &q = q_[from];
      // From the grid's origin: on an open axis q itself may be so large that T holds none of the distances in it.
      const double x = q.x - s.origin[0], y = q.y - s.origin[1], z = q.z - s.origin[2];
      for (int k = 0; k < 3; ++k) {
        atoms_.r[k][to] = in.positions[3 * i + k];
        atoms_.wrapped[k][to] = bounded<T>(cell_translation(x, y, z, s.cell.h, k));
      }
      const double* lowest = s.lowest_wrap;
      atoms_.w[0][to] = static_cast<T>(w.x - lowest[0]);
      atoms_.w[1][to] = static_cast<T>(w.y - lowest[1]);
      atoms_.w[2][to] = static_cast<T>(w.z - lowest[2]);
      atoms_.index[to] = i;
      atoms_.key[to] = key[from];
      atoms_.system[to] = system_at(static_cast<int64_t>(from));
    }
  });
  q_ = {};
  w_ = {};
}

template class CellList<float>;
template class CellList<double>;

}  // namespace diffnl
