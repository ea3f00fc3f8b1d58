"""What decoding is to reach, and what the records say of it: every shape beside the best peer of the same run, and the
worst shape of each target. Nothing here is typed in but the targets themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.book import HALF, OWN, PLAIN, PLAN, Book, Cell, kv_bytes, passed
from bench.cases import DECODING_SHAPES, FP8
from bench.results import Record

LARGE, SMALL = 268e6, 40e6  # bytes of keys and values in 16 bits


class Row(NamedTuple):
    """One shape: the best version and the best peer of one run, the ratio of their speeds, the share of the ceiling.

    The run is the newest with a version and a peer, else with a version.
    """

    cell: Cell
    ours: Record | None
    peer: Record | None
    ratio: float | None
    of_ceiling: float | None


class Target(NamedTuple):
    """What is wanted of which shapes, with the value of each shape that was measured. least: or else at most."""

    what: str
    wanted: float
    unit: str  # "x", "%" (of shares) or "us"
    values: dict[Cell, float]
    least: bool = True
    mean: Callable[[Iterable[float]], float] | None = None  # of all shapes, where not each one has to reach it
    shapes: int | None = None  # how many there are to measure, where that is known

    @property
    def worst(self) -> Cell | None:
        pick = min if self.least else max
        return pick(self.values, key=self.values.get, default=None)

    @property
    def value(self) -> float | None:
        """What is compared with the wanted; None without records."""
        if not self.values:
            return None
        return self.mean(self.values.values()) if self.mean else self.values[self.worst]

    @property
    def met(self) -> str:
        """ "yes", "no", "so far" where shapes are missing, or that there is no record yet."""
        if self.value is None:
            return "no record yet"
        if (self.value < self.wanted) if self.least else (self.value > self.wanted):
            return "no"
        return "yes" if len(self.values) >= (self.shapes or 0) else "so far"


def wanted_cells(dtypes: Iterable[str] = HALF) -> list[Cell]:
    """The shapes of the comparison with the peers."""
    found = []
    for dtype in dtypes:
        for batch, heads_q, heads_kv, seqlen_k, head_dim in DECODING_SHAPES:
            found.append(Cell(dtype, head_dim, False, seqlen_k, 1, batch, heads_q, heads_kv, layout="bshd"))
    return found


def shape_rows(book: Book) -> list[Row]:
    """A row per shape and dtype, measured or not."""
    return [_row(book, cell) for cell in wanted_cells()]


def _row(book: Book, cell: Cell) -> Row:
    runs = [run for run in _runs(book, cell) if best(book, cell, run, book.versions)]
    run = max([run for run in runs if best(book, cell, run, book.peers)] or runs, default=None)
    ours, peer = (best(book, cell, run, names) for names in (book.versions, book.peers))
    ratio = book.speed(ours) / book.speed(peer) if ours and peer else None
    return Row(cell, ours, peer, ratio, book.of_ceiling(ours))


def _runs(book: Book, cell: Cell) -> set[str]:
    return {run for name in (*book.versions, *book.peers) for run in book.runs(name, cell)}


def best(book: Book, cell: Cell, run: str | None, names: Iterable[str]) -> Record | None:
    """The fastest record with a green gate of these providers in one run."""
    records = (book.runs(name, cell).get(run) for name in names)
    return max(filter(passed, records), key=book.speed, default=None)


def over(book: Book, cell: Cell, other: Cell) -> float | None:
    """How many times faster the best version is at `cell` than the best one at `other`, in the newest run with both."""
    for run in sorted(_runs(book, cell) & _runs(book, other), reverse=True):
        mine, theirs = (best(book, c, run, book.versions) for c in (cell, other))
        if mine and theirs:
            return theirs["median_ms"] / mine["median_ms"]
    return None


class Launch(NamedTuple):
    """Microseconds of the newest version at one shape: its kernel; and alone, from the host's start until the GPU is
    done: the version's own call, flash_decoding, and the call of a plan object. None where not measured.
    """

    cell: Cell
    name: str
    kernel: float
    call: float | None
    plain: float | None
    plan: float | None


def launches(book: Book) -> list[Launch]:
    """For every fp16 shape of one run, what launching costs beyond the kernel."""
    found = []
    for cell in (c for c in book.cells if c.plain and c.dtype == "fp16"):
        for name in reversed(book.versions):
            kernels, calls = book.runs(name, cell), book.runs(name, cell, OWN, "eager")
            run = max((r for r in kernels.keys() & calls.keys() if _alone(book, calls[r])), default=None)
            if run and passed(kernels[run]):
                more = (book.runs(name, cell, variant, "eager").get(run) for variant in (PLAIN, PLAN))
                times = [_alone(book, record) for record in (calls[run], *more)]
                found.append(Launch(cell, name, 1000 * kernels[run]["median_ms"], *times))
                break
    return found


def _alone(book: Book, record: Record | None) -> float | None:
    milliseconds = book.launched_ms(record)
    return None if milliseconds is None else 1000 * milliseconds


def targets(book: Book, mean: Callable[[Iterable[float]], float]) -> list[Target]:
    """All targets; one without records has no values. mean: the geometric mean."""
    cells = wanted_cells()
    rows = [row for row in shape_rows(book) if row.ours]
    ratios = {row.cell: row.ratio for row in rows if row.ratio}
    shares = {row.cell: row.of_ceiling for row in rows if row.of_ceiling}
    large, small = [c for c in cells if _bytes(c) >= LARGE], [c for c in cells if _bytes(c) <= SMALL]
    eight = [cell for cell in book.cells if cell.dtype in FP8 and cell.plain and 2 * _bytes(cell) >= LARGE]
    fp8 = {cell: over(book, cell, cell._replace(dtype="fp16")) for cell in eight}
    paged = {c: over(book, c, c._replace(page_size=None)) for c in book.cells if c.page_size == 16}
    ragged = {c: book.of_ceiling(_row(book, c).ours) for c in book.cells if c.lengths and not c.page_size}
    paged, paged_fp8 = _by_bits(_known(paged))
    ragged, ragged_fp8 = _by_bits(_known(ragged))
    launched = launches(book)
    plans = {launch.cell: launch.plan - launch.kernel for launch in launched if launch.plan}
    plain = {launch.cell: launch.plain - launch.kernel for launch in launched if launch.plain}
    return [
        Target("speed over the best peer, every 16-bit shape", 0.99, "x", ratios, shapes=len(cells)),
        Target("the same, geometric mean", 1.06, "x", ratios, mean=mean, shapes=len(cells)),
        Target("of the read ceiling, 268 MB and more", 0.96, "%", _of(shares, large), shapes=len(large)),
        Target("of the read ceiling, 34 MB", 0.85, "%", _of(shares, small), shapes=len(small)),
        Target("FP8 caches over 16 bits, from 268 MB on", 1.8, "x", _known(fp8)),
        Target("ragged batch, of the read ceiling", 0.90, "%", ragged),
        Target("ragged batch, FP8 caches", 0.90, "%", ragged_fp8),
        Target("pages of 16 over contiguous", 0.95, "x", paged),
        Target("pages of 16 over contiguous, FP8 caches", 0.95, "x", paged_fp8),
        Target("plan, call to finished, over the kernel", 12, "us", plans, least=False),
        Target("flash_decoding, call to finished, over the kernel", 35, "us", plain, least=False),
    ]


def _known(values: dict[Cell, float | None]) -> dict[Cell, float]:
    return {cell: value for cell, value in values.items() if value is not None}


def _by_bits(values: dict[Cell, float]) -> tuple[dict[Cell, float], dict[Cell, float]]:
    """Those of caches of 16 bits and more, and those of FP8 caches."""
    eight = {cell: value for cell, value in values.items() if cell.dtype in FP8}
    return {cell: value for cell, value in values.items() if cell not in eight}, eight


def _of(values: dict[Cell, float], cells: list[Cell]) -> dict[Cell, float]:
    return {cell: values[cell] for cell in cells if cell in values}


def _bytes(cell: Cell) -> int:
    return kv_bytes(cell._asdict() | {"lengths": None})
