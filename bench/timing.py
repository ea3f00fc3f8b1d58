"""Samples of a call's time, in milliseconds, on the GPU's own clock and with a cold L2."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CALLS_IN_GRAPH = 20  # at least: the gap between two replays is shared by so many calls
SPIN_CYCLES = 5_000_000  # about 3 ms in which the host queues launches, so that the GPU never waits for Python
FLUSH_BYTES = 256 << 20
BUDGET_MS = 12.0  # GPU time of one provider in one round
MOST_SAMPLES = 20
ALONE_OVER_L2 = 20


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, p20, p80) of at least one sample."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), tenths[1], tenths[7]


def samples_a_round(milliseconds: float) -> int:
    """How many samples fit the budget of a round: 1 for very slow calls, 2 at least for others."""
    if milliseconds > 4 * BUDGET_MS:
        return 1
    return max(2, min(MOST_SAMPLES, int(BUDGET_MS / max(milliseconds, 1e-3))))


@dataclass(eq=False)
class Walk:
    """A captured CUDA graph, how many calls it makes, and the tensors that its last round of calls returned."""

    graph: torch.cuda.CUDAGraph
    calls: int
    results: list[torch.Tensor]


class CudaClock:
    """Times calls on one CUDA device."""

    def __init__(self, device: torch.device, l2_bytes: int = 0):
        self.device = device
        self.l2_bytes = l2_bytes or 64 << 20
        self._flush = torch.empty(max(FLUSH_BYTES, 4 * self.l2_bytes), dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def once(self, call: Callable) -> tuple[object, float]:
        """(result, milliseconds on the host's clock until the GPU is done): compilation counts."""
        self.synchronize()
        start = time.perf_counter()
        result = call()
        self.synchronize()
        return result, 1e3 * (time.perf_counter() - start)

    def peak_memory_mb(self, call: Callable) -> float:
        """Megabytes that a call allocates beyond what is there, its output included."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def events(self, call: Callable, count: int) -> list[float]:
        """`count` times of one call each, the L2 flushed before each."""
        pairs = [_event_pair() for _ in range(count)]
        call()
        self._run_ahead()
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def eager(self, calls: Sequence[Callable], count: int) -> list[float]:
        """`count` times of one call as a user launches it, one after the other; each a mean over walks of the calls."""
        repeats = -(-CALLS_IN_GRAPH // len(calls))
        pairs = [_event_pair() for _ in range(count)]
        calls[0]()
        for start, end in pairs:
            start.record()
            for _ in range(repeats):
                for call in calls:
                    call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) / (repeats * len(calls)) for start, end in pairs]

    def alone(self, calls: Sequence[Callable], count: int) -> list[float]:
        """`count` times of one call on an idle GPU, by the host's clock: from its start until the GPU is done."""
        stream, times = torch.cuda.current_stream(self.device), []
        for i in range(count + len(calls)):  # the first of each is not counted
            call = calls[i % len(calls)]
            stream.synchronize()
            start = time.perf_counter()
            call()
            stream.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return times[len(calls) :]

    def capture(self, calls: Sequence[Callable]) -> Walk:
        """A CUDA graph that walks over the calls, CALLS_IN_GRAPH times or more in all."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # one walk outside, for what is built on first use
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.synchronize()
        graph, repeats, results = torch.cuda.CUDAGraph(), -(-CALLS_IN_GRAPH // len(calls)), []
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                results = [call() for call in calls]
        return Walk(graph, repeats * len(calls), results)

    def replays(self, walk: Walk, count: int) -> list[float]:
        """`count` times of one call inside the graph: kernel time, without the host."""
        pairs = [_event_pair() for _ in range(count)]
        walk.graph.replay()
        self._run_ahead()
        for start, end in pairs:
            start.record()
            walk.graph.replay()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) / walk.calls for start, end in pairs]

    def copies_to_outrun_l2(self, size: int) -> int:
        """How many copies of `size` bytes, at least 2, are over five times the L2; fewer where memory is short, and one
        where a single one leaves nothing of itself in the L2 that is worth speaking of.
        """
        if size >= ALONE_OVER_L2 * self.l2_bytes:
            return 1
        free, _ = torch.cuda.mem_get_info(self.device)
        wanted = max(2, -(-5 * self.l2_bytes // max(size, 1)))
        return max(1, min(wanted, int(0.4 * free) // max(size, 1)))

    def _run_ahead(self) -> None:
        with contextlib.suppress(AttributeError):  # private in PyTorch, though its own benchmarks use it
            torch.cuda._sleep(SPIN_CYCLES)


class HostClock:
    """The same on a CPU, by the wall clock: for tests of everything around the clock. Its times are nobody's result."""

    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def once(self, call: Callable) -> tuple[object, float]:
        start = time.perf_counter()
        result = call()
        return result, 1e3 * (time.perf_counter() - start)

    def peak_memory_mb(self, call: Callable) -> float:
        call()
        return 0.0

    def events(self, call: Callable, count: int) -> list[float]:
        return [self.once(call)[1] for _ in range(count)]

    def eager(self, calls: Sequence[Callable], count: int) -> list[float]:
        return [self.once(calls[0])[1] for _ in range(count)]

    def alone(self, calls: Sequence[Callable], count: int) -> list[float]:
        return self.eager(calls, count)

    def capture(self, calls: Sequence[Callable]) -> Walk:
        raise RuntimeError("a CPU has no CUDA graphs")

    def copies_to_outrun_l2(self, size: int) -> int:
        return 2


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
