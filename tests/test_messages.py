"""Messages say what to write instead."""

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from compare import assert_equal_bits

import diffnl
from diffnl import _ops

R = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 1.5, 1.0]])
H = 4.0 * torch.eye(3)
INDEX = torch.tensor([0, 1, 0])
ATOMS = bulk("Si", cubic=True)

ADVICE = {
    "atoms": (dict(positions=ATOMS), "torch.as_tensor(atoms.positions)"),
    "atoms_adapter": (dict(positions=ATOMS), "diffnl.adapters.ase.neighbor_list"),
    "array": (dict(positions=ATOMS.positions), "give torch.as_tensor(positions)"),
    "nested_list": (dict(positions=R.tolist()), "give torch.tensor(positions, dtype=torch.float64)"),
    "ase_cell": (dict(cell=ATOMS.cell), "give torch.as_tensor(cell.array)"),
    "cell_array": (dict(cell=ATOMS.cell.array), "give torch.as_tensor(cell)"),
    "three_lengths": (dict(cell=torch.ones(3)), "torch.diag(cell)"),
    "lengths_of_a_batch": (dict(cell=torch.ones(2, 3)), "torch.diag_embed(cell)"),
    "cellpar": (dict(cell=torch.ones(6)), "cellpar_to_cell(cell.tolist())"),
    "nine_numbers": (dict(cell=torch.ones(9)), "give cell.reshape(3, 3)"),
    "stacked_cells": (dict(cell=torch.ones(6, 3)), "give cell.reshape(-1, 3, 3)"),
    "half": (dict(positions=R.half()), "give positions.float()"),
    "bfloat16": (dict(positions=R.bfloat16()), "give positions.float()"),
    "integers": (dict(positions=R.long()), "give positions.float() or positions.double()"),
    "cell_of_another_dtype": (dict(cell=H.double()), "give cell.to(positions.dtype)"),
    "cell_on_another_device": (dict(cell=H.to("meta")), "give cell.to(positions.device)"),
    "batch_of_structures": (dict(positions=torch.zeros(2, 5, 3)), "positions.reshape(-1, 3)"),
    "batch_of_structures_index": (
        dict(positions=torch.zeros(2, 5, 3)),
        "torch.arange(2).repeat_interleave(5)",
    ),
    "system_idx_list": (dict(system_idx=[0, 0, 0]), "give torch.tensor(system_idx)"),
    "system_idx_float": (dict(system_idx=INDEX.float()), "give system_idx.long()"),
    "pbc_float": (dict(pbc=torch.ones(3)), "give pbc.bool()"),
    "sparse_positions": (dict(positions=R.to_sparse()), "give positions.to_dense()"),
    "sparse_cell": (dict(cell=H.to_sparse()), "give cell.to_dense()"),
    "batch_keyword": (dict(batch=INDEX), "no argument `batch`: here that is `system_idx`, (N,) integer"),
    "box_keyword": (dict(box=H), "no argument `box`: here that is `cell`"),
    "unknown_keyword": (dict(colour=3), "no argument `colour`"),
    "meta": (
        dict(positions=R.to("meta"), cell=H.to("meta")),
        "a list with a `capacity` has shapes without them",
    ),
}


@pytest.mark.parametrize("name", ADVICE)
@pytest.mark.parametrize("function", ["layer", "neighbor_pairs", "reference"])
def test_what_to_write(name, function):
    """The layer, the function and the oracle say the same."""
    arguments, advice = ADVICE[name]
    call = {
        "layer": diffnl.NeighborList(2.0),
        "neighbor_pairs": lambda **given: diffnl.neighbor_pairs(cutoff=2.0, **given),
        "reference": lambda **given: diffnl.reference.neighbor_pairs(cutoff=2.0, **given),
    }[function]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**dict(positions=R, cell=H, pbc=True) | arguments)
    assert advice in str(caught.value)


def test_no_function_takes_a_name_of_another_code():
    """Nor keeps quiet about what it is here."""
    r, h, pairs = R, H, torch.zeros(2, 1).long()
    calls = {
        "strained": lambda: diffnl.strained(r, h, 0.0 * h, batch=INDEX),
        "forces_and_stress": lambda: diffnl.forces_and_stress(r.sum(), r, h, batch=INDEX),
        "pair_vectors": lambda: diffnl.pair_vectors(r, h, pairs, torch.zeros(1, 3).int(), batch=INDEX),
        "estimate_capacity": lambda: diffnl.estimate_capacity(r, h, True, 2.0, batch=INDEX),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} has no argument `batch`: here that is `system_idx`"):
            call()
    with pytest.raises(TypeError, match="NeighborList has no argument `half`: here that is `full`"):
        diffnl.NeighborList(2.0, half=True)


def test_the_advice_for_atoms_works():
    """What the message says to write gives the list."""
    where = torch.as_tensor(ATOMS.positions), torch.as_tensor(ATOMS.cell.array), ATOMS.pbc
    assert diffnl.neighbor_pairs(*where, 2.5).mapping.shape == (2, 4 * len(ATOMS))
    ints = Atoms(ATOMS, pbc=[1, 0, 1]).pbc.astype(int)
    assert diffnl.neighbor_pairs(*where[:2], ints, 2.5).mapping.shape[1] < 4 * len(ATOMS)


def test_the_advice_for_cells_works():
    lengths, cellpar = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([3.0, 4.0, 5.0, 90.0, 90.0, 90.0])
    import ase.geometry

    made = torch.as_tensor(ase.geometry.cellpar_to_cell(cellpar.tolist()))
    torch.testing.assert_close(made, torch.diag(lengths).double())


def test_lists_on_the_meta_device_have_shapes():
    """With a capacity, for those who count memory or operations; there is nothing to check in them."""
    r, h = R.to("meta"), H.to("meta")
    pairs = diffnl.NeighborList(2.0, capacity=9)(r, h, True)
    assert pairs.vectors.shape == (9, 3) and pairs.distances.shape == (9,) and pairs.ok.is_meta
    with pytest.raises(ValueError, match=r"`check\(\)` must have values"):
        pairs.check()
    shifts = torch.zeros(5, 3, dtype=torch.int64, device="meta")
    assert diffnl.pair_vectors(r, h, torch.zeros_like(shifts[:, :2].T), shifts).shape == (5, 3)
    with pytest.raises(ValueError, match="`cutoff` must have a value"):
        diffnl.NeighborList(torch.tensor(2.0, device="meta"))
    pairs = diffnl.NeighborList(2.0, capacity=9, skin=1.0)(r, h, True)
    assert pairs.vectors.shape == (9, 3) and pairs.num_pairs.is_meta


def test_what_has_no_values_is_not_looked_at():
    """On the meta device, with a torch for CPUs too: shapes come back, and words where values are needed."""
    r, h, index = R.to("meta"), H.repeat(2, 1, 1).to("meta"), INDEX.to("meta")
    moved, cells = diffnl.strained(r, h, torch.zeros_like(h), index)
    assert moved.shape == r.shape and cells.shape == h.shape
    flags = torch.ones(3, dtype=torch.int64, device="meta")
    for capacity in (None, 9):
        with pytest.raises(TypeError, match="`pbc` must be a bool tensor where nobody may look"):
            diffnl.neighbor_pairs(r, H.to("meta"), flags, 2.0, capacity=capacity)


@pytest.mark.parametrize(
    "options", [{}, {"skin": 1.0}, {"cutoff": (2.0, 3.0)}], ids=["plain", "skin", "several"]
)
@pytest.mark.parametrize("cell", [True, False])
def test_lists_on_the_meta_device_have_no_length(cell, options):
    layer = diffnl.NeighborList(**{"cutoff": 2.0} | options)
    where = (R.to("meta"), H.to("meta"), True) if cell else (R.to("meta"), None, None, INDEX.to("meta"))
    with pytest.raises(ValueError, match="`positions` must have values"):
        layer(*where)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.neighbors = diffnl.NeighborList(2.0)

    def forward(self, positions):
        return self.neighbors(positions)[2]


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("module", [diffnl.NeighborList(2.0), Model()], ids=["layer", "model"])
def test_a_layer_cannot_be_scripted(module):
    with pytest.raises(
        TypeError, match=r"NeighborList cannot be compiled by torch\.jit\.script: .*torch\.export"
    ):
        torch.jit.script(module)


def test_a_device_without_kernels_is_named(monkeypatch):
    """As with tensors on a GPU in a build for CPUs, which the dispatcher refuses in words of its own."""

    def refuse(*_):
        raise NotImplementedError("Could not run 'diffnl::neighbor_pairs' with arguments from the ...")

    for capacity in (None, 9):
        monkeypatch.setattr(_ops, "below_autograd", refuse)
        with pytest.raises(
            ValueError, match="`positions` must be on a device that this build .* got .* on cpu"
        ):
            diffnl.neighbor_pairs(R, H, True, 2.0, capacity=capacity)
        monkeypatch.undo()
    assert_equal_bits(diffnl.neighbor_pairs(R, H, True, 2.0), diffnl.neighbor_pairs(R, H, True, 2.0))
