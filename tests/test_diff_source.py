"""The source diff: alignment, changed words, code without comments, notes, and the budget of a step."""

import itertools

import pytest

from bench.source_diff import Row, Source, aligned, changed_share, compact, hunks, notes_of
from common.lineage import FAMILIES, find_version, versions_of

OLD = '''"""Docstring."""

def f(x):
    """Another,
    of two lines.
    """
    text = "# no comment"  # a comment
    total = 0
    for i in range(x):
        total = total + i / x
    return total
'''
NEW = '''"""Docstring of the new one."""

def f(x):
    text = "# no comment"
    total = 0
    for i in range(x):
        total = total + i  # v2: the sum alone
    return total / x  # v2: divided once
'''


def test_code_leaves_comments_and_docstrings_out():
    code = Source(OLD).code
    assert [text for text in code if text is not None] == [
        "def f(x):", '    text = "# no comment"', "    total = 0", "    for i in range(x):",
        "        total = total + i / x", "    return total",
    ]  # fmt: skip
    assert len(code) == len(OLD.splitlines())


@pytest.mark.parametrize("code_only", [False, True])
def test_every_line_is_there_once_and_in_order(code_only):
    old, new = Source(OLD), Source(NEW)
    rows = aligned(old, new, code_only)
    assert [row.old for row in rows if row.old is not None] == [index for index, _ in old.numbered(code_only)]
    assert [row.new for row in rows if row.new is not None] == [index for index, _ in new.numbered(code_only)]
    assert compact(rows) != [] and [row.new for row in compact(rows) if row.new is not None] == [
        row.new for row in rows if row.new is not None
    ]


def test_changed_words():
    old, new = Source(OLD), Source(NEW)
    [row] = [row for row in aligned(old, new, code_only=True) if row.old == 9]
    assert row == Row(9, 6, ((25, 29),), ())
    assert old.lines[9][25:29] == " / x"
    [row] = [row for row in aligned(old, new, code_only=True) if row.old == 10]
    assert [new.code[7][start:end] for start, end in row.new_spans] == [" / x"]


def test_a_comment_alone_is_no_change_of_code():
    rows = aligned(Source("a = 1  # one\nb = 2\n"), Source("a = 1\n# two\nb = 2\n"), code_only=True)
    assert all(row.same for row in rows)
    assert changed_share(Source("a = 1  # one\n"), Source("a = 1\n")) == 0


def test_share_counts_the_larger_side():
    assert changed_share(Source("a = 1\nb = 2\n"), Source("a = 1\nc(3, 4)\nd[5]\ne.f\n")) == 3 / 4
    assert changed_share(Source("a = 1\nb = 2\nc = 3\n"), Source("a = 1\n")) == 2


def test_hunks_and_notes():
    old = Source("".join(f"line_{i} = {i}\n" for i in range(40)))
    lines = [f"line_{i} = {i}\n" for i in range(40)]
    lines[5], lines[30] = "line_5 = 55  # v2: much more\n", "line_30 = 0  # v2: none\n"
    new = Source("".join(lines))
    found = hunks(aligned(old, new))
    assert [(hunk[0].new, hunk[-1].new) for hunk in found] == [(2, 8), (27, 33)]
    assert [notes_of(hunk, old, new) for hunk in found] == [["v2: much more"], ["v2: none"]]
    assert hunks(aligned(old, old)) == []


def test_a_whole_file_has_no_notes_of_unchanged_lines():
    new = Source(NEW)
    assert notes_of(aligned(new, new), new, new) == []


# ---- the lineage: a step is small

BUDGET = 0.25  # of the newer file's lines of code
EXCEPTIONS = {
    ("prefill", "v3"): "two ideas, as the seeds have it: block pointers, and FP8 with its scales and arguments",
    ("prefill", "v4"): "wasted instructions have three sources: exp, the mask, the order of the blocks",
    ("prefill", "v5"): "descriptors replace all addressing, and the version says what they cannot address",
    ("prefill", "v6"): "a new start: the kernel is written in Gluon",
    ("prefill", "v7"): "one loop over tiles and blocks takes the place of two",
    ("prefill", "v8"): "FP8 takes its scales, packing and layouts along, and rescaling moves behind PV",
    ("prefill", "v9"): "the maximum and the sums change their form everywhere; wide heads need the output in pieces",
    ("prefill", "v10"): "v8's softmax and packing stand in its file, v10's in common/lazy_softmax.py",
    ("decoding", "v2"): "rows of several queries and heads take the place of one row",
    ("decoding", "v3"): "the second kernel goes, and its work moves into the first",
    ("decoding", "v5"): "a float8 cache has factors, and columns two by two, wherever K and V go",
    ("decoding", "v4"): "four features that caches need together; what later versions share moves to common",
    ("decoding", "v6"): "a new start: the kernel is written in Gluon",
    ("decoding", "v7"): "pages are named in each call between the entry and the producer, and have a ring of their own",
    ("decoding", "v9"): "FP8 alone: pairs and factors wherever q, k and v go, and a second group that computes",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_changes_a_quarter_at_most(family):
    """Where a step needs more it is two steps, or a new start: then it stands in EXCEPTIONS, with the reason."""
    over, versions = {}, {version.number: version for version in versions_of(family)}
    for version in versions.values():
        if parent := versions.get(version.parent):
            share = changed_share(*(Source(v.path.read_text()) for v in (parent, version)))
            if share > BUDGET:
                over[family, version.name] = f"{share:.0%} of {version.name}'s code lines differ from {parent.name}"
    unnamed = {step: text for step, text in over.items() if step not in EXCEPTIONS}
    assert not unnamed
    numbers = {version.name: version.parent for version in versions.values()}
    stale = [step for step in EXCEPTIONS if step[0] == family and step not in over and numbers.get(step[1]) in versions]
    assert not stale, "exceptions that are none any more"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_two_versions_align(family):
    sources = [Source(version.path.read_text()) for version in versions_of(family)]
    for old, new in itertools.permutations(sources, 2):
        for code_only in (False, True):
            rows = aligned(old, new, code_only)
            assert [row.old for row in rows if row.old is not None] == [index for index, _ in old.numbered(code_only)]
            assert [row.new for row in rows if row.new is not None] == [index for index, _ in new.numbered(code_only)]


def test_v2_shows_its_idea():
    old, new = (Source(find_version("prefill", name).path.read_text()) for name in ("v1", "v2"))
    notes = [note for hunk in hunks(aligned(old, new)) for note in notes_of(hunk, old, new)]
    assert any(note.startswith("v2:") for note in notes)
