#!/usr/bin/env python
"""Properties of a crystal from a trained potential: each one by derivative, and a second way.

    python examples/properties.py runs/si/potential.pt                       # diamond; about a minute
    python examples/properties.py runs/si/potential.pt --train train.extxyz  # next to the set's own constants
    python examples/properties.py runs/si/potential.pt --only nve --temperature 500 --ps 50
    python examples/properties.py runs/nial/potential.pt --structure nial.cif --only elastic,phonons

The crystal's cell and atoms are relaxed first; `mlip/properties.py` has the definitions, `mlip/dynamics.py`
the molecular dynamics. The output folder receives `properties.json`, with every number, and `phonons.png`,
`eos.png`, `nve.png` and `npt.png`. Each part is by itself: `properties.json` is written when one ends, keeps
what an earlier run found of the same crystal and potential, and of a part that fails what it had and the
error. The exit status is 1 if a part failed, or if derivatives and finite differences do not agree: elastic
constants to 0.1 % of the largest, squared frequencies to 0.2 % of the largest. A crystal that is not stable
is no disagreement: imaginary modes are labelled as such.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import torch
from ase.data import chemical_symbols
from ase.units import GPa
from mlip import dynamics
from mlip.calculator import PotentialCalculator
from mlip.data import read_frames
from mlip.properties import (
    Bands,
    cubic_constants,
    elastic_by_differences,
    elastic_constants,
    elastic_from_frames,
    energies_over_volumes,
    fit_curve,
    phonon_bands,
    relax,
)
from mlip.report import row_of_axes
from mlip.training import write_atomically

# The parts, and how messages call them.
PARTS = {"relax": "relaxation", "elastic": "elastic constants", "eos": "equation of state"}
PARTS |= {"phonons": "phonons", "nve": "NVE", "npt": "NPT"}
ELASTIC_TOLERANCE = 1e-3  # of the largest constant
PHONON_TOLERANCE = 2e-3  # of the largest squared frequency
IMAGINARY = 5e-3  # a mode is imaginary if it is so by more than this part of the highest frequency
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
CUBIC = ("C11", "C12", "C44")
HELD = ", atoms held"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("potential", type=Path, help="potential.pt, as train_mlip.py writes it")
    add(
        "--structure",
        help="a file ASE reads, or fcc, bcc, diamond, ... of the potential's element; none: its ground state",
    )
    add("--out", type=Path, help="output folder; none: that of the potential")
    add("--only", default=",".join(PARTS), help="which properties, with commas between")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--supercell", type=int, help="cells each way for phonons; none: for 100 atoms or more")
    add("--ps", type=float, default=1.0, help="of molecular dynamics, each")
    add("--step", type=float, default=1.0, help="of molecular dynamics, fs")
    add("--temperature", type=float, default=500.0, help="K")
    add("--md-atoms", type=int, default=64, help="about so many atoms in molecular dynamics")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of molecular dynamics")
    add("--seed", type=int, default=0, help="of the velocities")
    add("--train", help="labelled structures, whose strained cells give reference elastic constants")
    add("--reference", type=float, nargs=3, metavar=CUBIC, help="C11, C12, C44 in GPa to print alongside")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(PARTS)}")
    for name in ("ps", "step", "temperature", "md_atoms", "supercell"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    options.out = options.out or options.potential.parent
    return options


def structure(name: str | None, species: tuple[int, ...]) -> ase.Atoms:
    """The crystal asked for, as it is before any relaxation. Raises ValueError."""
    if name and Path(name).exists():
        atoms = ase.io.read(name)
        if not atoms.pbc.all():
            raise ValueError(f"--structure: {name} is not periodic along all three axes")
        return atoms
    if len(species) > 1:
        raise ValueError(f"the potential has {len(species)} species: --structure must be a file")
    symbol = chemical_symbols[species[0]]
    try:
        stable = ase.build.bulk(symbol)
        if name is None:
            return stable
        # ASE knows lattice constants of the stable structure only; others are given its volume to begin with.
        atoms = ase.build.bulk(symbol, name, a=1.0)
        scale = stable.get_volume() / len(stable) / (atoms.get_volume() / len(atoms))
        atoms.set_cell(atoms.cell * scale ** (1 / 3), scale_atoms=True)
        return atoms
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"--structure: no file, and no structure of {symbol}: {error}") from error


def box(atoms: ase.Atoms, count: int) -> ase.Atoms:
    """About `count` atoms for molecular dynamics: the cube of an fcc or bcc cell, repeated alike each way."""
    cubes = {"FCC": [[-1, 1, 1], [1, -1, 1], [1, 1, -1]], "BCC": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]}
    cube = ase.build.make_supercell(atoms, cubes.get(atoms.cell.get_bravais_lattice().name, np.eye(3)))
    repeat = max(1, round((count / len(cube)) ** (1 / 3)))
    return cube * (repeat, repeat, repeat)


# ---- a function for each property: prints a table, draws, fills `found` for properties.json as it goes ----


def report_relax(
    crystal: ase.Atoms, calculator: PotentialCalculator, options: argparse.Namespace, found: dict
) -> None:
    """A strained and rattled crystal must relax to the same crystal as the one that was not."""
    strained = crystal.copy()
    strain = np.array([[0.03, 0.01, 0.0], [0.01, -0.02, 0.0], [0.0, 0.0, 0.01]])
    strained.set_cell(strained.cell @ (np.eye(3) + strain), scale_atoms=True)
    strained.rattle(0.03, seed=1)
    strained.calc = calculator
    states = {"strained": strained, "relaxed": relax(strained, calculator), "not strained": crystal}
    found |= {
        name: {
            "energy (eV/atom)": atoms.get_potential_energy() / len(atoms),
            "volume (Å³/atom)": atoms.get_volume() / len(atoms),
            "largest stress (GPa)": float(np.abs(atoms.get_stress()).max() / GPa),
            "largest force (eV/Å)": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
        }
        for name, atoms in states.items()
    }
    print(f"\n{'relaxation of cell':<24}" + "".join(f"{name:>14}" for name in found))
    for row in found["strained"]:
        print(f"{row:<24}" + "".join(f"{state[row]:>14.5f}" for state in found.values()))


def references(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Name -> elastic constant to compare with, and how well it is known (GPa, zero if nothing says)."""
    found = {}
    if options.reference:
        found = {name: (value, 0.0) for name, value in zip(CUBIC, options.reference, strict=True)}
    if options.train:
        # In a set's strained cells the atoms are held, which C44 of diamond tells from the atoms being free.
        fitted = elastic_from_frames(read_frames(options.train))
        found |= {name + HELD: values for name, values in fitted.items()}
        if not fitted:
            print(
                f"\n{options.train} has no strained cells of a cubic crystal that say its elastic constants"
            )
    return found


def report_elastic(
    crystal: ase.Atoms, calculator: PotentialCalculator, options: argparse.Namespace, found: dict
) -> None:
    known = references(options)
    derivative = elastic_constants(crystal, calculator.model)
    found |= {"relaxed": derivative.relaxed.tolist(), "held": derivative.held.tolist()}
    differences = elastic_by_differences(crystal, calculator)
    found |= {"derivative": {}, "differences": {}, "reference": {}}
    scale = float(np.abs(derivative.held).max())
    print(
        f"\n{'elastic constants (GPa)':<24}{'derivative':>12}{'differences':>13}{'relative':>10}"
        f"{'reference':>18}"
    )
    for suffix, which in (("", "relaxed"), (HELD, "held")):
        values, others = (cubic_constants(getattr(by, which)) for by in (derivative, differences))
        for name, value, other in zip((name + suffix for name in CUBIC), values, others, strict=True):
            found["derivative"][name], found["differences"][name] = float(value), float(other)
            line = f"{name:<24}{value:>12.3f}{other:>13.3f}{abs(value - other) / scale:>10.0e}"
            if name in known:
                reference, spread = found["reference"][name] = known[name]
                plus_minus = f" ± {spread:.1f}" if spread else ""
                line += f"{f'{reference:.1f}{plus_minus}':>18}"
                if reference:
                    line += f"{100 * (value / reference - 1):>+7.1f} %"
            print(line)
    pairs = ((derivative.held, differences.held), (derivative.relaxed, differences.relaxed))
    worst = max(float(np.abs(a - b).max()) for a, b in pairs) / scale
    found |= {"largest difference": worst, "agree": worst <= ELASTIC_TOLERANCE}
    print(f"all 36, held and relaxed: largest difference {worst:.0e} of the largest")
    c11, c12, c44 = cubic_constants(derivative.relaxed)
    cubic = np.diag([c11 - c12] * 3 + [c44] * 3)
    cubic[:3, :3] += c12
    if np.abs(derivative.relaxed - cubic).max() > 1e-3 * np.abs(cubic).max():
        print("not a cubic crystal along x, y, z: these are means; properties.json has the matrices")
    if (softest := np.linalg.eigvalsh(derivative.relaxed)[0]) <= 0:
        print(f"not stable: the smallest eigenvalue of the matrix is {softest:.2f} GPa")


def report_eos(
    crystal: ase.Atoms, calculator: PotentialCalculator, options: argparse.Namespace, found: dict
) -> None:
    volumes, energies = energies_over_volumes(crystal, calculator)
    found |= {"volumes": volumes.tolist(), "energies": energies.tolist()}
    curve = fit_curve(volumes, energies)
    found |= plain(curve)
    c11, c12, _ = cubic_constants(elastic_constants(crystal, calculator.model).relaxed)
    bulk = float(c11 + 2 * c12) / 3
    print(f"\n{'equation of state':<24}{'curve':>12}{'crystal':>13}")
    print(f"{'volume (Å³/atom)':<24}{curve.volume:>12.4f}{crystal.get_volume() / len(crystal):>13.4f}")
    energy = crystal.get_potential_energy() / len(crystal)
    print(f"{'energy (eV/atom)':<24}{curve.energy:>12.5f}{energy:>13.5f}")
    print(f"{'bulk modulus (GPa)':<24}{curve.bulk:>12.3f}{bulk:>13.3f}   (C11 + 2 C12) / 3, by derivative")
    (axes,), save = panels(1, options.out / "eos.png")
    axes.plot(*curve.fit, color="black", linewidth=0.9, label="Birch-Murnaghan")
    axes.plot(curve.volumes, curve.energies, "o", color="tab:blue", label="potential")
    axes.set(xlabel="volume (Å³/atom)", ylabel="energy (eV/atom)", title=f"B = {curve.bulk:.1f} GPa")
    axes.legend(frameon=False)
    save()
    found["(C11 + 2 C12) / 3"] = bulk


def frequency(value: float, highest: float) -> str:
    """In THz; an imaginary one, which phonopy gives as a negative number, with an i."""
    return f"{-value:.3f} i" if value < -IMAGINARY * highest else f"{value:.3f}"


def report_phonons(
    crystal: ase.Atoms, calculator: PotentialCalculator, options: argparse.Namespace, found: dict
) -> None:
    bands = phonon_bands(crystal, calculator.model, calculator, options.supercell)
    print(f"\n{f'phonons (THz), {bands.atoms} atoms':<24}{'derivative':>12}{'differences':>13}")
    points = {}
    for (first, last), *curves in zip(bands.segments, bands.derivative, bands.differences, strict=True):
        points[first], points[last] = ([curve[end] for curve in curves] for end in (0, -1))
    for name, (value, other) in points.items():
        label = "Gamma" if name == "G" else name
        if name != "G":
            cells = [frequency(f, bands.highest) for f in (value[0], other[0])]
            print(f"{label + ', lowest':<24}{cells[0]:>12}{cells[1]:>13}")
        print(f"{label + ', highest':<24}{value[-1]:>12.3f}{other[-1]:>13.3f}")
    lowest, line = bands.lowest()
    print(
        f"along the path: largest difference {bands.largest:.1e} THz, of the squares {bands.apart:.0e} of the"
        f" largest; lowest frequency {frequency(lowest, bands.highest)} THz"
    )
    found |= plain(bands) | {"agree": bands.apart <= PHONON_TOLERANCE}
    found["imaginary"] = lowest < -IMAGINARY * bands.highest
    if found["imaginary"]:
        print(f"imaginary modes, the lowest on {line}: the crystal is not stable with this potential")
    plot_bands(bands, options.out / "phonons.png")


def plot_bands(bands: Bands, path: Path) -> None:
    (axes,), save = panels(1, path)
    styles = ("-", "tab:blue", "derivative"), (":", "tab:orange", "phonopy's finite displacements")
    for curves, (line, color, label) in zip((bands.derivative, bands.differences), styles, strict=True):
        drawn = [axes.plot(x, y, line, color=color) for x, y in zip(bands.distances, curves, strict=True)]
        drawn[0][0].set_label(label)
    # Where one line ends and the next begins there are two labels, if the path jumps from one to the other.
    firsts, lasts = ([name.replace("G", "Γ") for name in side] for side in zip(*bands.segments, strict=True))
    between = [a if a == b else f"{a}|{b}" for a, b in zip(lasts[:-1], firsts[1:], strict=True)]
    ends = [0.0, *(x[-1] for x in bands.distances)]
    axes.set_xticks(ends, [firsts[0], *between, lasts[-1]])
    axes.grid(axis="x", color="black", linewidth=0.5)
    axes.set(ylabel="frequency (THz)", xlim=(ends[0], ends[-1]))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    save()


def report_dynamics(kind: str, crystal: ase.Atoms, options: argparse.Namespace, found: dict) -> None:
    calculator = PotentialCalculator(options.potential, options.device, getattr(torch, options.dtype))
    atoms = box(crystal, options.md_atoms)
    choices = {name: getattr(options, name) for name in ("temperature", "ps", "step", "seed")}
    begun = time.perf_counter()
    run = {"nve": dynamics.nve, "npt": dynamics.npt}[kind](atoms, calculator, **choices)
    milliseconds = (time.perf_counter() - begun) * options.step / options.ps
    shown = {"temperature": "K"} | ({"volume": "Å³/atom", "pressure": "GPa"} if kind == "npt" else {})
    means = {name: run.mean(name) for name in shown}
    name = "total energy" if kind == "nve" else "conserved energy"
    print(
        f"\n{kind.upper()}: {len(atoms)} atoms, {options.ps:g} ps in steps of {options.step:g} fs, "
        f"{options.temperature:g} K, {options.dtype}, {milliseconds:.1f} ms a step\n"
        f"{name} (meV/atom): drift {run.drift:+.4f}, largest excursion {run.excursion:.4f}\n"
        "means of the second half: " + ", ".join(f"{key} {means[key]:.4g} {shown[key]}" for key in shown)
    )
    (first, *others), save = panels(1 + len(shown), options.out / f"{kind}.png")
    first.plot(run.time, 1000 * (np.array(run.conserved) - run.conserved[0]), linewidth=0.7)
    first.set(xlabel="time (ps)", ylabel="meV/atom", title=f"{name}, from its start")
    for axes, (key, unit) in zip(others, shown.items(), strict=True):
        axes.plot(run.time, getattr(run, key), linewidth=0.7)
        axes.set(xlabel="time (ps)", ylabel=unit, title=key)
    save()
    found |= {"atoms": len(atoms), "dtype": options.dtype, "drift": run.drift, "excursion": run.excursion}
    found |= choices | {"means": means, "milliseconds a step": milliseconds} | plain(run)


def panels(count: int, path: Path) -> tuple[list, Callable[[], None]]:
    """A row of `count` axes, and the function that writes their figure to `path`."""
    figure, axes = row_of_axes(count, 6 if count == 1 else 4 * count, 4)
    return axes, lambda: figure.savefig(path, dpi=140)


def plain(found) -> dict:
    """The fields of a dataclass with lists in place of arrays, as JSON has them."""

    def listed(value):
        if isinstance(value, (list, tuple)):
            return [listed(entry) for entry in value]
        return value.tolist() if isinstance(value, np.ndarray) else value

    return {key: listed(value) for key, value in vars(found).items()}


REPORTS = {
    "relax": report_relax, "elastic": report_elastic, "eos": report_eos, "phonons": report_phonons,
    "nve": lambda crystal, _, *rest: report_dynamics("nve", crystal, *rest),
    "npt": lambda crystal, _, *rest: report_dynamics("npt", crystal, *rest),
}  # fmt: skip


def begin(crystal: ase.Atoms, options: argparse.Namespace) -> dict:
    """The crystal and its potential, with what an earlier run found of the same two."""
    found = {"formula": str(crystal.symbols), "cell": crystal.cell.tolist()}
    found["positions"] = crystal.positions.tolist()
    found["potential"] = hashlib.sha256(options.potential.read_bytes()).hexdigest()
    try:
        earlier = json.loads((options.out / "properties.json").read_text())
    except (OSError, ValueError):
        return found
    same = all(earlier.get(key) == value for key, value in found.items())
    return earlier if same else found


def run_part(
    name: str, crystal: ase.Atoms, calculator, options: argparse.Namespace, found: dict
) -> str | None:
    """A part, which fills `found[name]`. Whatever it raises is returned as text, so that the others go on."""
    found[name] = {}
    try:
        REPORTS[name](crystal, calculator, options, found[name])
    except Exception as error:
        found[name]["error"] = (
            f"{error}" if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        )
        return found[name]["error"]
    if not found[name].get("agree", True):
        return "derivatives and finite differences do not agree"
    return None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        calculator = PotentialCalculator(options.potential, options.device, torch.float64)
        crystal = structure(options.structure, calculator.model.config.species)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        crystal = relax(crystal, calculator)
    except Exception as error:
        print(f"error: relaxation of the crystal, where all parts start: {error}", file=sys.stderr)
        return 1
    print(f"{crystal.symbols}, {crystal.cell.get_bravais_lattice()}")
    found, target = begin(crystal, options), options.out / "properties.json"
    names = [name for name in PARTS if name in options.only]
    wrong = {}
    for k, name in enumerate(names):
        print(f"\npart {k + 1} of {len(names)}: {PARTS[name]}", flush=True)
        try:
            problem = run_part(name, crystal, calculator, options, found)
        except KeyboardInterrupt:
            rest = ",".join(names[k:])
            print(f"\ninterrupted in {PARTS[name]}; the parts before are in {target}", file=sys.stderr)
            print(f"the rest: the same command with --only {rest}", file=sys.stderr)
            return INTERRUPTED
        if problem:
            wrong[name] = problem
            print(f"error: {PARTS[name]}: {problem}", file=sys.stderr)
        write_atomically(json.dumps(found, indent=1) + "\n", target)
    print(f"\nwrote properties.json and plots to {options.out}")
    if wrong:
        titles = ", ".join(PARTS[name] for name in wrong)
        print(
            f"error: {len(wrong)} of {len(names)} parts are not as they should be: {titles}", file=sys.stderr
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a file shows each line when it is printed
    sys.exit(main())
