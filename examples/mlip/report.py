"""Tables for the terminal, lines for programs, the parity plot and the learning curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from ase.units import GPa

# Name of the quantity, the key of its labels, its unit, and how many eV-Å units make one.
ROWS = (("energy", "energy", "eV/atom", 1.0), ("forces", "forces", "eV/Å", 1.0))
ROWS += (("stress", "stress", "eV/Å³", 1.0), ("stress", "stress", "GPa", GPa))

HEADER = (
    f"{'':>6} {'':>9}  {'train MAE':^37}  {'validation MAE':^37}  {'':>7}\n"
    f"{'':>6} {'':>9}  " + 2 * f"{'energy':>9}{'forces':>8}{'stress':>11}{'stress':>8}   " + "\n"
    f"{'epoch':>6} {'loss':>9}  "
    + 2 * f"{'eV/atom':>9}{'eV/Å':>8}{'eV/Å³':>11}{'GPa':>8}   "
    + f"{'rate':>7}"
)


def mean_absolute(values: dict[str, np.ndarray]) -> float:
    """Mean absolute error; NaN where there is nothing to compare (no periodic frame, so no stress)."""
    difference = values["prediction"] - values["label"]
    return float(np.abs(difference).mean()) if difference.size else float("nan")


def epoch_row(epoch: int, train: dict[str, float], validation: dict[str, float], rate: float) -> str:
    """One line under HEADER; `train` and `validation` hold mean absolute errors in eV/atom, eV/Å, eV/Å³."""
    row = f"{epoch:>6} {train['loss']:>9.4f}  "
    for mae in (train, validation):
        row += (
            f"{mae['energy']:>9.4f}{mae['forces']:>8.4f}{mae['stress']:>11.6f}{mae['stress'] / GPa:>8.3f}   "
        )
    return row + f"{rate:>7.1e}"


def json_lines(history: list[dict]) -> str:
    """A JSON object a validation: epoch, learning rate, mean absolute errors; null where there is none."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return "".join(json.dumps(plain(row)) + "\n" for row in history)


def final_table(test: dict[str, dict[str, np.ndarray]], train_means: dict[str, np.ndarray]) -> str:
    """Test MAE and RMSE next to the MAE of predicting the means of the training labels, `train_means`."""
    lines = [f"{'test':<8}{'unit':<9}{'MAE':>10}{'RMSE':>10}{'predicting the mean':>22}"]
    for name, key, unit, factor in ROWS:
        label, difference = test[key]["label"], test[key]["prediction"] - test[key]["label"]
        if not label.size:
            lines.append(f"{name:<8}{unit:<9}{'no labels':>10}")
            continue
        baseline = np.abs(label.reshape(-1, len(train_means[key])) - train_means[key]).mean()
        figures = np.array([np.abs(difference).mean(), np.sqrt(np.mean(difference**2)), baseline]) / factor
        lines.append(f"{name:<8}{unit:<9}{figures[0]:>10.5f}{figures[1]:>10.5f}{figures[2]:>22.5f}")
    return "\n".join(lines)


def relaxation_table(states: list[dict[str, float]]) -> str:
    """The two states that `relax_strained` returns, side by side."""
    lines = [f"{'':<24}{'strained':>12}{'relaxed':>12}"]
    names = {
        "energy": "energy (eV/atom)", "volume": "volume (Å³/atom)", "pressure": "pressure (GPa)",
        "stress": "largest stress (GPa)", "force": "largest force (eV/Å)",
    }  # fmt: skip
    lines += [
        f"{title:<24}" + "".join(f"{state[key]:>12.4f}" for state in states) for key, title in names.items()
    ]
    return "\n".join(lines)


def row_of_axes(count: int, width: float, height: float):
    """A figure of that size in inches, and its `count` axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing is registered globally and no display is asked for
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def three_panels(height: float):
    """A figure, and its axes with the rows of energy, forces and stress in GPa."""
    figure, axes = row_of_axes(3, 13, height)
    return figure, zip(axes, (ROWS[0], ROWS[1], ROWS[3]), strict=True)


def parity_plot(train: dict, test: dict, path: Path) -> None:
    """Prediction over label for energies, forces and stresses (GPa), training and test frames, as a PNG."""
    figure, panels = three_panels(4.4)
    for axes, (name, key, unit, factor) in panels:
        for values, label, color, size in ((train, "train", "tab:blue", 5), (test, "test", "tab:orange", 9)):
            x, y = values[key]["label"] / factor, values[key]["prediction"] / factor
            caption = (
                f"{label}, MAE {mean_absolute(values[key]) / factor:.4f}" if x.size else f"{label}, no labels"
            )
            axes.scatter(x, y, s=size, color=color, alpha=0.6, linewidths=0, label=caption, rasterized=True)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=0)
        axes.set(title=f"{name} ({unit})", xlabel="label", ylabel="prediction")
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)


def learning_curve(history: list[dict], path: Path) -> None:
    """Mean absolute errors over epochs, of the steps of training and of validation, as a PNG."""
    figure, panels = three_panels(3.8)
    epochs = [row["epoch"] for row in history]
    for axes, (name, key, unit, factor) in panels:
        for which, color in (("train", "tab:blue"), ("validation", "tab:orange")):
            errors = np.array([row[which].get(key, math.nan) for row in history]) / factor
            axes.plot(epochs, errors, color=color, marker=".", label=which)
        axes.set(title=f"MAE of {name} ({unit})", xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)
