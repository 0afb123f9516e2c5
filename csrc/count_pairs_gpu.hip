// The count of the search on a GPU: the first sink of the traversal in traverse_gpu.h.
//
// The bits of one candidate are its own row's pairs with the home bin. Their number is added to its row and kept
// in `segments`, the word in `hits`, one for each (bin of the stencil, atom).

#include <map>

#include "traverse_gpu.h"

namespace diffnl {

namespace {

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
  if (is_idle(s.needed) || s.state->fault != 0) return;
  const uint32_t num_bins = s.state->num_bins, shares = shares_of_bins(num_bins);
  CountSink<T> sink{s, home, near, {0, 1}, 0};
  for (uint32_t u = blockIdx.x; u < num_bins * shares; u += gridDim.x) {
    sink.share = {u % shares, shares};
    traverse_bin(s, s.bins[u / shares], home, near, sink);
    if (home.abandoned) return;
  }
}

// Segments are summed for a few atoms at once, each by a few threads that share its stencil.
constexpr int kParts = 4, kAtomsAtOnce = kThreads / kParts;

// The segments of one atom: `stencil` of them, `stride` apart.
struct Segments {
  uint16_t* of;
  int64_t stride, stencil;
};

// Turns each segment into the number of pairs in those before it, for atoms whose stencils hold no more than
// `longest` bins. A thread reads kBatch of them before it writes the first.
template <int kBatch>
__device__ inline void sum_segments(const Segments& segments, int64_t longest) {
  __shared__ uint32_t sums[kParts][kAtomsAtOnce];
  const int own = static_cast<int>(threadIdx.x) % kAtomsAtOnce,
            part = static_cast<int>(threadIdx.x) / kAtomsAtOnce;
  uint32_t before = 0;
  for (int64_t begin = 0; begin < longest; begin += kParts * kBatch) {
    const int64_t n0 = begin + part * kBatch;
    uint32_t counts[kBatch], sum = 0;
    DIFFNL_UNROLL(kBatch)
    for (int n = 0; n < kBatch; ++n)
      counts[n] = n0 + n < segments.stencil ? segments.of[(n0 + n) * segments.stride] : 0;
    DIFFNL_UNROLL(kBatch)
    for (int n = 0; n < kBatch; ++n) sum += counts[n];
    __syncthreads();
    sums[part][own] = sum;
    __syncthreads();
    uint32_t next = before;
    for (int other = 0; other < kParts; ++other) {
      if (other == part) sum = next;
      next += sums[other][own];
    }
    before = next;
    DIFFNL_UNROLL(kBatch)
    for (int n = 0; n < kBatch; ++n) {
      if (n0 + n < segments.stencil) segments.of[(n0 + n) * segments.stride] = static_cast<uint16_t>(sum);
      sum += counts[n];
    }
  }
}

// The segments of kAtomsAtOnce atoms from `first` on.
template <typename T>
__device__ inline void sum_all_segments(const GpuSearch<T>& s, int64_t first) {
  __shared__ unsigned longest;
  if (threadIdx.x == 0) longest = 0;
  __syncthreads();
  const int64_t c = first + threadIdx.x % kAtomsAtOnce;
  Segments segments{nullptr, 0, 0};
  if (c < s.num_atoms) {
    const GpuSystem& system = s.systems[s.places[c].system];
    segments = {s.segments + system.segment_base + (c - system.first_atom), int64_t(system.num_atoms),
                system.stencil};
    atomicMax(&longest, static_cast<unsigned>(system.stencil));
  }
  __syncthreads();
  if (longest <= 8 * kParts)
    sum_segments<8>(segments, longest);
  else
    sum_segments<16>(segments, longest);
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
  out.must_search = out.jumped = 0;
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
  if (is_idle(s.needed)) return;
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
  if (s.state->fault == 0 && s.state->unlinkable == 0) sum_all_segments(s, int64_t(blockIdx.x - 1) * kAtomsAtOnce);
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
  if (!few_rows)
    scan_counts(s.row_counts, s.num_atoms, s.partial_sums, s.offsets, &s.state->longest_row, s.needed, stream);
  const int64_t blocks = s.segments == nullptr ? 1 : 1 + blocks_for(s.num_atoms, kAtomsAtOnce);
  DIFFNL_LAUNCH(finish_count<T>, blocks, kThreads, stream, s, few_rows);
}

void mark_end_of_count(GpuStream stream) {
  check_call(hipEventRecord(event_of_thread(), static_cast<hipStream_t>(stream)), "hipEventRecord");
}

void wait_quietly(GpuStream stream) { (void)hipStreamSynchronize(static_cast<hipStream_t>(stream)); }

void wait_for_summary() { check_call(hipEventSynchronize(event_of_thread()), "the search"); }

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

#define DIFFNL_INSTANTIATE(T)                                \
  template void count_pairs(const GpuSearch<T>&, GpuStream); \
  template int64_t pairs_in_device_memory<T>();
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
