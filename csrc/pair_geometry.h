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

namespace diffnl {

// ------------------------------------------------------------------------------- exact arithmetic

template <typename T>
struct Vec3 {
  T x, y, z;
};

// t = S @ h, one component: (S0 h0c + S1 h1c) + S2 h2c. `h` is row major, rows are lattice vectors.
template <typename T>
inline T cell_translation(T s0, T s1, T s2, const T* h, int c) {
  return (s0 * h[c] + s1 * h[3 + c]) + s2 * h[6 + c];
}

// v = (r_j - r_i) + t
template <typename T>
inline Vec3<T> pair_vector(Vec3<T> ri, Vec3<T> rj, Vec3<T> t) {
  return {(rj.x - ri.x) + t.x, (rj.y - ri.y) + t.y, (rj.z - ri.z) + t.z};
}

// d2 = (vx vx + vy vy) + vz vz
template <typename T>
inline T squared_length(Vec3<T> v) {
  return (v.x * v.x + v.y * v.y) + v.z * v.z;
}

// --------------------------------------------------------------------------------- the search cell

// One system's frame for binning, in float64. Row k of `h` is the lattice vector on a periodic axis and a
// unit vector normal to all other rows on an open axis, so that fractional coordinates always exist; on
// an open axis they are a length in the length unit of the positions.
struct SearchCell {
  double h[9];
  double inverse[9];  // q = r @ inverse
  double height[3];   // distance between neighbouring lattice planes of axis k; 1 on open axes
  double length[3];   // |h_k| on periodic axes, 0 on open ones
  bool periodic[3];
  double condition;  // prod |h_k| / |det h| >= 1: how much rounding the inverse amplifies
};

inline void cross(const double* a, const double* b, double* out) {
  out[0] = a[1] * b[2] - a[2] * b[1];
  out[1] = a[2] * b[0] - a[0] * b[2];
  out[2] = a[0] * b[1] - a[1] * b[0];
}

inline double norm(const double* a) { return std::sqrt(a[0] * a[0] + a[1] * a[1] + a[2] * a[2]); }

// Completes the periodic rows with orthonormal ones. Returns false when the periodic vectors are zero or
// linearly dependent to within the rounding of T.
template <typename T>
inline bool make_search_cell(const T* cell, const bool* pbc, SearchCell& out) {
  double* h = out.h;
  int periodic_axes[3], open_axes[3], num_periodic = 0, num_open = 0;
  double lengths = 1.0;
  for (int k = 0; k < 3; ++k) {
    out.periodic[k] = pbc[k];
    out.length[k] = 0.0;
    if (!pbc[k]) {
      open_axes[num_open++] = k;
      continue;
    }
    periodic_axes[num_periodic++] = k;
    for (int c = 0; c < 3; ++c) h[3 * k + c] = static_cast<double>(cell[3 * k + c]);
    out.length[k] = norm(h + 3 * k);
    lengths *= out.length[k];
  }
  if (num_periodic == 0) {
    for (int c = 0; c < 9; ++c) h[c] = (c % 4 == 0);
  } else if (num_periodic == 1) {
    // Any direction that is not nearly parallel to the only lattice vector starts the normal plane.
    const double* a = h + 3 * periodic_axes[0];
    double* u = h + 3 * open_axes[0];
    double* w = h + 3 * open_axes[1];
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
    double* n = h + 3 * open_axes[0];
    cross(h + 3 * periodic_axes[0], h + 3 * periodic_axes[1], n);
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
  for (int c = 0; c < 3; ++c) {
    out.inverse[3 * c] = bc[c] / det;
    out.inverse[3 * c + 1] = ca[c] / det;
    out.inverse[3 * c + 2] = ab[c] / det;
  }
  out.height[0] = std::abs(det) / norm(bc);
  out.height[1] = std::abs(det) / norm(ca);
  out.height[2] = std::abs(det) / norm(ab);
  return true;
}

inline Vec3<double> fractional(const SearchCell& cell, Vec3<double> r) {
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
// wrapped positions; `largest_position` bounds |r|.
template <typename T>
inline Reach make_reach(const SearchCell& cell, double cutoff, const double* wrap_range, double extent,
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
  // Six roundings make up v, as many a wrapped position and its image; each is at most eps/2 of a term no
  // larger than translation + extent + cutoff.
  // Filing: r - W @ h cancels terms |W_k| |h_k| <= condition * |r|.
  const double filing = 16.0 * eps64 * cell.condition * (largest_position + lengths + extent);
  out.rounding = 16.0 * eps * (translation + extent + cutoff) + filing;
  out.shift_overflows = !(out.largest_shift < 2147483647.0);
  out.images_blur = eps * translation > spacing / 8.0 || filing > spacing / 8.0;
  return out;
}

// How one axis is cut into bins: `bins` of equal width across the cell (or across the atoms, on an open
// axis); every neighbour lies at most `reach` bins away.
struct AxisBins {
  int64_t bins;
  int64_t reach;
};

// Bins of width w with radius / R <= w, as narrow as whole numbers allow. An axis shorter than that is one
// bin, and its images do the rest.
inline AxisBins axis_bins(double length, double radius, bool periodic, int64_t reach) {
  constexpr double most_bins = 1 << 20;  // three axes fit one 64-bit key
  const double fit = std::floor(length * static_cast<double>(reach) / radius);
  if (!(fit >= 1.0)) return {1, periodic ? static_cast<int64_t>(std::ceil(radius / length)) : 0};
  const int64_t bins = static_cast<int64_t>(std::min(fit, most_bins));
  return {bins, periodic ? reach : std::min(reach, bins - 1)};
}

// Chooses R in 1 .. 3, the same for all axes, by the work it makes for one atom. Narrow bins propose fewer
// candidates (the stencil of R = 1 holds the volume of 6.4 cutoff spheres, that of R = 2 of 3.7); wide bins share
// the collecting of candidates among more atoms. Prices are in units of one tested candidate, fitted to times of
// both.
inline void choose_bins(const double* length, const bool* periodic, double radius, double num_atoms,
                        AxisBins* chosen) {
  constexpr double price_of_run = 200.0, price_of_copy = 4.0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t reach = 1; reach <= 3; ++reach) {
    AxisBins axes[3];
    double runs = 1.0, candidates = num_atoms, atoms_in_bin = num_atoms;
    for (int k = 0; k < 3; ++k) {
      axes[k] = axis_bins(length[k], radius, periodic[k], reach);
      const double bins = static_cast<double>(axes[k].bins),
                   stencil = 2.0 * static_cast<double>(axes[k].reach) + 1.0;
      runs *= k < 2 ? stencil : 1.0 + (periodic[k] ? stencil / bins : 0.0);
      candidates *= periodic[k] ? stencil / bins : std::min(stencil / bins, 1.0);
      atoms_in_bin /= bins;
    }
    const double shared_by = std::max(atoms_in_bin, 1.0);
    const double cost = candidates + (runs * price_of_run + candidates * price_of_copy) / shared_by;
    if (cost < least) {
      least = cost;
      std::copy_n(axes, 3, chosen);
    }
  }
}

}  // namespace diffnl
