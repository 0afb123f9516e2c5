// diffnl is one library with all schemas and the CPU backend, and one for each GPU backend, which registers
// kernels alone. Each holds notes that say what it is. diffnl/_load.py finds them in the file: before anything is
// loaded, and where nothing can be.
#pragma once

#define DIFFNL_NOTE(name, text) extern "C" [[gnu::used, gnu::visibility("hidden")]] const char name[] = text;

// The backend, its GPU architectures, the torch it was built with, and a fingerprint of the schemas: kernels and
// schemas of different sources must not meet. setup.py defines them.
#define DIFFNL_PART \
  DIFFNL_NOTE(diffnl_part, "diffnl part;" DIFFNL_BACKEND ";" DIFFNL_ARCHS ";" DIFFNL_TORCH ";" DIFFNL_SCHEMAS)

// The value of a macro as text.
#define DIFFNL_TEXT(macro) DIFFNL_TEXT_OF(macro)
#define DIFFNL_TEXT_OF(value) #value
