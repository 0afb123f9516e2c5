// The operators torch sees: their schemas, in torch's stable ABI. Backends register their side in ops_cpu.cpp and
// neighbors_gpu.cpp.

#include <torch/csrc/stable/library.h>

#include <string>

namespace diffnl {

namespace {

// "backends;torch the library was built against;GPU architectures", lists separated by commas.
std::string build_info() { return DIFFNL_BACKENDS ";" DIFFNL_TORCH ";" DIFFNL_ARCHS; }

}  // namespace

}  // namespace diffnl

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
      "-> (Tensor offsets, Tensor j, Tensor image, Tensor uniform, Tensor images)");
  m.def(
      "candidates_hold(Tensor old_positions, Tensor old_cell, Tensor positions, Tensor cell, Tensor pbc, "
      "Tensor? system_idx, float cutoff, float radius) -> bool");
  // With a capacity, a padded list.
  m.def(
      "select_candidates(Tensor positions, Tensor cell, Tensor offsets, Tensor j, Tensor image, Tensor uniform, "
      "Tensor images, float cutoff, int? capacity=None) "
      "-> (Tensor mapping, Tensor shifts, Tensor vectors, Tensor num_pairs)");
  m.def(
      "closer_pairs(Tensor mapping, Tensor shifts, Tensor vectors, float cutoff) "
      "-> (Tensor mapping, Tensor shifts, Tensor vectors)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(diffnl, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&diffnl::build_info));
}
