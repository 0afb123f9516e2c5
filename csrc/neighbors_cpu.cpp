// The search: walk the candidates of every bin, test them with the exact arithmetic, count, then fill.
//
// One traversal, two sinks. Candidates of a bin are copied into a tile (tile.h) and tested against each atom of
// the bin. Rows are written where an exclusive scan of the counts puts them: their order does not depend on
// bins or threads.

#include "neighbors_cpu.h"

#include <unistd.h>

#include "tile.h"

namespace diffnl {

namespace {

// Stops a count that has already found more pairs than the machine's memory could hold: a cutoff given in
// the wrong unit would otherwise count for hours before it fails.
class Budget {
 public:
  explicit Budget(int64_t pairs) : left_(pairs) {}
  bool exhausted() const { return left_.load(std::memory_order_relaxed) < 0; }
  void spend(int64_t pairs) { left_.fetch_sub(pairs, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> left_;
};

template <typename T>
int64_t pairs_in_memory() {
  const int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  return bytes / static_cast<int64_t>(2 * sizeof(int64_t) + 3 * sizeof(int32_t) + 3 * sizeof(T));
}

// One of the lists that a search makes.
template <typename T>
struct List {
  T cutoff2;
  std::vector<int64_t>
      next;  // (N,), by the caller's number of the atom: the length of its row, then where it goes on
  std::vector<int64_t> offsets;  // (N + 1,): row i is pairs offsets[i] .. offsets[i + 1]
  PairOutput<T> out;

  List(double cutoff, size_t num_atoms)
      : cutoff2(static_cast<T>(cutoff * cutoff)), next(num_atoms, 0), offsets(num_atoms + 1, 0), out{} {}
};

// What the traversal and both sinks share.
template <typename T>
struct Search {
  const SearchInput<T>& in;
  const CellList<T>& list;

  Vec3<T> position(int64_t a) const {
    const auto& r = list.atoms().r;
    const size_t at = static_cast<size_t>(a);
    return {r[0][at], r[1][at], r[2][at]};
  }

  // (i, i, S = 0) is not a pair.
  void measure_others(Tile<T>& tile, int64_t a) const {
    measure(tile, position(a));
    if (tile.home_first <= a && a < tile.home_last)
      tile.d2[static_cast<size_t>(a - tile.home_shift)] = std::numeric_limits<T>::infinity();
  }

  // Entries of the tile that are neighbours of sorted atom a, after `measure_others`. Returns how many.
  int select(const Tile<T>& tile, int64_t a, T cutoff2, Selection& chosen) const {
    const int count = select_below(tile.d2.data(), tile.size, cutoff2, chosen.data());
    if (in.full) return count;
    const int64_t i = list.atoms().index[static_cast<size_t>(a)];
    int kept = 0;
    for (int n = 0; n < count; ++n) {
      const size_t c = static_cast<size_t>(chosen[static_cast<size_t>(n)]);
      chosen[static_cast<size_t>(kept)] = static_cast<int32_t>(c);
      kept += in_half(i, tile.j[c], tile.s0[c] + tile.w0, tile.s1[c] + tile.w1, tile.s2[c] + tile.w2);
    }
    return kept;
  }
};

template <typename T>
struct CountSink {
  const Search<T>& search;
  std::vector<List<T>>& lists;
  Selection chosen;

  // Returns how many pairs of the longest list are new.
  int take(Tile<T>& tile, int64_t a) {
    const size_t i = static_cast<size_t>(search.list.atoms().index[static_cast<size_t>(a)]);
    const int64_t before = lists[0].next[i];
    if (search.in.full) {
      const Vec3<T> ri = search.position(a);
      size_t k = 0;
      for (; k + 2 <= lists.size(); k += 2) {
        const auto counts = count_within(tile, ri, {lists[k].cutoff2, lists[k + 1].cutoff2});
        lists[k].next[i] += counts[0];
        lists[k + 1].next[i] += counts[1];
      }
      if (k < lists.size()) lists[k].next[i] += count_within(tile, ri, lists[k].cutoff2);
      // (i, i, S = 0), at distance 0: counted unless cutoff * cutoff has rounded to 0.
      if (tile.home_first <= a && a < tile.home_last)
        for (List<T>& list : lists) list.next[i] -= list.cutoff2 > 0;
    } else {
      search.measure_others(tile, a);
      for (List<T>& list : lists) list.next[i] += search.select(tile, a, list.cutoff2, chosen);
    }
    return static_cast<int>(lists[0].next[i] - before);
  }

  void translated(Tile<T>&, bool) {}
  void finish(int64_t, int64_t) {}
};

template <typename T>
struct FillSink {
  const Search<T>& search;
  std::vector<List<T>>& lists;
  Selection chosen;

  int take(Tile<T>& tile, int64_t a) {
    const Vec3<T> ri = search.position(a);
    const int64_t i = search.list.atoms().index[static_cast<size_t>(a)];
    search.measure_others(tile, a);
    for (List<T>& list : lists) {
      const PairOutput<T>& out = list.out;
      const int count = search.select(tile, a, list.cutoff2, chosen);
      const int64_t first = list.next[static_cast<size_t>(i)];
      list.next[static_cast<size_t>(i)] += count;
      std::fill_n(out.mapping + first, count, i);
      write_row(tile, ri, chosen.data(), count, out.mapping + out.capacity + first, out.shifts + 3 * first,
                out.vectors + 3 * first);
    }
    return 0;  // all were counted before
  }

  void translated(Tile<T>& tile, bool first) {
    if (first) pack_candidates(tile);
    pack_translations(tile);
  }

  // The rows of sorted atoms first .. last are complete.
  void finish(int64_t first, int64_t last) {
    if (!search.in.sorted) return;
    for (const List<T>& list : lists)
      for (int64_t a = first; a < last; ++a) sort_row(list, search.list.atoms().index[static_cast<size_t>(a)]);
  }

  // Puts row i in order of (j, S): of j and place first, which most often is that order already, because few atoms
  // are neighbours in several images.
  struct Entry {
    int64_t j;
    std::array<int32_t, 3> shift;
    std::array<T, 3> vector;
  };
  std::vector<Entry> row;
  std::vector<int64_t> keys;
  std::vector<int32_t> ranks, order;
  void sort_row(const List<T>& list, int64_t i) {
    const PairOutput<T>& out = list.out;
    const int64_t first = list.offsets[static_cast<size_t>(i)], last = list.offsets[static_cast<size_t>(i) + 1];
    const size_t size = static_cast<size_t>(last - first);
    row.clear();
    keys.clear();
    for (int64_t p = first; p < last; ++p) {
      const int32_t* s = out.shifts + 3 * p;
      const T* v = out.vectors + 3 * p;
      const int64_t j = out.mapping[out.capacity + p];
      row.push_back({j, {s[0], s[1], s[2]}, {v[0], v[1], v[2]}});
      keys.push_back(j << 32 | (p - first));
    }
    order.resize(size);
    constexpr size_t few = 512;
    if (size <= few) {
      ranks.resize(size);
      rank_numbers(keys.data(), static_cast<int>(size), ranks.data());
      for (size_t n = 0; n < size; ++n) order[static_cast<size_t>(ranks[n])] = static_cast<int32_t>(n);
    } else {
      std::sort(keys.begin(), keys.end());
      for (size_t n = 0; n < size; ++n) order[n] = static_cast<int32_t>(keys[n] & 0xffffffff);
    }
    const auto entry = [&](int32_t n) -> const Entry& { return row[static_cast<size_t>(n)]; };
    for (auto begin = order.begin(); begin != order.end();) {
      auto end = begin + 1;
      while (end != order.end() && entry(*end).j == entry(*begin).j) ++end;
      if (end - begin > 1)
        std::sort(begin, end, [&](int32_t a, int32_t b) { return entry(a).shift < entry(b).shift; });
      begin = end;
    }
    for (size_t n = 0; n < size; ++n) {
      const Entry& from = entry(order[n]);
      const int64_t p = first + static_cast<int64_t>(n);
      out.mapping[out.capacity + p] = from.j;
      std::copy_n(from.shift.begin(), 3, out.shifts + 3 * p);
      std::copy_n(from.vector.begin(), 3, out.vectors + 3 * p);
    }
  }
};

// Of the atoms first .. last; or of everything, where the squared reach overflows and nothing may be left out.
template <typename T>
Box<T> bounding_box(const SortedAtoms<T>& atoms, int64_t first, int64_t last, T limit4) {
  constexpr T most = std::numeric_limits<T>::max();
  if (!(limit4 < most)) return {{0, 0, 0}, {most, most, most}};
  Box<T> box;
  for (int k = 0; k < 3; ++k) {
    const auto [low, high] =
        std::minmax_element(atoms.wrapped[k].begin() + first, atoms.wrapped[k].begin() + last);
    box.centre[k] = (*low + *high) / 2;
    box.half[k] = (*high - *low) / 2;
  }
  return box;
}

// All candidates of the atoms first .. last, which share a bin, tile by tile into the sink.
template <typename T, typename Sink>
void traverse_bin(const Search<T>& search, int64_t first, int64_t last, Tile<T>& tile, Sink& sink,
                  Budget& budget) {
  const SortedAtoms<T>& atoms = search.list.atoms();
  const int64_t b = atoms.system[static_cast<size_t>(first)];
  const T* h = search.in.cell + 9 * b;

  const auto flush = [&] {
    bool has_t = false;
    int64_t found = 0;
    for (int64_t a = first; a < last; ++a) {
      const size_t at = static_cast<size_t>(a);
      const T w0 = atoms.w[0][at], w1 = atoms.w[1][at], w2 = atoms.w[2][at];
      if (!has_t || w0 != tile.w0 || w1 != tile.w1 || w2 != tile.w2) {
        has_t = true;
        tile.w0 = w0;
        tile.w1 = w1;
        tile.w2 = w2;
        translate(tile, h);
        sink.translated(tile, a == first);
      }
      found += sink.take(tile, a);
    }
    budget.spend(found);
    tile.size = 0;
    tile.home_first = tile.home_last = 0;
  };

  // Only candidates within reach of the box around the bin's atoms enter the tile.
  const System& system = search.list.system(b);
  const double radius = system.radius;
  const T limit4 = static_cast<T>(4.0 * radius * radius * (1.0 + 8.0 * std::numeric_limits<T>::epsilon()));
  const Box<T> box = bounding_box(atoms, first, last, limit4);
  std::array<T, kTileSize> gaps4;
  Selection near;

  const auto visit = [&](int64_t begin, int64_t end, const int64_t* m) {
    const bool home_image = m[0] == 0 && m[1] == 0 && m[2] == 0;
    const double m0 = static_cast<double>(m[0]), m1 = static_cast<double>(m[1]), m2 = static_cast<double>(m[2]);
    const double* lattice = system.cell.h;
    const Vec3<T> image{static_cast<T>(cell_translation(m0, m1, m2, lattice, 0)),
                        static_cast<T>(cell_translation(m0, m1, m2, lattice, 1)),
                        static_cast<T>(cell_translation(m0, m1, m2, lattice, 2))};
    for (; begin < end; begin += kTileSize) {
      const int size = static_cast<int>(std::min<int64_t>(end - begin, kTileSize));
      const size_t from = static_cast<size_t>(begin);
      measure_gaps4(atoms.wrapped[0].data() + from, atoms.wrapped[1].data() + from, atoms.wrapped[2].data() + from,
                    size, image, box, gaps4.data());
      const int num_near = select_below(gaps4.data(), size, limit4, near.data());
      for (int k = 0; k < num_near;) {
        const int taken = std::min(num_near - k, kTileSize - tile.size);
        const int32_t* entries = near.data() + k;
        if (home_image) {
          // The bin's own atoms are all near, so they follow each other in the tile too.
          const int32_t* own = std::lower_bound(entries, entries + taken, first - begin);
          if (own != entries + taken && *own < last - begin) {
            const int64_t first_own = begin + *own;
            // Where they come in two pieces, the second goes on where the first ended.
            if (tile.home_first == tile.home_last) {
              tile.home_first = first_own;
              tile.home_shift = first_own - (tile.size + (own - entries));
            }
            tile.home_last = std::min(last, first_own + (entries + taken - own));
          }
        }
        for (int n = 0; n < taken; ++n) {
          const size_t a = from + static_cast<size_t>(entries[n]), to = static_cast<size_t>(tile.size + n);
          tile.x[to] = atoms.r[0][a];
          tile.y[to] = atoms.r[1][a];
          tile.z[to] = atoms.r[2][a];
          tile.s0[to] = static_cast<T>(m0) - atoms.w[0][a];
          tile.s1[to] = static_cast<T>(m1) - atoms.w[1][a];
          tile.s2[to] = static_cast<T>(m2) - atoms.w[2][a];
          tile.j[to] = atoms.index[a];
        }
        tile.size += taken;
        k += taken;
        if (tile.size == kTileSize) flush();
      }
    }
    return !budget.exhausted();
  };
  search.list.for_each_run(b, atoms.key[static_cast<size_t>(first)], visit);
  if (tile.size > 0) flush();
  sink.finish(first, last);
}

// About how many nanoseconds one thread needs for a traversal that writes `pairs` pairs: for the tests of
// candidates, for the runs and columns of each atom, and for the pairs. Measured with 64 to 1,000 atoms: within
// a factor of 2 in nearly all, and of 3 in all.
template <typename T>
double work_of(const Search<T>& search, int64_t pairs) {
  constexpr double per_candidate = 0.25, per_atom = 300.0;
  const double per_pair = search.in.sorted ? 40.0 : 10.0;
  double candidates = 0.0;
  for (int64_t b = 0; b < search.in.num_systems; ++b) {
    const System& system = search.list.system(b);
    const double n = static_cast<double>(system.num_atoms);
    if (n == 0.0) continue;
    double share = 1.0;  // of the system's atoms, counted once an image, that are candidates of each
    for (int k = 0; k < 3; ++k) {
      const AxisBins& axis = system.axis[k];
      const double bins = static_cast<double>(2 * axis.reach + 1) / static_cast<double>(axis.bins);
      share *= system.cell.periodic[k] ? bins : std::min(bins, 1.0);
    }
    candidates += n * n * share;
  }
  return per_candidate * candidates + per_atom * static_cast<double>(search.in.num_atoms) +
         per_pair * static_cast<double>(pairs);
}

// Hands every atom's candidates to the sinks, which write `pairs` pairs: `make_sink()` makes one for each block of
// sorted atoms.
template <typename T, typename MakeSink>
void traverse(const Search<T>& search, int64_t pairs, Budget& budget, const MakeSink& make_sink) {
  const int64_t n = search.in.num_atoms;
  const double work = work_of(search, pairs);
  parallel_rows(n, work, [&](int64_t begin, int64_t end) {
    const SortedAtoms<T>& atoms = search.list.atoms();
    auto sink = make_sink();
    Tile<T> tile;
    for (int64_t first = begin, last; first < end && !budget.exhausted(); first = last) {
      const size_t at = static_cast<size_t>(first);
      for (last = first + 1; last < end; ++last) {
        const size_t next = static_cast<size_t>(last);
        if (atoms.key[next] != atoms.key[at] || atoms.system[next] != atoms.system[at]) break;
      }
      traverse_bin(search, first, last, tile, sink, budget);
    }
  });
}

}  // namespace

template <typename T>
void search_cpu(const SearchInput<T>& in, const std::vector<double>& shorter,
                const std::function<PairOutput<T>(int64_t)>& allocate) {
  const CellList<T> cells(in);
  const Search<T> search{in, cells};
  const size_t n = static_cast<size_t>(in.num_atoms);
  std::vector<List<T>> lists;
  lists.emplace_back(in.cutoff, n);
  for (const double cutoff : shorter) lists.emplace_back(cutoff, n);

  const int64_t most_pairs = pairs_in_memory<T>();
  const double fewest_pairs = (in.full ? 2.0 : 1.0) * cells.fewest_pairs();
  if (fewest_pairs > static_cast<double>(most_pairs))
    data_error("out_of_memory", static_cast<int64_t>(std::min(fewest_pairs, 1e16)));
  Budget memory(most_pairs);
  traverse(search, 0, memory, [&] { return CountSink<T>{search, lists, {}}; });
  for (List<T>& list : lists)
    for (size_t i = 0; i < n; ++i) list.offsets[i + 1] = list.offsets[i] + list.next[i];
  if (memory.exhausted()) data_error("out_of_memory", lists[0].offsets[n]);

  int64_t num_pairs = 0;
  for (List<T>& list : lists) {
    num_pairs += list.offsets[n];
    list.out = allocate(list.offsets[n]);
    std::copy_n(list.offsets.begin(), n, list.next.begin());
  }
  Budget unlimited(std::numeric_limits<int64_t>::max());
  traverse(search, num_pairs, unlimited, [&] { return FillSink<T>{search, lists, {}, {}}; });
}

template void search_cpu(const SearchInput<float>&, const std::vector<double>&,
                         const std::function<PairOutput<float>(int64_t)>&);
template void search_cpu(const SearchInput<double>&, const std::vector<double>&,
                         const std::function<PairOutput<double>(int64_t)>&);

}  // namespace diffnl
