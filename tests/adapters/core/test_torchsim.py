"""TorchSim 0.3, the last for Python 3.11, whose lists are of one system: models, runners, its own tests.

The current release, whose lists are of a batch, is in ../torchsim.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch_sim as ts
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from recipes import run_recipe
from structures import CRYSTALS, OPEN, SLABS, STRUCTURES, canonical, random_box
from torch_sim import neighbors
from torch_sim.integrators import nve, nvt_langevin
from torch_sim.models import lennard_jones, morse, soft_sphere
from torch_sim.optimizers import fire, frechet_cell_fire

from diffnl.adapters.torchsim import torchsim_nl, unbatched_nl

ADAPTER = "TorchSim, unbatched"
PACKAGES = ("torch-sim-atomistic", "vesin", "vesin-torch")

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "adapters"
LAST_WITH_TESTS = "0.2.0"  # of the releases on PyPI, whose later archives have no tests

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CUTOFFS = pytest.mark.parametrize("cutoff", [3.3, 7.3])


def tensors(atoms: Atoms, dtype=torch.float64):
    """positions (N, 3), cell (3, 3) and pbc (3,)."""
    positions = torch.tensor(atoms.positions, dtype=dtype)
    return positions, torch.tensor(atoms.cell.array, dtype=dtype), torch.tensor(atoms.pbc)


def batch(structures, dtype=torch.float64):
    """positions (N, 3), cell (B, 3, 3), pbc (B, 3) and system_idx (N,)."""
    positions, cell, pbc = zip(*(tensors(atoms, dtype) for atoms in structures), strict=True)
    sizes = torch.tensor([len(atoms) for atoms in structures])
    system_idx = torch.arange(len(sizes)).repeat_interleave(sizes)
    return torch.cat(positions), torch.stack(cell), torch.stack(pbc), system_idx


def assert_same_pairs(ours, theirs):
    """The same (i, j, S), each dtype the same; of three tensors the middle one is the system."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
    found, expected = (canonical(*pairs[0], pairs[-1], *pairs[1:-1]) for pairs in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


ALL_OR_NONE = [name for name, atoms in STRUCTURES.items() if len(set(atoms.pbc)) == 1]


@pytest.mark.parametrize("their_list", ["standard_nl", "vesin_nl_ts"])
@pytest.mark.parametrize("name", ALL_OR_NONE)
@CUTOFFS
@DTYPES
def test_unbatched_lists_the_same_pairs(their_list, name, cutoff, dtype):
    positions, cell, pbc = tensors(STRUCTURES[name], dtype)
    where = dict(positions=positions, cell=cell, pbc=bool(pbc[0]), cutoff=torch.tensor(cutoff, dtype=dtype))
    ours = unbatched_nl(**where)
    assert len(STRUCTURES[name]) == 1 or ours[0].shape[1] > 0
    assert_same_pairs(ours, getattr(neighbors, their_list)(**where))


@pytest.mark.parametrize("name", SLABS)
@CUTOFFS
def test_unbatched_takes_three_flags(name, cutoff):
    positions, cell, pbc = tensors(SLABS[name])
    i, j, shifts = neighbors.primitive_neighbor_list(
        "ijS", tuple(pbc.tolist()), cell, positions, torch.tensor(cutoff), positions.device, positions.dtype
    )
    assert_same_pairs(
        unbatched_nl(positions, cell, pbc, cutoff), (torch.stack((i, j)), shifts.to(positions.dtype))
    )


@pytest.mark.parametrize("their_list", [neighbors.torch_nl_n2, neighbors.torch_nl_linked_cell])
@pytest.mark.parametrize("self_interaction", [False, True])
@CUTOFFS
@DTYPES
def test_a_batch_lists_the_same_pairs(their_list, self_interaction, cutoff, dtype):
    structures = [atoms.copy() for atoms in (CRYSTALS | OPEN | {"box": random_box()}).values()]
    structures = [atoms for atoms in structures if len(set(atoms.pbc)) == 1]
    for atoms in structures:
        atoms.wrap()  # the lists of 0.3 lose pairs of atoms outside the cell, and know no mixed flags
    positions, cell, pbc, system_idx = batch(structures, dtype)
    ours = torchsim_nl(positions, cell, pbc, cutoff, system_idx, self_interaction)
    flat = cell.reshape(-1, 3), pbc.reshape(-1)
    assert_same_pairs(ours, their_list(cutoff, positions, *flat, system_idx, self_interaction))


def downloaded(release: str, kind: str, pattern: str) -> Path:
    """The archive of a release from PyPI, in build/adapters."""
    pattern = pattern.replace("*", release, 1)
    if not list(FOLDER.glob(pattern)):
        command = ["download", "-q", "--no-deps", "--ignore-requires-python", "-d", str(FOLDER)]
        command += [kind, "torch-sim-atomistic", f"torch-sim-atomistic=={release}"]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (found,) = FOLDER.glob(pattern)
    return found


def run_python(code: str, *arguments, cwd: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cells_and_flags_in_every_shape():
    positions, cell, pbc, system_idx = batch([CRYSTALS["salt"], SLABS["graphene"], CRYSTALS["silicon"]])
    expected = torchsim_nl(positions, cell, pbc, 5.0, system_idx)
    for a_cell in (cell, cell.reshape(-1, 3)):
        for flags in (pbc, pbc.reshape(-1)):
            for cutoff in (5.0, torch.tensor(5.0)):
                found = torchsim_nl(positions, a_cell, flags, cutoff, system_idx)
                assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("flags", [True, torch.tensor([True] * 3)], ids=["flag", "flags"])
def test_one_cell_and_its_flags_serve_all_systems(flags):
    silicon = CRYSTALS["silicon"]
    moved = silicon.copy()
    moved.positions[1] += 0.3
    positions, cell, pbc, system_idx = batch([silicon, moved, silicon])
    found = torchsim_nl(positions, cell[0], flags, 5.0, system_idx)
    assert all(map(torch.equal, found, torchsim_nl(positions, cell, pbc, 5.0, system_idx)))


def test_lists_are_strict_at_the_cutoff_as_theirs():
    positions = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    cell = 10 * torch.eye(3, dtype=torch.float64)
    for cutoff, count in ((2.0, 0), (np.nextafter(2.0, 3.0), 2)):
        where = dict(
            positions=positions, cell=cell, pbc=True, cutoff=torch.tensor(cutoff, dtype=torch.float64)
        )
        assert unbatched_nl(**where)[0].shape[1] == count
        assert neighbors.vesin_nl_ts(**where)[0].shape[1] == count


def test_atoms_with_themselves_come_last_and_centres_ascend():
    positions, cell, pbc, system_idx = batch([CRYSTALS["salt"], CRYSTALS["copper_one_atom"]])
    pairs = torchsim_nl(positions, cell, pbc, 4.0, system_idx)
    mapping, system_mapping, shifts = torchsim_nl(
        positions, cell, pbc, 4.0, system_idx, self_interaction=True
    )
    count, atoms = pairs[0].shape[1], torch.arange(len(positions))
    assert (pairs[0][0].diff() >= 0).all()
    for one, other in zip(pairs, (mapping[:, :count], system_mapping[:count], shifts[:count]), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(mapping[:, count:], torch.stack((atoms, atoms)))
    assert torch.equal(system_mapping[count:], system_idx)
    assert not shifts[count:].any()


def test_sort_id_sorts_as_theirs_and_further():
    positions, cell, _ = tensors(CRYSTALS["silicon_sheared"])
    mapping, shifts = unbatched_nl(positions, cell, True, 6.0, sort_id=True)
    theirs, _ = neighbors.vesin_nl_ts(positions, cell, True, torch.tensor(6.0), sort_id=True)
    assert torch.equal(mapping[0], theirs[0])
    assert_same_pairs((mapping, shifts), unbatched_nl(positions, cell, True, 6.0))
    in_order = canonical(*mapping, shifts)
    for one, other in zip((*mapping, shifts), in_order, strict=True):
        np.testing.assert_array_equal(one, other)


def test_systems_may_be_interleaved_or_empty():
    positions, cell, pbc, system_idx = batch([CRYSTALS["salt"], CRYSTALS["silicon"], SLABS["graphene"]])
    i, j, system, shifts = canonical_batch(torchsim_nl(positions, cell, pbc, 5.0, system_idx))
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    more_cells = torch.cat((cell, torch.eye(3, dtype=cell.dtype)[None]))
    more_pbc = torch.cat((pbc, torch.tensor([[True] * 3])))
    mapping, *rest = torchsim_nl(positions[order], more_cells, more_pbc, 5.0, system_idx[order])
    for one, other in zip(canonical_batch((order[mapping], *rest)), (i, j, system, shifts), strict=True):
        np.testing.assert_array_equal(one, other)


def canonical_batch(found):
    mapping, system, shifts = found
    i, j, shifts, system = canonical(*mapping, shifts, system)
    return i, j, system, shifts


def test_no_atoms_and_no_pairs():
    positions, cell, pbc, system_idx = batch([OPEN["one_atom"]])
    for atoms in (0, 1):
        found = torchsim_nl(positions[:atoms], cell, pbc, 5.0, system_idx[:atoms])
        assert [tuple(one.shape) for one in found] == [(2, 0), (0,), (0, 3)]
        assert [one.dtype for one in found] == [torch.int64, torch.int64, torch.float64]
        found = unbatched_nl(positions[:atoms], cell[0], False, 5.0)
        assert [tuple(one.shape) for one in found] == [(2, 0), (0, 3)]


def test_bad_input_is_said_not_searched():
    positions, cell, pbc, system_idx = batch([CRYSTALS["salt"], CRYSTALS["silicon"]])
    with pytest.raises(ValueError, match="`cutoff` must be finite and > 0"):
        torchsim_nl(positions, cell, pbc, 0.0, system_idx)
    with pytest.raises(ValueError, match="`system_idx`"):
        torchsim_nl(positions, cell, pbc, 5.0, system_idx + 1)
    with pytest.raises(ValueError, match="`positions`"):
        unbatched_nl(positions / 0.0, cell[0], True, 5.0)
    with pytest.raises(ValueError, match="`cell`"):
        unbatched_nl(positions, 0.0 * cell[0], True, 5.0)


# ---------------------------------------------------------------------------------- models and runners

MODELS = {
    "lennard_jones": (lennard_jones, lennard_jones.LennardJonesModel, dict(sigma=2.5, epsilon=0.05)),
    "morse": (morse, morse.MorseModel, dict(sigma=2.8, epsilon=0.3, alpha=1.5)),
    "soft_sphere": (soft_sphere, soft_sphere.SoftSphereModel, dict(sigma=4.0, epsilon=0.3)),
}


def a_model(name="lennard_jones", **options):
    _, of_class, parameters = MODELS[name]
    options = dict(dtype=torch.float64, compute_forces=True, compute_stress=True, cutoff=6.25) | options
    return of_class(**parameters, **options)


@pytest.fixture
def counted(monkeypatch):
    """`counted(module)`: from then on its models call our list; gives what counts the calls."""

    def use_ours(module):
        ours = Mock(side_effect=unbatched_nl)
        monkeypatch.setattr(module, "vesin_nl_ts", ours)
        return ours

    return use_ours


@pytest.mark.parametrize("name", MODELS)
@DTYPES
def test_models_give_the_same_numbers(name, dtype, counted):
    state = ts.io.atoms_to_state(list(CRYSTALS.values()), torch.device("cpu"), dtype)
    model = a_model(name, dtype=dtype)
    theirs = model(state)
    ours_was_called = counted(MODELS[name][0])
    ours = model(state)
    assert ours_was_called.call_count == len(CRYSTALS)
    assert ours.keys() == theirs.keys() == {"energy", "forces", "stress"}
    for key, value in theirs.items():
        assert value.abs().max() > 1e-3
        close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[key], value, **close, msg=key)


def twenty_crystals() -> list[Atoms]:
    """Different lattices and elements, spaced for the Lennard-Jones model, strained, sheared and rattled."""
    crystals = [bulk(one, cubic=True) for one in ("Cu", "Ar", "Fe", "W", "Na", "Ge")]
    crystals += [bulk(one) for one in ("Mg", "Ti", "Zn", "Co", "Si")]
    crystals += [
        bulk("Ag", orthorhombic=True),
        bulk("Be", orthorhombic=True),
        bulk("Al", cubic=True) * (2, 1, 1),
        bulk("Po") * (2, 1, 1),
        bulk("Ni", orthorhombic=True) * (1, 2, 1),
        bulk("NaCl", "rocksalt", a=5.64, cubic=True),
        bulk("CsCl", "cesiumchloride", a=4.12),
        bulk("TiAl", "cesiumchloride", a=3.2),
        bulk("CaFF", "fluorite", a=5.46),
    ]
    rng = np.random.default_rng(4)
    for atoms in crystals:
        shortest = neighbor_list("d", atoms, 5.0).min()
        shape = 2.8 / shortest * (np.eye(3) + 0.02 * rng.standard_normal((3, 3)))
        atoms.set_cell(atoms.cell.array @ shape, scale_atoms=True)
        atoms.positions += 0.03 * rng.standard_normal(atoms.positions.shape)
    return crystals


@pytest.mark.parametrize("optimizer", [fire, frechet_cell_fire], ids=["atoms", "atoms_and_cell"])
def test_relaxations_of_20_crystals_end_at_the_same_energies(optimizer, counted, record_property):
    crystals = twenty_crystals()
    assert len(crystals) == 20
    cell_too = optimizer is frechet_cell_fire

    converged = ts.generate_force_convergence_fn(0.05, include_cell_forces=cell_too)

    def relax():
        options = dict(optimizer=optimizer, convergence_fn=converged, max_steps=200)
        return ts.optimize(crystals, a_model(), **options)

    start = a_model()(ts.io.atoms_to_state(crystals, torch.device("cpu"), torch.float64))["energy"]
    theirs = relax()
    ours_was_called = counted(lennard_jones)
    ours = relax()
    assert ours_was_called.call_count > 20
    assert converged(ours).all() and converged(theirs).all()
    assert (theirs.energy < start - 1e-4).sum() > 10
    assert (theirs.energy < -0.05 * torch.bincount(theirs.system_idx)).all()  # none has evaporated
    difference = (ours.energy - theirs.energy).abs().max().item()
    record_property("largest difference of final energies, eV", difference)
    print(f"largest difference of final energies: {difference:.2e} eV")
    assert difference < 1e-6


@pytest.mark.parametrize("integrator", [nve, nvt_langevin], ids=["nve", "nvt"])
def test_trajectories_of_several_systems_are_the_same(integrator, counted):
    crystals = twenty_crystals()[:5]

    def run():
        torch.manual_seed(0)
        options = dict(n_steps=40, temperature=300.0, timestep=0.002, seed=1)
        return ts.integrate(crystals, a_model(), integrator=integrator, **options)

    theirs = run()
    ours_was_called = counted(lennard_jones)
    ours = run()
    assert ours_was_called.call_count >= 40 * 5
    start = np.concatenate([atoms.positions for atoms in crystals])
    assert abs(theirs.positions.numpy() - start).max() > 0.01
    for name in ("energy", "positions", "momenta", "forces"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-8, atol=1e-8, msg=name)


# ------------------------------------------------------------------------------------------ their tests

# Run by their pytest, before their test module is imported.
PLUGIN = """
import json, os
import pytest, torch
from torch_sim import neighbors
from diffnl.adapters.torchsim import torchsim_nl, unbatched_nl

calls = {}

def stands_in(name, ours):
    def function(*arguments, **named):
        calls[name] = calls.get(name, 0) + 1
        return ours(*arguments, **named)
    setattr(neighbors, name, function)

def cutoff_first(cutoff, positions, cell, pbc, system_idx, self_interaction=False):
    return torchsim_nl(positions, cell, pbc, cutoff, system_idx, self_interaction)

for name in ("standard_nl", "vesin_nl", "vesin_nl_ts"):
    stands_in(name, unbatched_nl)
for name in ("torch_nl_n2", "torch_nl_linked_cell"):
    stands_in(name, cutoff_first)

@pytest.fixture
def device():
    return torch.device("cpu")

@pytest.fixture
def dtype():
    return torch.float64

passed = []

def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        passed.append(report.nodeid)

def pytest_sessionfinish():
    with open("found.json", "w") as file:
        json.dump({"calls": calls, "passed": len(passed)}, file)
"""


def test_their_own_tests_pass_on_ours(tmp_path):
    """tests/test_neighbors.py of the last archive that has it: its lists, by name, are ours.

    `test_primitive_neighbor_list` is of a function with another signature, which the adapter does not have.
    """
    archive = downloaded(LAST_WITH_TESTS, "--no-binary", "torch_sim_atomistic-*.tar.gz")
    with tarfile.open(archive) as files:
        (name,) = [name for name in files.getnames() if name.endswith("tests/test_neighbors.py")]
        (tmp_path / "test_neighbors.py").write_bytes(files.extractfile(name).read())
    (tmp_path / "ours_for_theirs.py").write_text(PLUGIN)
    code = "import sys, pytest; sys.path.insert(0, '.'); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "ours_for_theirs", "-k", "implementations", "--rootdir", ".", "test_neighbors.py"]
    run_python(code, *options, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] == 40
    # 4 cutoffs of 11 crystals and 5 molecules, each alone; or of all at once, with and without atoms alone.
    one_by_one, at_once = 4 * (11 + 5), 4 * 2
    assert found["calls"] == {
        "standard_nl": one_by_one,
        "vesin_nl": one_by_one,
        "vesin_nl_ts": one_by_one,
        "torch_nl_n2": at_once,
        "torch_nl_linked_cell": at_once,
    }


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_later_archives_have_no_tests(kind):
    """Once they have, those of the release that is pinned should be run."""
    only, pattern = {
        "sdist": ("--no-binary", "torch_sim_atomistic-*.tar.gz"),
        "wheel": ("--only-binary", "torch_sim_atomistic-*-py3-none-any.whl"),
    }[kind]
    archive = downloaded(version("torch-sim-atomistic"), only, pattern)
    names = tarfile.open(archive).getnames() if kind == "sdist" else zipfile.ZipFile(archive).namelist()
    assert any(name.endswith("torch_sim/neighbors.py") for name in names)
    assert not [name for name in names if "test" in name]


def test_recipe(monkeypatch):
    monkeypatch.setattr(lennard_jones, "vesin_nl_ts", lennard_jones.vesin_nl_ts)  # put back afterwards
    names = run_recipe("TorchSim")
    assert lennard_jones.vesin_nl_ts is unbatched_nl
    assert names["relaxed"].energy.shape == (2,)
    assert (names["relaxed"].energy < 0).all()
