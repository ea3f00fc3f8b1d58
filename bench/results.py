"""Records: one JSON object a line, appended and never rewritten; which are newest, stale, or changed beyond noise."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from bench.cases import Case
from common.lineage import FAMILIES, versions_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PASS = {"prefill": "fwd", "decoding": "decode"}
CEILING = "ceiling"
NOISE = 0.02  # medians closer than this are equal, whatever their spread


class Record(TypedDict, total=False):
    """One measurement. A red gate ("gate" is not "pass") has null times; fields may be added, and are kept.

    There is one more, "pass", a keyword of Python: "fwd", "decode" or "ceiling". In decoding eager calls also have
    latency_ms (one alone, from the host's start until the GPU is done), and those over FP8 caches error_unquantised
    (`error` is taken on the numbers that these hold, this one on what they were rounded from).
    """

    family: str
    version: str  # "v2", a peer's name, or "matmul", "copy", "read"
    role: str  # "version", "peer" or "ceiling"
    dtype: str
    batch: int | None
    heads_q: int | None
    heads_kv: int | None
    seqlen_q: int | None
    seqlen_k: int | None
    head_dim: int | None
    causal: bool | None
    case: str | None  # the preset that it came from
    window: Sequence[int | None] | None
    lengths: Sequence[int] | None
    layout: str | None
    page_size: int | None
    num_splits: int | None
    variant: str  # "own tiles" or "parent tiles"; of own tiles also "plain call" and "plan", eager
    config: dict[str, Any] | None
    timing: str  # "events", "graph" or "eager"
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    tflops: float | None
    gbps: float | None
    first_call_ms: float | None  # compilation included
    peak_mem_mb: float | None  # beyond the inputs
    error: float | None  # relative L2, float64
    error_limit: float | None
    gate: str  # "pass" or the reason
    source_hash: str | None  # null for peers and ceilings
    run_id: str  # sorts by time


SHAPE = (
    "batch",
    "heads_q",
    "heads_kv",
    "seqlen_q",
    "seqlen_k",
    "head_dim",
    "causal",
    "window",
    "lengths",
    "layout",
    "page_size",
)
CELL = ("family", "role", "version", "pass", "dtype", *SHAPE, "variant", "timing", "bytes")  # bytes: of read ceilings


def case_fields(case: Case) -> dict[str, Any]:
    """The fields of a record that say what was computed."""
    return {
        "family": case.family, "pass": PASS[case.family], "dtype": case.dtype, "batch": case.batch,
        "heads_q": case.heads_q, "heads_kv": case.heads_kv, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k,
        "head_dim": case.head_dim, "causal": case.causal, "case": case.preset,
        "window": list(case.window) if case.window else None, "lengths": list(case.lengths) if case.lengths else None,
        "layout": case.layout, "page_size": case.page_size,
    }  # fmt: skip


def cell_of(record: Record) -> tuple:
    """What makes two records measurements of the same thing."""
    return tuple(tuple(x) if isinstance(x, list) else x for x in (record.get(name) for name in CELL))


# ---- files


def records_path(folder: pathlib.Path, family: str) -> pathlib.Path:
    return pathlib.Path(folder) / f"{family}.jsonl"


def append(folder: pathlib.Path, family: str, records: Iterable[Record]) -> None:
    """Add records to FOLDER/FAMILY.jsonl. A line that an earlier run left half written is closed first."""
    path = records_path(folder, family)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            lines = lines if file.read(1) == b"\n" else "\n" + lines
        file.write(lines.encode())


def load(folder: pathlib.Path, family: str) -> list[Record]:
    """All records of FOLDER/FAMILY.jsonl, oldest first; [] without a file. What is no JSON is skipped, and named."""
    path = records_path(folder, family)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path.name}, line {number}: not a record, skipped", file=sys.stderr)
    return records


def load_envs(folder: pathlib.Path, family: str) -> dict[str, dict]:
    """{run_id: environment} of FOLDER/FAMILY.env.json; {} where there is none."""
    path = pathlib.Path(folder) / f"{family}.env.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save_env(folder: pathlib.Path, family: str, run_id: str, env: dict) -> None:
    """Add or complete one run's environment; those of other runs stay as they are."""
    path = pathlib.Path(folder) / f"{family}.env.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    envs = load_envs(folder, family) | {run_id: env}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(envs, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def folders() -> list[pathlib.Path]:
    """The folders of recorded results, results/<gpu slug>, the one measured last first."""
    found = [path for path in sorted(RESULTS.glob("*")) if any(records_path(path, f).exists() for f in FAMILIES)]

    def latest(folder: pathlib.Path) -> str:
        return max((record["run_id"] for family in FAMILIES for record in load(folder, family)), default="")

    return sorted(found, key=latest, reverse=True)


# ---- choosing and comparing


def newest(records: Iterable[Record]) -> list[Record]:
    """For each cell its newest record, in the order in which cells first came up; all ceilings of every run, which are
    what its other records are a share of.
    """
    best: dict[tuple, Record] = {}
    for record in records:
        cell = (cell_of(record), id(record) if record["role"] == "ceiling" else None)
        if cell not in best or record["run_id"] >= best[cell]["run_id"]:
            best[cell] = record
    return list(best.values())


def of_run(records: Iterable[Record], run_id: str) -> list[Record]:
    return [record for record in records if record["run_id"] == run_id]


def is_stale(record: Record) -> bool:
    """Whether a version's code is not what was measured any more (or is gone). Peers and ceilings are never stale."""
    if record["role"] != "version":
        return False
    hashes = {version.name: version.source_hash for version in versions_of(record["family"])}
    return hashes.get(record["version"]) != record["source_hash"]


@dataclass(frozen=True)
class Change:
    """One cell in two runs. ratio: new speed over old; verdict: "faster", "slower", "same", "broke" or "mended"."""

    old: Record
    new: Record
    ratio: float | None
    verdict: str


def changes(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """What became of the cells that both have (newest record each), in the order of `new`."""
    before = {cell_of(record): record for record in newest(old)}
    pairs = [(before[cell_of(record)], record) for record in newest(new) if cell_of(record) in before]
    return [_change(*pair) for pair in pairs]


def _change(old: Record, new: Record) -> Change:
    if old["median_ms"] is None or new["median_ms"] is None:
        verdict = {(True, True): "same", (False, True): "broke", (True, False): "mended"}
        return Change(old, new, None, verdict[old["median_ms"] is None, new["median_ms"] is None])
    ratio = old["median_ms"] / new["median_ms"]
    (old_low, old_high), (new_low, new_high) = _spread(old), _spread(new)
    if new_high < old_low and ratio > 1 + NOISE:
        return Change(old, new, ratio, "faster")
    if new_low > old_high and 1 / ratio > 1 + NOISE:
        return Change(old, new, ratio, "slower")
    return Change(old, new, ratio, "same")


def _spread(record: Record) -> tuple[float, float]:
    """(p20, p80), which records of other tools may lack."""
    return record.get("p20_ms") or record["median_ms"], record.get("p80_ms") or record["median_ms"]
