// The operators on the CPU: tensors to pointers.

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "candidates_cpu.h"
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
bool memory_suffices(int64_t bytes) {
  if (bytes < (int64_t(1) << 26)) return true;
  void* probe = std::malloc(static_cast<size_t>(bytes));
  std::free(probe);
  return probe != nullptr;
}

// Room for `capacity` pairs.
struct Outputs {
  Tensor mapping, shifts, vectors;

  Outputs(const Tensor& positions, int64_t capacity)
      : mapping(empty_on_large_pages(positions, {2, capacity}, ScalarType::Long)),
        shifts(empty_on_large_pages(positions, {capacity, 3}, ScalarType::Int)),
        vectors(empty_on_large_pages(positions, {capacity, 3}, positions.scalar_type())) {}

  template <typename T>
  PairOutput<T> pointers() const {
    return {mutable_data<int64_t>(mapping), mutable_data<int32_t>(shifts), mutable_data<T>(vectors),
            shifts.size(0)};
  }
};

template <typename T>
int64_t bytes_of(int64_t num_pairs) {
  return num_pairs * static_cast<int64_t>(28 + 3 * sizeof(T));
}

// `pairs_before` have memory already, of which nothing is written yet: it is promised, but not taken.
template <typename T>
Outputs make_outputs(const Tensor& positions, int64_t num_pairs, const char* error = "out_of_memory",
                     int64_t pairs_before = 0) {
  const int64_t most_pairs = std::numeric_limits<int64_t>::max() / bytes_of<T>(1) - pairs_before;
  if (num_pairs > most_pairs || !memory_suffices(bytes_of<T>(num_pairs + pairs_before)))
    data_error(error, num_pairs);
  const auto made = if_memory_suffices([&] { return Outputs(positions, num_pairs); });
  if (!made.has_value()) data_error(error, num_pairs);
  return *made;
}

// What a search reads, contiguous and kept alive; calls run(SearchInput<float>) or run(SearchInput<double>).
template <typename Run>
auto with_search_input(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                       const std::optional<Tensor>& system_idx, double cutoff, bool full, bool sorted,
                       const Run& run) {
  const ScalarType dtype = floating_dtype(positions);
  check_search(positions, cell, pbc);
  require(positions.size(0) < (int64_t(1) << 31), "`positions` must hold fewer than 2**31 atoms");
  require(num_systems_of(cell) < (int64_t(1) << 31), "`cell` must hold fewer than 2**31 systems");
  const Tensor r = packed(positions), h = packed(cell), flags = packed(pbc);
  const std::optional<Tensor> systems = packed(system_idx);
  const auto input = [&](auto zero) {
    using T = decltype(zero);
    return SearchInput<T>{data<T>(r),
                          data<T>(h),
                          data<bool>(flags),
                          flags.dim() == 1 ? 0 : 3,
                          system_data(systems, r.size(0)),
                          r.size(0),
                          num_systems_of(h),
                          cutoff,
                          full,
                          sorted};
  };
  return dtype == ScalarType::Float ? run(input(0.0f)) : run(input(0.0));
}

// Slots first .. capacity of a padded list: the last atom with itself, at the length of the cutoff. Rows stay in
// order, and a smooth envelope makes nothing of such a pair.
template <typename T>
void pad(const PairOutput<T>& out, int64_t first, int64_t last_atom, T length) {
  std::fill(out.mapping + first, out.mapping + out.capacity, last_atom);
  std::fill(out.mapping + out.capacity + first, out.mapping + 2 * out.capacity, last_atom);
  std::fill(out.shifts + 3 * first, out.shifts + 3 * out.capacity, 0);
  for (int64_t p = first; p < out.capacity; ++p) {
    out.vectors[3 * p] = length;
    out.vectors[3 * p + 1] = out.vectors[3 * p + 2] = 0 * length;
  }
}

// A padded list and the number of its pairs, of `find(allocate)`, which calls allocate(P) where a list begins.
template <typename T, typename Find>
std::tuple<Tensor, Tensor, Tensor, Tensor> padded_list(const Tensor& positions, double cutoff, int64_t capacity,
                                                       const Find& find) {
  struct Overflow {};
  check_capacity(capacity);
  const Tensor count = empty(positions, {}, ScalarType::Long);
  const Outputs found = make_outputs<T>(positions, capacity, "capacity_out_of_memory");
  const PairOutput<T> out = found.pointers<T>();
  int64_t& num_pairs = *mutable_data<int64_t>(count);
  const int64_t last_atom = std::max<int64_t>(positions.size(0) - 1, 0);
  try {
    find([&](int64_t needed) {
      num_pairs = needed;
      if (needed > capacity) throw Overflow();
      return out;
    });
    pad(out, num_pairs, last_atom, static_cast<T>(cutoff));
  } catch (const Overflow&) {
    pad(out, 0, last_atom, std::numeric_limits<T>::quiet_NaN());
  } catch (const DataError& error) {
    num_pairs = error.padded_count(capacity);
    pad(out, 0, last_atom, std::numeric_limits<T>::quiet_NaN());
  }
  return {found.mapping, found.shifts, found.vectors, count};
}

// A list of as many pairs as `find(allocate)` finds.
template <typename T, typename Find>
Outputs exact_list(const Tensor& positions, const Find& find) {
  std::optional<Outputs> found;
  find([&](int64_t num_pairs) {
    found.emplace(make_outputs<T>(positions, num_pairs));
    return found->pointers<T>();
  });
  return *found;
}

std::tuple<Tensor, Tensor, Tensor> neighbor_pairs(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                                  const std::optional<Tensor>& system_idx, double cutoff,
                                                  bool full, bool sorted) {
  const auto search = [&]<typename T>(const SearchInput<T>& in) -> std::tuple<Tensor, Tensor, Tensor> {
    const Outputs found = exact_list<T>(positions, [&](const auto& allocate) { search_cpu<T>(in, {}, allocate); });
    return {found.mapping, found.shifts, found.vectors};
  };
  return with_search_input(positions, cell, pbc, system_idx, cutoff, full, sorted, search);
}

// mapping, shifts and vectors of each cutoff, the longest first.
std::vector<Tensor> neighbor_lists(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                   const std::optional<Tensor>& system_idx, std::vector<double> cutoffs, bool full,
                                   bool sorted) {
  require(!cutoffs.empty() && std::is_sorted(cutoffs.rbegin(), cutoffs.rend()), "`cutoffs` must descend");
  const std::vector<double> shorter(cutoffs.begin() + 1, cutoffs.end());
  const auto search = [&]<typename T>(const SearchInput<T>& in) {
    std::vector<Tensor> found;
    int64_t pairs_before = 0;
    search_cpu<T>(in, shorter, [&](int64_t num_pairs) {
      const Outputs list = make_outputs<T>(positions, num_pairs, "out_of_memory", pairs_before);
      pairs_before += num_pairs;
      found.insert(found.end(), {list.mapping, list.shifts, list.vectors});
      return list.pointers<T>();
    });
    return found;
  };
  return with_search_input(positions, cell, pbc, system_idx, cutoffs[0], full, sorted, search);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> padded_neighbor_pairs(const Tensor& positions, const Tensor& cell,
                                                                 const Tensor& pbc,
                                                                 const std::optional<Tensor>& system_idx,
                                                                 double cutoff, int64_t capacity, bool full,
                                                                 bool sorted) {
  const auto search = [&]<typename T>(const SearchInput<T>& in) {
    return padded_list<T>(positions, cutoff, capacity,
                          [&](const auto& allocate) { search_cpu<T>(in, {}, allocate); });
  };
  return with_search_input(positions, cell, pbc, system_idx, cutoff, full, sorted, search);
}

// The pairs of a list that are there; -1 where a padded list has failed.
int64_t num_pairs_of(const HeldList& held, const std::optional<Tensor>& num_pairs) {
  const int64_t* live = live_pairs(num_pairs);
  if (live == nullptr) return held.capacity();
  return 0 <= *live && *live <= held.capacity() ? *live : -1;
}

PairList list_of(const HeldList& held, int64_t num_pairs, int64_t num_atoms, int64_t num_systems) {
  return {held.mapping(), held.shifts(), held.system_idx(), num_pairs, held.capacity(), num_atoms, num_systems};
}

Tensor pair_vectors(const Tensor& positions, const std::optional<Tensor>& cell, const Tensor& mapping,
                    const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx,
                    const std::optional<Tensor>& padded_count) {
  const ScalarType dtype = floating_dtype(positions);
  check_vectors(positions, cell);
  const Tensor r = packed(positions);
  const std::optional<Tensor> h = packed(cell);
  const int64_t num_systems = h.has_value() ? num_systems_of(*h) : 0;
  const HeldList held(mapping, shifts, system_idx, r.size(0), num_systems, h.has_value());
  const int64_t num_pairs = num_pairs_of(held, padded_count), first_empty = std::max<int64_t>(num_pairs, 0);
  const Tensor vectors = empty_on_large_pages(r, {held.capacity(), 3}, dtype);
  by_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    T* v = mutable_data<T>(vectors);
    pair_vectors_cpu(list_of(held, first_empty, r.size(0), num_systems), data<T>(r), data_or_null<T>(h), v);
    std::fill(v + 3 * first_empty, v + 3 * held.capacity(),
              num_pairs < 0 ? std::numeric_limits<T>::quiet_NaN() : T(0));
  });
  return vectors;
}

// A gradient that is not needed comes back with no rows.
std::tuple<Tensor, Tensor> pair_vectors_adjoint(const Tensor& grad, const Tensor& mapping,
                                                const std::optional<Tensor>& shifts,
                                                const std::optional<Tensor>& system_idx, int64_t num_atoms,
                                                int64_t num_systems, bool need_positions, bool need_cell,
                                                const std::optional<Tensor>& padded_count) {
  const ScalarType dtype = floating_dtype(grad);
  const HeldList held(mapping, shifts, system_idx, num_atoms, num_systems, need_cell);
  check_shape(grad, "grad", {held.capacity(), 3});
  const Tensor g = packed(grad);
  const Tensor grad_positions = empty_on_large_pages(g, {need_positions ? num_atoms : 0, 3}, dtype);
  const Tensor grad_cell = empty_on_large_pages(g, {need_cell ? num_systems : 0, 3, 3}, dtype);
  const int64_t num_pairs = num_pairs_of(held, padded_count);
  by_dtype(g, [&](auto zero) {
    using T = decltype(zero);
    T *positions = mutable_data<T>(grad_positions), *cell = mutable_data<T>(grad_cell);
    if (num_pairs < 0) {
      std::fill_n(positions, grad_positions.numel(), std::numeric_limits<T>::quiet_NaN());
      std::fill_n(cell, grad_cell.numel(), std::numeric_limits<T>::quiet_NaN());
      return;
    }
    pair_vectors_adjoint_cpu(list_of(held, num_pairs, num_atoms, num_systems), data<T>(g),
                             need_positions ? positions : nullptr, need_cell ? cell : nullptr);
  });
  return {grad_positions, grad_cell};
}

// ------------------------------------------------------------------------------------- candidates

Tensor images_tensor(const Tensor& like, const std::vector<int32_t>& found) {
  const Tensor images = empty(like, {static_cast<int64_t>(found.size()) / 4, 4}, ScalarType::Int);
  std::copy(found.begin(), found.end(), mutable_data<int32_t>(images));
  return images;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_candidates(const Tensor& mapping, const Tensor& shifts,
                                                              const std::optional<Tensor>& system_idx,
                                                              int64_t num_atoms, int64_t num_systems) {
  const HeldList held(mapping, shifts, system_idx, num_atoms, num_systems, true);
  require(num_atoms < (int64_t(1) << 31), "`positions` must hold fewer than 2**31 atoms");
  const int64_t count = held.capacity();
  const Tensor offsets = empty(mapping, {num_atoms + 1}, ScalarType::Long);
  const Tensor j = empty_on_large_pages(mapping, {count}, ScalarType::Int);
  const Tensor image = empty_on_large_pages(mapping, {count}, ScalarType::Int);
  const CompactList out{mutable_data<int64_t>(offsets), mutable_data<int32_t>(j), mutable_data<int32_t>(image)};
  std::vector<int32_t> found;
  compact(list_of(held, count, num_atoms, num_systems), out, found);
  return {offsets, j, image, images_tensor(mapping, found)};
}

// What `compact_candidates` returned, and is given back.
Candidates candidates_of(const Tensor& offsets, const Tensor& j, const Tensor& image, const Tensor& images) {
  const int64_t num_atoms = offsets.size(0) - 1;
  check_shape(image, "image", {j.size(0)});
  check_shape(images, "images", {-1, 4});
  check_dtype(offsets, "offsets", ScalarType::Long);
  for (const Tensor* t : {&j, &image, &images}) check_dtype(*t, "candidates", ScalarType::Int);
  return {data<int64_t>(offsets), data<int32_t>(j), data<int32_t>(image),
          data<int32_t>(images),  num_atoms,        images.size(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_candidates(const Tensor& offsets, const Tensor& j,
                                                            const Tensor& image, const Tensor& images,
                                                            const Tensor& part_offsets, const Tensor& part_j,
                                                            const Tensor& part_image, const Tensor& part_images,
                                                            const Tensor& atoms, const Tensor& systems,
                                                            int64_t num_systems) {
  const Candidates batch = candidates_of(offsets, j, image, images);
  const Tensor of_atoms = packed(atoms), of_systems = packed(systems);
  const PartOfBatch part{candidates_of(part_offsets, part_j, part_image, part_images), data<int64_t>(of_atoms),
                         data<int64_t>(of_systems), of_systems.size(0)};
  check_shape(atoms, "atoms", {part.candidates.num_atoms});
  const Tensor merged_offsets = empty(offsets, {batch.num_atoms + 1}, ScalarType::Long);
  std::optional<Tensor> merged_j, merged_image;
  std::vector<int32_t> found;
  int64_t* first = mutable_data<int64_t>(merged_offsets);
  merge(batch, num_systems, part, first, found, [&](int64_t count) -> CompactList {
    merged_j = empty_on_large_pages(offsets, {count}, ScalarType::Int);
    merged_image = empty_on_large_pages(offsets, {count}, ScalarType::Int);
    return {first, mutable_data<int32_t>(*merged_j), mutable_data<int32_t>(*merged_image)};
  });
  return {merged_offsets, *merged_j, *merged_image, images_tensor(offsets, found)};
}

// (B,) float64, for each system: not negative where the candidates hold all pairs. The jumps (N, 4) int8 of the
// atoms; none where no atom has jumped. And whether the candidates hold all pairs of every system.
std::tuple<Tensor, Tensor, bool> candidates_margins(const Tensor& old_positions, const Tensor& old_cell,
                                                    const Tensor& offsets, const Tensor& j, const Tensor& image,
                                                    const Tensor& images, const Tensor& positions,
                                                    const Tensor& cell, const Tensor& pbc,
                                                    const std::optional<Tensor>& system_idx, double cutoff,
                                                    double radius) {
  check_search(positions, cell, pbc);
  check_shape(old_positions, "old_positions", {positions.size(0), 3});
  check_dtype(old_positions, "old_positions", positions.scalar_type());
  check_cell(old_cell, positions.scalar_type());
  require(num_systems_of(old_cell) == num_systems_of(cell), "`old_cell` must have the shape of `cell`");
  check_shape(offsets, "offsets", {positions.size(0) + 1});
  const Candidates candidates = candidates_of(offsets, j, image, images);
  const Tensor r0 = packed(old_positions), h0 = packed(old_cell), r = packed(positions), h = packed(cell);
  const Tensor flags = packed(pbc);
  const std::optional<Tensor> systems = packed(system_idx);
  const Tensor margins = empty(positions, {num_systems_of(h)}, ScalarType::Double);
  const Tensor jumps = empty(positions, {r.size(0)}, ScalarType::Int);
  bool any = false;
  by_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    any = find_margins<T>(
        {data<T>(r0), data<T>(r), data<T>(h0), data<T>(h), data<bool>(flags), flags.dim() == 1 ? 0 : 3,
         system_data(systems, r.size(0)), r.size(0), num_systems_of(h)},
        candidates, cutoff, radius, mutable_data<double>(margins), static_cast<Jump*>(jumps.mutable_data_ptr()));
  });
  const double* of_system = data<double>(margins);
  const bool hold = std::all_of(of_system, of_system + margins.size(0), [](double m) { return m >= 0.0; });
  return {margins, any ? jumps : empty(positions, {0}, ScalarType::Int), hold};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_candidates(const Tensor& positions, const Tensor& cell,
                                                             const std::optional<Tensor>& system_idx,
                                                             const Tensor& offsets, const Tensor& j,
                                                             const Tensor& image, const Tensor& images,
                                                             const std::optional<Tensor>& jumps, double cutoff,
                                                             std::optional<int64_t> capacity) {
  check_vectors(positions, cell);
  const Tensor r = packed(positions), h = packed(cell);
  check_shape(offsets, "offsets", {r.size(0) + 1});
  const Candidates candidates = candidates_of(offsets, j, image, images);
  const std::optional<Tensor> systems = packed(system_idx), steps = packed(jumps);
  if (steps.has_value()) {
    check_shape(*steps, "jumps", {r.size(0)});
    check_dtype(*steps, "jumps", ScalarType::Int);
  }
  const Jumps jumped{steps.has_value() ? static_cast<const Jump*>(steps->const_data_ptr()) : nullptr,
                     system_data(systems, r.size(0)), num_systems_of(h)};
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> found;
  by_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    const auto select = [&](const auto& allocate) {
      select_cpu<T>(candidates, jumped, data<T>(r), data<T>(h), cutoff, allocate);
    };
    if (capacity.has_value()) {
      found = padded_list<T>(r, cutoff, *capacity, select);
    } else {
      const Outputs list = exact_list<T>(r, select);
      const Tensor count = empty(r, {}, ScalarType::Long);
      *mutable_data<int64_t>(count) = list.shifts.size(0);
      found = {list.mapping, list.shifts, list.vectors, count};
    }
  });
  return *found;
}

}  // namespace

}  // namespace diffnl

STABLE_TORCH_LIBRARY_IMPL(diffnl, CPU, m) {
  m.impl("neighbor_pairs", TORCH_BOX(&diffnl::neighbor_pairs));
  m.impl("neighbor_lists", TORCH_BOX(&diffnl::neighbor_lists));
  m.impl("padded_neighbor_pairs", TORCH_BOX(&diffnl::padded_neighbor_pairs));
  m.impl("compact_candidates", TORCH_BOX(&diffnl::compact_candidates));
  m.impl("candidates_margins", TORCH_BOX(&diffnl::candidates_margins));
  m.impl("merge_candidates", TORCH_BOX(&diffnl::merge_candidates));
  m.impl("select_candidates", TORCH_BOX(&diffnl::select_candidates));
  m.impl("pair_vectors", TORCH_BOX(&diffnl::pair_vectors));
  m.impl("pair_vectors_adjoint", TORCH_BOX(&diffnl::pair_vectors_adjoint));
}
