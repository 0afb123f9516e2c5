// A list that is selected from candidates, on a GPU: whether they hold all pairs (drift.h), which of them are
// pairs by the exact test, and how they are made.
//
//   ask -> [search -> sort links -> keep] -> count -> fill
//
// With a capacity nobody on the host learns the answer: the search is launched in any case, and idle if it is not
// needed. Otherwise `count` tells the host, which searches if it must.

#include "candidates_gpu.h"
#include "gpu.h"
#include "padding_gpu.h"

namespace diffnl {

namespace {

constexpr uint16_t kNoPair = 0xffffu;  // no rank: rows of links are shorter
constexpr int kReadAhead = 3;          // candidates of a lane that are read before the first is used
constexpr int kWavesOfBlock = kThreads / kNarrowestWave;

// ------------------------------------------------------------------------------------------------ asking

template <typename T>
__device__ inline bool has_candidates(const GpuSelection<T>& s) {
  const GpuCandidates<T>& kept = s.kept;
  return kept.num_candidates == nullptr ||
         static_cast<uint64_t>(*kept.num_candidates) <= static_cast<uint64_t>(kept.room);
}

template <typename T>
__device__ inline void make_drift_of(const GpuSelection<T>& s, int64_t b) {
  GpuDrift& drift = s.drifts[b];
  drift.moved2 = drift.spread = ordered_bits(0.0);
  const bool *now = s.pbc + b * s.pbc_stride, *then = s.kept.pbc + b * s.pbc_stride;
  const bool same = has_candidates(s) && now[0] == then[0] && now[1] == then[1] && now[2] == then[2];
  if (same && make_drift(s.kept.cell + 9 * b, s.cell + 9 * b, now, drift.drift)) {
    int64_t i = 0;
    if (s.num_systems > 1) {
      const int64_t first = s.kept.first_of_system[b], last = s.kept.first_of_system[b + 1];
      if (first < last) i = s.kept.order[first];
    }
    set_origin(drift.drift, s.kept.positions + 3 * i, s.positions + 3 * i);
    return;
  }
  atomicMax(&s.state->unknown, 1u);
  atomicMax(&s.state->must_search, 1u);
}

__device__ inline void widen(GpuDrift& drift, double moved2, double spread) {
  const uint64_t seen_moved2 = look_at(drift.moved2), seen_spread = look_at(drift.spread);
  raise_to(&drift.moved2, seen_moved2, moved2);
  raise_to(&drift.spread, seen_spread, spread);
}

// Atoms first, first + step, ...: once for a wave, where all its atoms are in one system. All threads of a wave
// call it.
template <typename T>
__device__ inline void measure_moves(const GpuSelection<T>& s, int64_t first, int64_t step) {
  int64_t current = -1;
  double most2 = 0.0, spread = 0.0;
  bool known = true, jumped = false;
  for (int64_t i = first; i < s.num_atoms; i += step) {
    const int64_t b = s.system_idx == nullptr ? 0 : s.system_idx[i];
    if (s.system_idx != nullptr && b != s.kept.system_idx[i]) {
      known = false;
      continue;
    }
    if (b != current && current >= 0) {
      widen(s.drifts[current], most2, spread);
      most2 = spread = 0.0;
    }
    current = b;
    const Drift& drift = s.drifts[b].drift;
    const T *from = s.kept.positions + 3 * i, *to = s.positions + 3 * i;
    Jump jump;
    const double moved2 = squared_move(drift, from, to, jump);
    if (jump.any()) {
      s.jumps[i] = jump;
      jumped = true;
    }
    known = known && std::isfinite(moved2);  // max would lose a NaN
    most2 = std::max(most2, moved2);
    spread = std::max(spread, distance_from_origin(drift, from, to));
  }
  if (!known) atomicMax(&s.state->must_search, 1u);
  if (jumped) atomicMax(&s.state->jumped, 1u);
  const int64_t of_wave = lane_value(current, 0);
  const bool alike = wave_ballot(current == of_wave || current < 0) == wave_ballot(true);
  if (alike && of_wave >= 0) {
    most2 = max_over_wave(most2);
    spread = max_over_wave(spread);
  }
  if (current < 0 || (alike && lane_of_thread() != 0)) return;
  widen(s.drifts[current], most2, spread);
}

template <typename T>
__device__ inline void judge(const GpuSelection<T>& s, int64_t b) {
  const GpuDrift& drift = s.drifts[b];
  const double moved2 = from_ordered_bits(look_at(drift.moved2)),
               spread = from_ordered_bits(look_at(drift.spread));
  if (!(margin<T>(drift.drift, moved2, spread, s.cutoff, s.radius) >= 0.0)) atomicMax(&s.state->must_search, 1u);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void make_drifts(GpuSelection<T> s) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b < s.num_systems) make_drift_of(s, b);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void measure_and_judge(GpuSelection<T> s) {
  if (s.state->unknown != 0) return;
  measure_moves(s, int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads);
  if (!is_last_block(&s.state->measured)) return;
  for (int64_t b = threadIdx.x; b < s.num_systems; b += kThreads) judge(s, b);
}

template <typename T>
__global__ __launch_bounds__(kSmallThreads) void ask_small(GpuSelection<T> s) {
  for (int64_t b = threadIdx.x; b < s.num_systems; b += kSmallThreads) make_drift_of(s, b);
  __syncthreads();
  if (s.state->unknown != 0) return;
  measure_moves(s, threadIdx.x, kSmallThreads);
  __syncthreads();
  for (int64_t b = threadIdx.x; b < s.num_systems; b += kSmallThreads) judge(s, b);
}

// --------------------------------------------------------------------------------------------- selecting

__device__ inline int count_bits(uint64_t bits) {
  return __popc(static_cast<uint32_t>(bits)) + __popc(static_cast<uint32_t>(bits >> 32));
}

__device__ inline uint64_t bits_below(int lane) { return (uint64_t(1) << lane) - 1; }

// Whether the candidates are of atoms that have jumped since.
template <typename T>
__device__ inline bool has_jumped(const GpuSelection<T>& s) {
  return s.state->jumped != 0 && s.state->must_search == 0;
}

// One atom's row of candidates, by a wave. `kJumped`: as they are after jumps.
template <typename T, bool kJumped>
struct CandidateRow {
  int64_t i, first, last;
  Vec3<T> ri;
  const T* h;
  Jump jump;

  __device__ CandidateRow(const GpuSelection<T>& s, int64_t row)
      : i(row),
        first(s.kept.offsets[row]),
        last(s.kept.offsets[row + 1]),
        ri(load_triple(s.positions + 3 * row)),
        h(s.cell + 9 * (s.system_idx == nullptr ? 0 : s.system_idx[row])) {
    if (kJumped) jump = s.jumps[row];
  }

  __device__ Shift shift(const GpuSelection<T>& s, Link link) const {
    Shift found{link.shift(0), link.shift(1), link.shift(2)};
    if (kJumped) {
      const Jump other = s.jumps[link.j()];
      found = {found.s0 + jump.n[0] - other.n[0], found.s1 + jump.n[1] - other.n[1],
               found.s2 + jump.n[2] - other.n[2]};
    }
    return found;
  }

  __device__ Vec3<T> vector(const GpuSelection<T>& s, Link link, Shift of_link) const {
    const Vec3<T> t =
        translation(h, static_cast<T>(of_link.s0), static_cast<T>(of_link.s1), static_cast<T>(of_link.s2));
    return pair_vector<T>(ri, load_triple(s.positions + 3 * int64_t(link.j())), t);
  }
};

// Ranks the pairs of a row among themselves; returns how many there are.
template <typename T, bool kJumped>
__device__ inline uint32_t choose_in_row(const GpuSelection<T>& s, const CandidateRow<T, kJumped>& row) {
  const int lane = lane_of_thread(), width = wave_width();
  uint32_t count = 0;
  for (int64_t p0 = row.first + lane; p0 - lane < row.last; p0 += kReadAhead * width) {
    Link links[kReadAhead];
    Shift shifts[kReadAhead];
    Vec3<T> v[kReadAhead];
    DIFFNL_UNROLL(kReadAhead)
    for (int u = 0; u < kReadAhead; ++u)
      links[u].bits = p0 + u * width < row.last ? s.kept.links[p0 + u * width].bits : 0;
    DIFFNL_UNROLL(kReadAhead)
    for (int u = 0; u < kReadAhead; ++u) {
      shifts[u] = row.shift(s, links[u]);
      v[u] = row.vector(s, links[u], shifts[u]);
    }
    DIFFNL_UNROLL(kReadAhead)
    for (int u = 0; u < kReadAhead; ++u) {
      const int64_t p = p0 + u * width;
      bool chosen = p < row.last && squared_length(v[u]) < s.cutoff2;
      if (!s.full && chosen)
        chosen = in_half(row.i, int64_t(links[u].j()), shifts[u].s0, shifts[u].s1, shifts[u].s2);
      if (kJumped && chosen && !shifts[u].fits_link()) atomicMax(&s.state->unlinkable, 1u);
      const uint64_t votes = wave_ballot(chosen);
      if (p < row.last)
        s.ranks[p] = chosen ? static_cast<uint16_t>(count + count_bits(votes & bits_below(lane))) : kNoPair;
      count += count_bits(votes);
    }
  }
  return count;
}

// By one thread, when the rows have been counted.
template <typename T>
__device__ inline void tell(const GpuSelection<T>& s) {
  if (s.capacity < 0) {
    s.summary->num_pairs = s.offsets[s.num_atoms];
    s.summary->must_search = s.state->must_search != 0 || s.state->unlinkable != 0;
    s.summary->jumped = s.state->jumped;
    __threadfence_system();
    return;
  }
  int64_t count = s.offsets[s.num_atoms];
  if (!has_candidates(s)) {
    // Too many candidates for their room are told as the capacity that would have made enough.
    const int64_t found = *s.kept.num_candidates;
    const double room = static_cast<double>(s.kept.room), needed = static_cast<double>(found) * s.capacity / room;
    count = found < 0 ? found : std::max(static_cast<int64_t>(std::ceil(needed)), s.capacity + 1);
  } else if (s.state->unlinkable != 0 && count <= s.capacity) {
    count = -static_cast<int64_t>(pack_fault(Fault::not_linkable, 0));  // as a search would find
  }
  *s.num_pairs = count;
  if (static_cast<uint64_t>(count) > static_cast<uint64_t>(s.capacity)) s.offsets[0] = -1;
}

// Calls `run` with each row of this wave. The grid is laid out for the narrowest waves.
template <bool kJumped, typename T, typename Run>
__device__ inline void for_each_row(const GpuSelection<T>& s, const Run& run) {
  const int64_t waves = kThreads / wave_width();
  for (int64_t i = blockIdx.x * waves + wave_of_thread(); i < s.num_atoms; i += gridDim.x * waves)
    run(CandidateRow<T, kJumped>(s, i));
}

// A wave a row. If rows are few, the last block finds where they begin in the list.
template <typename T>
__global__ __launch_bounds__(kThreads) void count_rows(GpuSelection<T> s, bool few_rows) {
  const auto choose = [&](const auto& row) {
    const uint32_t count = choose_in_row(s, row);
    if (lane_of_thread() == 0) s.row_counts[row.i] = count;
  };
  if (has_candidates(s) && (s.capacity >= 0 || s.state->must_search == 0)) {
    if (has_jumped(s))
      for_each_row<true>(s, choose);
    else
      for_each_row<false>(s, choose);
  }
  if (!few_rows || !is_last_block(&s.state->counted)) return;
  scan_by_one_block<kThreads>(s.row_counts, s.num_atoms, s.offsets);
  if (threadIdx.x == 0) tell(s);
}

template <typename T>
__global__ void tell_count(GpuSelection<T> s) {
  tell(s);
}

template <typename T, bool kJumped>
__device__ inline void write_row(const GpuSelection<T>& s, const CandidateRow<T, kJumped>& row,
                                 const GpuPairs<T>& out, T* stage) {
  const int lane = lane_of_thread(), width = wave_width();
  int64_t to = s.offsets[row.i];
  for (int64_t p0 = row.first; p0 < row.last; p0 += width) {
    const int64_t p = p0 + lane;
    const uint32_t rank = p < row.last ? s.ranks[p] : kNoPair;
    const bool chosen = rank != kNoPair;
    const uint64_t votes = wave_ballot(chosen);
    const int count = count_bits(votes), below = count_bits(votes & bits_below(lane));
    Shift shift{0, 0, 0};
    Vec3<T> v{0, 0, 0};
    if (chosen) {
      const Link link = s.kept.links[p];
      shift = row.shift(s, link);
      v = row.vector(s, link, shift);
      out.mapping[to + below] = row.i;
      out.mapping[out.num_pairs + to + below] = link.j();
      if (out.links != nullptr) {
        const int64_t reverse = s.kept.offsets[link.j()] + link.rank();
        out.links[to + below] = Link::make(link.j(), s.ranks[reverse], shift.s0, shift.s1, shift.s2);
      }
    }
    // Unselected candidates follow the selected ones.
    const int place = chosen ? below : count + lane - below;
    store_triples_at(out.shifts + 3 * to, place, count, shift.s0, shift.s1, shift.s2,
                     reinterpret_cast<int32_t*>(stage));
    store_triples_at(out.vectors + 3 * to, place, count, v.x, v.y, v.z, stage);
    to += count;
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void fill_rows(GpuSelection<T> s, GpuPairs<T> out) {
  __shared__ T stages[3 * kThreads];
  if (s.capacity >= 0) {
    const Padding padding{s.num_pairs, s.capacity, s.num_atoms, s.cutoff};
    pad_slots(padding, out);
    if (padding.has_failed()) return;
  }
  T* stage = stages + 3 * wave_of_thread() * wave_width();
  const auto write = [&](const auto& row) { write_row(s, row, out, stage); };
  if (has_jumped(s))
    for_each_row<true>(s, write);
  else
    for_each_row<false>(s, write);
  if (s.order == nullptr) return;
  const int64_t n = s.num_atoms, b = s.num_systems + 1, step = int64_t(gridDim.x) * kThreads;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < std::max(n, b); k += step) {
    if (k < n) s.order[k] = s.kept.order[k];
    if (k < b) s.first_of_system[k] = s.kept.first_of_system[k];
  }
}

// ----------------------------------------------------------------------------------------------- keeping

// (j, S) as a number in the order of sorted rows.
__device__ inline uint64_t row_key(uint32_t j, int32_t s0, int32_t s1, int32_t s2) {
  constexpr int bits = Link::kShiftBits, half = 1 << (bits - 1);
  return ((uint64_t(j) << bits | static_cast<uint32_t>(s0 + half)) << bits | static_cast<uint32_t>(s1 + half))
             << bits |
         static_cast<uint32_t>(s2 + half);
}

__device__ inline uint64_t row_key(Link link) {
  return row_key(link.j(), link.shift(0), link.shift(1), link.shift(2));
}

template <typename T>
__device__ inline bool has_links(const GpuSearch<T>& s) {
  return !is_idle(s.needed) && !has_failed(s);
}

// A block a row: each link counts the smaller ones. Also looks for systems whose atoms do not lie together.
template <typename T>
__global__ __launch_bounds__(kThreads) void sort_links(GpuSearch<T> s, const Link* from, Link* to) {
  __shared__ uint64_t keys[kSortedInPlace];
  const int thread = static_cast<int>(threadIdx.x);
  if (!has_links(s)) return;
  for (int64_t i = blockIdx.x; i < s.num_atoms; i += gridDim.x) {
    if (thread == 0 && s.system_idx != nullptr && i > 0 && s.system_idx[i - 1] > s.system_idx[i])
      atomicMax(&s.state->interleaved, 1u);
    const int64_t first = s.offsets[i], length = s.offsets[i + 1] - first;
    for (int64_t e0 = 0; e0 < length; e0 += kThreads) {
      const int64_t e = e0 + thread;
      const Link own{e < length ? from[first + e].bits : 0};
      const uint64_t key = row_key(own);
      int64_t smaller = 0;
      for (int64_t begin = 0; begin < length; begin += kSortedInPlace) {
        const int64_t size = std::min(length - begin, int64_t(kSortedInPlace));
        if (e0 == 0 || length > kSortedInPlace) {
          __syncthreads();
          for (int64_t k = thread; k < size; k += kThreads) keys[k] = row_key(from[first + begin + k]);
          __syncthreads();
        }
        for (int64_t k = 0; k < size; ++k) smaller += keys[k] < key;
      }
      if (e < length) to[first + smaller] = own;
    }
    __syncthreads();
  }
}

// Finds where the reverse of each link of row i stands, by bisection in its sorted row.
template <typename T>
__device__ inline void rank_row(const GpuSearch<T>& s, int64_t i, Link* links) {
  for (int64_t p = s.offsets[i] + lane_of_thread(); p < s.offsets[i + 1]; p += wave_width()) {
    const Link link = links[p];
    const int32_t s0 = link.shift(0), s1 = link.shift(1), s2 = link.shift(2);
    const uint64_t reverse = row_key(static_cast<uint32_t>(i), -s0, -s1, -s2);
    const int64_t first = s.offsets[link.j()];
    int64_t low = first, high = s.offsets[int64_t(link.j()) + 1];
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (row_key(links[middle]) < reverse)
        low = middle + 1;
      else
        high = middle;
    }
    links[p] = Link::make(link.j(), static_cast<uint32_t>(low - first), s0, s1, s2);
  }
}

// The place of atom i among the atoms of all systems, in ascending order of (system, atom): the order in which
// gradients are summed must not depend on when the list was searched.
template <typename T>
__device__ inline int64_t place_by_system(const GpuSearch<T>& s, int64_t i) {
  if (s.state->interleaved == 0) return i;
  const int64_t b = s.system_idx[i], first = s.first_of_system[b], last = s.first_of_system[b + 1];
  int before = 0;
  for (int64_t t = first + lane_of_thread(); t < last; t += wave_width()) before += s.order[t] < i;
  for (int mask = 1; mask < wave_width(); mask *= 2) before += lane_xor(before, mask, wave_width());
  return first + before;
}

template <typename T>
__global__ __launch_bounds__(kThreads) void keep_search(GpuSearch<T> s, GpuCandidates<T> kept) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  if (thread == 0 && kept.tally != nullptr) atomicAdd(kept.tally + (is_idle(s.needed) ? 1 : 0), 1ull);
  if (!has_links(s)) return;
  const int64_t waves = kThreads / wave_width();
  for (int64_t i = blockIdx.x * waves + wave_of_thread(); i < s.num_atoms; i += gridDim.x * waves) {
    rank_row(s, i, kept.links);
    const int64_t place = place_by_system(s, i);
    if (lane_of_thread() == 0) kept.order[place] = i;
  }
  if (kept.positions == nullptr) return;
  for (int64_t k = thread; k < 3 * s.num_atoms; k += step) kept.positions[k] = s.positions[k];
  for (int64_t k = thread; k < 9 * s.num_systems; k += step) kept.cell[k] = s.cell[k];
  for (int64_t k = thread; k < (s.pbc_stride == 0 ? 3 : 3 * s.num_systems); k += step) kept.pbc[k] = s.pbc[k];
  if (kept.system_idx != nullptr)
    for (int64_t k = thread; k < s.num_atoms; k += step) kept.system_idx[k] = s.system_idx[k];
}

}  // namespace

template <typename T>
void ask_candidates(const GpuSelection<T>& s, GpuStream stream) {
  if (s.num_atoms <= kSmall && s.num_systems <= kSmall) {
    DIFFNL_LAUNCH(ask_small<T>, 1, kSmallThreads, stream, s);
    return;
  }
  DIFFNL_LAUNCH(make_drifts<T>, blocks_for(s.num_systems, kThreads), kThreads, stream, s);
  DIFFNL_LAUNCH(measure_and_judge<T>, std::min<int64_t>(blocks_for(s.num_atoms, kThreads), 1024), kThreads, stream,
                s);
}

template <typename T>
void count_selected(const GpuSelection<T>& s, GpuStream stream) {
  const bool few_rows = s.num_atoms <= kFewCounts;
  DIFFNL_LAUNCH(count_rows<T>, blocks_in_turns(s.num_atoms, kWavesOfBlock, kThreads), kThreads, stream, s,
                few_rows);
  if (few_rows) return;
  scan_counts(s.row_counts, s.num_atoms, s.partial_sums, s.offsets, nullptr, nullptr, stream);
  DIFFNL_LAUNCH(tell_count<T>, 1, 1, stream, s);
}

template <typename T>
void fill_selected(const GpuSelection<T>& s, const GpuPairs<T>& out, GpuStream stream) {
  DIFFNL_LAUNCH(fill_rows<T>, blocks_in_turns(s.num_atoms, kWavesOfBlock, kThreads), kThreads, stream, s, out);
}

template <typename T>
void keep_candidates(const GpuSearch<T>& s, const Link* unsorted, const GpuCandidates<T>& kept, GpuStream stream) {
  const int64_t blocks = blocks_in_turns(std::min<int64_t>(s.num_atoms, int64_t(1) << 20), 1, kThreads);
  DIFFNL_LAUNCH(sort_links<T>, blocks, kThreads, stream, s, unsorted, kept.links);
  DIFFNL_LAUNCH(keep_search<T>, blocks_in_turns(s.num_atoms, kWavesOfBlock, kThreads), kThreads, stream, s, kept);
}

int exchange_capture_mode(int mode) {
  hipStreamCaptureMode held = static_cast<hipStreamCaptureMode>(mode);
  check_call(hipThreadExchangeStreamCaptureMode(&held), "hipThreadExchangeStreamCaptureMode");
  return static_cast<int>(held);
}

#define DIFFNL_INSTANTIATE(T)                                                         \
  template void ask_candidates(const GpuSelection<T>&, GpuStream);                    \
  template void count_selected(const GpuSelection<T>&, GpuStream);                    \
  template void fill_selected(const GpuSelection<T>&, const GpuPairs<T>&, GpuStream); \
  template void keep_candidates(const GpuSearch<T>&, const Link*, const GpuCandidates<T>&, GpuStream);
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
