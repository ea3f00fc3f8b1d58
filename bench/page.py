"""The lineage as one self-contained HTML page: every step with its idea, prediction and result, diff and machine code.

The numbers are those of bench/version_diff.py, as in the terminal; templates/page.html draws them.
"""

from __future__ import annotations

import itertools
import json
import pathlib

from bench import machine_code
from bench.version_diff import Gatherer, Request

TEMPLATE = pathlib.Path(__file__).parent / "templates" / "page.html"
PLACE = "/*DATA*/"


def write_page(folder: str | pathlib.Path, arch: str | None = None, device: str | None = None) -> pathlib.Path:
    """Write FOLDER/index.html; returns its path. ValueError for an arch or device that does not exist."""
    data = page_data(arch, device)
    path = pathlib.Path(folder) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(data))
    return path


def render(data: dict) -> str:
    """The page with its data inside. "</" would end the element that holds it."""
    return TEMPLATE.read_text().replace(PLACE, json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))


def page_data(arch: str | None = None, device: str | None = None) -> dict:
    """{"kinds", "families": [...]}: all versions of each family and all its pairs."""
    from common.lineage import FAMILIES

    return {"kinds": machine_code.KINDS, "families": [family_data(Gatherer(name, device), arch) for name in FAMILIES]}


def family_data(gatherer: Gatherer, arch: str | None) -> dict:
    """One family; its pairs are keyed "v1..v2", the older version first."""
    family, names = gatherer.family, list(gatherer.versions)
    alone = {name: gatherer.complete(Request(family, name, name, arch)) for name in names}
    requests = [gatherer.complete(Request(family, *pair, arch)) for pair in itertools.combinations(names, 2)]
    gatherer.prepare([*alone.values(), *requests])
    pairs = {f"{request.old}..{request.new}": pair_data(gatherer.pair(request)) for request in requests}
    return {
        "name": family, "unit": gatherer.unit, "measured_on": gatherer.measured_on, "ladder": ladder(gatherer),
        "versions": [version_data(gatherer, *item) for item in alone.items()], "pairs": pairs,
    }  # fmt: skip


def pair_data(found: dict) -> dict:
    """A pair without what its versions have already."""
    return {name: found[name] for name in ("source", "machine_code", "gain")}


def version_data(gatherer: Gatherer, name: str, request: Request) -> dict:
    """A version, with the instructions of its kernels and the lines that they come from."""
    from bench.charts import colour

    about = gatherer.about(name)
    case = gatherer.case(name, request)
    kernels = gatherer.kernels(case)
    failed = isinstance(kernels, str)
    return about | {
        "colour": colour(name), "case": case.label(), "note": kernels if failed else None,
        "kernels": [] if failed else [listing(compiled, about["path"]) for compiled in kernels],
        "table": None if failed else machine_code_of_one(kernels[0], gatherer.family),
        "gain": None if about["parent"] in gatherer.versions else gatherer.first_gain(name),
    }  # fmt: skip


def machine_code_of_one(compiled: machine_code.Compiled, family: str) -> list[list[str]]:
    rows = machine_code.side_by_side([machine_code.summary(compiled)], machine_code.UNIT[family])
    return [[row.what, row.shown[0]] for row in rows]


def listing(compiled: machine_code.Compiled, file: str) -> dict:
    """A kernel's instructions: texts, the index of each one's kind, its source lines, and which lie in a main loop."""
    instructions = compiled.code.instructions
    inside = {index for loop in compiled.main_loops for index in loop.body}
    kinds = {kind: index for index, kind in enumerate(machine_code.KINDS)}
    return {
        "name": compiled.kernel, "texts": [f"{i.predicate} {i.text}".strip() for i in instructions],
        "kinds": [kinds[i.kind] for i in instructions], "lines": machine_code.source_lines(compiled, file),
        "in_loop": [int(index in inside) for index in range(len(instructions))],
    }  # fmt: skip


def ladder(gatherer: Gatherer) -> dict | None:
    """Every provider's speed at the headline shape; None without records."""
    from bench.charts import PEER_NAMES

    book = gatherer.book
    cell = book.headline() if book else None
    if cell is None:
        return None
    rows = []
    for name in [*book.versions, *book.peers]:
        record = book.latest(name, cell)
        if record is None:
            continue
        speed = book.speed(record)
        rows.append({
            "name": name, "shown": PEER_NAMES.get(name, name), "role": record["role"], "speed": speed,
            "stale": bool(record.get("stale")),
            "spread": book.spread(record) if speed else None, "reason": None if speed else record["gate"],
            "ceiling": (book.ceiling(record) or {}).get(book.metric),
        })  # fmt: skip
    ceilings = [row["ceiling"] for row in rows if row["ceiling"]]
    return {"shape": cell.label(gatherer.family), "rows": rows, "ceiling": ceilings[-1] if ceilings else None}
