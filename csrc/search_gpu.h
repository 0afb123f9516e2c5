// A search on a GPU as its operators set it up: what it reads and writes, and what it raises.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "gpu_tensors.h"

namespace diffnl {

// How many notes on the bins of their stencils the search can keep of all atoms. One atom in a tiny cell has
// hundreds of bins around it; where atoms are many, 27 must do. It also bounds how narrow bins may be, with links
// or without: the order of a row must not depend on who asks for a gradient.
inline int64_t segment_capacity(int64_t num_atoms) {
  constexpr int64_t plenty = int64_t(1) << 24, least = int64_t(1) << 18;
  return std::max({27 * num_atoms, std::min(343 * num_atoms, plenty), least});
}

inline SearchPrices search_prices(int64_t num_atoms) {
  const int64_t stencil = segment_capacity(num_atoms) / std::max<int64_t>(num_atoms, 1);
  return {20.0, 4.0, 512.0, static_cast<double>(num_atoms), stencil >= 343 ? 3 : stencil >= 125 ? 2 : 1};
}

[[noreturn]] inline void raise_fault(const Summary& summary, const int64_t* system_idx, GpuStream stream) {
  const Fault kind = kind_of_fault(summary.fault);
  const int64_t number = number_of_fault(summary.fault);
  const char* code = kFaultNames[static_cast<size_t>(kind)];
  if (kind == Fault::system_idx_out_of_range)
    data_error(code, read_from_device(system_idx + number, stream), number);
  if (kind == Fault::out_of_memory) data_error(code, std::max(summary.num_pairs, number));
  data_error(code, number);
}

// A count on its way to the host. The device writes its summary to memory of this thread, which the next search
// uses again: nobody leaves before that has happened, by an exception either.
class PendingCount {
 public:
  explicit PendingCount(GpuStream stream) : stream_(stream) {}
  PendingCount(const PendingCount&) = delete;
  ~PendingCount() {
    if (pending_) wait_quietly(stream_);
  }
  // Where the stream has all work that `wait` waits for.
  void mark() { mark_end_of_count(stream_); }
  Summary wait() {
    wait_for_summary();
    pending_ = false;
    return *summary;
  }

  Summary* const summary = summary_of_thread();

 private:
  GpuStream stream_;
  bool pending_ = true;
};

// A list on its way to its operator's outputs.
struct Found {
  Tensor mapping, shifts, vectors, links, rows;
};

// The tensors of a list of `num_pairs` pairs.
inline Found make_outputs(const Tensor& positions, int64_t num_pairs, bool linked) {
  return {empty(positions, {2, num_pairs}, ScalarType::Long), empty(positions, {num_pairs, 3}, ScalarType::Int),
          empty(positions, {num_pairs, 3}, positions.scalar_type()),
          empty(positions, {linked ? num_pairs : 0}, ScalarType::Long), empty(positions, {0}, ScalarType::Long)};
}

template <typename T>
GpuPairs<T> pointers(const Found& found, int64_t num_pairs) {
  Link* links =
      found.links.size(0) > 0 ? static_cast<Link*>(found.links.mutable_data_ptr()) : static_cast<Link*>(nullptr);
  return {mutable_data<int64_t>(found.mapping), mutable_data<int32_t>(found.shifts),
          mutable_data<T>(found.vectors), links, num_pairs};
}

// What a search reads and writes, in one allocation beside the tensors of the user and of the list.
// `kept_rows` are written instead of new ones.
template <typename T>
class Search {
 public:
  Search(const Tensor& positions, const Tensor& cell, const Tensor& pbc, const std::optional<Tensor>& system_idx,
         double cutoff, bool full, bool linked, const std::optional<Tensor>& kept_rows = std::nullopt)
      : flags_(packed(pbc)),
        rows(kept_rows.has_value()
                 ? *kept_rows
                 : empty(positions, {linked ? num_rows(positions.size(0), num_systems_of(cell)) : 0},
                         ScalarType::Long)) {
    static_cast<GpuAtoms<T>&>(s) = atoms_of<T>(positions, cell, flags_, system_idx);
    const int64_t n = s.num_atoms, num_systems = s.num_systems;
    s.num_slots = 2 * n + 32 * num_systems;
    s.segment_capacity = segment_capacity(n);
    s.capacity = -1;
    s.cutoff = cutoff;
    s.cutoff2 = static_cast<T>(cutoff * cutoff);
    s.full = full;
    s.prices = search_prices(n);

    work_.add(s.state, 1);
    work_.add(s.slot_counts, s.num_slots);
    work_.add(s.row_counts, n);
    work_.add(s.placed, n);
    if (linked) work_.add(s.segments, s.segment_capacity);
    cleared_ = work_.bytes();
    work_.add(s.hits, s.segment_capacity);
    work_.add(s.systems, num_systems);
    work_.add(s.slot_starts, s.num_slots + 1);
    work_.add(s.q, n);
    work_.add(s.w, 3 * n);
    work_.add(s.keys, n);
    work_.add(s.slots, n);
    work_.add(s.ranks, n);
    work_.add(s.unordered, n);
    work_.add(s.sorted_keys, n);
    work_.add(s.atoms, n);
    work_.add(s.places, n);
    work_.add(s.bins, n);
    work_.add(s.partial_sums, partial_sums_for(std::max(s.num_slots, n)));
    if (!linked) work_.add(s.offsets, n + 1);
    work_.allocate(positions);
    if (linked) {
      const RowPointers row(rows, n);
      s.offsets = row.offsets;
      s.order = row.order;
      s.first_of_system = row.first_of_system;
    }
  }
  Search(const Search&) = delete;  // `s` points into `work_`

  void count(GpuStream stream) {
    set_on_device(s.state, 0, cleared_, stream);
    build_cell_list(s, stream);
    count_pairs(s, stream);
  }

 private:
  Workspace work_;
  Tensor flags_;
  int64_t cleared_ = 0;

 public:
  GpuSearch<T> s{};
  const Tensor rows;
};

// Calls run(float) or run(double) on what a search reads, contiguous.
template <typename Run>
auto with_search_input(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                       const std::optional<Tensor>& system_idx, const Run& run) {
  const ScalarType dtype = floating_dtype(positions);
  check_search(positions, cell, pbc);
  // Atoms, and slots of the table of bins (2 N + 32 B), have numbers of 32 bits.
  require(positions.size(0) < (int64_t(1) << 30), "`positions` must hold fewer than 2**30 atoms");
  require(num_systems_of(cell) < (int64_t(1) << 26), "`cell` must hold fewer than 2**26 systems");
  const Tensor r = packed(positions), h = packed(cell);
  const std::optional<Tensor> systems = packed(system_idx);
  return dtype == ScalarType::Float ? run(0.0f, r, h, systems) : run(0.0, r, h, systems);
}

}  // namespace diffnl
