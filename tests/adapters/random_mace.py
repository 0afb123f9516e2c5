"""MACE potentials with weights at random for all structures of the tests, and their data."""

import numpy as np
import pytest
import torch
from e3nn import o3
from mace.data import AtomicData, config_from_atoms
from mace.modules import ScaleShiftMACE, interaction_classes
from mace.tools import AtomicNumberTable, torch_geometric
from structures import STRUCTURES

CUTOFF = 4.0
TABLE = AtomicNumberTable(sorted({z for atoms in STRUCTURES.values() for z in map(int, atoms.numbers)}))
FRAMES = [STRUCTURES[name] for name in ("silicon_sheared", "slab_with_oxygen", "wire", "ethanol", "salt")]


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def given(atoms):
    return {"positions": atoms.positions, "pbc": tuple(atoms.pbc.tolist()), "cell": atoms.cell.array.copy()}


def network(kind, dtype=torch.float64):
    torch.manual_seed(0)
    options = {
        "r_max": CUTOFF,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": interaction_classes["RealAgnosticResidualInteractionBlock"],
        "interaction_cls_first": interaction_classes["RealAgnosticResidualInteractionBlock"],
        "num_interactions": 2,
        "num_elements": len(TABLE),
        "hidden_irreps": o3.Irreps("4x0e + 4x1o"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.linspace(-2.0, 1.0, len(TABLE)),
        "avg_num_neighbors": 10.0,
        "atomic_numbers": TABLE.zs,
        "correlation": 2,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8, 8],
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    }
    if kind is ScaleShiftMACE:
        options |= {"atomic_inter_scale": 1.3, "atomic_inter_shift": 0.2}
    return kind(**options).to(dtype).eval()


def batch_of(frames, dtype=torch.float64):
    torch.set_default_dtype(dtype)
    data = [
        AtomicData.from_config(config_from_atoms(atoms), z_table=TABLE, cutoff=CUTOFF) for atoms in frames
    ]
    (batch,) = torch_geometric.dataloader.DataLoader(data, batch_size=len(data))
    return batch
