"""TorchSim 0.6 on Python 3.11: before any test module imports it."""

import type_parameters

type_parameters.install("torch_sim")
