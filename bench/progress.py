"""Progress for people: a bar on a terminal, a line a cell elsewhere (a log, a pipe, a machine without tqdm)."""

from __future__ import annotations

import sys
import time

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """Counts `cells` of `steps` steps in all, with an estimate of the time that is left."""

    def __init__(self, cells: int, steps: int):
        self.cells, self.done, self.started = cells, 0, time.perf_counter()
        shown = tqdm is not None and sys.stderr.isatty()
        self.bar = tqdm(total=steps, unit="kernel", leave=False, dynamic_ncols=True) if shown else None

    def begin(self, label: str) -> None:
        if self.bar is not None:
            self.bar.set_description(label)

    def end(self, label: str, steps: int, result: str) -> None:
        """A cell is done; `result` is shown where there is no bar."""
        self.done += 1
        if self.bar is not None:
            self.bar.update(steps)
            return
        left = (time.perf_counter() - self.started) / self.done * (self.cells - self.done)
        say(f"[{self.done}/{self.cells}, about {left:.0f} s left] {label}: {result}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def say(line: str) -> None:
    """Print a line at once, above the bar where there is one."""
    if tqdm is not None:
        tqdm.write(line, file=sys.stdout)
    else:
        print(line)
    sys.stdout.flush()
