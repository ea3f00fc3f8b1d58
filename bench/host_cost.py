"""What a call costs beside its kernel, in microseconds, for each version and for decoding's plans.

host: what the host needs for a call, arguments checked and kernels launched, the GPU kept busy so that nobody waits.
eager: from the call to the finished result on an idle GPU, without the time that the kernels take in a CUDA graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate

from bench.cases import Case
from bench.inputs import make_inputs
from common.hardware import detect_gpu
from common.lineage import FAMILIES, Version, versions_of
from decoding import plan_decoding

CALLS, ROUNDS, GRAPH_STEPS = 200, 5, 20
CASES = {"prefill": (1, 16, 16, 512, 512, 128), "decoding": (1, 32, 8, 1, 8192, 128)}


def costs(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Microseconds of the host, and of an eager call over its kernels' time, of a step that is ready to repeat."""
    for _ in range(3):  # compiles, and is remembered
        step()
    return host_microseconds(step, device), eager_microseconds(step, device) - graph_microseconds(step, device)


def host_microseconds(step: Callable[[], object], device: torch.device) -> float:
    """The median over ROUNDS of the mean over CALLS calls, while the GPU is busy with something else."""
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        rounds.append(1e6 * (time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize(device)
    return statistics.median(rounds)


def eager_microseconds(step: Callable[[], object], device: torch.device) -> float:
    """The median time from the start of a call to its end on the GPU, as the host sees it."""
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def graph_microseconds(step: Callable[[], object], device: torch.device) -> float:
    """The kernels' own time: the mean over GRAPH_STEPS of them in one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_STEPS):
            step()
    begin, end, times = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), []
    for _ in range(ROUNDS):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(1e3 * begin.elapsed_time(end) / GRAPH_STEPS)
    return statistics.median(times)


def steps(version: Version, device: torch.device) -> dict[str, Callable[[], object]]:
    """The ways to call a version, by name, with a given output."""
    dtype = "fp16" if version.half else "e4m3"
    inputs = make_inputs(Case(version.family, dtype, *CASES[version.family]), device)
    tensors, options = inputs.version_arguments()
    out = torch.empty_like(inputs.q)
    found = {"call": lambda: version.call(*tensors, **options, out=out)}
    if version.family == "decoding":
        try:
            plan = plan_decoding(*tensors, **options, version=version.name)
        except ValueError:  # of a version that computes with torch first
            return found
        given = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
        found["plan"] = lambda: plan(*tensors, **given, out=out)
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("No GPU here: what a launch costs cannot be measured.")
        return 0
    device, gpu = torch.device("cuda", torch.cuda.current_device()), detect_gpu()
    rows = []
    for family in FAMILIES:
        for version in versions_of(family):
            reason = version.why_not(gpu, "fp16" if version.half else "e4m3")
            if reason:
                rows.append((family, version.name, reason))
                continue
            for way, step in steps(version, device).items():
                host, eager = costs(step, device)
                rows.append((family, version.name, way, f"{host:.1f}", f"{eager:.1f}"))
    print(f"Microseconds of a call beside its kernels, {gpu.name}")
    print(tabulate(rows, headers=("family", "version", "way", "host", "eager, over the kernels")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
