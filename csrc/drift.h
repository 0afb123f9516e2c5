// How long the candidates of a search go on to hold every pair while atoms move and jump and cells change, for
// every backend.
//
// Let F = h_old^-1 h_new carry the old cell into the new one, let n_i be integers, 0 on open axes, and
//
//     u_i = r_i - (r_i,old + n_i h_old) F = (r_i - r_i,old F) - n_i h_new
//
// What was the pair (i, j, S_old) is the pair (i, j, S) with S = S_old + n_i - n_j now, and its vector has become
// v = v_old F + (u_j - u_i). So
//
//     |v| >= sigma_min(F) |v_old| - 2 max |u|
//
// and no pair that was out of reach, |v_old| >= radius, is a neighbour now while
//
//     sigma_min(F) radius - 2 max |u| >= cutoff
//
// in each system for itself. All of this holds for any integers n. The nearest ones are taken, so that u is what
// is left of a move when whole lattice vectors are taken off: an atom that was wrapped into the cell has jumped,
// not moved. Where two are equally near, or rounding prefers the other one, u is as short but for that rounding.
//
// Rounding (`margin`): of v in T, by the search then and by the test now; of F and u in float64. Each is relative
// to what is rounded: r_j - r_i and S h, not r, in the first; r itself in the second.
#pragma once

#include "pair_geometry.h"

namespace diffnl {

// A system at the time of the search and now.
struct Drift {
  SearchCell old, now;
  double F[9];
  double stretch;                       // sigma_min(F)
  bool same_cell;                       // then and now: F is the identity, and a GPU computes little
  double still2;                        // no atom jumps whose |r - r_old F|^2 is below
  double old_origin[3], now_origin[3];  // where one of its atoms was, and is
};

// The integers n of an atom. With the fourth they are one word.
struct alignas(4) Jump {
  static constexpr int kFarthest = 127;  // a jump further than that counts as motion
  int8_t n[4];

  DIFFNL_HD bool any() const { return (n[0] | n[1] | n[2]) != 0; }
};

// The least singular value of a 3 x 3 matrix, never too large by more than rounding.
//
// M^T M = mean + spread B, where B has the eigenvalues 2 cos of three angles: the roots of b^3 - 3 b = det B. On
// the way up from -2 the cubic is concave and rises until its least root, so Newton's steps from there never pass
// it (that root in closed form: O. K. Smith, Commun. ACM 4, 168 (1961)).
DIFFNL_HD inline double least_singular_value(const double* m) {
  const auto product = [m](int a, int b) { return m[a] * m[b] + m[3 + a] * m[3 + b] + m[6 + a] * m[6 + b]; };
  const double mean = (product(0, 0) + product(1, 1) + product(2, 2)) / 3.0;
  const double a = product(0, 0) - mean, b = product(1, 1) - mean, c = product(2, 2) - mean;
  const double xy = product(0, 1), xz = product(0, 2), yz = product(1, 2);
  const double spread = std::sqrt((a * a + b * b + c * c + 2.0 * (xy * xy + xz * xz + yz * yz)) / 6.0);
  if (!(spread > 0.0)) return std::sqrt(std::max(mean, 0.0));
  const double det = a * (b * c - yz * yz) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz);
  const double level = std::min(std::max(det / (spread * spread * spread), -2.0), 2.0);
  double root = -2.0;
  for (int step = 0; step < 12; ++step) {
    const double slope = 3.0 * root * root - 3.0, rest = level - root * (root * root - 3.0);
    if (!(slope > 0.0) || !(rest > 0.0)) break;
    root += rest / slope;
  }
  return std::sqrt(std::max(mean + spread * root, 0.0));
}

// False for a cell that no search would take. An origin is still to be set.
template <typename T>
DIFFNL_HD inline bool make_drift(const T* old_cell, const T* cell, const bool* pbc, Drift& out) {
  if (!make_search_cell(old_cell, pbc, out.old)) return false;
  out.same_cell = true;
  for (int c = 0; c < 9; ++c) out.same_cell = out.same_cell && old_cell[c] == cell[c];
  if (out.same_cell) {
    out.now = out.old;
    for (int c = 0; c < 9; ++c) out.F[c] = c % 4 == 0 ? 1.0 : 0.0;
    out.stretch = 1.0;
  } else {
    if (!make_search_cell(cell, pbc, out.now)) return false;
    const double *inverse = out.old.inverse, *h = out.now.h;
    for (int r = 0; r < 3; ++r)
      for (int c = 0; c < 3; ++c)
        out.F[3 * r + c] = inverse[3 * r] * h[c] + inverse[3 * r + 1] * h[3 + c] + inverse[3 * r + 2] * h[6 + c];
    out.stretch = least_singular_value(out.F);
  }
  for (int c = 0; c < 3; ++c) out.old_origin[c] = out.now_origin[c] = 0.0;
  // A fractional coordinate of u is at most |u| / height: below 1/2 it rounds to 0.
  out.still2 = std::numeric_limits<double>::infinity();
  for (int k = 0; k < 3; ++k)
    if (pbc[k]) out.still2 = std::min(out.still2, 0.25 * out.now.height[k] * out.now.height[k]);
  return true;
}

// `from` and `to` of any atom of the system: what is far from zero need not be far from it.
template <typename T>
DIFFNL_HD inline void set_origin(Drift& drift, const T* from, const T* to) {
  for (int c = 0; c < 3; ++c) {
    drift.old_origin[c] = static_cast<double>(from[c]);
    drift.now_origin[c] = static_cast<double>(to[c]);
  }
}

// |u|^2 and n of an atom; not finite if a position is not.
template <typename T>
DIFFNL_HD inline double squared_move(const Drift& drift, const T* from, const T* to, Jump& jump) {
  const double x = static_cast<double>(from[0]), y = static_cast<double>(from[1]),
               z = static_cast<double>(from[2]);
  const double *F = drift.F, *h = drift.now.h;
  double u[3], squared = 0.0;
  for (int c = 0; c < 3; ++c) {
    u[c] = static_cast<double>(to[c]) - (x * F[c] + y * F[3 + c] + z * F[6 + c]);
    squared += u[c] * u[c];
  }
  jump = Jump{};
  if (squared < drift.still2 || !std::isfinite(squared)) return squared;
  const Vec3<double> q = fractional(drift.now, {u[0], u[1], u[2]});
  const double n[3] = {drift.now.periodic[0] ? std::round(q.x) : 0.0,
                       drift.now.periodic[1] ? std::round(q.y) : 0.0,
                       drift.now.periodic[2] ? std::round(q.z) : 0.0};
  for (int k = 0; k < 3; ++k)
    if (!(std::abs(n[k]) <= Jump::kFarthest)) return squared;
  double left = 0.0;
  for (int c = 0; c < 3; ++c) {
    const double rest = u[c] - cell_translation(n[0], n[1], n[2], h, c);
    left += rest * rest;
  }
  jump = {{static_cast<int8_t>(n[0]), static_cast<int8_t>(n[1]), static_cast<int8_t>(n[2]), 0}};
  return left;
}

// How far the atom is from the origin, then and now: max |component|.
template <typename T>
DIFFNL_HD inline double distance_from_origin(const Drift& drift, const T* from, const T* to) {
  double largest = 0.0;
  for (int c = 0; c < 3; ++c) {
    const double then = std::abs(static_cast<double>(from[c]) - drift.old_origin[c]),
                 now = std::abs(static_cast<double>(to[c]) - drift.now_origin[c]);
    largest = std::max(largest, std::max(then, now));
  }
  return largest;
}

// The rounding of a vector v of atoms that are `apart` is at most `relative` (|v| + apart), by six roundings of
// terms no larger than v, r_j - r_i and S h: |S_k| <= |v - (r_j - r_i)| / height_k.
struct VectorRounding {
  double relative;
  bool images_blur;  // a search might refuse: see `make_reach`
};

template <typename T>
DIFFNL_HD inline VectorRounding vector_rounding(const SearchCell& cell, double apart, double radius) {
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  double slant = 0.0, translation = 0.0, spacing = std::numeric_limits<double>::infinity();
  for (int k = 0; k < 3; ++k) {
    if (!cell.periodic[k]) continue;
    slant += cell.length[k] * cell.per_height[k];
    translation += ((radius + apart) * cell.per_height[k] + 2.0) * cell.length[k];
    spacing = std::min(spacing, cell.height[k]);
  }
  return {16.0 * eps * (slant + 1.0), eps * translation > spacing / 8.0};
}

// By how much candidates to `radius` reach beyond all pairs of a system closer than `cutoff`; they hold these
// while that is not negative. `moved2` is the largest |u|^2, `spread` the largest distance from the origin.
template <typename T>
DIFFNL_HD inline double margin(const Drift& drift, double moved2, double spread, double cutoff, double radius) {
  const double apart = 4.0 * spread;  // 2 sqrt(3) would do
  const VectorRounding then = vector_rounding<T>(drift.old, apart, radius),
                       now = drift.same_cell ? then : vector_rounding<T>(drift.now, apart, radius);
  if (then.images_blur || now.images_blur || !(now.relative < 0.5))
    return -std::numeric_limits<double>::infinity();
  const double held = radius - then.relative * (radius + apart);  // candidates hold what was closer than that
  const double reach = (cutoff + now.relative * apart) / (1.0 - now.relative);  // no pair is longer than that
  // Inverting h_old amplifies the rounding of F and r F, and n h_new cancels against what it is taken from.
  double largest = spread, lengths = 0.0;
  for (int k = 0; k < 3; ++k) {
    largest = std::max(largest, spread + std::max(std::abs(drift.old_origin[k]), std::abs(drift.now_origin[k])));
    const double length = drift.now.periodic[k] ? drift.now.length[k] : 1.0;
    lengths += length * (drift.old.per_height[k] + drift.now.per_height[k]);
  }
  const double carrying = 64.0 * std::numeric_limits<double>::epsilon() *
                          std::max(drift.old.condition, drift.now.condition) * lengths * (largest + radius);
  return drift.stretch * held - 2.0 * (std::sqrt(moved2) + carrying) - reach - 1e-7 * radius;
}

}  // namespace diffnl
