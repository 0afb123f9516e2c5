// What ends the program: kernels that a GPU would not run, and that the host shim must not let pass.
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "check.h"

namespace {

using hostgpu::kWave;

__global__ void two_barriers() {
  if (threadIdx.x == 5)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void two_ballots() {
  if (threadIdx.x < 2)
    __ballot(1);
  else
    __ballot(1);
}

__global__ void barrier_and_wave() {
  if (blockIdx.x == 1 && threadIdx.x % kWave == 7)
    __syncthreads();
  else
    hostgpu::wave_sync();
}

__global__ void odd_width() { __shfl_xor(1, 1, 24); }

#if defined(__SANITIZE_ADDRESS__)
__global__ void write_past_heap(int* memory) {
  __syncthreads();
  memory[threadIdx.x] = 1;
}

[[gnu::noinline]] void store(volatile int* to) { *to = 1; }

[[maybe_unused]] __global__ void write_past_locals() {
  volatile int local[4] = {0, 0, 0, 0};
  __syncthreads();
  store(local + 4);
}
#endif

// Runs `doomed` in a child, which must end abnormally and say all of `words`.
template <typename Doomed>
void expect_end(const Doomed& doomed, const std::vector<std::string>& words) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    doomed();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t size; (size = read(ends[0], buffer, sizeof(buffer))) > 0;)
    said.append(buffer, static_cast<size_t>(size));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(status != 0);
  for (const std::string& word : words)
    if (said.find(word) == std::string::npos) {
      ++failures;
      std::printf("no `%s` in the child's message: %s\n", word.c_str(), said.c_str());
    }
}

}  // namespace

void test_ends() {
  const std::string waves = std::to_string(kWave - 1) + " of the " + std::to_string(kWave) + " running threads";
  set_order("forward");
  expect_end([] { run(two_barriers, 1, 64); }, {"block 0: thread 5 is at __syncthreads in ", "two_barriers()",
                                                "while thread 0 waits", "test_shim_ends.cpp:"});
  expect_end([] { run(two_ballots, 1, 64); }, {"block 0: thread 2 is at __ballot in ", "while thread 0 waits"});
  expect_end([] { run(barrier_and_wave, 2, 128); }, {"block 1 is stuck", "thread 7 waits at __syncthreads in ",
                                                     "thread 0 waits at wave_sync in ", waves});
  expect_end([] { run(odd_width, 1, 32); }, {"width of 24"});
  expect_end([] { hipLaunchKernelGGL(odd_width, dim3(1, 2), dim3(32), 0, nullptr); }, {"one-dimensional"});
  for (const char* order : {"", "sideways", "3x"})
    expect_end([&] { set_order(order), run(odd_width, 1, 32); }, {"HOSTGPU_ORDER must be", order});
#if defined(__SANITIZE_ADDRESS__)
  std::vector<int> memory(63);
  expect_end([&] { run(write_past_heap, 1, 64, memory.data()); }, {"heap-buffer-overflow", "write_past_heap"});
#if defined(__x86_64__) && !defined(HOSTGPU_UCONTEXT)  // AddressSanitizer's swapcontext forgets what is on a stack
  expect_end([] { run(write_past_locals, 1, 64); }, {"stack-buffer-overflow", "write_past_locals"});
#endif
#endif
}
