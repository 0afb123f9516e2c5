// Selecting the pairs of a list from candidates, and whether they still hold all of them (drift.h).

#include "candidates_cpu.h"

#include <limits>
#include <map>
#include <vector>

#include "parallel.h"
#include "tile.h"

namespace diffnl {

namespace {

// ---------------------------------------------------------------------------------------------- jumps

// The images of a system whose atoms have jumped, numbered so that n_i - n_j is added to a number as it is to S: a
// box in S that holds S + n_i - n_j for all candidates.
struct ImageBox {
  std::array<int64_t, 3> low{0, 0, 0}, high{0, 0, 0};    // of S
  std::array<int64_t, 3> least{0, 0, 0}, most{0, 0, 0};  // of n
  int64_t num_images = 0;                                // of the candidates
  int64_t first = 0;                                     // number of the image `low`; -1 for a box not made

  // Whether atoms have jumped that there are candidates of.
  bool moves() const { return least != most && num_images > 0; }
  int64_t span(size_t k) const { return high[k] - low[k] + 1; }
  int64_t size() const { return span(0) * span(1) * span(2); }
  // Of integers on the three axes, an image's or a jump's: their place in the box, seen from 0.
  template <typename Integer>
  int64_t place(const Integer* n) const {
    return (int64_t(n[0]) * span(1) + n[1]) * span(2) + n[2];
  }
  int64_t number(const int32_t* S) const {
    const int64_t from_low[3] = {S[0] - low[0], S[1] - low[1], S[2] - low[2]};
    return first + place(from_low);
  }
  // Images whose S can be written, no more than `most`.
  bool fits(int64_t most) const {
    for (size_t k = 0; k < 3; ++k)
      if (low[k] < std::numeric_limits<int32_t>::min() || high[k] > std::numeric_limits<int32_t>::max() ||
          span(k) > 1 << 16)
        return false;
    return size() <= most;
  }
};

constexpr int64_t kMostImages = std::numeric_limits<int32_t>::max() / 2;  // they have numbers of 32 bits

// The boxes of systems with jumps; their numbers follow those of the candidates' images. Together they hold at
// most `most_images`: boxes beyond that are not made.
std::vector<ImageBox> image_boxes(const Candidates& candidates, const Jumps& jumps, int64_t most_images) {
  std::vector<ImageBox> boxes(static_cast<size_t>(jumps.num_systems));
  for (int64_t i = 0; i < candidates.num_atoms; ++i) {
    const Jump& jump = jumps.of_atom[i];
    if (!jump.any()) continue;
    ImageBox& box = boxes[jumps.system_of(i)];
    for (size_t k = 0; k < 3; ++k) {
      box.least[k] = std::min<int64_t>(box.least[k], jump.n[k]);
      box.most[k] = std::max<int64_t>(box.most[k], jump.n[k]);
    }
  }
  for (int64_t m = 0; m < candidates.num_images; ++m) {
    const int32_t* image = candidates.images + 4 * m;
    ImageBox& box = boxes[static_cast<size_t>(image[3])];
    for (size_t k = 0; k < 3; ++k) {
      box.low[k] = box.num_images == 0 ? image[k] : std::min<int64_t>(box.low[k], image[k]);
      box.high[k] = box.num_images == 0 ? image[k] : std::max<int64_t>(box.high[k], image[k]);
    }
    ++box.num_images;
  }
  int64_t next = candidates.num_images;
  for (ImageBox& box : boxes) {
    if (!box.moves()) continue;
    for (size_t k = 0; k < 3; ++k) {
      box.low[k] -= box.most[k] - box.least[k];
      box.high[k] += box.most[k] - box.least[k];
    }
    box.first = box.fits(candidates.num_images + most_images - next) ? next : -1;
    if (box.first >= 0) next += box.size();
  }
  return boxes;
}

// ------------------------------------------------------------------------------------------ selection

// What all rows share.
template <typename T>
class Gathered {
 public:
  Gathered(const Candidates& candidates, const Jumps& jumps, const T* positions, const T* cell)
      : candidates_(candidates), images_(candidates.images) {
    int64_t num_images = candidates.num_images;
    if (jumps.of_atom != nullptr) num_images = follow(jumps);
    memory_.resize(static_cast<size_t>(4 * (candidates.num_atoms + num_images)));
    T *r = memory_.data(), *t = r + 4 * candidates.num_atoms;
    for (int64_t i = 0; i < candidates.num_atoms; ++i) std::copy_n(positions + 3 * i, 3, r + 4 * i);
    for (int64_t m = 0; m < num_images; ++m) {
      const int32_t* S = images_ + 4 * m;
      const T s0 = static_cast<T>(S[0]), s1 = static_cast<T>(S[1]), s2 = static_cast<T>(S[2]);
      for (int k = 0; k < 3; ++k) t[4 * m + k] = cell_translation(s0, s1, s2, cell + 9 * int64_t(S[3]), k);
    }
    source = {r, t};
  }

  // The candidates of atom i as they are now. `scratch` holds their images if atoms have jumped.
  CandidateRow<T> row(int64_t i, std::vector<int32_t>& scratch) const {
    const int64_t first = candidates_.offsets[i];
    const int size = static_cast<int>(candidates_.offsets[i + 1] - first);
    const int32_t *j = candidates_.j + first, *image = candidates_.image + first;
    const T* r = source.positions + 4 * i;
    if (size > 0 && !step_of_atom_.empty() && in_box_[static_cast<size_t>(image[0])] >= 0) {
      scratch.resize(static_cast<size_t>(size));
      const int32_t *in_box = in_box_.data(), *step = step_of_atom_.data(), own = step[i];
      int32_t* to = scratch.data();
      for (int c = 0; c < size; ++c) to[c] = in_box[image[c]] + own - step[j[c]];
      image = to;
    }
    return {{r[0], r[1], r[2]}, j, image, size};
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
  // Makes the images that jumps lead to; returns how many there are then.
  int64_t follow(const Jumps& jumps) {
    // The boxes were found small enough when they were asked for; the list may have been merged with another
    // since.
    const std::vector<ImageBox> boxes = image_boxes(candidates_, jumps, kMostImages);
    made_.assign(images_, images_ + 4 * candidates_.num_images);
    in_box_.assign(static_cast<size_t>(candidates_.num_images), -1);
    for (size_t b = 0; b < boxes.size(); ++b) {
      const ImageBox& box = boxes[b];
      if (!box.moves()) continue;
      require(box.first >= 0, "atoms have jumped too far");
      for (int64_t s0 = box.low[0]; s0 <= box.high[0]; ++s0)
        for (int64_t s1 = box.low[1]; s1 <= box.high[1]; ++s1)
          for (int64_t s2 = box.low[2]; s2 <= box.high[2]; ++s2)
            for (const int64_t x : {s0, s1, s2, static_cast<int64_t>(b)}) made_.push_back(static_cast<int32_t>(x));
    }
    for (int64_t m = 0; m < candidates_.num_images; ++m) {
      const int32_t* image = images_ + 4 * m;
      const ImageBox& box = boxes[static_cast<size_t>(image[3])];
      if (box.moves()) in_box_[static_cast<size_t>(m)] = static_cast<int32_t>(box.number(image));
    }
    step_of_atom_.resize(static_cast<size_t>(candidates_.num_atoms));
    for (int64_t i = 0; i < candidates_.num_atoms; ++i) {
      const ImageBox& box = boxes[jumps.system_of(i)];
      if (box.moves()) step_of_atom_[static_cast<size_t>(i)] = static_cast<int32_t>(box.place(jumps.of_atom[i].n));
    }
    images_ = made_.data();
    return static_cast<int64_t>(made_.size()) / 4;
  }

  const Candidates& candidates_;
  const int32_t* images_;  // S and system: the candidates', then those of boxes
  std::vector<T> memory_;
  // Empty where no atom has jumped. A candidate's image becomes in_box_[image] + step_of_atom_[i] -
  // step_of_atom_[j]; -1 for images of systems without jumps, which stay as they are.
  std::vector<int32_t> in_box_, step_of_atom_, made_;
};

}  // namespace

// Two passes over rows: mark and count, then write. Between them a candidate is a bit.
template <typename T>
void select_cpu(const Candidates& candidates, const Jumps& jumps, const T* positions, const T* cell, double cutoff,
                const std::function<PairOutput<T>(int64_t)>& allocate) {
  const Gathered<T> gathered(candidates, jumps, positions, cell);
  const T cutoff2 = static_cast<T>(cutoff * cutoff);
  const int64_t num_rows = candidates.num_atoms, *offsets = candidates.offsets;
  constexpr double candidate_work = 3.0;  // ns in each of the passes
  const double work = candidate_work * static_cast<double>(offsets[num_rows]);
  // Where the marks of each row begin, and its pairs.
  std::vector<int64_t> words(static_cast<size_t>(num_rows) + 1, 0), first(words);
  for (int64_t i = 0; i < num_rows; ++i)
    words[static_cast<size_t>(i) + 1] = words[static_cast<size_t>(i)] + ceil_div(offsets[i + 1] - offsets[i], 16);
  std::vector<uint16_t> marks(static_cast<size_t>(words.back()));
  const auto marks_of = [&](int64_t i) { return marks.data() + words[static_cast<size_t>(i)]; };

  parallel_rows(num_rows, work, [&](int64_t begin, int64_t end) {
    std::vector<T> d2;
    std::vector<int32_t> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const CandidateRow<T> row = gathered.row(i, scratch);
      d2.resize(static_cast<size_t>(row.size));
      measure_candidates(gathered.source, row, d2.data());
      first[static_cast<size_t>(i) + 1] = mark_below(d2.data(), row.size, cutoff2, marks_of(i));
    }
  });
  for (size_t i = 0; i < static_cast<size_t>(num_rows); ++i) first[i + 1] += first[i];
  const PairOutput<T> out = allocate(first.back());
  parallel_rows(num_rows, work, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> chosen, scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = first[static_cast<size_t>(i)], count = first[static_cast<size_t>(i) + 1] - at;
      const CandidateRow<T> row = gathered.row(i, scratch);
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
bool find_margins(const Motion<T>& motion, const Candidates& candidates, double cutoff, double radius,
                  double* margins, Jump* jumps) {
  struct Moves {
    Drift drift;
    bool known, seen = false;
    double most2 = 0.0;   // max |u|^2
    double spread = 0.0;  // max distance from the origin, the system's first atom
  };
  std::vector<Moves> moves(static_cast<size_t>(motion.num_systems));
  for (size_t b = 0; b < moves.size(); ++b) {
    const int64_t at = static_cast<int64_t>(b);
    const bool* pbc = motion.pbc + at * motion.pbc_stride;
    moves[b].known = make_drift(motion.old_cell + 9 * at, motion.cell + 9 * at, pbc, moves[b].drift);
  }
  const Jumps found{jumps, motion.system_idx, motion.num_systems};
  bool any = false;
  for (int64_t i = 0; i < motion.num_atoms; ++i) {
    Moves& of_system = moves[found.system_of(i)];
    jumps[i] = Jump{};
    if (!of_system.known) continue;
    Drift& drift = of_system.drift;
    const T *from = motion.old_positions + 3 * i, *to = motion.positions + 3 * i;
    if (!of_system.seen) set_origin(drift, from, to);
    of_system.seen = true;
    const double moved2 = squared_move(drift, from, to, jumps[i]);
    any = any || jumps[i].any();
    of_system.known = std::isfinite(moved2);  // max would lose a NaN
    of_system.most2 = std::max(of_system.most2, moved2);
    of_system.spread = std::max(of_system.spread, distance_from_origin(drift, from, to));
  }
  for (size_t b = 0; b < moves.size(); ++b)
    margins[b] = moves[b].known ? margin<T>(moves[b].drift, moves[b].most2, moves[b].spread, cutoff, radius)
                                : -std::numeric_limits<double>::infinity();
  if (!any) return false;
  // Together not much larger than the list.
  const int64_t size = candidates.offsets[candidates.num_atoms];
  const std::vector<ImageBox> boxes = image_boxes(candidates, found, std::min((1 << 16) + 4 * size, kMostImages));
  for (size_t b = 0; b < boxes.size(); ++b)
    if (boxes[b].moves() && boxes[b].first < 0) margins[b] = -std::numeric_limits<double>::infinity();
  return true;
}

#define DIFFNL_INSTANTIATE(T)                                                           \
  template void select_cpu(const Candidates&, const Jumps&, const T*, const T*, double, \
                           const std::function<PairOutput<T>(int64_t)>&);               \
  template bool find_margins(const Motion<T>&, const Candidates&, double, double, double*, Jump*);
DIFFNL_INSTANTIATE(float)
DIFFNL_INSTANTIATE(double)
#undef DIFFNL_INSTANTIATE

}  // namespace diffnl
