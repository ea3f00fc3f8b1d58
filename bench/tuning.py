"""--tune: try a short list of tiles for one kind of problem, and remember the fastest that is right."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterable

import torch

from bench import gate
from bench.inputs import Inputs
from bench.timing import CudaClock
from common.launch import Tiles, remember_tiles
from common.lineage import Version

CANDIDATES = {
    "prefill": [
        Tiles(block_m, block_n, warps, stages)
        for block_m, block_n, warps in (
            (64, 64, 4),
            (128, 64, 4),
            (128, 64, 8),
            (128, 128, 8),
            (64, 128, 4),
            (128, 32, 4),
        )
        for stages in (2, 3)
    ],
    "decoding": [
        Tiles(1, block_n, warps, stages)
        for block_n in (32, 64, 128, 256)
        for warps in (2, 4, 8)
        for stages in (1, 2, 3)
    ],
}
SAMPLES = 7


def tune(
    version: Version,
    inputs: Inputs,
    expected: gate.Expected,
    clock: CudaClock,
    candidates: Iterable[Tiles] | None = None,
) -> dict:
    """Time candidates of a version on one case and store the winner (common.launch.remember_tiles).

    Returns {"tiles": dict, "tuning_s": seconds, "tried": int, "failed": int}. The version's own choice takes part, so
    that tuning never loses; a candidate that does not run, or whose answer is wrong, cannot win.
    """
    start, problem = time.perf_counter(), inputs.problem()
    own = version.tiles(problem)
    times, failed = {}, 0
    for tiles in dict.fromkeys([own, *(candidates or CANDIDATES[version.family])]):
        try:
            times[tiles] = _time(version, tiles, inputs, expected, clock)
        except Exception:  # too much shared memory, a compiler that gives up: that is what trying means
            failed += 1
            clock.synchronize()
    if not times:
        raise RuntimeError("no tiles run")
    best = min(times, key=times.get)
    remember_tiles(remembered_name(version), problem, best)
    return {
        "tiles": best._asdict(),
        "tuning_s": time.perf_counter() - start,
        "tried": len(times) + failed,
        "failed": failed,
    }


def remembered_name(version: Version) -> str:
    """The name that a version looks its tuned tiles up by."""
    return version.name if version.family == "prefill" else f"{version.family} {version.name}"


def _time(version: Version, tiles: Tiles, inputs: Inputs, expected: gate.Expected, clock: CudaClock) -> float:
    """Median milliseconds of seven calls. ValueError where the answer is wrong."""
    tensors, options = inputs.version_arguments()
    out = torch.empty_like(inputs.problem().out)
    gate.poison(out)
    call = functools.partial(version.call, *tensors, **options, out=out, tiles=tiles)
    call()
    clock.synchronize()
    _, verdict = gate.check(out, inputs.case, expected, gate.error_limit(inputs.case, expected))
    if verdict != "pass":
        raise ValueError(verdict)
    return statistics.median(clock.events(call, SAMPLES))
