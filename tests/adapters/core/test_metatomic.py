"""metatomic: blocks against its JSON checks and vesin's, models and its ASE calculator with our lists."""

# ruff: noqa: UP006, UP035, UP045 - metatomic wants these very annotations of a model

import json
import subprocess
import sys
import tarfile
import warnings
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np
import pytest
import torch
import vesin.metatomic
from ase import units
from ase.md.verlet import VelocityVerlet
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelEvaluationOptions,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
    load_atomistic_model,
    register_autograd_neighbors,
    systems_to_torch,
)
from metatomic.torch.dftd3 import DFTD3
from metatomic_ase import MetatomicCalculator
from recipes import run_recipe
from structures import CRYSTALS, STRUCTURES, canonical, random_box

from diffnl.adapters import metatomic
from diffnl.adapters.metatomic import add_neighbors, compute_neighbors

ADAPTER = "metatomic"
PACKAGES = ("metatomic-torch", "metatensor-torch", "metatomic-ase", "vesin")
SDISTS = Path(__file__).parents[3] / "build" / "adapters"
BOX = {"random_box": random_box()}


def to_system(atoms, dtype=torch.float64, differentiable=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cell vectors on open axes, which it sets to zero
        system = systems_to_torch(atoms, dtype=dtype)
    if differentiable:  # its own `cell_requires_grad` is without effect
        system.positions.requires_grad_()
        system.cell.requires_grad_()
    return system


def arrays(block):
    samples = block.samples.values.numpy()
    return canonical(samples[:, 0], samples[:, 1], samples[:, 2:], block.values.detach().numpy()[:, :, 0])


def test_the_same_under_another_default_device_and_autocast():
    systems = [to_system(STRUCTURES[name], torch.float32) for name in ("salt", "ethanol", "silicon")]
    options = NeighborListOptions(cutoff=4.0, full_list=True, strict=True)
    before = [(system.positions.clone(), system.cell.clone()) for system in systems]
    expected = [compute_neighbors(system, options) for system in systems]
    metatomic._axes.cache_clear()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        found = metatomic._blocks(systems, options, "angstrom")
    for one, other in zip(found, expected, strict=True):
        assert one.components == other.components and one.properties == other.properties
        for mine, theirs in zip(arrays(one), arrays(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for system, (positions, cell) in zip(systems, before, strict=True):
        assert torch.equal(system.positions, positions) and torch.equal(system.cell, cell)


def from_vesin(system, options):
    return vesin.metatomic.NeighborList(options, "angstrom", skin=0.0).compute(system)


def assert_same(ours, theirs, tolerance):
    for mine, other in zip(arrays(ours)[:3], arrays(theirs)[:3], strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_allclose(arrays(ours)[3], arrays(theirs)[3], rtol=0, atol=tolerance)


def both_directions(block):
    i, j, shifts, vectors = arrays(block)
    joined = (np.concatenate(two) for two in ((i, j), (j, i), (shifts, -shifts), (vectors, -vectors)))
    return canonical(*joined)


# metatomic's own checks ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def neighbor_checks():
    """The JSON files of tests/neighbor-checks, from the source distribution that is installed here."""
    number = version("metatomic-torch")
    archive = SDISTS / f"metatomic_torch-{number}.tar.gz"
    if not archive.exists():
        SDISTS.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        what = ["--no-build-isolation", "-d", str(SDISTS), f"metatomic-torch=={number}"]
        subprocess.run(pip + what, check=True)
    with tarfile.open(archive) as outer:
        (name,) = [name for name in outer.getnames() if name.endswith(f"metatomic-torch-cxx-{number}.tar.gz")]
        inner = BytesIO(outer.extractfile(name).read())
    with tarfile.open(fileobj=inner) as sources:
        names = [n for n in sources.getnames() if "/neighbor-checks/" in n and n.endswith(".json")]
        return {Path(name).stem: json.load(sources.extractfile(name)) for name in names}


def test_there_are_checks(neighbor_checks):
    assert {"empty", "fcc-full", "fcc-half", "large-cell", "slanted"} <= set(neighbor_checks)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["empty", "fcc-full", "fcc-half", "large-cell", "slanted"])
def test_neighbor_checks(neighbor_checks, name, dtype, strict):
    check = neighbor_checks[name]
    positions = torch.tensor(check["system"]["positions"], dtype=dtype).reshape(-1, 3)
    cell = torch.tensor(check["system"]["cell"], dtype=dtype)
    types = torch.ones(len(positions), dtype=torch.int32)
    system = System(types, positions, cell, pbc=(cell != 0).any(1))
    options = NeighborListOptions(strict=strict, **check["options"])
    add_neighbors(system, options)

    i, j, shifts, vectors = arrays(system.get_neighbor_list(options))
    samples = np.array(check["expected-neighbors"]["samples"], dtype=int).reshape(-1, 5)
    distances = np.array(check["expected-neighbors"]["distances"]).reshape(-1, 3)
    if not options.full_list:
        # Its rule: either direction of a pair may be listed. Turn those that we list the other way round.
        listed = set(map(tuple, np.column_stack([i, j, shifts]).tolist()))
        turn = np.array([tuple(sample) not in listed for sample in samples.tolist()], dtype=bool)
        turned = np.column_stack([samples[:, 1], samples[:, 0], -samples[:, 2:]])
        samples = np.where(turn[:, None], turned, samples)
        distances = np.where(turn[:, None], -distances, distances)
    expected = canonical(samples[:, 0], samples[:, 1], samples[:, 2:], distances)
    for mine, theirs in zip((i, j, shifts), expected[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(vectors, expected[3], rtol=0, atol=1e-6)


# The block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cutoff", [2.9, 6.3])
@pytest.mark.parametrize("name", STRUCTURES | BOX)
def test_same_pairs_as_vesin(name, cutoff, dtype):
    system = to_system((STRUCTURES | BOX)[name], dtype)
    full = NeighborListOptions(cutoff, full_list=True, strict=True)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    ours, theirs = compute_neighbors(system, full), from_vesin(system, full)
    assert_same(ours, theirs, tolerance)
    assert ours.values.dtype == dtype and ours.samples.values.dtype == torch.int32
    assert ours.samples.names == theirs.samples.names
    assert ours.components == theirs.components and ours.properties == theirs.properties
    half = compute_neighbors(system, NeighborListOptions(cutoff, full_list=False, strict=True))
    for mine, other in zip(both_directions(half)[:3], arrays(ours)[:3], strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", STRUCTURES | BOX)
def test_consistent_for_metatomic(name, full, dtype):
    system = to_system((STRUCTURES | BOX)[name], dtype)
    block = compute_neighbors(system, NeighborListOptions(4.1, full, strict=False))
    register_autograd_neighbors(system, block, check_consistency=True)


def test_the_check_sees_a_wrong_block():
    atoms = CRYSTALS["salt"].copy()
    block = compute_neighbors(to_system(atoms), NeighborListOptions(4.1, True, True))
    atoms.positions[0] += 0.01
    with pytest.raises(ValueError, match="does not match its metadata"):
        register_autograd_neighbors(to_system(atoms), block, check_consistency=True)


def test_in_a_graph_already():
    system = to_system(CRYSTALS["salt"], differentiable=True)
    block = compute_neighbors(system, NeighborListOptions(4.1, True, True))
    with pytest.raises(ValueError, match="already part of a computational graph"):
        register_autograd_neighbors(system, block, check_consistency=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what metatomic says of a list that is in no graph
        system.add_neighbor_list(NeighborListOptions(4.1, True, True), block)


def test_units_of_the_cutoff():
    options = NeighborListOptions(0.63, full_list=True, strict=True)
    options.length_unit = "nm"
    system = to_system(CRYSTALS["salt"])
    assert_same(
        compute_neighbors(system, options),
        compute_neighbors(system, NeighborListOptions(6.3, full_list=True, strict=True)),
        0.0,
    )


def test_many_systems_are_one_search():
    options = [NeighborListOptions(4.3, True, True), NeighborListOptions(3.2, False, False)]
    batch, alone = ([to_system(atoms) for atoms in STRUCTURES.values()] for _ in range(2))
    add_neighbors(batch, options)
    for system, single in zip(batch, alone, strict=True):
        add_neighbors(single, options)
        for one in options:
            assert_same(system.get_neighbor_list(one), single.get_neighbor_list(one), 0.0)
    add_neighbors([], options)


def test_systems_without_atoms():
    nothing, atoms = to_system(CRYSTALS["salt"][:0]), to_system(CRYSTALS["salt"])
    other = to_system(CRYSTALS["salt"][:0])
    options = NeighborListOptions(4.3, True, True)
    add_neighbors([nothing, atoms, other], options)
    assert [len(x.get_neighbor_list(options).values) for x in (nothing, other)] == [0, 0]
    assert_same(atoms.get_neighbor_list(options), from_vesin(atoms, options), 1e-13)


def test_errors():
    options = NeighborListOptions(4.3, True, True)
    system = to_system(CRYSTALS["salt"])
    with pytest.raises(ValueError, match="one dtype"):
        add_neighbors([system, to_system(CRYSTALS["salt"], torch.float32)], options)
    add_neighbors(system, options)
    with pytest.raises(ValueError, match="already exists"):
        add_neighbors(system, options)
    with pytest.raises(NotImplementedError, match="torchscript"):
        metatomic.NeighborList(options, "angstrom", torchscript=True)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_derivatives_of_every_order(full):
    atoms = CRYSTALS["silicon_sheared"]
    types, pbc = torch.tensor(atoms.numbers), torch.tensor(atoms.pbc)
    options = NeighborListOptions(3.1, full, strict=True)
    inputs = [torch.tensor(x, requires_grad=True) for x in (atoms.positions, atoms.cell.array)]

    def inverse_squares(positions, cell):
        values = compute_neighbors(System(types, positions, cell, pbc), options).values
        return 1.0 / values.square().sum(dim=(1, 2))

    assert torch.autograd.gradcheck(inverse_squares, inputs)
    assert torch.autograd.gradgradcheck(inverse_squares, inputs)


def test_derivatives_of_a_batch():
    names = ["silicon", "salt", "graphene"]
    options = NeighborListOptions(4.0, True, True)

    def gradients(together):
        systems = [to_system(STRUCTURES[name], differentiable=True) for name in names]
        for group in [systems] if together else [[system] for system in systems]:
            add_neighbors(group, options)
        energy = sum(s.get_neighbor_list(options).values.square().sum().sqrt() for s in systems)
        return torch.autograd.grad(energy, [x for s in systems for x in (s.positions, s.cell)])

    for together, alone in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


# Models -------------------------------------------------------------------------------------------


class PairModel(torch.nn.Module):
    """A smooth pair potential, different for each two elements; TorchScript compiles it."""

    def __init__(self, cutoff: float, full: bool, strict: bool):
        super().__init__()
        self.options = NeighborListOptions(cutoff=cutoff, full_list=full, strict=strict)

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:
        return [self.options]

    def forward(
        self,
        systems: List[System],
        outputs: Dict[str, ModelOutput],
        selected_atoms: Optional[Labels] = None,
    ) -> Dict[str, TensorMap]:
        energies: List[torch.Tensor] = []
        for system in systems:
            block = system.get_neighbor_list(self.options)
            first, second = block.samples.column("first_atom"), block.samples.column("second_atom")
            types = system.types.to(torch.int64)
            strength = (1.0 + types[first.to(torch.int64)]) * (1.0 + types[second.to(torch.int64)]) / 100.0
            reduced = block.values.squeeze(-1).square().sum(1).sqrt() / self.options.cutoff
            # Pairs of a list that is not strict may lie beyond the cutoff.
            energy = (strength * torch.clamp(1.0 - reduced, min=0.0) ** 4).sum()
            energies.append(energy * (0.5 if self.options.full_list else 1.0))
        device = energies[0].device
        values = torch.stack(energies).unsqueeze(1)
        samples = Labels(["system"], torch.arange(len(systems), device=device).unsqueeze(1))
        zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
        block = TensorBlock(values, samples, [], Labels(["energy"], zero))
        return {"energy": TensorMap(Labels(["_"], zero), [block])}


def make_model(full=True, strict=True, length_unit="angstrom", dtype="float64"):
    scale = {"angstrom": 1.0, "nm": 0.1}[length_unit]
    capabilities = ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV", sample_kind="system")},
        atomic_types=list(range(1, 90)),
        interaction_range=4.5 * scale,
        length_unit=length_unit,
        supported_devices=["cpu"],
        dtype=dtype,
    )
    module = PairModel(4.5 * scale, full, strict).eval()
    return AtomisticModel(module, ModelMetadata(), capabilities)


def results(calculator, atoms):
    atoms = atoms.copy()
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    return energy, forces, atoms.get_stress() if atoms.pbc.all() else np.zeros(6)


def assert_same_results(model, atoms, monkeypatch, **options):
    theirs = results(MetatomicCalculator(model, **options), atoms)
    monkeypatch.setattr(vesin.metatomic, "NeighborList", metatomic.NeighborList)
    calculator = MetatomicCalculator(model, **options)
    lists = calculator._nl_calculators
    lists = lists._full_vesin_calculators + lists._half_vesin_calculators
    assert lists and all(isinstance(one, metatomic.NeighborList) for one in lists)
    ours = results(calculator, atoms)
    assert abs(ours[0]) > 1e-3 and (len(atoms) == 1 or np.abs(ours[1]).max() > 1e-3)
    assert not atoms.pbc.all() or np.abs(ours[2]).max() > 1e-5
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("strict, length_unit", [(True, "angstrom"), (False, "nm")])
@pytest.mark.parametrize("name", [*CRYSTALS, "ethanol"])
def test_ase_calculator(name, full, strict, length_unit, monkeypatch):
    model = make_model(full, strict, length_unit)
    assert_same_results(model, STRUCTURES[name], monkeypatch, check_consistency=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["salt", "gallium_nitride", "ethanol"])
def test_dispersion(name, monkeypatch):
    """Two lists, one of them for the D3 of metatomic itself, at a cutoff longer than the cells."""
    damping = {"energy": {"a1": 0.4, "a2": 4.5, "s8": 0.8}}
    model = DFTD3.wrap(make_model(full=False), damping_params=damping, cutoff=9.0, cn_cutoff=6.0)
    assert len(model.requested_neighbor_lists()) == 2
    assert_same_results(model, STRUCTURES[name], monkeypatch, check_consistency=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_exported_model(tmp_path, dtype):
    """A saved and scripted model, checked for consistency, and its first and second derivatives."""
    make_model(dtype=dtype).save(tmp_path / "model.pt")
    model = load_atomistic_model(tmp_path / "model.pt")
    evaluation = ModelEvaluationOptions("angstrom", {"energy": ModelOutput(unit="eV", sample_kind="system")})
    names = ["silicon_sheared", "oxide_anywhere", "graphene"]

    def evaluate(add):
        systems = [to_system(STRUCTURES[name], getattr(torch, dtype), differentiable=True) for name in names]
        add(systems)
        energies = model(systems, evaluation, check_consistency=True)["energy"].block().values
        inputs = [x for s in systems for x in (s.positions, s.cell)]
        first = torch.autograd.grad(energies.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        return energies, *first, *second

    def with_vesin(systems):
        for calculator in vesin.metatomic.neighbor_lists_for_model("angstrom", model_in_python):
            calculator.add_neighbor_list(systems)

    model_in_python = make_model(dtype=dtype)
    ours, theirs = evaluate(lambda systems: add_neighbors(systems, model)), evaluate(with_vesin)
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == "float64" else dict(rtol=2e-4, atol=2e-4)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def test_without_lists_a_model_complains():
    evaluation = ModelEvaluationOptions("angstrom", {"energy": ModelOutput(unit="eV", sample_kind="system")})
    with pytest.raises(ValueError, match="missing neighbors list"):
        make_model()([to_system(CRYSTALS["salt"])], evaluation, check_consistency=True)


@pytest.mark.filterwarnings("ignore")
def test_dynamics_with_a_skin(monkeypatch):
    """The pairs that a skin keeps give the same trajectory."""
    monkeypatch.setattr(vesin.metatomic, "NeighborList", metatomic.NeighborList)
    ends = []
    for skin in (0.0, 1.0):
        atoms = CRYSTALS["silicon_sheared"].copy()
        atoms.calc = MetatomicCalculator(make_model(), neighbor_skin=skin)
        VelocityVerlet(atoms, 2.0 * units.fs).run(30)
        ends.append(atoms.positions)
    assert np.abs(ends[0] - CRYSTALS["silicon_sheared"].positions).max() > 0.01
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_recipe():
    names = run_recipe("metatomic")
    assert names["forces"].shape == (8, 3) and torch.isfinite(names["forces"]).all()
    assert len(names["block"].values) == len(names["block"].samples) > 0
