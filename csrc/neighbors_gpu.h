// The GPU backend's entry points, on raw device pointers: implemented in *.hip, called by neighbors_gpu.cpp.
// Everything runs on the given stream; only `wait_for_summary` waits for it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "errors.h"
#include "pair_geometry.h"

namespace diffnl {

// What the compiler of the host calls a stream: hipStream_t and cudaStream_t are pointers.
using GpuStream = void*;

// One pair as the adjoint wants it: 8 bytes that stand for mapping and shifts in the backward. Bits 0..31 hold j;
// 32..45 the rank, in row j, of the reverse pair (j, i, -S); the rest S, six bits an axis.
struct Link {
  static constexpr int kRankBits = 14, kShiftBits = 6;
  static constexpr int64_t kLongestRow = int64_t(1) << kRankBits;
  static constexpr int64_t kLargestShift = (int64_t(1) << (kShiftBits - 1)) - 1;
  uint64_t bits;

  DIFFNL_HD static Link make(uint32_t j, uint32_t rank, int32_t s0, int32_t s1, int32_t s2) {
    constexpr uint32_t mask = (1u << kShiftBits) - 1;
    const uint32_t high = rank | (static_cast<uint32_t>(s0) & mask) << kRankBits |
                          (static_cast<uint32_t>(s1) & mask) << (kRankBits + kShiftBits) |
                          (static_cast<uint32_t>(s2) & mask) << (kRankBits + 2 * kShiftBits);
    return {uint64_t(high) << 32 | j};
  }
  DIFFNL_HD uint32_t j() const { return static_cast<uint32_t>(bits); }
  DIFFNL_HD uint32_t rank() const { return static_cast<uint32_t>(bits >> 32) & ((1u << kRankBits) - 1); }
  // S != 0
  DIFFNL_HD bool shifted() const { return bits >> (32 + kRankBits) != 0; }
  // S_k, its sign bit carried up and down again.
  DIFFNL_HD int32_t shift(int k) const {
    const int top = 64 - (32 + kRankBits + kShiftBits * (k + 1));
    return static_cast<int32_t>(static_cast<int64_t>(bits << top) >> (64 - kShiftBits));
  }
};

// S of one pair.
struct Shift {
  int32_t s0, s1, s2;

  DIFFNL_HD bool fits_link() const {
    constexpr int32_t most = static_cast<int32_t>(Link::kLargestShift);
    return s0 >= -most && s0 <= most && s1 >= -most && s1 <= most && s2 >= -most && s2 <= most;
  }
};

// ------------------------------------------------------------------------------------------- search

// One system, on the device.
struct GpuSystem {
  SearchCell cell;
  Grid grid;
  uint64_t q_low[3], q_high[3], w_low[3], w_high[3], largest;  // AtomRange while it is collected, as ordered bits
  uint32_t first_atom, num_atoms;                              // in sorted order
  uint32_t first_slot, num_slots;
  bool hashed;           // more bins than slots: bins share slots
  int64_t segment_base;  // of its part of `hits` and `segments`, where they have room for it; else -1
  int64_t stencil;       // number of bins around a bin
};

// The slot of a bin in the table: one of its own, or one that it shares.
DIFFNL_HD inline uint32_t slot_of(const GpuSystem& system, int64_t key) {
  if (!system.hashed) return system.first_slot + static_cast<uint32_t>(key);
  const uint64_t mixed = (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15ull) >> 32;  // 2^64 / golden ratio
  return system.first_slot + static_cast<uint32_t>(mixed % system.num_slots);
}

// The atoms of a bin. Bins are the units of work of the search.
struct Bin {
  uint32_t first;  // in sorted order
  uint32_t size;
};

// An atom in sorted order: by system, slot, bin, number.
template <typename T>
struct alignas(16) SortedAtom {
  T x, y, z;
  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> index;  // the caller's number of the atom; leaves no gap
};

// The cell the atom was found in, modulo 2^32: only differences enter S. And its system.
struct alignas(16) SortedPlace {
  int32_t w0, w1, w2;
  uint32_t system;
};

// What the search tells the host, in memory that both see.
struct Summary {
  int64_t num_pairs;
  uint64_t fault;  // 0 or `pack_fault`
  uint32_t num_bins;
  uint32_t longest_row;
  uint32_t linkable;     // segments and shifts fit
  uint32_t must_search;  // of a selection: the candidates do not hold all pairs
  uint32_t jumped;       // of a selection: atoms have, since the candidates were searched
};

// Small state of a search on the device, zero at the start.
struct SearchState {
  unsigned long long fault;  // the first one, inverted: atomicMax keeps it
  unsigned long long num_counted;
  unsigned num_bins;
  uint32_t longest_row;
  unsigned unlinkable;       // segments or shifts do not fit a Link
  unsigned abandoned;        // more pairs than memory holds
  unsigned wrapped, binned;  // blocks that have done so
  unsigned interleaved;      // the atoms of systems are not in one piece each: found when rows are sorted
};

// What a list is of.
template <typename T>
struct GpuAtoms {
  const T* positions;         // (N, 3)
  const T* cell;              // (B, 3, 3)
  const bool* pbc;            // (B, 3), or (3,) with pbc_stride 0
  const int64_t* system_idx;  // (N,) or null
  int64_t pbc_stride;         // 3 or 0
  int64_t num_atoms;          // N
  int64_t num_systems;        // B
};

template <typename T>
struct GpuSearch : GpuAtoms<T> {
  int64_t num_slots;         // capacity of the table of bins
  int64_t segment_capacity;  // of `hits` and `segments`
  int64_t most_pairs;        // that memory could hold
  int64_t capacity;          // of a padded list; otherwise -1
  double cutoff;
  T cutoff2;
  bool full;
  SearchPrices prices;
  int64_t likely_bins;     // a guess of the number of bins, for as many blocks; 0: none
  const unsigned* needed;  // 0: nobody needs this search, which was launched before that was known; null: it is

  SearchState* state;
  GpuSystem* systems;        // (B,)
  uint32_t* slot_counts;     // (slots,)
  uint32_t* slot_starts;     // (slots + 1,) first atom of each, in sorted order
  Vec3<double>* q;           // (N,) wrapped fractional coordinates
  int32_t* w;                // (N, 3)
  int64_t* keys;             // (N,) bin keys
  uint32_t* slots;           // (N,)
  uint32_t* ranks;           // (N,) arrival in the slot
  uint32_t* unordered;       // (N,) atoms by slot
  int64_t* sorted_keys;      // (N,)
  SortedAtom<T>* atoms;      // (N,)
  SortedPlace* places;       // (N,)
  Bin* bins;                 // (N,) the occupied ones
  uint32_t* row_counts;      // (N,) by the caller's number
  uint32_t* placed;          // (N,) by sorted number: how much of the row is written
  uint32_t* hits;            // (stencil, n) for each system: see count_pairs_gpu.hip
  uint16_t* segments;        // likewise, or null without links
  uint64_t* partial_sums;    // of the scans
  int64_t* offsets;          // (N + 1,) row i is pairs offsets[i] .. offsets[i + 1]
  int64_t* order;            // (N,) the caller's numbers in sorted order, or null
  int64_t* first_of_system;  // (B + 1,) in that order, or null
  Summary* summary;          // host memory; of a padded list null
  int64_t* num_pairs;        // () of a padded list, as it is told in ops.cpp
};

// The list. Its arrays are packed for P pairs, whatever room they have. Links may stand alone.
template <typename T>
struct GpuPairs {
  int64_t* mapping;  // (2, P)
  int32_t* shifts;   // (P, 3)
  T* vectors;        // (P, 3), or null
  Link* links;       // (P,), or null; not written where the list cannot be linked
  int64_t num_pairs;
};

// Number of words `partial_sums` needs for a scan of `size` numbers.
int64_t partial_sums_for(int64_t size);

// Files the atoms into bins (cell_list_gpu.hip).
template <typename T>
void build_cell_list(const GpuSearch<T>& search, GpuStream stream);

// Exclusive sum of `counts` (size,) into `offsets` (size + 1,), which hold uint32_t or int64_t; `largest`, unless
// null, is raised to the largest count. Nothing happens where `needed` holds 0.
template <typename Offset>
void scan_counts(const uint32_t* counts, int64_t size, uint64_t* partial_sums, Offset* offsets, uint32_t* largest,
                 const unsigned* needed, GpuStream stream);

// Whether there is nothing to do: what was launched in advance must ask.
DIFFNL_HD inline bool is_idle(const unsigned* needed) { return needed != nullptr && *needed == 0; }

// Whether there is a list: what was launched without waiting for the number of pairs must ask.
template <typename T>
DIFFNL_HD inline bool has_failed(const GpuSearch<T>& s) {
  return s.capacity >= 0 && static_cast<uint64_t>(*s.num_pairs) > static_cast<uint64_t>(s.capacity);
}

// Counts all pairs and tells the host, or whoever reads the `num_pairs` of a padded list
// (count_pairs_gpu.hip).
template <typename T>
void count_pairs(const GpuSearch<T>& search, GpuStream stream);

// `wait_for_summary` waits for what this thread has launched until here, and for nothing behind it.
void mark_end_of_count(GpuStream stream);
void wait_for_summary();

// Waits for all of the stream; an error is somebody else's to tell.
void wait_quietly(GpuStream stream);

// Writes the pairs, in the order of the search.
template <typename T>
void fill_pairs(const GpuSearch<T>& search, uint32_t num_bins, const GpuPairs<T>& out, GpuStream stream);

// The same before the host knows how many there are: where they exceed `room`, or the search has failed, nothing
// is written. `num_pairs` of `out` does not matter, unless the list is padded and it is the room: then the rest is
// filled too, if `out` has vectors.
template <typename T>
void fill_pairs_if_they_fit(const GpuSearch<T>& search, int64_t room, const GpuPairs<T>& out, GpuStream stream);

// Fills what the pairs leave of a padded list, or all of it where it has failed, when its rows have been sorted.
template <typename T>
void pad_pairs(const GpuSearch<T>& search, const GpuPairs<T>& out, GpuStream stream);

// Puts each row in order of (j, S): `from` (which `pairs` may be, where no row is longer than kSortedInPlace)
// holds mapping and shifts; then writes vectors, and links if there are any.
constexpr int64_t kSortedInPlace = 1024;
template <typename T>
void sort_rows(const GpuSearch<T>& search, const GpuPairs<T>& from, const GpuPairs<T>& pairs, GpuStream stream);

// Number of pairs of type T that the current device's memory could hold.
template <typename T>
int64_t pairs_in_device_memory();

// Page-locked memory that the device can write, one for each thread; never freed.
Summary* summary_of_thread();

int64_t read_from_device(const int64_t* at, GpuStream stream);

// Sets every byte. Floating-point memory of kNanByte is NaN.
constexpr int kNanByte = 0xff;
void set_on_device(void* memory, int byte, int64_t bytes, GpuStream stream);

// ------------------------------------------------------------------------------ vectors and adjoint

// A list in one of its two forms: as the user sees it, or linked.
struct GpuPairList {
  const int64_t* mapping;     // (2, P), or null
  const int32_t* shifts;      // (P, 3), or null where no cell takes part
  const Link* links;          // (P,) of a linked list
  const int64_t* offsets;     // (N + 1,) of a linked list, the first is -1 if that has failed; otherwise null
  const int64_t* system_idx;  // (N,), or null: all atoms belong to system 0
  const int64_t* live;        // () number of pairs of a padded list without links; or null
  int64_t num_pairs, num_atoms, num_systems;
};

template <typename T>
void pair_vectors_gpu(const GpuPairList& list, const T* positions, const T* cell, T* vectors, GpuStream stream);

// What the adjoint of a list without links sums over: pairs sorted by i and by j, both stable.
struct SortedEnds {
  const int32_t* i_sorted;  // (P,) -1 first: pairs out of range
  const int64_t* i_pair;    // (P,)
  const int32_t* j_sorted;
  const int64_t* j_pair;
};

// The order in which the rows are summed: grouped by system.
struct RowOrder {
  const int64_t* rows;             // (N,), or null: 0 .. N - 1
  const int64_t* first_of_system;  // (B + 1,), or null: one system
};

template <typename T>
struct AdjointOutput {
  T* grad_positions;     // (N, 3) or null
  T* grad_cell;          // (B, 3, 3) or null
  double* partial_cell;  // (chunks, 9)
};

int64_t adjoint_chunks(int64_t num_atoms, int64_t num_systems);

template <typename T>
void adjoint_gpu(const GpuPairList& list, const SortedEnds& ends, const RowOrder& order, const T* grad,
                 const AdjointOutput<T>& out, GpuStream stream);

// Row 0 or 1 of mapping as int32, -1 where a pair is out of range.
void pair_ends_gpu(const GpuPairList& list, int row, int32_t* ends, GpuStream stream);

// first[b] = number of entries of `sorted` (N,) below b, for b = 0 .. B.
void first_of_each_gpu(const int64_t* sorted, int64_t size, int64_t num_systems, int64_t* first, GpuStream stream);

}  // namespace diffnl
