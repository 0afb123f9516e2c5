"""CHGNet's crystal graph, its bonds and its angles, from our half list."""

import math
import sys

import torch
from torch import Tensor, nn

from ..neighbors import neighbor_pairs
from . import _common

_TOLERANCE = 1e-8  # Å², on the squared distance: CHGNet passes it to pymatgen


def use_diffnl(model: nn.Module) -> nn.Module:
    """Gives a `chgnet.model.CHGNet` our converter, with the options of its own. Returns the model."""
    names = "atom_graph_cutoff", "bond_graph_cutoff", "on_isolated_atoms"
    model.graph_converter = GraphConverter(**{name: getattr(model.graph_converter, name) for name in names})
    return model


class GraphConverter(nn.Module):
    """Stands in for `chgnet.graph.CrystalGraphConverter`: the same arguments, bonds, angles and rules.

    A half list is what CHGNet calls the undirected bonds: nothing has to be matched, and no bond becomes a
    Python object. Directed bonds are in ascending order of their centers, undirected ones in the order in
    which they appear there, angles in that of their first undirected bond; the rest of the order is ours.

    A bond has d² < cutoff² + 1e-8 Å², as with pymatgen: a shell of a perfect crystal on the cutoff is in. The
    first bond of an angle has d <= cutoff, the second d < cutoff: on it, rounding decides, with CHGNet's list
    too, and the energy does not change. Distances are float64. Empty tables are (0, 2) and (0, 5), CHGNet's
    (0,). `algorithm` changes nothing. `device` is where graphs are made; CHGNet moves them to its model.
    """

    def __init__(
        self,
        *,
        atom_graph_cutoff: float = 6,
        bond_graph_cutoff: float | None = 3,
        algorithm: str = "diffnl",
        on_isolated_atoms: str = "error",
        verbose: bool = False,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        _check_response(on_isolated_atoms)
        self.atom_graph_cutoff, self.algorithm = atom_graph_cutoff, algorithm
        self.bond_graph_cutoff = atom_graph_cutoff if bond_graph_cutoff is None else bond_graph_cutoff
        self.on_isolated_atoms, self.device = on_isolated_atoms, device
        if verbose:
            print(self)

    def forward(self, structure, graph_id=None, mp_id=None):
        """The `chgnet.graph.CrystalGraph` of a `pymatgen.core.Structure`: int32 tables, the rest float32.
        Raises ValueError for isolated atoms, if they are an error, and for a cutoff that is not > 0."""
        from chgnet.graph import CrystalGraph

        _check_response(self.on_isolated_atoms)
        numbers = torch.tensor([site.specie.Z for site in structure], dtype=torch.int32, device=self.device)
        positions = torch.tensor(structure.cart_coords, dtype=torch.float64, device=self.device)
        cell = torch.tensor(structure.lattice.matrix, dtype=torch.float64, device=self.device)
        fractional = torch.tensor(structure.frac_coords, dtype=torch.float32, device=self.device)
        reach = math.sqrt(_common.length("atom_graph_cutoff", self.atom_graph_cutoff) ** 2 + _TOLERANCE)
        bond_cutoff = _common.length("bond_graph_cutoff", self.bond_graph_cutoff)
        pairs = neighbor_pairs(positions, cell, structure.lattice.pbc, reach, full=False)

        mapping = torch.cat([pairs.mapping, pairs.mapping.flip(0)], 1)
        order = mapping[0].argsort(stable=True)
        mapping, shifts = mapping[:, order], torch.cat([pairs.shifts, -pairs.shifts])[order]
        self._check_isolated(len(numbers) - len(mapping[0].unique()), graph_id)
        directed = order.argsort().view(2, -1)  # where (i, j, S) and (j, i, -S) of an undirected bond now are
        undirected = order % max(directed.shape[1], 1)
        angles = _angles(mapping[0], directed, undirected, pairs.distances, bond_cutoff)
        return CrystalGraph(
            atomic_number=numbers,
            atom_frac_coord=fractional.requires_grad_(),
            atom_graph=mapping.T.contiguous().int(),
            atom_graph_cutoff=self.atom_graph_cutoff,
            neighbor_image=shifts.float(),
            directed2undirected=undirected.int(),
            undirected2directed=directed[0].int(),
            bond_graph=angles.int(),
            bond_graph_cutoff=self.bond_graph_cutoff,
            lattice=cell.float().requires_grad_(),
            graph_id=graph_id,
            mp_id=mp_id,
            composition=structure.composition.formula,
        )

    def _check_isolated(self, number: int, graph_id) -> None:
        message = f"Structure {graph_id=} has {number} isolated atom(s): CHGNet is likely wrong there"
        if number and self.on_isolated_atoms == "error":
            raise ValueError(message)
        if number and self.on_isolated_atoms == "warn":
            print(message, file=sys.stderr)

    def set_isolated_atom_response(self, on_isolated_atoms: str) -> None:
        _check_response(on_isolated_atoms)
        self.on_isolated_atoms = on_isolated_atoms

    def as_dict(self) -> dict[str, str | float]:
        return {name: getattr(self, name) for name in ("atom_graph_cutoff", "bond_graph_cutoff", "algorithm")}

    @classmethod
    def from_dict(cls, dct: dict) -> "GraphConverter":
        return cls(**dct)


def _check_response(on_isolated_atoms: str) -> None:
    if on_isolated_atoms not in ("ignore", "warn", "error"):
        raise ValueError(
            f"`on_isolated_atoms` must be 'ignore', 'warn' or 'error'; got {on_isolated_atoms!r}"
        )


def _angles(centers: Tensor, directed: Tensor, undirected: Tensor, distances: Tensor, cutoff) -> Tensor:
    """(A, 5): the center, the undirected and the directed number of the first bond, both of the second.

    `centers` (2U,) ascends; `directed` (2, U) are the numbers of both directions of an undirected bond,
    `undirected` (2U,) is the way back; `distances` (U,).
    """
    (second,) = torch.nonzero((distances < cutoff)[undirected], as_tuple=True)
    first = directed[:, distances <= cutoff].T.flatten()
    # The second bonds of a center are one stretch; each first bond meets all of it, except itself.
    begin = torch.searchsorted(centers[second], centers[first])
    length = torch.searchsorted(centers[second], centers[first], right=True) - begin
    row = torch.repeat_interleave(length)
    step = torch.arange(len(row), device=row.device) - (length.cumsum(0) - length)[row]
    first, second = first[row], second[begin[row] + step]
    first, second = first[first != second], second[first != second]
    return torch.stack([centers[first], undirected[first], first, undirected[second], second], 1)
