"""Models and runners of the current TorchSim on our list and on its own: the same numbers."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch_sim as ts
from ase.build import bulk
from ase.data import covalent_radii
from mace.calculators import MACECalculator
from small_mace import small_mace
from structures import CRYSTALS, SLABS
from structures import STRUCTURES as ALL_STRUCTURES
from torch_sim.autobatching import InFlightAutoBatcher
from torch_sim.models.electrostatics import DSFCoulombModel, EwaldModel, PMEModel
from torch_sim.models.interface import validate_model_outputs
from torch_sim.models.lennard_jones import LennardJonesModel
from torch_sim.models.mace import MaceModel
from torch_sim.models.morse import MorseModel
from torch_sim.models.pair_potential import PairPotentialModel
from torch_sim.models.particle_life import ParticleLifeModel
from torch_sim.models.soft_sphere import SoftSphereModel
from torch_sim.testing import SIMSTATE_GENERATORS, assert_model_calculator_consistency

from diffnl.adapters.torchsim import torchsim_nl

ADAPTER = "TorchSim, models"
PACKAGES = ("torch-sim-atomistic", "mace-torch", "nvalchemi-toolkit-ops")

CPU = torch.device("cpu")
NUMBERS = {int(number) for atoms in ALL_STRUCTURES.values() for number in atoms.numbers} | {1, 6, 12, 14, 26}
NUMBERS |= {int(z) for make in SIMSTATE_GENERATORS.values() for z in make(CPU, torch.float64).atomic_numbers}
SYSTEMS = [CRYSTALS[name] for name in ("silicon_sheared", "salt", "magnesium", "oxide_anywhere")]
RUNNERS = pytest.mark.parametrize("kind", ["lennard_jones", "mace"])


@pytest.fixture(scope="module")
def potential():
    return small_mace(NUMBERS, r_max=4.5)


def on_both_lists(make, **options):
    """The model with our list and with its own, and what counts the calls of ours."""
    ours = Mock(side_effect=torchsim_nl)
    return make(neighbor_list_fn=ours, **options), make(**options), ours


def on_both(kind, potential, dtype=torch.float64):
    if kind == "mace":
        return on_both_lists(MaceModel, model=potential, device=CPU, dtype=dtype)
    options = dict(sigma=2.0, epsilon=0.05, cutoff=6.0, compute_stress=True)
    return on_both_lists(LennardJonesModel, device=CPU, dtype=dtype, **options)


def state_of(structures, dtype=torch.float64):
    return ts.io.atoms_to_state(structures, CPU, dtype)


def assert_same_outputs(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, value in expected.items():
        assert value.isfinite().all(), name
        largest = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=tolerance * largest, msg=name)


# ------------------------------------------------------------------------------------------ one evaluation


@RUNNERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("structures", [SYSTEMS, list(SLABS.values())], ids=["crystals", "slabs"])
def test_energies_forces_and_stresses_of_a_batch(kind, dtype, structures, potential):
    ours, theirs, calls = on_both(kind, potential, dtype)
    state = state_of(structures, dtype)
    found, expected = ours(state), theirs(state)
    assert calls.call_count == 1  # one search for the batch
    assert {"energy", "forces", "stress"} == expected.keys()
    assert all(value.abs().max() > 1e-6 for value in expected.values())
    assert all(value.dtype == dtype for value in found.values())
    assert_same_outputs(found, expected, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (LennardJonesModel, dict(sigma=2.2, epsilon=0.1, per_atom_energies=True, per_atom_stresses=True)),
        (MorseModel, dict(sigma=2.4, epsilon=0.5, alpha=1.5, cutoff=6.0, per_atom_energies=True)),
        (SoftSphereModel, dict(sigma=5.0, epsilon=0.3, alpha=2.0, per_atom_stresses=True)),
        (ParticleLifeModel, dict(sigma=3.5, epsilon=0.1, beta=0.3, cutoff=4.0)),
        (DSFCoulombModel, dict(cutoff=7.0)),
        (EwaldModel, dict(cutoff=6.0)),
        (PMEModel, dict(cutoff=6.0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_other_model_with_a_list(model, options):
    """Pair potentials, forces without an energy, and electrostatics that want the list as rows."""
    ours, theirs, calls = on_both_lists(model, **options, device=CPU, compute_stress=True)
    state = state_of([CRYSTALS["salt"], CRYSTALS["oxide_anywhere"], CRYSTALS["gallium_nitride"]])
    charges = torch.tensor([1.0 if z in (11, 12, 31) else -1.0 for z in state.atomic_numbers.tolist()])
    state.atom_extras["partial_charges"] = charges.double()
    found, expected = ours(state), theirs(state)
    assert calls.call_count == 1 and expected["forces"].abs().max() > 1e-4
    assert_same_outputs(found, expected)


@RUNNERS
def test_it_passes_their_check_of_models(kind, potential):
    ours, _, calls = on_both(kind, potential)
    validate_model_outputs(ours, CPU, torch.float64)
    assert calls.call_count >= 6


@pytest.mark.parametrize("name", SIMSTATE_GENERATORS)
def test_it_passes_their_comparison_with_a_calculator(name, potential):
    """Theirs, on their structures: TorchSim's model on our list, and ASE's calculator on the list of MACE."""
    model, _, calls = on_both("mace", potential)
    calculator = MACECalculator(models=potential, device="cpu", default_dtype="float64")
    state = SIMSTATE_GENERATORS[name](CPU, torch.float64)
    if not state.pbc.all():
        model = MaceModel(potential, CPU, torch.float64, calls, compute_stress=False)
    tolerance = dict.fromkeys(("energy_atol", "force_atol", "stress_atol"), 1e-9)
    tolerance |= dict.fromkeys(("energy_rtol", "force_rtol", "stress_rtol"), 1e-9)
    assert_model_calculator_consistency(model, calculator, state, **tolerance)
    assert calls.call_count == 1


def test_gradients_of_the_energy_through_their_code():
    """A model that keeps its graph: the derivative in the positions is minus the forces it gives."""
    options = dict(sigma=2.0, epsilon=0.05, cutoff=6.0, device=CPU, retain_graph=True)
    model = LennardJonesModel(neighbor_list_fn=torchsim_nl, **options)
    state = state_of(SYSTEMS)
    state.positions = state.positions.clone().requires_grad_()
    out = model(state)
    (gradient,) = torch.autograd.grad(out["energy"].sum(), state.positions)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(-gradient, out["forces"].detach(), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------ dynamics


@RUNNERS
@pytest.mark.parametrize("integrator", ["nve", "nvt_langevin"])
def test_dynamics_of_several_systems(kind, integrator, potential):
    ours, theirs, calls = on_both(kind, potential)

    def run(model, seed=3):
        state = state_of(SYSTEMS)
        state.rng = seed
        options = dict(n_steps=15, temperature=300.0, timestep=0.001)
        return ts.integrate(state, model, integrator=ts.Integrator(integrator), **options)

    found, expected = run(ours), run(theirs)
    assert calls.call_count >= 15
    assert (expected.positions - state_of(SYSTEMS).positions).abs().max() > 0.01
    for name in ("energy", "positions", "momenta", "forces"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(run(ours, seed=4).energy, found.energy, rtol=1e-6)


# ------------------------------------------------------------------------------------------ relaxations


@RUNNERS
@pytest.mark.parametrize("cell_filter", ["frechet", "unit"])
def test_steps_of_a_relaxation_of_several_systems(kind, cell_filter, potential):
    ours, theirs, calls = on_both(kind, potential)

    def run(model):
        options = dict(init_kwargs={"cell_filter": ts.CellFilter(cell_filter)}, max_steps=15)
        return ts.optimize(SYSTEMS, model, optimizer=ts.Optimizer.fire, convergence_fn=never, **options)

    with pytest.warns(UserWarning, match="maximum number of steps"):
        found, expected = run(ours), run(theirs)
    assert calls.call_count >= 15
    assert (expected.cell - state_of(SYSTEMS).cell).abs().max() > 1e-3
    for name in ("energy", "positions", "cell", "forces", "stress"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-7)


def never(state, last_energy):
    return torch.zeros(state.n_systems, dtype=torch.bool)


def twenty_crystals():
    """Metals and compounds, 1 to 32 atoms, strained by some percent, atoms off their sites."""
    rng = np.random.default_rng(7)
    crystals = [bulk(name) for name in ("Cu", "Ag", "Al", "Pb")]
    crystals += [bulk(name, cubic=True) for name in ("Rh", "Ir", "Fe", "W", "Ni", "Pt")]
    crystals += [bulk(name) for name in ("Mg", "Ti", "Co", "Zr")]
    crystals += [bulk("NiAl", "cesiumchloride", a=2.88), bulk("CuZn", "cesiumchloride", a=2.95)]
    crystals += [bulk("NaCl", "rocksalt", a=5.64, cubic=True), bulk("MgO", "rocksalt", a=4.21)]
    crystals += [bulk("Au", cubic=True) * (2, 1, 1), bulk("Pd", cubic=True) * (2, 2, 2)]
    crystals[-2].symbols[:2] = "Cu"
    for atoms in crystals:
        strained = atoms.cell.array @ (np.eye(3) + 0.03 * rng.standard_normal((3, 3)))
        atoms.set_cell(strained, scale_atoms=True)
        atoms.positions += 0.06 * rng.standard_normal(atoms.positions.shape)
    return crystals


RADII = torch.tensor(covalent_radii)


def of_the_elements(distances, numbers_i, numbers_j):
    """A Lennard-Jones energy with its minimum at the sum of the covalent radii, smooth at 7 Å."""
    power = ((RADII[numbers_i] + RADII[numbers_j]) / 2 ** (1 / 6) / distances) ** 6
    return 0.4 * (power * power - power) * (1 - (distances / 7.0) ** 2).clamp(min=0) ** 2


@pytest.mark.parametrize(
    ("their_list", "batching"),
    [(ts.neighbors.torchsim_nl, "all at once"), (ts.neighbors.vesin_nl_ts, "in flight")],
    ids=["torchsim_nl", "vesin_nl_ts"],
)
def test_relaxations_of_20_crystals_end_at_the_same_energies(their_list, batching, record_property):
    """Positions and cells: all crystals at once, and with crystals that come in as others have converged.

    The two ways of batching end 6e-7 eV apart, on any list: convergence is looked at after other steps.
    """
    crystals = twenty_crystals()
    assert len(crystals) == len({str(atoms.symbols) for atoms in crystals}) == 20
    ours = Mock(side_effect=torchsim_nl)
    converged = ts.generate_force_convergence_fn(1e-3, include_cell_forces=True)

    def model(neighbor_list_fn):
        options = dict(cutoff=7.0, compute_stress=True, reduce_to_half_list=True)
        return PairPotentialModel(of_the_elements, neighbor_list_fn=neighbor_list_fn, **options)

    def relaxed(neighbor_list_fn):
        potential = model(neighbor_list_fn)
        options = dict(convergence_fn=converged, max_steps=500, steps_between_swaps=10)
        options |= dict(init_kwargs={"cell_filter": ts.CellFilter.frechet}, autobatcher=False)
        if batching == "in flight":
            memory = dict(memory_scales_with="n_atoms", max_memory_scaler=60)
            options["autobatcher"] = InFlightAutoBatcher(potential, **memory)
        return ts.optimize(crystals, potential, optimizer=ts.Optimizer.fire, **options)

    found, expected = relaxed(ours), relaxed(their_list)
    assert ours.call_count > 20
    for state in (found, expected):
        assert converged(state, None).all()
    before = model(their_list)(state_of(crystals))["energy"]
    assert (expected.energy < before - 1e-3).all()
    difference = (found.energy - expected.energy).abs().max().item()
    record_property("largest difference of the final energies, eV", difference)
    print(f"\n20 relaxations, {their_list.__name__}: final energies differ by {difference:.1e} eV at most")
    assert difference < 1e-6
