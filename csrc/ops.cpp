// The operators torch sees: schemas, and the CPU backend behind them, in torch's stable ABI.
//
// Callers go through diffnl/_ops.py, which has checked shapes, dtypes and devices. What is checked here again
// only keeps a direct call of an operator from reading outside its tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "large_pages.h"
#include "neighbors_cpu.h"

namespace diffnl {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A size of -1 is free.
void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t k = 0;
  for (const int64_t size : shape) {
    same = same && (size < 0 || t.size(k) == size);
    ++k;
  }
  STD_TORCH_CHECK(same, "diffnl: `", name, "` has the wrong shape");
}

void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "diffnl: `", name, "` has the wrong dtype");
}

ScalarType floating_dtype(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "diffnl: tensors must be float32 or float64");
  return dtype;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const Tensor t = torch::stable::new_empty(like, shape, dtype);
  prefer_large_pages(t.mutable_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The (N,) int64 data of system_idx, or null. The tensor must outlive the pointer.
const int64_t* system_data(const std::optional<Tensor>& system_idx, int64_t num_atoms) {
  if (!system_idx.has_value()) return nullptr;
  check_shape(*system_idx, "system_idx", {num_atoms});
  check_dtype(*system_idx, "system_idx", ScalarType::Long);
  return data<int64_t>(*system_idx);
}

// Asking first saves a trip through the dispatcher.
Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return packed(*t);
}

// Linux grants memory that it does not have. Asking for all of it at once, without touching it, fails where
// three requests in turn would succeed and end in a killed process.
void check_memory(int64_t num_pairs, int64_t bytes) {
  if (bytes < (int64_t(1) << 26)) return;
  void* probe = std::malloc(static_cast<size_t>(bytes));
  if (probe == nullptr) data_error("out_of_memory", num_pairs);
  std::free(probe);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> search(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                          const int64_t* system_idx, double cutoff, bool full, bool sorted) {
  std::optional<Tensor> mapping, shifts, vectors;
  const auto allocate = [&](int64_t num_pairs) {
    check_memory(num_pairs, num_pairs * static_cast<int64_t>(28 + 3 * sizeof(T)));
    mapping = empty(positions, {2, num_pairs}, ScalarType::Long);
    shifts = empty(positions, {num_pairs, 3}, ScalarType::Int);
    vectors = empty(positions, {num_pairs, 3}, positions.scalar_type());
    return PairOutput<T>{mutable_data<int64_t>(*mapping), mutable_data<int32_t>(*shifts),
                         mutable_data<T>(*vectors)};
  };
  const SearchInput<T> in{data<T>(positions),
                          data<T>(cell),
                          data<bool>(pbc),
                          system_idx,
                          positions.size(0),
                          cell.size(0),
                          cutoff,
                          full,
                          sorted};
  search_cpu<T>(in, allocate);
  return {*mapping, *shifts, *vectors};
}

std::tuple<Tensor, Tensor, Tensor> neighbor_pairs(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                                  const std::optional<Tensor>& system_idx, double cutoff,
                                                  bool full, bool sorted) {
  const ScalarType dtype = floating_dtype(positions);
  check_shape(positions, "positions", {-1, 3});
  check_shape(cell, "cell", {-1, 3, 3});
  check_dtype(cell, "cell", dtype);
  check_shape(pbc, "pbc", {cell.size(0), 3});
  check_dtype(pbc, "pbc", ScalarType::Bool);
  STD_TORCH_CHECK(cell.size(0) > 0 || positions.size(0) == 0, "diffnl: atoms need a system");
  const Tensor r = packed(positions), h = packed(cell);
  const Tensor flags = packed(pbc);
  const std::optional<Tensor> systems = packed(system_idx);
  const int64_t* system = system_data(systems, r.size(0));
  return dtype == ScalarType::Float ? search<float>(r, h, flags, system, cutoff, full, sorted)
                                    : search<double>(r, h, flags, system, cutoff, full, sorted);
}

// A list the caller has, made contiguous and kept alive while a kernel reads it. Shifts are there whenever a
// cell takes part.
class HeldList {
 public:
  HeldList(const Tensor& mapping, const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx,
           int64_t num_atoms, int64_t num_systems, bool uses_cell)
      : mapping_(packed(mapping)), shifts_(packed(shifts)), system_idx_(packed(system_idx)) {
    check_shape(mapping, "mapping", {2, -1});
    check_dtype(mapping, "mapping", ScalarType::Long);
    const int64_t num_pairs = mapping.size(1);
    if (shifts_.has_value()) {
      check_shape(*shifts_, "shifts", {num_pairs, 3});
      check_dtype(*shifts_, "shifts", ScalarType::Int);
    }
    STD_TORCH_CHECK(shifts_.has_value() || !uses_cell, "diffnl: `shifts` must be given with a `cell`");
    STD_TORCH_CHECK(num_atoms >= 0 && num_systems >= 0, "diffnl: sizes must not be negative");
    STD_TORCH_CHECK(num_systems > 0 || num_pairs == 0 || !uses_cell, "diffnl: pairs need a system");
    list = {data<int64_t>(mapping_),
            shifts_.has_value() ? data<int32_t>(*shifts_) : nullptr,
            uses_cell ? system_data(system_idx_, num_atoms) : nullptr,
            num_pairs,
            num_atoms,
            num_systems};
  }

  PairList list;

 private:
  Tensor mapping_;
  std::optional<Tensor> shifts_, system_idx_;
};

Tensor pair_vectors(const Tensor& positions, const std::optional<Tensor>& cell, const Tensor& mapping,
                    const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx) {
  const ScalarType dtype = floating_dtype(positions);
  check_shape(positions, "positions", {-1, 3});
  if (cell.has_value()) {
    check_shape(*cell, "cell", {-1, 3, 3});
    check_dtype(*cell, "cell", dtype);
  }
  const Tensor r = packed(positions);
  const std::optional<Tensor> h = packed(cell);
  const HeldList held(mapping, shifts, system_idx, r.size(0), h.has_value() ? h->size(0) : 0, h.has_value());
  const Tensor vectors = empty(r, {held.list.num_pairs, 3}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    pair_vectors_cpu(held.list, data<T>(r), h.has_value() ? data<T>(*h) : nullptr, mutable_data<T>(vectors));
  };
  dtype == ScalarType::Float ? run(0.0f) : run(0.0);
  return vectors;
}

// A gradient that is not needed comes back with no rows.
std::tuple<Tensor, Tensor> pair_vectors_adjoint(const Tensor& grad, const Tensor& mapping,
                                                const std::optional<Tensor>& shifts,
                                                const std::optional<Tensor>& system_idx, int64_t num_atoms,
                                                int64_t num_systems, bool need_positions, bool need_cell) {
  const ScalarType dtype = floating_dtype(grad);
  const HeldList held(mapping, shifts, system_idx, num_atoms, num_systems, need_cell);
  check_shape(grad, "grad", {held.list.num_pairs, 3});
  const Tensor g = packed(grad);
  const Tensor grad_positions = empty(g, {need_positions ? num_atoms : 0, 3}, dtype);
  const Tensor grad_cell = empty(g, {need_cell ? num_systems : 0, 3, 3}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    pair_vectors_adjoint_cpu(held.list, data<T>(g), need_positions ? mutable_data<T>(grad_positions) : nullptr,
                             need_cell ? mutable_data<T>(grad_cell) : nullptr);
  };
  dtype == ScalarType::Float ? run(0.0f) : run(0.0);
  return {grad_positions, grad_cell};
}

// "backends;torch the library was built against;GPU architectures", lists separated by commas.
std::string build_info() { return DIFFNL_BACKENDS ";" DIFFNL_TORCH ";" DIFFNL_ARCHS; }

}  // namespace

}  // namespace diffnl

STABLE_TORCH_LIBRARY(diffnl, m) {
  m.def(
      "neighbor_pairs(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float cutoff, "
      "bool full=True, bool sorted=False) -> (Tensor mapping, Tensor shifts, Tensor vectors)");
  m.def(
      "pair_vectors(Tensor positions, Tensor? cell, Tensor mapping, Tensor? shifts, Tensor? system_idx=None) "
      "-> Tensor vectors");
  m.def(
      "pair_vectors_adjoint(Tensor grad, Tensor mapping, Tensor? shifts, Tensor? system_idx, SymInt num_atoms, "
      "SymInt num_systems, bool need_positions=True, bool need_cell=True) "
      "-> (Tensor grad_positions, Tensor grad_cell)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(diffnl, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&diffnl::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(diffnl, CPU, m) {
  m.impl("neighbor_pairs", TORCH_BOX(&diffnl::neighbor_pairs));
  m.impl("pair_vectors", TORCH_BOX(&diffnl::pair_vectors));
  m.impl("pair_vectors_adjoint", TORCH_BOX(&diffnl::pair_vectors_adjoint));
}
