"""check_potential: good potentials pass, and each mistake shows in the rows where it belongs."""

import pytest
import torch
from systems import SYSTEMS, TRICLINIC, cubic, scatter, tensor

import diffnl
from diffnl.testing import check_potential

CUTOFF = 4.0


def smooth(distances):
    """1 at 0; 0 at the cutoff and beyond, with its first two derivatives."""
    return (1.0 - (distances / CUTOFF).square()).clamp(min=0.0).pow(3)


def pair_energy(distances):
    return (smooth(distances) * torch.exp(-0.5 * distances)).sum()


def good(positions, cell, pbc, *per_atom):
    """Pairs, and triplets through a density of each atom, weighted by what belongs to the atoms."""
    pairs = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF)
    i, j = pairs.mapping
    weights = smooth(pairs.distances)
    for values in per_atom:
        weights = weights * values[j]
    density = torch.zeros_like(positions[:, 0]).index_add(0, i, weights)
    return pair_energy(pairs.distances) + (1.0 + density).sqrt().sum()


def box(pbc=(True, True, True), atoms=9):
    return scatter(atoms, TRICLINIC, 3), tensor(TRICLINIC), torch.tensor(pbc)


# ----- what is right passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, True, False)])
def test_a_good_potential_passes(pbc):
    report = check_potential(good, *box(pbc), cutoff=CUTOFF)
    assert report
    assert report.failed == []
    names = [check.name for check in report.checks]
    assert names[:3] == ["forces", "stress", "second derivatives"]
    assert all(check.error is not None for check in report.checks), "everything was checked"


def test_a_molecule_passes():
    positions = SYSTEMS["open_cluster"].positions[:12]
    report = check_potential(good, positions, None, None, cutoff=CUTOFF)
    assert report
    unchecked = {check.name for check in report.checks if check.error is None}
    assert unchecked == {"stress", "periodic images", "basis", "supercell"}


@pytest.mark.parametrize("turned", [False, True], ids=["axes", "turned"])
def test_a_slab_without_a_volume_passes(turned):
    """Its third row lies in the plane of the others, and there is no stress to check."""
    positions, cell, _ = box()
    cell = torch.stack([cell[0], cell[1], cell[0] + cell[1]])
    if turned:
        q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double())[0]
        positions, cell = positions @ q, cell @ q
    report = check_potential(good, positions, cell, (True, True, False), cutoff=CUTOFF)
    assert report
    assert "stress" in {check.name for check in report.checks if check.error is None}


def test_one_atom_in_a_cell_smaller_than_the_cutoff_passes():
    """Bare forces vanish by symmetry; two species would not."""
    cell = tensor(cubic(2.9))
    positions = torch.tensor([[0.1, 0.2, 0.3], [1.5, 1.4, 1.6]], dtype=torch.float64)
    assert check_potential(good, positions, cell, True, cutoff=CUTOFF)


def test_what_belongs_to_atoms_goes_with_them():
    positions, cell, pbc = box()
    charges = torch.linspace(0.5, 2.0, len(positions), dtype=torch.float64)
    assert check_potential(good, positions, cell, pbc, [charges], cutoff=CUTOFF)


def own_derivatives(positions, cell, pbc, sign=1.0):
    """A potential that gives forces and stress itself."""
    with torch.enable_grad():
        energy = good(positions.requires_grad_(), cell.requires_grad_(), pbc)
        forces, stress = diffnl.forces_and_stress(energy, positions, cell, create_graph=True)
    return energy, forces, sign * stress


def test_a_potential_with_derivatives_of_its_own_passes():
    def potential(positions, cell, pbc):
        return own_derivatives(positions.clone(), cell.clone(), pbc)

    assert check_potential(potential, *box(), cutoff=CUTOFF)


def test_exactly_this_system():
    assert check_potential(good, *box(), cutoff=CUTOFF, rattle=0.0)


# ----- what is wrong does not ------------------------------------------------------------------------------


def failures(potential, *system):
    report = check_potential(potential, *(system or box()), cutoff=CUTOFF)
    assert not report
    assert "FAILED" in repr(report)
    return set(report.failed)


def test_a_stress_of_the_wrong_sign():
    def potential(positions, cell, pbc):
        return own_derivatives(positions.clone(), cell.clone(), pbc, sign=-1.0)

    assert failures(potential) == {"stress"}


def test_a_forgotten_cell_gradient():
    """Forces are right; what the strain does through the lattice vectors is lost."""

    def potential(positions, cell, pbc):
        return good(positions, cell.detach(), pbc)

    found = failures(potential)
    assert "stress" in found and "forces" not in found


def test_a_detached_vector():
    """A term whose vectors have lost their graph: its energy is there, its forces are not."""

    def potential(positions, cell, pbc):
        vectors = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF).vectors.detach()
        return good(positions, cell, pbc) + pair_energy(vectors.norm(dim=1))

    found = failures(potential)
    assert {"forces", "stress"} <= found
    assert "translation: energy" not in found and "cutoff: energy" not in found


def test_vectors_detached_in_their_lengths_alone():
    """First derivatives that look right at a glance: half of them are missing."""

    def potential(positions, cell, pbc):
        pairs = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF)
        return (smooth(pairs.distances.detach()) * torch.exp(-pairs.distances)).sum()

    assert {"forces", "stress"} <= failures(potential)


def test_a_cutoff_without_an_envelope():
    """The bare tail of a Lennard-Jones potential: nothing but the cutoff is wrong."""

    def potential(positions, cell, pbc):
        distances = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF).distances
        return ((2.0 / distances).pow(6) * 0.5).sum() if len(distances) else positions.sum() * 0

    spread = scatter_apart(8, 7.0)
    assert failures(potential, spread, tensor(cubic(7.0)), True) == {"cutoff: energy", "cutoff: forces"}


def scatter_apart(count, edge):
    """Atoms on a rough grid, none close to another."""
    grid = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)[:count] * edge / 2
    return grid + 0.3 * scatter(count, cubic(1.0), 5)


def test_an_energy_that_is_shifted_but_whose_force_jumps():
    """Continuous in energy alone."""

    def potential(positions, cell, pbc):
        distances = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF).distances
        return (CUTOFF - distances).clamp(min=0.0).sum()

    assert failures(potential) == {"cutoff: forces"}


def test_a_shift_of_the_wrong_sign():
    """Vectors by hand, with the images on the wrong side."""

    def potential(positions, cell, pbc):
        pairs = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF)
        i, j = pairs.mapping
        vectors = positions[j] - positions[i] - pairs.shifts.to(positions.dtype) @ cell
        return pair_energy(vectors.norm(dim=1))

    found = failures(potential)
    assert {"periodic images: energy", "supercell: energy"} & found
    assert "forces" not in found, "they are those of this wrong energy"


def test_an_energy_that_knows_where_it_is():
    def potential(positions, cell, pbc):
        return good(positions, cell, pbc) + 0.1 * positions[:, 0].square().sum()

    assert {"translation: energy", "rotation: energy", "periodic images: energy"} <= failures(potential)


def test_an_energy_that_depends_on_the_order_of_atoms():
    def potential(positions, cell, pbc):
        pairs = diffnl.neighbor_pairs(positions, cell, pbc, CUTOFF)
        return (smooth(pairs.distances) * (1.0 + pairs.mapping[0])).sum()

    assert "permutation: energy" in failures(potential)


def test_an_energy_that_is_not_extensive():
    def potential(positions, cell, pbc):
        return good(positions, cell, pbc).square()

    assert "supercell: energy" in failures(potential)


def test_nan_fails():
    assert failures(lambda positions, cell, pbc: good(positions, cell, pbc) * torch.nan)


def test_a_constant_fails():
    assert "not constant" in failures(lambda positions, cell, pbc: positions.sum() * 0.0)


# ----- the report ------------------------------------------------------------------------------------------


def test_an_assert_shows_the_table():
    def potential(positions, cell, pbc):
        return own_derivatives(positions.clone(), cell.clone(), pbc, sign=-1.0)

    report = check_potential(potential, *box(), cutoff=CUTOFF)
    with pytest.raises(AssertionError) as shown:
        assert report, str(report)
    text = str(shown.value)
    rows = [line.split() for line in text.splitlines()]
    assert any(row[:2] == ["stress", "FAILED"] for row in rows), text
    assert any(row[:2] == ["forces", "ok"] for row in rows), text


def test_the_same_seed_gives_the_same_report():
    one, other = (check_potential(good, *box(), cutoff=CUTOFF, seed=5) for _ in range(2))
    assert repr(one) == repr(other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": torch.zeros(9, 3)}, TypeError, "`positions` must be float64; got torch.float32"),
        ({"cell": torch.zeros(2, 3, 3, dtype=torch.float64)}, ValueError, r"`cell` must have shape \(3, 3\)"),
        ({"pbc": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "`pbc` must be one flag or three"),
        ({"per_atom": [torch.zeros(4)]}, ValueError, "`per_atom` must hold tensors of shape"),
        ({"per_atom": [3.0]}, TypeError, "`per_atom` must be a torch.Tensor"),
        ({"cutoff": -1.0}, ValueError, "`cutoff` must be finite and > 0"),
        ({"pbc": None}, ValueError, "`pbc` must be given where there is a `cell`"),
        ({"positions": [[0.0, 0.0, 0.0]]}, TypeError, "`positions` must be a torch.Tensor; got list"),
        ({"rattle": -0.1}, ValueError, "`rattle` must be finite and >= 0; got -0.1"),
        ({"rtol": float("nan")}, ValueError, "`rtol` must be finite and >= 0; got nan"),
        ({"rtol": "small"}, TypeError, "`rtol` must be a number; got 'small'"),
    ],
)
def test_bad_arguments(change, error, message):
    positions, cell, pbc = box()
    arguments = {"positions": positions, "cell": cell, "pbc": pbc, "cutoff": CUTOFF} | change
    with pytest.raises(error, match=message):
        check_potential(good, **arguments)
