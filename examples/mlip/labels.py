"""In which order does a file hold the shear components of its stresses?

ASE's order is xx, yy, zz, yz, xz, xy; VASP prints xy, yz, zx last, LAMMPS xy, xz, yz. A set that was put
together from several sources may mix them, and nothing in a file tells. A potential does: stress is the
derivative of the energy, which it can learn from energies, forces and the diagonal of the stress: no order of
shears touches these. What it then says of the shears is compared with the labels in each of the six orders.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
from scipy.stats import wilcoxon

from diffnl.stress import from_voigt, to_voigt

from .data import Frame

SHEARS = ("yz", "xz", "xy")
AS_GIVEN = (0, 1, 2)
FEWEST = 5  # structures of a group

Order = tuple[int, ...]


def reorder(frames: list[Frame], orders: dict[str, Order]) -> list[Frame]:
    """The frames, those of the groups in `orders` with shears k read from the place orders[group][k]."""

    def one(frame: Frame) -> Frame:
        order = orders.get(frame.group, AS_GIVEN)
        if order == AS_GIVEN or not frame.has_stress:
            return frame
        stress = to_voigt(frame.stress)
        return replace(frame, stress=from_voigt(stress[[0, 1, 2, *(3 + k for k in order)]]))

    return [one(frame) for frame in frames]


def find_orders(frames: list[Frame], stresses: np.ndarray) -> dict[str, tuple[Order, float, float]]:
    """Groups of frames whose shears are in another order than they should be.

    `stresses` are a potential's, six in ASE's order for each frame that has one, as `evaluate` gives them.
    Returns, for each such group, its order as `reorder` takes it and the mean absolute error (eV/Å³) of the
    shears as given and in that order. An order is believed if it takes a third off the error, and if the
    structures agree about it: Wilcoxon's signed-rank test of their errors, p < 0.001.
    """
    frames = [frame for frame in frames if frame.has_stress]
    labels = to_voigt(torch.stack([frame.stress for frame in frames])).numpy()[:, 3:]
    predictions = stresses.reshape(-1, 6)[:, 3:]
    groups = np.array([frame.group for frame in frames])
    found = {}
    for group in sorted(set(groups)):
        label, prediction = labels[groups == group], predictions[groups == group]
        errors = {order: np.abs(label[:, order] - prediction).mean(1) for order in permutations(range(3))}
        best = min(errors, key=lambda order: errors[order].mean())
        given, better = errors[AS_GIVEN], errors[best]
        if len(label) < FEWEST or not better.mean() < 2 / 3 * given.mean():
            continue
        if wilcoxon(given, better, alternative="greater").pvalue < 1e-3:
            found[group] = best, float(given.mean()), float(better.mean())
    return found


def describe(group: str, order: Order, given: float, better: float) -> str:
    """What `find_orders` found, in words; errors in GPa."""
    places = ", ".join(SHEARS[order.index(k)] for k in range(3))
    name = f'structures of group "{group}"' if group else "structures"
    return (
        f"{name}: the file's shear stresses are {places}, not ASE's yz, xz, xy: "
        f"they fit to {better:.3f} GPa so, to {given:.3f} GPa as given"
    )
