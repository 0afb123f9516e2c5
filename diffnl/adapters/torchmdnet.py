"""TorchMD-Net's `OptimizedDistance`: model = replace_distances(load_model("model.ckpt", derivative=True))."""

import inspect

import torch
from torch import Tensor, nn

import diffnl

from .._torch_compat import assert_async
from . import _common

TOO_MANY = "Found num_pairs > max_num_pairs, please increase max_num_pairs"  # theirs, word for word

_FLAGS = "return_vecs", "loop", "include_transpose", "resize_to_fit", "long_edge_index", "use_periodic"


class OptimizedDistance(nn.Module):
    """The pairs of a batch with cutoff_lower <= d < cutoff_upper, with TorchMD-Net's signs and shapes.

    edge_vec = pos[edge_index[0]] - pos[edge_index[1]]: row 0 is diffnl's neighbour, row 1 its centre. Every
    order of derivative exists, in the positions and in the box; theirs has none in the box. All images are
    listed for any box; theirs wants a lower triangular, reduced one of at least two cutoffs, and takes the
    nearest image without a check. Cannot be scripted.

    Args:
        cutoff_lower, cutoff_upper: >= 0 and above it, in the length unit of the positions.
        max_num_pairs: an integer, how many edges there may be; negative: as many times the number of atoms.
        loop: list each atom with itself, at distance 0 and whatever `cutoff_lower`; these come first.
        strategy: "brute" or "cell", which makes no difference; anything else is a ValueError.
        include_transpose: list (i, j) and (j, i). Otherwise one of the two, with i > j unless both are images
            of one atom.
        resize_to_fit: return as many edges as there are. Otherwise `max_num_pairs`, padded at the end with
            index -1 and zeros, without waiting for the device; edges below `cutoff_lower` then take room too.
        box: (3, 3), or (B, 3, 3) for a box a sample; rows are lattice vectors. None: open, unless `forward`
            gets one. A buffer, as theirs: state dicts load.
        long_edge_index: int64; otherwise int32, where TorchMD-Net 3.1.0 has int64 all the same.
    """

    def __init__(
        self,
        cutoff_lower=0.0,
        cutoff_upper=5.0,
        max_num_pairs=-32,
        return_vecs=False,
        loop=False,
        strategy="brute",
        include_transpose=True,
        resize_to_fit=True,
        box=None,
        long_edge_index=True,
    ):
        super().__init__()
        self.cutoff_lower, self.cutoff_upper, self.max_num_pairs = cutoff_lower, cutoff_upper, max_num_pairs
        self.return_vecs, self.loop, self.include_transpose = return_vecs, loop, include_transpose
        self.strategy, self.resize_to_fit, self.long_edge_index = strategy, resize_to_fit, long_edge_index
        self.use_periodic = box is not None
        self._checked()
        # Of no effect where it is zero, and then where modules are made, as all buffers are.
        self.register_buffer("box", torch.zeros(3, 3) if box is None else box)

    def _checked(self) -> tuple:
        """The options as they are now: models and their users assign some later."""
        if self.strategy not in ("brute", "cell"):
            raise ValueError(f"`strategy` must be 'brute' or 'cell'; got {self.strategy!r}")
        lower = _common.length_or_zero("cutoff_lower", self.cutoff_lower)
        upper = _common.length("cutoff_upper", self.cutoff_upper)
        if lower >= upper:
            raise ValueError(f"`cutoff_lower` must be below `cutoff_upper`, {upper}; got {lower}")
        most = _common.count("max_num_pairs", self.max_num_pairs, least=None)
        return lower, upper, most, *(_common.flag(name, getattr(self, name)) for name in _FLAGS)

    def forward(self, pos: Tensor, batch: Tensor | None = None, box: Tensor | None = None):
        """edge_index (2, E), edge_weight (E,) the distances, and edge_vec (E, 3) or None, for pos (N, 3).

        Raises:
            RuntimeError: more edges than `max_num_pairs`; on a GPU without `resize_to_fit` asynchronously.
            ValueError, TypeError: as `diffnl.neighbor_pairs`.
        """
        lower, upper, most, return_vecs, loop, both, fit, long, use_periodic = self._checked()
        num_atoms = pos.shape[0]
        most = most if most >= 0 else -most * num_atoms
        loops = num_atoms if loop else 0
        if loops > most:
            raise RuntimeError(TOO_MANY)
        capacity = None if fit else most - loops
        periodic = use_periodic or box is not None
        cell, batch = _cells(self.box if box is None else box, pos, batch, periodic, capacity)
        options = {"full": both, "capacity": capacity}
        pairs = diffnl.neighbor_pairs(pos, cell, periodic, upper, batch, **options)
        # A copy: models write into the vectors, and the gradient of the distances needs them as they are.
        index, weight, vec = pairs.mapping.flip(0), pairs.distances, pairs.vectors.clone()
        near = vec.detach().square().sum(1) < lower**2
        if capacity is not None:
            if _common.may_look(pos) and pairs.num_pairs < 0:
                pairs.check()  # raises; on a GPU, which is not waited for, vectors are NaN
            assert_async(pairs.num_pairs <= capacity, TOO_MANY)
            gone = near | ~pairs.mask
            index, weight = index.masked_fill(gone, -1), weight.masked_fill(gone, 0.0)
            vec = vec.masked_fill(gone.unsqueeze(1), 0.0)
        if lower > 0:  # padding goes to the end
            kept = torch.nonzero(~near)[:, 0] if capacity is None else torch.argsort(gone, stable=True)
            index, weight, vec = index[:, kept], weight[kept], vec[kept]
        if loops + len(weight) > most:
            raise RuntimeError(TOO_MANY)
        if loop:
            itself = torch.arange(num_atoms, device=pos.device).expand(2, -1)
            index = torch.cat((itself, index), 1)
            weight = torch.cat((weight.new_zeros(num_atoms), weight))
            vec = torch.cat((vec.new_zeros(num_atoms, 3), vec))
        return index if long else index.int(), weight, vec if return_vecs else None


def replace_distances(model: nn.Module) -> nn.Module:
    """Puts this module in the place of every `OptimizedDistance` inside a model; returns the model."""
    arguments = list(inspect.signature(OptimizedDistance).parameters)
    for parent in list(model.modules()):
        for child, theirs in list(parent.named_children()):
            if type(theirs).__name__ == "OptimizedDistance" and not isinstance(theirs, OptimizedDistance):
                ours = OptimizedDistance(**{name: getattr(theirs, name) for name in arguments})
                ours.use_periodic = theirs.use_periodic
                setattr(parent, child, ours)
    return model


def _cells(box: Tensor, pos: Tensor, batch: Tensor | None, periodic: bool, capacity):
    """A cell for each sample, None for open boundaries, and the sample of each atom."""
    if not periodic and (capacity is None or batch is None):
        return None, batch
    cell = box.to(pos.dtype) if periodic else pos.new_zeros(3, 3)
    if batch is None or (cell.ndim == 3 and len(cell) > 1):
        return cell, batch
    if capacity is None:
        batch, num_samples = _common.systems(batch, pos)
    else:
        num_samples = len(batch)  # as many as there can be: to look would mean to wait for the device
    return cell.reshape(3, 3).expand(num_samples, 3, 3), batch
