"""TorchSim's MACE model, with weights at random, on our list and on its own."""

from unittest.mock import Mock

import pytest
import torch
import torch_sim as ts
from small_mace import small_mace
from structures import CRYSTALS
from torch_sim.integrators import nve
from torch_sim.models.mace import MaceModel
from torch_sim.optimizers import frechet_cell_fire

from diffnl.adapters.torchsim import unbatched_nl

ADAPTER = "TorchSim, unbatched"
PACKAGES = ("torch-sim-atomistic", "mace-torch")

STRUCTURES = [CRYSTALS[name] for name in ("silicon_sheared", "salt", "magnesium", "oxide_anywhere")]


@pytest.fixture(scope="module")
def potential():
    return small_mace({int(number) for atoms in STRUCTURES for number in atoms.numbers}, r_max=5.0)


def models(potential, dtype=torch.float64):
    """TorchSim's wrapper with our list and with its own, and what counts the calls of ours."""
    ours = Mock(side_effect=unbatched_nl)
    options = dict(device=torch.device("cpu"), dtype=dtype)
    return MaceModel(potential, neighbor_list_fn=ours, **options), MaceModel(potential, **options), ours


def test_energies_forces_and_stresses_are_the_same(potential):
    ours, theirs, calls = models(potential)
    state = ts.io.atoms_to_state(STRUCTURES, torch.device("cpu"), torch.float64)
    found, expected = ours(state), theirs(state)
    assert calls.call_count == len(STRUCTURES)
    assert found.keys() == expected.keys() == {"energy", "forces", "stress"}
    for name, value in expected.items():
        assert value.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def test_forces_and_stress_are_those_of_the_energy(potential):
    """Central differences over our list: the vectors that MACE makes of it carry its gradients."""
    model, _, _ = models(potential)
    state = ts.io.atoms_to_state([CRYSTALS["magnesium"]], torch.device("cpu"), torch.float64)
    found = model(state)
    step = 1e-4

    def energy(strain=0.0, moved=0.0):
        changed = state.clone()
        changed.positions[0, 0] += moved
        deform = torch.eye(3, dtype=torch.float64)
        deform[0, 0] += strain
        changed.positions = changed.positions @ deform
        changed.row_vector_cell = changed.row_vector_cell @ deform
        return model(changed)["energy"].item()

    force = -(energy(moved=step) - energy(moved=-step)) / (2 * step)
    stress = (energy(strain=step) - energy(strain=-step)) / (2 * step) / state.volume.item()
    assert found["forces"][0, 0].item() == pytest.approx(force, abs=1e-6)
    assert found["stress"][0, 0, 0].item() == pytest.approx(stress, abs=1e-7)


@pytest.mark.parametrize("runner", ["optimize", "integrate"])
def test_runners_end_at_the_same_energies(potential, runner):
    ours, theirs, calls = models(potential)

    def run(model):
        if runner == "integrate":
            options = dict(n_steps=10, temperature=300.0, timestep=0.001, seed=1)
            return ts.integrate(STRUCTURES, model, integrator=nve, **options)
        return ts.optimize(STRUCTURES, model, optimizer=frechet_cell_fire, max_steps=10)

    found, expected = run(ours), run(theirs)
    assert calls.call_count > 10
    torch.testing.assert_close(found.energy, expected.energy, rtol=0.0, atol=1e-8)
    torch.testing.assert_close(found.positions, expected.positions, rtol=0.0, atol=1e-8)
    print("largest difference of energies:", (found.energy - expected.energy).abs().max().item(), "eV")
