"""Records by who, what and how: what tables and charts share.

Three rules hold for both. A record whose gate is red has no speed, only a reason. A ratio is taken inside one run,
because speeds move a few per cent from run to run. A record whose source_hash is not that of the version as it stands
is marked stale.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from bench.cases import DTYPES, ITEMSIZE, short
from bench.results import PASS, Record, is_stale
from common.lineage import versions_of

METRIC = {"prefill": ("tflops", "TFLOP/s"), "decoding": ("gbps", "GB/s")}
TIMING = {"prefill": "events", "decoding": "graph"}  # what a family's speed means where nothing else is said
CEILING = {"prefill": "matmul", "decoding": "read"}
OWN, PARENT, PLAN, PLAIN = "own tiles", "parent tiles", "plan", "plain call"
HALF = ("fp16", "bf16")
FIRST_STEP = "eager"  # what the first version is compared with
NEAR = 2.2  # a size is compared with a ceiling measured at most so many times larger or smaller


class Cell(NamedTuple):
    """What was computed: two records with equal cells did the same work, so that their speeds compare."""

    dtype: str
    head_dim: int
    causal: bool
    seqlen_k: int
    seqlen_q: int
    batch: int
    heads_q: int
    heads_kv: int
    window: str | None = None
    lengths: str | None = None
    layout: str | None = None
    page_size: int | None = None

    @classmethod
    def of(cls, record: Record) -> "Cell":
        window, lengths = (json.dumps(record[k]) if record.get(k) else None for k in ("window", "lengths"))
        plain = {name: record.get(name) for name in cls._fields if name not in ("causal", "window", "lengths")}
        return cls(causal=bool(record.get("causal")), window=window, lengths=lengths, **plain)

    @property
    def mask(self) -> str:
        return ("causal" if self.causal else "full") + (f" window {self.window}" if self.window else "")

    @property
    def heads(self) -> str:
        return str(self.heads_q) if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"

    def label(self, family: str = "prefill") -> str:
        """Short name of the shape: "fp16 D=128 S=8k full B=2 H=16"."""
        parts = [self.dtype, f"D={self.head_dim}", f"S={short(self.seqlen_k)}"]
        if family == "prefill":
            parts += [f"Sq={short(self.seqlen_q)}"] if self.seqlen_q != self.seqlen_k else []
            parts += [self.mask]
        elif self.seqlen_q > 1:
            parts += [f"Sq={self.seqlen_q}"]
        parts += [f"B={self.batch}", f"H={self.heads}"]
        parts += ["ragged"] if self.lengths else []
        parts += [self.layout] if self.layout not in (None, "bshd") else []
        parts += [f"page {self.page_size}"] if self.page_size else []
        return " ".join(parts)

    @property
    def plain(self) -> bool:
        """Every row over all keys up to its own, contiguous; in decoding one query."""
        several = 1 < self.seqlen_q < self.seqlen_k and self.causal
        return not (several or self.window or self.lengths or self.page_size)


def mark_stale(records: Iterable[Record]) -> list[Record]:
    """The records, each with "stale": whether it is of a version whose code is not what was measured any more."""
    return [record if "stale" in record else record | {"stale": is_stale(record)} for record in records]


def book_of(records: Iterable[Record], family: str) -> "Book":
    """The records as a Book, beside the lineage as it stands: what is stale, and which version is whose parent."""
    parents = {version.name: version.parent and f"v{version.parent}" for version in versions_of(family)}
    return Book(mark_stale(record for record in records if record["family"] == family), family, parents)


def digest(records: Iterable[Record]) -> str:
    """Short name of exactly these records, written into the charts so that a test can tell an old chart."""
    return hashlib.sha256("\n".join(json.dumps(r, sort_keys=True) for r in records).encode()).hexdigest()[:16]


def measured_on(envs: dict, runs: Iterable[str]) -> str:
    """ "NVIDIA H200, 2026-11-21" for these runs; empty where their environment is not known."""
    known = [envs[run] for run in sorted(set(runs)) if run in envs]
    gpus, dates = (sorted({env[name] for env in known}) for name in ("gpu", "date"))
    return ", ".join([*gpus, " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))] if known else [])


def passed(record: Record | None) -> bool:
    return record is not None and record.get("gate") == "pass" and record.get("median_ms") is not None


def version_number(name: str) -> int:
    return int(name[1:]) if re.fullmatch(r"v\d+", name) else 10**6


class Book:
    """One family's records, found by who, what and how. parents: {"v2": "v1"}, by default the version before."""

    def __init__(self, records: Iterable[Record], family: str, parents: dict[str, str | None] | None = None):
        self.family = family
        self.metric, self.unit = METRIC[family]
        self.given = [r for r in records if r["family"] == family]
        self.records = [r for r in self.given if r["pass"] == PASS[family] and r["role"] != "ceiling"]
        self.ceilings = [r for r in self.given if r["role"] == "ceiling" and r["version"] == CEILING[family]]
        self.versions = sorted({r["version"] for r in self.records if r["role"] == "version"}, key=version_number)
        self.peers = sorted({r["version"] for r in self.records if r["role"] == "peer"})
        before = dict(zip(self.versions, [None, *self.versions], strict=False))
        self.parents = before | (parents or {})
        self._found = defaultdict(dict)  # (who, variant, timing, cell) -> {run_id: record}
        for record in sorted(self.records, key=lambda r: not r.get("stale")):
            runs = self._found[self._key(record)]
            if any(r.get("stale") for r in runs.values()) and not record.get("stale"):
                runs.clear()  # what the code of today earned takes the place of what older code did
            runs[record["run_id"]] = record
        self.cells = sorted({Cell.of(r) for r in self.records}, key=_order)

    def _key(self, record):
        variant = record["variant"] if record.get("variant") in (PARENT, PLAN, PLAIN) else OWN
        return record["version"], variant, record.get("timing") or TIMING[self.family], Cell.of(record)

    def runs(self, who: str, cell: Cell, variant: str = OWN, timing: str | None = None) -> dict[str, Record]:
        """{run_id: record} of one provider at one cell."""
        return self._found.get((who, variant, timing or TIMING[self.family], cell), {})

    def latest(self, who: str, cell: Cell, variant: str = OWN, timing: str | None = None) -> Record | None:
        """The newest record, red or not; None where it was never measured."""
        runs = self.runs(who, cell, variant, timing)
        return runs[max(runs)] if runs else None

    def speed(self, record: Record | None) -> float | None:
        """TFLOP/s or GB/s; None for a red gate."""
        return record.get(self.metric) if passed(record) else None

    def spread(self, record: Record) -> tuple[float, float]:
        """Speed at p80 and at p20 of the times: the slow and the fast end."""
        speed, median = self.speed(record), record["median_ms"]
        low, high = record.get("p80_ms") or median, record.get("p20_ms") or median
        return speed * median / low, speed * median / high

    def pair(self, who: str, base: str, cell: Cell, variant: str = OWN, timing: str | None = None) -> list[Record]:
        """Both records of the newest run that has `who` and `base` (own tiles) at this cell; [] if one is red."""
        mine, theirs = self.runs(who, cell, variant, timing), self.runs(base, cell, OWN, timing)
        run = max(mine.keys() & theirs.keys(), default=None)
        both = [mine[run], theirs[run]] if run else []
        return both if all(map(passed, both)) else []

    def ratio(self, who: str, base: str, cell: Cell, variant: str = OWN, timing: str | None = None) -> float | None:
        """Speed of `who` over the speed of `base`, from pair()."""
        both = self.pair(who, base, cell, variant, timing)
        return self.speed(both[0]) / self.speed(both[1]) if both else None

    def against(self, who: str, cell: Cell, other: Cell, best: bool = False) -> float | None:
        """How many times faster `who` is at `cell` than it, or the best version, at `other`; the newest run of both."""
        mine, found = self.runs(who, cell), [self.runs(name, other) for name in (self.versions if best else [who])]
        run = max(mine.keys() & set().union(*found), default=None)
        theirs = [runs[run]["median_ms"] for runs in found if passed(runs.get(run))]
        return min(theirs) / mine[run]["median_ms"] if theirs and passed(mine[run]) else None

    def launched_ms(self, record: Record | None) -> float | None:
        """Of a record of eager calls: one alone, from the host's start until the GPU is done; None where not taken."""
        return record.get("latency_ms") if passed(record) else None

    def ratios(self, who: str, base: str | None, variant: str = OWN, dtypes: tuple = HALF) -> dict[Cell, float]:
        """ratio() at every cell of these dtypes where it exists."""
        found = {c: self.ratio(who, base, c, variant) for c in self.cells if base and c.dtype in dtypes}
        return {cell: value for cell, value in found.items() if value is not None}

    def is_stale(self, who: str) -> bool:
        """Whether some speed of this provider that tables and charts show was measured on other code than today's."""
        runs = (runs for (name, *_), runs in self._found.items() if name == who)
        return any(record.get("stale") for found in runs for record in found.values())

    def best_peer(self, who: str, cell: Cell) -> tuple[float, str] | None:
        """Speed over that of the strongest peer, and that peer's name, in the newest run that has both."""
        for run, record in sorted(self.runs(who, cell).items(), reverse=True):
            speeds = {peer: self.speed(self.runs(peer, cell).get(run)) for peer in self.peers}
            speeds = {peer: speed for peer, speed in speeds.items() if speed}
            if speeds:
                best = max(speeds, key=speeds.get)
                return (self.speed(record) / speeds[best], best) if passed(record) else None
        return None

    def ceiling(self, record: Record) -> Record | None:
        """The ceiling record of the same run: for prefill the matrix product in the record's dtype, for decoding the
        read-only kernel nearest in size, at its best; None where that is not near."""
        found = [c for c in self.ceilings if c["run_id"] == record["run_id"] and c.get(self.metric)]
        if self.family == "prefill":
            dtype = "e4m3" if record["dtype"] == "e5m2" else record["dtype"]  # there is no product of two e5m2 matrices
            return next((c for c in reversed(found) if c["dtype"] == dtype), None)  # a run's last one has most samples
        size = kv_bytes(record)
        far = {id(c): abs(math.log(c["bytes"] / size)) if c.get("bytes") and size else 0.0 for c in found}
        best = min(found, key=lambda c: (far[id(c)], -c[self.metric]), default=None)
        return best if best and far[id(best)] <= math.log(NEAR) else None

    def of_ceiling(self, record: Record | None) -> float | None:
        """Speed as a share of the ceiling; it may pass 1."""
        ceiling = self.ceiling(record) if passed(record) else None
        return self.speed(record) / ceiling[self.metric] if ceiling else None

    def headline(self, dtype: str = "fp16") -> Cell | None:
        """The cell of the headline: D=128, S=8k, full (decoding: 16 heads of 64, 64k keys) where it was measured, else
        the one with the most versions, then the longest sequence."""
        wanted = (2, 16, 128, 8192, False) if self.family == "prefill" else (1, 16, 64, 65536, False)
        cells = [c for c in self.cells if c.dtype == dtype and c.plain]
        count = {c: sum(self.latest(v, c) is not None for v in self.versions) for c in cells}
        same = [(c.batch, c.heads_q, c.head_dim, c.seqlen_k, c.causal) == wanted for c in cells]
        rank = {
            c: (is_wanted, count[c], not c.causal, c.seqlen_k)
            for is_wanted, c in zip(same, cells, strict=True)
            if count[c]
        }
        return max(rank, key=rank.get, default=None)


def _order(cell: Cell) -> tuple:
    first = DTYPES.index(cell.dtype) if cell.dtype in DTYPES else len(DTYPES)
    return first, cell.head_dim, cell.causal, cell.heads_q, cell.heads_kv, cell.seqlen_k, cell.batch, str(cell)


def kv_bytes(record: Record) -> int:
    """Bytes of K and V, of a ragged batch those that count."""
    keys = sum(record.get("lengths") or ()) or record["batch"] * record["seqlen_k"]
    return 2 * record["heads_kv"] * keys * record["head_dim"] * ITEMSIZE[record["dtype"]]


class Sweep(NamedTuple):
    """What shapes have in common that differ in length alone: a batch, or a number of tokens."""

    dtype: str
    head_dim: int
    causal: bool
    heads_q: int
    heads_kv: int
    batch: int | None
    tokens: int | None
    rest: tuple  # window, lengths, layout, page_size, queries where they are several in decoding

    @property
    def size(self) -> str:
        return f"batch {self.batch}" if self.batch else f"{short(self.tokens)} tokens"

    @property
    def heads(self) -> str:
        return f"{self.heads_q} heads" if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv} heads"

    def label(self, family: str = "prefill") -> str:
        """ "fp16, D=128, causal, 16 heads, 16k tokens"."""
        mask = [("causal" if self.causal else "full") + (f" window {self.rest[0]}" if self.rest[0] else "")]
        mask = mask if family == "prefill" else []
        return ", ".join([self.dtype, f"D={self.head_dim}", *mask, self.heads, self.size, *self.extra])

    @property
    def extra(self) -> list[str]:
        """What else is not the usual: ["ragged", "page 16"]."""
        _, lengths, layout, page_size, queries = self.rest
        found = ["ragged"] if lengths else []
        found += [layout] if layout not in (None, "bshd") else []
        found += [f"page {page_size}"] if page_size else []
        return found + ([f"{queries} queries"] if queries else [])


def sweeps(cells: Iterable[Cell]) -> dict[Sweep, list[Cell]]:
    """Every cell in one sweep, shortest first. A cell goes where more lengths are: fixed tokens (the papers' 16k), or
    a fixed batch."""
    alike = defaultdict(list)
    for cell in cells:
        same_q = cell.seqlen_q == cell.seqlen_k or cell.seqlen_q
        rest = (*cell[8:], cell.seqlen_q if cell.causal and 1 < cell.seqlen_q < cell.seqlen_k else None)
        alike[(*cell[:3], cell.heads_q, cell.heads_kv, rest, same_q)].append(cell)
    found = defaultdict(list)
    for (dtype, head_dim, causal, heads_q, heads_kv, rest, _), group in alike.items():
        for cell in group:
            tokens = cell.batch * cell.seqlen_k
            of_tokens = {c.seqlen_k for c in group if c.batch * c.seqlen_k == tokens and c.seqlen_q > 1}
            of_batch = {c.seqlen_k for c in group if c.batch == cell.batch}
            size = (None, tokens) if len(of_tokens) > len(of_batch) else (cell.batch, None)
            found[Sweep(dtype, head_dim, causal, heads_q, heads_kv, *size, rest)].append(cell)
    return {sweep: sorted(group, key=lambda c: (c.seqlen_k, c.seqlen_q)) for sweep, group in found.items()}
