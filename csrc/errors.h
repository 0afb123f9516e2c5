// Errors that only the data can reveal. C++ names the fault and its numbers; diffnl/_validate.py knows the
// words for it. The text stays readable for programs that have no Python around them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace diffnl {

// `code` is a key of diffnl._validate.DATA_ERRORS; `a` and `b` are the numbers its message needs.
[[noreturn]] inline void data_error(const char* code, int64_t a = 0, int64_t b = 0) {
  throw std::runtime_error(std::string("diffnl: ") + code + " " + std::to_string(a) + " " + std::to_string(b));
}

// A call of an operator that would read outside its tensors. Plain strings: torch's macros for this build their
// text with streams, which crash where the compiler's C++ library is not the one that Python has loaded.
inline void require(bool holds, const char* what, const char* about = "") {
  if (!holds) throw std::runtime_error(std::string("diffnl: ") + what + about);
}

}  // namespace diffnl
