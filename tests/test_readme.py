"""README and docs agree with the records, with the files, and with the code that they show."""

import pathlib
import re

import pytest

from bench import results, tables
from bench.book import METRIC, book_of, digest
from common.hardware import interpreting

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
CHARTS = sorted(ROOT.glob("results/*/*.png"))
readable = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@readable
def test_tables_are_what_the_records_say(page):
    text = page.read_text()
    assert tables.fill(text) == text, f"{page.name} differs from the records: run `make readme`"


def test_the_readme_has_its_tables():
    names = set(re.findall(r"<!-- table:(\S+) -->", (ROOT / "README.md").read_text()))
    assert {"prefill", "prefill-picture", "decoding", "decoding-picture", "machine"} <= names


@pytest.mark.parametrize("chart", CHARTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_charts_are_drawn_from_the_records(chart):
    """Each chart names the records that it was drawn from (and with them what is stale)."""
    image = pytest.importorskip("PIL.Image").open(chart)
    family = chart.stem.split("-")[0]
    records = results.load(chart.parent, family)
    assert image.text["Records"] == digest(book_of(records, family).given), f"{chart.name} is old: run `make readme`"


def test_records_have_their_charts():
    for family in METRIC:
        if results.load(results.RESULTS / tables.SHOWN, family):
            assert results.RESULTS / tables.SHOWN / f"{family}.png" in CHARTS


@readable
def test_speeds_are_generated_and_not_typed(page):
    """Outside of the generated tables no page states a rate: it would outlive what it was measured on."""
    typed = re.sub(r"<!-- table:.*?<!-- /table -->", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r"\d[\d.,]*\s*(?:TFLOP/s|GB/s)", typed)


@readable
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@readable
def test_commands_exist(page):
    """`make X` is a target; a script, and each of its flags, exists."""
    from bench.command_line import parser

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = page.read_text()
    assert set(re.findall(r"^    make ([a-z-]+)|`make ([a-z-]+)", text, flags=re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    for script, arguments in re.findall(r"^    python (\w+\.py)(.*)$", text, flags=re.MULTILINE):
        assert (ROOT / script).exists()
        if script.startswith("run_"):
            parser(script.split("_")[1]).parse_args(arguments.split("#")[0].split())


def test_the_library_snippets_run():
    """The README's Python, as written on a GPU; on a CPU with short sequences."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        if interpreting():
            block = block.replace('device="cuda"', 'device="cpu"').replace("65536", "200")
            block = re.sub(r"\b(4096|8192)\b", "96", block).replace("1500", "50")
        scope = {}
        exec(block, scope)
        assert scope["out"].isfinite().all()
