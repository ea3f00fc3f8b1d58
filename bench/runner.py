"""What both scripts do: plan the cells, measure them round by round, keep the records, show them."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import random
import sys
import time
from collections.abc import Iterable, Sequence

import torch

from bench import command_line, gate, results, timing
from bench.cases import FP8, Case, cases_for
from bench.environment import Telemetry, describe, new_run_id
from bench.progress import Progress, say
from bench.providers import (
    OWN,
    PARENT,
    PEERS,
    PLAIN,
    PLAN,
    Entrant,
    NotHere,
    Peer,
    find_peer,
    source_hash,
    why_not_case,
)
from bench.results import Record
from bench.worker import Failed, Worker, WorkerLost, timings_of
from common.hardware import interpreting
from common.lineage import Version, find_version, parent_of, versions_of

SEED = 0
FIRST_CALL_S, REQUEST_S, TUNE_S = 150.0, 60.0, 240.0  # patience with one first call, one request, one search of tiles
PEER_MODULES = {
    "fa3": ("flash_attn_interface",),
    "cudnn": ("cudnn", "cudnn_fp8"),
}  # what each other process must import
# Presets spend their time where it teaches most; peers that are named on the command line run everywhere.
PAPER_PEERS = {"bf16": ("fa3", "cudnn", "fa2"), "e4m3": ("cudnn_fp8",)}
PAPER_ALONE_HEAD_DIM = 128  # where ideas are measured alone, with their parents' tiles
PAPER_BEYOND_PEERS = ("fa3", "cudnn")  # for pages, lengths, several queries: the strongest, if they take them
PAPER_BF16_VERSIONS = 4  # bf16 repeats fp16's steps: the newest versions, against the peers
FLEX_SEQLENS = {"paper": (4096, 16384), "seed": (8192,)}  # each shape is seconds of compilation


def main(family: str, argv: Sequence[str] | None = None) -> int:
    """The whole script. Exit status: 0; 1 where a version is wrong in the interpreter or no GPU process starts; 2 for
    flags that make no sense, said in one line.
    """
    parser = command_line.parser(family)
    args = parser.parse_args(argv)
    try:
        cells, notes = plan(family, args)
        earlier = _earlier(family, args)
    except (ValueError, TypeError) as error:
        parser.error(str(error).splitlines()[0])
    if args.replay:
        return replay(family, args, earlier)
    if interpreting() or not torch.cuda.is_available():
        from bench import without_gpu

        return without_gpu.run(family, args, earlier)
    try:
        return Run(
            family, args, cells, earlier, [sys.argv[0], *(argv if argv is not None else sys.argv[1:])]
        ).everything(notes)
    except (WorkerLost, Failed) as reason:
        print(f"{parser.prog}: the process that drives the GPU does not start: {reason}", file=sys.stderr)
        return 1


# ---- the plan


def plan(family: str, args) -> tuple[list[tuple[Case, list[Entrant]]], list[str]]:
    """(cells, notes): who is measured on which case, and one line for each peer that is not here.

    Raises ValueError, naming what exists, for unknown versions, peers, presets and dtypes.
    """
    versions = [find_version(family, name) for name in args.versions] if args.versions else list(versions_of(family))
    peers, notes = choose_peers(family, args.peers)
    cells, not_taking = [], collections.Counter()
    for case in cases_for(family, args.preset, **command_line.axes(args)):
        taking = [version for version in versions if why_not_case(version, case) is None]
        thin = args.preset == "paper" and case.dtype == "bf16" and not args.versions
        taking = taking[-PAPER_BF16_VERSIONS:] if thin else taking
        entrants = [entrant for version in taking for entrant in version_entrants(version, case)]
        if args.preset == "paper" and (thin or not _alone_too(case)):
            entrants = [entrant for entrant in entrants if entrant.variant == OWN]
        if taking and case.plain and case.dtype == "fp16" and family == "decoding":
            entrants += [Entrant("version", taking[-1].name, way) for way in (PLAIN, PLAN)]
        entrants += [
            Entrant("peer", peer.name, process=peer.process) for peer in peers if _takes_part(peer, case, args)
        ]
        if entrants:
            cells.append((case, entrants))
        if family == "decoding" and not (case.plain and case.dtype not in FP8):
            for who in (*versions, *peers):
                reason = why_not_case(who, case) if isinstance(who, Version) else who.why_not(case)
                if reason:
                    not_taking[who.name, reason] += 1
    notes += _absences(not_taking)
    if not cells:
        raise ValueError("nothing to measure: no version and no peer that is installed takes these cases")
    return cells, notes


def _absences(not_taking: dict[tuple[str, str], int]) -> list[str]:
    """One line for each reason: "v1, v2 (takes no block_table): not in 3 of the cases". {(name, reason): cases}"""
    names = {}
    for (name, reason), count in not_taking.items():
        names.setdefault((reason, count), []).append(name)
    return [f"{', '.join(who)} ({reason}): not in {count} of the cases" for (reason, count), who in names.items()]


def _alone_too(case: Case) -> bool:
    """Whether preset paper measures the idea alone, with the parents' tiles, on this case too."""
    if case.family == "decoding":
        return case.plain and case.dtype == "fp16"
    return case.head_dim == PAPER_ALONE_HEAD_DIM


def choose_peers(family: str, names: list[str] | None) -> tuple[list[Peer], list[str]]:
    """(peers that are installed, lines about those that are not)."""
    if names == ["none"]:
        return [], []
    wanted = PEERS if names in (None, ["all"]) else [find_peer(name) for name in names]
    wanted = [peer for peer in wanted if family in peer.families]
    absent = {peer.name: peer.absent() for peer in wanted}
    missing = ", ".join(f"{name} ({reason})" for name, reason in absent.items() if reason)
    return [peer for peer in wanted if not absent[peer.name]], [f"absent: {missing}"] if missing else []


def version_entrants(version: Version, case: Case) -> list[Entrant]:
    """A version with its own tiles and, where it has a parent to compare with, its parent's."""
    if why_not_case(version, case):
        return []
    try:
        parent = parent_of(version)
    except ValueError:  # its file is not there (yet): the version still runs, with its own tiles
        parent = None
    comparable = parent is not None and why_not_case(parent, case) is None
    return [Entrant("version", version.name, variant) for variant in ((OWN, PARENT) if comparable else (OWN,))]


def _takes_part(peer: Peer, case: Case, args) -> bool:
    if peer.why_not(case):
        return False
    if args.peers is not None:
        return True
    if peer.name == "flex" and case.seqlen_k not in FLEX_SEQLENS.get(args.preset, (case.seqlen_k,)):
        return False
    if args.preset != "paper":
        return True
    return peer.name in (PAPER_PEERS.get(case.dtype, (peer.name,)) if case.plain else PAPER_BEYOND_PEERS)


def estimate_seconds(cells: Iterable[tuple[Case, list[Entrant]]]) -> float:
    """Roughly how long a run takes: starting, compiling, then so much for each entrant of each cell."""
    seconds, kernels = 45.0, set()
    for case, entrants in cells:
        for entrant in entrants:
            seconds += 0.5 if case.family == "decoding" else 0.4
            if entrant.role == "version":
                kernels.add(kind_of(case, entrant))
            else:
                seconds += find_peer(entrant.name).slow_start
    return seconds + 0.4 * len(kernels)


def kind_of(case: Case, entrant: Entrant) -> tuple:
    """What a kernel is compiled for."""
    cache = (case.seqlen_q, case.page_size, case.lengths is not None) if case.family == "decoding" else ()
    return entrant, case.dtype, case.head_dim, case.causal, case.layout, *cache


def _earlier(family: str, args) -> list[Record] | None:
    """The records that --compare names, where that can be told before the GPU is known; None otherwise."""
    if args.replay and not results.records_path(args.replay, family).exists():
        raise ValueError(f"--replay {args.replay}: has no {family}.jsonl")
    if not args.compare:
        return None
    if (folder := pathlib.Path(args.compare)).is_dir():
        if not results.records_path(folder, family).exists():
            raise ValueError(f"--compare {folder}: has no {family}.jsonl")
        return results.newest(results.load(folder, family))
    places = [path for path in (args.replay, args.out) if path] or results.folders()
    known: list[Record] = [record for place in places for record in results.load(place, family)]
    if found := results.of_run(known, args.compare):
        return found
    run_ids = sorted({record["run_id"] for record in known})
    raise ValueError(
        f"--compare {args.compare}: neither a folder nor a run; there are {', '.join(run_ids) or 'no runs'}"
    )


# ---- one run on a GPU


@dataclasses.dataclass(eq=False)
class Attempt:
    """One entrant on one case: what came back, and whether it is still in. gates holds "pass" or a reason by timing."""

    entrant: Entrant
    timings: tuple[str, ...]
    first: dict = dataclasses.field(default_factory=dict)
    gates: dict[str, str] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    more: dict[str, dict] = dataclasses.field(default_factory=dict)  # further fields of the records, by timing
    absent: str | None = None  # it does not do this case
    lost: bool = False  # its process went down with another entrant: to be measured again
    same_as: Attempt | None = None  # its tiles are those of this one: one measurement serves both

    @property
    def again(self) -> bool:
        return self.lost or (self.same_as is not None and self.same_as.lost)

    def open_timings(self) -> list[str]:
        """The timings that still take samples."""
        return (
            [] if self.lost or self.absent or self.same_as else [t for t in self.timings if self.gates.get(t) == "pass"]
        )

    def judge(self, verdict: str, timings: Iterable[str] | None = None) -> None:
        """Sets the gate of some timings, of all by default, to "pass" or the reason against."""
        self.gates |= dict.fromkeys(timings or self.timings, verdict)


class Run:
    """One run of a script: its processes, its records, its folder."""

    def __init__(self, family: str, args, cells, earlier: list[Record] | None, argv: list[str], device: str = "cuda"):
        self.family, self.args, self.cells, self.earlier, self.argv = family, args, cells, earlier, argv
        self.run_id, self.records, self.random = new_run_id(), [], random.Random(SEED)
        names = {entrant.process for _, entrants in cells for entrant in entrants} | {"main"}
        self.workers = {name: Worker(device, PEER_MODULES.get(name, ())) for name in sorted(names)}
        self.compile_ms: dict[tuple, float] = {}
        self.ceilings: dict[tuple, list] = {}
        self.said: set[str] = set()

    def everything(self, notes: list[str]) -> int:
        """Measure, keep, show. Ctrl-C ends the measuring, not the showing."""
        started = time.perf_counter()
        for worker in self.workers.values():
            worker.start()
        try:
            self.gpu = self.workers["main"].ask("hello", timeout=180.0)
            self.folder = self.args.out or results.RESULTS / self.gpu["slug"]
            self.telemetry = Telemetry(self.gpu["name"])
            self._introduce(notes)
            try:
                self._measure()
            except KeyboardInterrupt:
                self._say("stopped: what was measured is kept")
            self._keep_env(seconds=round(time.perf_counter() - started, 1), **self.telemetry.whole_run())
            self.telemetry.close()
        finally:
            for worker in self.workers.values():
                worker.stop()
        return show(self.family, self.folder, self.records, self.earlier)

    def _introduce(self, notes: list[str]) -> None:
        """Say what will be measured and what cannot, and drop the latter from the plan."""
        dtypes = sorted({case.dtype for case, _ in self.cells})
        names = sorted({e.name for _, entrants in self.cells for e in entrants if e.role == "version"})
        why_not = self.workers["main"].ask("why_not", family=self.family, names=names, dtypes=dtypes)
        for name, reasons in why_not.items():
            for reason in dict.fromkeys(filter(None, reasons.values())):
                if not (reason == "has no FP8 path"):
                    notes.append(f"{name} does not run here: {reason}")
        gone = {}
        for name, worker in self.workers.items():
            try:
                worker.ask("hello", timeout=180.0)
            except (WorkerLost, Failed) as reason:
                gone[name] = reason
                notes.append(f"absent: {name} ({reason})")
        runs = [
            (case, [e for e in entrants if e.process not in gone and not (why_not.get(e.name) or {}).get(case.dtype)])
            for case, entrants in self.cells
        ]
        self.cells = [(case, entrants) for case, entrants in runs if entrants]
        about = f"{len(self.cells)} cases, about {estimate_seconds(self.cells) / 60:.0f} minutes"
        self._say(f"{self.gpu['name']}, {self.family}: {about}, run {self.run_id}")
        for note in notes:
            self._say(note)
        self._keep_env()

    def _keep_env(self, **more) -> None:
        env = describe(self.gpu, SEED, self.argv, self.telemetry) | {"rounds": self.args.rounds} | more
        results.save_env(self.folder, self.family, self.run_id, env)

    def _say(self, line: str) -> None:
        if line not in self.said:
            say(line)
            self.said.add(line)

    def _measure(self) -> None:
        self._compile()
        if self.args.tune:
            self._tune()
        self._measure_ceilings()
        progress = Progress(len(self.cells), sum(len(entrants) for _, entrants in self.cells))
        try:
            for case, entrants in self.cells:
                progress.begin(case.label())
                records = self.cell(case, entrants)
                results.append(self.folder, self.family, records)
                self.records += records
                progress.end(case.label(), len(entrants), _brief(self.family, records))
        finally:
            progress.close()
        self._measure_ceilings()

    # ---- before the cells

    def _compile(self) -> None:
        """Compile the versions' kernels side by side: one call for each kind of case."""
        kinds = {}
        for case, entrants in self.cells:
            for entrant in entrants:
                if entrant.role == "version" and entrant.variant in (OWN, PARENT):
                    kinds.setdefault(kind_of(case, entrant), (case, entrant))
        started = time.perf_counter()
        pairs = [[dataclasses.asdict(case), dataclasses.asdict(entrant)] for case, entrant in kinds.values()]
        try:
            milliseconds = self.workers["main"].ask("compile", timeout=60.0 + len(pairs), pairs=pairs, seed=SEED)
        except (WorkerLost, Failed) as reason:
            self._say(f"compiling ahead failed ({reason}); each kernel compiles at its first call")
            return
        self.compile_ms = {kind: ms for kind, ms in zip(kinds, milliseconds, strict=True) if ms is not None}
        self._say(f"compiled {len(pairs)} kernels in {time.perf_counter() - started:.0f} s")

    def _tune(self) -> None:
        """Search each version's tiles on the longest case of each kind."""
        longest = {}
        for case, entrants in sorted(self.cells, key=lambda cell: -cell[0].seqlen_k):
            for entrant in entrants:
                if entrant.role == "version" and entrant.variant == OWN:
                    longest.setdefault(kind_of(case, entrant), (case, entrant))
        for case, entrant in longest.values():
            try:
                found = self.workers["main"].ask(
                    "tune", timeout=TUNE_S, case=dataclasses.asdict(case), name=entrant.name, seed=SEED
                )
            except (WorkerLost, Failed, NotHere) as reason:
                self._say(f"{entrant.name} {case.label()}: not tuned: {reason}")
                continue
            self._say(
                f"{entrant.name} {case.label()}: tuned in {found['tuning_s']:.0f} s over {found['tried']} tiles "
                f"({found['failed']} did not run): {tuple(found['tiles'].values())}"
            )

    def _measure_ceilings(self) -> None:
        """Ceilings before the cells, and after them, when the GPU is hot: the second records hold both."""
        dtypes = sorted({case.dtype for case, _ in self.cells})
        try:
            found = self.workers["main"].ask("ceilings", timeout=REQUEST_S, family=self.family, dtypes=dtypes)
        except (WorkerLost, Failed) as reason:
            self._say(f"no ceilings: {reason}")
            return
        for line in found["said"]:
            self._say(line)
        records = []
        for ceiling in found["ceilings"]:
            samples = self.ceilings.setdefault((ceiling["name"], ceiling["dtype"], ceiling["bytes"]), [])
            samples += ceiling["samples"]
            records.append(ceiling_record(self.family, ceiling, samples, self.run_id))
        results.append(self.folder, self.family, records)
        self.records += records

    # ---- one cell

    def cell(self, case: Case, entrants: list[Entrant]) -> list[Record]:
        """Records of all entrants on a case. Those whose process went down with another one are measured once more."""
        records, todo = [], entrants
        while todo:
            attempts = self._interleave(case, todo)
            done = [attempt for attempt in attempts if not attempt.again and not attempt.absent]
            records += [self._record(case, attempt, name) for attempt in done for name in attempt.timings]
            todo = [attempt.entrant for attempt in attempts if attempt.again]
        return records

    def _interleave(self, case: Case, entrants: list[Entrant]) -> list[Attempt]:
        attempts: list[Attempt] = []
        for entrant in entrants:
            attempts.append(Attempt(entrant, timings_of(case.family, entrant)))
            self._enter(case, attempts[-1], attempts)
        self.telemetry.lap()
        for _ in range(self.args.rounds):
            turns = [(attempt, name) for attempt in attempts for name in attempt.open_timings()]
            self.random.shuffle(turns)
            for attempt, name in turns:
                if name in attempt.open_timings():
                    count = attempt.counts[name]
                    got = self._ask(attempt, attempts, (name,), "samples", timing=name, count=count)
                    attempt.samples.setdefault(name, []).extend(got or ())
        self.lap = self.telemetry.lap()
        for attempt in attempts:
            for name in attempt.open_timings():
                after = self._ask(attempt, attempts, (name,), "final_check", timing=name)
                if after and after["gate"] != "pass":
                    attempt.gates[name] = f"after timing: {after['gate']}"
        for name in {attempt.entrant.process for attempt in attempts}:
            self._drop(name)
        return attempts

    def _enter(self, case: Case, attempt: Attempt, attempts: list[Attempt]) -> None:
        """First call and gate; then, for each timing, what one sample costs."""
        request = {"case": dataclasses.asdict(case), "seed": SEED}
        first = self._ask(attempt, attempts, attempt.timings, "enter", timeout=FIRST_CALL_S, **request)
        entrant = attempt.entrant
        if first is None:
            if entrant.variant == PARENT and not attempt.lost and not attempt.absent:  # not a fault of this version
                attempt.absent = next(iter(attempt.gates.values()))
                self._say(f"{case.label()}: {entrant.name} does not run with its parent's tiles: {attempt.absent}")
            return
        attempt.first = first
        attempt.judge(first["gate"])
        own = next((a for a in attempts if a.entrant.name == entrant.name and a.entrant.variant == OWN), None)
        if entrant.variant == PARENT and own and own.open_timings() and own.first["config"] == first["config"]:
            attempt.same_as = own
            return
        for name in attempt.open_timings():
            ready = self._ask(attempt, attempts, (name,), "prepare", timing=name)
            if ready:
                attempt.gates[name] = ready["gate"]
                attempt.more[name] = {key: ready[key] for key in ("latency_ms",) if key in ready}
                attempt.counts[name] = timing.samples_a_round(ready["sample_ms"])

    def _ask(self, attempt: Attempt, attempts: list[Attempt], timings, do: str, timeout: float = REQUEST_S, **request):
        """The worker's answer; None where there is none: the attempt then carries the reason."""
        entrant = attempt.entrant
        try:
            return self.workers[entrant.process].ask(do, timeout, entrant=dataclasses.asdict(entrant), **request)
        except NotHere as reason:
            attempt.absent = str(reason)
            if entrant.role == "version" and entrant.variant in (OWN, PLAN):
                self._say(f"{entrant.name} {reason}")
        except Failed as reason:
            attempt.judge(str(reason), timings)
        except WorkerLost as reason:
            attempt.judge(str(reason))
            for other in attempts:
                if other is not attempt and other.entrant.process == entrant.process and other.open_timings():
                    other.lost = True
        return None

    def _drop(self, process: str) -> None:
        try:
            self.workers[process].ask("drop")
        except (WorkerLost, Failed) as reason:
            self._say(f"restarting the process {process}: {reason}")

    def _record(self, case: Case, attempt: Attempt, name: str) -> Record:
        source = attempt.same_as or attempt
        kind = kind_of(case, attempt.entrant)
        config = attempt.first.get("config")
        shared = {
            "variant": attempt.entrant.variant, "config": config, "num_splits": (config or {}).get("num_splits"),
            "first_call_ms": self.compile_ms.get(kind, attempt.first.get("first_call_ms")),
            "peak_mem_mb": attempt.first.get("peak_mem_mb"), "error": attempt.first.get("error"),
            "error_limit": attempt.first.get("error_limit"), "source_hash": source_hash(self.family, attempt.entrant),
            "run_id": self.run_id,
        }  # fmt: skip
        peaks = (self.gpu["tflops"].get(case.dtype), self.gpu["gbps"])
        rates = rate_fields(case, source.gates.get(name, "not measured"), source.samples.get(name, []), peaks)
        who = {"version": attempt.entrant.name, "role": attempt.entrant.role, "timing": name}
        if "error_unquantised" in attempt.first:
            shared["error_unquantised"] = attempt.first["error_unquantised"]
        return results.case_fields(case) | who | rates | shared | source.more.get(name, {}) | self.lap


def rate_fields(case: Case, verdict: str, samples: list[float], peaks: tuple[float | None, float | None]) -> dict:
    """gate, times and rates of a record: the last word on whether the time may be shown."""
    names = ("median_ms", "p20_ms", "p80_ms", "tflops", "gbps")
    if verdict == "pass" and not samples:
        verdict = "no samples"
    if verdict == "pass":
        times = timing.summary(samples)
        verdict = gate.too_fast(case, times[0], *peaks) or "pass"
    if verdict != "pass":
        return {"gate": verdict} | dict.fromkeys(names)
    rates = (case.flops() / times[0] / 1e9, case.bytes() / times[0] / 1e6)
    return {"gate": "pass", "samples": len(samples)} | dict(zip(names, (*times, *rates), strict=True))


def ceiling_record(family: str, ceiling: dict, samples: list[float], run_id: str) -> Record:
    """A measured ceiling as a record; the extra field bytes tells the sizes of the read kernel apart."""
    median, p20, p80 = timing.summary(samples)
    per_ms = {"tflops": ceiling["flops"] / 1e9, "gbps": ceiling["bytes"] / 1e6}
    return dict.fromkeys(Record.__annotations__) | {
        "family": family, "version": ceiling["name"], "role": "ceiling", "pass": results.CEILING,
        "dtype": ceiling["dtype"], "variant": OWN, "timing": ceiling["timing"], "gate": "pass", "run_id": run_id,
        "median_ms": median, "p20_ms": p20, "p80_ms": p80, "bytes": ceiling["bytes"] or None, "samples": len(samples),
    } | {name: work / median if work else None for name, work in per_ms.items()}  # fmt: skip


def _brief(family: str, records: list[Record]) -> str:
    """What a cell gave, in one line."""
    field = "tflops" if family == "prefill" else "gbps"
    parts = []
    for record in records:
        if record["timing"] == "eager":
            continue
        name = record["version"] + ("*" if record["variant"] == PARENT else "")
        parts.append(
            f"{name} " + (f"{record[field]:.0f}" if record["gate"] == "pass" else f"RED ({record['gate'][:60]})")
        )
    return ", ".join(parts)


# ---- showing


def show(family: str, folder: pathlib.Path, records: list[Record], earlier: list[Record] | None, out=None) -> int:
    """Table of these records, comparison with earlier ones, charts of all in the folder."""
    try:
        from bench import tables

        if records:
            print(tables.terminal_table(records, family))
        if earlier is not None:
            print(tables.comparison_table(earlier, records, family))
    except ImportError as reason:  # tabulate
        print(f"no tables: {reason}")
    try:
        from bench import charts

        everything, envs = results.load(folder, family), results.load_envs(folder, family)
        paths = charts.draw_charts(everything, envs, out or folder, family)
    except ImportError as reason:  # matplotlib
        print(f"no charts: {reason}")
        return 0
    if paths:
        print(f"charts: {', '.join(path.name for path in paths)} in {_short(out or folder)}")
    return 0


def replay(family: str, args, earlier: list[Record] | None) -> int:
    """Show recorded results again, the newest of each cell. Charts go to --out, or where the records are."""
    records = results.newest(results.load(args.replay, family))
    print(recorded_on(family, args.replay))
    return show(family, args.replay, records, earlier, args.out)


def recorded_on(family: str, folder: pathlib.Path) -> str:
    """One line on where and when a folder's records were measured."""
    envs = results.load_envs(folder, family)
    gpus = ", ".join(sorted({env["gpu"] for env in envs.values()})) or "an unknown GPU"
    dates = sorted({env["date"] for env in envs.values()})
    when = f" {dates[0]} to {dates[-1]}" if len(dates) > 1 else f" {dates[0]}" if dates else ""
    return f"recorded on {gpus}{when}; nothing here was measured now"


def _short(path: pathlib.Path) -> str:
    path = pathlib.Path(path).resolve()
    return str(path.relative_to(results.ROOT)) if path.is_relative_to(results.ROOT) else str(path)
