// Atoms of many systems, wrapped into their cells and sorted by bin; and the walk over all images around a
// bin. Shared by counting and filling.
//
// A bin's key is (bx * ny + by) * nz + bz: along z, neighbouring bins are neighbours in memory, so the bins
// bz - R .. bz + R of one (x, y) column are one contiguous run of atoms. A run that leaves the cell is cut
// where it crosses a face; each piece belongs to one image m:
//
//         m_z = -1   |        m_z = 0         |   m_z = 1
//      . . . . . 6 7 | 0 1 2 3 4 5 6 7        | 0 1 . . .        run of bin 1 with R = 3:
//            ^^^^^^^ | ^^^^^^^^^                                 {6, 7; m_z = -1} and {0 .. 4; m_z = 0}
//
// Bins live in a table of starts only where the table stays small next to the atoms. Elsewhere (a molecule
// in a huge box) a run is found by bisection in the sorted keys, and empty space costs nothing.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "errors.h"
#include "pair_geometry.h"
#include "parallel.h"

namespace diffnl {

template <typename T>
struct SearchInput {
  const T* positions;         // (N, 3)
  const T* cell;              // (B, 3, 3), rows are lattice vectors
  const bool* pbc;            // (B, 3), or (3,) with pbc_stride 0
  int64_t pbc_stride;         // 3 or 0
  const int64_t* system_idx;  // (N,), or null: all atoms belong to system 0
  int64_t num_atoms;          // N
  int64_t num_systems;        // B
  double cutoff;
  bool full;
  bool sorted;
};

struct System : Grid {
  SearchCell cell;
  double lowest_wrap[3];   // min W over its atoms
  int64_t first_atom = 0;  // of this system, in sorted order
  int64_t num_atoms = 0;
  int64_t table = -1;  // first entry in `starts`, or -1: bisect the keys
};

// Atoms in sorted order, one array a field.
template <typename T>
struct SortedAtoms {
  std::vector<T> r[3];         // positions as given
  std::vector<T> wrapped[3];   // r - W @ h from the origin of the grid, rounded: for bounds only
  std::vector<T> w[3];         // W, the cell the atom was found in, counted from the lowest W of its system:
                               // only differences enter S, and T holds these exactly
  std::vector<int64_t> index;  // the caller's number of the atom
  std::vector<int64_t> key;    // bin key within the system
  std::vector<int32_t> system;
};

template <typename T>
class CellList {
 public:
  explicit CellList(const SearchInput<T>& in);

  const SortedAtoms<T>& atoms() const { return atoms_; }
  const System& system(int64_t b) const { return systems_[static_cast<size_t>(b)]; }
  double fewest_pairs() const { return fewest_pairs_; }  // of a half list: there are no fewer

  // Calls visit(first, last, m) for each non-empty run of sorted atoms that may hold neighbours of the atoms
  // in bin `key` of system `b`; m are the three integers of the image the run is taken from. Ends early when visit
  // returns false.
  template <typename Visit>
  void for_each_run(int64_t b, int64_t key, const Visit& visit) const;

 private:
  void group_by_system(const SearchInput<T>& in);
  void wrap(const SearchInput<T>& in);
  void choose_grids(const SearchInput<T>& in);
  void sort_into_bins(const SearchInput<T>& in);

  std::vector<System> systems_;
  std::vector<int64_t> starts_;   // dense tables of all systems, each with one closing entry
  std::vector<int64_t> grouped_;  // atoms ordered by system; empty when there is one system
  std::vector<int32_t> system_;   // of the g-th grouped atom; empty when there is one system
  std::vector<Vec3<double>> q_;   // wrapped fractional coordinates of the g-th grouped atom
  std::vector<Vec3<double>> w_;   // its W
  double fewest_pairs_ = 0.0;
  SortedAtoms<T> atoms_;

  int64_t atom_at(int64_t g) const { return grouped_.empty() ? g : grouped_[static_cast<size_t>(g)]; }
  int32_t system_at(int64_t g) const { return system_.empty() ? 0 : system_[static_cast<size_t>(g)]; }
};

// The bins (dx, dy, first) .. (dx, dy, last), relative to a home bin, that can hold neighbours: a column of
// bins is a line along h_z, and only its part inside the sphere of radius `radius + bin_diagonal` around the
// home bin matters. Worth its arithmetic where the stencil is wide: many images of a small cell.
inline std::pair<int64_t, int64_t> column_part(const System& s, int64_t dx, int64_t dy) {
  const double* h = s.cell.h;
  const double x = static_cast<double>(dx) / s.bins_per_unit[0], y = static_cast<double>(dy) / s.bins_per_unit[1];
  double oo = 0.0, oz = 0.0, zz = 0.0;  // o: from the home bin to the bin (dx, dy, 0); z: from bin to bin
  for (int c = 0; c < 3; ++c) {
    const double o = x * h[c] + y * h[3 + c], step = h[6 + c] / s.bins_per_unit[2];
    oo += o * o;
    oz += o * step;
    zz += step * step;
  }
  const double ball = s.radius + s.bin_diagonal;
  const double centre = -oz / zz;
  const double half_squared = (ball * ball - (oo - oz * oz / zz)) / zz;
  const double half = std::sqrt(std::max(half_squared, 0.0)) + 1.0;  // a bin of slack absorbs rounding
  constexpr double far = 4e18;
  return {static_cast<int64_t>(std::max(std::ceil(centre - half), -far)),
          static_cast<int64_t>(std::min(std::floor(centre + half), far))};
}

template <typename T>
template <typename Visit>
void CellList<T>::for_each_run(int64_t b, int64_t key, const Visit& visit) const {
  const System& s = system(b);
  const int64_t nx = s.axis[0].bins, ny = s.axis[1].bins, nz = s.axis[2].bins;
  const int64_t bx = key / (ny * nz), by = (key / nz) % ny, bz = key % nz;

  const auto atoms_between = [&](int64_t first_key, int64_t last_key, const int64_t* m) {
    int64_t first, last;
    if (s.table >= 0) {
      first = starts_[static_cast<size_t>(s.table + first_key)];
      last = starts_[static_cast<size_t>(s.table + last_key + 1)];
    } else {
      const auto begin = atoms_.key.begin() + s.first_atom, end = begin + s.num_atoms;
      const auto lower = std::lower_bound(begin, end, first_key);
      first = lower - atoms_.key.begin();
      last = std::upper_bound(lower, end, last_key) - atoms_.key.begin();
    }
    return first == last || visit(first, last, m);
  };

  // The stencil of an axis: unwrapped bins first .. last; on open axes there is nothing beyond the ends.
  // `first` is bin `bin` of image `image`.
  struct Stencil {
    int64_t first, last, image, bin;
  };
  const auto stencil = [](const AxisBins& axis, bool periodic, int64_t home) {
    if (!periodic) {
      const int64_t first = std::max<int64_t>(0, home - axis.reach);
      return Stencil{first, std::min(axis.bins - 1, home + axis.reach), 0, first};
    }
    const int64_t first = home - axis.reach, image = floor_div(first, axis.bins);
    return Stencil{first, home + axis.reach, image, first - image * axis.bins};
  };
  const Stencil x = stencil(s.axis[0], s.cell.periodic[0], bx);
  const Stencil y = stencil(s.axis[1], s.cell.periodic[1], by);
  const Stencil z = stencil(s.axis[2], s.cell.periodic[2], bz);

  const bool prune = s.axis[0].reach > 2 || s.axis[1].reach > 2 || s.axis[2].reach > 2;
  int64_t m[3];
  m[0] = x.image;
  for (int64_t ux = x.first, cx = x.bin; ux <= x.last; ++ux, ++cx) {
    if (cx == nx) cx = 0, ++m[0];
    m[1] = y.image;
    for (int64_t uy = y.first, cy = y.bin; uy <= y.last; ++uy, ++cy) {
      if (cy == ny) cy = 0, ++m[1];
      Stencil column = z;
      if (prune) {
        const auto [first, last] = column_part(s, ux - bx, uy - by);
        if (bz + first > column.first) {
          column.first = bz + first;
          column.image = floor_div(column.first, nz);
          column.bin = column.first - column.image * nz;
        }
        column.last = std::min(column.last, bz + last);
      }
      const int64_t column_key = (cx * ny + cy) * nz;
      m[2] = column.image;
      for (int64_t uz = column.first, cz = column.bin; uz <= column.last; cz = 0, ++m[2]) {
        const int64_t length = std::min(column.last - uz, nz - 1 - cz);
        if (!atoms_between(column_key + cz, column_key + cz + length, m)) return;
        uz += length + 1;
      }
    }
  }
}

}  // namespace diffnl
