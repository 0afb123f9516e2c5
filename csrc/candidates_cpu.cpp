// Selecting the pairs of a list from candidates, and whether they still hold all of them (drift.h).

#include "candidates_cpu.h"

#include <map>
#include <vector>

#include "drift.h"
#include "parallel.h"
#include "tile.h"

namespace diffnl {

namespace {

// ------------------------------------------------------------------------------------------ selection

// Blocks of rows for the threads: large enough to be worth a handshake, small enough to share.
int64_t row_block(int64_t num_rows) {
  return std::clamp<int64_t>(num_rows / (8 * int64_t(torch::stable::get_num_threads())), 16, 512);
}

// What all rows share.
template <typename T>
class Gathered {
 public:
  Gathered(const Candidates& candidates, const T* positions, const T* cell)
      : images_(candidates.images),
        memory_(static_cast<size_t>(4 * (candidates.num_atoms + candidates.num_images))) {
    T *r = memory_.data(), *t = r + 4 * candidates.num_atoms;
    for (int64_t i = 0; i < candidates.num_atoms; ++i) std::copy_n(positions + 3 * i, 3, r + 4 * i);
    for (int64_t m = 0; m < candidates.num_images; ++m) {
      const int32_t* S = candidates.images + 4 * m;
      const T s0 = static_cast<T>(S[0]), s1 = static_cast<T>(S[1]), s2 = static_cast<T>(S[2]);
      for (int k = 0; k < 3; ++k) t[4 * m + k] = cell_translation(s0, s1, s2, cell + 9 * int64_t(S[3]), k);
    }
    source = {r, t};
  }

  // The chosen candidates of a row as a row of a list.
  void write(const CandidateRow<T>& row, const int32_t* chosen, int count, int64_t* mapping_j, int32_t* shifts,
             T* vectors) const {
    using V = typename Lanes<T>::type;
    // Names of their own: what is written might change members, for all that the compiler knows.
    const T *positions = source.positions, *translations = source.translations;
    const int32_t *images = images_, *j = row.j, *image = row.image;
    const V ri{row.ri.x, row.ri.y, row.ri.z, 0};
    const auto image_of = [&](int n) { return 4 * int64_t(image[chosen[n]]); };
    const auto vector_of = [&](int n) {
      return (lanes_at(positions + 4 * int64_t(j[chosen[n]])) - ri) + lanes_at(translations + image_of(n));
    };
    if (count == 0) return;
    for (int n = 0; n < count; ++n) mapping_j[n] = j[chosen[n]];
    // The spare component lands where the next pair follows; the last pair has none to spare.
    const int last = count - 1;
    for (int n = 0; n < last; ++n) lanes_at(shifts + 3 * n) = lanes_at(images + image_of(n));
    std::copy_n(images + image_of(last), 3, shifts + 3 * last);
    for (int n = 0; n < last; ++n) lanes_at(vectors + 3 * n) = vector_of(n);
    const V v = vector_of(last);
    for (int k = 0; k < 3; ++k) vectors[3 * last + k] = v[k];
  }

  RowSource<T> source;

 private:
  const int32_t* images_;
  std::vector<T> memory_;
};

}  // namespace

// Two passes over rows: mark and count, then write. Between them a candidate is a bit.
template <typename T>
void select_cpu(const Candidates& candidates, const T* positions, const T* cell, double cutoff,
                const std::function<PairOutput<T>(int64_t)>& allocate) {
  const Gathered<T> gathered(candidates, positions, cell);
  const T cutoff2 = static_cast<T>(cutoff * cutoff);
  const int64_t num_rows = candidates.num_atoms, *offsets = candidates.offsets;
  const auto row_of = [&](int64_t i) {
    const T* r = positions + 3 * i;
    return CandidateRow<T>{{r[0], r[1], r[2]},
                           candidates.j + offsets[i],
                           candidates.image + offsets[i],
                           static_cast<int>(offsets[i + 1] - offsets[i])};
  };
  // Where the marks of each row begin, and its pairs.
  std::vector<int64_t> words(static_cast<size_t>(num_rows) + 1, 0), first(words);
  for (int64_t i = 0; i < num_rows; ++i)
    words[static_cast<size_t>(i) + 1] = words[static_cast<size_t>(i)] + ceil_div(offsets[i + 1] - offsets[i], 16);
  std::vector<uint16_t> marks(static_cast<size_t>(words.back()));
  const auto marks_of = [&](int64_t i) { return marks.data() + words[static_cast<size_t>(i)]; };

  parallel_blocks(num_rows, row_block(num_rows), [&](int64_t begin, int64_t end) {
    std::vector<T> d2;
    for (int64_t i = begin; i < end; ++i) {
      const CandidateRow<T> row = row_of(i);
      d2.resize(static_cast<size_t>(row.size));
      measure_candidates(gathered.source, row, d2.data());
      first[static_cast<size_t>(i) + 1] = mark_below(d2.data(), row.size, cutoff2, marks_of(i));
    }
  });
  for (size_t i = 0; i < static_cast<size_t>(num_rows); ++i) first[i + 1] += first[i];
  const PairOutput<T> out = allocate(first.back());
  parallel_blocks(num_rows, row_block(num_rows), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> chosen;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = first[static_cast<size_t>(i)], count = first[static_cast<size_t>(i) + 1] - at;
      const CandidateRow<T> row = row_of(i);
      chosen.resize(static_cast<size_t>(count) + kSelectSpare);
      select_marked(marks_of(i), row.size, chosen.data());
      std::fill_n(out.mapping + at, count, i);
      gathered.write(row, chosen.data(), static_cast<int>(count), out.mapping + out.capacity + at,
                     out.shifts + 3 * at, out.vectors + 3 * at);
    }
  });
}

namespace {

// Numbers images in the order in which they are met: in a table of all (system, S) within the list's reach, or,
// where that would have more entries than the list, in a map.
class ImageNumbers {
 public:
  explicit ImageNumbers(const PairList& list) {
    std::array<int32_t, 3> high{0, 0, 0};
    for (int64_t k = 0; k < 3 * list.num_pairs; ++k) {
      const size_t axis = static_cast<size_t>(k % 3);
      low_[axis] = std::min(low_[axis], list.shifts[k]);
      high[axis] = std::max(high[axis], list.shifts[k]);
    }
    double entries = static_cast<double>(list.num_systems);
    for (size_t axis = 0; axis < 3; ++axis) {
      span_[axis] = int64_t(high[axis]) - low_[axis] + 1;
      entries *= static_cast<double>(span_[axis]);
    }
    if (entries <= std::max(1e5, static_cast<double>(list.num_pairs)))
      table_.assign(static_cast<size_t>(entries), -1);
  }

  int32_t operator()(const std::array<int32_t, 4>& image, std::vector<int32_t>& images) {
    int32_t& number = table_.empty() ? map_.try_emplace(image, -1).first->second : table_[place(image)];
    if (number < 0) {
      number = static_cast<int32_t>(images.size() / 4);
      images.insert(images.end(), image.begin(), image.end());
    }
    return number;
  }

 private:
  size_t place(const std::array<int32_t, 4>& image) const {
    int64_t at = image[3];
    for (size_t axis = 0; axis < 3; ++axis) at = at * span_[axis] + (image[axis] - low_[axis]);
    return static_cast<size_t>(at);
  }

  std::array<int32_t, 3> low_{0, 0, 0};
  std::array<int64_t, 3> span_{1, 1, 1};
  std::vector<int32_t> table_;
  std::map<std::array<int32_t, 4>, int32_t> map_;
};

}  // namespace

void compact(const PairList& list, const CompactList& out, std::vector<int32_t>& images) {
  const int64_t *i = list.mapping, *j = list.mapping + list.capacity;
  ImageNumbers number_of(list);
  int64_t row = 0;
  out.offsets[0] = 0;
  for (int64_t p = 0; p < list.num_pairs; ++p) {
    const int32_t* S = list.shifts + 3 * p;
    const int32_t b = list.system_idx == nullptr ? 0 : static_cast<int32_t>(list.system_idx[i[p]]);
    while (row < i[p]) out.offsets[++row] = p;
    out.j[p] = static_cast<int32_t>(j[p]);
    out.image[p] = number_of({S[0], S[1], S[2], b}, images);
  }
  while (row < list.num_atoms) out.offsets[++row] = list.num_pairs;
}

void merge(const Candidates& batch, int64_t num_systems, const PartOfBatch& part, int64_t* offsets,
           std::vector<int32_t>& images, const std::function<CompactList(int64_t)>& allocate) {
  // Images belong to one system each: those of the replaced systems go, the new ones come behind the rest.
  std::vector<bool> replaced(static_cast<size_t>(num_systems), false);
  for (int64_t b = 0; b < part.num_systems; ++b) replaced[static_cast<size_t>(part.systems[b])] = true;
  std::vector<int32_t> renumbered(static_cast<size_t>(batch.num_images), -1);
  for (int64_t m = 0; m < batch.num_images; ++m) {
    const int32_t* image = batch.images + 4 * m;
    if (replaced[static_cast<size_t>(image[3])]) continue;
    renumbered[static_cast<size_t>(m)] = static_cast<int32_t>(images.size() / 4);
    images.insert(images.end(), image, image + 4);
  }
  const int32_t first_new = static_cast<int32_t>(images.size() / 4);
  for (int64_t m = 0; m < part.candidates.num_images; ++m) {
    const int32_t* image = part.candidates.images + 4 * m;
    images.insert(images.end(), {image[0], image[1], image[2], static_cast<int32_t>(part.systems[image[3]])});
  }

  const auto for_each_row = [&](const auto& visit) {
    int64_t a = 0;
    for (int64_t i = 0; i < batch.num_atoms; ++i) {
      const bool is_new = a < part.candidates.num_atoms && part.atoms[a] == i;
      visit(i, is_new ? part.candidates : batch, is_new ? a : i, is_new);
      a += is_new;
    }
  };
  offsets[0] = 0;
  for_each_row([&](int64_t i, const Candidates& from, int64_t row, bool) {
    offsets[i + 1] = offsets[i] + (from.offsets[row + 1] - from.offsets[row]);
  });
  const CompactList out = allocate(offsets[batch.num_atoms]);
  for_each_row([&](int64_t i, const Candidates& from, int64_t row, bool is_new) {
    int64_t to = offsets[i];
    for (int64_t p = from.offsets[row]; p < from.offsets[row + 1]; ++p, ++to) {
      out.j[to] = is_new ? static_cast<int32_t>(part.atoms[from.j[p]]) : from.j[p];
      out.image[to] = is_new ? first_new + from.image[p] : renumbered[static_cast<size_t>(from.image[p])];
    }
  });
}

// ------------------------------------------------------------------------------------------ validity

template <typename T>
void find_margins(const Motion<T>& motion, double cutoff, double radius, double* margins) {
  struct Moves {
    Drift drift;
    bool known;
    double most2 = 0.0;    // max |u|^2
    double largest = 0.0;  // |component| of a position
  };
  std::vector<Moves> moves(static_cast<size_t>(motion.num_systems));
  for (size_t b = 0; b < moves.size(); ++b) {
    const int64_t at = static_cast<int64_t>(b);
    const bool* pbc = motion.pbc + at * motion.pbc_stride;
    moves[b].known = make_drift(motion.old_cell + 9 * at, motion.cell + 9 * at, pbc, moves[b].drift);
  }
  for (int64_t i = 0; i < motion.num_atoms; ++i) {
    Moves& of_system = moves[motion.system_idx == nullptr ? 0 : static_cast<size_t>(motion.system_idx[i])];
    if (!of_system.known) continue;
    const T *from = motion.old_positions + 3 * i, *to = motion.positions + 3 * i;
    const double moved2 = squared_move(of_system.drift, from, to);
    of_system.known = std::isfinite(moved2);  // max would lose a NaN
    of_system.most2 = std::max(of_system.most2, moved2);
    for (int c = 0; c < 3; ++c)
      of_system.largest = std::max(of_system.largest, std::abs(static_cast<double>(to[c])));
  }
  for (size_t b = 0; b < moves.size(); ++b)
    margins[b] = moves[b].known ? margin<T>(moves[b].drift, moves[b].most2, moves[b].largest, cutoff, radius)
                                : -std::numeric_limits<double>::infinity();
}

#define DIFFNL_INSTANTIATE(T)                                             \
  template void select_cpu(const Candidates&, const T*, const T*, double, \
                           const std::function<PairOutput<T>(int64_t)>&); \
  template void find_margins(const Motion<T>&, double, double, double*);
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
