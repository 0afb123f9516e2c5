// Exclusive sums of counts: where the atoms of a slot begin, where a row of the list begins.

#include "gpu.h"
#include "neighbors_gpu.h"
#include "part.h"

// Whose headers and runtime the kernels were compiled with.
#if defined(DIFFNL_CUDA)
DIFFNL_NOTE(diffnl_toolkit, "diffnl toolkit;CUDA " DIFFNL_TEXT(CUDART_VERSION))
#elif !defined(DIFFNL_HOSTGPU)
DIFFNL_NOTE(diffnl_toolkit,
            "diffnl toolkit;HIP " DIFFNL_TEXT(HIP_VERSION_MAJOR) "." DIFFNL_TEXT(HIP_VERSION_MINOR))
#endif

namespace diffnl {

namespace {

constexpr int64_t kScanBlock = int64_t(kThreads) * kScanItems;

struct Sum {
  __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return a + b; }
};

struct Max {
  __device__ unsigned operator()(unsigned a, unsigned b) const { return std::max(a, b); }
};

// partial_sums[block] = sum of one block's counts.
__global__ __launch_bounds__(kThreads) void sum_counts(const uint32_t* counts, int64_t size,
                                                       uint64_t* partial_sums, uint32_t* largest,
                                                       const unsigned* needed) {
  if (is_idle(needed)) return;
  const int64_t first = int64_t(blockIdx.x) * kScanBlock;
  unsigned long long sum = 0;
  unsigned most = 0;
  for (int64_t k = first + threadIdx.x; k < std::min(first + kScanBlock, size); k += kThreads) {
    sum += counts[k];
    most = std::max(most, counts[k]);
  }
  sum = block_reduce<kThreads>(sum, Sum());
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = sum;
  if (largest == nullptr) return;
  most = block_reduce<kThreads>(most, Max());
  if (threadIdx.x == 0 && most > 0) atomicMax(largest, most);
}

// Each block adds up the sums of the blocks before it by itself: they are few.
template <typename Offset>
__global__ __launch_bounds__(kThreads) void scan_block(const uint32_t* counts, int64_t size,
                                                       const uint64_t* partial_sums, Offset* offsets,
                                                       const unsigned* needed) {
  __shared__ uint64_t shared_before;
  if (is_idle(needed)) return;
  unsigned long long sum = 0;
  for (unsigned k = threadIdx.x; k < blockIdx.x; k += kThreads) sum += partial_sums[k];
  sum = block_reduce<kThreads>(sum, Sum());
  if (threadIdx.x == 0) shared_before = sum;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kScanBlock, end = std::min(first + kScanBlock, size);
  const unsigned long long last =
      scan_in_block<kThreads>(counts + first, end - first, shared_before, offsets + first);
  if (threadIdx.x == 0 && end == size) offsets[size] = static_cast<Offset>(last);
}

}  // namespace

int64_t partial_sums_for(int64_t size) { return blocks_for(size, kScanBlock); }

template <typename Offset>
void scan_counts(const uint32_t* counts, int64_t size, uint64_t* partial_sums, Offset* offsets, uint32_t* largest,
                 const unsigned* needed, GpuStream stream) {
  const int64_t blocks = partial_sums_for(size);
  DIFFNL_LAUNCH(sum_counts, blocks, kThreads, stream, counts, size, partial_sums, largest, needed);
  DIFFNL_LAUNCH(scan_block<Offset>, blocks, kThreads, stream, counts, size, partial_sums, offsets, needed);
}

template void scan_counts(const uint32_t*, int64_t, uint64_t*, uint32_t*, uint32_t*, const unsigned*, GpuStream);
template void scan_counts(const uint32_t*, int64_t, uint64_t*, int64_t*, uint32_t*, const unsigned*, GpuStream);

}  // namespace diffnl
