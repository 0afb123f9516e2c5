// The traversal that counting and filling share: every bin's atoms against every candidate around.
//
// A block takes a bin. Its home atoms, at most 32 at once, lie in shared memory; each thread holds one candidate
// from the stencil of bins around and tests it against all of them. The outcome is a word with a bit for each home
// atom:
//
//                    home atoms
//                  0 1 2 3 4 ...
//     candidate 0  . x . . x
//               1  x x . . .
//               2  . . . . x
//
// A column of this bit matrix is a part of a row of the list. A line says which neighbours a candidate c has in
// this bin, and by symmetry that is also how many pairs (c, home) there are.
#pragma once

#include <type_traits>

#include "gpu.h"
#include "neighbors_gpu.h"

namespace diffnl {

namespace {

constexpr int kSearchThreads = 128;
constexpr int kTile = 768;  // candidates at once: 27 bins of 28 atoms; a multiple of kSearchThreads
constexpr int kHome = 32;   // home atoms at once: the bits of a word
constexpr int kThreadsOfBin = 4;
constexpr int kTestsAtOnce = 4;

// Where bins are too few to keep a device busy, several blocks share each: they split its candidates to count, and
// its home atoms to fill. The results are the same.
constexpr uint32_t kBusyBlocks = 1024;
constexpr uint32_t kMostShares = kTile / kSearchThreads;
DIFFNL_HD inline uint32_t shares_of_bins(uint32_t num_bins) {
  const uint32_t shares = num_bins == 0 ? 1 : kBusyBlocks / num_bins;
  return shares < 1 ? 1 : shares > kMostShares ? kMostShares : shares;
}

// One of the shares of a bin: of what is numbered below 32, every so manieth.
struct Share {
  uint32_t owned;  // bit n: this block's

  __device__ Share(uint32_t number, uint32_t shares) : owned(1u << number) {
    for (uint32_t known = shares; known < 32; known *= 2) owned |= owned << known;
  }
  __device__ bool owns(int n) const { return (owned >> n & 1) != 0; }
};

// What a block shares about the bin it works on.
template <typename T>
struct Home {
  SortedAtom<T> atom[kHome];
  int32_t w[kHome][3];
  T h[9];
  uint32_t first, size;  // the bin
  int64_t bin[3];
  uint32_t system, first_of_system, atoms_of_system;
  int64_t segment_base, stencil;
  uint32_t changes;  // bit a: the home atom a was found in another cell than a - 1
  bool abandoned;
};

// The bins of the stencil, kSearchThreads at once, and the atoms in them, kTile at once.
struct Candidates {
  uint32_t first[kSearchThreads];    // first atom of the bin
  uint32_t size[kSearchThreads];     // number of its atoms
  uint32_t before[kSearchThreads];   // candidates in the bins before it
  int32_t image[kSearchThreads][3];  // m
  bool is_home[kSearchThreads];      // m = 0: a home atom may meet itself
  uint32_t atom[kTile];
  uint8_t bin[kTile];
  uint32_t hits[kTile];  // bit a: neighbour of home atom a
  uint32_t rank[kTile];  // pairs of the candidate's row before those with the home atoms at hand
};

// Candidates by the thousand are cheap to skip, images by the million are not: bins further from the home bin than
// the cutoff hold no neighbours.
__device__ inline bool out_of_reach(const GpuSystem& s, int64_t dx, int64_t dy, int64_t dz) {
  const double x = static_cast<double>(dx) * s.grid.units_per_bin[0];
  const double y = static_cast<double>(dy) * s.grid.units_per_bin[1];
  const double z = static_cast<double>(dz) * s.grid.units_per_bin[2];
  double squared = 0.0;
  for (int c = 0; c < 3; ++c) {
    const double o = cell_translation(x, y, z, s.cell.h, c);
    squared += o * o;
  }
  const double ball = (s.grid.radius + s.grid.bin_diagonal) * (1.0 + 1e-9);
  return squared > ball * ball;
}

struct AtomSpan {
  uint32_t first, last;
};

// The atoms of the n-th bin of the stencil around `home`, and the image m that they are taken from.
template <typename T>
__device__ inline AtomSpan stencil_bin(const GpuSearch<T>& s, const GpuSystem& system, const int64_t* home,
                                       int64_t n, int32_t* image) {
  int64_t bin[3], d[3];
  for (int k = 2; k >= 0; --k) {
    const int64_t reach = system.grid.axis[k].reach, across = 2 * reach + 1;
    // Division of 64 bits is slow, and the stencil hardly ever needs it.
    const int64_t rest = n <= INT32_MAX && across <= INT32_MAX
                             ? static_cast<int64_t>(static_cast<uint32_t>(n) / static_cast<uint32_t>(across))
                             : n / across;
    d[k] = n - rest * across - reach;
    n = rest;
  }
  for (int k = 0; k < 3; ++k) {
    const int64_t u = home[k] + d[k], bins = system.grid.axis[k].bins;
    const int64_t m = u >= -bins && u < 2 * bins ? (u >= bins) - (u < 0) : floor_div(u, bins);
    if (m != 0 && !system.cell.periodic[k]) return {0, 0};
    image[k] = static_cast<int32_t>(m);
    bin[k] = u - m * bins;
  }
  if (system.stencil > 27 && out_of_reach(system, d[0], d[1], d[2])) return {0, 0};
  const int64_t key = bin_key(system.grid, bin[0], bin[1], bin[2]);
  const uint32_t slot = slot_of(system, key);
  AtomSpan span{s.slot_starts[slot], s.slot_starts[slot + 1]};
  if (system.hashed) {
    while (span.first < span.last && s.sorted_keys[span.first] != key) ++span.first;
    uint32_t last = span.first;
    while (last < span.last && s.sorted_keys[last] == key) ++last;
    span.last = last;
  }
  return span;
}

// W may be anything modulo 2^32, the differences are small.
__device__ inline int32_t difference(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}
__device__ inline int32_t sum(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

__device__ inline int lowest_bit(uint32_t bits) { return __popc((bits & (0u - bits)) - 1); }

// What memory says of a candidate. Nothing is computed when it is loaded, so that the next one can be on its way
// while this one is in use.
template <typename T>
struct Candidate {
  SortedAtom<T> atom;
  SortedPlace place;
  int bin;  // of those at hand

  __device__ Vec3<T> r() const { return {atom.x, atom.y, atom.z}; }
  __device__ uint32_t index() const { return static_cast<uint32_t>(atom.index); }
};

template <typename T>
__device__ inline Candidate<T> load_candidate(const GpuSearch<T>& s, const Candidates& near, int t) {
  const uint32_t c = near.atom[t];
  return {s.atoms[c], s.places[c], near.bin[t]};
}

// S = m - W_j + W_i, one axis each.
template <typename T>
__device__ inline Shift shift_between(const Home<T>& home, int a, const Candidates& near, const Candidate<T>& j) {
  const int32_t *m = near.image[j.bin], *w = home.w[a];
  return {sum(difference(m[0], j.place.w0), w[0]), sum(difference(m[1], j.place.w1), w[1]),
          sum(difference(m[2], j.place.w2), w[2])};
}

// S @ h for home atom a and a candidate.
template <typename T>
__device__ inline Vec3<T> translation_of(const Home<T>& home, int a, const Candidates& near,
                                         const Candidate<T>& j) {
  const Shift S = shift_between(home, a, near, j);
  return translation(home.h, static_cast<T>(S.s0), static_cast<T>(S.s1), static_cast<T>(S.s2));
}

// Bit a: the candidate, seen from home atom a, passes the test. Behind the last home atom are NaNs, which pass
// nothing.
template <typename T>
__device__ inline uint32_t test_candidate(const Home<T>& home, int count, const Candidates& near,
                                          const Candidate<T>& j, T cutoff2) {
  Vec3<T> t = translation_of(home, 0, near, j);
  const uint32_t changes = home.changes;
  const auto test_all = [&](auto same_cell) {
    uint32_t hits = 0;
    for (int a0 = 0; a0 < count; a0 += kTestsAtOnce) {
      uint32_t group = 0;
      DIFFNL_UNROLL(kTestsAtOnce)
      for (int u = 0; u < kTestsAtOnce; ++u) {
        if (!same_cell() && (changes >> (a0 + u) & 1) != 0) t = translation_of(home, a0 + u, near, j);
        const SortedAtom<T> i = home.atom[a0 + u];
        const T d2 = squared_length(pair_vector<T>({i.x, i.y, i.z}, j.r(), t));
        if (d2 < cutoff2) group |= 1u << u;
      }
      hits |= group << a0;
    }
    return hits;
  };
  return changes == 0 ? test_all(std::true_type()) : test_all(std::false_type());
}

// Of the pairs (home atom a, candidate) those that a half list keeps.
template <typename T>
__device__ inline uint32_t kept_in_half(const Home<T>& home, uint32_t hits, const Candidates& near,
                                        const Candidate<T>& j) {
  uint32_t kept = 0;
  for (uint32_t left = hits; left != 0; left &= left - 1) {
    const int a = lowest_bit(left);
    const Shift S = shift_between(home, a, near, j);
    const bool keep = in_half(static_cast<int64_t>(home.atom[a].index), j.index(), S.s0, S.s1, S.s2);
    kept |= static_cast<uint32_t>(keep) << a;
  }
  return kept;
}

// Where candidate t of the tile keeps what it knows of the home bin, which is as far from it as it is from the
// home bin, in the opposite direction. Bin 0 at hand is bin n0 of the home bin's stencil.
template <typename T>
__device__ inline int64_t segment_of(const Home<T>& home, const Candidates& near, int t, int64_t n0) {
  const int64_t opposite = home.stencil - 1 - (n0 + near.bin[t]);
  return home.segment_base + opposite * int64_t(home.atoms_of_system) + (near.atom[t] - home.first_of_system);
}

// The hits of candidate t of the tile by the exact test.
template <typename T>
__device__ inline uint32_t find_hits(const GpuSearch<T>& s, const Home<T>& home, const Candidates& near, int t,
                                     uint32_t first_home, int count) {
  const Candidate<T> j = load_candidate(s, near, t);
  uint32_t hits = test_candidate(home, count, near, j, s.cutoff2);
  // (i, i, S = 0) is no pair.
  const uint32_t own = near.atom[t] - (home.first + first_home);
  if (near.is_home[near.bin[t]] && own < static_cast<uint32_t>(count)) hits &= ~(1u << own);
  return hits;
}

// Thread 0 reads what the block shares about its bin.
template <typename T>
__device__ inline void enter_bin(const GpuSearch<T>& s, Bin bin, Home<T>& home) {
  __syncthreads();
  if (threadIdx.x == 0) {
    home.first = bin.first;
    home.size = bin.size;
    home.system = s.places[bin.first].system;
    const GpuSystem& system = s.systems[home.system];
    const int64_t key = s.sorted_keys[bin.first], ny = system.grid.axis[1].bins, nz = system.grid.axis[2].bins;
    const int64_t column = key / nz;
    home.bin[0] = column / ny;
    home.bin[1] = column - home.bin[0] * ny;
    home.bin[2] = key - column * nz;
    home.first_of_system = system.first_atom;
    home.atoms_of_system = system.num_atoms;
    home.segment_base = system.segment_base;
    home.stencil = system.stencil;
    home.abandoned = false;
  }
  __syncthreads();
  if (threadIdx.x < 9) home.h[threadIdx.x] = s.cell[9 * int64_t(home.system) + threadIdx.x];
}

// Lists candidates begin .. begin + size of the bins at hand: a few threads copy the atoms of each bin.
__device__ inline void list_candidates(Candidates& near, int bins, uint32_t begin, uint32_t size) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int n = thread / kThreadsOfBin; n < bins; n += kSearchThreads / kThreadsOfBin) {
    const uint32_t first = std::max(near.before[n], begin);
    const uint32_t last = std::min(near.before[n] + near.size[n], begin + size);
    for (uint32_t k = first + thread % kThreadsOfBin; k < last; k += kThreadsOfBin) {
      near.bin[k - begin] = static_cast<uint8_t>(n);
      near.atom[k - begin] = near.first[n] + (k - near.before[n]);
    }
  }
}

// The home atoms first_home .. first_home + count, one a thread.
template <typename T>
__device__ inline void load_home(const GpuSearch<T>& s, Home<T>& home, uint32_t first_home, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) home.changes = 0;
  __syncthreads();
  if (thread >= kHome) return;
  if (thread >= count) {
    home.atom[thread].x = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  const uint32_t a = home.first + first_home + thread;
  const SortedPlace place = s.places[a], previous = s.places[thread > 0 ? a - 1 : a];
  home.atom[thread] = s.atoms[a];
  home.w[thread][0] = place.w0;
  home.w[thread][1] = place.w1;
  home.w[thread][2] = place.w2;
  if (place.w0 != previous.w0 || place.w1 != previous.w1 || place.w2 != previous.w2)
    atomicAdd(&home.changes, 1u << thread);
}

// All candidates of one bin, tile by tile and home atoms by home atoms, into the sink:
//   begin(size, n0)                     a tile of candidates is there; bin 0 at hand is bin n0 of the stencil
//   enter(a, sorted)                    thread a has loaded home atom a
//   take(t, size, first_home, count)    finds its hits among the home atoms at hand; lanes with t >= size come too
//   write(first_home, count, size)      by the whole block, when all candidates of the tile were taken
//   end(size, n0)                       all home atoms have seen the tile
//   too_many()                          whether to give up; asked where a bin may find pairs without end
template <typename T, typename Sink>
__device__ inline void traverse_bin(const GpuSearch<T>& s, Bin bin, Home<T>& home, Candidates& near, Sink& sink) {
  const int thread = static_cast<int>(threadIdx.x);
  enter_bin(s, bin, home);
  const GpuSystem& system = s.systems[home.system];
  const int64_t stencil = system.stencil;
  const bool crowded = stencil > kSearchThreads || home.size > 4 * kHome;
  for (int64_t n0 = 0; n0 < stencil; n0 += kSearchThreads) {
    AtomSpan span{0, 0};
    int32_t* m = near.image[thread];
    if (n0 + thread < stencil) span = stencil_bin(s, system, home.bin, n0 + thread, m);
    near.is_home[thread] = span.first < span.last && m[0] == 0 && m[1] == 0 && m[2] == 0;
    near.first[thread] = span.first;
    near.size[thread] = span.last - span.first;
    unsigned num_candidates;
    near.before[thread] = block_exclusive_sum<kSearchThreads>(span.last - span.first, num_candidates);
    __syncthreads();
    const int bins = static_cast<int>(std::min(stencil - n0, int64_t(kSearchThreads)));
    for (uint32_t begin = 0; begin < num_candidates; begin += kTile) {
      const int size = static_cast<int>(std::min(num_candidates - begin, static_cast<uint32_t>(kTile)));
      list_candidates(near, bins, begin, size);
      __syncthreads();
      sink.begin(size, n0);
      for (uint32_t first_home = 0; first_home < home.size; first_home += kHome) {
        const int count = static_cast<int>(std::min(home.size - first_home, static_cast<uint32_t>(kHome)));
        load_home(s, home, first_home, count);
        if (thread < count) sink.enter(thread, home.first + first_home + thread);
        __syncthreads();
        for (int t0 = 0; t0 < size; t0 += kSearchThreads) sink.take(t0 + thread, size, first_home, count);
        sink.write(first_home, count, size);
        __syncthreads();
      }
      sink.end(size, n0);
      if (crowded && sink.too_many()) return;
      __syncthreads();
    }
    __syncthreads();
  }
}

// The words of a bin are kept where there is room for them and one word holds all its home atoms.
template <typename T>
__device__ inline bool keeps_hits(const Home<T>& home) {
  return home.segment_base >= 0 && home.size <= kHome;
}

template <typename T>
__device__ inline bool is_linkable(const GpuSearch<T>& s) {
  return s.state->unlinkable == 0 && s.state->longest_row < Link::kLongestRow;
}

inline int current_device() {
  int device = 0;
  check_call(hipGetDevice(&device), "hipGetDevice");
  return device;
}

inline int num_multiprocessors() {
  int count = 0;
  check_call(hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, current_device()),
             "hipDeviceGetAttribute");
  return count;
}

// Blocks for kernels that take bins in turns, where the host does not know the number of bins: as many as are
// likely needed, but not more than fill the device.
template <typename T>
int64_t blocks_for_bins(const GpuSearch<T>& s) {
  const int64_t bins = s.likely_bins > 0 ? std::min(s.likely_bins, s.num_atoms) : s.num_atoms;
  const int64_t shares = s.likely_bins > 0 ? shares_of_bins(static_cast<uint32_t>(bins)) : kMostShares;
  return blocks_in_turns(std::min<int64_t>(bins * shares, int64_t(num_multiprocessors()) * 32), 1, kSearchThreads);
}

}  // namespace

}  // namespace diffnl
