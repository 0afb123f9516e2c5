// Errors that only the data can reveal. C++ names the fault and its numbers; diffnl/_validate.py knows the
// words for it. The text stays readable for programs that have no Python around them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace diffnl {

// What a search can find wrong, in the order in which faults are reported.
enum class Fault : uint64_t {
  none,
  positions_not_finite,
  cell_not_finite,
  cell_singular,
  system_idx_out_of_range,
  shift_overflows,
  images_blur,
  not_linkable,  // of a padded list, whose backward cannot choose another form
  out_of_memory,
};
constexpr std::array<const char*, 9> kFaultNames = {"",
                                                    "positions_not_finite",
                                                    "cell_not_finite",
                                                    "cell_singular",
                                                    "system_idx_out_of_range",
                                                    "shift_overflows",
                                                    "images_blur",
                                                    "not_linkable",
                                                    "out_of_memory"};

// A fault and the atom or system it was found in, or the number of pairs: smaller is earlier in the order of
// kinds. As int64_t it is positive.
constexpr int kFaultBits = 56;
constexpr uint64_t pack_fault(Fault kind, uint64_t number) {
  return static_cast<uint64_t>(kind) << kFaultBits | number;
}
constexpr Fault kind_of_fault(uint64_t fault) { return static_cast<Fault>(fault >> kFaultBits); }
constexpr int64_t number_of_fault(uint64_t fault) {
  return static_cast<int64_t>(fault & ((uint64_t(1) << kFaultBits) - 1));
}

// `code` is a key of diffnl._validate.DATA_ERRORS; `a` and `b` are the numbers its message needs.
struct DataError : std::runtime_error {
  DataError(const char* what, int64_t first, int64_t second)
      : std::runtime_error(std::string("diffnl: ") + what + " " + std::to_string(first) + " " +
                           std::to_string(second)),
        code(what),
        a(first),
        b(second) {}

  // `num_pairs` of a padded list with this fault: see ops.cpp. Too many pairs to count are too many for it.
  int64_t padded_count(int64_t capacity) const {
    const auto same = [this](const char* name) { return std::strcmp(name, code) == 0; };
    const auto kind =
        static_cast<Fault>(std::find_if(kFaultNames.begin(), kFaultNames.end(), same) - kFaultNames.begin());
    const int64_t number = kind == Fault::system_idx_out_of_range ? b : a;
    if (kind == Fault::out_of_memory) return std::max(number, capacity + 1);
    return -static_cast<int64_t>(pack_fault(kind, static_cast<uint64_t>(number)));
  }

  const char* code;
  int64_t a, b;
};

[[noreturn]] inline void data_error(const char* code, int64_t a = 0, int64_t b = 0) {
  throw DataError(code, a, b);
}

// A call of an operator that would read outside its tensors. Plain strings: torch's macros for this build their
// text with streams, which crash where the compiler's C++ library is not the one that Python has loaded.
inline void require(bool holds, const char* what, const char* about = "") {
  if (!holds) throw std::runtime_error(std::string("diffnl: ") + what + about);
}

}  // namespace diffnl
