// diffnl is one library with all schemas and the CPU backend, and one for each GPU backend, which registers
// kernels alone. Each holds notes that say what it is. diffnl/_load.py finds them in the file: before anything is
// loaded, and where nothing can be.
#pragma once

#define DIFFNL_NOTE(name, text) extern "C" [[gnu::used, gnu::visibility("hidden")]] const char name[] = text;

// The backend, its GPU architectures, the torch it was built with, and a fingerprint of the schemas: kernels and
// schemas of different sources must not meet. setup.py defines them.
#define DIFFNL_PART                                                                                            \
  DIFFNL_NOTE(diffnl_part, "diffnl part;" DIFFNL_BACKEND ";" DIFFNL_ARCHS ";" DIFFNL_TORCH ";" DIFFNL_SCHEMAS) \
  DIFFNL_OWN_SINGLE_THREADED

// libstdc++ asks this variable whether a process has one thread, and so need not count references atomically.
// glibc has it from 2.32 on. A process with torch has several, and a library that answers by itself loads with
// older ones.
#if defined(__GLIBC__)
#define DIFFNL_OWN_SINGLE_THREADED                               \
  extern "C" {                                                   \
  [[gnu::visibility("hidden")]] char __libc_single_threaded = 0; \
  }
#else
#define DIFFNL_OWN_SINGLE_THREADED
#endif

// The value of a macro as text.
#define DIFFNL_TEXT(macro) DIFFNL_TEXT_OF(macro)
#define DIFFNL_TEXT_OF(value) #value
