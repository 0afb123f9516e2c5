"""How often the host waits for a GPU, as torch's profiler sees it."""

import re

import pytest
import torch

WAITS = re.compile(r"(cuda|hip)(StreamSynchronize|EventSynchronize|DeviceSynchronize|Memcpy|MemcpyDtoH)")

LAUNCHES = re.compile(r"(cuda|hip)\w*Launch\w*Kernel\w*")


def events(function, count):
    """Names of the runtime's calls, and of copies, while `function` runs `count` times."""
    function()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(count):
            function()
    return [event.name for event in profile.events()]


def waits_of(function):
    """How often the host waits in one call; the profiler's own waits cancel."""
    counts = []
    for count in (2, 12):
        names = events(function, count)
        if not any(LAUNCHES.fullmatch(name) for name in names):
            pytest.skip("the profiler sees no calls of the GPU's runtime here")
        counts.append(
            sum(WAITS.fullmatch(name) is not None for name in names)
            # A copy to memory that is not page-locked makes the host wait, whatever its name.
            + sum("Memcpy DtoH" in name and "Pageable" in name for name in names)
        )
    return (counts[1] - counts[0]) / 10
