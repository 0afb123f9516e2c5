"""Forces and stress of an energy, the strain that defines the stress, and the conventions of other codes.

The stress of diffnl is ASE's: sigma = (1/V) dE/d(eps), (3, 3), energy / length^3, positive under tension.
"""

import torch
from torch import Tensor

from . import _validate

GPA = 160.2176634
"""GPa in an eV/Å³: e / 1e-30 m³ / 1e9, with the charge e that defines the SI (2019)."""

_ROWS, _COLUMNS = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)  # ASE's order
_TO_VASP, _FROM_VASP = (0, 1, 2, 5, 3, 4), (0, 1, 2, 4, 5, 3)  # to and from xx yy zz xy yz zx


def strained(
    positions: Tensor, cell: Tensor, strain: Tensor, system_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions and cell under a homogeneous strain: r -> r (1 + eps), h -> h (1 + eps).

    Args:
        positions: (N, 3), any length unit.
        cell: (3, 3) or (B, 3, 3), rows are lattice vectors.
        strain: eps, dimensionless, of the shape of `cell`.
        system_idx: (N,) integer, the system of each atom; needed for a (B, 3, 3) `cell` with B > 1.

    Returns:
        The strained positions (N, 3) and cell, differentiable in all inputs.
    """
    positions = _validate.positions(positions)
    system_idx = _validate.system_of_atom(system_idx, _validate.cell(cell, positions), positions)
    eps = _validate.strain(strain, cell)
    if system_idx is None:
        moved = positions @ eps.reshape(3, 3)
    else:
        moved = (positions.unsqueeze(1) @ eps[system_idx]).squeeze(1)
    return positions + moved, cell + cell @ eps


def forces_and_stress(
    energy: Tensor,
    positions: Tensor,
    cell: Tensor | None,
    system_idx: Tensor | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Forces -dE/dr and the stress of an energy.

    sigma = (1/V) dE/d(eps) = sym(sum_i r_i (x) dE/dr_i + h^T dE/dh) / |det h|, where the strain eps acts as
    r -> r (1 + eps), h -> h (1 + eps). Positive under tension, ASE's sign; virial = -V sigma. The formula is
    the chain rule of that map at eps = 0 (Knuth et al., Comput. Phys. Commun. 190, 33 (2015), eq. 1).

    Args:
        energy: () or (B,), computed from `positions` and `cell` with gradients enabled.
        positions: (N, 3), requires a gradient.
        cell: (3, 3) or (B, 3, 3), requires a gradient. None: no stress.
        system_idx: (N,) integer, the system of each atom; needed for a (B, 3, 3) `cell` with B > 1. Its
            values are checked, which waits for a GPU; not where a call is compiled, traced or captured.
        create_graph: keep the graph, to train on forces and stresses or to differentiate further.

    Returns:
        forces (N, 3), energy / length; stress of the shape of `cell`, energy / length^3 (None without a
        cell). A cell without volume has no stress: its entries are NaN or infinite.

    Raises:
        ValueError: an input without a gradient, or of the wrong shape.
        TypeError: wrong types or dtypes.
    """
    positions = _validate.requires_grad("positions", _validate.positions(positions))
    if cell is None:
        system_idx = _validate.system_idx(system_idx, positions)
        energy = _validate.energy(energy, None)
        (grad,) = _gradients(energy, (positions,), create_graph)
        return -grad, None

    _validate.requires_grad("cell", _validate.cell(cell, positions))
    system_idx = _validate.system_of_atom(system_idx, cell, positions)
    energy = _validate.energy(energy, _validate.num_systems(cell))
    grad_positions, grad_cell = _gradients(energy, (positions, cell), create_graph)
    with torch.set_grad_enabled(create_graph):
        if system_idx is None:
            from_positions = (positions.mT @ grad_positions).expand_as(cell)
        else:
            outer = positions.unsqueeze(2) * grad_positions.unsqueeze(1)
            # index_put adds up in a fixed order; index_add uses float atomics on a GPU.
            from_positions = torch.zeros_like(cell).index_put((system_idx,), outer, accumulate=True)
        strain_gradient = from_positions + cell.mT @ grad_cell
        return -grad_positions, 0.5 * (strain_gradient + strain_gradient.mT) / _volumes(cell)


def to_voigt(stress: Tensor) -> Tensor:
    """A symmetric (..., 3, 3) as (..., 6) in ASE's order: xx, yy, zz, yz, xz, xy. No factors of two.

    Raises:
        ValueError: not (..., 3, 3).
    """
    _validate.ends_in("stress", stress, (3, 3))
    return stress[..., _ROWS, _COLUMNS]


def from_voigt(stress: Tensor) -> Tensor:
    """The symmetric (..., 3, 3) of (..., 6) in ASE's order: xx, yy, zz, yz, xz, xy.

    Raises:
        ValueError: not (..., 6).
    """
    _validate.ends_in("stress", stress, (6,))
    return stress[..., (0, 5, 4, 5, 1, 3, 4, 3, 2)].unflatten(-1, (3, 3))


def to_gpa(stress: Tensor) -> Tensor:
    """GPa of a stress in eV/Å³, of any shape and the same sign."""
    return stress * GPA


def from_gpa(stress: Tensor) -> Tensor:
    """eV/Å³ of a stress in GPa, of any shape and the same sign."""
    return stress / GPA


def to_vasp(stress: Tensor) -> Tensor:
    """The stress as VASP prints it in its line "in kB", from eV/Å³.

    Args:
        stress: (..., 3, 3), eV/Å³, positive under tension.

    Returns:
        (..., 6): xx, yy, zz, xy, yz, zx in kB (0.1 GPa), positive under compression: the opposite sign.

    Raises:
        ValueError: not (..., 3, 3).
    """
    return -10.0 * GPA * to_voigt(stress)[..., _TO_VASP]


def from_vasp(stress: Tensor) -> Tensor:
    """The stress (..., 3, 3) in eV/Å³, positive under tension, of VASP's (..., 6) in kB; see `to_vasp`.

    Raises:
        ValueError: not (..., 6).
    """
    _validate.ends_in("stress", stress, (6,))
    return from_voigt(stress[..., _FROM_VASP]) / (-10.0 * GPA)


def to_virial(stress: Tensor, cell: Tensor) -> Tensor:
    """The virial -dE/d(eps) = -V sigma, in energy units.

    Args:
        stress: (3, 3) or (B, 3, 3), energy / length^3, positive under tension.
        cell: of the same shape, rows are lattice vectors.

    Raises:
        ValueError: a stress that is not of the shape of `cell`.
    """
    _validate.shape_of_cell("stress", stress, cell)
    return -_volumes(cell) * stress


def from_virial(virial: Tensor, cell: Tensor) -> Tensor:
    """The stress -virial / V, positive under tension; see `to_virial`."""
    _validate.shape_of_cell("virial", virial, cell)
    return -virial / _volumes(cell)


def _volumes(cell: Tensor) -> Tensor:
    """|det h|, (..., 1, 1)."""
    return torch.linalg.det(cell).abs()[..., None, None]


def _gradients(energy: Tensor, inputs: tuple[Tensor, ...], create_graph: bool) -> tuple[Tensor, ...]:
    """Gradients of the sum of the energies. The sum is not taken: under no_grad it would have no graph."""
    ones = torch.ones_like(energy)
    return torch.autograd.grad(energy, inputs, ones, create_graph=create_graph, materialize_grads=True)
