// Candidates on a GPU: the entry points of candidates_gpu.hip, called by skin_gpu.cpp.
//
// Candidates are the links of a full list to a longer radius, rows in order of (j, S). Links hold j, S and where
// the reverse stands: all that selecting the pairs of a shorter cutoff takes, links of those pairs included.
#pragma once

#include "drift.h"
#include "neighbors_gpu.h"

namespace diffnl {

// What is kept from one call to the next, on the device.
template <typename T>
struct GpuCandidates {
  T* positions;              // (N, 3) when they were searched
  T* cell;                   // (B, 3, 3)
  bool* pbc;                 // (B, 3), or (3,) with pbc_stride 0
  int64_t* system_idx;       // (N,) or null
  Link* links;               // (room,)
  int64_t* offsets;          // (N + 1,)
  int64_t* order;            // (N,) atoms grouped by system, in ascending order
  int64_t* first_of_system;  // (B + 1,)
  int64_t room;
  int64_t* num_candidates;    // () as the `num_pairs` of a padded list; null: there are candidates
  unsigned long long* tally;  // (2,) how often they were searched, and used again; null: nobody counts here
};

// A system on its way; see `raise_to` for how a range is kept.
struct GpuDrift {
  Drift drift;
  uint64_t moved2, spread;
};

// Small state of a selection on the device, zero at the start.
struct SelectionState {
  unsigned must_search;        // the candidates do not hold all pairs
  unsigned unknown;            // there are none, or of other cells: nothing to measure
  unsigned jumped;             // some atom has
  unsigned unlinkable;         // after a jump an S does not fit a Link
  unsigned measured, counted;  // blocks that have done so
};

template <typename T>
struct GpuSelection : GpuAtoms<T> {
  GpuCandidates<T> kept;
  double cutoff, radius;  // of the pairs, of the candidates
  T cutoff2;
  bool full;
  int64_t capacity;  // of a padded list; otherwise -1

  SelectionState* state;
  GpuDrift* drifts;          // (B,)
  Jump* jumps;               // (N,) zero at the start
  uint16_t* ranks;           // (room,) which pair of its row a candidate is; kNoPair: none
  uint32_t* row_counts;      // (N,)
  uint64_t* partial_sums;    // of the scan
  int64_t* offsets;          // (N + 1,) of the pairs
  int64_t* order;            // (N,) a copy for the list, or null
  int64_t* first_of_system;  // (B + 1,) likewise
  Summary* summary;          // host memory; of a padded list null
  int64_t* num_pairs;        // () of a padded list
};

// Finds out whether the candidates hold all pairs: `must_search`.
template <typename T>
void ask_candidates(const GpuSelection<T>& selection, GpuStream stream);

// Chooses the pairs and tells how many there are: the host, unless it must search, or a padded list.
template <typename T>
void count_selected(const GpuSelection<T>& selection, GpuStream stream);

// Writes them, and fills the rest of a padded list.
template <typename T>
void fill_selected(const GpuSelection<T>& selection, const GpuPairs<T>& out, GpuStream stream);

// Makes candidates of the `unsorted` links of a search that has been filled, with its offsets. Where
// `kept.positions` is there, the input is kept as well, and calls are counted; that is done even if nobody needed
// the search.
template <typename T>
void keep_candidates(const GpuSearch<T>& search, const Link* unsorted, const GpuCandidates<T>& kept,
                     GpuStream stream);

// cudaThreadExchangeStreamCaptureMode: returns the mode until now.
int exchange_capture_mode(int mode);

}  // namespace diffnl
