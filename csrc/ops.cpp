// The operators torch sees: their schemas, in torch's stable ABI. The CPU backend, in the same library, registers
// its side in ops_cpu.cpp; GPU backends are libraries of their own, see part.h.

#include <torch/csrc/stable/library.h>

#include "part.h"

DIFFNL_PART

STABLE_TORCH_LIBRARY(diffnl, m) {
  m.def(
      "neighbor_pairs(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float cutoff, "
      "bool full=True, bool sorted=False) -> (Tensor mapping, Tensor shifts, Tensor vectors)");
  m.def(
      "pair_vectors(Tensor positions, Tensor? cell, Tensor mapping, Tensor? shifts, Tensor? system_idx=None, "
      "Tensor? num_pairs=None) -> Tensor vectors");
  m.def(
      "pair_vectors_adjoint(Tensor grad, Tensor mapping, Tensor? shifts, Tensor? system_idx, SymInt num_atoms, "
      "SymInt num_systems, bool need_positions=True, bool need_cell=True, Tensor? num_pairs=None) "
      "-> (Tensor grad_positions, Tensor grad_cell)");
  // A padded list: room for `capacity` pairs, whatever their number, and nobody waits to learn it. `num_pairs`, of
  // shape (), is how many there are or, on a fault, minus `pack_fault` (errors.h). Where it does not lie in
  // [0, capacity] the list has failed: its vectors and whatever is derived from them are NaN.
  m.def(
      "padded_neighbor_pairs(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float cutoff, "
      "SymInt capacity, bool full=True, bool sorted=False) "
      "-> (Tensor mapping, Tensor shifts, Tensor vectors, Tensor num_pairs)");
  // Several lists of one search, for descending cutoffs: mapping, shifts and vectors of each. On the CPU.
  m.def(
      "neighbor_lists(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float[] cutoffs, "
      "bool full=True, bool sorted=False) -> Tensor[]");
  // A full list with links: the pairs again in 8 bytes each, for the backward. `rows` holds what the links count
  // on: the first pair of each row (N + 1), the atoms in an order that groups systems (N), the first of each
  // system (B + 1). A list that cannot be linked comes with empty `links` and `rows`.
  m.def(
      "linked_neighbor_pairs(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float cutoff, "
      "bool sorted=False) -> (Tensor mapping, Tensor shifts, Tensor vectors, Tensor links, Tensor rows)");
  // The same padded. `rows` of a list that has failed starts with -1.
  m.def(
      "padded_linked_neighbor_pairs(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float cutoff, "
      "SymInt capacity, bool sorted=False) "
      "-> (Tensor mapping, Tensor shifts, Tensor vectors, Tensor num_pairs, Tensor links, Tensor rows)");
  m.def(
      "linked_vectors(Tensor positions, Tensor? cell, Tensor links, Tensor rows, Tensor? system_idx=None) "
      "-> Tensor vectors");
  m.def(
      "linked_adjoint(Tensor grad, Tensor links, Tensor rows, Tensor? system_idx, SymInt num_atoms, SymInt "
      "num_systems, "
      "bool need_positions=True, bool need_cell=True) -> (Tensor grad_positions, Tensor grad_cell)");
  // Candidates (candidates_cpu.h), of a sorted list: on the CPU.
  m.def(
      "compact_candidates(Tensor mapping, Tensor shifts, Tensor? system_idx, SymInt num_atoms, SymInt "
      "num_systems) "
      "-> (Tensor offsets, Tensor j, Tensor image, Tensor images)");
  // Whether they hold all pairs still, and by how many lattice vectors atoms have jumped since (drift.h).
  m.def(
      "candidates_margins(Tensor old_positions, Tensor old_cell, Tensor offsets, Tensor j, Tensor image, Tensor "
      "images, Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float cutoff, float radius) "
      "-> (Tensor margins, Tensor jumps, bool hold)");
  // Those of some systems of a batch replaced by others, whose rows are `atoms` and whose images' systems are
  // `systems` of the batch.
  m.def(
      "merge_candidates(Tensor offsets, Tensor j, Tensor image, Tensor images, Tensor part_offsets, Tensor "
      "part_j, "
      "Tensor part_image, Tensor part_images, Tensor atoms, Tensor systems, int num_systems) "
      "-> (Tensor offsets, Tensor j, Tensor image, Tensor images)");
  // With a capacity, a padded list.
  m.def(
      "select_candidates(Tensor positions, Tensor cell, Tensor? system_idx, Tensor offsets, Tensor j, Tensor "
      "image, Tensor images, Tensor? jumps, float cutoff, int? capacity=None) "
      "-> (Tensor mapping, Tensor shifts, Tensor vectors, Tensor num_pairs)");
  // Candidates (candidates_gpu.h), of a full list: on a GPU. Links and rows as of a linked list, rows of links in
  // order of (j, S); of a list that cannot be linked both are empty.
  m.def(
      "search_candidates(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, float radius) "
      "-> (Tensor links, Tensor rows)");
  // The pairs within a shorter cutoff, sorted. `count` is -1 if, when asked, the candidates turn out not to hold
  // them all, `jumped` whether atoms have jumped since (drift.h). Links and rows are empty unless `linked`.
  m.def(
      "select_linked(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, Tensor kept_positions, "
      "Tensor kept_cell, Tensor kept_pbc, Tensor? kept_system_idx, Tensor links, Tensor rows, float cutoff, "
      "float radius, bool full, bool linked, bool ask) "
      "-> (int count, bool jumped, Tensor mapping, Tensor shifts, Tensor vectors, Tensor links, Tensor rows)");
  // The same padded: the device searches anew if it must, and keeps what it has found. `num_candidates` (), at
  // first -1, is the `num_pairs` of a padded list; `tally` (2,) counts searches, and calls that did without.
  m.def(
      "padded_select_linked(Tensor positions, Tensor cell, Tensor pbc, Tensor? system_idx, "
      "Tensor(a!) kept_positions, Tensor(b!) kept_cell, Tensor(c!) kept_pbc, Tensor(d!)? kept_system_idx, "
      "Tensor(e!) kept_links, Tensor(f!) kept_rows, Tensor(g!) num_candidates, Tensor(h!) tally, float cutoff, "
      "float radius, int capacity, bool full, bool linked) -> (Tensor mapping, Tensor shifts, Tensor vectors, "
      "Tensor num_pairs, Tensor links, Tensor rows)");
  // Sets what this thread may do while it captures a graph, as cudaThreadExchangeStreamCaptureMode does: what has
  // to be there before the first replay is made in the meantime.
  m.def("exchange_capture_mode(Tensor like, int mode) -> int");
}
