// Tests of the host shim itself: what the tests of the GPU kernels take for granted when they run on a CPU.
// Ends with 1 when a check fails.
#include <chrono>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace {

using hostgpu::kWave;

constexpr unsigned kMaxThreads = 1024;
const std::vector<unsigned> kBlockSizes = {1, 31, 32, 40, 64, 100, 256, 1000, 1024};
const char* const kOrders[] = {"forward", "reverse", "1", "2", "3"};

// ---------------------------------------------------------------------------------------- barriers

// Each value moves on by one thread in each phase, and grows by one.
__global__ void rotate(int* out, int phases) {
  __shared__ int tile[kMaxThreads];
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  tile[t] = static_cast<int>(10000 * gridDim.x + 1000 * blockIdx.x) + t;
  for (int phase = 0; phase < phases; ++phase) {
    __syncthreads();
    const int value = tile[(t + n - 1) % n];
    __syncthreads();
    tile[t] = value + 1;
  }
  out[int(blockIdx.x) * n + t] = tile[t];
}

void test_barriers() {
  for (unsigned n : kBlockSizes) {
    std::vector<int> out(3 * n, -1);
    run(rotate, 3, n, out.data(), 7);
    for (unsigned b = 0; b < 3; ++b)
      for (unsigned t = 0; t < n; ++t)
        CHECK(out[b * n + t] == static_cast<int>(30000 + 1000 * b + (t + 7 * n - 7 % n) % n) + 7);
  }
}

// Thread t takes part in t % 4 barriers and returns; counts[k] = threads that were there before barrier k opened.
__global__ void leave_early(int* counts) {
  __shared__ int arrivals[4];
  if (threadIdx.x < 4) arrivals[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned k = 0; k < threadIdx.x % 4; ++k) {
    atomicAdd(&arrivals[k], 1);
    __syncthreads();
    counts[k] = arrivals[k];
  }
}

void test_early_exits() {
  int counts[4] = {0, 0, 0, 0};
  run(leave_early, 1, 1000, static_cast<int*>(counts));
  CHECK(counts[0] == 750 && counts[1] == 500 && counts[2] == 250 && counts[3] == 0);
}

// The last to leave must open the barrier for those that wait.
__global__ void leave_last(unsigned stays, int* out) {
  if (threadIdx.x != stays) return;
  __syncthreads();
  hostgpu::wave_sync();
  *out = static_cast<int>(threadIdx.x);
}

void test_exit_opens_barrier() {
  for (unsigned stays : {0u, 63u}) {
    int out = -1;
    run(leave_last, 1, 64, stays, &out);
    CHECK(out == static_cast<int>(stays));
  }
}

// Sum over a block: by shuffles among 32 lanes, then through shared memory.
template <typename T>
__global__ void block_sum(const T* in, T* out) {
  __shared__ T part[kMaxThreads / 32];
  T sum = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor(sum, mask, 32);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  for (unsigned half = blockDim.x / 64; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

template <typename T>
bool sums_are_exact(unsigned blocks, unsigned threads) {
  std::vector<T> in(blocks * threads), out(blocks, T(-1)), expected(blocks, T(0));
  for (size_t k = 0; k < in.size(); ++k) {
    in[k] = static_cast<T>(k * 2654435761u % 1009);
    expected[k / threads] += in[k];
  }
  run(block_sum<T>, blocks, threads, in.data(), out.data());
  return out == expected;
}

void test_block_sum() {
  for (unsigned threads : {32u, 64u, 256u, 1024u}) {
    CHECK(sums_are_exact<float>(5, threads));
    CHECK(sums_are_exact<double>(5, threads));
    CHECK(sums_are_exact<int>(5, threads));
  }
}

// ----------------------------------------------------------------------------------- wave operations

__global__ void wave_operations(unsigned leaves, uint64_t* votes, float* other, double* below, int* broadcast) {
  const unsigned t = threadIdx.x;
  if (t == leaves) return;
  votes[t] = __ballot(t % 3 == 0);
  other[t] = __shfl_xor(static_cast<float>(t), 5, 32);
  below[t] = __shfl_up(static_cast<double>(t), 3, 16);
  broadcast[t] = __shfl(static_cast<int>(t), 10, 8);  // lane 2 of 8
}

// A whole block but for one thread that returned. Its last wave may be partial.
void test_wave_operations() {
  for (unsigned n : kBlockSizes) {
    const unsigned leaves = n > 8 ? n - 3 : n;
    const auto there = [&](unsigned t) { return t < n && t != leaves; };
    std::vector<uint64_t> votes(n);
    std::vector<float> other(n);
    std::vector<double> below(n);
    std::vector<int> broadcast(n);
    run(wave_operations, 1, n, leaves, votes.data(), other.data(), below.data(), broadcast.data());
    for (unsigned t = 0; t < n; ++t) {
      if (!there(t)) continue;
      const unsigned wave = t / kWave * kWave;
      uint64_t expected = 0;
      for (unsigned lane = 0; lane < kWave; ++lane)
        if (there(wave + lane) && (wave + lane) % 3 == 0) expected |= uint64_t(1) << lane;
      CHECK(votes[t] == expected);
      const unsigned from_below = t % 16 < 3 ? t : t - 3, first = t / 8 * 8 + 2;
      CHECK(there(t ^ 5) ? other[t] == static_cast<float>(t ^ 5) : std::isnan(other[t]));
      CHECK(there(from_below) ? below[t] == from_below : std::isnan(below[t]));
      CHECK(broadcast[t] == (there(first) ? static_cast<int>(first) : -1));
    }
  }
}

// As in HIP 7, so that what does not compile there does not compile here.
template <const auto& size>
concept IsConstant = requires { typename std::integral_constant<int, static_cast<int>(size)>; };
constexpr int kConstant = 0;
static_assert(IsConstant<kConstant> && !IsConstant<warpSize>);

// A lane that runs ahead must not overwrite what a slower one has yet to read.
__global__ void many_shuffles(int rounds, int* errors) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  for (int k = 0; k < rounds; ++k) {
    const int from = __shfl(lane * rounds + k, (lane + k) % warpSize);
    if (from != (lane + k) % warpSize * rounds + k) atomicAdd(errors, 1);
  }
}

void test_many_shuffles() {
  int errors = 0;
  run(many_shuffles, 2, 256, 100, &errors);
  CHECK(errors == 0);
}

// ------------------------------------------------------------------------------------------ atomics

struct Numbers {
  int sum = 5;
  unsigned count = 0, low = 1u << 31, high = 0;
  unsigned long long sum64 = 1ull << 40, low64 = 1ull << 60, high64 = 0;
};

__global__ void use_atomics(Numbers* to, unsigned* places) {
  const unsigned k = blockIdx.x * blockDim.x + threadIdx.x;
  places[atomicAdd(&to->count, 1u)] = k;
  atomicAdd(&to->sum, -2);
  atomicAdd(&to->sum64, 3ull << 32);
  atomicMin(&to->low, 100 + k);
  atomicMax(&to->high, 100 + k);
  atomicMin(&to->low64, (7ull << 40) + k);
  atomicMax(&to->high64, (7ull << 40) + k);
}

void test_atomics() {
  Numbers n;
  std::vector<unsigned> places(300, ~0u), expected(300);
  run(use_atomics, 3, 100, &n, places.data());
  std::sort(places.begin(), places.end());
  std::iota(expected.begin(), expected.end(), 0u);
  CHECK(places == expected);
  CHECK(n.sum == 5 - 600 && n.count == 300 && n.low == 100 && n.high == 399);
  CHECK(n.sum64 == (1ull << 40) + 300 * (3ull << 32) && n.low64 == 7ull << 40 && n.high64 == (7ull << 40) + 299);
  unsigned old = 3;
  unsigned long long old64 = 3;
  CHECK(atomicMin(&old, 2u) == 3 && atomicMax(&old, 9u) == 2 && old == 9);
  CHECK(atomicMin(&old64, 2ull) == 3 && atomicMax(&old64, 9ull) == 2 && old64 == 9);
  CHECK(__popc(0xF000000Fu) == 8 && __popcll(0xF00000000000000Full) == 8);
}

// ----------------------------------------------------------------------------------- order and poison

// Reads what a neighbour wrote, with nothing in between to wait for it.
template <bool kWait>
__global__ void read_neighbour(int distance, int* out) {
  __shared__ int tile[kMaxThreads];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = t;
  if (kWait) hostgpu::wave_sync();
  const int from = t + distance;
  out[t] = from < 0 || from >= kWave ? from : tile[from];
}

template <bool kWait>
int wrong_reads(const char* order, int distance) {
  set_order(order);
  std::vector<int> out(kWave);
  run(read_neighbour<kWait>, 1, kWave, distance, out.data());
  int wrong = 0;
  for (int t = 0; t < kWave; ++t) wrong += out[t] != t + distance;
  return wrong;
}

void test_races_show() {
  CHECK(wrong_reads<false>("forward", 1) == kWave - 1 && wrong_reads<false>("forward", -1) == 0);
  CHECK(wrong_reads<false>("reverse", -1) == kWave - 1 && wrong_reads<false>("reverse", 1) == 0);
  const int either = wrong_reads<false>("5", 1);
  CHECK(0 < either && either < kWave - 1);
  for (const char* order : kOrders) CHECK(wrong_reads<true>(order, 1) == 0 && wrong_reads<true>(order, -1) == 0);
}

__global__ void note_order(unsigned* count, unsigned* blocks, unsigned* threads) {
  if (threadIdx.x == 0) blocks[*count / blockDim.x] = blockIdx.x;
  threads[(*count)++] = threadIdx.x;
}

struct Observed {
  std::vector<unsigned> blocks = std::vector<unsigned>(50), threads = std::vector<unsigned>(50 * 40);
  bool operator==(const Observed&) const = default;
};

Observed observe(const char* order) {
  set_order(order);
  Observed seen;
  unsigned count = 0;
  run(note_order, 50, 40, &count, seen.blocks.data(), seen.threads.data());
  return seen;
}

void test_orders() {
  Observed up = observe("forward"), down = observe("reverse"), any = observe("17");
  CHECK(std::is_sorted(up.blocks.begin(), up.blocks.end()) &&
        std::is_sorted(up.threads.begin(), up.threads.begin() + 40));
  std::reverse(down.blocks.begin(), down.blocks.end());
  std::reverse(down.threads.begin(), down.threads.end());
  CHECK(down == up);
  CHECK(any == observe("17") && any.blocks != up.blocks && any.blocks != observe("18").blocks);
  CHECK(!std::equal(any.threads.begin(), any.threads.begin() + 40, any.threads.begin() + 40));  // block by block
  std::sort(any.blocks.begin(), any.blocks.end());
  for (auto first = any.threads.begin(); first != any.threads.end(); first += 40) std::sort(first, first + 40);
  CHECK(any == up);
}

template <typename T>
__device__ bool found_poison() {
  __shared__ T tile[3];
  bool poisoned = true;
  for (T& value : tile) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&value);
    for (size_t k = 0; k < sizeof(T); ++k) poisoned = poisoned && bytes[k] == 0xFF;
    value = T(1);
  }
  return poisoned;
}

__global__ void look_for_poison(int* found) {
  __shared__ short plain;
  *found += found_poison<float>() && found_poison<double>() && found_poison<char>() && plain == -1;
  plain = 0;
}

void test_poison() {
  int found = 0;
  run(look_for_poison, 10, 1, &found);
  CHECK(found == 10);
  void* memory = nullptr;
  CHECK(hipHostMalloc(&memory, 1000, hipHostMallocPortable | hipHostMallocMapped) == hipSuccess);
  const unsigned char* bytes = static_cast<unsigned char*>(memory);
  CHECK(std::all_of(bytes, bytes + 1000, [](unsigned char byte) { return byte == 0xFF; }));
  std::free(memory);
}

// -------------------------------------------------------------------------------------------- host

void test_two_os_threads() {
  int wrong[2] = {0, 0};
  const auto work = [&](int k) {
    for (int repeat = 0; repeat < 50; ++repeat)
      wrong[k] += !(k == 0 ? sums_are_exact<double>(20, 256) : sums_are_exact<float>(40, 128));
  };
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  CHECK(wrong[0] == 0 && wrong[1] == 0);
}

__global__ void count_threads(unsigned* count) { atomicAdd(count, 1u); }

void test_launch_errors() {
  unsigned count = 0;
  const auto error_of = [&](unsigned blocks, unsigned threads) {
    hipLaunchKernelGGL(count_threads, dim3(blocks), dim3(threads), 0, nullptr, &count);
    std::thread([] { CHECK(hipGetLastError() == hipSuccess); }).join();  // each OS thread has its own
    return hipGetLastError();
  };
  CHECK(error_of(0, 32) == hipErrorInvalidConfiguration);
  CHECK(error_of(1, 0) == hipErrorInvalidConfiguration);
  CHECK(error_of(1, 1025) == hipErrorInvalidConfiguration);
  CHECK(error_of(1u << 23, 512) == hipErrorInvalidConfiguration);
  CHECK(count == 0);
  CHECK(hipGetLastError() == hipSuccess);
  CHECK(error_of(2, 1024) == hipSuccess && count == 2048);
  CHECK(std::string(hipGetErrorString(hipErrorInvalidConfiguration)) == "invalid configuration argument");
}

void test_host_functions() {
  unsigned char from[4] = {1, 2, 3, 4}, to[4] = {9, 9, 9, 9};
  CHECK(hipMemcpyAsync(to, from, 3, hipMemcpyDeviceToHost, nullptr) == hipSuccess);
  CHECK(to[0] == 1 && to[2] == 3 && to[3] == 9);
  CHECK(hipMemsetAsync(to + 1, 7, 3, nullptr) == hipSuccess && to[0] == 1 && to[1] == 7 && to[3] == 7);
  CHECK(hipMemcpyAsync(nullptr, nullptr, 0, hipMemcpyDeviceToDevice, nullptr) == hipSuccess);
  CHECK(hipMemsetAsync(nullptr, 0, 0, nullptr) == hipSuccess && hipStreamSynchronize(nullptr) == hipSuccess);
  int device = -1, multiprocessors = 0;
  size_t free = 0, total = 0;
  CHECK(hipGetDevice(&device) == hipSuccess && device == 0);
  CHECK(hipDeviceGetAttribute(&multiprocessors, hipDeviceAttributeMultiprocessorCount, 0) == hipSuccess);
  CHECK(multiprocessors == 2);
  CHECK(hipMemGetInfo(&free, &total) == hipSuccess && free > 0 && free <= total && total > size_t(1) << 28);
}

// ------------------------------------------------------------------------------------------- speed

__global__ void only_barriers(int rounds) {
  for (int k = 0; k < rounds; ++k) __syncthreads();
}

template <typename Work>
double seconds(const Work& work) {
  work();
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print_speed() {
  unsigned count = 0;
  const double per_barrier_256 = seconds([] { run(only_barriers, 10, 256, 1000); }) / (10 * 1000 * 256);
  const double per_barrier_1024 = seconds([] { run(only_barriers, 10, 1024, 250); }) / (10 * 250 * 1024);
  const double per_thread = seconds([&] { run(count_threads, 10000, 256, &count); }) / (10000 * 256);
  const double per_launch = seconds([&] {
                              for (int k = 0; k < 10000; ++k) run(count_threads, 1, 1, &count);
                            }) /
                            10000;
  std::printf(
      "%.0f million barriers a second (blocks of 256), %.0f million (1024); %.1f ns a thread without barriers, "
      "%.0f ns a launch\n",
      1e-6 / per_barrier_256, 1e-6 / per_barrier_1024, 1e9 * per_thread, 1e9 * per_launch);
}

}  // namespace

int main() {
  for (const char* order : kOrders) {
    set_order(order);
    test_barriers();
    test_early_exits();
    test_exit_opens_barrier();
    test_block_sum();
    test_wave_operations();
    test_many_shuffles();
    test_atomics();
    test_poison();
    test_two_os_threads();
  }
  test_races_show();
  test_orders();
  test_launch_errors();
  test_host_functions();
  test_ends();
  set_order("forward");
  print_speed();
  std::printf("waves of %d: %s\n", kWave, failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
