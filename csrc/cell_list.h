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
#include <vector>

#include "errors.h"
#include "pair_geometry.h"
#include "parallel.h"

namespace diffnl {

template <typename T>
struct SearchInput {
  const T* positions;         // (N, 3)
  const T* cell;              // (B, 3, 3), rows are lattice vectors
  const bool* pbc;            // (B, 3)
  const int64_t* system_idx;  // (N,), or null: all atoms belong to system 0
  int64_t num_atoms;          // N
  int64_t num_systems;        // B
  double cutoff;
  bool full;
  bool sorted;
};

struct System {
  SearchCell cell;
  AxisBins axis[3];
  double origin[3];        // smallest fractional coordinate: 0 on periodic axes
  double bins_per_unit[3]; // bin = (q - origin) * bins_per_unit
  double lowest_wrap[3];   // min W over its atoms
  double radius;           // cutoff plus the bound on rounding
  double bin_diagonal;     // largest distance between two points of one bin
  int64_t first_atom = 0;  // of this system, in sorted order
  int64_t num_atoms = 0;
  int64_t table = -1;      // first entry in `starts`, or -1: bisect the keys
};

// Atoms in sorted order, one array a field.
template <typename T>
struct SortedAtoms {
  std::vector<T> r[3];         // positions as given, not wrapped
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

  // Calls visit(first, last, m) for each non-empty run of sorted atoms that may hold neighbours of the atoms
  // in bin `key` of system `b`; m are the three integers of the image the run is taken from. Ends early when visit returns false.
  template <typename Visit>
  void for_each_run(int64_t b, int64_t key, const Visit& visit) const;

 private:
  void group_by_system(const SearchInput<T>& in);
  void wrap(const SearchInput<T>& in);
  void choose_grids(const SearchInput<T>& in);
  void sort_into_bins(const SearchInput<T>& in);

  std::vector<System> systems_;
  std::vector<int64_t> starts_;       // dense tables of all systems, each with one closing entry
  std::vector<int64_t> grouped_;      // atoms ordered by system; empty when there is one system
  std::vector<int32_t> system_;       // of the g-th grouped atom; empty when there is one system
  std::vector<Vec3<double>> q_;       // wrapped fractional coordinates of the g-th grouped atom
  std::vector<Vec3<double>> w_;       // its W
  SortedAtoms<T> atoms_;

  int64_t atom_at(int64_t g) const { return grouped_.empty() ? g : grouped_[static_cast<size_t>(g)]; }
  int32_t system_at(int64_t g) const { return system_.empty() ? 0 : system_[static_cast<size_t>(g)]; }
};

// Floor division: the image an unwrapped bin number lies in.
inline int64_t floor_div(int64_t a, int64_t n) {
  const int64_t quotient = a / n;
  return quotient - (a % n < 0 ? 1 : 0);
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

  // Unwrapped bins u = b + d; on open axes there is nothing beyond the ends.
  const auto low = [](const AxisBins& a, bool periodic, int64_t bin) {
    return periodic ? bin - a.reach : std::max<int64_t>(0, bin - a.reach);
  };
  const auto high = [](const AxisBins& a, bool periodic, int64_t bin) {
    return periodic ? bin + a.reach : std::min(a.bins - 1, bin + a.reach);
  };
  const bool* periodic = s.cell.periodic;
  const int64_t x_last = high(s.axis[0], periodic[0], bx), y_last = high(s.axis[1], periodic[1], by);
  const int64_t z_low = low(s.axis[2], periodic[2], bz), z_high = high(s.axis[2], periodic[2], bz);

  // A column of bins at (dx, dy) is a line along h_z; the part of it inside the sphere of radius
  // `radius + bin_diagonal` around the home bin is all that can matter. Worth its arithmetic only where the
  // stencil is wide: many images of a small cell.
  const bool prune = s.axis[0].reach > 2 || s.axis[1].reach > 2 || s.axis[2].reach > 2;
  double bin[9];
  for (int k = 0; k < 3; ++k) {
    const double fraction = 1.0 / (s.bins_per_unit[k]);
    for (int c = 0; c < 3; ++c) bin[3 * k + c] = s.cell.h[3 * k + c] * fraction;
  }
  const double ball = s.radius + s.bin_diagonal;
  const double zz = bin[6] * bin[6] + bin[7] * bin[7] + bin[8] * bin[8];

  for (int64_t ux = low(s.axis[0], periodic[0], bx); ux <= x_last; ++ux) {
    const int64_t mx = floor_div(ux, nx);
    for (int64_t uy = low(s.axis[1], periodic[1], by); uy <= y_last; ++uy) {
      const int64_t my = floor_div(uy, ny);
      int64_t z_first = z_low, z_last = z_high;
      if (prune) {
        const double dx = static_cast<double>(ux - bx), dy = static_cast<double>(uy - by);
        const double o[3] = {dx * bin[0] + dy * bin[3], dx * bin[1] + dy * bin[4], dx * bin[2] + dy * bin[5]};
        const double oo = o[0] * o[0] + o[1] * o[1] + o[2] * o[2];
        const double oz = (o[0] * bin[6] + o[1] * bin[7] + o[2] * bin[8]) / zz;
        const double half_squared = (ball * ball - (oo - oz * oz * zz)) / zz;
        if (half_squared < 0.0) continue;
        const double half = std::sqrt(half_squared) + 1.0;  // one bin of slack absorbs all rounding
        z_first = std::max(z_first, bz + static_cast<int64_t>(std::ceil(std::max(-oz - half, -9e15))));
        z_last = std::min(z_last, bz + static_cast<int64_t>(std::floor(std::min(-oz + half, 9e15))));
        if (z_first > z_last) continue;
      }
      const int64_t column = ((ux - mx * nx) * ny + (uy - my * ny)) * nz;
      for (int64_t mz = floor_div(z_first, nz); mz * nz <= z_last; ++mz) {
        const int64_t m[3] = {mx, my, mz};
        const int64_t first_key = column + std::max<int64_t>(z_first - mz * nz, 0);
        const int64_t last_key = column + std::min(z_last - mz * nz, nz - 1);
        if (!atoms_between(first_key, last_key, m)) return;
      }
    }
  }
}

}  // namespace diffnl
