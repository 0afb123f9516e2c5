// The search on a GPU: two sinks of the traversal in traverse_gpu.h.
//
// Count: the bits of one candidate are its own row's pairs with the home bin. Their number is added to its row and
// kept in `segments`, the word in `hits`, one for each (bin of the stencil, atom). Fill: reads the words, or tests
// again where there was no room for them; turns the bit matrix, 32 x 32 bits at a time; and waves write its
// columns as rows of the list.
//
// Links (neighbors_gpu.h): the rank of the reverse pair (c, home, -S) in row c is the number of pairs of row c in
// earlier bins of its stencil, which is an exclusive sum over its segments, plus the number of bits below in its
// word.

#include <map>

#include "traverse_gpu.h"

namespace diffnl {

namespace {

// The words of a bin are kept where there is room for them and one word holds all its home atoms.
template <typename T>
__device__ inline bool keeps_hits(const Home<T>& home) {
  return home.segment_base >= 0 && home.size <= kHome;
}

template <typename T>
struct CountSink {
  const GpuSearch<T>& s;
  Home<T>& home;
  Candidates& near;
  Share share;
  unsigned long long found;

  __device__ bool owns(int t) const { return share.owns(t / kSearchThreads); }

  __device__ void begin(int size, int64_t) {
    for (int t = static_cast<int>(threadIdx.x); t < size; t += kSearchThreads) near.rank[t] = 0;
  }
  __device__ void enter(int, uint32_t) {}
  __device__ void take(int t, int size, uint32_t first_home, int count) {
    if (t >= size || !owns(t)) return;
    const uint32_t hits = find_hits(s, home, near, t, first_home, count);
    near.hits[t] = hits;
    // Of (home, candidate) and (candidate, home) a half list keeps one.
    near.rank[t] += __popc(s.full ? hits : hits & ~kept_in_half(home, hits, near, load_candidate(s, near, t)));
  }
  __device__ void write(uint32_t, int, int) {}
  __device__ void end(int size, int64_t n0) {
    for (int t = static_cast<int>(threadIdx.x); t < size; t += kSearchThreads) {
      if (!owns(t)) continue;
      const uint32_t count = near.rank[t];
      found += count;
      if (count > 0) atomicAdd(&s.row_counts[s.atoms[near.atom[t]].index], count);
      if (home.segment_base < 0) continue;
      const int64_t at = segment_of(home, near, t, n0);
      if (keeps_hits(home)) s.hits[at] = near.hits[t];
      // A count that does not fit belongs to a row that no Link can hold.
      if (s.segments != nullptr) s.segments[at] = static_cast<uint16_t>(count);
    }
  }
  // Stops a count that has already found more pairs than memory could hold: a cutoff given in the wrong unit would
  // otherwise count for hours before it fails. Only wide stencils and crowded bins can do that.
  __device__ bool too_many() {
    if (found > 0) {
      const unsigned long long before = atomicAdd(&s.state->num_counted, found);
      if (before + found > static_cast<unsigned long long>(s.most_pairs)) s.state->abandoned = 1;
      found = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) home.abandoned = *static_cast<volatile unsigned*>(&s.state->abandoned) != 0;
    __syncthreads();
    return home.abandoned;
  }
};

template <typename T>
__global__ DIFFNL_LAUNCH_BOUNDS(kSearchThreads, 10) void count_bins(GpuSearch<T> s) {
  __shared__ Home<T> home;
  __shared__ Candidates near;
  if (s.state->fault != 0) return;
  const uint32_t num_bins = s.state->num_bins, shares = shares_of_bins(num_bins);
  CountSink<T> sink{s, home, near, {0, 1}, 0};
  for (uint32_t u = blockIdx.x; u < num_bins * shares; u += gridDim.x) {
    sink.share = {u % shares, shares};
    traverse_bin(s, s.bins[u / shares], home, near, sink);
    if (home.abandoned) return;
  }
}

// Turns the segments of atom c into the number of pairs in the segments before.
template <typename T>
__device__ inline void sum_segments(const GpuSearch<T>& s, int64_t c) {
  const GpuSystem& system = s.systems[s.places[c].system];
  const int64_t stride = system.num_atoms, stencil = system.stencil;
  uint16_t* segments = s.segments + system.segment_base + (c - system.first_atom);
  uint32_t before = 0;
  constexpr int kBatch = 27;  // that are read before the first is written
  for (int64_t n0 = 0; n0 < stencil; n0 += kBatch) {
    uint32_t counts[kBatch];
    DIFFNL_UNROLL(kBatch)
    for (int n = 0; n < kBatch; ++n) counts[n] = n0 + n < stencil ? segments[(n0 + n) * stride] : 0;
    DIFFNL_UNROLL(kBatch)
    for (int n = 0; n < kBatch; ++n) {
      if (n0 + n < stencil) segments[(n0 + n) * stride] = static_cast<uint16_t>(before);
      before += counts[n];
    }
  }
}

template <typename T>
__device__ inline bool is_linkable(const GpuSearch<T>& s) {
  return s.state->unlinkable == 0 && s.state->longest_row < Link::kLongestRow;
}

template <typename T>
__device__ inline Summary summarize(const GpuSearch<T>& s) {
  Summary out;
  out.num_pairs = s.num_atoms > 0 ? s.offsets[s.num_atoms] : 0;
  out.fault = s.state->fault == 0 ? 0 : ~static_cast<uint64_t>(s.state->fault);
  if (s.state->abandoned != 0 && out.fault == 0) {
    out.fault = pack_fault(Fault::out_of_memory, 0);
    out.num_pairs = static_cast<int64_t>(s.state->num_counted);
  }
  out.num_bins = s.state->num_bins;
  out.longest_row = s.state->longest_row;
  out.linkable = is_linkable(s);
  return out;
}

// The first offset of a list that has failed becomes -1, which its backward understands.
template <typename T>
__device__ inline void tell_padded_list(const GpuSearch<T>& s, const Summary& summary) {
  int64_t count = summary.num_pairs;
  uint64_t fault = summary.fault;
  if (kind_of_fault(fault) == Fault::out_of_memory) {
    count = std::max(std::max(count, number_of_fault(fault)), s.capacity + 1);
    fault = 0;
  }
  if (fault == 0 && count <= s.capacity && s.segments != nullptr && summary.linkable == 0)
    fault = pack_fault(Fault::not_linkable, 0);
  *s.num_pairs = fault != 0 ? -static_cast<int64_t>(fault) : count;
  if (has_failed(s))
    s.offsets[0] = -1;
  else if (s.num_atoms == 0)
    s.offsets[0] = 0;
}

// What is left to do between counting and filling. The first block tells how it went, and if rows are few it is
// the one that finds where they begin; the others sum the segments, which nobody needs before the fill.
template <typename T>
__global__ __launch_bounds__(kThreads) void finish_count(GpuSearch<T> s, bool few_rows) {
  if (blockIdx.x == 0) {
    if (few_rows) scan_by_one_block<kThreads>(s.row_counts, s.num_atoms, s.offsets, &s.state->longest_row);
    __syncthreads();
    if (threadIdx.x != 0) return;
    const Summary summary = summarize(s);
    if (s.capacity >= 0) {
      tell_padded_list(s, summary);
    } else {
      *s.summary = summary;
      __threadfence_system();
    }
    return;
  }
  const int64_t c = int64_t(blockIdx.x - 1) * kThreads + threadIdx.x;
  if (c < s.num_atoms && s.state->fault == 0 && s.state->unlinkable == 0) sum_segments(s, c);
}

// What the fill shares beyond the traversal.
template <typename T>
struct Rows {
  uint32_t hits[kHome]
               [kTile / 32 + 1];  // bit b of word g: candidate 32 g + b is a neighbour; one to spare for banks
  uint16_t queue[kSearchThreads / kNarrowestWave][kTile];  // of a wave: the candidates in its row
  union {                                                  // what the waves write, on its way into order
    int32_t shifts[3 * kSearchThreads];
    T vectors[3 * kSearchThreads];
  } stage;
  int64_t next[kHome];  // where the row of a home atom goes on
  uint32_t placed[kHome];
};

template <typename T>
struct FillSink {
  const GpuSearch<T>& s;
  Home<T>& home;
  Candidates& near;
  Rows<T>& rows;
  const GpuPairs<T>& out;
  Share share;

  __device__ bool owns(int a) const { return share.owns(a / (kSearchThreads / wave_width())); }

  // Several at once, so that their loads overlap.
  __device__ void begin(int size, int64_t n0) {
    if (home.segment_base < 0) return;
    constexpr int kAtOnce = 3;
    const bool keeps = keeps_hits(home);
    for (int t0 = static_cast<int>(threadIdx.x); t0 < size; t0 += kAtOnce * kSearchThreads) {
      uint32_t rank[kAtOnce], hits[kAtOnce];
      DIFFNL_UNROLL(kAtOnce)
      for (int u = 0; u < kAtOnce; ++u) {
        const int t = t0 + u * kSearchThreads;
        const int64_t at = t < size ? segment_of(home, near, t, n0) : 0;
        rank[u] = t < size && out.links != nullptr ? s.segments[at] : 0;
        hits[u] = t < size && keeps ? s.hits[at] : 0;
      }
      DIFFNL_UNROLL(kAtOnce)
      for (int u = 0; u < kAtOnce; ++u) {
        const int t = t0 + u * kSearchThreads;
        if (t >= size) continue;
        near.rank[t] = rank[u];
        near.hits[t] = hits[u];
      }
    }
  }

  __device__ void enter(int a, uint32_t sorted) {
    if (!owns(a)) return;
    rows.placed[a] = s.placed[sorted];
    rows.next[a] = s.offsets[home.atom[a].index] + rows.placed[a];
  }

  // Turns the bits: lane a gets what 32 lanes have to say about home atom a.
  __device__ void take(int t, int size, uint32_t first_home, int count) {
    uint32_t hits = 0;
    if (t < size) {
      hits = keeps_hits(home) ? near.hits[t] : find_hits(s, home, near, t, first_home, count);
      if (!s.full) hits = kept_in_half(home, hits, near, load_candidate(s, near, t));
      near.hits[t] = hits;
    }
    const int lane = lane_of_thread(), half = lane / 32;
    uint32_t word = 0;
    for (int a = 0; a < count; ++a) {
      const uint64_t votes = wave_ballot((hits >> a & 1) != 0);
      if (lane % 32 == a) word = static_cast<uint32_t>(votes >> (32 * half));
    }
    rows.hits[lane % 32][(t - lane) / 32 + half] = word;
  }
  __device__ void end(int, int64_t) {}
  __device__ bool too_many() { return false; }

  // Writes candidates t of the first `count` lanes as pairs p, p + 1, ... of home atom a. `unmoved` is S @ h of S
  // = 0.
  __device__ void emit(int a, const SortedAtom<T>& i, int64_t p, int t, const Candidate<T>& j, int count,
                       Vec3<T> unmoved) {
    const int lane = lane_of_thread(), stage = 3 * (static_cast<int>(threadIdx.x) - lane);
    Shift S{0, 0, 0};
    if (lane < count) {
      S = shift_between(home, a, near, j);
      out.mapping[p + lane] = i.index;
      out.mapping[out.num_pairs + p + lane] = j.index();
      if (out.links != nullptr)
        out.links[p + lane] =
            Link::make(j.index(), near.rank[t] + __popc(near.hits[t] & ((1u << a) - 1)), S.s0, S.s1, S.s2);
    }
    // Most pairs do not leave the cell: nothing to put in order, nothing to multiply.
    Vec3<T> moved = unmoved;
    if (wave_ballot((S.s0 | S.s1 | S.s2) != 0) == 0) {
      DIFFNL_UNROLL(3)
      for (int k = 0; k < 3; ++k)
        if (lane + k * wave_width() < 3 * count) out.shifts[3 * p + lane + k * wave_width()] = 0;
    } else {
      moved = translation(home.h, static_cast<T>(S.s0), static_cast<T>(S.s1), static_cast<T>(S.s2));
      store_triples(out.shifts + 3 * p, count, S.s0, S.s1, S.s2,
                    rows.stage.shifts + stage * (sizeof(T) / sizeof(int32_t)));
    }
    if (out.vectors == nullptr) return;
    const Vec3<T> v = pair_vector<T>({i.x, i.y, i.z}, j.r(), moved);
    store_triples(out.vectors + 3 * p, count, v.x, v.y, v.z, rows.stage.vectors + stage);
  }

  __device__ void write(uint32_t first_home, int count, int size) {
    __syncthreads();
    const int lane = lane_of_thread(), width = wave_width();
    const Vec3<T> unmoved = translation<T>(home.h, 0, 0, 0);
    uint16_t* queue = rows.queue[wave_of_thread()];
    for (int a = wave_of_thread(); a < count; a += kSearchThreads / width) {
      if (!owns(a)) continue;
      // Each lane lists the candidates of its word, behind those of the lanes below.
      uint32_t word = lane < (size + 31) / 32 ? rows.hits[a][lane] : 0;
      int end = __popc(word);
      for (int distance = 1; distance < width; distance *= 2) {
        const int below = lane_below(end, distance);
        if (lane >= distance) end += below;
      }
      const int found = lane_value(end, width - 1);
      for (int at = end - __popc(word); word != 0; word &= word - 1)
        queue[at++] = static_cast<uint16_t>(32 * lane + lowest_bit(word));
      wave_sync();
      const SortedAtom<T> i = home.atom[a];
      const int64_t p = rows.next[a];
      // The next candidates are on their way while these are written.
      int next_t = 0;
      Candidate<T> next{};
      const auto fetch = [&](int k) {
        if (k + lane >= found) return;
        next_t = queue[k + lane];
        next = load_candidate(s, near, next_t);
      };
      fetch(0);
      for (int k = 0; k < found; k += width) {
        const int t = next_t;
        const Candidate<T> j = next;
        fetch(k + width);
        if (found - k >= width)
          emit(a, i, p + k, t, j, width, unmoved);
        else
          emit(a, i, p + k, t, j, found - k, unmoved);
      }
      wave_sync();
      if (lane == 0) s.placed[home.first + first_home + a] = rows.placed[a] + found;
    }
    __syncthreads();
    if (out.links != nullptr)
      for (int t = static_cast<int>(threadIdx.x); t < size; t += kSearchThreads)
        near.rank[t] += __popc(near.hits[t]);
  }
};

// Fills what the pairs leave of a padded list, by all threads of a grid. An empty slot holds the last atom with
// itself, at the length of the cutoff: rows stay in order, and a smooth envelope makes nothing of such a pair.
template <typename T>
__device__ inline void pad_slots(const GpuSearch<T>& s, const GpuPairs<T>& out) {
  const bool failed = has_failed(s);
  const int64_t last_atom = s.num_atoms > 0 ? s.num_atoms - 1 : 0;
  const T length = failed ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(s.cutoff);
  int64_t p = (failed ? 0 : *s.num_pairs) + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; p < s.capacity; p += int64_t(gridDim.x) * blockDim.x) {
    out.mapping[p] = out.mapping[s.capacity + p] = last_atom;
    for (int k = 0; k < 3; ++k) {
      out.shifts[3 * p + k] = 0;
      out.vectors[3 * p + k] = k == 0 ? length : 0 * length;
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void pad_list(GpuSearch<T> s, GpuPairs<T> out) {
  pad_slots(s, out);
}

// Unless `room` is negative, the number of pairs has to be read here, and nothing is written where they exceed it.
template <typename T>
__global__ DIFFNL_LAUNCH_BOUNDS(kSearchThreads, 7) void fill_bins(GpuSearch<T> s, GpuPairs<T> out, int64_t room) {
  __shared__ Home<T> home;
  __shared__ Candidates near;
  __shared__ Rows<T> rows;
  if (room >= 0) {
    // Vectors that are still to come belong to a list that is still to be sorted.
    if (s.capacity >= 0 && out.vectors != nullptr) pad_slots(s, out);
    if (has_failed(s)) return;
    const int64_t num_pairs = s.offsets[s.num_atoms];
    if (s.capacity < 0) out.num_pairs = num_pairs;
    if (!is_linkable(s)) out.links = nullptr;
    if (s.state->fault != 0 || s.state->abandoned != 0 || num_pairs > room) return;
  }
  const uint32_t num_bins = s.state->num_bins, shares = shares_of_bins(num_bins);
  FillSink<T> sink{s, home, near, rows, out, {0, 1}};
  for (uint32_t u = blockIdx.x; u < num_bins * shares; u += gridDim.x) {
    sink.share = {u % shares, shares};
    traverse_bin(s, s.bins[u / shares], home, near, sink);
  }
}

int current_device() {
  int device = 0;
  check_call(hipGetDevice(&device), "hipGetDevice");
  return device;
}

int num_multiprocessors() {
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
  return std::min<int64_t>(bins * shares, int64_t(num_multiprocessors()) * 32);
}

// One for each thread and device; never freed.
hipEvent_t event_of_thread() {
  static thread_local std::map<int, hipEvent_t> events;
  hipEvent_t& event = events[current_device()];
  if (event == nullptr) check_call(hipEventCreateWithFlags(&event, hipEventDisableTiming), "hipEventCreate");
  return event;
}

}  // namespace

template <typename T>
void count_pairs(const GpuSearch<T>& s, GpuStream stream) {
  const bool few_rows = s.num_atoms <= kFewCounts;
  if (s.num_atoms > 0) DIFFNL_LAUNCH(count_bins<T>, blocks_for_bins(s), kSearchThreads, stream, s);
  if (!few_rows) scan_counts(s.row_counts, s.num_atoms, s.partial_sums, s.offsets, &s.state->longest_row, stream);
  const int64_t blocks = s.segments == nullptr ? 1 : 1 + blocks_for(s.num_atoms, kThreads);
  DIFFNL_LAUNCH(finish_count<T>, blocks, kThreads, stream, s, few_rows);
}

void mark_end_of_count(GpuStream stream) {
  check_call(hipEventRecord(event_of_thread(), static_cast<hipStream_t>(stream)), "hipEventRecord");
}

void wait_for_summary() { check_call(hipEventSynchronize(event_of_thread()), "the search"); }

template <typename T>
void fill_pairs(const GpuSearch<T>& s, uint32_t num_bins, const GpuPairs<T>& out, GpuStream stream) {
  if (out.num_pairs == 0) return;
  const int64_t blocks = int64_t(num_bins) * shares_of_bins(num_bins);
  DIFFNL_LAUNCH(fill_bins<T>, blocks, kSearchThreads, stream, s, out, int64_t(-1));
}

template <typename T>
void fill_pairs_if_they_fit(const GpuSearch<T>& s, int64_t room, const GpuPairs<T>& out, GpuStream stream) {
  if (s.num_atoms == 0 || room == 0) {
    if (s.capacity > 0 && out.vectors != nullptr) pad_pairs(s, out, stream);
    return;
  }
  DIFFNL_LAUNCH(fill_bins<T>, blocks_for_bins(s), kSearchThreads, stream, s, out, room);
}

template <typename T>
void pad_pairs(const GpuSearch<T>& s, const GpuPairs<T>& out, GpuStream stream) {
  if (s.capacity == 0) return;
  DIFFNL_LAUNCH(pad_list<T>, blocks_for(s.capacity, kThreads), kThreads, stream, s, out);
}

template <typename T>
int64_t pairs_in_device_memory() {
  static thread_local int known_device = -1;
  static thread_local size_t total = 0;
  const int device = current_device();
  if (device != known_device) {
    size_t free = 0;
    check_call(hipMemGetInfo(&free, &total), "hipMemGetInfo");
    known_device = device;
  }
  return static_cast<int64_t>(total / (28 + 3 * sizeof(T)));
}

int64_t read_from_device(const int64_t* at, GpuStream stream) {
  int64_t value = 0;
  const hipStream_t on = static_cast<hipStream_t>(stream);
  check_call(hipMemcpyAsync(&value, at, sizeof value, hipMemcpyDeviceToHost, on), "hipMemcpyAsync");
  check_call(hipStreamSynchronize(on), "hipStreamSynchronize");
  return value;
}

void set_on_device(void* memory, int byte, int64_t bytes, GpuStream stream) {
  const hipStream_t on = static_cast<hipStream_t>(stream);
  check_call(hipMemsetAsync(memory, byte, static_cast<size_t>(bytes), on), "hipMemsetAsync");
}

Summary* summary_of_thread() {
  static thread_local void* memory = nullptr;
  if (memory == nullptr)
    check_call(hipHostMalloc(&memory, sizeof(Summary), hipHostMallocPortable | hipHostMallocMapped),
               "hipHostMalloc");
  return static_cast<Summary*>(memory);
}

#define DIFFNL_INSTANTIATE(T)                                                                        \
  template void count_pairs(const GpuSearch<T>&, GpuStream);                                         \
  template void fill_pairs(const GpuSearch<T>&, uint32_t, const GpuPairs<T>&, GpuStream);            \
  template void fill_pairs_if_they_fit(const GpuSearch<T>&, int64_t, const GpuPairs<T>&, GpuStream); \
  template void pad_pairs(const GpuSearch<T>&, const GpuPairs<T>&, GpuStream);                       \
  template int64_t pairs_in_device_memory<T>();
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
