"""`torchsim_nl` against each of the batched lists of the current TorchSim, on the same inputs."""

import inspect

import numpy as np
import pytest
import torch
from recipes import run_recipe
from structures import CRYSTALS, SLABS, STRUCTURES, canonical, random_box
from torch_sim import neighbors
from torch_sim.models.pair_potential import full_to_half_list
from torch_sim.transforms import compute_cell_shifts

from diffnl import neighbor_pairs
from diffnl.adapters.torchsim import torchsim_nl

ADAPTER = "TorchSim"
PACKAGES = ("torch-sim-atomistic", "nvalchemi-toolkit-ops", "vesin", "vesin-torch")

THEIR_LISTS = [
    neighbors.torchsim_nl,
    neighbors.alchemiops_nl_n2,
    neighbors.alchemiops_nl_cell_list,
    neighbors.vesin_nl,
    neighbors.vesin_nl_ts,
    neighbors.torch_nl_n2,
    neighbors.torch_nl_linked_cell,
]
VESIN = (neighbors.vesin_nl, neighbors.vesin_nl_ts)

THEIR_LIST = pytest.mark.parametrize("their_list", THEIR_LISTS, ids=lambda function: function.__name__)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CUTOFFS = pytest.mark.parametrize("cutoff", [3.3, 7.3])


def batch(structures, dtype=torch.float64):
    """The arguments positions (N, 3), cell (B, 3, 3), pbc (B, 3) and system_idx (N,)."""
    sizes = torch.tensor([len(atoms) for atoms in structures])
    return {
        "positions": torch.tensor(np.concatenate([atoms.positions for atoms in structures]), dtype=dtype),
        "cell": torch.tensor(np.stack([atoms.cell.array for atoms in structures]), dtype=dtype),
        "pbc": torch.tensor(np.stack([atoms.pbc for atoms in structures])),
        "system_idx": torch.arange(len(sizes)).repeat_interleave(sizes),
    }


def with_volume(atoms):
    """The same with rows in the cell of a wire, on its open axes: only Vesin's lists take it without."""
    atoms = atoms.copy()
    if atoms.pbc.any():
        atoms.set_cell(atoms.cell.complete())
    return atoms


def structures_for(their_list):
    wanted = list(STRUCTURES.values()) + [random_box()]
    return wanted if their_list in VESIN else [with_volume(atoms) for atoms in wanted]


def assert_same_pairs(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
    found, expected = (canonical(*pairs[0], pairs[2], pairs[1]) for pairs in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_signature_is_theirs():
    for function in THEIR_LISTS:
        ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (torchsim_nl, function))
        assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


def test_none_of_their_lists_is_a_stub():
    assert neighbors.ALCHEMIOPS_AVAILABLE and neighbors.VESIN_AVAILABLE
    assert neighbors.VESIN_TORCHSCRIPT_AVAILABLE


@THEIR_LIST
@DTYPES
@CUTOFFS
def test_one_system(their_list, dtype, cutoff):
    pairs = 0
    for atoms in structures_for(their_list):
        given = batch([atoms], dtype)
        ours = torchsim_nl(**given, cutoff=cutoff)
        assert_same_pairs(ours, their_list(**given, cutoff=cutoff))
        pairs += ours[0].shape[1]
    assert pairs > 100


@THEIR_LIST
@DTYPES
@CUTOFFS
@pytest.mark.parametrize("self_interaction", [False, True])
def test_crystals_slabs_wires_and_molecules_in_one_batch(their_list, dtype, cutoff, self_interaction):
    given = batch(structures_for(their_list), dtype)
    ours = torchsim_nl(**given, cutoff=cutoff, self_interaction=self_interaction)
    assert_same_pairs(ours, their_list(**given, cutoff=cutoff, self_interaction=self_interaction))
    # Positionally as well, which is how MACE calls it.
    again = torchsim_nl(*(given[n] for n in ("positions", "cell", "pbc")), cutoff, given["system_idx"])
    assert torch.equal(again[0], ours[0][:, : again[0].shape[1]])


@THEIR_LIST
@pytest.mark.parametrize("seed", range(4))
def test_random_boxes(their_list, seed):
    given = batch([random_box(n, seed=10 * seed + n) for n in (2, 7, 23)])
    for cutoff in (0.9, 4.1, 9.0):
        assert_same_pairs(torchsim_nl(**given, cutoff=cutoff), their_list(**given, cutoff=cutoff))


@THEIR_LIST
@pytest.mark.parametrize("how", ["flat", "one for all", "a tensor as cutoff"])
def test_every_form_of_cell_pbc_and_cutoff(their_list, how):
    given = batch([CRYSTALS["silicon"], CRYSTALS["magnesium"]]) | {"cutoff": 4.0}
    if how == "flat":
        given |= {"cell": given["cell"].reshape(-1, 3), "pbc": given["pbc"].reshape(-1)}
    elif how == "one for all":
        given |= {"cell": given["cell"][0], "pbc": given["pbc"][0]}
    else:
        given["cutoff"] = torch.tensor(4.0, dtype=torch.float64)
    ours = torchsim_nl(**given)
    assert ours[0].shape[1] > 50 and set(ours[1].tolist()) == {0, 1}
    assert_same_pairs(ours, their_list(**given))


@THEIR_LIST
def test_a_system_without_atoms(their_list):
    silicon, magnesium = CRYSTALS["silicon"], CRYSTALS["magnesium"]
    between = batch([silicon, silicon[:0], magnesium]) | {"cutoff": 4.0}
    assert_same_pairs(torchsim_nl(**between), their_list(**between))
    # The others count systems by their atoms: then they end in errors, or read past their arrays.
    if their_list in VESIN:
        at_the_end = batch([silicon, magnesium, silicon[:0]]) | {"cutoff": 4.0}
        assert_same_pairs(torchsim_nl(**at_the_end), their_list(**at_the_end))


def test_no_atoms_give_an_empty_list_of_the_same_kind():
    """Their lists end in an error of torch here."""
    given = batch([CRYSTALS["silicon"], SLABS["graphene"]], torch.float32)
    nobody = given | {"positions": given["positions"][:0], "system_idx": given["system_idx"][:0]}
    for self_interaction in (False, True):
        empty = torchsim_nl(**nobody, cutoff=4.0, self_interaction=self_interaction)
        assert [tuple(x.shape) for x in empty] == [(2, 0), (0,), (0, 3)]
        full = torchsim_nl(**given, cutoff=4.0)
        assert [x.dtype for x in empty] == [x.dtype for x in full]


@THEIR_LIST
def test_atoms_too_far_apart_give_an_empty_list(their_list):
    given = batch([STRUCTURES["one_atom"], STRUCTURES["one_atom"]]) | {"cutoff": 5.0}
    assert torchsim_nl(**given)[0].shape == (2, 0)
    assert_same_pairs(torchsim_nl(**given), their_list(**given))


@THEIR_LIST
def test_the_cutoff_itself_is_not_within(their_list):
    positions = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    given = {"positions": positions, "cell": 10 * torch.eye(3, dtype=torch.float64)}
    given |= {"pbc": torch.ones(3, dtype=torch.bool), "system_idx": torch.zeros(3, dtype=torch.long)}
    for cutoff, pairs in ((4.0, 2), (4.0 + 1e-9, 4)):
        ours = torchsim_nl(**given, cutoff=cutoff)
        assert ours[0].shape[1] == pairs
        assert_same_pairs(ours, their_list(**given, cutoff=cutoff))


@THEIR_LIST
def test_atoms_on_each_other_are_a_pair(their_list):
    given = {"positions": torch.zeros(2, 3), "cell": 10 * torch.eye(3), "pbc": torch.tensor([True] * 3)}
    given |= {"cutoff": 4.0, "system_idx": torch.zeros(2, dtype=torch.long)}
    ours = torchsim_nl(**given)
    assert ours[0].tolist() == [[0, 1], [1, 0]]
    if their_list is neighbors.torch_nl_n2:  # which tells an atom from itself by its distance
        return
    assert_same_pairs(ours, their_list(**given))


@THEIR_LIST
@DTYPES
def test_atoms_cells_away_from_the_box(their_list, dtype):
    """Their lists wrap the atoms and correct the shifts for it; ours takes the atoms as they are."""
    wrapped = batch([CRYSTALS["silicon_sheared"], CRYSTALS["salt"]], dtype)
    seeded = torch.Generator().manual_seed(0)
    far = torch.randint(-3, 4, wrapped["positions"].shape, generator=seeded).to(dtype)
    moved = far.unsqueeze(1) @ wrapped["cell"][wrapped["system_idx"]]
    given = wrapped | {"positions": wrapped["positions"] + moved.squeeze(1)}
    ours = torchsim_nl(**given, cutoff=3.7)
    assert_same_pairs(ours, their_list(**given, cutoff=3.7))
    before = torchsim_nl(**wrapped, cutoff=3.7)
    i, j = ours[0]
    assert_same_pairs((ours[0], ours[1], ours[2] + far[j] - far[i]), before)
    assert not torch.equal(ours[2], before[2])


def test_the_order_is_by_centre_with_self_pairs_behind():
    given = batch([CRYSTALS["silicon"], SLABS["graphene"], CRYSTALS["salt"]])
    mapping, system_mapping, shifts = torchsim_nl(**given, cutoff=4.0, self_interaction=True)
    atoms = len(given["positions"])
    assert (mapping[0, :-atoms].diff() >= 0).all()
    assert (mapping[:, -atoms:] == torch.arange(atoms)).all() and not shifts[-atoms:].any()
    assert torch.equal(system_mapping, given["system_idx"][mapping[0]])
    # The other half of each pair is there, which is what their half lists are made from.
    half = full_to_half_list(mapping[:, :-atoms], system_mapping[:-atoms], shifts[:-atoms])
    assert 2 * half[0].shape[1] == mapping.shape[1] - atoms
    fewer = neighbor_pairs(**given, cutoff=4.0, full=False)
    assert_same_pairs(half, (fewer.mapping, given["system_idx"][fewer.mapping[0]], fewer.shifts.double()))


def test_vectors_as_their_models_compute_them():
    given = batch([CRYSTALS["silicon_sheared"], SLABS["slab_with_oxygen"]])
    mapping, system_mapping, shifts = torchsim_nl(**given, cutoff=5.0)
    moved = compute_cell_shifts(given["cell"], shifts, system_mapping)
    vectors = given["positions"][mapping[1]] - given["positions"][mapping[0]] + moved
    pairs = neighbor_pairs(**given, cutoff=5.0)
    torch.testing.assert_close(vectors, pairs.vectors, rtol=0, atol=1e-13)


def test_interleaved_systems():
    """Most of their lists take the atoms of a system to be in a row; theirs of cells does not."""
    given = batch([CRYSTALS["silicon"], CRYSTALS["magnesium"]]) | {"cutoff": 4.0}
    order = torch.tensor([0, 2, 1, 3])
    mixed = given | {name: given[name][order] for name in ("positions", "system_idx")}
    ours = torchsim_nl(**mixed)
    assert_same_pairs(ours, neighbors.alchemiops_nl_cell_list(**mixed))
    assert_same_pairs((order[ours[0]], *ours[1:]), neighbors.vesin_nl(**given))


def test_inputs_may_require_gradients_and_outputs_do_not():
    given = batch([CRYSTALS["silicon"], CRYSTALS["salt"]]) | {"cutoff": 4.0}
    tracked = given | {name: given[name].clone().requires_grad_() for name in ("positions", "cell")}
    ours = torchsim_nl(**tracked)
    assert not any(x.requires_grad for x in ours)
    assert_same_pairs(ours, neighbors.alchemiops_nl_n2(**given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cutoff": 0.0}, ValueError, "`cutoff`"),
        ({"pbc": torch.ones(2, 3)}, TypeError, "`pbc`"),
        ({"cell": torch.zeros(2, 3, 3, dtype=torch.float64)}, ValueError, "`cell`"),
        ({"positions": torch.full((4, 3), float("nan"), dtype=torch.float64)}, ValueError, "`positions`"),
        ({"system_idx": torch.tensor([0, 0, 1, 2])}, ValueError, "`system_idx`"),
    ],
)
def test_bad_input_is_an_error(change, error, message):
    given = batch([CRYSTALS["silicon"], CRYSTALS["magnesium"]]) | {"cutoff": 4.0}
    with pytest.raises(error, match=message):
        torchsim_nl(**(given | change))


def test_recipe():
    relaxed = run_recipe("TorchSim since 0.5")["relaxed"]
    assert relaxed.n_systems == 2 and torch.isfinite(relaxed.energy).all()
