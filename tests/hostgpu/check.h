// What the tests of the host shim share.
#pragma once

#include <hip/hip_runtime.h>

#include <cstdio>
#include <cstdlib>

inline int failures = 0;

#define CHECK(...)                                                          \
  do {                                                                      \
    if (!(__VA_ARGS__)) {                                                   \
      ++failures;                                                           \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
    }                                                                       \
  } while (false)

inline void set_order(const char* order) { setenv("HOSTGPU_ORDER", order, 1); }

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  hipLaunchKernelGGL(kernel, dim3(blocks), dim3(threads), 0, nullptr, arguments...);
  CHECK(hipGetLastError() == hipSuccess);
}

// Kernels that must end the program do; in test_shim_ends.cpp.
void test_ends();
