// The operators on a GPU: tensors to pointers, on the device of the tensors and on torch's current stream.
//
// Memory comes from torch's allocator and belongs to that stream: what a call frees, the next call on the stream
// may reuse without waiting. Nothing here names a vendor.

#include "neighbors_gpu.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "errors.h"
#include "tensors.h"

namespace diffnl {

namespace {

// The device of `t` made current, and its current stream.
class OnDevice {
 public:
#if defined(DIFFNL_HOSTGPU)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_);
    require(error == 0, "torch has no current stream");
  }
#endif
  GpuStream stream() const { return stream_; }

 private:
#if !defined(DIFFNL_HOSTGPU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// Arrays of one call in one allocation.
class Workspace {
 public:
  template <typename T>
  void add(T*& array, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
  int64_t bytes() const { return bytes_; }
  void allocate(const Tensor& like) {
    memory_ = empty(like, {bytes_}, ScalarType::Byte);
    for (const Part& part : parts_) *part.array = mutable_data<char>(*memory_) + part.at;
  }

 private:
  struct Part {
    void** array;
    int64_t at;
  };
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

// How many notes on the bins of their stencils the search can keep of all atoms. One atom in a tiny cell has
// hundreds of bins around it; where atoms are many, 27 must do. It also bounds how narrow bins may be, with links
// or without: the order of a row must not depend on who asks for a gradient.
int64_t segment_capacity(int64_t num_atoms) {
  constexpr int64_t plenty = int64_t(1) << 24;
  return std::max(27 * num_atoms, std::min(343 * num_atoms, plenty));
}

SearchPrices search_prices(int64_t num_atoms) {
  const int64_t stencil = segment_capacity(num_atoms) / std::max<int64_t>(num_atoms, 1);
  return {20.0, 4.0, 512.0, static_cast<double>(num_atoms), stencil >= 343 ? 3 : stencil >= 125 ? 2 : 1};
}

[[noreturn]] void raise_fault(const Summary& summary, const int64_t* system_idx, GpuStream stream) {
  static constexpr std::array<const char*, 8> codes = {"",
                                                       "positions_not_finite",
                                                       "cell_not_finite",
                                                       "cell_singular",
                                                       "system_idx_out_of_range",
                                                       "shift_overflows",
                                                       "images_blur",
                                                       "out_of_memory"};
  const Fault kind = kind_of_fault(summary.fault);
  const int64_t number = number_of_fault(summary.fault);
  const char* code = codes[static_cast<size_t>(kind)];
  if (kind == Fault::system_idx_out_of_range)
    data_error(code, read_from_device(system_idx + number, stream), number);
  if (kind == Fault::out_of_memory) data_error(code, std::max(summary.num_pairs, number));
  data_error(code, number);
}

struct Found {
  Tensor mapping, shifts, vectors, links, rows;
};

// What `make` makes, or nothing where torch has no memory for it.
template <typename Make>
auto if_memory_suffices(const Make& make) -> std::optional<decltype(make())> {
  try {
    return make();
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// The tensors of a list of `num_pairs` pairs.
Found make_outputs(const Tensor& positions, int64_t num_pairs, bool linked) {
  return {empty(positions, {2, num_pairs}, ScalarType::Long), empty(positions, {num_pairs, 3}, ScalarType::Int),
          empty(positions, {num_pairs, 3}, positions.scalar_type()),
          empty(positions, {linked ? num_pairs : 0}, ScalarType::Long), empty(positions, {0}, ScalarType::Long)};
}

// The same with fewer pairs, in the same memory.
Found cut(const Found& from, int64_t num_pairs, bool linked) {
  return {front_of(from.mapping, {2, num_pairs}), front_of(from.shifts, {num_pairs, 3}),
          front_of(from.vectors, {num_pairs, 3}), front_of(from.links, {linked ? num_pairs : 0}), from.rows};
}

template <typename T>
GpuPairs<T> pointers(const Found& found, int64_t num_pairs) {
  Link* links =
      found.links.size(0) > 0 ? static_cast<Link*>(found.links.mutable_data_ptr()) : static_cast<Link*>(nullptr);
  return {mutable_data<int64_t>(found.mapping), mutable_data<int32_t>(found.shifts),
          mutable_data<T>(found.vectors), links, num_pairs};
}

// What a search will find, going by this thread's last one: as many bins an atom, as many pairs a volume. A good
// guess saves a small search the time between the moment when the host learns the number of pairs and the moment
// when the fill begins: memory is made, and the fill launched, while the device still counts. A bad one costs that
// launch.
class Guess {
 public:
  // `volumes` is what the number of pairs grows with, in any unit. 0 where there is nothing to go by.
  int64_t pairs(double volumes, int64_t bytes_a_pair) const {
    // Beyond these bytes the wait does not matter, but the memory does.
    constexpr double most_bytes = 1 << 26;
    const double guess = 1.0625 * pairs_ * volumes;
    // Not the other way round: a product of zero and infinity is no guess either.
    return guess * static_cast<double>(bytes_a_pair) <= most_bytes ? static_cast<int64_t>(guess) : 0;
  }
  int64_t bins(int64_t num_atoms) const {
    return static_cast<int64_t>(std::ceil(bins_ * static_cast<double>(num_atoms)));
  }
  // Whether memory for `room` pairs, which is there already, may be kept for `num_pairs`.
  static bool suits(int64_t room, int64_t num_pairs, int64_t bytes_a_pair) {
    constexpr int64_t little = 1 << 16;
    return num_pairs <= room &&
           (room - num_pairs) * bytes_a_pair <= std::max(little, num_pairs * bytes_a_pair / 8);
  }
  void learn(const Summary& found, int64_t num_atoms, double volumes) {
    pairs_ = static_cast<double>(found.num_pairs) / volumes;
    bins_ = static_cast<double>(found.num_bins) / static_cast<double>(num_atoms);
  }

 private:
  double pairs_ = 0.0, bins_ = 0.0;
};

template <typename T>
Found search(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
             const std::optional<Tensor>& system_idx, double cutoff, bool full, bool sorted, bool linked) {
  const OnDevice on(positions);
  const int64_t n = positions.size(0), num_systems = num_systems_of(cell);
  require(n < (int64_t(1) << 30), "`positions` must hold fewer than 2**30 atoms");
  linked = linked && full;

  const Tensor flags = packed(pbc);
  Tensor rows = empty(positions, {linked ? 2 * n + num_systems + 2 : 0}, ScalarType::Long);

  GpuSearch<T> s{};
  s.positions = data<T>(positions);
  s.cell = data<T>(cell);
  s.pbc = data<bool>(flags);
  s.pbc_stride = pbc.dim() == 1 ? 0 : 3;
  s.system_idx = system_data(system_idx, n);
  s.num_atoms = n;
  s.num_systems = num_systems;
  s.num_slots = 2 * n + 32 * num_systems;
  s.segment_capacity = segment_capacity(n);
  s.most_pairs = pairs_in_device_memory<T>();
  s.cutoff = cutoff;
  s.cutoff2 = static_cast<T>(cutoff * cutoff);
  s.full = full;
  s.prices = search_prices(n);
  s.summary = summary_of_thread();
  static thread_local Guess guess;
  s.likely_bins = guess.bins(n);

  Workspace work;
  work.add(s.state, 1);
  work.add(s.slot_counts, s.num_slots);
  work.add(s.row_counts, n);
  work.add(s.placed, n);
  if (linked) work.add(s.segments, s.segment_capacity);
  const int64_t cleared = work.bytes();
  work.add(s.hits, s.segment_capacity);
  work.add(s.systems, num_systems);
  work.add(s.slot_starts, s.num_slots + 1);
  work.add(s.q, n);
  work.add(s.w, 3 * n);
  work.add(s.keys, n);
  work.add(s.slots, n);
  work.add(s.ranks, n);
  work.add(s.unordered, n);
  work.add(s.sorted_keys, n);
  work.add(s.atoms, n);
  work.add(s.places, n);
  work.add(s.bins, n);
  work.add(s.partial_sums, partial_sums_for(std::max(s.num_slots, n)));
  if (!linked) work.add(s.offsets, n + 1);
  work.allocate(positions);
  if (linked) {
    s.offsets = mutable_data<int64_t>(rows);
    s.order = s.offsets + n + 1;
    s.first_of_system = s.order + n;
  }

  set_on_device(s.state, 0, cleared, on.stream());
  build_cell_list(s, on.stream());
  count_pairs(s, on.stream());

  const double volumes = static_cast<double>(n) * cutoff * cutoff * cutoff * (full ? 1.0 : 0.5);
  const int64_t bytes_a_pair = 28 + 3 * static_cast<int64_t>(sizeof(T)) + (linked ? 8 : 0);
  const int64_t room = sorted ? 0 : guess.pairs(volumes, bytes_a_pair);
  std::optional<Found> roomy;
  if (room > 0) roomy = if_memory_suffices([&] { return make_outputs(positions, room, linked); });
  if (roomy.has_value()) fill_pairs_if_they_fit(s, room, pointers<T>(*roomy, room), on.stream());

  wait_for_summary();
  const Summary summary = *s.summary;
  if (summary.fault != 0) raise_fault(summary, s.system_idx, on.stream());
  const int64_t num_pairs = summary.num_pairs;
  if (n > 0) guess.learn(summary, n, volumes);
  linked = linked && summary.linkable != 0 && num_pairs > 0;
  if (roomy.has_value() && Guess::suits(room, num_pairs, bytes_a_pair)) {
    Found found = cut(*roomy, num_pairs, linked);
    if (linked) found.rows = rows;
    return found;
  }
  if (roomy.has_value()) {
    roomy.reset();
    // That fill may have counted what it has placed.
    set_on_device(s.placed, 0, n * static_cast<int64_t>(sizeof(uint32_t)), on.stream());
  }

  const auto allocate = [&](const auto& make) {
    const auto made = if_memory_suffices(make);
    // torch's own error cannot leave its C interface with its type, so it gets a code like the others.
    if (!made.has_value()) data_error("out_of_memory", num_pairs);
    return *made;
  };
  Found found = allocate([&] { return make_outputs(positions, num_pairs, linked); });
  if (linked) found.rows = rows;
  const GpuPairs<T> pairs = pointers<T>(found, num_pairs);
  if (!sorted) {
    fill_pairs(s, summary.num_bins, pairs, on.stream());
    return found;
  }
  // Rows too long to be sorted in shared memory are sorted from one tensor to another.
  Tensor mapping = found.mapping, shifts = found.shifts;
  if (summary.longest_row > kSortedInPlace) {
    mapping = allocate([&] { return empty(positions, {2, num_pairs}, ScalarType::Long); });
    shifts = allocate([&] { return empty(positions, {num_pairs, 3}, ScalarType::Int); });
  }
  const GpuPairs<T> unsorted{mutable_data<int64_t>(mapping), mutable_data<int32_t>(shifts), nullptr, nullptr,
                             num_pairs};
  fill_pairs(s, summary.num_bins, unsorted, on.stream());
  sort_rows(s, unsorted, pairs, on.stream());
  return found;
}

Found find_pairs(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                 const std::optional<Tensor>& system_idx, double cutoff, bool full, bool sorted, bool linked) {
  const ScalarType dtype = floating_dtype(positions);
  check_search(positions, cell, pbc);
  const Tensor r = packed(positions), h = packed(cell);
  const std::optional<Tensor> systems = packed(system_idx);
  return dtype == ScalarType::Float ? search<float>(r, h, pbc, systems, cutoff, full, sorted, linked)
                                    : search<double>(r, h, pbc, systems, cutoff, full, sorted, linked);
}

std::tuple<Tensor, Tensor, Tensor> neighbor_pairs(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                                  const std::optional<Tensor>& system_idx, double cutoff,
                                                  bool full, bool sorted) {
  const Found found = find_pairs(positions, cell, pbc, system_idx, cutoff, full, sorted, false);
  return {found.mapping, found.shifts, found.vectors};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linked_neighbor_pairs(const Tensor& positions,
                                                                         const Tensor& cell, const Tensor& pbc,
                                                                         const std::optional<Tensor>& system_idx,
                                                                         double cutoff, bool sorted) {
  const Found found = find_pairs(positions, cell, pbc, system_idx, cutoff, true, sorted, true);
  return {found.mapping, found.shifts, found.vectors, found.links, found.rows};
}

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
                    const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx) {
  check_vectors(positions, cell);
  const Tensor r = packed(positions);
  const std::optional<Tensor> h = packed(cell);
  const int64_t num_systems = h.has_value() ? num_systems_of(*h) : 0;
  const HeldList held(mapping, shifts, system_idx, r.size(0), num_systems, h.has_value());
  return vectors_of(r, h,
                    {held.mapping(), held.shifts(), nullptr, nullptr, held.system_idx(), held.num_pairs(),
                     r.size(0), num_systems});
}

// `rows` of a linked list, and its links, kept alive while kernels read them.
class HeldLinks {
 public:
  HeldLinks(const Tensor& links, const Tensor& rows, int64_t num_atoms, int64_t num_systems)
      : links_(packed(links)), rows_(packed(rows)) {
    check_shape(links, "links", {-1});
    check_dtype(links, "links", ScalarType::Long);
    check_shape(rows, "rows", {2 * num_atoms + num_systems + 2});
    check_dtype(rows, "rows", ScalarType::Long);
    const int64_t* offsets = data<int64_t>(rows_);
    list = {nullptr,   nullptr,    static_cast<const Link*>(links_.const_data_ptr()),
            offsets,   nullptr,    links.size(0),
            num_atoms, num_systems};
    order = {offsets + num_atoms + 1, offsets + 2 * num_atoms + 1};
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
  if (need_positions && list.links == nullptr && order.rows != nullptr)
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

std::tuple<Tensor, Tensor> linked_adjoint(const Tensor& grad, const Tensor& links, const Tensor& rows,
                                          int64_t num_atoms, int64_t num_systems, bool need_positions,
                                          bool need_cell) {
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
                                                int64_t num_systems, bool need_positions, bool need_cell) {
  floating_dtype(grad);
  const HeldList held(mapping, shifts, system_idx, num_atoms, num_systems, need_cell);
  check_shape(grad, "grad", {held.num_pairs(), 3});
  const Tensor g = packed(grad);
  const OnDevice on(g);
  const GpuPairList list{held.mapping(),    held.shifts(),    nullptr,   nullptr,
                         held.system_idx(), held.num_pairs(), num_atoms, num_systems};

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

// A ROCm torch dispatches under the CUDA key too.
#if defined(DIFFNL_HOSTGPU)
#define DIFFNL_GPU_KEY CPU
#else
#define DIFFNL_GPU_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(diffnl, DIFFNL_GPU_KEY, m) {
  m.impl("neighbor_pairs", TORCH_BOX(&diffnl::neighbor_pairs));
  m.impl("linked_neighbor_pairs", TORCH_BOX(&diffnl::linked_neighbor_pairs));
  m.impl("pair_vectors", TORCH_BOX(&diffnl::pair_vectors));
  m.impl("pair_vectors_adjoint", TORCH_BOX(&diffnl::pair_vectors_adjoint));
  m.impl("linked_vectors", TORCH_BOX(&diffnl::linked_vectors));
  m.impl("linked_adjoint", TORCH_BOX(&diffnl::linked_adjoint));
}
