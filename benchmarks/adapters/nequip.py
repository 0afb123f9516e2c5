"""NequIP's neighbour-list transform, backend "diffnl" against its default, for one frame and for a batch."""

PACKAGES = ("nequip",)


def calls(atoms):
    from nequip.data import AtomicDataDict, from_ase
    from nequip.data.transforms import NeighborListTransform

    from diffnl.adapters import nequip

    nequip.register()
    ours, theirs = (NeighborListTransform(5.0, backend=name) for name in ("diffnl", "matscipy"))
    frame, small = from_ase(atoms), from_ase(atoms[: len(atoms) // 8])
    small["cell"] = small["cell"] / 2
    batch = AtomicDataDict.batched_from_list([dict(small) for _ in range(8)])
    return {
        "NequIP, one frame": (lambda: ours(dict(frame)), lambda: theirs(dict(frame))),
        "NequIP, 8 frames": (lambda: ours(dict(batch)), lambda: theirs(dict(batch))),
    }
