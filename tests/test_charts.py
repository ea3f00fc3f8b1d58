"""Charts are drawn from records, say where these were measured, cut nothing, and show no speed of a wrong kernel."""

import pytest

charts = pytest.importorskip("bench.charts")
matplotlib = pytest.importorskip("matplotlib")

from bench.book import Book, book_of, digest  # noqa: E402
from tests import synthetic  # noqa: E402
from tests.synthetic import environment, red  # noqa: E402


def figures(records, family="prefill"):
    with matplotlib.rc_context(charts.STYLE):
        return dict(charts._figures(book_of(records, family), environment()))


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]


@pytest.fixture(scope="module")
def many():
    """A long lineage with one stale version and one that is wrong at some shapes."""
    records = synthetic.records("prefill", versions=10) + synthetic.records("prefill", versions=10, preset="seed")
    wrong = {"version": "v2", "causal": True, "variant": "own tiles"}
    records = [red(r) if r["seqlen_k"] == 2048 and all(r[k] == v for k, v in wrong.items()) else r for r in records]
    return [r | {"stale": True} if r["version"] == "v4" else r for r in records]


@pytest.fixture(scope="module")
def drawn(many):
    return figures(many)


@pytest.fixture(scope="module")
def decoding():
    """Six versions; v2 is wrong on the ragged batch, v3 is stale."""
    records = synthetic.records("decoding", versions=6) + synthetic.records("decoding", versions=6, preset="seed")
    records = [red(r) if r["version"] == "v2" and r["lengths"] else r for r in records]
    return figures([r | {"stale": True} if r["version"] == "v3" else r for r in records], "decoding")


def test_the_charts_of_both_families(drawn, decoding):
    all_of_decoding = decoding
    assert set(drawn) == {
        "prefill", "prefill-fp16", "prefill-fp16-batch-2", "prefill-bf16", "prefill-e4m3", "prefill-shapes",
        "prefill-gain", "prefill-memory", "prefill-fp8",
    }  # fmt: skip
    decoding = figures(synthetic.grid("decoding", versions=1), "decoding")
    first = {"decoding", "decoding-bf16", "decoding-fp32", "decoding-shapes", "decoding-gain", "decoding-launched",
             "decoding-ragged"}  # fmt: skip
    assert set(decoding) == first | {"decoding-paged"}, "FA3 has pages"
    assert {"v1 over eager", "v1 over FA2"} <= set(texts(decoding["decoding-gain"]))
    assert set(all_of_decoding) == first | {"decoding-paged", "decoding-fp8", "decoding-e4m3"}


def test_each_chart_says_gpu_and_date_and_that_it_was_recorded(drawn, decoding):
    for name, figure in (drawn | decoding).items():
        found = " ".join(texts(figure))
        assert "Test GPU" in found and "2026-01-01" in found and "Recorded; torch 2.13.0; triton 3.7.1" in found, name


def test_nothing_is_cut_and_no_names_overlap(drawn, decoding):
    """All text lies inside the picture, and names at line ends do not lie on each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    text_of = matplotlib.text.Text

    for name, figure in (drawn | decoding).items():
        FigureCanvasAgg(figure).draw()
        edge, boxes = figure.bbox, []
        axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
        beyond = {tick.label1 for axis in axes for tick in axis.get_major_ticks()
                  if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())}  # fmt: skip
        for text in figure.findobj(text_of):
            if not (text.get_text().strip() and text.get_visible()) or text in beyond:
                continue
            box = text_of.get_window_extent(text)
            inside = edge.x0 - 1 <= box.x0 and box.x1 <= edge.x1 + 1 and edge.y0 - 1 <= box.y0 and box.y1 <= edge.y1 + 1
            assert inside, f"{name}: {text.get_text()!r} is cut"
            if isinstance(text, matplotlib.text.Annotation) and "shapes" not in name:
                boxes.append((text.get_text(), box))
        for i, (one, a) in enumerate(boxes):
            for other, b in boxes[i + 1 :]:
                across = min(a.x1, b.x1) - max(a.x0, b.x0)
                down = min(a.y1, b.y1) - max(a.y0, b.y0)
                assert across <= 0 or down <= 0.25 * min(a.height, b.height), f"{name}: {one!r} lies on {other!r}"


def test_a_version_has_one_colour_and_marker_everywhere(drawn):
    assert len({charts.colour(f"v{n}") for n in range(1, 11)}) == 10
    assert charts.colour("fa3") == charts.colour("eager") == charts.PEER
    for name in ("prefill", "prefill-bf16", "prefill-memory", "prefill-fp8"):
        lines = [line for axes in drawn[name].axes for line in axes.get_lines()]
        for n in (3, 10):
            own = [line for line in lines if line.get_color() == charts.colour(f"v{n}") and line.get_linewidth() > 1]
            own = [line for line in own if line.get_marker() != "x"]
            assert own and {line.get_marker() for line in own} == {charts.MARKERS[n - 1]}


def test_a_red_gate_is_a_cross_and_not_a_speed(drawn):
    causal = next(axes for axes in drawn["prefill"].axes if "causal" in axes.get_title(loc="left"))
    own = [line for line in causal.get_lines() if line.get_color() == charts.colour("v2")]
    crosses = [line for line in own if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2048]] and list(crosses[0].get_ydata()) == [0]
    (line,) = [line for line in own if line.get_marker() != "x"]
    values = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert values[2048] != values[2048] and values[4096] > 0, "a gap where it was wrong"
    assert any("wrong at that shape" in text.replace("\n", " ") for text in texts(drawn["prefill"]))


def test_all_red_draws_nothing(tmp_path):
    records = [red(r) for r in synthetic.records("prefill", preset="quick") if r["role"] == "version"]
    assert charts.draw_charts(records, environment(), tmp_path, "prefill") == []
    assert list(tmp_path.iterdir()) == []


def test_a_stale_version_is_dotted_and_named(drawn):
    axes = drawn["prefill"].axes[0]
    (line,) = [x for x in axes.get_lines() if x.get_color() == charts.colour("v4") and x.get_marker() != "x"]
    assert line.get_linestyle() == ":"
    assert any(text.startswith("v4 (stale)") for text in texts(drawn["prefill"]))
    assert "v5 over v4, own tiles (stale)" in texts(drawn["prefill-gain"])


def test_the_values_drawn_are_the_values_recorded(many, drawn):
    book = Book(many, "prefill")
    axes = next(a for a in drawn["prefill-fp16"].axes if a.get_title(loc="left") == "D=256, full, 8 heads")
    (line,) = [x for x in axes.get_lines() if x.get_color() == charts.colour("v7") and x.get_marker() != "x"]
    cells = {c.seqlen_k: c for c in book.cells if c[:3] == ("fp16", 256, False)}
    assert list(line.get_xdata()) == sorted(cells)
    assert list(line.get_ydata()) == [book.speed(book.latest("v7", cells[length])) for length in sorted(cells)]


def test_the_launch_is_the_gap_between_kernel_and_call(decoding):
    """Of each version a panel, its own axes the same as the others'; the plan only where there is one."""
    panels = {axes.get_title(loc="left"): axes for axes in decoding["decoding-launched"].axes}
    assert list(panels) == ["v1", "v2", "v3 (stale)", "v4", "v5", "v6"]
    assert len({axes.get_ylim() for axes in panels.values()}) == 1
    lines = [[line for line in axes.get_lines() if line.get_color() != charts.PEER] for axes in panels.values()]
    assert [len(found) for found in lines] == [2, 2, 2, 2, 2, 3]
    kernel, call, plan = (line.get_ydata() for line in lines[5])
    assert call - kernel == pytest.approx([31] * 4) and plan - kernel == pytest.approx([11] * 4)
    assert "at 1k\neager +31 us\nplan +11 us" in texts(decoding["decoding-launched"])
    assert any("fill of one number" in text and "11 us" in text for text in texts(decoding["decoding-launched"]))


def test_the_ragged_batch_has_a_bar_for_each_and_a_cross_for_who_is_wrong(decoding):
    axes, of_fp8 = decoding["decoding-ragged"].axes
    assert [x.get_title(loc="left").split(":")[0] for x in (axes, of_fp8)] == ["fp16", "e4m3"]
    assert len(axes.patches) == 7 and [patch.get_y() for patch in axes.patches].count(1 - 0.33) == 0
    found = texts(decoding["decoding-ragged"])
    assert "  red: wrong here, so no speed" in found and any("64 sequences of 1 to 64k keys" in text for text in found)
    assert sum("of ceiling" in text for text in found) == 7 + len(of_fp8.patches) > 7


def test_pages_and_eight_bits_are_ratios_to_the_same_shape(decoding):
    for name, what, target in (("decoding-paged", 0.96, "target 0.95x"), ("decoding-fp8", 2, "target 1.8x")):
        (axes,) = decoding[name].axes
        ours = [line for line in axes.get_lines() if line.get_color() == charts.colour("v6") and len(line.get_xdata())]
        assert ours and all(line.get_xdata()[0] == pytest.approx(what, rel=0.1) for line in ours)
        assert target in texts(decoding[name])


def test_memory_grows_as_recorded(drawn):
    (axes,) = drawn["prefill-memory"].axes
    ends = [line.get_ydata()[-1] / line.get_ydata()[-2] for line in axes.get_lines()]
    assert max(ends) == pytest.approx(4, rel=0.02) and min(ends) == pytest.approx(2, rel=0.02)


def test_files_carry_the_digest_of_their_records(tmp_path):
    from PIL import Image

    records = synthetic.records("decoding", versions=1, preset="quick")
    for path in charts.draw_charts(records, environment(), tmp_path, "decoding"):
        assert Image.open(path).text["Records"] == digest(records)
    changed = [records[0] | {"gbps": 1.0}, *records[1:]]
    assert digest(changed) != digest(records)
    (path, *_) = charts.draw_charts(records, {}, tmp_path, "decoding", formats=("svg",))
    svg = path.read_text()
    assert digest(records) in svg and ">GB/s</text>" in svg, "text stays text"


@pytest.mark.parametrize("family, keep", [
    ("prefill", lambda r: r["version"] == "v1"),  # no peers, no ceilings
    ("prefill", lambda r: r["role"] == "peer"),
    ("prefill", lambda r: r["seqlen_k"] == 8192),  # one length
    ("decoding", lambda r: r["version"] == "v1" and r["timing"] == "graph"),
    ("decoding", lambda r: r["seqlen_k"] == 8192),
])  # fmt: skip
def test_part_of_a_run_draws_what_it_has(family, keep):
    for figure in figures([r for r in synthetic.records(family) if keep(r)], family).values():
        assert len(figure.axes) >= 1


def test_labels_are_pushed_apart_and_stay_in_order():
    places = charts.spread_out([0.5, 0.51, 0.1, 0.52], 0.1, 0.0, 1.0)
    assert places == pytest.approx([0.41, 0.51, 0.1, 0.61])
    assert charts.spread_out([0.99, 1.0], 0.2, 0.0, 1.0) == pytest.approx([0.8, 1.0])
    crowded = charts.spread_out([0.5] * 30, 0.1, 0.0, 1.0)
    assert crowded[0] == pytest.approx(0) and crowded[-1] == pytest.approx(1)
