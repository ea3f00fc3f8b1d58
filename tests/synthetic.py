"""Made-up records for the tests of tables and charts. No number here was measured, and none may be committed."""

import math

from bench.cases import FP8, PRESETS, cases_for
from bench.providers import find_peer
from bench.results import case_fields

RUN, LATER = "20260101T000000Z-aaaa", "20260102T000000Z-bbbb"
PEERS = {
    "prefill": {"eager": 0.04, "efficient": 0.3, "fa2": 0.46, "flex": 0.6, "cudnn": 0.82, "fa3": 0.86},
    "decoding": {"eager": 0.05, "fa2": 0.65, "cudnn": 0.91, "fa3": 0.75},
}
CEILING = {"fp16": 770.0, "bf16": 780.0, "fp32": 50.0, "e4m3": 1320.0, "e5m2": 1320.0}
ERROR = {"fp16": 3e-4, "bf16": 2.4e-3, "fp32": 1e-6, "e4m3": 0.05, "e5m2": 0.09}
LIMIT = {"fp16": 6e-4, "bf16": 5e-3, "fp32": 2e-6, "e4m3": 0.06, "e5m2": 0.13}


def share(version: int, of: int) -> float:
    """Of the ceiling: v1 gets a tenth, the last of many nine tenths."""
    return 0.9 - 0.8 * 0.62 ** (version - 1) if of > 1 else 0.8


def record(case, version: str, role: str, speed: float, **fields) -> dict:
    """One green record at `speed` TFLOP/s or GB/s."""
    work = case.bytes() / 1e6 if case.family == "decoding" else case.flops() / 1e9
    ms = work / speed
    metric = {"gbps": speed, "tflops": None} if case.family == "decoding" else {"tflops": speed, "gbps": None}
    quadratic = case.batch * case.heads_q * case.seqlen_q * case.seqlen_k * 4 / 1e6 if version == "eager" else 0.0
    return case_fields(case) | metric | {
        "version": version, "role": role, "variant": "own tiles", "config": None, "num_splits": None,
        "timing": "graph" if case.family == "decoding" else "events", "median_ms": ms, "p20_ms": ms * 0.985,
        "p80_ms": ms * 1.02, "first_call_ms": 900.0, "error": ERROR[case.dtype], "error_limit": LIMIT[case.dtype],
        "peak_mem_mb": quadratic + case.batch * case.heads_q * case.seqlen_q * case.head_dim * 2 / 1e6,
        "gate": "pass", "source_hash": "0" * 12 if role == "version" else None, "run_id": RUN,
        "stale": False,
    } | fields  # fmt: skip


def takes(version: int, case) -> bool:
    """Roughly what the lineages have: FP8 from v3 on, in decoding from v5, pages from v4, several queries from v2."""
    if case.family == "prefill":
        return version >= 3 or case.dtype not in FP8
    first = max(5 if case.dtype in FP8 else 1, 4 if case.page_size else 1, 2 if case.seqlen_q > 1 else 1)
    return version >= first


def eager(found: dict, case, speed: float, host_ms: float) -> dict:
    """The record of the same provider's calls from Python, of which each costs the host so many ms."""
    kernel = case.bytes() / 1e6 / speed
    ms = max(kernel, host_ms)
    times = {"median_ms": ms, "p20_ms": ms * 0.98, "p80_ms": ms * 1.03, "latency_ms": kernel + host_ms + 0.006}
    return found | times | {"timing": "eager", "gbps": case.bytes() / 1e6 / ms}


def red(found: dict, reason: str = "relative error 0.37 is above 0.0006") -> dict:
    """The record that the same provider leaves when its gate is red."""
    times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "tflops", "gbps", "peak_mem_mb"))
    return found | times | {"gate": reason, "error": 0.37}


def records(family: str, versions: int = 3, preset: str = "paper", run_id: str = RUN, faster: float = 1.0):
    """A run of a whole preset: versions with own and parent tiles, peers, ceilings."""
    found = []
    for case in cases_for(family, preset):
        top = 4500.0 if family == "decoding" else CEILING[case.dtype]
        size = case.bytes() / 3e7 if family == "decoding" else case.seqlen_k / 400
        short_causal = 0.72 if case.causal and case.seqlen_k < 2048 else 1.0
        length = size / (1 + size) * short_causal * (0.75 + case.head_dim / 1024)
        for n in range(1, versions + 1):
            if not takes(n, case):
                continue
            wobble = 1 + 0.03 * math.sin(7 * n + case.seqlen_k + case.head_dim)
            speed = faster * top * length * share(n, versions) * wobble * (0.96 if case.page_size else 1.0)
            found.append(record(case, f"v{n}", "version", speed, run_id=run_id))
            if n > 1 and takes(n - 1, case):
                alone = {"run_id": run_id, "variant": "parent tiles"}
                found.append(record(case, f"v{n}", "version", speed * 0.8, **alone))
            if family == "decoding":
                found.append(eager(found[-1] | {"variant": "own tiles"}, case, speed, 0.025))
        if family == "decoding" and case.plain and case.dtype == "fp16":
            for way, host_ms in (("plain call", 0.028), ("plan", 0.005)):
                found.append(eager(found[-1] | {"variant": way}, case, speed, host_ms))
        peers = {"cudnn_fp8": 0.72} if case.dtype in FP8 else PEERS[family]
        for name, part in peers.items():
            if case.dtype == "e5m2" or find_peer(name).why_not(case):
                continue
            found.append(record(case, name, "peer", top * length * part, run_id=run_id))
    blank = dict.fromkeys(case_fields(cases_for(family, preset)[0])) | {
        "family": family, "pass": "ceiling", "role": "ceiling", "variant": "own tiles", "gate": "pass",
        "median_ms": 1.0, "run_id": run_id, "stale": False,
    }  # fmt: skip
    for dtype, top in CEILING.items():
        found.append(blank | {"version": "matmul", "dtype": dtype, "tflops": top, "gbps": None})
    for name, top in (("copy", 4280.0), ("read", 4550.0)):
        found.append(blank | {"version": name, "dtype": "fp16", "tflops": None, "gbps": top})
    if family == "decoding":
        found.append(blank | {"version": "launch", "dtype": "fp32", "tflops": None, "gbps": None, "timing": "eager",
                              "median_ms": 0.011})  # fmt: skip
    return found


def environment(run_id: str = RUN) -> dict:
    date = f"{run_id[:4]}-{run_id[4:6]}-{run_id[6:8]}"
    return {run_id: {
        "date": date, "gpu": "Test GPU", "driver": "1.2", "torch": "2.13.0", "triton": "3.7.1", "power": 700.0,
        "clocks": {"sm_max_mhz": 1980, "memory_max_mhz": 3201}, "seed": 0,
    }}  # fmt: skip


def grid(family: str, *presets: str, **options) -> list[dict]:
    return [found for preset in presets or PRESETS[family] for found in records(family, preset=preset, **options)]
