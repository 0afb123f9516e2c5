"""nvalchemi-toolkit-ops: overflow and errors against its own, and which of its arguments are taken."""

import inspect
import subprocess
import sys

import nvalchemiops.torch.neighbors as real
import pytest
import torch
from nvalchemi_lists import METHODS, assert_same, assert_same_kind, tensors
from structures import CRYSTALS, STRUCTURES

from diffnl.adapters.nvalchemi import neighbor_list

ADAPTER = "nvalchemi-toolkit-ops"
PACKAGES = ("nvalchemi-toolkit-ops", "warp-lang")


@pytest.mark.parametrize("method", METHODS)
def test_overflow(method):
    where = tensors(CRYSTALS["salt"])
    errors, matrices = [], []
    for f in (neighbor_list, real.neighbor_list):
        options = dict(max_neighbors=5, method=method)
        with pytest.raises(real.NeighborOverflowError) as raised:
            f(where[0], 4.1, *where[1:], return_neighbor_list=True, **options)
        errors.append((raised.value.max_neighbors, raised.value.num_neighbors, str(raised.value)))
        matrices.append(f(where[0], 4.1, *where[1:], **options))
    assert errors[0] == errors[1]
    assert_same_kind(*matrices)
    assert torch.equal(matrices[0][1], matrices[1][1]) and matrices[0][1].min() > 5
    (most,) = {errors[0][1]}
    neighbor_list(where[0], 4.1, *where[1:], return_neighbor_list=True, max_neighbors=most)


def test_without_its_guess_no_overflow():
    """The guess is of a matrix; in COO form ours has no limit but a given one, where theirs raises."""
    positions, cell, pbc = tensors(CRYSTALS["copper_one_atom"])
    dense = 0.4 * positions, 0.4 * cell, pbc
    with pytest.raises(real.NeighborOverflowError):
        real.neighbor_list(dense[0], 4.0, *dense[1:], return_neighbor_list=True)
    ours = neighbor_list(dense[0], 4.0, *dense[1:], return_neighbor_list=True)
    theirs = real.neighbor_list(dense[0], 4.0, *dense[1:], return_neighbor_list=True, max_neighbors=500)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(cutoff=0.0), ValueError),
        (dict(cutoff=None), ValueError),
        (dict(pbc=None), ValueError),
        (dict(cell=None), ValueError),
        (dict(method="bogus"), ValueError),
        (dict(grid_policy="bogus"), ValueError),
        (dict(batch_ptr=torch.tensor([0])), ValueError),
        (dict(something=1), TypeError),
    ],
)
def test_errors_of_both(options, error):
    positions, cell, pbc = tensors(CRYSTALS["salt"])
    arguments = dict(positions=positions, cutoff=4.0, cell=cell, pbc=pbc, method="naive") | options
    for f in (neighbor_list, real.neighbor_list):
        with pytest.raises(error):
            f(**arguments)


@pytest.mark.parametrize(
    "name, value",
    [
        ("state", object()),
        ("target_indices", torch.tensor([0])),
        ("rebuild_flags", torch.tensor([True])),
        ("pair_fn", print),
        ("return_state", True),
        ("neighbor_vectors", torch.zeros(8, 64, 3)),
    ],
)
def test_not_here(name, value):
    with pytest.raises(TypeError, match=name):
        neighbor_list(*tensors(CRYSTALS["salt"])[:1], 4.0, **{name: value})


def test_dtypes_that_do_not_match():
    positions, cell, pbc = tensors(CRYSTALS["salt"])
    with pytest.raises(TypeError, match="dtype"):
        neighbor_list(positions.float(), 4.0, cell, pbc)
    with pytest.raises(TypeError, match="two cutoffs"):
        neighbor_list(positions, 4.0, cell, pbc, cutoff2=5.0, return_vectors=True)


@pytest.mark.parametrize(
    "ends", [[5, 6, 8], [0, 3, 5], [0, 3, 9], [0, 6, 3, 8], [-1, 8], [1, 8]], ids=lambda ends: str(ends)
)
def test_a_batch_ptr_that_does_not_hold_all_atoms(ends):
    """[5, 6, 8] put atoms 0 to 4 into system 0."""
    positions = tensors(CRYSTALS["salt"])[0]
    message = rf"`batch_ptr` must start at 0, ascend and end at N = 8; got \[{ends[0]}, "
    with pytest.raises(ValueError, match=message):
        neighbor_list(positions, 4.0, batch_ptr=torch.tensor(ends))


def test_a_batch_ptr_of_another_kind():
    positions = tensors(CRYSTALS["salt"])[0]
    with pytest.raises(TypeError, match="`batch_ptr` must have an integer dtype; got torch.float32"):
        neighbor_list(positions, 4.0, batch_ptr=torch.tensor([0.0, 3.5, 8.0]))
    with pytest.raises(TypeError, match="`batch_ptr` must be a torch.Tensor; got .* of type list"):
        neighbor_list(positions, 4.0, batch_ptr=[0, 3, 8])
    with pytest.raises(ValueError, match=r"`batch_ptr` must have shape \(B \+ 1,\), B > 0; got \(1,\)"):
        neighbor_list(positions, 4.0, batch_ptr=torch.tensor([0]))


def test_systems_without_atoms():
    positions = tensors(CRYSTALS["salt"])[0]
    found = neighbor_list(positions, 4.0, batch_ptr=torch.tensor([0, 0, 3, 3, 8], dtype=torch.int32))
    expected = neighbor_list(positions, 4.0, batch_idx=torch.tensor([1] * 3 + [3] * 5))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("method", real.__dict__["NEIGHBOR_LIST_STRATEGIES"])
def test_every_method_is_a_name(method):
    where = tensors(CRYSTALS["salt"])
    plain = neighbor_list(where[0], 4.0, *where[1:])
    space = dict(max_atoms_per_system=8, cell_offsets=torch.zeros(1), sorted_positions=torch.zeros(1))
    for name in (method, "batch_" + method):
        for tensor, same in zip(
            neighbor_list(where[0], 4.0, *where[1:], method=name, **space), plain, strict=True
        ):
            assert torch.equal(tensor, same)


def test_space_for_its_searches_is_accepted():
    """All arguments of its methods but those for what this adapter does not do."""
    names = set()
    for f in (real.naive_neighbor_list, real.cell_list, real.batch_naive_neighbor_list, real.batch_cell_list):
        names |= {name for name in inspect.signature(f).parameters if not name.startswith("_")}
    names -= set(inspect.signature(neighbor_list).parameters)
    missing = {"target_indices", "rebuild_flags", "neighbor_vectors", "neighbor_distances"}
    missing |= {name for name in names if name.startswith("pair_")}
    outputs = {"max_neighbors", "neighbor_matrix", "num_neighbors", "neighbor_matrix_shifts"}
    outputs |= {"return_distances", "return_vectors"}
    assert len(names - missing - outputs) > 10
    positions = tensors(STRUCTURES["ethanol"])[0]
    for name in names - missing - outputs:
        assert len(neighbor_list(positions, 4.0, **{name: "anything"})) == 2


def test_the_package_is_not_needed():
    code = (
        "import sys, torch; sys.modules['nvalchemiops'] = None; sys.modules['warp'] = None\n"
        "from diffnl.adapters.nvalchemi import neighbor_list\n"
        "positions = torch.rand(50, 3)\n"
        "assert neighbor_list(positions, 0.5)[1].sum() > 0\n"
        "try: neighbor_list(positions, 0.5, max_neighbors=1, return_neighbor_list=True)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "max_neighbors" in done.stdout
