"""What the records say, as tables: for the terminal, and for README.md and docs/ between markers.

    python -m bench.tables --write README.md docs/*.md    write what is between <!-- table:NAME --> and <!-- /table -->
    python -m bench.tables --check README.md docs/*.md    exit 1 where a file and the records disagree
"""

import argparse
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tabulate import tabulate

from bench import results, targets
from bench.book import (
    FIRST_STEP,
    HALF,
    METRIC,
    OWN,
    PARENT,
    TIMING,
    Book,
    Cell,
    book_of,
    measured_on,
    passed,
    sweeps,
    version_number,
)
from bench.cases import FP8, short
from bench.results import ROOT, Record
from common.lineage import versions_of

SHOWN = "nvidia-h200"  # whose records README.md and docs/ show
FURTHER_PICTURES = {
    "launched": "Time of a decoding step over context length, in a graph and called alone",
    "ragged": "A ragged batch, GB/s of every version",
    "paged": "Caches in pages over contiguous ones",
    "fp8": "FP8 caches over 16 bits",
}
NO_RECORDS = "No records yet."
LEFT = ("idea", "with", "shape", "dtype", "target", "met", "worst shape", "best shape", "16 bits", "FP8", "")


# ---- numbers as text


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def number(value: float | None) -> str:
    """Three digits or so: 1234, 412, 41.2, 4.12."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def duration(ms: float) -> str:
    return f"{ms:.3f} ms" if ms >= 1 else f"{1000 * ms:.1f} us"


def _name(record: Record) -> str:
    return record["version"] + (" (stale)" if record.get("stale") else "")


def _speed(book: Book, record: Record | None) -> str:
    """Median with its p20 and p80: "412 (405 to 418)"; "red" where the gate is, "-" where there is no record."""
    if not passed(record):
        return "red" if record else "-"
    return "{} ({} to {})".format(*map(number, (book.speed(record), *book.spread(record))))


def _over(peer: tuple[float, str] | None) -> str:
    """What Book.best_peer gives: "0.63x fa3"."""
    return f"{times(peer[0])} {peer[1]}" if peer else "-"


def _table(rows: list[dict], fmt: str) -> str:
    """Rows {column: text}; a row may lack columns. Names and sentences are flush left, numbers flush right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    align = ["left" if name in LEFT or name == columns[0] else "right" for name in columns]
    cells = [[row.get(name, "") for name in columns] for row in rows]
    if fmt == "pipe":  # numbers stay on one line, sentences wrap
        fixed = [name not in LEFT for name in columns]
        cells = [[c.replace(" ", "\u00a0") if f else c for c, f in zip(row, fixed, strict=True)] for row in cells]
    return tabulate(cells, columns, tablefmt=fmt, colalign=align, disable_numparse=True)


# ---- the terminal


def terminal_table(records: Iterable[Record], family: str, fmt: str = "simple") -> str:
    """Every shape as a table, versions first, then peers, fastest first; then gains, peers, the ladder, launches.

    A red gate gives its reason, and no time.
    """
    book = book_of(records, family)
    if not book.records:
        return NO_RECORDS
    further = (gains_table, peers_table, ladder_table) + ((launched_table,) if family == "decoding" else ())
    summary = [make(book, fmt) for make in further]
    return "\n\n".join([*(_cell_table(book, cell, fmt) for cell in book.cells), *filter(None, summary)])


def _cell_table(book: Book, cell: Cell, fmt: str) -> str:
    peers = sorted(book.peers, key=lambda name: -(book.speed(book.latest(name, cell)) or 0))
    rows, notes = [], []
    for name in [*book.versions, *peers]:
        record, alone = book.latest(name, cell), book.latest(name, cell, PARENT)
        if record:
            rows.append(_cell_row(book, cell, record))
        for found, how in ((record, ""), (alone, ", with its parent's tiles")):
            if found and not passed(found):
                notes.append(f"{name}{how}: red, {found['gate']}")
    return "\n".join([cell.label(book.family), _table(rows, fmt), *notes])


def _cell_row(book: Book, cell: Cell, record: Record) -> dict:
    name, green = record["version"], passed(record)
    low, high = map(number, book.spread(record)) if green else ("", "")
    row = {
        "": _name(record),
        book.unit: number(book.speed(record)) if green else "red",
        "p20 to p80": f"{low} to {high}" if green else "",
        "time": duration(record["median_ms"]) if green else "",
    }
    if book.family == "decoding":
        launched = book.latest(name, cell, timing="eager")
        row["launched"] = duration(launched["median_ms"]) if green and passed(launched) else ""
    row["of ceiling"] = percent(book.of_ceiling(record)) if green else ""
    if record["role"] == "version":
        base = book.parents.get(name)
        for column, variant in (("idea alone", PARENT), ("own tiles", OWN)):
            row[column] = times(book.ratio(name, base, cell, variant)) if base and green else ""
    return row | {
        "error": small(record.get("error")),
        "limit": small(record.get("error_limit")),
        "peak MB": number(record.get("peak_mem_mb")),
    }


def ladder_table(book: Book, fmt: str, versions: dict | None = None) -> str | None:
    """A row per version at the headline shape with its gain over its parent across all 16-bit shapes; then the peers.

    versions: {"v1": Version} adds ideas, links to the files, and versions that were not measured.
    """
    cell, versions = book.headline(), versions or {}
    if cell is None:
        return None
    rows, counted = [], set()
    for name in sorted({*book.versions, *versions}, key=version_number):
        record, version = book.latest(name, cell), versions.get(name)
        row = {"": (_link(version) if version else name) + (" (stale)" if book.is_stale(name) else "")}
        row |= {"idea": version.idea} if version else {}
        red = record and not passed(record)
        row[book.unit] = f"red: {record['gate']}" if red else number(book.speed(record))
        row["of ceiling"] = percent(book.of_ceiling(record))
        row["over the best peer"] = _over(book.best_peer(name, cell))
        base = book.parents.get(name)
        alone, own = book.ratios(name, base, PARENT), book.ratios(name, base or FIRST_STEP)
        counted |= own.keys()
        row["gain, idea alone"] = times(geomean(alone.values()))
        row["gain, own tiles"] = times(geomean(own.values())) + (f" over {FIRST_STEP}" if own and not base else "")
        rows.append(row)
    title = f"{cell.label(book.family)}."
    if counted:
        title += f" Gains over the version before: geometric mean of up to {len(counted)} 16-bit shapes."
    return "\n\n".join([title, _table(rows, fmt), *_peers_line(book, cell)])


def _peers_line(book: Book, cell: Cell) -> list[str]:
    """["There: fa3 605, cudnn 590; ceiling 770 TFLOP/s."], fastest first; [] where there is neither."""
    speeds = {name: book.speed(book.latest(name, cell)) for name in book.peers}
    speeds = sorted(((speed, name) for name, speed in speeds.items() if speed), reverse=True)
    parts = [", ".join(f"{name} {number(speed)}" for speed, name in speeds)] if speeds else []
    parts += [f"ceiling {ceiling}"] if (ceiling := _ceiling(book, cell)) != "-" else []
    return [f"At this shape: {'; '.join(parts)} {book.unit}."] if parts else []


def _link(version) -> str:
    return f"[{version.name}]({version.path.relative_to(ROOT).as_posix()})"


def peers_table(book: Book, fmt: str, dtypes: tuple = HALF) -> str | None:
    """Each version over the strongest peer of the same run and shape: on average, worst and best shape; and the best of
    all versions, shape by shape."""
    cells = [cell for cell in book.cells if cell.dtype in dtypes]
    ratios = {name: {cell: pair for cell in cells if (pair := book.best_peer(name, cell))} for name in book.versions}
    ratios = {name: found for name, found in ratios.items() if found}
    if len(ratios) > 1:
        measured = dict.fromkeys(cell for found in ratios.values() for cell in found)
        ratios["best of ours"] = {c: max(found[c] for found in ratios.values() if c in found) for c in measured}
    rows = []
    for name, found in ratios.items():
        stale = any(map(book.is_stale, [name] if name in book.versions else book.versions))
        row = {"": name + (" (stale)" if stale else "")}
        row["geometric mean"] = f"{times(geomean(ratio for ratio, _ in found.values()))} of {len(found)} shapes"
        for column, pick in (("worst shape", min), ("best shape", max)):
            at = pick(found, key=lambda cell: found[cell][0])
            row[column] = f"{_over(found[at])}: {at.label(book.family)}"
        rows.append(row)
    title = f"Speed over the strongest peer of the same run and shape, {' and '.join(dtypes)}, over all shapes."
    return f"{title}\n\n{_table(rows, fmt)}" if rows else None


def gains_table(book: Book, fmt: str, dtypes: tuple = HALF) -> str | None:
    """What each step gained: on average, at the shape where it gained least, and where most."""
    rows = []
    for name in book.versions:
        base = book.parents.get(name) or FIRST_STEP
        for variant in (PARENT, OWN):
            found = book.ratios(name, base, variant, dtypes)
            if not found:
                continue
            row = {"": f"{name} over {base}" + (" (stale)" if book.is_stale(name) or book.is_stale(base) else "")}
            row["with"] = "parent's tiles: the idea alone" if variant == PARENT else "its own tiles"
            row["geometric mean"] = f"{times(geomean(found.values()))} of {len(found)} shapes"
            for column, pick in (("worst shape", min), ("best shape", max)):
                at = pick(found, key=found.get)
                row[column] = f"{times(found[at])}: {at.label(book.family)}"
            rows.append(row)
    return f"Gain of each step, {' and '.join(dtypes)}.\n\n{_table(rows, fmt)}" if rows else None


def comparison_table(old: Iterable[Record], new: Iterable[Record], fmt: str = "simple") -> str:
    """What got slower or faster from the old records to the new, beyond noise, slowest first.

    results.changes decides what noise is. How the peers changed is said first: that is what the machine did.
    """
    both = [change for change in results.changes(old, new) if change.new["role"] != "ceiling"]
    if not both:
        return "The two runs have no measurement in common."
    family = both[0].new["family"]
    before, after = (Book([getattr(change, when) for change in both], family) for when in ("old", "new"))
    order = {"broke": -math.inf, "mended": math.inf}
    moved = sorted((c for c in both if c.verdict != "same"), key=lambda c: order.get(c.verdict, c.ratio))
    lines = [f"{len(both)} measurements in common, {len(both) - len(moved)} of them the same within noise."]
    peers = [change.ratio for change in both if change.new["role"] == "peer" and change.ratio]
    if peers:
        lines.append(f"The peers changed by {100 * (geomean(peers) - 1):+.1f}% on average: that much is the machine.")
    rows = []
    for change in moved:
        how = [change.new[name] for name, usual in (("variant", OWN), ("timing", TIMING[family]))
               if change.new[name] not in (usual, None)]  # fmt: skip
        rows.append({
            "": ", ".join([change.new["version"], *how]),
            "shape": Cell.of(change.new).label(family),
            f"old {before.unit}": _speed(before, change.old),
            f"new {after.unit}": _speed(after, change.new),
            "change": f"{100 * (change.ratio - 1):+.1f}%" if change.ratio else change.verdict,
        })  # fmt: skip
        if change.verdict == "broke":
            rows[-1]["change"] = f"red: {change.new['gate']}"
    return "\n".join(lines + (["", _table(rows, fmt)] if rows else []))


# ---- README.md and docs/


def cells_table(book: Book) -> str | None:
    """Every speed. Prefill: a table for each group of shapes that differ in length alone, a row per provider; decoding,
    whose shapes have little in common: a row per shape."""
    names = [*book.versions, *book.peers]
    if book.family == "decoding":
        rows = []
        for cell in book.cells:
            row = {f"{book.unit} of the kernels": cell.label(book.family)} | {n: _bare(book, n, cell) for n in names}
            rows.append(row | {"ceiling": _ceiling(book, cell)})
        return _table(rows, "pipe") if rows else None
    parts = []
    for sweep, cells in sweeps(book.cells).items():
        title = f"{sweep.label(book.family)}, {book.unit}"
        rows = [{title: n} | {f"S={short(c.seqlen_k)}": _bare(book, n, c) for c in cells} for n in names]
        rows = [row for row in rows if set(row.values()) - {row[title]} != {"-"}]
        ceilings = {title: "ceiling"} | {f"S={short(c.seqlen_k)}": _ceiling(book, c) for c in cells}
        parts.append(_table([*rows, ceilings], "pipe"))
    return "\n\n".join(parts) or None


def _bare(book: Book, name: str, cell: Cell) -> str:
    record = book.latest(name, cell)
    if record and not passed(record):
        return "red"
    return number(book.speed(record)) + (" (stale)" if record and record.get("stale") else "")


def _ceiling(book: Book, cell: Cell) -> str:
    records = filter(None, (book.latest(name, cell) for name in [*book.versions, *book.peers]))
    ceiling = next(filter(None, map(book.ceiling, records)), None)
    return number(ceiling and ceiling[book.metric])


def fp8_table(book: Book) -> str | None:
    """FP8 at the headline shape, each provider beside its own 16 bits: speed, gain, error and the gate's limit."""
    cell, rows = book.headline(), []
    for name in [*book.versions, *book.peers] if cell else []:
        for dtype in FP8:
            at = cell._replace(dtype=dtype)
            record = book.latest(name, at)
            if record is None:
                continue
            half = book.runs(name, cell).get(record["run_id"])
            peer = book.best_peer(name, at) if record["role"] == "version" else None
            both = passed(record) and passed(half)
            rows.append({
                "": _name(record),
                "dtype": dtype,
                book.unit: f"red: {record['gate']}" if not passed(record) else _speed(book, record),
                f"over its own {cell.dtype}": times(book.speed(record) / book.speed(half)) if both else "-",
                "over the strongest peer": _over(peer),
                "relative error": small(record.get("error")),
                "limit": small(record.get("error_limit")),
            })  # fmt: skip
    return f"{cell.label(book.family).replace(cell.dtype, 'FP8', 1)}.\n\n{_table(rows, 'pipe')}" if rows else None


def targets_table(book: Book) -> str | None:
    """Decoding's targets, then every shape beside the best peer of the same run."""
    if not book.records:
        return None
    show = {"x": times, "%": percent, "us": lambda value: "-" if value is None else f"{value:.0f} us"}
    rows = []
    for target in targets.targets(book, geomean):
        text, worst = show[target.unit], target.worst
        rows.append({
            "target": target.what,
            "wanted": f"{'at least' if target.least else 'at most'} {text(target.wanted)}",
            "measured": text(target.value),
            "met": target.met,
            "shapes": str(len(target.values)) + (f" of {target.shapes}" if target.shapes else ""),
            "worst shape": f"{text(target.values[worst])}: {worst.label('decoding')}" if worst else "",
        })  # fmt: skip
    shapes = []
    for row in targets.shape_rows(book):
        shapes.append({
            "shape": row.cell.label("decoding"),
            "best of ours, GB/s": f"{_name(row.ours)} {number(book.speed(row.ours))}" if row.ours else "no record yet",
            "best peer, GB/s": f"{row.peer['version']} {number(book.speed(row.peer))}" if row.peer else "-",
            "over the best peer": times(row.ratio),
            "of the read ceiling": percent(row.of_ceiling),
        })  # fmt: skip
    return f"{_table(rows, 'pipe')}\n\n{_table(shapes, 'pipe')}"


def launched_table(book: Book, fmt: str) -> str | None:
    """What the newest version's calls take beyond the kernel, shape by shape; None where it was not measured."""
    found = targets.launches(book)
    rows = []
    for launch in found:
        row = {"shape": launch.cell.label("decoding"), "kernel, us": f"{launch.name} {number(launch.kernel)}"}
        for what, value in (("call", launch.call), ("flash_decoding", launch.plain), ("plan", launch.plan)):
            row[what] = f"{number(value)} (+{number(value - launch.kernel)})" if value else "-"
        rows.append(row)
    floor = next((c["median_ms"] for c in reversed(book.given) if c["version"] == "launch"), None)
    about = f" PyTorch's fill of one number takes {number(1000 * floor)} us." if floor else ""
    title = "Microseconds of one call alone, from the host's start until the GPU is done; in brackets beyond its kernel"
    return f"{title}.{about}\n\n{_table(rows, fmt)}" if rows else None


def machine_table(envs: dict) -> str | None:
    """Where the numbers come from, a row for runs that are alike; `runs` counts them."""
    wanted = ("date", "gpu", "driver", "torch", "triton", "cuda", "cudnn")
    rows = {}
    for _, env in sorted(envs.items()):
        row = {name: str(env.get(name) or "-") for name in wanted}
        row |= {"watts at most": number(env.get("power"))}
        row |= {"SM MHz at most": number((env.get("clocks") or {}).get("sm_max_mhz"))}
        rows.setdefault(tuple(row.values()), []).append(row)
    return _table([alike[0] | {"runs": str(len(alike))} for alike in rows.values()], "pipe") if rows else None


def _ideas(family: str) -> str:
    """What stands in the ladder's place before anything was measured."""
    rows = [{"": _link(version), "idea": version.idea} for version in versions_of(family)]
    return f"{NO_RECORDS}\n\n{_table(rows, 'pipe')}"


class Shown(NamedTuple):
    """The records that README and docs show."""

    book: Book
    envs: dict
    versions: dict  # {"v1": Version}

    @property
    def measured(self) -> str:
        """GPU and date."""
        return measured_on(self.envs, (record["run_id"] for record in self.book.records)) or SHOWN

    def ladder(self) -> str | None:
        table = ladder_table(self.book, "pipe", self.versions)
        return table and f"{self.measured}: {table}"

    def picture(self) -> str | None:
        path = results.RESULTS / SHOWN / f"{self.book.family}.png"
        what = f"{self.book.unit} of every {self.book.family} version over sequence length, {self.measured}"
        return f"![{what}]({path.relative_to(ROOT).as_posix()})" if path.exists() else None

    def further_pictures(self) -> str | None:
        """Decoding's other charts, for pages in docs/."""
        lines = []
        for name, what in FURTHER_PICTURES.items():
            path = results.RESULTS / SHOWN / f"decoding-{name}.png"
            if path.exists():
                lines.append(f"![{what}, {self.measured}](../{path.relative_to(ROOT).as_posix()})")
        return "\n\n".join(lines) or None


def _shown(make: Callable[[Shown], str | None], family: str) -> Callable[[], str | None]:
    def generate():
        folder = results.RESULTS / SHOWN
        records = results.load(folder, family)
        versions = {version.name: version for version in versions_of(family)}
        return make(Shown(book_of(records, family), results.load_envs(folder, family), versions)) if records else None

    return generate


def _machine() -> str | None:
    folder = results.RESULTS / SHOWN
    return machine_table({run: env for family in METRIC for run, env in results.load_envs(folder, family).items()})


TABLES: dict[str, Callable[[], str | None]] = {
    "machine": _machine,
    "decoding-targets": _shown(lambda shown: targets_table(shown.book), "decoding"),
    "decoding-launched": _shown(lambda shown: launched_table(shown.book, "pipe"), "decoding"),
    "decoding-pictures": _shown(Shown.further_pictures, "decoding"),
    "prefill-fp8": _shown(lambda shown: fp8_table(shown.book), "prefill"),
    "prefill-peers-fp8": _shown(lambda shown: peers_table(shown.book, "pipe", FP8), "prefill"),
}
for _family in METRIC:
    TABLES |= {
        _family: lambda family=_family: _shown(Shown.ladder, family)() or _ideas(family),
        f"{_family}-picture": _shown(Shown.picture, _family),
        f"{_family}-gains": _shown(lambda shown: gains_table(shown.book, "pipe"), _family),
        f"{_family}-peers": _shown(lambda shown: peers_table(shown.book, "pipe"), _family),
        f"{_family}-cells": _shown(lambda shown: cells_table(shown.book), _family),
    }
_MARKED = re.compile(r"<!-- table:(?P<name>\S+) -->\n(?P<body>.*?)<!-- /table -->", re.DOTALL)


def fill(text: str, tables: dict[str, Callable[[], str | None]] = TABLES) -> str:
    """`text` with every marked table generated anew. ValueError for an unknown name or a marker that is not closed."""
    opened, closed = text.count("<!-- table:"), text.count("<!-- /table -->")
    if not opened == closed == len(_MARKED.findall(text)):
        raise ValueError("every line <!-- table:NAME --> needs a line <!-- /table --> of its own")

    def generate(match: re.Match) -> str:
        name = match["name"]
        if name not in tables:
            raise ValueError(f"table {name!r} does not exist; there are {', '.join(tables)}")
        return f"<!-- table:{name} -->\n\n{tables[name]() or NO_RECORDS}\n\n<!-- /table -->"

    return _MARKED.sub(generate, text)


def gpu_info() -> str:
    """The GPU found here and, for each version, whether it runs on it."""
    from common.hardware import NoGPU, detect_gpu

    try:
        gpu = detect_gpu()
    except NoGPU as reason:
        return str(reason)[:1].upper() + str(reason)[1:]
    rows = []
    for family in METRIC:
        for version in versions_of(family):
            row = {"family": family, "": version.label}
            rows.append(row | {n: version.why_not(gpu, d) or "runs" for n, d in (("16 bits", "fp16"), ("FP8", "e4m3"))})
    peaks = ", ".join(f"{dtype} {rate:g}" for dtype, rate in gpu.tflops.items()) or "unknown"
    return "\n".join([
        f"{gpu.name}, {gpu.arch}: {gpu.sm_count} SMs, {gpu.shared_memory // 1024} KiB of shared memory a block",
        f"The vendor's dense peaks: {peaks} TFLOP/s; {gpu.gbps or 'unknown'} GB/s",
        "",
        _table(rows, "simple"),
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description="The tables of README.md and docs/.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", nargs="+", metavar="FILE", type=pathlib.Path, help="write the tables into files")
    action.add_argument("--check", nargs="+", metavar="FILE", type=pathlib.Path, help="exit 1 where they are old")
    action.add_argument("--gpu-info", action="store_true", help="the GPU found here, and which versions run on it")
    args = parser.parse_args(argv)
    if args.gpu_info:
        print(gpu_info())
        return 0
    differ = False
    for path in args.write or args.check:
        try:
            old = path.read_text()
            new = fill(old)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        if new != old and args.write:
            path.write_text(new)
            print(f"{path}: written")
        elif new != old:
            print(f"{path}: differs from the records; `make readme` writes it")
            differ = True
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
