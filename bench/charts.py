"""What the records say, as pictures, each readable by itself: GPU, dtype and date are in the title.

    draw_charts(records, envs, folder, "prefill")    writes prefill.png, prefill-fp16.png, prefill-gain.png, ...
    python -m bench.charts results/nvidia-h200       draws all that the folder's records have, again

A version has one colour and one marker everywhere; peers are thin and grey, ceilings dashed. A red gate is a cross on
the axis and never a speed; a version whose code has changed since is dotted and called stale.
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from bench.book import (
    FIRST_STEP,
    HALF,
    METRIC,
    OWN,
    PARENT,
    PLAN,
    Book,
    Cell,
    Sweep,
    book_of,
    digest,
    measured_on,
    passed,
    version_number,
)
from bench.book import sweeps as sweeps_of
from bench.cases import FP8, short
from bench.results import Record, load, load_envs
from bench.tables import geomean, times
from common.lineage import versions_of

# In order, cold to warm to dark. Neighbours are at least 25 CIELAB units apart for normal, deuteranope and protanope
# eyes (Machado's matrices), each has a contrast of 3.3 or more on white, and markers and labels say the same once more.
COLOURS = ("#1f7fb8", "#2a9d8f", "#117733", "#b97f00", "#d8667a", "#882255", "#b455b6", "#332288", "#8a6a4f", "#111111")
MARKERS = "osD^vPX<>h"
PEER = "#8a8a8a"
CEILING = "#444444"
PEER_NAMES = {
    "fa3": "FA3", "fa2": "FA2", "flash_attn": "FA2 (flash_attn)", "cudnn": "cuDNN", "cudnn_fp8": "cuDNN",
    "flex": "Flex", "flashinfer": "FlashInfer", "efficient": "efficient", "eager": "eager",
}  # fmt: skip
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.linewidth": 0.8,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
    "xtick.color": "#444444", "ytick.color": "#444444", "font.family": "DejaVu Sans", "svg.fonttype": "none",
    "svg.hashsalt": "records",
}  # fmt: skip
LABEL_SIZE = 8
_LEADER = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}


def draw_charts(
    records: Iterable[Record], envs: dict, out_dir: str | pathlib.Path, family: str, formats: tuple[str, ...] = ("png",)
) -> list[pathlib.Path]:
    """Draws every chart that the records have data for, and returns the files. envs: {run_id: environment}.

    Each file carries digest(records) as its metadata field "Records". ImportError where matplotlib is missing.
    """
    import matplotlib

    book = book_of(records, family)
    if not any(map(passed, book.records)):
        return []
    out_dir = pathlib.Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths, stamp = [], digest(book.given)
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(book, envs):
            for suffix in formats:
                paths.append(out_dir / f"{name}.{suffix}")
                fields = {"Software": None, "Records": stamp} if suffix == "png" else {"Date": None, "Source": stamp}
                figure.savefig(paths[-1], dpi=150, metadata=fields)
    return paths


def _figures(book: Book, envs: dict):
    """(file name, figure) of every chart that there is data for."""
    headline, all_sweeps = book.headline(), sweeps_of(book.cells)
    if headline and book.family == "prefill":
        own = next(sweep for sweep, cells in all_sweeps.items() if headline in cells)
        yield "prefill", _speed_figure(book, envs, [s for s in all_sweeps if s._replace(causal=own.causal) == own])
    groups = defaultdict(list)
    for sweep, cells in all_sweeps.items():
        if len(cells) > 1:
            groups[sweep.dtype, sweep.size if book.family == "prefill" else ""].append(sweep)
    most = {dtype: max((g for g in groups if g[0] == dtype), key=lambda g: len(groups[g])) for dtype, _ in groups}
    for (dtype, size), group in groups.items():
        name = f"{book.family}-{dtype}" + ("" if most[dtype] == (dtype, size) else f"-{size.replace(' ', '-')}")
        if book.family == "decoding" and headline and dtype == headline.dtype:
            name = "decoding"
        yield name, _speed_figure(book, envs, group)
    further = {"shapes": _shapes_figure, "gain": _gain_figure}
    if book.family == "prefill":
        further |= {"memory": _memory_figure, "fp8": _fp8_figure}
    else:
        further |= {
            "launched": _launched_figure, "ragged": _ragged_figure, "paged": _paged_figure, "fp8": _fp8_cache_figure
        }  # fmt: skip
    for name, draw in further.items():
        if figure := draw(book, envs):
            yield f"{book.family}-{name}", figure


# ---- looks


def colour(name: str) -> str:
    """Of a version ("v3") by its number, whatever else is drawn; grey for peers."""
    return COLOURS[(int(name[1:]) - 1) % len(COLOURS)] if name[1:].isdigit() else PEER


def _look(name: str, stale: bool) -> dict:
    if colour(name) == PEER:
        return {"color": PEER, "linewidth": 0.9, "marker": ".", "markersize": 3.5, "zorder": 2}
    look = {"color": colour(name), "linewidth": 2.2, "marker": MARKERS[(int(name[1:]) - 1) % len(MARKERS)]}
    look |= {"markersize": 5.5, "zorder": 4, "markeredgecolor": "white", "markeredgewidth": 0.6}
    return look | ({"linestyle": ":", "markerfacecolor": "white", "markeredgecolor": colour(name)} if stale else {})


def _label(name: str, stale: bool = False) -> str:
    return PEER_NAMES.get(name, name) + (" (stale)" if stale else "")


class Column(NamedTuple):
    """Inches of one column of panels: room for tick labels, the panel, room for names at line ends."""

    left: float = 0.62
    width: float = 2.95
    right: float = 1.12


def _panels(title: str, notes: list[str], columns: list[Column], heights: list[float]):
    """(figure, axes by [row][column]): a bold title above, notes below, both wrapped to the figure's width.

    heights: of the rows, in inches.
    """
    from matplotlib.figure import Figure

    width, between = max(8.0, sum(map(sum, columns))), 0.92
    title, foot = _wrap(title, 9.6 * width), "\n".join(_wrap(note, 17.5 * width) for note in notes)
    top, bottom = 0.56 + 0.2 * (1 + title.count("\n")), 0.68 + 0.155 * (1 + foot.count("\n"))
    tall = top + bottom + sum(heights) + between * (len(heights) - 1)
    figure = Figure(figsize=(width, tall), facecolor="white")
    figure.text(0.12 / width, 1 - 0.12 / tall, title, va="top", fontsize=11.5, fontweight="bold", color="#222222")
    figure.text(0.12 / width, 0.1 / tall, foot, va="bottom", fontsize=7.5, color="#555555", linespacing=1.4)
    axes, y = [], tall - top
    for height in heights:
        x, y = 0.0, y - height
        axes.append([])
        for column in columns:
            box = ((x + column.left) / width, y / tall, column.width / width, height / tall)
            axes[-1].append(figure.add_axes(box))
            x += sum(column)
        y -= between
    return figure, axes


def _wrap(text: str, width: float) -> str:
    return "\n".join(textwrap.wrap(text, int(width)))


def _where(book: Book, envs: dict, *more: str) -> str:
    """For titles: "NVIDIA H200, fp16, 2026-11-21"."""
    place = measured_on(envs, (record["run_id"] for record in book.records)) or "unknown GPU"
    gpu, _, date = place.rpartition(", ") if ", " in place else (place, "", "")
    return ", ".join(part for part in (gpu, *more, date) if part)


def _software(book: Book, envs: dict) -> str:
    known = [envs[run] for run in sorted({record["run_id"] for record in book.records}) if run in envs]
    names = ("torch", "triton", "driver")
    found = {name: ", ".join(dict.fromkeys(str(env[name]) for env in known if env.get(name))) for name in names}
    told = [v.name for v in versions_of(book.family) if v.name in book.versions and "fresh_keys" in v.takes]
    note = f" {' and '.join(told)}: with fresh_keys, which no library takes (docs/method.md)." if told else ""
    return "; ".join(["Recorded", *(f"{name} {what}" for name, what in found.items() if what)]) + "." + note


def spread_out(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as can be to the wanted ones, in the same order, at least `gap` apart and inside [low, high] (the
    gap shrinks where there is no room)."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    blocks = []  # [sum, count] of neighbours that push each other: least squares under an order
    for place, i in enumerate(order):
        blocks.append([wanted[i] - place * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    means = itertools.chain.from_iterable([total / count] * count for total, count in blocks)
    found = [0.0] * len(wanted)
    for place, (i, mean) in enumerate(zip(order, means, strict=True)):
        found[i] = min(max(mean, low), high - (len(wanted) - 1) * gap) + place * gap
    return found


def _end_labels(axes, ends: list[tuple], size: float = LABEL_SIZE) -> None:
    """Names at the right edge beside where lines end, pushed apart. ends: (x, y, text, colour, bold)."""
    if not ends:
        return
    figure = axes.figure
    height = axes.get_position().height * figure.get_figheight() * 72
    to_axes = axes.transData + axes.transAxes.inverted()
    found = [to_axes.transform((x, y)) for x, y, *_ in ends]
    places = spread_out([y for _, y in found], 1.22 * size / height, 0.0, 1.0)
    for (x, y), place, (_, _, text, ink, bold) in zip(found, places, ends, strict=True):
        axes.annotate(
            text, xy=(x, y), xytext=(1.035, place), xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=size, color=ink, fontweight="bold" if bold else "normal", annotation_clip=False,
            arrowprops=_LEADER | {"color": ink},
        )  # fmt: skip


def _length_axis(axes, lengths: Iterable[int], label: str) -> None:
    lengths = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.06)
    axes.set_xlabel(label)


# ---- speed over length


def _speed_figure(book: Book, envs: dict, group: list[Sweep]):
    """A panel per sweep; of prefill with several head dimensions the masks are rows."""
    all_sweeps = sweeps_of(book.cells)
    at, cells = _places(group), [cell for sweep in group for cell in all_sweeps[sweep]]
    rows, wide = (1 + max(place[i] for place in at.values()) for i in (0, 1))
    sizes = sorted({sweep.size for sweep in group}) if book.family == "prefill" else []
    title = f"{_what(book)} over {'sequence' if book.family == 'prefill' else 'context'} length: "
    title += _where(book, envs, group[0].dtype, *sizes)
    notes = ["Names carry the speed at the end of the line, bands go from p20 to p80."]
    notes += _notes(book, envs, cells)
    columns = [Column(width=2.95 if wide > 1 else 5.2)] * wide
    figure, axes = _panels(title, [" ".join(notes[:-1]), notes[-1]], columns, [3.4] if rows == 1 else [3.0] * rows)
    top = 1.06 * max((y for cell in cells for y in _tops(book, cell)), default=1.0)
    for panel in {panel for row in axes for panel in row} - {axes[row][column] for row, column in at.values()}:
        panel.remove()
    for sweep, (row, column) in at.items():
        panel = axes[row][column]
        panel.set_ylim(0, top)
        panel.set_ylabel(book.unit if column == 0 else "")
        _speed_panel(book, panel, sweep, all_sweeps[sweep])
    return figure


def _what(book: Book) -> str:
    return f"{book.family.capitalize()}, {book.unit}"


def _notes(book: Book, envs: dict, cells: list[Cell]) -> list[str]:
    notes = [_about_ceiling(book)]
    if any(record and not passed(record) for cell in cells for record in _records(book, cell)):
        notes.append("A cross on the axis: wrong at that shape, so no speed.")
    return [note for note in notes if note] + [_software(book, envs)]


def _places(group: list[Sweep]) -> dict[Sweep, tuple[int, int]]:
    """(row, column): masks below each other if there are several head dimensions, else three panels in a row."""
    masks = sorted({sweep.causal for sweep in group})
    names = sorted({sweep._replace(causal=False) for sweep in group}, key=_first)
    if len(masks) == 1 or len(names) == 1:
        return {sweep: divmod(place, 3) for place, sweep in enumerate(sorted(group, key=_first))}
    return {s: (masks.index(s.causal), names.index(s._replace(causal=False))) for s in group}


def _first(sweep: Sweep) -> tuple:
    return sweep.head_dim, sweep.heads_q, sweep.heads_kv, sweep.batch or 0, sweep.causal, str(sweep.rest)


def _about_ceiling(book: Book) -> str:
    if not book.ceilings:
        return ""
    what = "a matrix product of 8192" if book.family == "prefill" else "a kernel that only reads"
    return f"Ceiling: {what}, measured in the same run."


def _records(book: Book, cell: Cell) -> list[Record | None]:
    return [book.latest(name, cell) for name in [*book.versions, *book.peers]]


def _tops(book: Book, cell: Cell) -> list[float]:
    records = [record for record in _records(book, cell) if passed(record)]
    ceilings = [ceiling[book.metric] for record in records if (ceiling := book.ceiling(record))]
    return [book.speed(record) for record in records] + ceilings


def _speed_panel(book: Book, axes, sweep: Sweep, cells: list[Cell]) -> None:
    ends = []
    lengths = [cell.seqlen_k for cell in cells]
    _length_axis(axes, lengths, "sequence length" if book.family == "prefill" else "context length")
    for name in [*book.peers, *book.versions]:
        found = {cell.seqlen_k: book.latest(name, cell) for cell in cells}
        green = {length: record for length, record in found.items() if passed(record)}
        stale = any(record and record.get("stale") for record in found.values())
        red = [length for length, record in found.items() if record and not passed(record)]
        look = _look(name, stale)
        ink = colour(name)
        axes.plot(red, [0] * len(red), "x", color=ink, markersize=7, markeredgewidth=2, clip_on=False, zorder=6)
        if not green:
            if red:
                ends.append((red[-1], 0, f"{_label(name, stale)} red", ink, True))
            continue
        values = [book.speed(record) for record in green.values()]
        gaps = [book.speed(green[length]) if length in green else math.nan for length in lengths if found[length]]
        axes.plot([length for length in lengths if found[length]], gaps, **look)
        if ink != PEER:
            known = [length for length in lengths if found[length]]
            band = [book.spread(found[length]) if length in green else (math.nan, math.nan) for length in known]
            axes.fill_between(known, *zip(*band, strict=True), color=ink, alpha=0.16, linewidth=0, zorder=3)
        text = f"{_label(name, stale)} {values[-1]:.0f}"
        ends.append((max(green), values[-1], text, ink if ink != PEER else "#6a6a6a", ink != PEER))
    ceilings = {cell.seqlen_k: _ceiling_at(book, cell) for cell in cells}
    ceilings = {length: value for length, value in ceilings.items() if value}
    if ceilings:
        axes.plot(*zip(*ceilings.items(), strict=True), "--", color=CEILING, linewidth=1.1, zorder=1)
        ends.append((max(ceilings), ceilings[max(ceilings)], f"ceiling {ceilings[max(ceilings)]:.0f}", CEILING, False))
    mask = f", {cells[0].mask}" if book.family == "prefill" else ""
    more = [] if book.family == "prefill" else [sweep.size, *sweep.extra]
    axes.set_title(", ".join([f"D={sweep.head_dim}{mask}", sweep.heads, *more]), loc="left", color="#333333")
    _end_labels(axes, ends)


def _ceiling_at(book: Book, cell: Cell) -> float | None:
    found = (book.ceiling(record) for record in _records(book, cell) if record)
    return next((ceiling[book.metric] for ceiling in found if ceiling), None)


def _shapes_figure(book: Book, envs: dict):
    """Shapes measured at one length only, in the headline's dtype: a row each, speed to the right."""
    headline = book.headline()
    cells = [cells[0] for cells in sweeps_of(book.cells).values() if len(cells) == 1]
    cells = [cell for cell in cells if headline and cell.dtype == headline.dtype]
    cells = [cell for cell in cells if not cell.lengths and not cell.page_size]  # which have charts of their own
    cells.sort(key=lambda cell: (cell.batch, cell.seqlen_k, str(cell)))
    if not cells:
        return None
    notes = ["Grey bars: peers, the fastest one named; dashed: the ceiling.", *_notes(book, envs, cells)]
    title = f"{_what(book)} of further shapes: {_where(book, envs, headline.dtype)}"
    columns = [Column(2.2, 5.4, 0.4)]
    figure, ((axes,),) = _panels(title, [" ".join(notes[:-1]), notes[-1]], columns, [0.55 * len(cells) + 0.2])
    for row, cell in enumerate(cells):
        records = [record for record in _records(book, cell) if record]
        for record in records:
            ink = colour(record["version"])
            if not passed(record):
                axes.plot([0], [row], "x", color=ink, markersize=7, markeredgewidth=2, clip_on=False, zorder=6)
                continue
            look = _look(record["version"], bool(record.get("stale"))) | {"linestyle": "none"}
            look |= {"marker": "|", "markersize": 9, "markeredgewidth": 1.4} if ink == PEER else {}
            axes.plot([book.speed(record)], [row], **look)
        if ceiling := _ceiling_at(book, cell):
            axes.plot([ceiling] * 2, [row - 0.4, row + 0.4], "--", color=CEILING, linewidth=1.1)
        _name_in_row(book, axes, row, [r for r in records if r["role"] == "peer"], "#6a6a6a", -5, "top")
        versions = [record for record in records if record["role"] == "version" and passed(record)][-1:]
        for record in versions:
            _name_in_row(book, axes, row, versions, colour(record["version"]), 5, "bottom")
    shown = {record["version"] for cell in cells for record in _records(book, cell) if record}
    looks = [axes.plot([], [], label=name, **_look(name, book.is_stale(name)) | {"linestyle": "none"})[0]
             for name in book.versions if name in shown]  # fmt: skip
    axes.legend(handles=looks, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=10, frameon=False,
                fontsize=LABEL_SIZE, handletextpad=0.1, columnspacing=1.2)  # fmt: skip
    axes.set_yticks(range(len(cells)), [cell._replace(dtype="").label(book.family).strip() for cell in cells])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(book.unit)
    return figure


def _name_in_row(book: Book, axes, row: int, records: list[Record], ink: str, offset: float, side: str) -> None:
    """Name and speed of the fastest of these beside its mark."""
    best = max((record for record in records if passed(record)), key=book.speed, default=None)
    if best:
        name = f"{_label(best['version'], bool(best.get('stale')))} {book.speed(best):.0f}"
        left = book.speed(best) < axes.get_xlim()[1] / 3
        axes.annotate(  # away from the ceiling's line, which is close to the fastest
            name, (book.speed(best), row), (-4 if left else 4, offset), textcoords="offset points",
            ha="left" if left else "right", va=side, fontsize=7.5, color=ink,
            fontweight="bold" if side == "bottom" else "normal",
        )  # fmt: skip


# ---- the gain of each step


def _steps(book: Book) -> list[tuple[str, str, dict]]:
    """(version, base, {variant: {cell: ratio}}). The first version is compared with eager PyTorch, and where it is the
    only one with SDPA's FlashAttention-2 too."""
    steps = []
    for name in book.versions:
        parent = book.parents.get(name)
        for base in [parent] if parent else [FIRST_STEP, "fa2"][: 2 if len(book.versions) == 1 else 1]:
            found = {variant: book.ratios(name, base, variant) for variant in ((PARENT, OWN) if parent else (OWN,))}
            if any(found.values()):
                steps.append((name, base, found))
    return steps


def _gain_figure(book: Book, envs: dict):
    """For each step its gain at every 16-bit shape, idea alone (hollow) and with its own tiles (full)."""
    steps = _steps(book)
    if not steps:
        return None

    def mask(cell: Cell) -> bool:
        return cell.causal and book.family == "prefill"

    masks = sorted({mask(cell) for *_, found in steps for ratios in found.values() for cell in ratios})
    rows = [(name, base, variant, ratios) for name, base, found in steps for variant, ratios in found.items() if ratios]
    dtypes = [d for d in HALF if any(cell.dtype == d for *_, ratios in rows for cell in ratios)]
    notes = ["A point is a shape, the bar and the number their geometric mean. Both sides of a ratio are of one run."]
    if any(variant == PARENT for _, _, variant, _ in rows):
        notes[0] += " Idea alone: with the tiles of the version before. Own tiles: idea and retuning."
    notes.append(_software(book, envs))
    title = f"{'Prefill' if book.family == 'prefill' else 'Decoding'}, what each step gained: "
    title += _where(book, envs, " and ".join(dtypes))
    places, y = [], 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        y += 0 if before is None else 1.0 if before[:2] == row[:2] else 1.55
        places.append(y)
    columns = [Column(1.8, 3.6 if len(masks) > 1 else 5.4, 0.62)] + [Column(0.3, 3.6, 0.62)] * (len(masks) - 1)
    figure, panels = _panels(title, notes, columns, [0.27 * (y + 1.6)])
    values = [value for *_, ratios in rows for value in ratios.values()]
    for column, causal in enumerate(masks):
        axes = panels[0][column]
        _gain_axis(axes, min(values), max(values))
        axes.axvline(1, color=CEILING, linewidth=1, zorder=1)
        for place, (name, _, variant, ratios) in zip(places, rows, strict=True):
            here = [value for cell, value in ratios.items() if mask(cell) == causal]
            if not here:
                continue
            face = colour(name) if variant == OWN else "white"
            axes.plot(here, [place] * len(here), "o", markersize=5, alpha=0.75, color=colour(name),
                      markerfacecolor=face, markeredgewidth=1)  # fmt: skip
            axes.plot([geomean(here)] * 2, [place - 0.38, place + 0.38], color=colour(name), linewidth=2.6, zorder=5)
            axes.text(1.02, place, times(geomean(here)), transform=axes.get_yaxis_transform(), va="center",
                      fontsize=LABEL_SIZE + 0.5, color=colour(name), fontweight="bold")  # fmt: skip
        labels = [_step_name(book, *row[:3]) for row in rows]
        axes.set_yticks(places, labels if column == 0 else [""] * len(rows))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(places[-1] + 0.8, -0.8)
        axes.set_xlabel("times as fast")
        if book.family == "prefill":
            axes.set_title("causal" if causal else "full", loc="left", color="#333333")
    return figure


def _step_name(book: Book, name: str, base: str, variant: str) -> str:
    how = "" if base not in book.versions else ", idea alone" if variant == PARENT else ", own tiles"
    return f"{name} over {_label(base)}{how}" + (" (stale)" if book.is_stale(name) or book.is_stale(base) else "")


def _gain_axis(axes, low: float, high: float) -> None:
    low, high = min(low / 1.06, 0.9), max(high * 1.06, 1.12)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    middle = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7)
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)
    coarse = (0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200)
    ticks = [tick for tick in (fine if high / low < 3 else middle if high / low < 9 else coarse) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()


# ---- memory


def _memory_figure(book: Book, envs: dict):
    """Peak memory of one sequence over its length, eager PyTorch's beside the kernels'."""
    best, data = None, {}
    for sweep, cells in sweeps_of(book.cells).items():
        found = {}
        for name in [*book.versions, *book.peers]:
            records = {c.seqlen_k: book.latest(name, c) for c in cells}
            found[name] = {length: record["peak_mem_mb"] / record["batch"] for length, record in records.items()
                           if passed(record) and record.get("peak_mem_mb")}  # fmt: skip
        found = {name: points for name, points in found.items() if len(points) > 1}
        rank = ("eager" in found, len(cells), sweep.dtype == "fp16", sweep.head_dim == 128, not sweep.causal)
        if found and (best is None or rank > best[0]):
            best, data = (rank, sweep), found
    if not data:
        return None
    sweep = best[1]
    notes = [
        "Peak device memory of one call beyond its inputs, output included, divided by the batch. Where no S x S matrix"
        " is written it doubles with the length; where one is, it grows fourfold.", _software(book, envs),
    ]  # fmt: skip
    title = f"Prefill, peak memory of a sequence: {_where(book, envs, sweep.dtype)}"
    figure, ((axes,),) = _panels(title, notes, [Column(0.8, 5.4, 1.9)], [3.2])
    lengths = sorted({length for points in data.values() for length in points})
    _length_axis(axes, lengths, "sequence length")
    axes.set_yscale("log", base=10)
    axes.set_ylabel("MB per sequence")
    axes.set_title(sweep.label().split(", ", 1)[1], loc="left", color="#333333")
    values = [value for points in data.values() for value in points.values()]
    axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    same = []  # names whose curves lie on each other share a label
    for name, points in data.items():
        axes.plot(list(points), list(points.values()), **_look(name, book.is_stale(name)))
        for group in same:
            other = data[group[0]]
            if other.keys() >= points.keys() and all(abs(points[x] / other[x] - 1) < 0.04 for x in points):
                group.append(name)
                break
        else:
            same.append([name])
    ends = []
    for group in same:
        points = data[group[0]]
        versions, peers = [n for n in group if colour(n) != PEER], [n for n in group if colour(n) == PEER]
        text = f"{', '.join([*_runs_of(versions), *map(_label, peers)])}: {points[max(points)]:,.0f} MB"
        ink = colour(versions[-1]) if versions else "#6a6a6a"
        ends.append((max(points), points[max(points)], _wrap(text, 26), ink, bool(versions)))
    _end_labels(axes, ends)
    return figure


def _runs_of(versions: list[str]) -> list[str]:
    """["v1", "v2", "v3", "v5"] -> ["v1 to v3", "v5"]"""
    found, numbers = [], sorted(int(name[1:]) for name in versions)
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in run]
        found.append(f"v{run[0]} to v{run[-1]}" if len(run) > 2 else ", ".join(f"v{number}" for number in run))
    return found


# ---- FP8


def _fp8_figure(book: Book, envs: dict):
    """Error against speed at the headline shape: what eight bits cost and buy."""
    headline = book.headline()
    if headline is None or not any(cell.dtype in FP8 for cell in book.cells):
        return None
    shapes = [headline._replace(dtype="", causal=causal) for causal in (False, True)]
    others = {cell._replace(dtype=""): cell for cell in book.cells if cell.dtype == "e5m2"}
    shapes += [shape for shape in others if shape not in shapes][:1]  # the presets measure e5m2 at few shapes
    panels = []
    for shape in shapes:
        cells = {d: cell for d in (*HALF, *FP8) if (cell := shape._replace(dtype=d)) in book.cells}
        if any(passed(book.latest(name, cells[d])) for d in cells if d in FP8 for name in book.versions):
            panels.append(cells)
    if not panels:
        return None
    notes = [
        "Relative L2 error against float64 on the inputs before quantisation, N(0, 1). Dashed: the gate's limit."
        " Versions that have FP8, each with its 16 bits; of the peers the fastest one.", _software(book, envs),
    ]  # fmt: skip
    title = f"Prefill, FP8 error against speed: {_where(book, envs)}"
    figure, axes = _panels(title, notes, [Column(0.62, 3.3, 1.0)] * len(panels), [3.2])
    points = [[_fp8_points(book, cells), cells] for cells in panels]
    found = [record for series, _ in points for records in series.values() for record in records]
    most = max(max(record["error"], record["error_limit"]) for record in found if record["role"] == "version")
    for panel, (series, cells) in zip(axes[0], points, strict=True):  # the limit follows the shape
        panel.set_xscale("log")
        panel.set_xlim(min(r["error"] for r in found) / 1.6, 1.25 * max(most, *(r["error"] for r in found)))
        panel.set_ylim(0, 1.1 * max(book.speed(record) for record in found))
        panel.set_xlabel("relative error")
        panel.set_ylabel(book.unit if panel is axes[0][0] else "")
        shape = next(iter(cells.values()))._replace(dtype="").label().strip()
        panel.set_title(shape, loc="left", color="#333333", pad=20)
        of_versions = [r for records in series.values() for r in records if r["role"] == "version"]
        _fp8_panel(book, panel, series, {r["dtype"]: r["error_limit"] for r in of_versions if r["dtype"] in FP8})
    return figure


def _fp8_points(book: Book, cells: dict[str, Cell]) -> dict[str, list[Record]]:
    """{provider: its green records at these cells}: versions with FP8, and for each dtype the fastest peer."""
    green = {name: [r for c in cells.values() if passed(r := book.latest(name, c)) and r.get("error")]
             for name in [*book.peers, *book.versions]}  # fmt: skip
    found = {v: green[v] for v in book.versions if any(record["dtype"] in FP8 for record in green[v])}
    for dtype in cells:
        peers = [record for peer in book.peers for record in green[peer] if record["dtype"] == dtype]
        if peers:
            best = max(peers, key=book.speed)
            found.setdefault(best["version"], []).append(best)
    return found


def _fp8_panel(book: Book, axes, series: dict[str, list[Record]], limits: dict[str, float]) -> None:
    ends, columns = [], defaultdict(list)
    for name, records in series.items():
        places = sorted((record["error"], book.speed(record)) for record in records)
        stale = any(record.get("stale") for record in records)
        ink = colour(name)
        axes.plot(*zip(*places, strict=True), **_look(name, stale) | {"linewidth": 1.2 if ink != PEER else 0.7})
        ends.append((*places[-1], _label(name, stale), ink if ink != PEER else "#6a6a6a", ink != PEER))
        for record in records:
            columns[record["dtype"]].append(record["error"])
    for dtype, errors in columns.items():
        side = {"e4m3": "right", "e5m2": "left"}.get(dtype, "center") if "e5m2" in columns else "center"
        axes.text(geomean(errors), 1.015, dtype, transform=axes.get_xaxis_transform(), ha=side, va="bottom",
                  fontsize=LABEL_SIZE, color="#333333")  # fmt: skip
    for step, limit in enumerate(sorted(limits.values())):
        axes.axvline(limit, linestyle="--", linewidth=1, color=CEILING, zorder=0)
        axes.text(limit, 0.02 + 0.05 * step, f"limit {limit:.2g} ", transform=axes.get_xaxis_transform(), ha="right",
                  fontsize=7, color=CEILING)  # fmt: skip
    _end_labels(axes, ends)


# ---- decoding: launches, and caches as they are in use


def _launched_figure(book: Book, envs: dict):
    """A panel per version: kernel time and eager call over context length, one sequence; the gap is the launch."""
    headline, all_sweeps = book.headline(), sweeps_of(book.cells)
    found = {s: cells for s, cells in all_sweeps.items() if headline and s.batch == 1 and s.dtype == headline.dtype}
    found = {s: cells for s, cells in found.items() if len(cells) > 1 and not s.extra}
    names = [v for v in book.versions if any(_launched(book, v, c) for cells in found.values() for c in cells)]
    if not names:
        return None
    sweep = max(found, key=lambda s: (len(found[s]), s.head_dim))
    names = [name for name in names if any(_launched(book, name, cell) for cell in found[sweep])]
    series = {name: _launched_series(book, name, found[sweep]) for name in names}
    floor = next((c["median_ms"] * 1000 for c in reversed(book.given) if c["version"] == "launch"), None)
    notes = [
        "Solid: the kernel, in a CUDA graph. Dashed: one eager call alone, from the host's start until the GPU is done;"
        " the shaded gap is what launching and waiting cost, in bold at the shortest context."
    ]
    if any(points["plan"] for points in series.values()):
        notes[0] += " Dotted: the same through a plan object."
    if floor:
        notes[0] += f" Grey: PyTorch's fill of one number, called and waited for alone, {floor:.0f} us."
    title = f"Decoding, time of a step over context length, {sweep.heads}, D={sweep.head_dim}, one sequence: "
    wide = min(3, len(names))
    columns = [Column(0.62, 2.7, 1.22) if wide > 1 else Column(0.7, 5.2, 1.4)] * wide
    rows = -(-len(names) // wide)
    title += _where(book, envs, sweep.dtype)
    figure, axes = _panels(title, [*notes, _software(book, envs)], columns, [2.7] * rows)
    drawn = [t for points in series.values() for line in points.values() for t in line.values()]
    for place in range(rows * wide):
        panel = axes[place // wide][place % wide]
        if place >= len(names):
            panel.remove()
            continue
        panel.set_ylabel("microseconds" if place % wide == 0 else "")
        panel.set_yscale("log", base=10)
        panel.set_ylim(min([*drawn, floor or math.inf]) / 1.3, max(drawn) * 1.3)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _length_axis(panel, [cell.seqlen_k for cell in found[sweep]], "context length")
        if floor:
            panel.axhline(floor, color=PEER, linewidth=0.9, zorder=1)
        stale = any(r and r.get("stale") for r in (book.latest(names[place], cell) for cell in found[sweep]))
        _launched_panel(panel, names[place], series[names[place]], stale)
    return figure


def _launched(book: Book, name: str, cell: Cell, variant: str = OWN) -> float | None:
    return book.launched_ms(book.latest(name, cell, variant, "eager"))


def _launched_series(book: Book, name: str, cells: list[Cell]) -> dict[str, dict[int, float]]:
    """{"kernel", "eager", "plan": {length: microseconds}}"""
    kernels = {cell: book.latest(name, cell) for cell in cells}
    return {
        "kernel": {c.seqlen_k: 1000 * r["median_ms"] for c, r in kernels.items() if passed(r)},
        "eager": {c.seqlen_k: 1000 * ms for c in cells if (ms := _launched(book, name, c))},
        "plan": {c.seqlen_k: 1000 * ms for c in cells if (ms := _launched(book, name, c, PLAN))},
    }


def _launched_panel(axes, name: str, series: dict[str, dict[int, float]], stale: bool) -> None:
    ink, look, ends = colour(name), _look(name, stale), []
    styles = {"kernel": {}, "eager": {"linestyle": "--"}, "plan": {"linestyle": ":"}}
    for what, points in series.items():
        if points:
            thin = {} if what == "kernel" else {"linewidth": 1.3, "markersize": 3.5}
            axes.plot(list(points), list(points.values()), **look | styles[what] | thin)
            last = max(points)
            ends.append((last, points[last], f"{what} {points[last]:.0f} us", ink, what == "kernel"))
    both = sorted(series["kernel"].keys() & series["eager"].keys())
    if both:
        kernel, eager, plan = (series[what] for what in ("kernel", "eager", "plan"))
        axes.fill_between(
            both, [kernel[x] for x in both], [eager[x] for x in both], color=ink, alpha=0.13, linewidth=0, zorder=1
        )
        gaps = [f"eager +{eager[both[0]] - kernel[both[0]]:.0f} us"]
        gaps += [f"plan +{plan[both[0]] - kernel[both[0]]:.0f} us"] if both[0] in plan else []
        axes.annotate(
            "\n".join([f"at {short(both[0])}", *gaps]), (0.04, 0.96), xycoords="axes fraction", va="top",
            fontsize=LABEL_SIZE, color=ink, fontweight="bold",
        )  # fmt: skip
    axes.set_title(_label(name, stale), loc="left", color=ink, fontweight="bold")
    _end_labels(axes, ends)


def _ragged_figure(book: Book, envs: dict):
    """A bar per version and peer for each ragged batch."""
    cells = [cell for cell in book.cells if cell.lengths and any(map(passed, _records(book, cell)))]
    if not cells:
        return None
    bars = [[r for r in _records(book, cell) if r] for cell in cells]
    notes = [
        "Counted are the keys and values up to each length. Dashed: a kernel that only reads, about as many bytes in "
        "one piece, in the same run.", _software(book, envs),
    ]  # fmt: skip
    dtypes = " and ".join(dict.fromkeys(cell.dtype for cell in cells))
    title = f"Decoding a ragged batch, GB/s: {_where(book, envs, dtypes)}"
    figure, axes = _panels(title, notes, [Column(1.15, 5.4, 1.75)], [0.3 * len(records) + 0.1 for records in bars])
    for (panel,), cell, records in zip(axes, cells, bars, strict=True):
        _ragged_panel(book, panel, cell, records)
    return figure


def _ragged_panel(book: Book, axes, cell: Cell, records: list[Record]) -> None:
    lengths = json.loads(cell.lengths)
    names = [_label(record["version"], bool(record.get("stale"))) for record in records]
    for row, record in enumerate(records):
        ink = colour(record["version"])
        if not passed(record):
            axes.plot([0], [row], "x", color=ink, markersize=7, markeredgewidth=2, clip_on=False, zorder=6)
            text = "  red: wrong here, so no speed"
            axes.text(0, row, text, va="center", fontsize=LABEL_SIZE, color=ink)
            continue
        look = {"color": "white", "edgecolor": ink, "hatch": "///"} if record.get("stale") else {"color": ink}
        axes.barh([row], [book.speed(record)], height=0.66, **look)
        share = book.of_ceiling(record)
        text = f"{book.speed(record):.0f}" + (f", {100 * share:.0f} % of ceiling" if share else "")
        axes.annotate(
            text, (1.02, row), xycoords=axes.get_yaxis_transform(), va="center", fontsize=LABEL_SIZE,
            color=ink if ink != PEER else "#6a6a6a", fontweight="bold" if ink != PEER else "normal",
            annotation_clip=False,
        )  # fmt: skip
    ceiling = _ceiling_at(book, cell)
    if ceiling:
        axes.axvline(ceiling, linestyle="--", linewidth=1.1, color=CEILING)
        axes.annotate(
            f"ceiling {ceiling:.0f}", (ceiling, 1.0), (0, 3), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="right", fontsize=LABEL_SIZE, color=CEILING,
        )  # fmt: skip
    top = max([book.speed(record) for record in records if passed(record)] + [ceiling or 0.0])
    axes.set_xlim(0, 1.02 * top)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_yticks(range(len(records)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(book.unit)
    more = f", {cell.seqlen_q} queries each" if cell.seqlen_q > 1 else ""
    more += f", pages of {cell.page_size}" if cell.page_size else ""
    what = f"{cell.batch} sequences of {short(min(lengths))} to {short(max(lengths))} keys, {sum(lengths):,} in all, "
    title = f"{cell.dtype}: {what}{cell.heads} heads, D={cell.head_dim}{more}"
    axes.set_title(title, loc="left", color="#333333", pad=16)


def _paged_figure(book: Book, envs: dict):
    """Speed with pages over speed without, shape by shape."""
    pairs = {cell: cell._replace(page_size=None) for cell in book.cells if cell.page_size}
    notes = ["Pages anywhere in memory, found by a block table, against one contiguous cache, in the same run."]
    title = f"Decoding, caches in pages over contiguous ones: {_where(book, envs, *_dtypes_of(pairs))}"
    return _against_figure(book, envs, pairs, title, notes, "speed over contiguous", 0.95)


def _fp8_cache_figure(book: Book, envs: dict):
    """Speed over FP8 caches over that over 16 bits, shape by shape."""
    pairs = {cell: cell._replace(dtype="fp16") for cell in book.cells if cell.dtype in FP8}
    notes = ["Half the bytes: twice as fast is what reading alone would give. Queries and output have 16 bits.",
             "16 bits: the best version of the same run."]  # fmt: skip
    title = f"Decoding, FP8 caches over 16 bits: {_where(book, envs, *_dtypes_of(pairs))}"
    return _against_figure(book, envs, pairs, title, notes, "times as fast as with 16 bits", 1.8, best=True)


def _dtypes_of(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.dtype for cell in cells))


def _against_figure(
    book: Book, envs: dict, pairs: dict[Cell, Cell], title: str, notes: list[str], what: str, target, best=False
):  # fmt: skip
    """A row for each pair of cells; a mark for each provider at how many times faster it is at the first, where it, or
    the best version, has the second.
    """
    names = [*book.peers, *book.versions]
    found = {c: {n: ratio for n in names if (ratio := book.against(n, c, other, best))} for c, other in pairs.items()}
    cells = sorted((cell for cell in found if found[cell]), key=lambda cell: (cell.batch * cell.seqlen_k, str(cell)))
    if not cells:
        return None
    names = [name for name in names if any(name in found[cell] for cell in cells)]
    labels = [cell.label(book.family) for cell in cells]
    columns = [Column(max(2.6, 0.15 + 0.068 * max(map(len, labels))), 5.0, 1.1)]
    notes = [*notes, _software(book, envs)]
    height = 0.46 * len(cells) + 0.2
    figure, ((axes,),) = _panels(title, notes, columns, [height])
    looks = {name: _look(name, book.is_stale(name)) | {"linestyle": "none"} for name in names}
    for name in names:
        looks[name] |= {"marker": "|", "markersize": 10, "markeredgewidth": 1.6} if colour(name) == PEER else {}
    step = min(0.2, 0.6 / len(names))  # marks of a row stand below each other, since they often have one place
    for row, cell in enumerate(cells):
        for name, ratio in found[cell].items():
            axes.plot([ratio], [row + step * (names.index(name) - (len(names) - 1) / 2)], **looks[name])
        name = max((n for n in found[cell] if colour(n) != PEER), key=version_number, default=None)
        if name:
            axes.annotate(
                f"{_label(name, book.is_stale(name))} {times(found[cell][name])}", (1.03, row),
                xycoords=axes.get_yaxis_transform(), va="center", fontsize=LABEL_SIZE, color=colour(name),
                fontweight="bold", annotation_clip=False,
            )  # fmt: skip
    values = [ratio for cell in cells for ratio in found[cell].values()] + [1.0, target]
    margin = 0.08 * (max(values) - min(values))
    axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.axvline(1, color=CEILING, linewidth=1, zorder=1)
    axes.axvline(target, color=CEILING, linewidth=1.1, linestyle="--", zorder=1)
    axes.annotate(
        f"target {target:g}x", (target, 1.0), (0, 3), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
        ha="center", fontsize=7.5, color=CEILING,
    )  # fmt: skip
    shown = [axes.plot([], [], label=_label(name, book.is_stale(name)), **looks[name])[0] for name in names]
    axes.legend(handles=shown, loc="lower left", bbox_to_anchor=(-0.02, 1 + 0.16 / height), ncols=10, frameon=False,
                fontsize=LABEL_SIZE, handletextpad=0.1, columnspacing=1.2)  # fmt: skip
    axes.set_yticks(range(len(cells)), labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_xlabel(what)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.charts", description="Draws recorded results again.")
    parser.add_argument("folder", type=pathlib.Path, help="a folder with prefill.jsonl or decoding.jsonl")
    args = parser.parse_args(argv)
    for family in METRIC:
        records = load(args.folder, family)
        for path in draw_charts(records, load_envs(args.folder, family), args.folder, family):
            print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
