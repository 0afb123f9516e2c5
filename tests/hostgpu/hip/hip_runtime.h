// HIP on a CPU, as far as diffnl's kernels need it: so that tests can execute the GPU sources without a GPU, under
// sanitizers, for waves of 32 and of 64 lanes (-DDIFFNL_WAVE=). The machinery is in hip_runtime.cpp.
//
// hipLaunchKernelGGL runs the kernel to its end. The device runs one block at a time; launches from several OS
// threads take turns, block by block. __shared__ arrays are therefore plain statics. Each block finds them filled
// with 0xFF (NaN, or -1), as is memory from hipHostMalloc.
//
// What hardware may leave unnoticed ends the program with a message: threads that wait for others that never come,
// and threads that meet at different places. The order of the threads of a block between two meetings, and that of
// blocks, is free on hardware; the environment variable HOSTGPU_ORDER=forward|reverse|SEED sets it here.
//
// Limits and failures that no test could reach otherwise: HOSTGPU_MOST_THREADS=N is the most threads of a launch;
// HOSTGPU_FAULT lists what happens next, once each and in this order: `hipEventRecord` and `hipStreamSynchronize`
// fail when they are called, `earlier` and `busy` leave an error, or the answer "not ready", of somebody else to
// be found.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#if !defined(DIFFNL_WAVE)
#define DIFFNL_WAVE 32
#endif
static_assert(DIFFNL_WAVE == 32 || DIFFNL_WAVE == 64);

// Libraries for several wave widths can live in one process: nothing here is visible outside its library.
#pragma GCC visibility push(hidden)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// The tag becomes part of the symbol's name, which is how hip_runtime.cpp finds the arrays to fill: g++ 12 ignores
// a section attribute inside a template. `used`: the compiler must not conclude that nobody else writes to the
// array.
#define __shared__ static __attribute__((used, abi_tag("hostgpu_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// An object, as in HIP 7: its value is not a constant expression.
inline const struct {
  operator int() const noexcept { return DIFFNL_WAVE; }
} warpSize{};

// What the compiler defines for the architectures with this wave.
#if DIFFNL_WAVE == 64
#define __GFX9__ 1
#endif

using hipStream_t = struct ihipStream_t*;
using hipEvent_t = struct ihipEvent_t*;
enum hipError_t {
  hipSuccess = 0,
  hipErrorInvalidValue = 1,
  hipErrorOutOfMemory = 2,
  hipErrorInvalidConfiguration = 9,
  hipErrorNotReady = 600
};
enum hipMemcpyKind { hipMemcpyDeviceToHost = 2, hipMemcpyDeviceToDevice = 3 };
enum hipDeviceAttribute_t { hipDeviceAttributeMultiprocessorCount };
enum { hipHostMallocPortable = 1, hipHostMallocMapped = 2 };
enum { hipEventDisableTiming = 2 };

// ------------------------------------------------------------------- what hip_runtime.cpp provides

namespace hostgpu {

constexpr int kWave = DIFFNL_WAVE;  // lanes
using Site = std::source_location;  // of a call; it arrives as a default argument

// What the lanes of a wave tell each other.
struct Exchange {
  uint64_t present, votes;  // bit l: lane l takes part; its value is not zero
  uint64_t value[kWave];
};

// Returns when all lanes of the wave that have not returned have called it; good until the caller's next call.
const Exchange& exchange(uint64_t value, const char* action, const Site& site);
inline void wave_sync(Site site = Site::current()) { exchange(0, "wave_sync", site); }

// Runs call(arguments) once a thread.
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* arguments);

// The most threads of a launch: AMD's limit, or what HOSTGPU_MOST_THREADS says.
int64_t most_threads();

// Whether HOSTGPU_FAULT begins with `what`, which then fails this once.
bool fails(const char* what);

// The first lane of the own group of `width` lanes.
int group(int width, const Site& site);

// The value of lane `from`. Where that lane has returned, hardware gives anything; here it is 0xFF.
template <typename T>
T shuffle(T value, int from, const char* action, const Site& site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Exchange& all = exchange(bits, action, site);
  bits = (all.present >> from & 1) != 0 ? all.value[from] : ~uint64_t(0);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace hostgpu

hipError_t hipGetLastError();
const char* hipGetErrorString(hipError_t error);
hipError_t hipHostMalloc(void** to, size_t bytes, unsigned flags);
hipError_t hipMemGetInfo(size_t* free, size_t* total);

// ---------------------------------------------------------------------------------- on the device

void __syncthreads(hostgpu::Site site = hostgpu::Site::current());

inline unsigned long long __ballot(int predicate, hostgpu::Site site = hostgpu::Site::current()) {
  return hostgpu::exchange(predicate != 0, "__ballot", site).votes;
}

template <typename T>
T __shfl(T value, int lane, int width = hostgpu::kWave, hostgpu::Site site = hostgpu::Site::current()) {
  return hostgpu::shuffle(value, hostgpu::group(width, site) + (lane & (width - 1)), "__shfl", site);
}

// Where there is no lane to read from, both return the own value.
template <typename T>
T __shfl_up(T value, unsigned distance, int width = hostgpu::kWave,
            hostgpu::Site site = hostgpu::Site::current()) {
  const int self = static_cast<int>(threadIdx.x) % hostgpu::kWave, from = self - static_cast<int>(distance);
  return hostgpu::shuffle(value, from < hostgpu::group(width, site) ? self : from, "__shfl_up", site);
}

template <typename T>
T __shfl_xor(T value, int mask, int width = hostgpu::kWave, hostgpu::Site site = hostgpu::Site::current()) {
  const int self = static_cast<int>(threadIdx.x) % hostgpu::kWave, from = self ^ mask;
  return hostgpu::shuffle(value, from < hostgpu::group(width, site) + width ? from : self, "__shfl_xor", site);
}

// One block runs at a time, on one OS thread: nothing comes between a read and its write.
inline int atomicAdd(int* to, int value) { return std::exchange(*to, *to + value); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }
inline unsigned atomicMin(unsigned* to, unsigned value) { return std::exchange(*to, std::min(*to, value)); }
inline unsigned atomicMax(unsigned* to, unsigned value) { return std::exchange(*to, std::max(*to, value)); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return std::exchange(*to, *to + value);
}
inline unsigned long long atomicMin(unsigned long long* to, unsigned long long value) {
  return std::exchange(*to, std::min(*to, value));
}
inline unsigned long long atomicMax(unsigned long long* to, unsigned long long value) {
  return std::exchange(*to, std::max(*to, value));
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// ------------------------------------------------------------------------------------ on the host

template <typename... Parameters, typename... Arguments>
void hipLaunchKernelGGL(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, hipStream_t,
                        Arguments&&... arguments) {
  const std::pair call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto run_thread = [](const void* of) {
    const auto& [kernel, arguments] = *static_cast<decltype(&call)>(of);
    std::apply(kernel, arguments);
  };
  hostgpu::launch(grid, block, shared_bytes, run_thread, &call);
}

// Kernels have ended when their launch returns, so that nothing is left to wait for.
inline hipError_t hipStreamSynchronize(hipStream_t) {
  return hostgpu::fails("hipStreamSynchronize") ? hipErrorInvalidValue : hipSuccess;
}
enum hipStreamCaptureMode {
  hipStreamCaptureModeGlobal,
  hipStreamCaptureModeThreadLocal,
  hipStreamCaptureModeRelaxed
};
inline hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode*) { return hipSuccess; }
inline hipError_t hipEventCreateWithFlags(hipEvent_t*, unsigned) { return hipSuccess; }
inline hipError_t hipEventRecord(hipEvent_t, hipStream_t) {
  return hostgpu::fails("hipEventRecord") ? hipErrorInvalidValue : hipSuccess;
}
inline hipError_t hipEventSynchronize(hipEvent_t) { return hipSuccess; }

inline hipError_t hipMemsetAsync(void* to, int value, size_t bytes, hipStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return hipSuccess;
}

inline hipError_t hipMemcpyAsync(void* to, const void* from, size_t bytes, hipMemcpyKind, hipStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return hipSuccess;
}

inline hipError_t hipGetDevice(int* device) {
  *device = 0;
  return hipSuccess;
}

inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t, int device) {
  *value = 2;
  return device == 0 ? hipSuccess : hipErrorInvalidValue;
}

#pragma GCC visibility pop
