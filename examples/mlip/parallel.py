"""Several processes that train one model: `torchrun --nproc-per-node N examples/train_mlip.py ...`.

Each takes its share of every batch, so that a batch is the same set of structures however many there are. A
mean over a batch is not the mean of the means of its shares, which differ in atoms and in labels: shares are
weighted by their counts (`Group.factors`). Without torchrun there is one process, and nothing is exchanged.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .data import Frame


@dataclass(frozen=True)
class Group:
    """This process's number, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over the processes."""
        if self.size == 1:
            return model
        where = [self.device] if self.device.type == "cuda" else None
        # The buffers are constants, the same everywhere; torch 2.13 renamed the argument.
        names = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        return DistributedDataParallel(model, device_ids=where, **{sync: False})

    def share(self, frames: list[Frame]) -> tuple[list[Frame], bool]:
        """The frames of this process, and whether they count: a process without one takes the first along."""
        own = frames[self.rank :: self.size]
        return (own, True) if own else (frames[:1], False)

    def factors(self, own: dict[str, int], everywhere: dict[str, int]) -> dict[str, float]:
        """What makes means over own labels, averaged over the processes, the means over all labels."""
        return {key: self.size * count / max(everywhere[key], 1) for key, count in own.items()}

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, the same bits on all."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def stop(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Group(0, 1, torch.device("cpu"))


def start(device: str) -> Group:
    """The group that torchrun's environment describes. "cuda" is then the GPU of the process's own number."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Group(dist.get_rank(), size, torch.device(device))
