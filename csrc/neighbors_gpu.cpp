// The search on a GPU: tensors to pointers, on the device of the tensors and on torch's current stream.

#include "search_gpu.h"

namespace diffnl {

namespace {

// The same with fewer pairs, in the same memory.
Found cut(const Found& from, int64_t num_pairs, bool linked) {
  return {front_of(from.mapping, {2, num_pairs}), front_of(from.shifts, {num_pairs, 3}),
          front_of(from.vectors, {num_pairs, 3}), front_of(from.links, {linked ? num_pairs : 0}), from.rows};
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
  linked = linked && full;
  static thread_local Guess guess;
  Search<T> work(positions, cell, pbc, system_idx, cutoff, full, linked);
  GpuSearch<T>& s = work.s;
  const int64_t n = s.num_atoms;
  s.most_pairs = pairs_in_device_memory<T>();
  PendingCount pending(on.stream());
  s.summary = pending.summary;
  s.likely_bins = guess.bins(n);
  work.count(on.stream());
  pending.mark();

  const double volumes = static_cast<double>(n) * cutoff * cutoff * cutoff * (full ? 1.0 : 0.5);
  const int64_t bytes_a_pair = 28 + 3 * static_cast<int64_t>(sizeof(T)) + (linked ? 8 : 0);
  const int64_t room = sorted ? 0 : guess.pairs(volumes, bytes_a_pair);
  std::optional<Found> roomy;
  if (room > 0) roomy = if_memory_suffices([&] { return make_outputs(positions, room, linked); });
  if (roomy.has_value()) fill_pairs_if_they_fit(s, room, pointers<T>(*roomy, room), on.stream());

  const Summary summary = pending.wait();
  if (summary.fault != 0) raise_fault(summary, s.system_idx, on.stream());
  const int64_t num_pairs = summary.num_pairs;
  if (n > 0) guess.learn(summary, n, volumes);
  linked = linked && summary.linkable != 0 && num_pairs > 0;
  if (roomy.has_value() && Guess::suits(room, num_pairs, bytes_a_pair)) {
    Found found = cut(*roomy, num_pairs, linked);
    if (linked) found.rows = work.rows;
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
  if (linked) found.rows = work.rows;
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

// The list in room for `capacity` pairs; nobody waits for anything, nothing is learned.
template <typename T>
std::pair<Found, Tensor> padded_search(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                       const std::optional<Tensor>& system_idx, double cutoff, int64_t capacity,
                                       bool full, bool sorted, bool linked) {
  const OnDevice on(positions);
  const Tensor num_pairs = empty(positions, {}, ScalarType::Long);
  Search<T> work(positions, cell, pbc, system_idx, cutoff, full, linked);
  GpuSearch<T>& s = work.s;
  s.capacity = capacity;
  s.num_pairs = mutable_data<int64_t>(num_pairs);
  s.most_pairs = int64_t(1) << 34;  // more than any device could hold
  s.likely_bins = s.num_atoms / 8 + 1;
  work.count(on.stream());

  Found found = make_outputs(positions, capacity, linked);
  found.rows = work.rows;
  const GpuPairs<T> pairs = pointers<T>(found, capacity);
  if (sorted) {
    const Tensor mapping = empty(positions, {2, capacity}, ScalarType::Long);
    const Tensor shifts = empty(positions, {capacity, 3}, ScalarType::Int);
    const GpuPairs<T> unsorted{mutable_data<int64_t>(mapping), mutable_data<int32_t>(shifts), nullptr, nullptr,
                               capacity};
    fill_pairs_if_they_fit(s, capacity, unsorted, on.stream());
    sort_rows(s, unsorted, pairs, on.stream());
    pad_pairs(s, pairs, on.stream());
  } else {
    fill_pairs_if_they_fit(s, capacity, pairs, on.stream());
  }
  return {found, num_pairs};
}

Found find_pairs(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                 const std::optional<Tensor>& system_idx, double cutoff, bool full, bool sorted, bool linked) {
  return with_search_input(positions, cell, pbc, system_idx, [&](auto zero, const auto&... in) {
    const auto& [r, h, systems] = std::tie(in...);
    return search<decltype(zero)>(r, h, pbc, systems, cutoff, full, sorted, linked);
  });
}

std::pair<Found, Tensor> find_padded(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                     const std::optional<Tensor>& system_idx, double cutoff, int64_t capacity,
                                     bool full, bool sorted, bool linked) {
  check_capacity(capacity);
  return with_search_input(positions, cell, pbc, system_idx, [&](auto zero, const auto&... in) {
    const auto& [r, h, systems] = std::tie(in...);
    const auto found = if_memory_suffices(
        [&] { return padded_search<decltype(zero)>(r, h, pbc, systems, cutoff, capacity, full, sorted, linked); });
    if (!found.has_value()) data_error("capacity_out_of_memory", capacity);
    return *found;
  });
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

std::tuple<Tensor, Tensor, Tensor, Tensor> padded_neighbor_pairs(const Tensor& positions, const Tensor& cell,
                                                                 const Tensor& pbc,
                                                                 const std::optional<Tensor>& system_idx,
                                                                 double cutoff, int64_t capacity, bool full,
                                                                 bool sorted) {
  const auto [found, num_pairs] =
      find_padded(positions, cell, pbc, system_idx, cutoff, capacity, full, sorted, false);
  return {found.mapping, found.shifts, found.vectors, num_pairs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> padded_linked_neighbor_pairs(
    const Tensor& positions, const Tensor& cell, const Tensor& pbc, const std::optional<Tensor>& system_idx,
    double cutoff, int64_t capacity, bool sorted) {
  const auto [found, num_pairs] =
      find_padded(positions, cell, pbc, system_idx, cutoff, capacity, true, sorted, true);
  return {found.mapping, found.shifts, found.vectors, num_pairs, found.links, found.rows};
}

}  // namespace

}  // namespace diffnl

STABLE_TORCH_LIBRARY_IMPL(diffnl, DIFFNL_GPU_KEY, m) {
  m.impl("neighbor_pairs", TORCH_BOX(&diffnl::neighbor_pairs));
  m.impl("linked_neighbor_pairs", TORCH_BOX(&diffnl::linked_neighbor_pairs));
  m.impl("padded_neighbor_pairs", TORCH_BOX(&diffnl::padded_neighbor_pairs));
  m.impl("padded_linked_neighbor_pairs", TORCH_BOX(&diffnl::padded_linked_neighbor_pairs));
}
