"""How far a long loop is: a bar on a terminal, and a line every half minute where there is none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS = 30.0  # between two lines


def duration(seconds: float) -> str:
    """ "45 s", "12 min 30 s", "3 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Counter:
    """Counts the steps of `what` and says how many remain, at the pace since it was made.

    `total` steps, of which `done` were done before; None where their number is not known.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        done: int = 0,
        unit: str = "step",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.done, self.unit = what, total, done, unit
        self.first, self.clock, self.begun = done, clock, clock()

    def update(self, count: int = 1) -> None:
        self.done += count

    def line(self) -> str:
        passed = self.clock() - self.begun
        if self.total is None:
            return f"{self.what}: {duration(passed)} so far"
        text = f"{self.what}: {self.unit} {self.done} of {self.total}, {duration(passed)} so far"
        if self.done == self.first:
            return text
        left = passed / (self.done - self.first) * (self.total - self.done)
        return f"{text}, about {duration(left)} to go"


def speak(counter: Counter, wait: Callable[[float], bool]) -> None:
    """Prints the counter's line every `SECONDS`, until `wait` of so many says that it is over."""
    while not wait(SECONDS):
        print(counter.line(), flush=True)


@contextmanager
def watch(
    what: str, total: int | None = None, done: int = 0, *, unit: str = "step", shown: bool = True
) -> Iterator[Callable[[], object]]:
    """Shows how far a loop is, which calls what is given to it after each step.

    On a terminal (stderr) a bar that goes when the loop ends, if the total is known. Elsewhere a thread
    prints a line to stdout every `SECONDS`, however long a step takes. Nothing where not `shown`.
    """
    terminal = sys.stderr.isatty()
    if not shown or (terminal and total is None):
        yield lambda: None
    elif terminal:
        with tqdm(desc=what, total=total, initial=done, unit=unit, mininterval=0.5, leave=False) as bar:
            yield bar.update
    else:
        counter, over = Counter(what, total, done, unit), threading.Event()
        thread = threading.Thread(target=speak, args=(counter, over.wait), daemon=True)
        thread.start()
        try:
            yield counter.update
        finally:
            over.set()
            thread.join()


def track(items: Iterable, what: str, unit: str = "step") -> Iterator:
    """The items one by one, under `watch`."""
    items = list(items)
    with watch(what, len(items), unit=unit) as update:
        for item in items:
            yield item
            update()
