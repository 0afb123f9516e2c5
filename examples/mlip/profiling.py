"""The neighbour list's share of a training step.

Two shares, because a step of a small model on a GPU is two things at once. *Device*: the time the GPU is busy
for diffnl's operators (their kernels, and the copies and fills they ask for), of the time it is busy at all.
*Host*: the time the CPU spends in these operators, of the step. There it counts that the search waits for
the number of pairs. While a small step launches kernels more slowly than they run, the host's share is the
one that costs time; in a large one it is the device's.

torch's profiler tells both without a line in diffnl or in the model. It slows the step down, so the step is
timed without it too. A list computed beforehand instead of the layer would be no measure: its vectors would
have to be differentiated all the same.
"""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from .training import Trainer, chunks

PREFIX = "diffnl::"
WARM_UP = 5  # steps before the clock starts, and again before the profiler's


def layer_share(trainer: Trainer, steps: int) -> dict:
    """Times `steps` training steps, which train on; all times are in ms a step.

    "step_ms" is the clock's without the profiler, "profiled_ms" with it. "operators" maps the name of each
    operator of diffnl to its "calls" in a step, "host_ms" and, on a GPU, "device_ms". "host_share" and
    "device_share" are their sums over "profiled_ms" and over "busy_ms", the GPU's time in kernels and copies.
    "kernels_ms" is the time of the kernels with diffnl in their name, a check on what was counted.
    """
    on_gpu = trainer.device.type == "cuda"
    groups = list(chunks(trainer.frames, trainer.settings.batch_size))

    def run(count: int) -> float:
        """Seconds of `count` steps, the same ones at every call."""
        start = time.perf_counter()
        for k in range(count):
            trainer.train_step(groups[k % len(groups)])
        if on_gpu:
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter() - start

    run(WARM_UP)
    plain = run(steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True):  # torch 2.11 warns of what it would drop
        run(WARM_UP)  # the profiler's own first steps are slow
    with profile(activities=activities, acc_events=True) as profiler:
        profiled = run(steps)
    found = {
        "steps": steps,
        "batch_size": trainer.settings.batch_size,
        "atoms": sum(len(frame.numbers) for group in groups for frame in group) / len(groups),
        "step_ms": 1e3 * plain / steps,
        "profiled_ms": 1e3 * profiled / steps,
    }
    return found | _operators(profiler.key_averages(), steps, found["profiled_ms"], on_gpu)


def _operators(events, steps: int, profiled_ms: float, on_gpu: bool) -> dict:
    """The part of `layer_share` that is read off the profiler's events, whose times are in microseconds."""
    per_step = 1e-3 / steps
    operators, on_device = {}, []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            if not event.is_user_annotation:  # a span around others, not work of its own
                on_device.append(event)
        elif event.key.startswith(PREFIX):
            operators[event.key] = {"calls": event.count / steps, "host_ms": event.cpu_time_total * per_step}
            if on_gpu:
                operators[event.key]["device_ms"] = event.device_time_total * per_step
    found = {
        "operators": operators,
        "host_share": sum(times["host_ms"] for times in operators.values()) / profiled_ms,
    }
    if on_gpu:
        busy = sum(event.self_device_time_total for event in on_device) * per_step
        own = sum(event.self_device_time_total for event in on_device if "diffnl" in event.key) * per_step
        total = sum(times["device_ms"] for times in operators.values())
        found |= {"busy_ms": busy, "kernels_ms": own, "device_share": total / busy if busy else None}
    return found


def share_table(share: dict) -> str:
    """`layer_share` as text."""
    on_gpu = "busy_ms" in share
    lines = [
        f"the neighbour list in {share['steps']} training steps of {share['batch_size']} structures, "
        f"{share['atoms']:.0f} atoms: {share['step_ms']:.2f} ms a step ({share['profiled_ms']:.2f} profiled)",
        f"{'':<32}{'calls':>8}{'host ms':>10}" + (f"{'device ms':>12}" if on_gpu else ""),
    ]
    for name, times in share["operators"].items():
        line = f"{name.removeprefix(PREFIX):<32}{times['calls']:>8.1f}{times['host_ms']:>10.3f}"
        lines.append(line + (f"{times['device_ms']:>12.4f}" if on_gpu else ""))
    lines.append(f"its share of the step's time on the host: {share['host_share']:.1%}")
    if on_gpu and share["device_share"] is not None:
        lines.append(
            f"its share of the {share['busy_ms']:.2f} ms that the GPU is busy: {share['device_share']:.1%} "
            f"(kernels by name: {share['kernels_ms']:.4f} ms)"
        )
    return "\n".join(lines)
