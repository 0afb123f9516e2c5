// The geometry every backend shares: the exact pair arithmetic, and the cell a search bins atoms in.
//
// The first half is the promise: the three functions that decide whether a pair is listed and what its
// vector is. They are compiled without fused multiply-add (-ffp-contract=off), so that every backend and
// plain torch produce the same bits. The second half only has to be conservative: it may propose too many
// candidates, never too few, because every candidate passes through the first half.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DIFFNL_HD __host__ __device__
#else
#define DIFFNL_HD
#endif

namespace diffnl {

// ------------------------------------------------------------------------------- exact arithmetic

template <typename T>
struct Vec3 {
  T x, y, z;
};

// t = S @ h, one component: (S0 h0c + S1 h1c) + S2 h2c. `h` is row major, rows are lattice vectors.
template <typename T>
DIFFNL_HD inline T cell_translation(T s0, T s1, T s2, const T* h, int c) {
  return (s0 * h[c] + s1 * h[3 + c]) + s2 * h[6 + c];
}

// v = (r_j - r_i) + t
template <typename T>
DIFFNL_HD inline Vec3<T> pair_vector(Vec3<T> ri, Vec3<T> rj, Vec3<T> t) {
  return {(rj.x - ri.x) + t.x, (rj.y - ri.y) + t.y, (rj.z - ri.z) + t.z};
}

// d2 = (vx vx + vy vy) + vz vz
template <typename T>
DIFFNL_HD inline T squared_length(Vec3<T> v) {
  return (v.x * v.x + v.y * v.y) + v.z * v.z;
}

// --------------------------------------------------------------------------------- the search cell

// One system's frame for binning, in float64. Row k of `h` is the lattice vector on a periodic axis and a
// unit vector normal to all other rows on an open axis, so that fractional coordinates always exist; on
// an open axis they are a length in the length unit of the positions.
struct SearchCell {
  double h[9];
  double inverse[9];     // q = r @ inverse
  double height[3];      // distance between neighbouring lattice planes of axis k; 1 on open axes
  double per_height[3];  // 1 / height: a GPU divides slowly
  double length[3];      // |h_k| on periodic axes, 0 on open ones
  bool periodic[3];
  double condition;  // prod |h_k| / |det h| >= 1: how much rounding the inverse amplifies
};

DIFFNL_HD inline void cross(const double* a, const double* b, double* out) {
  out[0] = a[1] * b[2] - a[2] * b[1];
  out[1] = a[2] * b[0] - a[0] * b[2];
  out[2] = a[0] * b[1] - a[1] * b[0];
}

DIFFNL_HD inline double norm(const double* a) { return std::sqrt(a[0] * a[0] + a[1] * a[1] + a[2] * a[2]); }

// Squares of areas between these keep all their digits in float64. Cells of float32 have no others.
constexpr double kLeastArea = 1e-145, kLargestArea = 1e150;

// Completes the periodic rows with orthonormal ones. Returns false when the periodic vectors are zero or
// linearly dependent to within the rounding of T, or so short or long that areas cannot be computed. Local arrays
// have constant indices only: on a GPU they live in registers.
template <typename T>
DIFFNL_HD inline bool make_search_cell(const T* cell, const bool* pbc, SearchCell& out) {
  double* h = out.h;
  double lengths = 1.0;
  for (int k = 0; k < 3; ++k) {
    out.periodic[k] = pbc[k];
    out.length[k] = 0.0;
    if (!pbc[k]) continue;
    for (int c = 0; c < 3; ++c) h[3 * k + c] = static_cast<double>(cell[3 * k + c]);
    out.length[k] = norm(h + 3 * k);
    lengths *= out.length[k];
  }
  const int num_periodic = pbc[0] + pbc[1] + pbc[2];
  if (num_periodic == 0) {
    for (int c = 0; c < 9; ++c) h[c] = (c % 4 == 0);
  } else if (num_periodic == 1) {
    // Any direction that is not nearly parallel to the only lattice vector starts the normal plane.
    const int k = pbc[0] ? 0 : pbc[1] ? 1 : 2;
    const double* a = h + 3 * k;
    double* u = h + 3 * ((k + 1) % 3);
    double* w = h + 3 * ((k + 2) % 3);
    int least = 0;
    for (int c = 1; c < 3; ++c) least = std::abs(a[c]) < std::abs(a[least]) ? c : least;
    const double axis[3] = {least == 0 ? 1.0 : 0.0, least == 1 ? 1.0 : 0.0, least == 2 ? 1.0 : 0.0};
    cross(a, axis, u);
    const double scale_u = norm(u);
    for (int c = 0; c < 3; ++c) u[c] /= scale_u;
    cross(a, u, w);
    const double scale_w = norm(w);
    for (int c = 0; c < 3; ++c) w[c] /= scale_w;
  } else if (num_periodic == 2) {
    const int open = !pbc[0] ? 0 : !pbc[1] ? 1 : 2;
    double* n = h + 3 * open;
    cross(h + 3 * ((open + 1) % 3), h + 3 * ((open + 2) % 3), n);
    const double scale = norm(n);
    for (int c = 0; c < 3; ++c) n[c] /= scale;
  }

  double bc[3], ca[3], ab[3];
  cross(h + 3, h + 6, bc);
  cross(h + 6, h, ca);
  cross(h, h + 3, ab);
  const double det = h[0] * bc[0] + h[1] * bc[1] + h[2] * bc[2];
  const double tolerance = sizeof(T) == 4 ? 16.0 * std::numeric_limits<float>::epsilon() : 1e-12;
  if (!(std::abs(det) > tolerance * lengths)) return false;  // also catches NaN from a zero-length normal
  out.condition = lengths / std::abs(det);
  const double inverse_det = 1.0 / det;  // once: one thread of a GPU does this while all others wait
  for (int c = 0; c < 3; ++c) {
    out.inverse[3 * c] = bc[c] * inverse_det;
    out.inverse[3 * c + 1] = ca[c] * inverse_det;
    out.inverse[3 * c + 2] = ab[c] * inverse_det;
  }
  const double areas[3] = {norm(bc), norm(ca), norm(ab)};
  for (int k = 0; k < 3; ++k) {
    if (!(areas[k] >= kLeastArea && areas[k] <= kLargestArea)) return false;
    out.height[k] = std::abs(det) / areas[k];
    out.per_height[k] = areas[k] * std::abs(inverse_det);
  }
  return true;
}

DIFFNL_HD inline Vec3<double> fractional(const SearchCell& cell, Vec3<double> r) {
  const double* m = cell.inverse;
  return {r.x * m[0] + r.y * m[3] + r.z * m[6], r.x * m[1] + r.y * m[4] + r.z * m[7],
          r.x * m[2] + r.y * m[5] + r.z * m[8]};
}

// What the wraps W (cell numbers of the atoms) and the cutoff allow for S, and how far off rounding can be.
struct Reach {
  double largest_shift;  // max over axes of |S_k|
  double rounding;       // bound on the difference of the exact arithmetic and real arithmetic, in length
  bool shift_overflows;  // some S may not fit int32
  bool images_blur;      // rounding is of the order of the distance between images
};

// `wrap_range[k]` is max W_k - min W_k over the atoms of the system; `extent` bounds |r'_j - r'_i| of
// wrapped positions; `largest_position` bounds |component| of the positions as given. Term by term:
// docs/algorithm.md, "The bound".
template <typename T>
DIFFNL_HD inline Reach make_reach(const SearchCell& cell, double cutoff, const double* wrap_range, double extent,
                                  double largest_position) {
  const double eps = std::numeric_limits<T>::epsilon();
  const double eps64 = std::numeric_limits<double>::epsilon();
  Reach out{0.0, 0.0, false, false};
  double translation = 0.0, lengths = 0.0, spacing = std::numeric_limits<double>::infinity();
  for (int k = 0; k < 3; ++k) {
    if (!cell.periodic[k]) continue;
    const double shift = wrap_range[k] + std::ceil(cutoff / cell.height[k]) + 1.0;
    out.largest_shift = std::max(out.largest_shift, shift);
    translation += shift * cell.length[k];
    lengths += cell.length[k];
    spacing = std::min(spacing, cell.height[k]);
  }
  // v, d2 and the CPU's box test, in T: none of what they round is larger than translation + extent + cutoff,
  // because r_j - r_i and positions relative to the grid's origin are all that enters them.
  const double arithmetic = 16.0 * eps * (translation + extent + cutoff);
  // Squares below the least number of T: a sum of three is off by no more than four halves of that number.
  const double underflow = 4.0 * std::sqrt(static_cast<double>(std::numeric_limits<T>::denorm_min()));
  // r - W @ h, in float64, cancels terms |W_k| |h_k| <= condition * |r|; the inverse is off by eps64 * condition.
  const double filing = 32.0 * eps64 * cell.condition * (largest_position + extent);
  out.rounding = arithmetic + underflow + filing;
  out.shift_overflows = !(out.largest_shift < 2147483647.0);
  out.images_blur = eps * translation > spacing / 8.0 ||
                    16.0 * eps64 * cell.condition * (largest_position + lengths) > spacing / 8.0;
  return out;
}

// How one axis is cut into bins: `bins` of equal width across the cell (or across the atoms, on an open
// axis); every neighbour lies at most `reach` bins away.
struct AxisBins {
  int64_t bins;
  int64_t reach;
};

// Bins of width w with radius / R <= w, as narrow as whole numbers allow. An axis shorter than that is one
// bin, and its images do the rest. `radii` is the length of the axis in units of the radius.
DIFFNL_HD inline AxisBins axis_bins(double radii, bool periodic, int64_t reach) {
  constexpr double most_bins = 1 << 20;  // three axes fit one 64-bit key
  const double fit = std::floor(radii * static_cast<double>(reach));
  if (!(fit >= 1.0)) return {1, periodic ? static_cast<int64_t>(std::ceil(1.0 / radii)) : 0};
  const int64_t bins = static_cast<int64_t>(std::min(fit, most_bins));
  return {bins, periodic ? reach : std::min(reach, bins - 1)};
}

// What a search pays, in units of one tested candidate, fitted to times; and the widest stencil it can take.
struct SearchPrices {
  double run;        // a run of bins along z
  double copy;       // a candidate that is collected for the atoms of a bin
  double bins;       // how many bins keep the device busy; 0 where there are always enough
  double all_atoms;  // of all systems
  int64_t most_reach;
};

// For costs: a GPU divides floats many times faster, and nobody else works meanwhile.
DIFFNL_HD inline double about(double numerator, double denominator) {
  return static_cast<double>(static_cast<float>(numerator) / static_cast<float>(denominator));
}

// Chooses R in 1 .. most_reach, the same for all axes, by the work it makes for one atom. Narrow bins propose
// fewer candidates (the stencil of R = 1 holds the volume of 6.4 cutoff spheres, that of R = 2 of 3.7); wide bins
// share the collecting of candidates among more atoms.
DIFFNL_HD inline void choose_bins(const double* length, const bool* periodic, double radius, double num_atoms,
                                  const SearchPrices& prices, AxisBins* chosen) {
  double least = std::numeric_limits<double>::infinity();
  const double radii[3] = {length[0] / radius, length[1] / radius, length[2] / radius};
  for (int64_t reach = 1; reach <= prices.most_reach; ++reach) {
    AxisBins axes[3];
    double runs = 1.0, candidates = num_atoms, all_bins = 1.0;
    for (int k = 0; k < 3; ++k) {
      axes[k] = axis_bins(radii[k], periodic[k], reach);
      const double bins = static_cast<double>(axes[k].bins),
                   stencil = 2.0 * static_cast<double>(axes[k].reach) + 1.0, share = about(stencil, bins);
      runs *= k < 2 ? stencil : 1.0 + (periodic[k] ? share : 0.0);
      candidates *= periodic[k] ? share : std::min(share, 1.0);
      all_bins *= bins;
    }
    const double shared_by = std::max(about(num_atoms, all_bins), 1.0);
    const double idle = std::max(about(prices.bins * shared_by, prices.all_atoms), 1.0);
    const double cost = idle * (candidates + about(runs * prices.run + candidates * prices.copy, shared_by));
    if (reach == 1 || cost < least) {
      least = cost;
      for (int k = 0; k < 3; ++k) chosen[k] = axes[k];
    }
  }
}

// -------------------------------------------------------------------------------- wrapping and bins

// r = (q + w) @ h with q in [0, 1) on periodic axes. Wrapped twice: far from the cell the first w is off by
// the rounding of q, and the remainder shows by how much.
DIFFNL_HD inline void wrap(const SearchCell& cell, Vec3<double> r, Vec3<double>& q, Vec3<double>& w) {
  w = {0.0, 0.0, 0.0};
  q = fractional(cell, r);
  for (int pass = 0; pass < 2; ++pass) {
    const Vec3<double> whole{cell.periodic[0] ? std::floor(q.x) : 0.0, cell.periodic[1] ? std::floor(q.y) : 0.0,
                             cell.periodic[2] ? std::floor(q.z) : 0.0};
    if (whole.x == 0.0 && whole.y == 0.0 && whole.z == 0.0) return;
    w = {w.x + whole.x, w.y + whole.y, w.z + whole.z};
    q = fractional(
        cell, {r.x - cell_translation(w.x, w.y, w.z, cell.h, 0), r.y - cell_translation(w.x, w.y, w.z, cell.h, 1),
               r.z - cell_translation(w.x, w.y, w.z, cell.h, 2)});
  }
}

// What a grid must know of a system's atoms.
struct AtomRange {
  double q_low[3], q_high[3];  // wrapped fractional coordinates
  double w_low[3], w_high[3];  // cells the atoms were found in
  double largest;              // |component| of a position
};

// How one system is cut into bins.
struct Grid {
  AxisBins axis[3];
  double origin[3];         // smallest fractional coordinate: 0 on periodic axes
  double bins_per_unit[3];  // bin = (q - origin) * bins_per_unit
  double units_per_bin[3];
  double radius;        // cutoff plus the bound on rounding
  double bin_diagonal;  // largest distance between two points of one bin
};

template <typename T>
DIFFNL_HD inline Reach make_grid(const SearchCell& cell, const AtomRange& range, double cutoff, double num_atoms,
                                 const SearchPrices& prices, Grid& out) {
  double wrap_range[3], span[3], length[3], extent = 0.0;
  for (int k = 0; k < 3; ++k) {
    const double across = range.q_high[k] - range.q_low[k];
    wrap_range[k] = range.w_high[k] - range.w_low[k];
    extent += cell.periodic[k] ? cell.length[k] : across;
    span[k] = cell.periodic[k] ? 1.0 : across;
    length[k] = span[k] * cell.height[k];
  }
  const Reach reach = make_reach<T>(cell, cutoff, wrap_range, extent, range.largest);
  out.radius = cutoff + reach.rounding;
  choose_bins(length, cell.periodic, out.radius, num_atoms, prices, out.axis);
  out.bin_diagonal = 0.0;
  constexpr double flat = 1e-100;  // atoms this close to a plane are in one bin, whose width has a square
  for (int k = 0; k < 3; ++k) {
    out.origin[k] = cell.periodic[k] ? 0.0 : range.q_low[k];
    const double bins = static_cast<double>(out.axis[k].bins);
    out.bins_per_unit[k] = cell.periodic[k] ? bins : span[k] > flat ? bins / span[k] : 1.0;
    out.units_per_bin[k] = 1.0 / out.bins_per_unit[k];
    out.bin_diagonal += (cell.periodic[k] ? cell.length[k] : 1.0) * out.units_per_bin[k];  // open rows are units
  }
  return reach;
}

// How many pairs a half list of `num_atoms` atoms within `range` holds at least: each atom meets each other in as
// many images as cells lie wholly within the cutoff, of which the extent along open axes takes its share. Tells a
// cutoff in the wrong unit before anything is counted.
DIFFNL_HD inline double fewest_pairs(const SearchCell& cell, const AtomRange& range, double cutoff,
                                     double num_atoms) {
  constexpr double unit_ball[4] = {1.0, 2.0, 3.14159265358979, 4.0 / 3.0 * 3.14159265358979};
  int periodic = 0;
  double lengths = 0.0, volume = 1.0, across2 = 0.0;
  for (int k = 0; k < 3; ++k) {
    if (cell.periodic[k]) {
      ++periodic;
      lengths += cell.length[k];
      volume *= cell.length[k];
    } else {
      const double across = range.q_high[k] - range.q_low[k];
      across2 += across * across;
    }
  }
  const double within = across2 > 0.0 ? std::sqrt(std::max(cutoff * cutoff - across2, 0.0)) : cutoff;
  const double radius = within - lengths;
  if (!(radius > 0.0)) return 0.0;
  double images = unit_ball[periodic] * cell.condition / volume;
  for (int k = 0; k < periodic; ++k) images *= radius;
  return num_atoms * std::max(num_atoms * images - 1.0, 0.0) / 2.0;
}

DIFFNL_HD inline int64_t bin_on_axis(const Grid& grid, int k, double q) {
  const double position = (q - grid.origin[k]) * grid.bins_per_unit[k];
  // NaN, where the extent of the atoms is no finite number, becomes bin 0: there is no other then.
  return static_cast<int64_t>(std::min(std::max(0.0, position), static_cast<double>(grid.axis[k].bins - 1)));
}

// Along z, neighbouring bins have neighbouring keys.
DIFFNL_HD inline int64_t bin_key(const Grid& grid, int64_t bx, int64_t by, int64_t bz) {
  return (bx * grid.axis[1].bins + by) * grid.axis[2].bins + bz;
}

DIFFNL_HD inline int64_t bin_key(const Grid& grid, Vec3<double> q) {
  return bin_key(grid, bin_on_axis(grid, 0, q.x), bin_on_axis(grid, 1, q.y), bin_on_axis(grid, 2, q.z));
}

// Floor division: the image an unwrapped bin number lies in.
DIFFNL_HD inline int64_t floor_div(int64_t a, int64_t n) {
  const int64_t quotient = a / n;
  return quotient - (a % n < 0 ? 1 : 0);
}

// The half list's rule: i < j, or i = j and S lexicographically positive.
template <typename S>
DIFFNL_HD inline bool in_half(int64_t i, int64_t j, S s0, S s1, S s2) {
  if (i != j) return i < j;
  if (s0 != 0) return s0 > 0;
  if (s1 != 0) return s1 > 0;
  return s2 > 0;
}

}  // namespace diffnl
