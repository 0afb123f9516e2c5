// The atoms of many systems, wrapped into their cells and ordered by bin, on a GPU.
//
//   frames -> wrap -> grids -> bin -> scan -> place -> order
//
// One set of launches for a whole batch. All of it is float64 and approximate; nothing here decides whether a pair
// is listed. Bins live in a table of slots of at most 2 N + 32 B entries, because its size must be known before
// anything is. A system with more bins than that (a molecule in a huge box) hashes them: bins then share slots,
// and a slot is searched for the atoms of one bin.
//
// Integer atomics find ranges and count; they are exact in any order. What an atomic hands out in an order of its
// own (arrival in a slot) is put in order by the last kernel, so that the result is the same every time.

#include "gpu.h"
#include "neighbors_gpu.h"

namespace diffnl {

namespace {

// ---------------------------------------------------------------------------------------- faults

// The first fault wins: kinds in the order of `Fault`, then the smallest number. Inverted, so that zeroed memory
// means none and atomicMax keeps the first.
__device__ inline void report(SearchState* state, Fault kind, uint64_t number) {
  atomicMax(&state->fault, ~static_cast<unsigned long long>(pack_fault(kind, number)));
}

__device__ inline AtomRange empty_range() {
  constexpr double inf = std::numeric_limits<double>::infinity();
  return {{inf, inf, inf}, {-inf, -inf, -inf}, {inf, inf, inf}, {-inf, -inf, -inf}, 0.0};
}

// ------------------------------------------------------------------------------------------- steps
//
// Each step is written for one atom or system, or for all threads of a block, so that kernels of one step each
// serve large inputs, and one kernel of all steps the small ones.

template <typename T>
__device__ inline void make_frame(const GpuSearch<T>& s, int64_t b) {
  GpuSystem& system = s.systems[b];
  bool finite = true;
  for (int c = 0; c < 9; ++c) finite = finite && std::isfinite(s.cell[9 * b + c]);
  if (!finite) {
    report(s.state, Fault::cell_not_finite, b);
  } else if (!make_search_cell(s.cell + 9 * b, s.pbc + b * s.pbc_stride, system.cell)) {
    report(s.state, Fault::cell_singular, b);
  }
  const AtomRange none = empty_range();
  for (int k = 0; k < 3; ++k) {
    system.q_low[k] = ordered_bits(none.q_low[k]);
    system.q_high[k] = ordered_bits(none.q_high[k]);
    system.w_low[k] = ordered_bits(none.w_low[k]);
    system.w_high[k] = ordered_bits(none.w_high[k]);
  }
  system.largest = ordered_bits(none.largest);
  system.num_atoms = s.system_idx == nullptr && b == 0 ? static_cast<uint32_t>(s.num_atoms) : 0;
}

// The system of atom i, or 0 for a number that has been reported as a fault.
template <typename T>
__device__ inline uint32_t system_of(const GpuSearch<T>& s, int64_t i) {
  if (s.system_idx == nullptr) return 0;
  const int64_t b = s.system_idx[i];
  return b >= 0 && b < s.num_systems ? static_cast<uint32_t>(b) : 0;
}

// Adds what a thread knows of a system's atoms.
__device__ inline void widen(GpuSystem& system, const AtomRange& range, uint32_t num_atoms, bool count) {
  // All looks before the first answer is needed: they take as long as one.
  uint64_t q_low[3], q_high[3], w_low[3], w_high[3];
  for (int k = 0; k < 3; ++k) {
    q_low[k] = look_at(system.q_low[k]);
    q_high[k] = look_at(system.q_high[k]);
    w_low[k] = look_at(system.w_low[k]);
    w_high[k] = look_at(system.w_high[k]);
  }
  const uint64_t largest = look_at(system.largest);
  for (int k = 0; k < 3; ++k) {
    lower_to(&system.q_low[k], q_low[k], range.q_low[k]);
    raise_to(&system.q_high[k], q_high[k], range.q_high[k]);
    lower_to(&system.w_low[k], w_low[k], range.w_low[k]);
    raise_to(&system.w_high[k], w_high[k], range.w_high[k]);
  }
  raise_to(&system.largest, largest, range.largest);
  if (count) atomicAdd(&system.num_atoms, num_atoms);
}

// Wraps the atoms first, first + step, ... below last, and widens the ranges of their systems: once for a wave,
// where all its atoms are in one system. All threads of a wave call it.
template <typename T>
__device__ inline void wrap_atoms_from(const GpuSearch<T>& s, int64_t first, int64_t step, int64_t last) {
  constexpr uint32_t nothing = 0xffffffffu;
  const bool batch = s.system_idx != nullptr;
  const bool has_frames = s.state->fault == 0;
  AtomRange range = empty_range();
  uint32_t current = nothing, num_atoms = 0;
  for (int64_t i = first; i < last; i += step) {
    const uint32_t b = system_of(s, i);
    if (b != current && current != nothing) {
      widen(s.systems[current], range, num_atoms, batch);
      range = empty_range();
      num_atoms = 0;
    }
    current = b;
    ++num_atoms;
    const Vec3<T> at = load_triple(s.positions + 3 * i);
    const bool finite = std::isfinite(at.x) && std::isfinite(at.y) && std::isfinite(at.z);
    if (!finite) report(s.state, Fault::positions_not_finite, i);
    if (batch && s.system_idx[i] != static_cast<int64_t>(b)) report(s.state, Fault::system_idx_out_of_range, i);
    Vec3<double> q{0, 0, 0}, w{0, 0, 0};
    if (finite && has_frames) {
      const Vec3<double> r{static_cast<double>(at.x), static_cast<double>(at.y), static_cast<double>(at.z)};
      wrap(s.systems[b].cell, r, q, w);
      const double q_of[3] = {q.x, q.y, q.z}, w_of[3] = {w.x, w.y, w.z};
      for (int k = 0; k < 3; ++k) {
        range.q_low[k] = std::min(range.q_low[k], q_of[k]);
        range.q_high[k] = std::max(range.q_high[k], q_of[k]);
        range.w_low[k] = std::min(range.w_low[k], w_of[k]);
        range.w_high[k] = std::max(range.w_high[k], w_of[k]);
      }
      range.largest = std::max(range.largest, std::max(std::max(std::abs(r.x), std::abs(r.y)), std::abs(r.z)));
    }
    s.q[i] = q;
    s.w[3 * i] = static_cast<int32_t>(static_cast<int64_t>(w.x));
    s.w[3 * i + 1] = static_cast<int32_t>(static_cast<int64_t>(w.y));
    s.w[3 * i + 2] = static_cast<int32_t>(static_cast<int64_t>(w.z));
  }
  const uint32_t of_wave = lane_value(current, 0);
  const bool alike = wave_ballot(current == of_wave || current == nothing) == wave_ballot(true);
  if (alike && of_wave != nothing) {
    for (int k = 0; k < 3; ++k) {
      range.q_low[k] = min_over_wave(range.q_low[k]);
      range.q_high[k] = max_over_wave(range.q_high[k]);
      range.w_low[k] = min_over_wave(range.w_low[k]);
      range.w_high[k] = max_over_wave(range.w_high[k]);
    }
    range.largest = max_over_wave(range.largest);
    for (int mask = 1; mask < wave_width(); mask *= 2) num_atoms += lane_xor(num_atoms, mask, wave_width());
  }
  if (current == nothing || (alike && lane_of_thread() != 0)) return;
  widen(s.systems[current], range, num_atoms, batch);
}

// Cuts the systems into bins and gives each its part of the atoms, of the table of slots and of the notes on the
// stencil. By all threads of one block.
template <int kBlock, typename T>
__device__ inline void make_all_grids(const GpuSearch<T>& s) {
  using Wide = unsigned long long;
  Wide slots_before = 0, segments_before = 0, atoms_before = 0;
  bool linkable = true;
  const bool faulty = s.state->fault != 0;
  for (int64_t b0 = 0; b0 < s.num_systems; b0 += kBlock) {
    const int64_t b = b0 + threadIdx.x;
    Wide num_slots = 0, segments = 0, num_atoms = 0;
    GpuSystem* system = b < s.num_systems ? s.systems + b : nullptr;
    if (system != nullptr) num_atoms = system->num_atoms;
    if (num_atoms > 0 && !faulty) {
      AtomRange range;
      for (int k = 0; k < 3; ++k) {
        range.q_low[k] = from_ordered_bits(system->q_low[k]);
        range.q_high[k] = from_ordered_bits(system->q_high[k]);
        range.w_low[k] = from_ordered_bits(system->w_low[k]);
        range.w_high[k] = from_ordered_bits(system->w_high[k]);
      }
      range.largest = from_ordered_bits(system->largest);
      Grid& grid = system->grid;
      const double n = static_cast<double>(num_atoms);
      const Reach reach = make_grid<T>(system->cell, range, s.cutoff, n, s.prices, grid);
      if (reach.shift_overflows) {
        report(s.state, Fault::shift_overflows, b);
      } else if (reach.images_blur) {
        report(s.state, Fault::images_blur, b);
      } else if (const double fewest = fewest_pairs(system->cell, range, s.cutoff, n);
                 fewest > static_cast<double>(s.most_pairs)) {
        report(s.state, Fault::out_of_memory, static_cast<uint64_t>(std::min(fewest, 1e16)));
      } else {
        double bins = 1.0, stencil = 1.0;
        for (int k = 0; k < 3; ++k) {
          bins *= static_cast<double>(grid.axis[k].bins);
          stencil *= 2.0 * static_cast<double>(grid.axis[k].reach) + 1.0;
        }
        const Wide most = 2 * num_atoms + 32;
        system->hashed = bins > static_cast<double>(most);
        num_slots = system->hashed ? most : static_cast<Wide>(bins);
        const bool fits = stencil * n <= static_cast<double>(s.segment_capacity);
        segments = fits ? static_cast<Wide>(stencil * n) : 0;
        linkable = linkable && fits && reach.largest_shift <= static_cast<double>(Link::kLargestShift);
        system->stencil = stencil < 9e18 ? static_cast<int64_t>(stencil) : INT64_MAX;
      }
    }
    Wide slot = 0, segment = 0, atom = 0, total_slots = 0, total_segments = 0, total_atoms = 0;
    if (s.num_systems > 1) {
      slot = slots_before + block_exclusive_sum<kBlock>(num_slots, total_slots);
      segment = segments_before + block_exclusive_sum<kBlock>(segments, total_segments);
      atom = atoms_before + block_exclusive_sum<kBlock>(num_atoms, total_atoms);
    }
    if (system != nullptr) {
      const bool fits = segments > 0 && segment + segments <= static_cast<Wide>(s.segment_capacity);
      linkable = linkable && (fits || num_atoms == 0);
      system->first_slot = static_cast<uint32_t>(slot);
      system->num_slots = static_cast<uint32_t>(num_slots);
      system->segment_base = fits ? static_cast<int64_t>(segment) : -1;
      system->first_atom = static_cast<uint32_t>(atom);
      if (s.first_of_system != nullptr) s.first_of_system[b] = static_cast<int64_t>(atom);
    }
    slots_before += total_slots;
    segments_before += total_segments;
    atoms_before += total_atoms;
  }
  if (s.first_of_system != nullptr && threadIdx.x == 0) s.first_of_system[s.num_systems] = s.num_atoms;
  if (!linkable) atomicMax(&s.state->unlinkable, 1u);
}

template <typename T>
__device__ inline void bin_atom(const GpuSearch<T>& s, int64_t i) {
  const GpuSystem& system = s.systems[system_of(s, i)];
  const int64_t key = bin_key(system.grid, s.q[i]);
  const uint32_t slot = slot_of(system, key);
  s.keys[i] = key;
  s.slots[i] = slot;
  s.ranks[i] = atomicAdd(&s.slot_counts[slot], 1u);
}

template <typename T>
__device__ inline void place_atom(const GpuSearch<T>& s, int64_t i) {
  s.unordered[s.slot_starts[s.slots[i]] + s.ranks[i]] = static_cast<uint32_t>(i);
}

// The t-th atom by slot finds its place among those of its slot, by bin and number. The first of a bin announces
// it.
template <typename T>
__device__ inline void order_atom(const GpuSearch<T>& s, int64_t t) {
  const uint32_t i = s.unordered[t];
  const uint32_t b = system_of(s, i);
  const int64_t key = s.keys[i];
  const uint32_t first = s.slot_starts[s.slots[i]], last = s.slot_starts[s.slots[i] + 1];
  uint32_t in_other_bins = 0, before = 0, size = 0;
  if (s.systems[b].hashed) {
    for (uint32_t u = first; u < last; ++u) {
      const uint32_t other = s.unordered[u];
      const int64_t other_key = s.keys[other];
      in_other_bins += other_key < key;
      before += other_key == key && other < i;
      size += other_key == key;
    }
  } else {
    for (uint32_t u = first; u < last; ++u) before += s.unordered[u] < i;
    size = last - first;
  }
  const uint32_t place = first + in_other_bins + before;
  const Vec3<T> r = load_triple(s.positions + 3 * int64_t(i));
  const int32_t* w = s.w + 3 * int64_t(i);
  s.atoms[place] = {r.x, r.y, r.z, i};
  s.places[place] = {w[0], w[1], w[2], b};
  s.sorted_keys[place] = key;
  if (s.order != nullptr) s.order[place] = i;
  if (before == 0) s.bins[atomicAdd(&s.state->num_bins, 1u)] = {place, size};
}

// ----------------------------------------------------------------------------------------- kernels

template <typename T>
__global__ __launch_bounds__(kThreads) void make_frames(GpuSearch<T> s) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b < s.num_systems && !is_idle(s.needed)) make_frame(s, b);
}

// Where atoms are few, the last block cuts the systems into bins as well; else that would cost all others
// registers.
template <typename T, bool kFew>
__global__ __launch_bounds__(kThreads) void wrap_atoms(GpuSearch<T> s, int64_t atoms_of_thread) {
  if (is_idle(s.needed)) return;
  const int64_t first = int64_t(blockIdx.x) * kThreads * atoms_of_thread;
  wrap_atoms_from(s, first + threadIdx.x, kThreads, std::min(first + kThreads * atoms_of_thread, s.num_atoms));
  if constexpr (kFew)
    if (is_last_block(&s.state->wrapped)) make_all_grids<kThreads>(s);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void make_grids(GpuSearch<T> s) {
  if (is_idle(s.needed)) return;
  make_all_grids<kThreads>(s);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void bin_atoms(GpuSearch<T> s, bool few_slots) {
  if (is_idle(s.needed)) return;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < s.num_atoms && s.state->fault == 0) bin_atom(s, i);
  if (few_slots && is_last_block(&s.state->binned))
    scan_by_one_block<kThreads>(s.slot_counts, s.num_slots, s.slot_starts);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void place_atoms(GpuSearch<T> s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < s.num_atoms && !is_idle(s.needed) && s.state->fault == 0) place_atom(s, i);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void order_atoms(GpuSearch<T> s) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t < s.num_atoms && !is_idle(s.needed) && s.state->fault == 0) order_atom(s, t);
}

// All of the above by one block: where atoms are few, launches cost more than they do.
template <typename T>
__global__ __launch_bounds__(kSmallThreads) void file_small(GpuSearch<T> s) {
  if (is_idle(s.needed)) return;
  const int64_t first = threadIdx.x;
  for (int64_t b = first; b < s.num_systems; b += kSmallThreads) make_frame(s, b);
  __syncthreads();
  wrap_atoms_from(s, first, kSmallThreads, s.num_atoms);
  __syncthreads();
  make_all_grids<kSmallThreads>(s);
  __syncthreads();
  if (s.state->fault != 0) return;
  for (int64_t i = first; i < s.num_atoms; i += kSmallThreads) bin_atom(s, i);
  __syncthreads();
  scan_by_one_block<kSmallThreads>(s.slot_counts, s.num_slots, s.slot_starts);
  __syncthreads();
  for (int64_t i = first; i < s.num_atoms; i += kSmallThreads) place_atom(s, i);
  __syncthreads();
  for (int64_t t = first; t < s.num_atoms; t += kSmallThreads) order_atom(s, t);
}

}  // namespace

template <typename T>
void build_cell_list(const GpuSearch<T>& s, GpuStream stream) {
  if (s.num_atoms <= kSmall && s.num_systems <= kSmall) {
    DIFFNL_LAUNCH(file_small<T>, 1, kSmallThreads, stream, s);
    return;
  }
  const int64_t atom_blocks = blocks_for(s.num_atoms, kThreads);
  DIFFNL_LAUNCH(make_frames<T>, blocks_for(s.num_systems, kThreads), kThreads, stream, s);
  if (s.num_atoms == 0) return;
  if (s.num_atoms <= kFewCounts) {
    DIFFNL_LAUNCH((wrap_atoms<T, true>), atom_blocks, kThreads, stream, s, int64_t(1));
  } else {
    // More atoms a thread mean fewer atomics; fewer keep more of the device at work.
    const int64_t atoms_of_thread = s.num_atoms >= (1 << 18) ? 8 : 1;
    DIFFNL_LAUNCH((wrap_atoms<T, false>), blocks_for(s.num_atoms, kThreads * atoms_of_thread), kThreads, stream, s,
                  atoms_of_thread);
    DIFFNL_LAUNCH(make_grids<T>, 1, kThreads, stream, s);
  }
  const bool few_slots = s.num_slots <= kFewCounts;
  DIFFNL_LAUNCH(bin_atoms<T>, atom_blocks, kThreads, stream, s, few_slots);
  if (!few_slots)
    scan_counts(s.slot_counts, s.num_slots, s.partial_sums, s.slot_starts, nullptr, s.needed, stream);
  DIFFNL_LAUNCH(place_atoms<T>, atom_blocks, kThreads, stream, s);
  DIFFNL_LAUNCH(order_atoms<T>, atom_blocks, kThreads, stream, s);
}

template void build_cell_list(const GpuSearch<float>&, GpuStream);
template void build_cell_list(const GpuSearch<double>&, GpuStream);

}  // namespace diffnl
