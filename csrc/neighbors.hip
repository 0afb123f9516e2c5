// The fill of the search on a GPU: the second sink of the traversal in traverse_gpu.h.
//
// Reads the words that the count has kept, or tests again where there was no room for them; turns the bit matrix,
// 32 x 32 bits at a time; and waves write its columns as rows of the list.
//
// Links (neighbors_gpu.h): the rank of the reverse pair (c, home, -S) in row c is the number of pairs of row c in
// earlier bins of its stencil, which is an exclusive sum over its segments, plus the number of bits below in its
// word.

#include "padding_gpu.h"
#include "traverse_gpu.h"

namespace diffnl {

namespace {

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
      if (out.mapping != nullptr) {
        out.mapping[p + lane] = i.index;
        out.mapping[out.num_pairs + p + lane] = j.index();
      }
      if (out.links != nullptr)
        out.links[p + lane] =
            Link::make(j.index(), near.rank[t] + __popc(near.hits[t] & ((1u << a) - 1)), S.s0, S.s1, S.s2);
    }
    if (out.mapping == nullptr) return;
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

template <typename T>
__device__ inline Padding padding_of(const GpuSearch<T>& s) {
  return {s.num_pairs, s.capacity, s.num_atoms, s.cutoff};
}

template <typename T>
__global__ __launch_bounds__(kThreads) void pad_list(GpuSearch<T> s, GpuPairs<T> out) {
  pad_slots(padding_of(s), out);
}

// Memory behind the pairs, up to `room`, belongs to tensors of the user, who may save them: zeros, not what
// happened to be there.
template <typename T>
__device__ inline void clear_spare(const GpuPairs<T>& out, int64_t room) {
  const int64_t thread = int64_t(blockIdx.x) * kSearchThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kSearchThreads;
  for (int64_t k = 2 * out.num_pairs + thread; k < 2 * room; k += step) out.mapping[k] = 0;
  for (int64_t k = 3 * out.num_pairs + thread; k < 3 * room; k += step) {
    out.shifts[k] = 0;
    out.vectors[k] = 0;
  }
}

// Unless `room` is negative, the number of pairs has to be read here, and nothing is written where they exceed it.
template <typename T>
__global__ DIFFNL_LAUNCH_BOUNDS(kSearchThreads, 7) void fill_bins(GpuSearch<T> s, GpuPairs<T> out, int64_t room) {
  __shared__ Home<T> home;
  __shared__ Candidates near;
  __shared__ Rows<T> rows;
  if (room >= 0) {
    if (is_idle(s.needed)) return;
    // Vectors that are still to come belong to a list that is still to be sorted.
    if (s.capacity >= 0 && out.vectors != nullptr) pad_slots(padding_of(s), out);
    if (has_failed(s)) return;
    const int64_t num_pairs = s.offsets[s.num_atoms];
    if (s.capacity < 0) out.num_pairs = num_pairs;
    if (!is_linkable(s)) out.links = nullptr;
    if (s.state->fault != 0 || s.state->abandoned != 0 || num_pairs > room) return;
    if (s.capacity < 0) clear_spare(out, room);
  }
  const uint32_t num_bins = s.state->num_bins, shares = shares_of_bins(num_bins);
  FillSink<T> sink{s, home, near, rows, out, {0, 1}};
  for (uint32_t u = blockIdx.x; u < num_bins * shares; u += gridDim.x) {
    sink.share = {u % shares, shares};
    traverse_bin(s, s.bins[u / shares], home, near, sink);
  }
}

}  // namespace

template <typename T>
void fill_pairs(const GpuSearch<T>& s, uint32_t num_bins, const GpuPairs<T>& out, GpuStream stream) {
  if (out.num_pairs == 0) return;
  const int64_t blocks = blocks_in_turns(int64_t(num_bins) * shares_of_bins(num_bins), 1, kSearchThreads);
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
  DIFFNL_LAUNCH(pad_list<T>, blocks_in_turns(s.capacity, kThreads, kThreads), kThreads, stream, s, out);
}

#define DIFFNL_INSTANTIATE(T)                                                                        \
  template void fill_pairs(const GpuSearch<T>&, uint32_t, const GpuPairs<T>&, GpuStream);            \
  template void fill_pairs_if_they_fit(const GpuSearch<T>&, int64_t, const GpuPairs<T>&, GpuStream); \
  template void pad_pairs(const GpuSearch<T>&, const GpuPairs<T>&, GpuStream);
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
