"""Microseconds that the host needs for one call of each version, the GPU kept busy so that nobody waits for it."""

from __future__ import annotations

import statistics
import time

import torch
from tabulate import tabulate

from bench.cases import Case
from bench.inputs import make_inputs
from common.hardware import detect_gpu
from common.lineage import FAMILIES, Version, versions_of

CALLS, ROUNDS = 200, 5
CASES = {"prefill": (1, 16, 16, 512, 512, 128), "decoding": (1, 32, 8, 1, 8192, 128)}


def host_microseconds(version: Version, device: torch.device) -> float:
    """The median over ROUNDS of the mean over CALLS calls with a given output: arguments checked, kernel launched."""
    dtype = "fp16" if version.half else "e4m3"
    inputs = make_inputs(Case(version.family, dtype, *CASES[version.family]), device)
    tensors, options = inputs.version_arguments()
    out = torch.empty_like(inputs.q)
    version.call(*tensors, **options, out=out)  # compiles
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        start = time.perf_counter()
        for _ in range(CALLS):
            version.call(*tensors, **options, out=out)
        rounds.append(1e6 * (time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize(device)
    return statistics.median(rounds)


def main() -> int:
    if not torch.cuda.is_available():
        print("No GPU here: what a launch costs cannot be measured.")
        return 0
    device, gpu = torch.device("cuda", torch.cuda.current_device()), detect_gpu()
    rows = []
    for family in FAMILIES:
        for version in versions_of(family):
            reason = version.why_not(gpu, "fp16" if version.half else "e4m3")
            rows.append((family, version.name, reason or f"{host_microseconds(version, device):.0f}"))
    print(f"Host time of a call, microseconds, {gpu.name}")
    print(tabulate(rows, headers=("family", "version", "us")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
