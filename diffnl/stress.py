"""Forces and stress of an energy, the strain that defines the stress, and the conventions of other codes.

The stress of diffnl is ASE's: sigma = (1/V) dE/d(eps), (3, 3), energy / length^3, positive under tension.

Matrix products are taken in float64, in their derivatives too: torch runs those of float32 in bfloat16 or
float16 under `torch.autocast`, and in TF32 after `torch.set_float32_matmul_precision("high")`.
"""

import math

import torch
from torch import Tensor

from . import _options, _validate

GPA = 160.2176634
"""GPa in an eV/Å³: e / 1e-30 m³ / 1e9, with the charge e that defines the SI (2019)."""

_ROWS, _COLUMNS = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)  # ASE's order
_TO_VASP, _FROM_VASP = (0, 1, 2, 5, 3, 4), (0, 1, 2, 4, 5, 3)  # to and from xx yy zz xy yz zx


def strained(
    positions: Tensor, cell: Tensor, strain: Tensor, system_idx: Tensor | None = None, **unknown: object
) -> tuple[Tensor, Tensor]:
    """Positions and cell under a homogeneous strain: r -> r (1 + eps), h -> h (1 + eps).

    The same bits under `torch.autocast` and with any precision of float32 matrix products.

    Args:
        positions: (N, 3), any length unit.
        cell: (3, 3) or (B, 3, 3), rows are lattice vectors.
        strain: eps, dimensionless, of the shape of `cell`.
        system_idx: (N,) integer, the system of each atom; needed for a (B, 3, 3) `cell` with B > 1.

    Returns:
        The strained positions (N, 3) and cell, differentiable in all inputs.
    """
    if unknown:
        _options.unexpected(unknown, "strained")
    positions = _validate.positions(positions)
    system_idx = _validate.system_of_atom(system_idx, _validate.cell(cell, positions), positions)
    eps = _validate.strain(strain, cell)
    if system_idx is None:
        moved = _product(positions, eps.reshape(3, 3))
    else:
        moved = _product(positions.unsqueeze(1), eps[system_idx]).squeeze(1)
    return positions + moved, cell + _product(cell, eps)


def forces_and_stress(
    energy: Tensor,
    positions: Tensor,
    cell: Tensor | None,
    system_idx: Tensor | None = None,
    *,
    create_graph: bool = False,
    **unknown: object,
) -> tuple[Tensor, Tensor | None]:
    """Forces -dE/dr and the stress of an energy.

    sigma = (1/V) dE/d(eps) = sym(sum_i (r_i - c) (x) dE/dr_i + h^T dE/dh) / |det h|, where the strain eps
    acts as r -> c + (r - c) (1 + eps), h -> h (1 + eps), and c is the mean position of the system's atoms.
    Positive under tension, ASE's sign; virial = -V sigma. The formula is the chain rule of that map at
    eps = 0 (Knuth et al., Comput. Phys. Commun. 190, 33 (2015), eq. 1).

    An energy that does not depend on the origin has sum_i dE/dr_i = 0, so that c falls out of the sum.
    Measured from c, float32 keeps its digits however far from the origin the atoms are. For an energy that
    depends on the origin, such as that of an external field, the stress is the derivative by a strain about
    c. Derivatives of the stress hold c fixed.

    Each gradient is taken with the other input held fixed: positions that were computed from the cell, such
    as fractional @ cell, have the same stress as positions that were not. While the gradients are taken,
    nothing flows from `positions` or `cell` to what they were computed from: no other thread may meanwhile
    differentiate through these two. The result is the same bits under `torch.autocast` and with any precision
    of float32 matrix products, if the energy is.

    Args:
        energy: () or (B,), computed from `positions` and `cell` with gradients enabled.
        positions: (N, 3), requires a gradient: the tensor that the energy was computed from, not a copy.
        cell: (3, 3) or (B, 3, 3), requires a gradient. None: no stress. An energy that does not depend on
            the cell has dE/dh = 0. That is right where no vector crosses a periodic boundary, and wrong where
            vectors do and were made with a copy of the cell without a gradient, which cannot be told from it.
        system_idx: (N,) integer, the system of each atom; needed for a (B, 3, 3) `cell` with B > 1. Its
            values are checked, which waits for a GPU; not where a call is compiled, traced or captured.
        create_graph: keep the graph, to train on forces and stresses or to differentiate further.

    Returns:
        forces (N, 3), energy / length; stress of the shape of `cell`, energy / length^3 (None without a
        cell). A system without a volume, |det h| = 0 but for rounding, has no stress: its entries are NaN,
        and their gradients are zeros, so that a batch may mix crystals with molecules.

    Raises:
        ValueError: an input without a gradient, or of the wrong shape; an energy that does not depend on
            `positions`.
        TypeError: wrong types or dtypes.
    """
    if unknown:
        _options.unexpected(unknown, "forces_and_stress")
    create_graph = _options.flag("create_graph", create_graph)
    positions = _validate.requires_grad("positions", _validate.positions(positions))
    if cell is None:
        system_idx = _validate.system_idx(system_idx, positions)
        energy = _validate.energy(energy, None)
        return -_gradients(energy, positions, None, create_graph)[0], None

    _validate.requires_grad("cell", _validate.cell(cell, positions))
    system_idx = _validate.system_of_atom(system_idx, cell, positions)
    energy = _validate.energy(energy, _validate.num_systems(cell))
    grad_positions, grad_cell = _gradients(energy, positions, cell, create_graph)
    with torch.set_grad_enabled(create_graph):
        centered = _from_center(positions, cell, system_idx)
        if system_idx is None:
            strain_gradient = _product(centered.mT, grad_positions).expand_as(cell)
        else:
            outer = centered.unsqueeze(2) * grad_positions.unsqueeze(1)
            # index_put adds up in a fixed order; index_add uses float atomics on a GPU.
            strain_gradient = torch.zeros_like(cell).index_put((system_idx,), outer, accumulate=True)
        if grad_cell is not None:
            strain_gradient = strain_gradient + _product(cell.mT, grad_cell)
        return -grad_positions, _per_volume(0.5 * (strain_gradient + strain_gradient.mT), cell)


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
    volume, exists = _volumes(cell)
    product = -volume * torch.where(exists, stress, 0.0).double()
    return torch.where(exists, product.to(stress.dtype), math.nan)


def from_virial(virial: Tensor, cell: Tensor) -> Tensor:
    """The stress -virial / V, positive under tension; see `to_virial`."""
    _validate.shape_of_cell("virial", virial, cell)
    return _per_volume(-virial, cell)


def has_volume(cell: Tensor) -> Tensor:
    """(...) bool: whether the rows of cells (..., 3, 3) span a volume, and do not lie in one plane but for
    rounding.

    The limit on |det h| / (|a| |b| |c|) is that of the search for periodic axes (csrc/pair_geometry.h).
    """
    return _volumes(cell)[1][..., 0, 0]


def _volumes(cell: Tensor) -> tuple[Tensor, Tensor]:
    """|det h| = |a . (b x c)| in float64, and whether there is one (`has_volume`), (..., 1, 1)."""
    a, b, c = cell.double().unbind(-2)
    volume = (a * torch.linalg.cross(b, c)).sum(-1).abs()[..., None, None]
    # Without derivatives: that of the length of a row of zeros is NaN.
    lengths = cell.detach().double().square().sum(-1).sqrt().prod(-1)[..., None, None]
    rounding = 16.0 * torch.finfo(torch.float32).eps if cell.dtype is torch.float32 else 1e-12
    return volume, volume > rounding * lengths


def _per_volume(values: Tensor, cell: Tensor) -> Tensor:
    """`values` / V, (..., 3, 3), NaN without a volume."""
    volume, exists = _volumes(cell)
    # Masked on both sides of the division: its derivative at a volume of 0 is infinite, and 0 times that NaN.
    quotient = values.double() / torch.where(exists, volume, 1.0)
    return torch.where(exists, quotient.to(values.dtype), math.nan)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, rounded once to their dtype."""
    return (a.double() @ b.double()).to(a.dtype)


def _from_center(positions: Tensor, cell: Tensor, system_idx: Tensor | None) -> Tensor:
    """Positions from the mean position of each system, (N, 3); the mean is a constant."""
    if system_idx is None:
        return positions - positions.detach().mean(0, dtype=torch.float64).to(positions.dtype)
    each = torch.nn.functional.pad(positions.detach().double(), (0, 1), value=1.0)  # x, y, z and 1, to count
    sums = each.new_zeros(len(cell), 4).index_put((system_idx,), each, accumulate=True)
    centers = sums[:, :3] / sums[:, 3:]  # NaN for a system without atoms
    return positions - centers.to(positions.dtype)[system_idx]


def _gradients(
    energy: Tensor, positions: Tensor, cell: Tensor | None, create_graph: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the sum of the energies by `positions` and by `cell`, each with the other held fixed.

    The second is None where the energy does not depend on the cell. The sum is not taken: under no_grad it
    would have no graph.
    """
    inputs = (positions,) if cell is None else (positions, cell)
    options = dict(create_graph=create_graph, allow_unused=True)
    if torch.compiler.is_dynamo_compiling():
        found = _gradients_in_a_compiled_graph(energy, inputs, options)
    else:
        hooks = [_cut(t) for t in inputs if not t.is_leaf] if len(inputs) > 1 else []
        try:
            found = torch.autograd.grad(energy, inputs, torch.ones_like(energy), **options)
        finally:
            for hook in hooks:
                hook.remove()
    _validate.depends_on_positions(found[0], positions)
    grad_positions = torch.zeros_like(positions) if found[0] is None else found[0]
    return grad_positions, found[1] if len(found) > 1 else None


def _cut(t: Tensor):
    """Until the handle is removed, no gradient flows from `t` to what it was computed from.

    torch.autograd.grad takes the gradient of an input before the prehooks of the node that made it run.
    """
    output = t.output_nr

    def prehook(gradients):
        # Zeros, not None: hooks and custom Functions further down may expect tensors.
        nothing = None if gradients[output] is None else torch.zeros_like(gradients[output])
        return (*gradients[:output], nothing, *gradients[output + 1 :])

    return t.grad_fn.register_prehook(prehook)


def _gradients_in_a_compiled_graph(energy: Tensor, inputs: tuple[Tensor, ...], options: dict):
    """As with `_cut`, which Dynamo cannot trace: the part through the other input is subtracted."""
    found = torch.autograd.grad(energy, inputs, torch.ones_like(energy), retain_graph=True, **options)
    if len(inputs) == 1 or all(t.is_leaf for t in inputs):
        return found
    result = []
    for own, other in ((0, 1), (1, 0)):
        through = None
        if found[own] is not None and found[other] is not None:
            (through,) = torch.autograd.grad(
                inputs[other], inputs[own], found[other], retain_graph=True, **options
            )
        result.append(found[own] if through is None else found[own] - through)
    return tuple(result)
