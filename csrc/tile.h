// A tile: the candidates around one bin as contiguous arrays, and the loops over them.
//
// The loops are straight-line code that the compiler turns into vector instructions, compiled for several
// widths of vector units (tile.cpp).
#pragma once

#include <array>
#include <cstdint>

#include "pair_geometry.h"

namespace diffnl {

constexpr int kTileSize = 1024;

// Three components and one to spare, read, added and written in one instruction. The spare one holds anything.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t number __attribute__((vector_size(16)));  // of a lane
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(32), aligned(8), may_alias));
  typedef int64_t number __attribute__((vector_size(32)));
};
template <>
struct Lanes<int32_t> {
  typedef int32_t type __attribute__((vector_size(16), aligned(4), may_alias));
};

template <typename T>
inline typename Lanes<T>::type& lanes_at(T* at) {
  return *reinterpret_cast<typename Lanes<T>::type*>(at);
}
template <typename T>
inline const typename Lanes<T>::type& lanes_at(const T* at) {
  return *reinterpret_cast<const typename Lanes<T>::type*>(at);
}

// S = s + W_i for the atom i at hand; t = S @ h is kept for the last W_i, which nearly always is that of the
// next atom too.
template <typename T>
struct Tile {
  int size = 0;
  std::array<T, kTileSize> x, y, z;     // positions as given
  std::array<T, kTileSize> s0, s1, s2;  // m - W_j
  std::array<T, kTileSize> tx, ty, tz;  // t for W_i = (w0, w1, w2)
  std::array<T, 4 * kTileSize> r, s,
      t;                             // the same by candidate: (x, y, z, 0), ...; packed before anything is written
  std::array<T, kTileSize> d2;       // of the atom tested last
  std::array<int64_t, kTileSize> j;  // the caller's number of the candidate
  T w0 = 0, w1 = 0, w2 = 0;
  // Where the bin's own atoms stand with S = 0: sorted atom a is entry a - home_shift.
  int64_t home_first = 0, home_last = 0, home_shift = 0;
};

// Numbers of chosen entries, with room for what selecting writes past the last one.
constexpr int kSelectSpare = 16;
using Selection = std::array<int32_t, kTileSize + kSelectSpare>;

// ranks[n] = how many of the numbers are smaller than numbers[n]. For rows of hundreds, where sorting by
// comparisons would mispredict most of them.
void rank_numbers(const int64_t* numbers, int size, int32_t* ranks);

template <typename T>
struct Box {
  T centre[3], half[3];  // half the edges
};

// Each of these exists for float and double.

// t for the tile's W_i.
void translate(Tile<float>& tile, const float* h);
void translate(Tile<double>& tile, const double* h);

// Packs r and s; packs t, anew for each W_i.
void pack_candidates(Tile<float>& tile);
void pack_candidates(Tile<double>& tile);
void pack_translations(Tile<float>& tile);
void pack_translations(Tile<double>& tile);

// How many entries are listed with an atom at `ri`.
int count_within(const Tile<float>& tile, Vec3<float> ri, float cutoff2);
int count_within(const Tile<double>& tile, Vec3<double> ri, double cutoff2);

// The same for two cutoffs at once.
std::array<int, 2> count_within(const Tile<float>& tile, Vec3<float> ri, std::array<float, 2> cutoff2);
std::array<int, 2> count_within(const Tile<double>& tile, Vec3<double> ri, std::array<double, 2> cutoff2);

// d2 of all entries from an atom at `ri`.
void measure(Tile<float>& tile, Vec3<float> ri);
void measure(Tile<double>& tile, Vec3<double> ri);

// Writes the numbers n with values[n] < limit to `chosen` and returns how many there are.
int select_below(const float* values, int size, float limit, int32_t* chosen);
int select_below(const double* values, int size, double limit, int32_t* chosen);

// The same in two steps: which of 16 n .. 16 n + 15 are below, as bits of marks[n]; and their numbers.
int mark_below(const float* values, int size, float limit, uint16_t* marks);
int mark_below(const double* values, int size, double limit, uint16_t* marks);
void select_marked(const uint16_t* marks, int size, int32_t* chosen);

// The chosen entries of a tile as one stretch of the row of an atom at `ri`.
void write_row(const Tile<float>& tile, Vec3<float> ri, const int32_t* chosen, int count, int64_t* mapping_j,
               int32_t* shifts, float* vectors);
void write_row(const Tile<double>& tile, Vec3<double> ri, const int32_t* chosen, int count, int64_t* mapping_j,
               int32_t* shifts, double* vectors);

// Positions of all atoms and translations of all images.
template <typename T>
struct RowSource {
  const T *positions, *translations;  // (N, 4), (K, 4)
};

// Candidates for pairs of one atom (candidates_cpu.h).
template <typename T>
struct CandidateRow {
  Vec3<T> ri;
  const int32_t *j, *image;
  int size;
};

// d2 of all candidates of a row.
void measure_candidates(const RowSource<float>& source, const CandidateRow<float>& row, float* d2);
void measure_candidates(const RowSource<double>& source, const CandidateRow<double>& row, double* d2);

// Four times the squared distances of points (x, y, z) + image to a box; 0 inside.
void measure_gaps4(const float* x, const float* y, const float* z, int size, Vec3<float> image,
                   const Box<float>& box, float* gaps4);
void measure_gaps4(const double* x, const double* y, const double* z, int size, Vec3<double> image,
                   const Box<double>& box, double* gaps4);

}  // namespace diffnl
