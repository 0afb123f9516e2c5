// How long the candidates of a search go on to hold every pair while atoms move and cells change, for every
// backend.
//
// Let F = h_old^-1 h_new carry the old cell into the new one, and u_i = r_i - r_i,old F. A pair that was v_old
// apart is v = v_old F + (u_j - u_i) apart now, so
//
//     |v| >= sigma_min(F) |v_old| - 2 max |u|
//
// and no pair that was out of reach, |v_old| >= radius, is a neighbour now while
//
//     sigma_min(F) radius - 2 max |u| >= cutoff
//
// in each system for itself. Both sides leave room for the rounding of vectors in T.
#pragma once

#include "pair_geometry.h"

namespace diffnl {

// A system's cell at the time of the search and now.
struct Drift {
  SearchCell old, now;
  double F[9];
  double stretch;  // sigma_min(F)
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

// False for a cell that no search would take.
template <typename T>
DIFFNL_HD inline bool make_drift(const T* old_cell, const T* cell, const bool* pbc, Drift& out) {
  if (!make_search_cell(old_cell, pbc, out.old) || !make_search_cell(cell, pbc, out.now)) return false;
  const double *inverse = out.old.inverse, *h = out.now.h;
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < 3; ++c)
      out.F[3 * r + c] = inverse[3 * r] * h[c] + inverse[3 * r + 1] * h[3 + c] + inverse[3 * r + 2] * h[6 + c];
  out.stretch = least_singular_value(out.F);
  return true;
}

// |u|^2; not finite if a position is not.
template <typename T>
DIFFNL_HD inline double squared_move(const Drift& drift, const T* from, const T* to) {
  const double x = static_cast<double>(from[0]), y = static_cast<double>(from[1]),
               z = static_cast<double>(from[2]);
  double squared = 0.0;
  for (int c = 0; c < 3; ++c) {
    const double u = static_cast<double>(to[c]) - (x * drift.F[c] + y * drift.F[3 + c] + z * drift.F[6 + c]);
    squared += u * u;
  }
  return squared;
}

// By how much candidates to `radius` reach beyond all pairs of a system closer than `cutoff`; they hold these
// while that is not negative. `moved2` is the largest |u|^2, `largest` bounds |component| of the positions now.
template <typename T>
DIFFNL_HD inline double margin(const Drift& drift, double moved2, double largest, double cutoff, double radius) {
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  // |S_k| <= |v - (r_j - r_i)| / height_k for any pair that could matter.
  const double apart = radius + 4.0 * largest;
  double translation = 0.0;
  for (int k = 0; k < 3; ++k)
    if (drift.now.periodic[k]) translation += (apart / drift.now.height[k] + 1.0) * drift.now.length[k];
  const double rounding = 16.0 * eps * (translation + apart) + 1e-7 * radius;
  return drift.stretch * (radius - rounding) - 2.0 * std::sqrt(moved2) - (cutoff + rounding);
}

}  // namespace diffnl
