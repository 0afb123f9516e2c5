"""An E(3)-equivariant message-passing potential with the neighbour list inside its forward pass.

One layer is: pairs -> radial weights x spherical harmonics -> tensor product with the neighbour's features
-> sum over neighbours -> tensor square on the atom -> gate. Almost all the time of such a model goes into
arrays with a row per *pair*, so the expensive coupling of directions (the tensor square, which makes
four-body terms) is done after the sum, where there is one row per *atom*: about twenty times fewer. The
tensor product over pairs keeps its channels apart ("uvu") and the layers between mix them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import pi, sqrt

import torch
from e3nn import nn as e3nn_nn
from e3nn import o3

import diffnl

from .sums import PairSums


@dataclass(frozen=True)
class ModelConfig:
    """What a `Potential` is built from; saved beside its weights.

    `species` are atomic numbers in ascending order; `cutoff` is in Å; `channels` is the multiplicity of
    every irrep; `hidden_lmax` and `edge_lmax` are the highest degree of the atoms' features and of the
    spherical harmonics; `num_neighbors` is the mean count of neighbours in the training set;
    `reference_energies` (eV, one per species) and `scale` (eV) turn the raw output of the network into
    energies.
    """

    species: tuple[int, ...]
    cutoff: float = 5.0
    layers: int = 2
    channels: int = 16
    hidden_lmax: int = 1
    edge_lmax: int = 2
    num_radial: int = 8
    radial_width: int = 32
    num_neighbors: float = 20.0
    reference_energies: tuple[float, ...] = (0.0,)
    scale: float = 1.0

    def to_dict(self) -> dict:
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        return cls(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )


def radial_basis(distances: torch.Tensor, cutoff: float, count: int) -> torch.Tensor:
    """Bessel functions under a smooth envelope, (P,) Å -> (P, count), zero with two derivatives at r_c.

    sqrt(2) sin(n pi x) / x times 1 - 28 x^6 + 48 x^7 - 21 x^8, x = r / r_c (Gasteiger et al., ICLR 2020,
    eqs. 7 and 8 with p = 6, in units of the cutoff). sin(n pi x) / x is written with sinc, so that a pair
    of coincident atoms is finite.
    """
    x = distances / cutoff
    n = torch.arange(1, count + 1, dtype=x.dtype, device=x.device)
    bessel = sqrt(2.0) * pi * n * torch.sinc(x[:, None] * n)
    x6 = (x * x * x).square()
    envelope = 1.0 + x6 * (-28.0 + x * (48.0 - 21.0 * x))
    return bessel * envelope[:, None]


class RadialNetwork(torch.nn.Module):
    """(P, num_radial) -> (P, num_weights), without biases: where the basis is zero so is every weight.

    That, and nothing else, makes the energy smooth when an atom crosses the cutoff.
    """

    def __init__(self, num_radial: int, width: int, num_weights: int):
        super().__init__()
        self.network = e3nn_nn.FullyConnectedNet(
            [num_radial, width, width, num_weights], torch.nn.functional.silu
        )

    def forward(self, basis: torch.Tensor) -> torch.Tensor:
        return self.network(basis)


def paths(left: o3.Irreps, right: o3.Irreps, allowed: o3.Irreps, connection: str, *, weights: bool):
    """The couplings of `left` x `right` that land in `allowed`: their irreps and e3nn's instructions."""
    outputs, instructions = [], []
    for a, (multiplicity, irrep_a) in enumerate(left):
        for b, (_, irrep_b) in enumerate(right):
            for irrep in irrep_a * irrep_b:
                # The square of x is symmetric: (a, b) and (b, a) are the same function.
                if irrep in allowed and not (connection == "uuu" and b < a):
                    instructions.append((a, b, len(outputs), connection, weights))
                    outputs.append((multiplicity, irrep))
    order = sorted(range(len(outputs)), key=lambda index: outputs[index][1])
    place = {old: new for new, old in enumerate(order)}
    instructions = [(a, b, place[out], mode, train) for a, b, out, mode, train in instructions]
    return o3.Irreps([outputs[index] for index in order]), sorted(instructions, key=lambda path: path[2])


class Layer(torch.nn.Module):
    """One round of messages: features (N, irreps_in.dim) -> (N, irreps_out.dim)."""

    def __init__(self, irreps_in: o3.Irreps, hidden: o3.Irreps, config: ModelConfig):
        super().__init__()
        harmonics = o3.Irreps.spherical_harmonics(config.edge_lmax)
        # The messages carry every degree up to edge_lmax, if the atoms' features do not: the square below
        # uses them.
        degree = config.edge_lmax if irreps_in.lmax == 0 else config.hidden_lmax
        density = o3.Irreps([(config.channels, irrep) for _, irrep in o3.Irreps.spherical_harmonics(degree)])
        species = o3.Irreps([(len(config.species), (0, 1))])
        message_irreps, instructions = paths(irreps_in, harmonics, density, "uvu", weights=True)
        self.up = o3.Linear(irreps_in, irreps_in)
        self.message = o3.TensorProduct(
            irreps_in, harmonics, message_irreps, instructions, shared_weights=False, internal_weights=False
        )
        self.radial = RadialNetwork(config.num_radial, config.radial_width, self.message.weight_numel)
        self.mix = o3.Linear(message_irreps, density)
        scalars = o3.Irreps([(m, irrep) for m, irrep in hidden if irrep.l == 0])
        gated = o3.Irreps([(m, irrep) for m, irrep in hidden if irrep.l > 0])
        gates = o3.Irreps([(gated.num_irreps, (0, 1))]) if gated.num_irreps else o3.Irreps([])
        self.gate = e3nn_nn.Gate(
            scalars, [torch.nn.functional.silu] * len(scalars), gates, [torch.sigmoid] * len(gates), gated
        )
        before_gate = self.gate.irreps_in
        square_irreps, instructions = paths(density, density, before_gate, "uuu", weights=False)
        self.square = o3.TensorProduct(density, density, square_irreps, instructions)
        self.from_density = o3.Linear(density, before_gate)
        self.from_square = o3.Linear(square_irreps, before_gate)
        self.keep = o3.FullyConnectedTensorProduct(irreps_in, species, before_gate)
        self.normalization = config.num_neighbors**-0.5
        self.irreps_out = self.gate.irreps_out

    def forward(self, features, one_hot, sums, basis, harmonics):
        """`features` (N, irreps_in.dim) -> (N, irreps_out.dim).

        `one_hot` (N, species); `sums` of the P pairs; `basis` (P, num_radial); `harmonics` (P, their dim).
        """
        neighbors = sums.of_neighbors(self.up(features))
        messages = self.message(neighbors, harmonics, self.radial(basis))
        density = self.mix(sums.over_neighbors(messages) * self.normalization)
        # The square below would grow without bound in a crowded place; this keeps it of order one and smooth.
        density = density * torch.rsqrt(1.0 + density.square().mean(1, keepdim=True))
        mixed = self.from_density(density) + self.from_square(self.square(density, density))
        return self.gate(mixed + self.keep(features, one_hot))


class Potential(torch.nn.Module):
    """Positions, cells and atomic numbers in; one energy per system out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.neighbors = diffnl.NeighborList(config.cutoff)
        self.embed = o3.Linear(f"{len(config.species)}x0e", f"{config.channels}x0e")
        edge_irreps = o3.Irreps.spherical_harmonics(config.edge_lmax)
        self.harmonics = o3.SphericalHarmonics(edge_irreps, normalize=True, normalization="component")
        irreps = o3.Irreps([(config.channels, (0, 1))])
        self.layers, self.readouts = torch.nn.ModuleList(), torch.nn.ModuleList()
        for index in range(config.layers):
            last = index == config.layers - 1
            degrees = o3.Irreps.spherical_harmonics(0 if last else config.hidden_lmax)
            hidden = o3.Irreps([(config.channels, irrep) for _, irrep in degrees])
            layer = Layer(irreps, hidden, config)
            irreps = layer.irreps_out
            self.layers.append(layer)
            readout = o3.Linear(irreps, "1x0e")
            with torch.no_grad():
                readout.weight.mul_(
                    0.1
                )  # start near the reference energies, not at forces of many times the labels'
            self.readouts.append(readout)
        table = torch.full((120,), -1, dtype=torch.int64, device="cpu")
        table[list(config.species)] = torch.arange(len(config.species), device="cpu")
        self.register_buffer("species_of_number", table, persistent=False)
        reference = torch.tensor(config.reference_energies, dtype=torch.float64, device="cpu")
        self.register_buffer("reference_energies", reference, persistent=False)

    def pairs(self, positions, cell, pbc, system_idx, known):
        """The neighbour list: by the layer, or with vectors made from what is `known`, see `forward`."""
        if known is None:
            return self.neighbors(positions, cell, pbc, system_idx)
        mapping, shifts, num_pairs = known
        vectors = diffnl.pair_vectors(positions, cell, mapping, shifts, system_idx)
        return diffnl.PaddedPairs(mapping, shifts, vectors, num_pairs)

    def forward(self, numbers, positions, cell, pbc, system_idx, known=None):
        """Energies (B,) in eV, float64 whatever the model's dtype.

        `numbers` (N,) int64 atomic numbers; `positions` (N, 3) and `cell` (B, 3, 3) in Å; `pbc` (B, 3) bool;
        `system_idx` (N,) int64. Every atomic number must be one of `config.species`. The layer searches,
        unless the pairs are `known`: their `mapping` (2, P), in ascending i, `shifts` (P, 3) and, () int64,
        how many of the P are pairs; what is behind them is padding, as long as the cutoff.
        """
        species = self.species_of_number[numbers]
        pairs = self.pairs(positions, cell, pbc, system_idx, known)
        sums = PairSums(pairs, positions.shape[0])  # `len` would be a constant where it is traced
        one_hot = torch.nn.functional.one_hot(species, len(self.config.species)).to(positions.dtype)
        basis = radial_basis(pairs.distances, self.config.cutoff, self.config.num_radial)
        harmonics = self.harmonics(pairs.vectors)
        features = self.embed(one_hot)
        atomic = 0.0
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            features = layer(features, one_hot, sums, basis, harmonics)
            atomic = atomic + readout(features).squeeze(1)
        # A sum over thousands of float32 energies of -5 eV would lose the meV that forces and stresses are
        # made of.
        atomic = atomic.double() * self.config.scale + self.reference_energies[species]
        energies = atomic.new_zeros(len(cell)).index_add(0, system_idx, atomic)
        return energies * pairs.ok if isinstance(pairs, diffnl.PaddedPairs) else energies


def weights(model: Potential) -> dict[str, torch.Tensor]:
    """What training changes, by name. A `state_dict` would add e3nn's constants, in that model's dtype."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_weights(model: Potential, values: dict[str, torch.Tensor]) -> None:
    """Copy `weights` of a model of the same config into `model`. Raises ValueError if the names differ."""
    own = weights(model)
    if own.keys() != values.keys():
        raise ValueError(f"weights of another model: {sorted(own.keys() ^ values.keys())[:3]} differ")
    for name, value in own.items():
        value.copy_(values[name])
