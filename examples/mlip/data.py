"""Labelled structures: reading, checking, batching, and a set made on the spot when no file is given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import torch
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

import diffnl


class LabelError(ValueError):
    """A file that cannot be trained on; the message names the file and the frame."""


@dataclass(frozen=True)
class Frame:
    """One labelled structure; float64 on the CPU as it is read.

    `numbers` (N,) int64; `positions` (N, 3) and `cell` (3, 3) in Å; `pbc` (3,) bool; `energy` () in eV;
    `forces` (N, 3) in eV/Å; `stress` (3, 3) in eV/Å³, ASE's sign. `has_stress` is False for a frame without a
    label, and for one where stress has no meaning (`stress_is_defined`): its `stress` is zero and is never
    looked at. `group` is what the file calls the kind of the structure (`group=` or `config_type=`), "" if
    nothing. `mapping` (2, P) and `shifts` (P, 3), if the neighbour list is kept.
    """

    numbers: torch.Tensor
    positions: torch.Tensor
    cell: torch.Tensor
    pbc: torch.Tensor
    energy: torch.Tensor
    forces: torch.Tensor
    stress: torch.Tensor
    has_stress: bool
    group: str = ""
    mapping: torch.Tensor | None = None
    shifts: torch.Tensor | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Frame:
        """The frame on `device`, positions and cell in `dtype`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        moved |= {key: moved[key].to(dtype) for key in ("positions", "cell")}
        return replace(self, **moved)

    def with_list(self, cutoff: float) -> Frame:
        """The frame with its neighbour list, for `diffnl.pair_vectors` to make vectors from at every step."""
        mapping, shifts, _ = diffnl.neighbor_pairs(self.positions, self.cell, self.pbc, cutoff, sorted=True)
        return replace(self, mapping=mapping, shifts=shifts)


@dataclass(frozen=True)
class Batch:
    """B frames as one: `positions` (N, 3), `cell` (B, 3, 3), `pbc` (B, 3), `system_idx` (N,); labels float64.

    `energy` (B,), `forces` (N, 3), `stress` (B, 3, 3), `with_stress` (M,) the systems that have one, `counts`
    (B,) atoms in each system. `mapping` (2, P) and `shifts` (P, 3) if the frames keep their lists.
    """

    numbers: torch.Tensor
    positions: torch.Tensor
    cell: torch.Tensor
    pbc: torch.Tensor
    system_idx: torch.Tensor
    counts: torch.Tensor
    energy: torch.Tensor
    forces: torch.Tensor
    stress: torch.Tensor
    with_stress: torch.Tensor
    mapping: torch.Tensor | None = None
    shifts: torch.Tensor | None = None

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What `Potential` takes first."""
        return self.numbers, self.positions, self.cell, self.pbc, self.system_idx

    @property
    def known(self) -> tuple[torch.Tensor, ...] | None:
        """The pairs as `Potential` takes them, if the frames keep their lists."""
        if self.mapping is None:
            return None
        return self.mapping, self.shifts, torch.tensor(self.mapping.shape[1], device=self.mapping.device)


def stress_is_defined(atoms: ase.Atoms) -> bool:
    """Whether a stress means anything: some axis is periodic and the cell has a volume.

    A slab's is per volume of its cell, vacuum included, in labels and predictions alike.
    """
    # ASE's own `cell.rank` counts rows that are not zero.
    return bool(atoms.pbc.any()) and bool(np.linalg.matrix_rank(atoms.cell) == 3)


def frame_from_atoms(atoms: ase.Atoms, name: str) -> Frame:
    """`atoms` with a calculator's labels -> `Frame`. Raises LabelError, opening with `name`.

    Energy and forces must be there; a stress may be missing.
    """
    labels = atoms.calc.results if atoms.calc is not None else {}
    shapes = {"energy": [()], "forces": [(len(atoms), 3)], "stress": [(6,), (3, 3)]}
    if len(atoms) == 0:
        raise LabelError(f"{name} has no atoms")
    if np.linalg.matrix_rank(atoms.cell[atoms.pbc]) < atoms.pbc.sum():
        raise LabelError(f"{name} is periodic along a cell vector that is zero or depends on the others")
    if labels.get("stress") is None or not stress_is_defined(atoms):
        del shapes["stress"]
    values = {}
    for key, allowed in shapes.items():
        if labels.get(key) is None:
            raise LabelError(
                f"{name} has no {key}: training needs energy and forces of every structure, as ASE stores "
                f"them (extended XYZ: `energy=`, a `forces:R:3` column, `stress=` in eV/Å³ if there is one); "
                f"this frame has {', '.join(sorted(labels)) or 'no labels'}"
            )
        values[key] = np.asarray(labels[key], dtype=float)
        if values[key].shape not in allowed:
            raise LabelError(f"{name}: its {key} has shape {values[key].shape}, expected {allowed[0]}")
        if not np.isfinite(values[key]).all():
            raise LabelError(f"{name}: its {key} is not finite")
    cell = np.array(atoms.cell.array, dtype=float)
    if not (np.isfinite(atoms.positions).all() and np.isfinite(cell).all()):
        raise LabelError(f"{name}: its positions or cell are not finite")
    stress = values.get("stress", np.zeros((3, 3)))
    return Frame(
        torch.from_numpy(atoms.numbers.astype(np.int64)),
        torch.from_numpy(atoms.positions.copy()),
        torch.from_numpy(cell),
        torch.from_numpy(atoms.pbc.copy()),
        torch.as_tensor(values["energy"], device="cpu"),
        torch.from_numpy(values["forces"].copy()),
        torch.from_numpy(stress.copy() if stress.shape == (3, 3) else voigt_6_to_full_3x3_stress(stress)),
        has_stress="stress" in values,
        group=str(atoms.info.get("group", atoms.info.get("config_type", ""))),
    )


def read_frames(path: str | Path) -> list[Frame]:
    """Every frame of a file that ASE can read.

    Periodic structures and molecules, with a stress or without. Raises LabelError, naming the file and the
    frame, for a missing energy or forces, and for an unusable label.
    """
    try:
        images = ase.io.read(path, ":")
    except Exception as error:  # ASE's readers raise whatever their parsing trips over
        raise LabelError(f"{path}: ASE cannot read it ({type(error).__name__}: {error})") from error
    if not images:
        raise LabelError(f"{path} holds no frames")
    return [frame_from_atoms(atoms, f"{path}: frame {index}") for index, atoms in enumerate(images)]


def atoms_from_frame(frame: Frame) -> ase.Atoms:
    """`Frame` -> ase.Atoms that carries the labels."""
    atoms = ase.Atoms(
        frame.numbers.numpy(), frame.positions.numpy(), cell=frame.cell.numpy(), pbc=frame.pbc.numpy()
    )
    labels = {"energy": frame.energy.item(), "forces": frame.forces.numpy()}
    if frame.has_stress:
        labels["stress"] = full_3x3_to_voigt_6_stress(frame.stress.numpy())
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def collate(frames: list[Frame], device: torch.device, dtype: torch.dtype) -> Batch:
    """Frames -> one Batch on `device`, with positions and cells in `dtype`. Waits for no device."""
    frames = [frame.on(device, dtype) for frame in frames]
    # Numbers that Python knows are put together here; everything else where it lies.
    sizes = [len(frame.numbers) for frame in frames]
    counts = torch.tensor(sizes, device="cpu")
    system_idx = torch.arange(len(frames), device="cpu").repeat_interleave(counts)
    with_stress = [k for k, frame in enumerate(frames) if frame.has_stress]
    with_stress = torch.tensor(with_stress, dtype=torch.int64, device="cpu")
    known = {}
    if all(frame.mapping is not None for frame in frames):
        before = (torch.cumsum(counts, 0) - counts).tolist()
        mappings = [frame.mapping + first for frame, first in zip(frames, before, strict=True)]
        known = {"mapping": torch.cat(mappings, 1), "shifts": torch.cat([frame.shifts for frame in frames])}
    return Batch(
        numbers=torch.cat([frame.numbers for frame in frames]),
        positions=torch.cat([frame.positions for frame in frames]),
        cell=torch.stack([frame.cell for frame in frames]),
        pbc=torch.stack([frame.pbc for frame in frames]),
        system_idx=system_idx.to(device),
        counts=counts.to(device),
        energy=torch.stack([frame.energy for frame in frames]),
        forces=torch.cat([frame.forces for frame in frames]),
        stress=torch.stack([frame.stress for frame in frames]),
        with_stress=with_stress.to(device),
        **known,
    )


def split(frames: list[Frame], fraction: float, seed: int) -> tuple[list[Frame], list[Frame]]:
    """A random split into training and validation frames, at least one of each."""
    if len(frames) < 2:
        raise LabelError(f"{len(frames)} training frame is too few: one is held out for validation")
    held_out = min(max(1, round(fraction * len(frames))), len(frames) - 1)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return [frames[k] for k in sorted(order[held_out:])], [frames[k] for k in sorted(order[:held_out])]


def fingerprint(*sets: list[Frame]) -> str:
    """A hash of everything in the frames: a run is resumed on the data it was started on, or not at all."""
    digest = hashlib.sha256()
    for frames in sets:
        digest.update(f"{len(frames)};".encode())
        for frame in frames:
            for value in vars(frame).values():
                digest.update(b"" if value is None else np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def make_copper(count: int, seed: int) -> list[Frame]:
    """`count` fcc copper cells of 4 to 32 atoms, rattled (to 0.15 Å), strained (to 6 %), with EMT labels."""
    random = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        atoms = ase.build.bulk("Cu", cubic=True) * [(2, 2, 2), (2, 2, 1), (1, 1, 2), (1, 1, 1)][index % 4]
        strain = random.uniform(-0.06, 0.06, (3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += random.normal(size=(len(atoms), 3)) * random.uniform(0.0, 0.15)
        atoms.calc = EMT()
        atoms.get_forces(), atoms.get_stress()
        frames.append(frame_from_atoms(atoms, f"copper: frame {index}"))
    return frames
