"""Two source files beside each other: aligned lines, the words that changed in them, and the notes on the changes."""

import ast
import difflib
import functools
import io
import itertools
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

CONTEXT = 3  # unchanged lines shown around a change
ALIKE = 0.5  # lines that share this much are one line, changed


class Source:
    """A file's lines, and each line's code: without comments and docstrings, None where nothing is left of it."""

    def __init__(self, text: str):
        self.lines = text.splitlines()
        self.code = _code(text)

    @functools.cached_property
    def notes(self) -> dict[int, str]:
        """{line index: text} of the comments "# v2: text"."""
        found = {}
        for index, line in enumerate(self.lines):
            if match := re.search(r"#\s*(v\d+):\s*(.+)", line):
                found[index] = f"{match[1]}: {match[2].strip()}"
        return found

    def numbered(self, code_only: bool) -> list[tuple[int, str]]:
        """(line index, text) of the lines that a diff compares."""
        if code_only:
            return [(index, text) for index, text in enumerate(self.code) if text is not None]
        return list(enumerate(self.lines))


def _code(text: str) -> list[str | None]:
    code: list[str | None] = list(text.splitlines())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            code[row - 1] = code[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            string = node.body[0]
            code[string.lineno - 1 : string.end_lineno] = [None] * (string.end_lineno - string.lineno + 1)
    return [line.rstrip() if line and line.strip() else None for line in code]


class Row(NamedTuple):
    """Two lines beside each other: their indices, None where a side has none; what changed in each, [start, end)."""

    old: int | None
    new: int | None
    old_spans: tuple[tuple[int, int], ...] = ()
    new_spans: tuple[tuple[int, int], ...] = ()
    same: bool = False


def aligned(old: Source, new: Source, code_only: bool = False) -> list[Row]:
    """The two files beside each other, a row for every line."""
    left, right = old.numbered(code_only), new.numbered(code_only)
    matcher = difflib.SequenceMatcher(None, [t for _, t in left], [t for _, t in right], autojunk=False)
    rows = []
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            rows += [Row(a, b, same=True) for (a, _), (b, _) in zip(left[i:i_end], right[j:j_end], strict=True)]
        else:
            rows += _changed(left[i:i_end], right[j:j_end])
    return rows


def _changed(left: list[tuple[int, str]], right: list[tuple[int, str]]) -> Iterator[Row]:
    """A replaced block: lines that are alike share a row, in order; the others stand alone, the old ones first."""
    i = j = 0
    for a, b in [*_pairs([text for _, text in left], [text for _, text in right]), (len(left), len(right))]:
        yield from (Row(index, None) for index, _ in left[i:a])
        yield from (Row(None, index) for index, _ in right[j:b])
        if a < len(left):
            yield Row(left[a][0], right[b][0], *_spans(left[a][1], right[b][1]))
        i, j = a + 1, b + 1


def _pairs(left: list[str], right: list[str]) -> list[tuple[int, int]]:
    """Index pairs, both ascending, whose likeness adds up to the most; none is less than ALIKE."""
    bags = [[Counter(_words(text)) for text in side] for side in (left, right)]
    likeness = [[_likeness(a, b) for b in bags[1]] for a in bags[0]]
    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, j in itertools.product(reversed(range(len(left))), reversed(range(len(right)))):
        together = likeness[i][j] + best[i + 1][j + 1] if likeness[i][j] >= ALIKE else 0.0
        best[i][j] = max(together, best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if likeness[i][j] >= ALIKE and best[i][j] == likeness[i][j] + best[i + 1][j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _likeness(a: Counter, b: Counter) -> float:
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def _spans(old: str, new: str) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """What changed in each of two lines, in whole words."""
    words = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in (old, new)]
    starts = [list(itertools.accumulate(map(len, side), initial=0)) for side in words]
    spans = [], []
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        if kind != "equal":
            for side, (start, end) in enumerate(((i, i_end), (j, j_end))):
                if end > start:
                    spans[side].append((starts[side][start], starts[side][end]))
    return tuple(spans[0]), tuple(spans[1])


def compact(rows: list[Row]) -> list[Row]:
    """For two columns: old lines and the new ones that follow them, none alike, share rows."""
    found = []
    for alone, group in itertools.groupby(rows, key=lambda row: row.old is None or row.new is None):
        if not alone:
            found += group
            continue
        group = list(group)
        sides = [row.old for row in group if row.old is not None], [row.new for row in group if row.new is not None]
        found += [Row(old, new) for old, new in itertools.zip_longest(*sides)]
    return found


def hunks(rows: list[Row], context: int = CONTEXT) -> list[list[Row]]:
    """The changed rows with `context` rows around them; what lies between is left out."""
    changed = [index for index, row in enumerate(rows) if not row.same]
    found = []
    for index in changed:
        low, high = max(0, index - context), min(len(rows), index + context + 1)
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return [rows[low:high] for low, high in found]


def notes_of(rows: Iterable[Row], old: Source, new: Source) -> list[str]:
    """The "# vN:" notes on the changed lines of a hunk, each once."""
    texts = []
    for row in rows:
        if not row.same:
            texts += [side.notes.get(index) for side, index in ((old, row.old), (new, row.new)) if index is not None]
    return list(dict.fromkeys(text for text in texts if text))


def changed_share(old: Source, new: Source) -> float:
    """Lines of code that a step changed (added or removed, whichever are more) over the newer file's lines of code."""
    rows = [row for row in aligned(old, new, code_only=True) if not row.same]
    added = sum(row.new is not None for row in rows)
    removed = sum(row.old is not None for row in rows)
    return max(added, removed) / sum(text is not None for text in new.code)
