// The CPU backend's entry points, on raw pointers.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cell_list.h"

namespace diffnl {

template <typename T>
struct PairOutput {
  int64_t* mapping;  // (2, C), C >= P: i in row 0, j in row 1
  int32_t* shifts;   // (C, 3)
  T* vectors;        // (C, 3)
  int64_t capacity;  // C
};

// Finds all pairs, and those within each of the `shorter` cutoffs. `allocate(P)` is called once for each list,
// from the calling thread, when its number of pairs is known: for the longest, then for the others in order.
template <typename T>
void search_cpu(const SearchInput<T>& in, const std::vector<double>& shorter,
                const std::function<PairOutput<T>(int64_t)>& allocate);

// A list that exists: which atoms, through which image, in which system.
struct PairList {
  const int64_t* mapping;     // (2, C), C >= P
  const int32_t* shifts;      // (C, 3); null where no cell takes part
  const int64_t* system_idx;  // (N,); null where no cell takes part or all atoms belong to system 0
  int64_t num_pairs;          // P
  int64_t capacity;           // C
  int64_t num_atoms;          // N
  int64_t num_systems;        // B
};

// `cell` (B, 3, 3) may be null: then t = 0.
template <typename T>
void pair_vectors_cpu(const PairList& list, const T* positions, const T* cell, T* vectors);

// grad_positions (N, 3) and grad_cell (B, 3, 3) are overwritten; either may be null.
template <typename T>
void pair_vectors_adjoint_cpu(const PairList& list, const T* grad, T* grad_positions, T* grad_cell);

}  // namespace diffnl
