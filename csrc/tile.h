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

// S = s + W_i for the atom i at hand; t = S @ h is kept for the last W_i, which nearly always is that of the
// next atom too.
template <typename T>
struct Tile {
  int size = 0;
  std::array<T, kTileSize> x, y, z;     // positions as given
  std::array<T, kTileSize> s0, s1, s2;  // m - W_j
  std::array<T, kTileSize> tx, ty, tz;  // t for W_i = (w0, w1, w2)
  std::array<T, kTileSize> d2;          // of the atom tested last
  std::array<int64_t, kTileSize> j;     // the caller's number of the candidate
  T w0 = 0, w1 = 0, w2 = 0;
  // Where the bin's own atoms stand with S = 0: sorted atom a is entry a - home_shift.
  int64_t home_first = 0, home_last = 0, home_shift = 0;
};

// Numbers of chosen entries, with room for what select_below writes past the last one.
using Selection = std::array<int32_t, kTileSize + 16>;

template <typename T>
struct Box {
  T centre[3], half[3];  // half the edges
};

// Each of these exists for float and double.

// t for the tile's W_i.
void translate(Tile<float>& tile, const float* h);
void translate(Tile<double>& tile, const double* h);

// How many entries are listed with an atom at `ri`.
int count_within(const Tile<float>& tile, Vec3<float> ri, float cutoff2);
int count_within(const Tile<double>& tile, Vec3<double> ri, double cutoff2);

// d2 of all entries from an atom at `ri`.
void measure(Tile<float>& tile, Vec3<float> ri);
void measure(Tile<double>& tile, Vec3<double> ri);

// Writes the numbers n with values[n] < limit to `chosen` and returns how many there are.
int select_below(const float* values, int size, float limit, int32_t* chosen);
int select_below(const double* values, int size, double limit, int32_t* chosen);

// The chosen entries of a tile as one stretch of the row of an atom at `ri`.
void write_row(const Tile<float>& tile, Vec3<float> ri, const int32_t* chosen, int count, int64_t* mapping_j,
               int32_t* shifts, float* vectors);
void write_row(const Tile<double>& tile, Vec3<double> ri, const int32_t* chosen, int count, int64_t* mapping_j,
               int32_t* shifts, double* vectors);

// Positions of all atoms and translations of all images, by component.
template <typename T>
struct RowSource {
  const T *x, *y, *z, *tx, *ty, *tz;
};

// Candidates for pairs of one atom (candidates_cpu.h).
template <typename T>
struct CandidateRow {
  Vec3<T> ri;
  const int32_t *j, *image;
  int32_t uniform;  // the image that all of them share, or -1
  int size;
};

// d2 of all candidates of a row.
void measure_candidates(const RowSource<float>& source, const CandidateRow<float>& row, float* d2);
void measure_candidates(const RowSource<double>& source, const CandidateRow<double>& row, double* d2);

// d2 of vectors (size, 3).
void measure_vectors(const float* vectors, int size, float* d2);
void measure_vectors(const double* vectors, int size, double* d2);

// Four times the squared distances of points (x, y, z) + image to a box; 0 inside.
void measure_gaps4(const float* x, const float* y, const float* z, int size, Vec3<float> image,
                   const Box<float>& box, float* gaps4);
void measure_gaps4(const double* x, const double* y, const double* z, int size, Vec3<double> image,
                   const Box<double>& box, double* gaps4);

}  // namespace diffnl
