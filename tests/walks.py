"""A random walk like a simulation at constant pressure: for lists that must follow it bit by bit."""

import torch
from systems import TRICLINIC, tensor

ATOMS = (7, 0, 12, 5, 9)  # of each system; one stays empty
PBC = (
    (True, True, True),
    (True, True, True),
    (True, True, False),
    (False, True, False),
    (False, False, False),
)


def npt_walk(steps, dtype, device="cpu", seed=0):
    """Yields (positions, cell, pbc, system_idx) of 5 triclinic systems with mixed pbc, `steps` times.

    Each step moves atoms and strains cells, atoms with them, by amounts that make a list to cutoff + 1 Å last
    for tens of steps. Atoms leave their cells and are not wrapped back; the systems breathe, but do not drift
    apart. Everything is made in float64 on the CPU: the walk is the same for every dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cell = tensor(TRICLINIC) * (1.0 + 0.02 * torch.arange(5.0, dtype=torch.float64)[:, None, None])
    system_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(ATOMS))
    system_idx = system_idx[torch.randperm(len(system_idx), generator=generator)]
    inside = torch.rand(len(system_idx), 3, generator=generator, dtype=torch.float64)
    positions = torch.einsum("nk,nkc->nc", inside, cell[system_idx])
    home, pbc = cell, torch.tensor(PBC)
    for _ in range(steps):
        eps = 0.004 * normal(5, 3, 3) + 0.02 * (torch.linalg.inv(cell) @ home - torch.eye(3))
        cell = cell + cell @ eps
        positions = (
            positions + (positions[:, None, :] @ eps[system_idx])[:, 0] + 0.02 * normal(*positions.shape)
        )
        yield (
            positions.to(device, dtype),
            cell.to(device, dtype),
            pbc.to(device),
            system_idx.to(device),
        )


def wrap(positions, cell, pbc, system_idx=None, origin=0.0):
    """positions (N, 3) moved by lattice vectors of periodic axes into the cell whose corner is `origin`."""
    system_idx = torch.zeros(len(positions), dtype=torch.int64) if system_idx is None else system_idx
    pbc = torch.as_tensor(pbc).expand(*cell.shape[:-2], 3).reshape(-1, 3)
    h = torch.where(pbc[:, :, None], cell.reshape(-1, 3, 3), 0.0)
    # The pseudoinverse leaves out what is normal to all periodic axes, as the open ones' vectors must be.
    cells = torch.einsum("nc,nck->nk", positions - origin, torch.linalg.pinv(h)[system_idx]).floor()
    return positions - torch.einsum("nk,nkc->nc", cells, h[system_idx])
