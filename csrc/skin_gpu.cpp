// Lists that are selected from candidates on a GPU: tensors to pointers, for the kernels of candidates_gpu.hip.

#include "candidates_gpu.h"
#include "search_gpu.h"

namespace diffnl {

namespace {

// What a layer keeps, as its operators get it. Checked like any argument: it is Python that holds it.
struct KeptTensors {
  const Tensor &positions, &cell, &pbc;
  const std::optional<Tensor>& system_idx;
  const Tensor &links, &rows;
  const std::optional<Tensor> num_candidates = std::nullopt, tally = std::nullopt;

  template <typename T>
  GpuCandidates<T> pointers(const Tensor& r, const Tensor& h, const Tensor& flags, bool batch) const {
    const int64_t n = r.size(0), num_systems = num_systems_of(h);
    for (const Tensor* t : {&positions, &cell, &pbc, &links, &rows})
      require(t->is_contiguous(), "what is kept must be contiguous");
    check_search(positions, cell, pbc);
    check_dtype(positions, "kept_positions", r.scalar_type());
    check_shape(positions, "kept_positions", {n, 3});
    require(num_systems_of(cell) == num_systems, "wrong shape of kept_cell");
    require(pbc.dim() == flags.dim(), "wrong shape of kept_pbc");
    require(system_idx.has_value() == batch, "kept_system_idx must be given with system_idx");
    check_shape(links, "links", {-1});
    check_dtype(links, "links", ScalarType::Long);
    check_shape(rows, "rows", {num_rows(n, num_systems)});
    check_dtype(rows, "rows", ScalarType::Long);
    if (tally.has_value()) {
      check_shape(*tally, "tally", {2});
      check_dtype(*tally, "tally", ScalarType::Long);
    }
    const RowPointers row(rows, n);
    return {mutable_data<T>(positions),
            mutable_data<T>(cell),
            mutable_data<bool>(pbc),
            const_cast<int64_t*>(system_data(system_idx, n)),
            static_cast<Link*>(links.mutable_data_ptr()),
            row.offsets,
            row.order,
            row.first_of_system,
            links.size(0),
            const_cast<int64_t*>(live_pairs(num_candidates)),
            tally.has_value() ? mutable_data<unsigned long long>(*tally) : nullptr};
  }
};

// What a selection reads and writes.
template <typename T>
class Selection {
 public:
  Selection(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
            const std::optional<Tensor>& system_idx, const KeptTensors& kept, double cutoff, double radius,
            bool full, bool linked)
      : flags_(packed(pbc)),
        rows(
            empty(positions, {linked ? num_rows(positions.size(0), num_systems_of(cell)) : 0}, ScalarType::Long)) {
    static_cast<GpuAtoms<T>&>(s) = atoms_of<T>(positions, cell, flags_, system_idx);
    const int64_t n = s.num_atoms;
    require(n > 0, "a selection takes atoms");
    s.kept = kept.pointers<T>(positions, cell, flags_, system_idx.has_value());
    s.cutoff = cutoff;
    s.radius = radius;
    s.cutoff2 = static_cast<T>(cutoff * cutoff);
    s.full = full;
    s.capacity = -1;

    work_.add(s.state, 1);
    work_.add(s.row_counts, n);
    work_.add(s.jumps, n);
    cleared_ = work_.bytes();
    work_.add(s.drifts, s.num_systems);
    work_.add(s.ranks, s.kept.room);
    work_.add(s.partial_sums, partial_sums_for(n));
    if (!linked) work_.add(s.offsets, n + 1);
    work_.allocate(positions);
    if (linked) {
      const RowPointers row(rows, n);
      s.offsets = row.offsets;
      s.order = row.order;
      s.first_of_system = row.first_of_system;
    }
  }
  Selection(const Selection&) = delete;  // `s` points into `work_`

  void begin(GpuStream stream) { set_on_device(s.state, 0, cleared_, stream); }

 private:
  Workspace work_;
  Tensor flags_;
  int64_t cleared_ = 0;

 public:
  GpuSelection<T> s{};
  const Tensor rows;
};

// Links of all pairs within `radius`, and rows: none where a pair cannot be linked.
std::tuple<Tensor, Tensor> search_candidates(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                                             const std::optional<Tensor>& system_idx, double radius) {
  return with_search_input(positions, cell, pbc, system_idx, [&](auto zero, const auto&... in) {
    using T = decltype(zero);
    const auto& [r, h, systems] = std::tie(in...);
    const OnDevice on(r);
    const int64_t n = r.size(0);
    Search<T> work(r, h, pbc, systems, radius, true, true);
    const Tensor by_bin = empty(r, {n}, ScalarType::Long);
    GpuSearch<T>& s = work.s;
    s.order = mutable_data<int64_t>(by_bin);
    s.most_pairs = pairs_in_device_memory<T>();
    PendingCount pending(on.stream());
    s.summary = pending.summary;
    s.likely_bins = n / 8 + 1;
    work.count(on.stream());
    pending.mark();
    const Summary summary = pending.wait();
    if (summary.fault != 0) raise_fault(summary, s.system_idx, on.stream());
    const int64_t count = summary.linkable != 0 ? summary.num_pairs : 0;
    const auto made = if_memory_suffices([&] {
      return std::array<Tensor, 2>{empty(r, {count}, ScalarType::Long), empty(r, {count}, ScalarType::Long)};
    });
    if (!made.has_value()) data_error("out_of_memory", count);
    const auto& [unsorted, links] = *made;
    if (summary.linkable == 0) return std::tuple(links, empty(r, {0}, ScalarType::Long));
    Link* from = static_cast<Link*>(unsorted.mutable_data_ptr());
    fill_pairs(s, summary.num_bins, GpuPairs<T>{nullptr, nullptr, nullptr, from, count}, on.stream());
    const RowPointers row(work.rows, n);
    GpuCandidates<T> kept{};
    kept.links = static_cast<Link*>(links.mutable_data_ptr());
    kept.order = row.order;
    keep_candidates(s, from, kept, on.stream());
    return std::tuple(links, work.rows);
  });
}

// The number of pairs, -1 if the candidates do not hold them all; whether atoms have jumped; then the list.
std::tuple<int64_t, bool, Tensor, Tensor, Tensor, Tensor, Tensor> select_linked(
    const Tensor& positions, const Tensor& cell, const Tensor& pbc, const std::optional<Tensor>& system_idx,
    const Tensor& kept_positions, const Tensor& kept_cell, const Tensor& kept_pbc,
    const std::optional<Tensor>& kept_system_idx, const Tensor& links, const Tensor& rows, double cutoff,
    double radius, bool full, bool linked, bool ask) {
  return with_search_input(positions, cell, pbc, system_idx, [&](auto zero, const auto&... in) {
    using T = decltype(zero);
    const auto& [r, h, systems] = std::tie(in...);
    const OnDevice on(r);
    const KeptTensors kept{kept_positions, kept_cell, kept_pbc, kept_system_idx, links, rows};
    Selection<T> work(r, h, pbc, systems, kept, cutoff, radius, full, linked && full);
    GpuSelection<T>& s = work.s;
    PendingCount pending(on.stream());
    s.summary = pending.summary;
    work.begin(on.stream());
    if (ask) ask_candidates(s, on.stream());
    count_selected(s, on.stream());
    pending.mark();
    const Summary summary = pending.wait();
    const int64_t count = summary.must_search != 0 ? 0 : summary.num_pairs;
    const auto made = if_memory_suffices([&] { return make_outputs(r, count, linked && full); });
    if (!made.has_value()) data_error("out_of_memory", count);
    Found found = *made;
    found.rows = work.rows;
    if (summary.must_search == 0) fill_selected(s, pointers<T>(found, count), on.stream());
    return std::tuple(summary.must_search != 0 ? int64_t(-1) : count, summary.jumped != 0, found.mapping,
                      found.shifts, found.vectors, found.links, found.rows);
  });
}

// A padded list. Searches if the candidates do not hold all pairs, which only the device knows.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> padded_select_linked(
    const Tensor& positions, const Tensor& cell, const Tensor& pbc, const std::optional<Tensor>& system_idx,
    const Tensor& kept_positions, const Tensor& kept_cell, const Tensor& kept_pbc,
    const std::optional<Tensor>& kept_system_idx, const Tensor& links, const Tensor& rows,
    const Tensor& num_candidates, const Tensor& tally, double cutoff, double radius, int64_t capacity, bool full,
    bool linked) {
  check_capacity(capacity);
  return with_search_input(positions, cell, pbc, system_idx, [&](auto zero, const auto&... in) {
    using T = decltype(zero);
    const auto& [r, h, systems] = std::tie(in...);
    const OnDevice on(r);
    const int64_t n = r.size(0);
    const KeptTensors kept{kept_positions, kept_cell, kept_pbc,       kept_system_idx,
                           links,          rows,      num_candidates, tally};
    const Tensor num_pairs = empty(r, {}, ScalarType::Long);
    Selection<T> selection(r, h, pbc, systems, kept, cutoff, radius, full, linked && full);
    GpuSelection<T>& s = selection.s;
    s.capacity = capacity;
    s.num_pairs = mutable_data<int64_t>(num_pairs);
    selection.begin(on.stream());
    ask_candidates(s, on.stream());

    Search<T> search(r, h, pbc, systems, radius, true, true, rows);
    const Tensor by_bin = empty(r, {n}, ScalarType::Long), unsorted = empty(r, {s.kept.room}, ScalarType::Long);
    search.s.needed = &s.state->must_search;
    search.s.order = mutable_data<int64_t>(by_bin);
    search.s.capacity = s.kept.room;
    search.s.num_pairs = s.kept.num_candidates;
    search.s.most_pairs = int64_t(1) << 34;  // more than any device could hold
    search.s.likely_bins = n / 8 + 1;
    search.count(on.stream());
    Link* from = static_cast<Link*>(unsorted.mutable_data_ptr());
    fill_pairs_if_they_fit(search.s, s.kept.room, GpuPairs<T>{nullptr, nullptr, nullptr, from, s.kept.room},
                           on.stream());
    keep_candidates(search.s, from, s.kept, on.stream());

    count_selected(s, on.stream());
    Found found = make_outputs(r, capacity, linked && full);
    found.rows = selection.rows;
    fill_selected(s, pointers<T>(found, capacity), on.stream());
    return std::tuple(found.mapping, found.shifts, found.vectors, num_pairs, found.links, found.rows);
  });
}

int64_t exchange_mode(const Tensor& like, int64_t mode) {
  const OnDevice on(like);
  return exchange_capture_mode(static_cast<int>(mode));
}

}  // namespace

}  // namespace diffnl

STABLE_TORCH_LIBRARY_IMPL(diffnl, DIFFNL_GPU_KEY, m) {
  m.impl("search_candidates", TORCH_BOX(&diffnl::search_candidates));
  m.impl("select_linked", TORCH_BOX(&diffnl::select_linked));
  m.impl("padded_select_linked", TORCH_BOX(&diffnl::padded_select_linked));
  m.impl("exchange_capture_mode", TORCH_BOX(&diffnl::exchange_mode));
}
