// Vectors of a list that exists, and their adjoint, on a GPU: tensors to pointers.

#include <array>

#include "gpu_tensors.h"
#include "part.h"

#if !defined(DIFFNL_HOSTGPU)  // whose one library has it in ops.cpp
DIFFNL_PART
#endif

namespace diffnl {

namespace {

Tensor vectors_of(const Tensor& positions, const std::optional<Tensor>& cell, const GpuPairList& list) {
  const OnDevice on(positions);
  const Tensor vectors = empty(positions, {list.num_pairs, 3}, positions.scalar_type());
  by_dtype(positions, [&](auto zero) {
    using T = decltype(zero);
    pair_vectors_gpu(list, data<T>(positions), data_or_null<T>(cell), mutable_data<T>(vectors), on.stream());
  });
  return vectors;
}

Tensor pair_vectors(const Tensor& positions, const std::optional<Tensor>& cell, const Tensor& mapping,
                    const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx,
                    const std::optional<Tensor>& num_pairs) {
  check_vectors(positions, cell);
  const Tensor r = packed(positions);
  const std::optional<Tensor> h = packed(cell);
  const int64_t num_systems = h.has_value() ? num_systems_of(*h) : 0;
  const HeldList held(mapping, shifts, system_idx, r.size(0), num_systems, h.has_value());
  return vectors_of(r, h,
                    {held.mapping(), held.shifts(), nullptr, nullptr, held.system_idx(), live_pairs(num_pairs),
                     held.capacity(), r.size(0), num_systems});
}

// `rows` of a linked list, and its links, kept alive while kernels read them.
class HeldLinks {
 public:
  HeldLinks(const Tensor& links, const Tensor& rows, int64_t num_atoms, int64_t num_systems)
      : links_(packed(links)), rows_(packed(rows)) {
    check_shape(links, "links", {-1});
    check_dtype(links, "links", ScalarType::Long);
    check_shape(rows, "rows", {num_rows(num_atoms, num_systems)});
    check_dtype(rows, "rows", ScalarType::Long);
    const RowPointers row(rows_, num_atoms);
    list = {nullptr,       nullptr,   static_cast<const Link*>(links_.const_data_ptr()),
            row.offsets,   nullptr,   nullptr,
            links.size(0), num_atoms, num_systems};
    order = {row.order, row.first_of_system};
  }

  GpuPairList list;
  RowOrder order;

 private:
  Tensor links_, rows_;
};

Tensor linked_vectors(const Tensor& positions, const std::optional<Tensor>& cell, const Tensor& links,
                      const Tensor& rows, const std::optional<Tensor>& system_idx) {
  check_vectors(positions, cell);
  const Tensor r = packed(positions);
  const std::optional<Tensor> h = packed(cell), systems = packed(system_idx);
  const int64_t n = r.size(0), num_systems = rows.size(0) - 2 * n - 2;
  HeldLinks held(links, rows, n, num_systems);
  if (h.has_value()) {
    require(num_systems_of(*h) == num_systems, "`cell` must hold as many systems as the links");
    require(num_systems <= 1 || systems.has_value(), "`system_idx` must be given");
    held.list.system_idx = system_data(systems, n);
  }
  return vectors_of(r, h, held.list);
}

std::tuple<Tensor, Tensor> adjoint_of(const Tensor& grad, const GpuPairList& list, const SortedEnds& ends,
                                      const RowOrder& order, bool need_positions, bool need_cell,
                                      const OnDevice& on) {
  const ScalarType dtype = grad.scalar_type();
  const Tensor grad_positions = empty(grad, {need_positions ? list.num_atoms : 0, 3}, dtype);
  const Tensor grad_cell = empty(grad, {need_cell ? list.num_systems : 0, 3, 3}, dtype);
  const int64_t chunks = need_cell ? adjoint_chunks(list.num_atoms, list.num_systems) : 0;
  const Tensor partial_cell = empty(grad, {chunks, 9}, ScalarType::Double);
  if (grad_positions.numel() + grad_cell.numel() == 0) return {grad_positions, grad_cell};
  // Atoms whose system is out of range are in no chunk of rows. Their vectors were NaN, and so are their
  // gradients.
  if (need_positions && list.offsets == nullptr && order.rows != nullptr)
    set_on_device(grad_positions.mutable_data_ptr(), kNanByte,
                  grad_positions.numel() * static_cast<int64_t>(grad_positions.element_size()), on.stream());
  by_dtype(grad, [&](auto zero) {
    using T = decltype(zero);
    const AdjointOutput<T> out{need_positions ? mutable_data<T>(grad_positions) : nullptr,
                               need_cell ? mutable_data<T>(grad_cell) : nullptr,
                               mutable_data<double>(partial_cell)};
    adjoint_gpu(list, ends, order, data<T>(grad), out, on.stream());
  });
  return {grad_positions, grad_cell};
}

// `system_idx` is for the derivative of this operator alone.
std::tuple<Tensor, Tensor> linked_adjoint(const Tensor& grad, const Tensor& links, const Tensor& rows,
                                          const std::optional<Tensor>&, int64_t num_atoms, int64_t num_systems,
                                          bool need_positions, bool need_cell) {
  const HeldLinks held(links, rows, num_atoms, num_systems);
  floating_dtype(grad);
  check_shape(grad, "grad", {held.list.num_pairs, 3});
  const Tensor g = packed(grad);
  return adjoint_of(g, held.list, {}, held.order, need_positions, need_cell, OnDevice(g));
}

// torch.sort(keys, stable=True): values and where they came from.
std::array<Tensor, 2> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  const AOTITorchError error = torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION);
  require(error == 0, "torch could not sort the pairs");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> pair_vectors_adjoint(const Tensor& grad, const Tensor& mapping,
                                                const std::optional<Tensor>& shifts,
                                                const std::optional<Tensor>& system_idx, int64_t num_atoms,
                                                int64_t num_systems, bool need_positions, bool need_cell,
                                                const std::optional<Tensor>& num_pairs) {
  floating_dtype(grad);
  const HeldList held(mapping, shifts, system_idx, num_atoms, num_systems, need_cell);
  check_shape(grad, "grad", {held.capacity(), 3});
  require(num_atoms < (int64_t(1) << 31),
          "`positions` must hold fewer than 2**31 atoms");  // they are sorted as int32
  const Tensor g = packed(grad);
  const OnDevice on(g);
  const GpuPairList list{held.mapping(),        held.shifts(),   nullptr,   nullptr,    held.system_idx(),
                         live_pairs(num_pairs), held.capacity(), num_atoms, num_systems};

  const auto sorted_ends = [&](int row) {
    const Tensor ends = empty(g, {list.num_pairs}, ScalarType::Int);
    pair_ends_gpu(list, row, mutable_data<int32_t>(ends), on.stream());
    return stable_sort(ends);
  };
  const std::array<Tensor, 2> by_i = sorted_ends(0), by_j = need_positions ? sorted_ends(1) : by_i;
  const SortedEnds ends{data<int32_t>(by_i[0]), data<int64_t>(by_i[1]), data<int32_t>(by_j[0]),
                        data<int64_t>(by_j[1])};

  RowOrder order{nullptr, nullptr};
  std::optional<Tensor> rows, first_of_system;
  if (need_cell && system_idx.has_value()) {
    const std::array<Tensor, 2> by_system = stable_sort(*system_idx);
    rows = by_system[1];
    first_of_system = empty(g, {num_systems + 1}, ScalarType::Long);
    first_of_each_gpu(data<int64_t>(by_system[0]), num_atoms, num_systems, mutable_data<int64_t>(*first_of_system),
                      on.stream());
    order = {data<int64_t>(*rows), data<int64_t>(*first_of_system)};
  }
  return adjoint_of(g, list, ends, order, need_positions, need_cell, on);
}

}  // namespace

}  // namespace diffnl

STABLE_TORCH_LIBRARY_IMPL(diffnl, DIFFNL_GPU_KEY, m) {
  m.impl("pair_vectors", TORCH_BOX(&diffnl::pair_vectors));
  m.impl("pair_vectors_adjoint", TORCH_BOX(&diffnl::pair_vectors_adjoint));
  m.impl("linked_vectors", TORCH_BOX(&diffnl::linked_vectors));
  m.impl("linked_adjoint", TORCH_BOX(&diffnl::linked_adjoint));
}
