"""What changed between two versions: ideas, source, machine code, and what it bought.

gather(Request("prefill", "v1", "v2")) gives one dict of plain values, which diff_versions.py and the page show. It is
cached by the content of every file that it depends on.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
from typing import TYPE_CHECKING, NamedTuple

from bench import machine_code
from bench.machine_code import ROOT
from bench.source_diff import CONTEXT, Source, aligned, changed_share

if TYPE_CHECKING:
    from bench.book import Book
    from common.lineage import Version

DEFAULT_ARCH = "sm_90"
RESULTS = ROOT / "results"


class Request(NamedTuple):
    """Which two versions, and the case that their machine code is shown for. old None: the parent; arch None: that of
    the recorded GPU; stage: whose text to compare too, new with the tiles of old unless own_tiles.
    """

    family: str
    old: str | None
    new: str
    arch: str | None = None
    dtype: str | None = None  # fp16, e4m3 where the newer version takes FP8 alone
    head_dim: int | None = None
    causal: bool = False
    device: str | None = None
    stage: str | None = None
    own_tiles: bool = False


# ---- stages of compilation, as text


def normalised(stage: str, text: str) -> list[str]:
    """A stage's lines without what only numbers things: registers, addresses, labels, source locations."""
    lines = [_NORMALISE[stage](line) for line in _without_debug_sections(stage, text)]
    return [line.rstrip() for line in lines if line and line.strip()]


def _mlir(line: str) -> str:
    if line.startswith("#loc") or line.strip().startswith("//"):
        return ""
    line = re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)", "", line)
    line = re.sub(r"%(\w*?[A-Za-z]\w*?)_\d+\b", r"%\1", line)
    return re.sub(r"%\d+", "%", line)


def _llvm(line: str) -> str:
    if line.startswith(("!", ";", "attributes #", "source_filename")) or "llvm.dbg" in line:
        return ""
    line = re.sub(r",? ![\w.]+(?: ![\w.]+)?", "", line)
    line = re.sub(r";.*", "", line)
    return re.sub(r"([%#@][A-Za-z.$_]*)\d+(?:\.i)*", r"\1", line)


def _ptx(line: str) -> str:
    line = re.sub(r"//.*", "", line)
    if re.match(r"\s*\.(loc|file)\b|\$L__(tmp|func|debug)|Ltmp|\$?L?__?tmp", line):
        return ""
    line = re.sub(r"\$L__\w+", "$L", line)
    return re.sub(r"(%[a-z]+)\d+", r"\1", line)


def _sass(line: str) -> str:
    match = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)[\s;]*$", line)
    if not match:
        return ""
    text = re.sub(r"`?\(?\.L_x_\d+\)?", ".L", match[1])
    text = re.sub(r"\b(U?[RP])\d+(?:\.reuse)?\b", r"\1", text)
    text = re.sub(r"\bc\[0x\w+\]\[0x\w+\]", "c[]", text)
    return re.sub(r"\b(SB|B)\d+\b", r"\1", text)


def _amdgcn(line: str) -> str:
    line = line.split(";")[0]
    if re.match(r"\s*\.(?!LBB)", line):
        return ""
    line = re.sub(r"\.LBB\w+", ".LBB", line)
    line = re.sub(r"\b([sva])\[\d+:\d+\]", r"\1[]", line)
    return re.sub(r"\b([sva])\d+\b", r"\1", line)


_NORMALISE = {"ttir": _mlir, "ttgir": _mlir, "llir": _llvm, "ptx": _ptx, "sass": _sass, "amdgcn": _amdgcn}


def _without_debug_sections(stage: str, text: str) -> list[str]:
    lines = text.splitlines()
    if stage == "ptx":
        end = next((i for i, line in enumerate(lines) if re.match(r"\s*\.section\s+\.debug", line)), len(lines))
        lines = lines[:end]
    if stage == "amdgcn":
        end = next((i for i, line in enumerate(lines) if line.startswith(".Lfunc_end")), len(lines))
        lines = lines[:end]
    return lines


def stage_diff(stage: str, old: list[machine_code.Compiled], new: list[machine_code.Compiled]) -> list[str]:
    """Unified diff of one stage of the versions' kernels, first with first and so on."""
    diff = []
    for before, after in itertools.zip_longest(old, new):
        texts, names = [], []
        for compiled in (before, after):
            name = "amdgcn" if stage in ("ptx", "sass") and compiled and "amdgcn" in compiled.text else stage
            texts.append(normalised(name, compiled.stage(stage)) if compiled else [])
            names.append(f"{compiled.kernel} {name}" if compiled else "(no kernel)")
        diff += difflib.unified_diff(*texts, *names, n=CONTEXT, lineterm="")
    return diff


# ---- machine code


def change(old: float | None, new: float | None) -> str:
    """ "-67%", "=", "new", "gone"; empty where one is no number."""
    if old is None or new is None:
        return ""
    if old == new:
        return "="
    if not old or not new:
        return "new" if new else "gone"
    return f"{100 * (new / old - 1):+.0f}%"


def machine_code_table(columns: dict[str, list[machine_code.Compiled]], family: str) -> dict:
    """{"columns": names, "rows": [{"what", "shown": one a column, "change": of each further column from the first}]}"""
    summaries = [machine_code.summary(kernels[0]) for kernels in columns.values()]
    rows = [
        {"what": row.what, "shown": row.shown, "change": [change(row.values[0], value) for value in row.values[1:]]}
        for row in machine_code.side_by_side(summaries, machine_code.UNIT[family])
    ]
    return {"columns": list(columns), "rows": rows}


# ---- gain


def gains(book: Book | None, old: str, new: str) -> dict[str, dict | None]:
    """What the records say of `new` over `old`, 16 bits: {"idea alone": ..., "own tiles": ..., "FP8": ...,
    "FP8 over fp16": ...}, each None without records. The idea alone is measured with the parent's tiles, so it is known
    against the parent only; the last is FP8 against the same version's fp16.
    """
    if book is None:
        return dict.fromkeys(("idea alone", "own tiles", "FP8", "FP8 over fp16"))
    from bench.book import HALF, OWN, PARENT
    from bench.cases import FP8

    is_step = book.parents.get(new) == old
    half = {cell: book.latest(new, cell._replace(dtype="fp16")) for cell in book.cells if cell.dtype in FP8}
    return {
        "idea alone": _gain(book, new, old, PARENT, HALF) if is_step else None,
        "own tiles": _gain(book, new, old, OWN, HALF),
        "FP8": _gain(book, new, old, OWN, FP8),
        "FP8 over fp16": _summed(book, [(cell, book.latest(new, cell), base) for cell, base in half.items()]),
    }


def _gain(book: Book, new: str, old: str, variant: str, dtypes: tuple) -> dict | None:
    pairs = [(cell, book.pair(new, old, cell, variant)) for cell in book.cells if cell.dtype in dtypes]
    return _summed(book, [(cell, *both) for cell, both in pairs if both])


def _summed(book: Book, measured: list[tuple]) -> dict | None:
    """Of (cell, new record, old record): the geometric mean, the least and most, where it hurt, and every cell."""
    from bench.book import passed
    from bench.results import NOISE

    cells = []
    for cell, new, old in measured:
        if not (passed(new) and passed(old) and new["run_id"] == old["run_id"]):
            continue
        (slow, fast), (old_slow, old_fast) = book.spread(new), book.spread(old)
        cells.append({
            "label": cell.label(book.family), "dtype": cell.dtype, "head_dim": cell.head_dim, "causal": cell.causal,
            "seqlen": cell.seqlen_k, "batch": cell.batch, "heads": cell.heads,
            "old": book.speed(old), "new": book.speed(new), "ratio": book.speed(new) / book.speed(old),
            "low": slow / old_fast, "high": fast / old_slow, "stale": bool(new.get("stale") or old.get("stale")),
        })  # fmt: skip
    if not cells:
        return None
    ordered = sorted(cells, key=lambda cell: cell["ratio"])
    return {
        "mean": math.exp(sum(math.log(cell["ratio"]) for cell in cells) / len(cells)),
        "least": ordered[0], "most": ordered[-1], "stale": any(cell["stale"] for cell in cells),
        "hurt": [cell for cell in ordered if cell["ratio"] < 1 - NOISE and cell["high"] < 1], "cells": cells,
    }  # fmt: skip


# ---- everything


def gather(request: Request) -> dict:
    """All of it as plain values. ValueError names a family, version, architecture, stage or device that does not exist.

    Cached by the content of every file that it depends on, so that a second answer loads neither torch nor triton.
    """
    path = _cache_path(request)
    if path.exists():
        return json.loads(gzip.decompress(path.read_bytes()))
    found = Gatherer(request.family, request.device).pair(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(gzip.compress(json.dumps(found).encode(), 5))
    temporary.replace(path)
    return found


def _cache_path(request: Request) -> pathlib.Path:
    files = [*machine_code.kernel_sources(request.family), *sorted((ROOT / "bench").glob("*.py"))]
    files += sorted(RESULTS.glob(f"*/{request.family}.*json*"))
    folder = machine_code.cache_folder()
    files += [path for path in [folder / "tiles.json"] if path.exists()]
    key = machine_code.digest(request, importlib.metadata.version("triton"), *map(str, files), *files)
    return folder / "diffs" / f"{key}.json.gz"


class Gatherer:
    """One family's versions and records, loaded once for any number of pairs."""

    def __init__(self, family: str, device: str | None = None):
        from bench import book, results
        from common.lineage import versions_of

        self.family, self.versions = family, {version.name: version for version in versions_of(family)}
        self._kernels: dict[machine_code.Case, list | str] = {}
        self.device = _device(device)
        records = results.load(RESULTS / self.device, family) if self.device else []
        self.book = book.book_of(records, family) if records else None
        self.unit = book.METRIC[family][1]
        envs = results.load_envs(RESULTS / self.device, family) if records else {}
        self.measured_on = book.measured_on(envs, {r["run_id"] for r in records}) or self.device
        self.sources = {name: Source(version.path.read_text()) for name, version in self.versions.items()}

    @property
    def arch(self) -> str:
        """The architecture of the recorded GPU."""
        from common.hardware import KNOWN

        return next((arch for arch, gpu in KNOWN.items() if gpu.slug == self.device), DEFAULT_ARCH)

    def find(self, name: str) -> Version:
        from common.lineage import find_version

        return find_version(self.family, name)

    def complete(self, request: Request) -> Request:
        """With versions by their names, and the architecture; ValueError where something does not exist."""
        new = self.find(request.new)
        if request.old is None and new.parent is None:
            raise ValueError(f"{new.name} is the first of {self.family} and has no parent: name two versions")
        old, arch = self.find(request.old or new.parent), request.arch or self.arch
        machine_code.gpu_of(arch)
        if request.stage not in (None, *machine_code.STAGES):
            raise ValueError(f"stage {request.stage!r} does not exist; there are {', '.join(machine_code.STAGES)}")
        dtype = request.dtype or ("fp16" if new.half else "e4m3")
        return request._replace(old=old.name, new=new.name, arch=arch, dtype=dtype)

    def kernels(self, case: machine_code.Case) -> list[machine_code.Compiled] | str:
        """The case's own kernels, first the one with the main loop; or one line why there are none."""
        if case not in self._kernels:
            [result] = machine_code.compile_cases([case])
            failed = isinstance(result, machine_code.CompileError)
            self._kernels[case] = str(result) if failed else [compiled for compiled in result if compiled.own]
        return self._kernels[case]

    def prepare(self, requests: list[Request]) -> None:
        """Compile whatever these pairs need at once, which is quicker where each time takes another process."""
        needed = []
        for request in map(self.complete, requests):
            old, new = (self.case(name, request) for name in (request.old, request.new))
            needed += [old, new, self.alone(old, new) or new]
        machine_code.compile_cases(dict.fromkeys(needed))

    def pair(self, request: Request) -> dict:
        request = self.complete(request)
        old, new = self.sources[request.old], self.sources[request.new]
        return {
            "family": self.family,
            "old": self.about(request.old),
            "new": self.about(request.new),
            "source": {
                "rows": aligned(old, new),
                "code_rows": aligned(old, new, code_only=True),
                "share": changed_share(old, new),
            },
            "machine_code": self.machine_code(request),
            "gain": self.gain(request.old, request.new),
        }

    def about(self, name: str) -> dict:
        version, source = self.versions[name], self.sources[name]
        parent = f"v{version.parent}" if version.parent else None
        return {
            "name": name, "label": version.label, "title": version.title, "idea": version.idea, "parent": parent,
            "path": version.path.relative_to(ROOT).as_posix(), "hash": version.source_hash, "header": version.header,
            "lines": source.lines, "code": source.code, "notes": source.notes,
        }  # fmt: skip

    def machine_code(self, request: Request) -> dict:
        """{"case", "table", "notes": [why a column is missing], "stage": diff lines where a stage was asked for}

        The columns are old, new with the tiles of old (the idea alone), and new, as the measured gains are.
        """
        old, new = (self.case(name, request) for name in (request.old, request.new))
        columns = {request.old: self.kernels(old), request.new: self.kernels(new)}
        if alone := self.alone(old, new):
            last = columns.pop(request.new)
            columns |= {f"{request.new}, tiles of {request.old}": self.kernels(alone), request.new: last}
        found = {name: kernels for name, kernels in columns.items() if not isinstance(kernels, str)}
        staged = [name for name in found if not (request.own_tiles and "tiles of" in name)][:2] if request.stage else []
        return {
            "case": new.label(),
            "triton": importlib.metadata.version("triton"),
            "notes": [kernels for kernels in columns.values() if isinstance(kernels, str)],
            "table": machine_code_table(found, self.family) if found else None,
            "staged": staged,
            "stage": stage_diff(request.stage, *(found[name] for name in staged)) if len(staged) == 2 else None,
        }

    @staticmethod
    def alone(old: machine_code.Case, new: machine_code.Case) -> machine_code.Case | None:
        """The newer version with the tiles of the older one; None where those are the same, or one cannot run there."""
        tiles, own = machine_code.own_tiles(old), machine_code.own_tiles(new)
        return new._replace(tiles=tiles) if tiles and own and tiles != own else None

    def case(self, name: str, request: Request) -> machine_code.Case:
        shape = {"dtype": request.dtype, "causal": request.causal and self.family == "prefill"}
        shape |= {"head_dim": request.head_dim} if request.head_dim else {}
        return machine_code.case_for(self.versions[name], request.arch, **shape)

    def gain(self, old: str, new: str) -> dict:
        """gains(), with what they are measured in and on, and a note where there are none."""
        measured = gains(self.book, old, new)
        note = None if any(measured.values()) else self.why_no_gain(old, new)
        return {"unit": self.unit, "measured_on": self.measured_on, "note": note, **measured}

    def first_gain(self, name: str) -> dict:
        """gain() of a version without a parent: over eager PyTorch, which writes the scores."""
        from bench.book import FIRST_STEP, HALF, OWN

        found = _gain(self.book, name, FIRST_STEP, OWN, HALF) if self.book else None
        note = None if found else self.why_no_gain(name, FIRST_STEP)
        return {"unit": self.unit, "measured_on": self.measured_on, "note": note, "own tiles": found}

    def why_no_gain(self, old: str, new: str) -> str:
        """One line where there is nothing measured to show."""
        script = f"run_{self.family}_bench.py"
        if self.book is None:
            return f"No records of {self.family} yet: {script} on a GPU writes them."
        missing = [name for name in (old, new) if name not in self.book.versions + self.book.peers]
        if missing:
            return f"No records of {' and '.join(missing)}; there are some of {', '.join(self.book.versions)}."
        return f"No run has both {old} and {new} at one shape, with green gates."


def _device(device: str | None) -> str | None:
    """Folder of the records shown: the one asked for, else the H200's or the first; None where there is none."""
    found = {path.parent.name for path in RESULTS.glob("*/*.jsonl")}
    found = sorted(found, key=lambda name: (name != "nvidia-h200", name))
    if device is not None and device not in found:
        raise ValueError(f"there are no records of {device!r}; there are {', '.join(found) or 'none of any GPU'}")
    return device or (found[0] if found else None)
