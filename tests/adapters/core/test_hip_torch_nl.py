"""hip_torch_nl is no package of PyPI: its README is the contract, ASE's list the truth."""

import inspect

import pytest
import torch
from ase.neighborlist import neighbor_list
from recipes import run_recipe
from structures import STRUCTURES, canonical, random_box

import diffnl
from diffnl.adapters.hip_torch_nl import HIP_TORCH_NL_AVAILABLE, hip_torch_nl

ADAPTER = "hip_torch_nl"
PACKAGES = ("ase",)


def arguments(atoms, dtype=torch.float64):
    return (
        torch.tensor(atoms.positions, dtype=dtype),
        torch.tensor(atoms.cell.array, dtype=dtype),
        torch.tensor(atoms.pbc),
    )


@pytest.mark.parametrize("cutoff", [2.9, 6.0])
@pytest.mark.parametrize("name", [*STRUCTURES, "random_box"])
def test_pairs(name, cutoff):
    atoms = random_box() if name == "random_box" else STRUCTURES[name]
    mapping, shifts = hip_torch_nl(*arguments(atoms), torch.tensor(cutoff))
    ours = canonical(*mapping, shifts)
    for one, other in zip(ours, canonical(*neighbor_list("ijS", atoms, cutoff)), strict=True):
        assert one.tolist() == other.tolist()


def test_signature():
    parameters = inspect.signature(hip_torch_nl).parameters
    assert list(parameters) == ["positions", "cell", "pbc", "cutoff", "sort_id"]
    assert parameters["sort_id"].default is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    mapping, shifts = hip_torch_nl(*arguments(random_box(), dtype), torch.tensor(4.0))
    assert mapping.dtype == torch.int64 and mapping.shape[0] == 2
    assert shifts.dtype == dtype and shifts.shape == (mapping.shape[1], 3)
    assert torch.equal(shifts, shifts.round())


@pytest.mark.parametrize("cutoff", [4.0, torch.tensor(4.0), torch.tensor([4.0]), torch.tensor(4)])
def test_cutoff_is_a_number_or_a_tensor_of_one(cutoff):
    expected = diffnl.neighbor_pairs(*arguments(random_box()), 4.0)
    mapping, shifts = hip_torch_nl(*arguments(random_box()), cutoff)
    assert torch.equal(mapping, expected.mapping) and torch.equal(shifts, expected.shifts.double())


def test_sort_id():
    unsorted, _ = hip_torch_nl(*arguments(random_box()), 6.0)
    mapping, shifts = hip_torch_nl(*arguments(random_box()), 6.0, sort_id=True)
    assert (unsorted[0].diff() >= 0).all()
    order = canonical(*mapping, shifts)
    assert torch.equal(mapping, torch.as_tensor(order[:2]))


def test_vectors_of_the_list_have_gradients():
    """What the tuple is for: the layer's vectors of a list that exists."""
    positions, cell, pbc = arguments(random_box())
    positions.requires_grad_(), cell.requires_grad_()
    mapping, shifts = hip_torch_nl(positions, cell, pbc, 4.0)
    assert not shifts.requires_grad
    vectors = diffnl.pair_vectors(positions, cell, mapping, shifts.int())
    expected = diffnl.neighbor_pairs(positions, cell, pbc, 4.0).vectors
    assert torch.equal(vectors, expected)
    ours = torch.autograd.grad(vectors.pow(3).sum(), (positions, cell))
    theirs = torch.autograd.grad(expected.pow(3).sum(), (positions, cell))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_available_tells_the_build():
    assert HIP_TORCH_NL_AVAILABLE is ("hip" in diffnl.build_info()["backends"])


@pytest.mark.parametrize("bad", [-1.0, torch.tensor(float("nan"))])
def test_a_bad_cutoff(bad):
    with pytest.raises(ValueError, match="`cutoff` must be finite and > 0"):
        hip_torch_nl(*arguments(random_box()), bad)


def test_recipe():
    found = run_recipe("hip_torch_nl")
    assert found["mapping"].shape[1] == len(found["shifts"]) > 0
    assert found["shifts"].dtype == found["cell"].dtype


def test_recipe_of_stress_conventions():
    names = run_recipe("Stress conventions")
    assert torch.equal(names["voigt"][3], names["stress"][1, 2])
    assert (names["kilobar"][0] * names["gigapascals"][0, 0]) < 0
