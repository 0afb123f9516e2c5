// The operators on the CPU: tensors to pointers.

#include <cstdlib>

#include "large_pages.h"
#include "neighbors_cpu.h"
#include "tensors.h"

namespace diffnl {

namespace {

Tensor empty_on_large_pages(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const Tensor t = empty(like, shape, dtype);
  prefer_large_pages(t.mutable_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
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
    mapping = empty_on_large_pages(positions, {2, num_pairs}, ScalarType::Long);
    shifts = empty_on_large_pages(positions, {num_pairs, 3}, ScalarType::Int);
    vectors = empty_on_large_pages(positions, {num_pairs, 3}, positions.scalar_type());
    return PairOutput<T>{mutable_data<int64_t>(*mapping), mutable_data<int32_t>(*shifts),
                         mutable_data<T>(*vectors)};
  };
  const SearchInput<T> in{data<T>(positions),
                          data<T>(cell),
                          data<bool>(pbc),
                          pbc.dim() == 1 ? 0 : 3,
                          system_idx,
                          positions.size(0),
                          num_systems_of(cell),
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
  check_search(positions, cell, pbc);
  const Tensor r = packed(positions), h = packed(cell);
  const Tensor flags = packed(pbc);
  const std::optional<Tensor> systems = packed(system_idx);
  const int64_t* system = system_data(systems, r.size(0));
  return dtype == ScalarType::Float ? search<float>(r, h, flags, system, cutoff, full, sorted)
                                    : search<double>(r, h, flags, system, cutoff, full, sorted);
}

PairList list_of(const HeldList& held, int64_t num_atoms, int64_t num_systems) {
  return {held.mapping(), held.shifts(), held.system_idx(), held.num_pairs(), num_atoms, num_systems};
}

Tensor pair_vectors(const Tensor& positions, const std::optional<Tensor>& cell, const Tensor& mapping,
                    const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx) {
  const ScalarType dtype = floating_dtype(positions);
  check_vectors(positions, cell);
  const Tensor r = packed(positions);
  const std::optional<Tensor> h = packed(cell);
  const int64_t num_systems = h.has_value() ? num_systems_of(*h) : 0;
  const HeldList held(mapping, shifts, system_idx, r.size(0), num_systems, h.has_value());
  const Tensor vectors = empty_on_large_pages(r, {held.num_pairs(), 3}, dtype);
  by_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    pair_vectors_cpu(list_of(held, r.size(0), num_systems), data<T>(r), data_or_null<T>(h),
                     mutable_data<T>(vectors));
  });
  return vectors;
}

// A gradient that is not needed comes back with no rows.
std::tuple<Tensor, Tensor> pair_vectors_adjoint(const Tensor& grad, const Tensor& mapping,
                                                const std::optional<Tensor>& shifts,
                                                const std::optional<Tensor>& system_idx, int64_t num_atoms,
                                                int64_t num_systems, bool need_positions, bool need_cell) {
  const ScalarType dtype = floating_dtype(grad);
  const HeldList held(mapping, shifts, system_idx, num_atoms, num_systems, need_cell);
  check_shape(grad, "grad", {held.num_pairs(), 3});
  const Tensor g = packed(grad);
  const Tensor grad_positions = empty_on_large_pages(g, {need_positions ? num_atoms : 0, 3}, dtype);
  const Tensor grad_cell = empty_on_large_pages(g, {need_cell ? num_systems : 0, 3, 3}, dtype);
  by_dtype(g, [&](auto zero) {
    using T = decltype(zero);
    pair_vectors_adjoint_cpu(list_of(held, num_atoms, num_systems), data<T>(g),
                             need_positions ? mutable_data<T>(grad_positions) : nullptr,
                             need_cell ? mutable_data<T>(grad_cell) : nullptr);
  });
  return {grad_positions, grad_cell};
}

}  // namespace

}  // namespace diffnl

STABLE_TORCH_LIBRARY_IMPL(diffnl, CPU, m) {
  m.impl("neighbor_pairs", TORCH_BOX(&diffnl::neighbor_pairs));
  m.impl("pair_vectors", TORCH_BOX(&diffnl::pair_vectors));
  m.impl("pair_vectors_adjoint", TORCH_BOX(&diffnl::pair_vectors_adjoint));
}
