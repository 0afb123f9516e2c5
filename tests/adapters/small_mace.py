"""A MACE potential of float64 with weights at random, small enough for tests."""

import numpy as np
import torch
from mace.modules import RealAgnosticInteractionBlock, ScaleShiftMACE
from mace.modules.blocks import o3  # through MACE, which lets e3nn load its constants


def small_mace(numbers, r_max: float) -> ScaleShiftMACE:
    """For these atomic numbers; its energies depend on what is within `r_max`, Å."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    mace = ScaleShiftMACE(
        r_max=r_max,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=RealAgnosticInteractionBlock,
        interaction_cls_first=RealAgnosticInteractionBlock,
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.linspace(-3.0, -1.0, len(numbers)),
        avg_num_neighbors=20.0,
        atomic_numbers=sorted(numbers),
        correlation=2,
        atomic_inter_scale=10.0,
        atomic_inter_shift=0.0,
    )
    torch.set_default_dtype(default)
    return mace
