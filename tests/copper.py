"""A small copper potential and crystals relaxed with it: fixtures of the tests of properties and dynamics.

It is trained on the spot for two or three seconds: enough for stable crystals. What is compared holds for any
smooth energy. hcp has an internal degree of freedom, fcc has none.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("phonopy")
pytest.importorskip("ase")
import ase.build  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mlip.calculator import PotentialCalculator, build_potential, save_potential  # noqa: E402
from mlip.data import make_copper  # noqa: E402
from mlip.model import ModelConfig  # noqa: E402
from mlip.properties import relax  # noqa: E402
from mlip.training import Settings, Trainer, fit_config  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """potential.pt of a copper potential."""
    frames = [frame for frame in make_copper(32, seed=5) if len(frame.numbers) <= 16]
    config, scales = fit_config(frames, ModelConfig(species=(), cutoff=4.0, channels=4))
    torch.manual_seed(0)
    model = build_potential(config, CPU, torch.float32)
    settings = Settings(
        epochs=24, seed=0, batch_size=4, learning_rate=0.02, energy_weight=1, force_weight=1, stress_weight=1
    )
    trainer = Trainer(model, scales, settings, frames, CPU, torch.float32)
    for _ in range(settings.epochs):
        trainer.train_epoch(lambda: None)
    path = tmp_path_factory.mktemp("copper") / "potential.pt"
    save_potential(trainer.averaged, path)
    return path


@pytest.fixture(scope="session")
def calculator(path):
    return PotentialCalculator(path, CPU, torch.float64)


@pytest.fixture(scope="session")
def fcc(calculator):
    return relax(ase.build.bulk("Cu"), calculator)


@pytest.fixture(scope="session")
def hcp(calculator):
    return relax(ase.build.bulk("Cu", "hcp", a=2.55, c=4.17), calculator)
