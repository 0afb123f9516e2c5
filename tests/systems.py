"""Named systems for the tests: real structures, and the inputs that break neighbour lists.

Everything is built in float64 and cast by `System.arguments`, so that both dtypes see the same structure.
"""

from dataclasses import dataclass, replace
from math import cos, pi, sin, sqrt

import torch

POSES = ("as_built", "rotated", "outside", "rotated_outside")


@dataclass(frozen=True)
class System:
    """One input of the list: positions (N, 3) Å, cell (3, 3) or (B, 3, 3) Å, flags, and cutoffs to try, Å."""

    name: str
    positions: torch.Tensor
    cell: torch.Tensor | None
    pbc: tuple | list | None
    cutoffs: tuple
    system_idx: torch.Tensor | None = None

    def arguments(self, dtype=torch.float64, device="cpu"):
        """(positions, cell, pbc, system_idx) as the list takes them, the caller's to change."""

        def own(tensor, dtype):
            return None if tensor is None else tensor.to(device, dtype, copy=True)

        pbc = None if self.pbc is None else torch.tensor(self.pbc, device=device)
        index = None if self.system_idx is None else own(self.system_idx, self.system_idx.dtype)
        return own(self.positions, dtype), own(self.cell, dtype), pbc, index

    def posed(self, pose):
        """The same system as built, rotated, or with its atoms scattered over other cells."""
        generator = torch.Generator().manual_seed(len(self.name) + 7 * len(self.positions))
        system = self
        if "rotated" in pose:
            q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
            rotation = q * torch.linalg.det(q).sign()
            system = replace(
                system,
                positions=system.positions @ rotation,
                cell=None if system.cell is None else system.cell @ rotation,
            )
        if "outside" in pose:
            moved = system.positions + torch.tensor([17.3, -41.0, 5.5], dtype=torch.float64)
            if system.cell is not None and system.pbc is not None:
                cells = torch.randint(-4, 5, (len(moved), 3), generator=generator)
                cells = cells * torch.tensor(system.pbc).expand(system.cells().shape[:2])[system.owner()]
                moved = moved + torch.einsum("nk,nkc->nc", cells.double(), system.cells()[system.owner()])
            system = replace(system, positions=moved)
        return system

    def cells(self):
        """The cell as (B, 3, 3); B = 1 zero cell where there is none."""
        return torch.zeros(1, 3, 3, dtype=torch.float64) if self.cell is None else self.cell.reshape(-1, 3, 3)

    def owner(self):
        """(N,) which system an atom belongs to."""
        zeros = torch.zeros(len(self.positions), dtype=torch.int64)
        return zeros if self.system_idx is None else self.system_idx.long()

    def flags(self):
        """(B, 3) bool."""
        pbc = torch.tensor(False if self.pbc is None or self.cell is None else self.pbc)
        return pbc.expand(len(self.cells()), 3)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def scatter(n, cell, seed, low=0.0, high=1.0):
    """n random atoms (n, 3) with fractional coordinates in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(n, 3, generator=generator, dtype=torch.float64)) @ tensor(cell)


def crystal(name, cell, basis, cutoffs, pbc=(True, True, True), repeat=(1, 1, 1)):
    """A supercell from a cell (rows, Å) and fractional coordinates."""
    cell = tensor(cell)
    images = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in repeat))
    positions = (images[:, None, :] + tensor(basis)[None, :, :]).reshape(-1, 3) @ cell
    return System(name, positions, cell * tensor(repeat)[:, None], pbc, cutoffs)


def cubic(a):
    return [[a, 0.0, 0.0], [0.0, a, 0.0], [0.0, 0.0, a]]


TRICLINIC = [[5.1, 0.0, 0.0], [1.7, 4.6, 0.0], [-2.2, 1.1, 6.3]]
# The same plane spacings as a compact cell, written with vectors that lean over by many cells.
SKEWED = [[4.0, 0.0, 0.0], [25.0, 4.5, 0.0], [-31.0, 22.0, 5.0]]
LEFT_HANDED = [[0.0, 4.4, 0.3], [5.2, 0.1, 0.0], [0.4, 0.9, 6.1]]
FCC_BASIS = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]
HCP = [[2.51, 0.0, 0.0], [-1.255, 2.51 * sqrt(3) / 2, 0.0], [0.0, 0.0, 4.07]]
GRAPHENE = [[2.46, 0.0, 0.0], [-1.23, 2.46 * sqrt(3) / 2, 0.0], [0.0, 0.0, 15.0]]
WATER = [[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]]


def crystals():
    third = [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    diamond = FCC_BASIS + [[x + 0.25 for x in row] for row in FCC_BASIS]
    primitive = [[0.0, 1.805, 1.805], [1.805, 0.0, 1.805], [1.805, 1.805, 0.0]]
    zero_row = GRAPHENE[:2] + [[0.0, 0.0, 0.0]]
    honeycomb = [[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]]
    return [
        crystal("fcc", cubic(3.61), FCC_BASIS, (2.0, 3.0, 6.5), repeat=(2, 1, 1)),
        crystal("fcc_primitive", primitive, [[0.0, 0.0, 0.0]], (2.6, 7.0)),
        crystal("diamond", cubic(5.43), diamond, (2.5, 6.0)),
        crystal("hcp", HCP, third, (2.6, 6.0)),
        crystal("simple_cubic_at_a_shell", cubic(3.0), [[0.0, 0.0, 0.0]], (3.0, 6.0), repeat=(2, 2, 2)),
        crystal("graphene", GRAPHENE, honeycomb, (1.5, 5.0), (True, True, False), (2, 2, 1)),
        crystal("graphene_zero_row", zero_row, honeycomb, (1.5, 5.0), (True, True, False), (2, 2, 1)),
        crystal("one_atom", cubic(3.3), [[0.2, 0.7, 0.4]], (3.0, 8.0)),
        crystal("one_atom_tiny", cubic(0.9), [[0.3, 0.1, 0.9]], (0.95, 10.0)),
        crystal("one_atom_triclinic", TRICLINIC, [[0.5, 0.5, 0.5]], (4.0, 11.0)),
        crystal("one_atom_tiny_chain", cubic(0.7), [[0.0, 0.0, 0.0]], (12.0,), (False, True, False)),
    ]


def disordered():
    full = (True, True, True)
    helix = [[1.9 * cos(2 * pi * k / 5), 1.9 * sin(2 * pi * k / 5), 1.25 * k] for k in range(5)]
    chain = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 6.25]]
    garbage = [[6.0, 0.0, 0.0], [0.0, 5.0, 0.0], [3.1, -2.2, 0.5]]
    huge = cubic(1.0e5)
    far = scatter(6, cubic(3.2), 11) + torch.randint(-300, 300, (6, 3), generator=_seed(12)).double() * 3.2
    return [
        System("triclinic", scatter(9, TRICLINIC, 1), tensor(TRICLINIC), full, (2.0, 7.0)),
        System("very_skewed", scatter(6, SKEWED, 2), tensor(SKEWED), full, (3.0, 6.0)),
        System("left_handed", scatter(8, LEFT_HANDED, 3), tensor(LEFT_HANDED), full, (3.0, 6.0)),
        System("polymer_chain", tensor(helix), tensor(chain), (False, False, True), (1.6, 3.0, 9.0)),
        System("molecule", tensor(WATER), None, None, (1.0, 5.0)),
        System("molecule_in_open_box", tensor(WATER), tensor(cubic(2.0)), (False,) * 3, (1.0, 5.0)),
        System("open_cluster", scatter(40, cubic(9.0), 4), None, None, (2.0, 4.0)),
        System("slab_1A_thick", scatter(7, _thin(1.0), 5), tensor(_thin(1.0)), full, (1.2, 5.0)),
        System(
            "open_slab_1A_thick", scatter(60, _thin(1.0), 6), tensor(_thin(0.0)), (True, True, False), (4.5,)
        ),
        System("garbage_open_row", scatter(7, garbage, 7), tensor(garbage), (True, True, False), (3.0, 7.0)),
        System(
            "garbage_open_rows", scatter(7, garbage, 8), tensor(garbage), (False, True, False), (3.0, 7.0)
        ),
        System("coplanar_open_row", scatter(7, garbage, 9), _coplanar(), (True, True, False), (3.0, 7.0)),
        System(
            "sparse_box",
            tensor([[1.0, 1.0, 1.0], [9999.5, 1.0, 1.0], [5e3] * 3]),
            tensor(cubic(1e4)),
            full,
            (5.0,),
        ),
        System(
            "dense_cluster_huge_box", scatter(30, cubic(4.0), 10, -0.5, 0.5), tensor(huge), full, (2.0, 5.0)
        ),
        System("many_cells_away", far, tensor(cubic(3.2)), full, (2.5, 5.0)),
        System(
            "coincident",
            tensor([[1.0, 2.0, 3.0]] * 3 + [[4.0, 5.0, 3.0]]),
            tensor(cubic(3.0)),
            full,
            (1.0, 4.0),
        ),
        System("coincident_open", tensor([[1.0, 2.0, 3.0]] * 3), None, None, (0.5,)),
        System("on_the_faces", _faces(4.0), tensor(cubic(4.0)), full, (4.0, 5.0)),
        System("one_free_atom", tensor([[3.0, 2.0, 1.0]]), None, None, (4.0,)),
        System("nothing", tensor([]).reshape(0, 3), tensor(cubic(4.0)), full, (4.0,)),
        System("nothing_open", tensor([]).reshape(0, 3), None, None, (4.0,)),
        System("bulk", scatter(150, cubic(11.5), 13), tensor(cubic(11.5)), full, (4.0,)),
    ]


def batches():
    cells = torch.stack([tensor(cubic(4.0)), tensor(TRICLINIC), tensor(LEFT_HANDED), tensor(cubic(0.9))])
    counts = [5, 0, 6, 1]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    positions = torch.cat([scatter(n, cells[b].tolist(), 20 + b) for b, n in enumerate(counts)])
    mixed = [[True, True, True], [True, False, True], [False, True, True], [True, True, False]]
    order = torch.randperm(len(owner), generator=_seed(30))
    trailing = torch.cat([cells, cells[:2]])
    empty_first = torch.cat([cells[:1], cells])
    shared = {"pbc": (True, True, True), "cutoffs": (3.0, 5.0)}
    zeros = torch.zeros(3, 3, 3, dtype=torch.float64)
    zeros[1] = tensor(cubic(4.0))
    open_and_periodic = [[False] * 3, [True] * 3, [False] * 3]
    return [
        System("batch", positions, cells, system_idx=owner, **shared),
        System("batch_interleaved", positions[order], cells, system_idx=owner[order], **shared),
        System("batch_mixed_pbc", positions[order], cells, mixed, (3.0, 6.0), owner[order]),
        System("batch_trailing_empty", positions, trailing, system_idx=owner, **shared),
        System("batch_leading_empty", positions, empty_first, system_idx=owner + 1, **shared),
        System("batch_int32_index", positions[order], cells, system_idx=owner[order].int(), **shared),
        System("batch_all_empty", positions[:0], cells, system_idx=owner[:0], **shared),
        System("batch_open_zero_cells", positions, zeros, open_and_periodic, (3.0,), owner.clamp(max=2)),
        System("one_cell_batch", positions[:5], cells[:1], **shared),
    ]


def _seed(seed):
    return torch.Generator().manual_seed(seed)


def _thin(height):
    return [[7.0, 0.0, 0.0], [1.0, 8.0, 0.0], [0.0, 0.0, height]]


def _coplanar():
    return tensor([[6.0, 0.0, 0.0], [0.0, 5.0, 0.0], [6.0, 5.0, 0.0]])


def _faces(a):
    """Atoms on faces, edges and corners of a cube, and one ulp to either side of a face."""
    below = torch.nextafter(tensor([a]), tensor([0.0])).item()
    above = torch.nextafter(tensor([a]), tensor([10.0])).item()
    rows = [[0.0, 0.0, 0.0], [a, 0.0, 0.0], [a, a, 0.0], [a, a, a], [0.0, 2.0, a]]
    return tensor(rows + [[below, 1.0, 1.0], [above, 3.0, 1.0], [-1e-17, 3.0, 3.0]])


SYSTEMS = {system.name: system for system in crystals() + disordered() + batches()}
