// Candidates: a list to a longer cutoff, kept so that the pairs of a shorter one can be selected from it while the
// atoms have not moved far.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "drift.h"
#include "neighbors_cpu.h"

namespace diffnl {

// Rows in order of (j, S). Instead of S each candidate has the number of its image: S, and the system it is of.
struct Candidates {
  const int64_t* offsets;  // (N + 1,) row i is candidates offsets[i] .. offsets[i + 1]
  const int32_t* j;        // (C,)
  const int32_t* image;    // (C,)
  const int32_t* images;   // (K, 4): S, system
  int64_t num_atoms, num_images;
};

// Where `compact` writes.
struct CompactList {
  int64_t* offsets;  // (N + 1,)
  int32_t *j, *image;
};

// The candidates of a list in ascending order of i; appends (S, system) of each image to `images`.
void compact(const PairList& list, const CompactList& out, std::vector<int32_t>& images);

// Candidates of some systems, searched by themselves: which atoms and systems of the batch these are, in ascending
// order.
struct PartOfBatch {
  Candidates candidates;
  const int64_t *atoms, *systems;
  int64_t num_systems;
};

// The candidates of a batch with some of its systems' replaced; appends the images. `allocate(C)` is called once.
void merge(const Candidates& batch, int64_t num_systems, const PartOfBatch& part, int64_t* offsets,
           std::vector<int32_t>& images, const std::function<CompactList(int64_t)>& allocate);

// Which atoms have jumped since the search.
struct Jumps {
  const Jump* of_atom;        // (N,) or null: none has
  const int64_t* system_idx;  // (N,) or null
  int64_t num_systems;

  size_t system_of(int64_t i) const { return system_idx == nullptr ? 0 : static_cast<size_t>(system_idx[i]); }
};

// The candidates closer than the cutoff, by the exact test. `allocate(P)` is called once, from the calling thread.
template <typename T>
void select_cpu(const Candidates& candidates, const Jumps& jumps, const T* positions, const T* cell, double cutoff,
                const std::function<PairOutput<T>(int64_t)>& allocate);

// Atoms and cells at the time of a search, and now.
template <typename T>
struct Motion {
  const T *old_positions, *positions;  // (N, 3)
  const T *old_cell, *cell;            // (B, 3, 3)
  const bool* pbc;                     // (B, 3), or (1, 3) with pbc_stride 0
  int64_t pbc_stride;
  const int64_t* system_idx;  // (N,) or null
  int64_t num_atoms, num_systems;
};

// By how much candidates to `radius` reach beyond the pairs closer than `cutoff`, for each system (drift.h).
// Writes the jumps (N,) of the atoms and returns whether there are any. Candidates that would lie too many cells
// apart after these do not hold.
template <typename T>
bool find_margins(const Motion<T>& motion, const Candidates& candidates, double cutoff, double radius,
                  double* margins, Jump* jumps);

}  // namespace diffnl
