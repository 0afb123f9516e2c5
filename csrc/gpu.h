// What differs between AMD, NVIDIA and the host shim of the tests, and what the kernels share: launching, waves,
// sums over a block. Nothing here or in the kernels assumes a wave width.
#pragma once

#if defined(DIFFNL_CUDA)
#include "hip_on_cuda.h"
#else
#include <hip/hip_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "pair_geometry.h"

namespace diffnl {

// ------------------------------------------------------------------------------------------ vendors

#if defined(DIFFNL_HOSTGPU)
#define DIFFNL_UNROLL(count)
#else
#define DIFFNL_PRAGMA(text) _Pragma(#text)
#define DIFFNL_UNROLL(count) DIFFNL_PRAGMA(unroll count)
#endif

// Bounds of a kernel, and how many of its blocks should find registers on a multiprocessor of NVIDIA. AMD's
// compiler reads the second number differently, and chooses well by itself.
#if defined(DIFFNL_CUDA)
#define DIFFNL_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#define DIFFNL_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads)
#endif

// Threads of a wave, known to the compiler, which warpSize is not: CUDA's is a variable, HIP 7's an object. AMD's
// gfx9 has waves of 64, everything newer and NVIDIA of 32. HIP's compilers take the source once more for the host,
// where no architecture is defined: what is said there decides nothing.
__device__ inline constexpr int wave_width() {
#if defined(__GFX9__)
  return 64;
#else
  return 32;
#endif
}

// Bit l: the predicate of lane l. All lanes of the wave call it.
__device__ inline uint64_t wave_ballot(bool predicate) {
#if defined(DIFFNL_CUDA)
  return __ballot_sync(0xffffffffu, predicate);
#else
  return __ballot(predicate);
#endif
}

// Makes what the lanes of a wave wrote to shared memory visible to each other.
__device__ inline void wave_sync() {
#if defined(DIFFNL_CUDA)
  __syncwarp();
#elif defined(DIFFNL_HOSTGPU)
  hostgpu::wave_sync();
#else
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
#endif
}

// The value of the lane whose number differs in the bits of `mask`, which stay below `width`.
template <typename T>
__device__ inline T lane_xor(T value, int mask, int width) {
#if defined(DIFFNL_CUDA)
  return __shfl_xor_sync(0xffffffffu, value, mask, width);
#else
  return __shfl_xor(value, mask, width);
#endif
}

// The value of the lane `distance` below, or the own one where there is none.
template <typename T>
__device__ inline T lane_below(T value, int distance) {
#if defined(DIFFNL_CUDA)
  return __shfl_up_sync(0xffffffffu, value, distance);
#else
  return __shfl_up(value, distance, wave_width());
#endif
}

template <typename T>
__device__ inline T lane_value(T value, int lane) {
#if defined(DIFFNL_CUDA)
  return __shfl_sync(0xffffffffu, value, lane);
#else
  return __shfl(value, lane, wave_width());
#endif
}

__device__ inline double min_over_wave(double value) {
  for (int mask = 1; mask < wave_width(); mask *= 2) value = std::min(value, lane_xor(value, mask, wave_width()));
  return value;
}

__device__ inline double max_over_wave(double value) { return -min_over_wave(-value); }

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % wave_width(); }
__device__ inline int wave_of_thread() { return static_cast<int>(threadIdx.x) / wave_width(); }

// ---------------------------------------------------------------------------------------- launching

constexpr int kThreads = 256;  // a block of the kernels that have no reason for another number

// Launches cost more than they do where atoms and systems are few: one block takes all steps.
constexpr int64_t kSmall = 2048;
constexpr int kSmallThreads = 512;

// How many blocks of so many threads one launch can have: AMD counts the threads of a launch in 32 bits, NVIDIA
// its blocks in 31.
inline int64_t most_blocks(int64_t threads) {
#if defined(DIFFNL_CUDA)
  (void)threads;
  return INT32_MAX;
#elif defined(DIFFNL_HOSTGPU)
  return hostgpu::most_threads() / threads;
#else
  return std::min<int64_t>(INT32_MAX, UINT32_MAX / threads);
#endif
}

inline int64_t blocks_for(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The same for kernels whose blocks take more of the work when they are done: fewer blocks do where not all fit.
inline int64_t blocks_in_turns(int64_t size, int64_t block, int64_t threads) {
  return std::min(blocks_for(size, block), most_blocks(threads));
}

[[noreturn]] inline void launch_error(const char* kernel, const std::string& what) {
  throw std::runtime_error(std::string("diffnl: the kernel `") + kernel + "` " + what);
}

// HIP's runtime keeps the last error of the host thread, whoever made it, until somebody asks. One that is there
// before a launch is not the launch's: it is told as what it is, once. "Not ready" is an answer, not an error.
// CUDA's runtime is linked into this library, so nobody else's errors are in it, and ours were told when they were
// made.
inline unsigned grid_of_launch(const char* kernel, int64_t blocks, int64_t threads) {
  if (blocks > most_blocks(threads))
    launch_error(kernel, "takes " + std::to_string(blocks) + " blocks, and this device " +
                             std::to_string(most_blocks(threads)) + " at once: the input is too large");
#if !defined(DIFFNL_CUDA)
  const hipError_t earlier = hipGetLastError();
  if (earlier != hipSuccess && earlier != hipErrorNotReady)
    launch_error(kernel, std::string("was not launched: an earlier GPU operation of this program had failed: ") +
                             hipGetErrorString(earlier));
#endif
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* kernel) {
  const hipError_t error = hipGetLastError();
  if (error != hipSuccess) launch_error(kernel, std::string("could not be launched: ") + hipGetErrorString(error));
}

inline void check_call(hipError_t error, const char* what) {
  if (error == hipSuccess) return;
  (void)hipGetLastError();  // told here: the next launch must not find it
  throw std::runtime_error(std::string("diffnl: ") + what + " failed: " + hipGetErrorString(error));
}

// A macro, because the message names the kernel. A kernel with two template arguments comes in parentheses.
#define DIFFNL_LAUNCH(kernel, blocks, threads, stream, ...)                                      \
  do {                                                                                           \
    hipLaunchKernelGGL(kernel, dim3(grid_of_launch(#kernel, blocks, threads)), dim3(threads), 0, \
                       static_cast<hipStream_t>(stream), __VA_ARGS__);                           \
    check_launch(#kernel);                                                                       \
  } while (false)

// ------------------------------------------------------------------------------------- whole blocks

// Narrowest wave there is: bounds the number of waves in a block at compile time.
constexpr int kNarrowestWave = 32;

// Exclusive sum over the threads of a block, in order; `total` gets the sum. `kThreads` is the size of the block.
template <int kThreads, typename T>
__device__ inline T block_exclusive_sum(T value, T& total) {
  __shared__ T sum_of_wave[kThreads / kNarrowestWave];
  T sum = value;
  for (int distance = 1; distance < wave_width(); distance *= 2) {
    const T below = lane_below(sum, distance);
    if (lane_of_thread() >= distance) sum += below;
  }
  if (lane_of_thread() == wave_width() - 1) sum_of_wave[wave_of_thread()] = sum;
  __syncthreads();
  T before = 0;
  total = 0;
  for (int wave = 0; wave < kThreads / wave_width(); ++wave) {
    if (wave < wave_of_thread()) before += sum_of_wave[wave];
    total += sum_of_wave[wave];
  }
  __syncthreads();
  return before + sum - value;
}

// Whether this is the last block of its kernel to get here: it then sees all that the others wrote before. A step
// that needs all of a kernel's work, and one block for its own, so does without a launch. `arrivals` is 0 before.
__device__ inline bool is_last_block(unsigned* arrivals) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

constexpr int kScanItems = 8;  // consecutive numbers a thread adds up in a scan

template <typename V>
struct alignas(16) ScanItems {
  V of[kScanItems];
};

// counts[first .. first + kScanItems), zeros beyond `size`. `first` is a multiple of kScanItems.
__device__ inline ScanItems<uint32_t> load_items(const uint32_t* counts, int64_t first, int64_t size) {
  if (first + kScanItems <= size) return reinterpret_cast<const ScanItems<uint32_t>*>(counts + first)[0];
  ScanItems<uint32_t> items;
  DIFFNL_UNROLL(kScanItems)
  for (int u = 0; u < kScanItems; ++u) items.of[u] = first + u < size ? counts[first + u] : 0;
  return items;
}

template <typename V>
__device__ inline void store_items(V* out, int64_t first, int64_t size, const ScanItems<V>& items) {
  if (first + kScanItems <= size) {
    reinterpret_cast<ScanItems<V>*>(out + first)[0] = items;
    return;
  }
  DIFFNL_UNROLL(kScanItems)
  for (int u = 0; u < kScanItems; ++u)
    if (first + u < size) out[first + u] = items.of[u];
}

// Exclusive sum of counts[0 .. size) by all threads of one block, starting at `before`; returns where it ends.
// `largest`, unless null, is raised to the largest count. Both arrays begin at multiples of 16 bytes.
template <int kBlock, typename Offset>
__device__ inline unsigned long long scan_in_block(const uint32_t* counts, int64_t size, unsigned long long before,
                                                   Offset* offsets, uint32_t* largest = nullptr) {
  constexpr int64_t kStep = int64_t(kBlock) * kScanItems;
  unsigned most = 0;
  int64_t k = int64_t(threadIdx.x) * kScanItems;
  ScanItems<uint32_t> next = load_items(counts, k, size);
  for (int64_t first = 0; first < size; first += kStep, k += kStep) {
    const ScanItems<uint32_t> count = next;
    next = load_items(counts, k + kStep, size);  // on its way while these are added up
    unsigned long long own = 0, total;
    DIFFNL_UNROLL(kScanItems)
    for (int u = 0; u < kScanItems; ++u) {
      own += count.of[u];
      most = std::max(most, count.of[u]);
    }
    unsigned long long sum = before + block_exclusive_sum<kBlock>(own, total);
    ScanItems<Offset> items;
    DIFFNL_UNROLL(kScanItems)
    for (int u = 0; u < kScanItems; ++u) {
      items.of[u] = static_cast<Offset>(sum);
      sum += count.of[u];
    }
    store_items(offsets, k, size, items);
    before += total;
  }
  if (largest != nullptr && most > 0) atomicMax(largest, most);
  return before;
}

// The same from 0 on, and the sum of all behind them: offsets (size + 1,).
template <int kBlock, typename Offset>
__device__ inline void scan_by_one_block(const uint32_t* counts, int64_t size, Offset* offsets,
                                         uint32_t* largest = nullptr) {
  const unsigned long long last = scan_in_block<kBlock>(counts, size, 0, offsets, largest);
  if (threadIdx.x == 0) offsets[size] = static_cast<Offset>(last);
}

constexpr int64_t kFewCounts = 16384;  // that one block scans faster than several would with another launch

// combine(a, b) over all threads of a block, in an order that depends on kThreads alone, not on the width of a
// wave. The result is there in thread 0.
template <int kThreads, typename T, typename Combine>
__device__ inline T block_reduce(T value, const Combine& combine) {
  __shared__ T of_wave[kThreads / kNarrowestWave];
  for (int mask = 1; mask < kNarrowestWave; mask *= 2)
    value = combine(value, lane_xor(value, mask, kNarrowestWave));
  const int part = static_cast<int>(threadIdx.x) / kNarrowestWave;
  if (static_cast<int>(threadIdx.x) % kNarrowestWave == 0) of_wave[part] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int other = 1; other < kThreads / kNarrowestWave; ++other) value = combine(value, of_wave[other]);
  __syncthreads();
  return value;
}

// The sums of each of kCount numbers over the threads of a block, in the same order; number c is there in thread
// c. Threads from `used` on hold zeros.
template <int kThreads, int kCount>
__device__ inline double block_sums(double (&values)[kCount], int used = kThreads) {
  __shared__ double of_wave[kCount][kThreads / kNarrowestWave];
  const int thread = static_cast<int>(threadIdx.x), part = thread / kNarrowestWave;
  // Pairs of parts: waves of 64 stay whole.
  const int parts =
      std::min((used + 2 * kNarrowestWave - 1) / (2 * kNarrowestWave) * 2, kThreads / kNarrowestWave);
  if (part < parts) {
    DIFFNL_UNROLL(kCount)
    for (int c = 0; c < kCount; ++c) {
      for (int mask = 1; mask < kNarrowestWave; mask *= 2) values[c] += lane_xor(values[c], mask, kNarrowestWave);
      if (thread % kNarrowestWave == 0) of_wave[c][part] = values[c];
    }
  }
  __syncthreads();
  double sum = 0.0;
  if (thread < kCount)
    for (int other = 0; other < parts; ++other)
      sum = other == 0 ? of_wave[thread][0] : sum + of_wave[thread][other];
  __syncthreads();
  return sum;
}

// ------------------------------------------------------------------------------- ranges by atomics

// Doubles as integers of the same order.
__device__ inline uint64_t ordered_bits(double value) {
  union {
    double number;
    uint64_t bits;
  } u;
  u.number = value;
  return u.bits >> 63 != 0 ? ~u.bits : u.bits | uint64_t(1) << 63;
}

__device__ inline double from_ordered_bits(uint64_t bits) {
  union {
    uint64_t bits;
    double number;
  } u;
  u.bits = bits >> 63 != 0 ? bits & ~(uint64_t(1) << 63) : ~bits;
  return u.number;
}

__device__ inline uint64_t look_at(const uint64_t& bound) {
  return *static_cast<const volatile uint64_t*>(&bound);
}

// `seen` is what the bound was a moment ago: most atoms move no bound.
__device__ inline void lower_to(uint64_t* bound, uint64_t seen, double value) {
  const uint64_t bits = ordered_bits(value);
  if (bits < seen) atomicMin(reinterpret_cast<unsigned long long*>(bound), bits);
}

__device__ inline void raise_to(uint64_t* bound, uint64_t seen, double value) {
  const uint64_t bits = ordered_bits(value);
  if (bits > seen) atomicMax(reinterpret_cast<unsigned long long*>(bound), bits);
}

// ------------------------------------------------------------------------------------------ memory

// Writes one triple of each lane of a wave, the one of `place` 0 first, to out[0 .. 3 count), if its place is
// below `count`. Through shared memory, so that the lanes write consecutive words; `stage` holds 3 words a lane of
// this wave. All lanes call it, each with another place.
template <typename W>
__device__ inline void store_triples_at(W* out, int place, int count, W x, W y, W z, W* stage) {
  stage[3 * place] = x;
  stage[3 * place + 1] = y;
  stage[3 * place + 2] = z;
  wave_sync();
  DIFFNL_UNROLL(3)
  for (int k = 0; k < 3; ++k) {
    const int word = lane_of_thread() + k * wave_width();
    if (word < 3 * count) out[word] = stage[word];
  }
  wave_sync();
}

// The triples of the first `count` lanes.
template <typename W>
__device__ inline void store_triples(W* out, int count, W x, W y, W z, W* stage) {
  store_triples_at(out, lane_of_thread(), count, x, y, z, stage);
}

template <typename T>
__device__ inline Vec3<T> load_triple(const T* from) {
  return {from[0], from[1], from[2]};
}

template <typename T>
__device__ inline Vec3<T> translation(const T* h, T s0, T s1, T s2) {
  return {cell_translation(s0, s1, s2, h, 0), cell_translation(s0, s1, s2, h, 1),
          cell_translation(s0, s1, s2, h, 2)};
}

}  // namespace diffnl
