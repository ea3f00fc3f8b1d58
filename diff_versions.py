#!/usr/bin/env python3
"""What changed between two versions, in source and in machine code, and what it bought. Needs no GPU.

python diff_versions.py prefill v1 v2                    any two versions of a family
python diff_versions.py prefill v2                       its parent to it
python diff_versions.py prefill v2 --stage sass          the text of one stage of compilation
python diff_versions.py --family                         which versions there are
python diff_versions.py --html build/lineage             everything as one page, build/lineage/index.html
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

from bench.source_diff import Row, Source, compact, hunks, notes_of
from bench.version_diff import Request, gather

TOOLS = {
    "git": ["git", "--no-pager", "diff", "--no-index", "--color=auto"],
    "delta": ["delta", "--paging=never"],
    "difftastic": ["difft"],
}
MISSING_TOOL = {"git": "git", "delta": "delta (package git-delta)", "difftastic": "difft (package difftastic)"}


class Paint:
    """ANSI styles; without colour, the text as it is."""

    CODES = {"bold": "1", "dim": "2", "old": "31", "new": "32", "note": "36", "old_word": "31;7", "new_word": "32;7"}

    def __init__(self, on: bool):
        self.on = on

    def __call__(self, style: str, text: str) -> str:
        return f"\033[{self.CODES[style]}m{text}\033[0m" if self.on and text else text

    def spans(self, text: str, spans, side: str) -> str:
        """A line of a side ("old", "new") with what changed in it marked."""
        parts, at = [], 0
        for start, end in spans:
            parts += [self(side, text[at:start]), self(f"{side}_word", text[start:end])]
            at = end
        return "".join([*parts, self(side, text[at:])])


def shown_width(text: str) -> int:
    return len(re.sub(r"\033\[[\d;]*m", "", text))


# ---- the four parts


def ideas(found: dict, paint: Paint, width: int) -> list[str]:
    """Both ideas, and the step's prediction beside what was measured."""
    old, new, gain = found["old"], found["new"], found["gain"]
    lines = [paint("bold", f"{found['family']}: {old['label']} -> {new['label']}"), ""]
    lines += entry(old["name"], old["idea"], width)
    lines += entry(new["name"], new["idea"], width)
    expected = new["header"].get("Expect", "nothing written down")
    if new["parent"] != old["name"]:
        expected = f"(against {new['parent'] or 'what was before'}) {expected}"
    lines += ["", *entry("predicted", expected, width)]
    measured = [part for name in ("idea alone", "own tiles") if (part := in_short(name, gain[name]))]
    return lines + entry("measured", "; ".join(measured) or gain["note"] or "not in 16 bits", width)


def in_short(name: str, gain: dict | None) -> str | None:
    """ "own tiles 3.42x (1.90x to 5.10x over 36 shapes)" """
    if gain is None:
        return None
    stale = ", stale: the code has changed since" if gain["stale"] else ""
    least, most = gain["least"]["ratio"], gain["most"]["ratio"]
    return f"{name} {gain['mean']:.2f}x ({least:.2f}x to {most:.2f}x over {len(gain['cells'])} shapes{stale})"


def entry(name: str, text: str, width: int) -> list[str]:
    """ "name  text", wrapped under itself."""
    return textwrap.wrap(f"{name:11}{text}", max(width, 40), subsequent_indent=" " * 11)


def sources(found: dict) -> tuple[Source, Source]:
    return tuple(Source("\n".join(found[side]["lines"]) + "\n") for side in ("old", "new"))


def unified(found: dict, code_only: bool, paint: Paint) -> list[str]:
    """The source diff, old lines above new ones, words that changed marked, notes above the hunks that they explain."""
    old, new = sources(found)
    old_text, new_text = (dict(source.numbered(code_only)) for source in (old, new))
    lines = [paint("bold", f"--- {found['old']['path']}"), paint("bold", f"+++ {found['new']['path']}")]
    for rows in hunks(chosen_rows(found, code_only)):
        lines += hunk_head(rows, old, new, paint)
        pending = []
        for row in rows:
            if row.same:
                lines += pending + [f"  {new_text[row.new]}"]
                pending = []
                continue
            if row.old is not None:
                lines.append(paint("old", "- ") + paint.spans(old_text[row.old], row.old_spans, "old"))
            if row.new is not None:
                pending.append(paint("new", "+ ") + paint.spans(new_text[row.new], row.new_spans, "new"))
        lines += pending
    return lines


def chosen_rows(found: dict, code_only: bool) -> list[Row]:
    return [Row(*row) for row in found["source"]["code_rows" if code_only else "rows"]]


def hunk_head(rows: list[Row], old: Source, new: Source, paint: Paint) -> list[str]:
    sides = [row.old for row in rows], [row.new for row in rows]
    starts = [next((index + 1 for index in side if index is not None), 0) for side in sides]
    notes = [paint("note", f"   {note}") for note in notes_of(rows, old, new)]
    return ["", paint("dim", f"@@ line {starts[0]} -> {starts[1]} @@"), *notes]


def side_by_side(found: dict, code_only: bool, paint: Paint, width: int) -> list[str]:
    """The source diff, old left and new right, as wide as the terminal; long lines go on below themselves."""
    old, new = sources(found)
    old_text, new_text = (dict(source.numbered(code_only)) for source in (old, new))
    half = max(20, (width - 3) // 2)
    lines = [paint("bold", f"{found['old']['path']:{half}} | {found['new']['path']}")]
    for rows in hunks(chosen_rows(found, code_only)):
        lines += hunk_head(rows, old, new, paint)
        for row in compact(rows):
            left = column(row.old, old_text, row.old_spans, "old", row.same, half, paint)
            right = column(row.new, new_text, row.new_spans, "new", row.same, half, paint)
            mark = " " if row.same else "<" if row.new is None else ">" if row.old is None else "|"
            for index in range(max(len(left), len(right))):
                a, b = (side[index] if index < len(side) else "" for side in (left, right))
                lines.append(f"{a}{' ' * (half - shown_width(a))} {mark} {b}".rstrip())
    return lines


def column(index: int | None, texts: dict, spans, side: str, same: bool, width: int, paint: Paint) -> list[str]:
    """One line's pieces of at most `width` characters: "  12 text", its rest indented."""
    if index is None:
        return []
    text, room = texts[index], width - 5
    cuts = range(0, max(1, len(text)), room)
    pieces = []
    for start in cuts:
        piece, end = text[start : start + room], start + room
        inside = [(max(s, start) - start, min(e, end) - start) for s, e in spans if s < end and e > start]
        number = f"{index + 1:4} " if start == 0 else " " * 5
        pieces.append(paint("dim", number) + (piece if same else paint.spans(piece, inside, side)))
    return pieces


def machine_code(found: dict, paint: Paint) -> list[str]:
    from tabulate import tabulate

    code = found["machine_code"]
    lines = [paint("bold", f"Machine code, {code['case']}, triton {code['triton']}"), "", *code["notes"]]
    if code["table"]:
        first, *others = code["table"]["columns"]
        head = ["", first, *(title for name in others for title in (name, "change"))]
        rows = []
        for row in code["table"]["rows"]:
            further = zip(row["shown"][1:], row["change"], strict=True)
            rows.append([row["what"], row["shown"][0], *(text for pair in further for text in pair)])
        align = ["left", *["right"] * (len(head) - 1)]
        lines.append(tabulate(rows, head, colalign=align, disable_numparse=True, preserve_whitespace=True))
    return lines


def stage(found: dict, name: str, paint: Paint) -> list[str]:
    code = found["machine_code"]
    what = f"{name} of {' and of '.join(code['staged'])}" if code["staged"] else name
    title = f"{what}, {code['case']}, triton {code['triton']}, without what only numbers things"
    lines = [paint("bold", title), *code["notes"]]
    colours = {"-": "old", "+": "new", "@": "dim"}
    for line in code["stage"] or []:
        lines.append(paint(colours[line[0]], line) if line[:1] in colours else line)
    return lines if code["stage"] or code["notes"] else [*lines, "", "no difference"]


def gain(found: dict, paint: Paint, width: int) -> list[str]:
    """The measured gain: idea alone, own tiles, FP8; where it helped most and least, and where it hurt."""
    gain = found["gain"]
    if gain["note"]:
        return [paint("bold", "Measured"), "", gain["note"]]
    old, new = found["old"]["name"], found["new"]["name"]
    titles = {
        "idea alone": f"idea alone: {new} with the tiles of {old}",
        "own tiles": f"own tiles: idea and retuning, {new} over {old}",
        "FP8": f"FP8, {new} over {old}",
        "FP8 over fp16": f"FP8 over fp16, both {new}",
    }
    lines = [paint("bold", f"Measured on {gain['measured_on']}, {gain['unit']}")]
    for name, title in titles.items():
        if part := gain[name]:
            lines += ["", f"{title}: {in_short('', part).strip()}"]
            if len(part["cells"]) > 1:
                lines += [f"  most   {at_cell(part['most'])}", f"  least  {at_cell(part['least'])}"]
            hurt = part["hurt"]
            lines += [f"  slower {at_cell(cell)}" for cell in hurt[:4]]
            lines += [f"  slower at {len(hurt) - 4} shapes more (--json lists them)"] if len(hurt) > 4 else []
            lines += ["  nowhere slower beyond noise"] if not hurt else []
    return lines


def at_cell(cell: dict) -> str:
    spread = f"({cell['low']:.2f}x to {cell['high']:.2f}x)"
    return f"{cell['ratio']:.2f}x {spread}  {cell['label']}, {cell['old']:.4g} -> {cell['new']:.4g}"


# ---- the command


def hand_over(tool: str, found: dict) -> int:
    """Both files to another diff program; its exit status 1 only says that they differ."""
    command = TOOLS[tool]
    if shutil.which(command[0]) is None:
        raise ValueError(f"--tool {tool}: there is no {MISSING_TOOL[tool]} on this machine")
    root = os.path.dirname(os.path.abspath(__file__))
    status = subprocess.run([*command, found["old"]["path"], found["new"]["path"]], cwd=root).returncode
    return 0 if status in (0, 1) else status


def list_versions(family: str | None) -> None:
    from common.lineage import FAMILIES, versions_of

    for name in [family] if family else FAMILIES:
        for version in versions_of(name):
            print(f"{name:9} {version.label}: {version.idea}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and exit status 2."""
        raise ValueError(message)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="diff_versions.py", description=__doc__, formatter_class=style)
    parser.add_argument("pair", nargs="*", metavar="FAMILY [OLD] NEW", help="one version means its parent to it")
    parser.add_argument("--family", nargs="?", const="", metavar="FAMILY", help="list the versions that there are")
    parser.add_argument("--html", metavar="DIR", help="write everything as one page into DIR")
    parser.add_argument("--json", action="store_true", help="everything about the pair, for programs")
    source = parser.add_argument_group("source")
    source.add_argument("--side-by-side", action="store_true", help="old left, new right, to the terminal's width")
    source.add_argument("--code-only", action="store_true", help="without comments and docstrings")
    source.add_argument("--tool", metavar="TOOL", help=f"hand the files to another program: {', '.join(TOOLS)}")
    source.add_argument("--color", default="auto", metavar="WHEN", help="auto (on a terminal), always or never")
    code = parser.add_argument_group("machine code")
    code.add_argument("--arch", help="sm_80 ... sm_120 or gfx942; by default that of the recorded GPU")
    code.add_argument("--dtype", help="fp16 (default; e4m3 if NEW takes nothing else), bf16, fp32, e4m3, e5m2")
    code.add_argument("--head-dim", type=int, metavar="D", help="default: prefill 128, decoding 64")
    code.add_argument("--causal", action="store_true")
    code.add_argument("--stage", help="diff this stage's text instead: ttir, ttgir, llir, ptx, sass")
    code.add_argument("--own-tiles", action="store_true", help="with --stage: NEW with its own tiles, not those of OLD")
    parser.add_argument("--device", help="folder under results/ whose records are shown")
    args = parser.parse_args(argv)
    if args.family is None and not args.html and len(args.pair) not in (2, 3):
        parser.error("name a family and one or two versions, as in: prefill v1 v2 (--family lists them)")
    for name, value, choices in (
        ("--tool", args.tool, TOOLS), ("--color", args.color, ("auto", "always", "never")),
        ("--dtype", args.dtype, ("fp16", "bf16", "fp32", "e4m3", "e5m2")),
    ):  # fmt: skip
        if value is not None and value not in choices:
            parser.error(f"{name} {value!r} does not exist; there are {', '.join(choices)}")
    if args.head_dim is not None and not 1 <= args.head_dim <= 256:
        parser.error(f"--head-dim: must be 1 to 256, it is {args.head_dim}")
    return args


def run(args: argparse.Namespace) -> int:
    if args.family is not None:
        list_versions(args.family)
        return 0
    if args.html:
        from bench.page import write_page

        print(write_page(args.html, args.arch, args.device))
        return 0
    family, *names = args.pair
    old, new = names if len(names) == 2 else (None, names[0])
    case = (args.arch, args.dtype, args.head_dim, args.causal)
    request = Request(family, old, new, *case, args.device, args.stage, args.own_tiles)
    found = gather(request)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    if args.tool:
        return hand_over(args.tool, found)
    on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    paint = Paint(on_terminal if args.color == "auto" else args.color == "always")
    width = shutil.get_terminal_size().columns
    if args.stage:
        print("\n".join(stage(found, args.stage, paint)))
        return 0
    diff = unified(found, args.code_only, paint)
    if args.side_by_side:
        diff = side_by_side(found, args.code_only, paint, width)
    parts = (ideas(found, paint, width), diff, machine_code(found, paint), gain(found, paint, width))
    print("\n\n".join("\n".join(part) for part in parts))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parsed(argv))
    except ValueError as error:
        print(f"diff_versions.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # into `head`, say
        sys.stdout = None
        return 0


if __name__ == "__main__":
    sys.exit(main())
