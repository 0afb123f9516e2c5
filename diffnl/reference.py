"""The oracle: every pair, every image, in plain torch. Slow, and short enough to read as the specification.

Nothing here is shared with the compiled search but the words of the errors. The vectors are ordinary torch
expressions, so torch's own autograd differentiates them.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _options, _pbc, _validate
from .neighbors import Pairs

_PAIR_BLOCK = 1 << 20  # candidates looked at together


def neighbor_pairs(
    positions: Tensor,
    cell: Tensor | None,
    pbc: bool | Sequence[bool] | Tensor | None,
    cutoff: float,
    system_idx: Tensor | None = None,
    *,
    full: bool = True,
    sorted: bool = False,
    **unknown: object,
) -> Pairs:
    """`diffnl.neighbor_pairs` by brute force: same arguments, errors, pairs and bits.

    Rows come in the order of `sorted=True` always, which satisfies both settings.
    """
    if unknown:
        _options.unexpected(unknown, "neighbor_pairs")
    cutoff = _options.cutoff(cutoff)
    full, _ = _options.flag("full", full), _options.flag("sorted", sorted)
    positions = _validate.positions(positions)
    cell = None if cell is None else _validate.cell(cell, positions)
    pbc = _pbc.flags(pbc, positions, cell)
    system_idx = _validate.system_idx(system_idx, positions)
    cell, pbc, system_idx = _validate.systems(cell, pbc, system_idx, positions)
    cell = cell.reshape(-1, 3, 3)
    pbc = pbc.expand(cell.shape[0], 3)
    _check_data(positions, cell, pbc, system_idx)

    if system_idx is None:
        system_idx = torch.zeros(positions.shape[0], dtype=torch.int64, device=positions.device)
    found = [torch.empty((0, 5), dtype=torch.int64, device=positions.device)]
    for b in range(cell.shape[0]):
        atoms = torch.nonzero(system_idx == b).flatten()
        if len(atoms) > 0:
            found += _system_pairs(positions.detach(), cell[b].detach(), pbc[b], cutoff, atoms, b)
    i, j, *shift = torch.cat(found).unbind(1)
    if not full:
        positive = _lexicographically_positive(shift)
        keep = (i < j) | ((i == j) & positive)
        i, j, *shift = (column[keep] for column in (i, j, *shift))
    order = torch.arange(len(i), device=positions.device)
    for key in (*reversed(shift), j, i):  # stable sorts, least significant key first
        order = order[torch.argsort(key[order], stable=True)]
    i, j, *shift = (column[order] for column in (i, j, *shift))

    shifts = torch.stack(shift, 1).to(torch.int32)
    vectors = _vectors(positions, cell[system_idx[i]], i, j, shifts.to(positions.dtype))
    return Pairs(torch.stack((i, j)), shifts, vectors)


def _vectors(positions: Tensor, h: Tensor, i: Tensor, j: Tensor, shifts: Tensor) -> Tensor:
    """The contract's arithmetic, one rounded operation at a time. `h` is (P, 3, 3), `shifts` (P, 3)."""
    s = shifts.unsqueeze(-1)
    translation = (s[:, 0] * h[:, 0] + s[:, 1] * h[:, 1]) + s[:, 2] * h[:, 2]
    return (positions[j] - positions[i]) + translation


def _lexicographically_positive(shift: list[Tensor]) -> Tensor:
    s0, s1, s2 = shift
    return (s0 > 0) | ((s0 == 0) & ((s1 > 0) | ((s1 == 0) & (s2 > 0))))


def _system_pairs(
    positions: Tensor, h: Tensor, pbc: Tensor, cutoff: float, atoms: Tensor, system: int
) -> list[Tensor]:
    """Rows (i, j, S0, S1, S2) of one system's pairs."""
    wraps, images = _wraps_and_images(positions, h, pbc, cutoff, atoms, system)
    squared_cutoff = torch.tensor(cutoff * cutoff, dtype=positions.dtype, device=positions.device)
    found = []
    n = len(atoms)
    for block in images.split(max(1, _PAIR_BLOCK // (n * n))):
        a, b, m = (
            index.flatten()
            for index in torch.meshgrid(
                *(torch.arange(k, device=positions.device) for k in (n, n, len(block))), indexing="ij"
            )
        )
        shifts = block[m] - wraps[b] + wraps[a]
        i, j = atoms[a], atoms[b]
        v = _vectors(positions, h.expand(len(i), 3, 3), i, j, shifts.to(positions.dtype))
        x, y, z = v.unbind(1)
        squared = (x * x + y * y) + z * z
        keep = (squared < squared_cutoff) & ((i != j) | (shifts != 0).any(1))
        found.append(torch.cat((torch.stack((i, j), 1), shifts), 1)[keep])
    return found


def _wraps_and_images(
    positions: Tensor, h: Tensor, pbc: Tensor, cutoff: float, atoms: Tensor, system: int
) -> tuple[Tensor, Tensor]:
    """W (n, 3), the cell each atom lies in, and the images m (M, 3) that can hold neighbours.

    With q in [0, 1) the fractional coordinates of wrapped atoms, a vector (q_j + m - q_i) @ h crosses
    |q_jk + m_k - q_ik| lattice planes of axis k, which lie `height_k` apart: |m_k| < cutoff / height_k + 1.
    What rounding adds to the vectors and to q is less than one plane, or the input is refused, so that no
    image is further out than `most`, the next whole number but one.
    """
    axes = [k for k in range(3) if pbc[k]]
    wraps = torch.zeros((len(atoms), 3), dtype=torch.int64, device=positions.device)
    ranges = [range(1)] * 3
    if axes:
        lattice = h[axes].double()
        # Columns of the pseudo-inverse are the reciprocal vectors within the span of the lattice. Rows of
        # length 1: next to a long vector, singular values of short ones would be lost.
        lengths = torch.linalg.vector_norm(lattice, dim=1)
        unit_rows = lattice / lengths[:, None]
        reciprocal = torch.linalg.pinv(unit_rows, rtol=0.0) / lengths
        whole = torch.floor(positions[atoms].double() @ reciprocal)
        spread = whole.amax(0) - whole.amin(0)
        heights = 1.0 / torch.linalg.vector_norm(reciprocal, dim=0)
        largest = spread + torch.ceil(cutoff / heights) + 1
        if bool((largest >= 2**31 - 1).any()):
            raise _validate.data_error("shift_overflows", positions, None, system)
        translation = float((largest * lengths).sum())
        # W itself is found in float64: far out, a skewed cell loses that too. The search asks the same.
        condition = 1.0 / float(torch.linalg.svdvals(unit_rows).prod())
        farthest = float(positions[atoms].abs().max()) + float(lengths.sum())
        blur = max(
            torch.finfo(positions.dtype).eps * translation,
            16 * torch.finfo(torch.float64).eps * condition * farthest,
        )
        if blur > float(heights.min()) / 8:
            raise _validate.data_error("images_blur", positions, None, system)
        wraps[:, axes] = (whole - whole.amin(0)).to(torch.int64)
        for axis, height in zip(axes, heights.tolist(), strict=True):
            most = int(cutoff / height) + 2
            ranges[axis] = range(-most, most + 1)
    images = torch.tensor(list(itertools.product(*ranges)), device=positions.device)
    return wraps, images


def _check_data(positions: Tensor, cell: Tensor, pbc: Tensor, system_idx: Tensor | None) -> None:
    bad = torch.nonzero(~torch.isfinite(positions).all(1)).flatten()
    if len(bad) > 0:
        raise _validate.data_error("positions_not_finite", positions, cell, int(bad[0]))
    for b in range(cell.shape[0]):
        if not bool(torch.isfinite(cell[b]).all()):
            raise _validate.data_error("cell_not_finite", positions, cell, b)
        lattice = cell[b][pbc[b]].double()
        if len(lattice) == 0:
            continue
        volume = torch.linalg.svdvals(lattice).prod()
        tolerance = 16 * torch.finfo(torch.float32).eps if cell.dtype == torch.float32 else 1e-12
        if not bool(volume > tolerance * torch.linalg.vector_norm(lattice, dim=1).prod()):
            raise _validate.data_error("cell_singular", positions, cell, b)
    if system_idx is not None:
        bad = torch.nonzero((system_idx < 0) | (system_idx >= cell.shape[0])).flatten()
        if len(bad) > 0:
            atom = int(bad[0])
            raise _validate.data_error(
                "system_idx_out_of_range", positions, cell, int(system_idx[atom]), atom
            )
