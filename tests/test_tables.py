"""Tables say what the records say: no speed for a red gate, ratios inside one run, stale marked, worst cells shown."""

import re
from dataclasses import replace

import pytest

from bench import results, tables, targets
from bench.book import OWN, PARENT, Book, Cell, mark_stale, sweeps
from bench.cases import cases_for
from common.lineage import versions_of
from tests import synthetic
from tests.synthetic import LATER, RUN, red

QUICK = cases_for("prefill", "quick")


def one(version: str, speed: float, role: str = "version", case=QUICK[0], **fields) -> dict:
    return synthetic.record(case, version, role, speed, **fields)


def row(table: str, name: str) -> list[str]:
    """The cells of the first line that begins with `name`, in a table of any format."""
    lines = [re.split(r"\s{2,}", line.strip(" |").replace("|", "  ").strip()) for line in table.splitlines()]
    return next(line for line in lines if line[0] == name)


def test_a_red_gate_has_a_reason_and_no_number():
    records = [one("v1", 100.0), red(one("v2", 777.0), "relative error 0.37 is above 0.0006")]
    text = tables.terminal_table(records, "prefill")
    assert "v2: red, relative error 0.37 is above 0.0006" in text
    assert row(text, "v2")[1] == "red"
    assert "777" not in text and "7.77x" not in text


def test_a_red_record_is_never_speed_even_with_a_time_left_in_it():
    sneaky = one("v2", 777.0, gate="relative error 1 is above 0.0006")
    book = Book([one("v1", 100.0), sneaky], "prefill")
    cell = Cell.of(sneaky)
    assert book.speed(sneaky) is None and book.of_ceiling(sneaky) is None
    assert book.ratio("v2", "v1", cell) is None and book.best_peer("v2", cell) is None
    assert "777" not in tables.terminal_table([one("v1", 100.0), sneaky], "prefill")


def test_an_older_green_run_does_not_hide_a_newer_red_one():
    records = [one("v1", 100.0), one("v2", 300.0), one("v1", 100.0, run_id=LATER), red(one("v2", 300.0, run_id=LATER))]
    book, cell = Book(records, "prefill"), Cell.of(records[0])
    assert book.speed(book.latest("v2", cell)) is None
    assert book.ratio("v2", "v1", cell) is None


def test_ratios_stay_inside_a_run():
    records = [one("v1", 100.0), one("v2", 300.0), one("v1", 200.0, run_id=LATER)]
    book, cell = Book(records, "prefill"), Cell.of(records[0])
    assert book.speed(book.latest("v1", cell)) == 200.0
    assert book.ratio("v2", "v1", cell) == pytest.approx(3.0)


def test_gains_are_given_alone_and_with_own_tiles():
    records = [one("v1", 100.0), one("v2", 300.0), one("v2", 110.0, variant=PARENT)]
    text = tables.terminal_table(records, "prefill")
    assert {"1.10x", "3.00x"} <= set(row(text, "v2"))
    ladder = text[text.index("gain, idea alone") :]
    assert row(ladder, "v2")[-2:] == ["1.10x", "3.00x"]


def test_gains_follow_the_parent_and_not_the_number():
    book = Book([one("v1", 100.0), one("v2", 300.0), one("v3", 450.0)], "prefill", {"v1": None, "v2": "v1", "v3": "v1"})
    assert row(tables.ladder_table(book, "simple"), "v3")[-1] == "4.50x"


def test_the_spread_is_p20_to_p80_and_the_slow_end_comes_first():
    record = one("v1", 100.0, median_ms=2.0, p20_ms=1.6, p80_ms=2.5)
    assert Book([record], "prefill").spread(record) == (pytest.approx(80.0), pytest.approx(125.0))
    assert "80.0 to 125" in tables.terminal_table([record], "prefill")


def test_the_ceiling_is_of_the_same_run_and_dtype():
    def ceiling(**f):
        blank = dict.fromkeys(results.SHAPE) | {"family": "prefill", "pass": "ceiling", "role": "ceiling", "gbps": None}
        return blank | {"version": "matmul", "run_id": RUN, "stale": False} | f

    record = one("v1", 100.0)
    others = [ceiling(dtype="fp16", tflops=400.0, run_id=LATER), ceiling(dtype="bf16", tflops=300.0),
              ceiling(dtype="fp16", tflops=800.0, version="copy")]  # fmt: skip
    assert Book([record, *others], "prefill").of_ceiling(record) is None
    measured = [ceiling(dtype="fp16", tflops=200.0), ceiling(dtype="fp16", tflops=250.0)]
    book = Book([record, *others, *measured], "prefill")
    assert book.of_ceiling(record) == pytest.approx(0.4), "the run's last word counts"
    fp8 = one("v3", 500.0, dtype="e5m2")
    assert Book([fp8, ceiling(dtype="e4m3", tflops=1000.0)], "prefill").of_ceiling(fp8) == pytest.approx(0.5)


def test_the_read_ceiling_is_the_one_nearest_in_size():
    small, large = cases_for("decoding", "quick")[1], cases_for("decoding", "quick")[2]
    blank = dict.fromkeys(results.SHAPE) | {"family": "decoding", "pass": "ceiling", "role": "ceiling", "tflops": None}
    blank |= {"version": "read", "dtype": "fp16", "run_id": RUN, "stale": False}
    ceilings = [blank | {"bytes": 34_000_000, "gbps": 3400.0}, blank | {"bytes": 537_000_000, "gbps": 4500.0}]
    records = [one("v1", 1000.0, case=small), one("v1", 1000.0, case=large)]
    book = Book(records + ceilings, "decoding")
    assert [book.ceiling(record)["gbps"] for record in records] == [3400.0, 4500.0]


def test_the_worst_cell_is_shown_with_its_peer():
    slow, fast = QUICK[0], QUICK[1]
    records = [one("v1", 90.0, case=slow), one("fa3", 300.0, "peer", case=slow), one("eager", 9.0, "peer", case=slow),
               one("v1", 220.0, case=fast), one("cudnn", 200.0, "peer", case=fast)]  # fmt: skip
    text = tables.peers_table(Book(records, "prefill"), "simple")
    assert f"0.30x fa3: {Cell.of(records[0]).label()}" in text
    assert f"1.10x cudnn: {Cell.of(records[3]).label()}" in text
    assert f"{(0.3 * 1.1) ** 0.5:.2f}x of 2 shapes" in text and "best of ours" not in text


def test_the_best_of_ours_takes_the_best_version_at_each_shape():
    records = [one("v1", 90.0), one("v2", 60.0), one("fa3", 100.0, "peer"), one("v1", 40.0, case=QUICK[1]),
               one("v2", 80.0, case=QUICK[1]), one("fa3", 100.0, "peer", case=QUICK[1])]  # fmt: skip
    cells = row(tables.peers_table(Book(records, "prefill"), "simple"), "best of ours")
    assert cells[1] == f"{(0.9 * 0.8) ** 0.5:.2f}x of 2 shapes" and cells[2].startswith("0.80x fa3")


def test_stale_is_marked_by_the_hash_of_the_source():
    version = versions_of("prefill")[0]
    current = {k: v for k, v in one(version.name, 100.0, source_hash=version.source_hash).items() if k != "stale"}
    old, gone = current | {"source_hash": "0" * 12}, current | {"version": "v99"}
    peer = current | {"role": "peer", "version": "fa3", "source_hash": None}
    assert [r["stale"] for r in mark_stale([current, old, gone, peer])] == [False, True, True, False]
    assert "(stale)" not in tables.terminal_table([current], "prefill")
    text = tables.terminal_table([old], "prefill")
    assert text.count(f"{version.name} (stale)") == 2, "in its row and in the ladder"


def test_a_current_record_takes_the_place_of_a_stale_one():
    records = [one("v1", 100.0), one("v1", 500.0, run_id=LATER, stale=True)]
    for order in (records, records[::-1]):
        book = Book(order, "prefill")
        assert book.speed(book.latest("v1", Cell.of(records[0]))) == 100.0 and not book.is_stale("v1")


def test_the_headline_is_the_cell_that_the_targets_name():
    for family, label in (("prefill", "fp16 D=128 S=8k full B=2 H=16"), ("decoding", "fp16 D=64 S=64k B=1 H=16")):
        assert Book(synthetic.grid(family), family).headline().label(family) == label
    assert Book([], "prefill").headline() is None
    assert Book([one("fa3", 300.0, "peer")], "prefill").headline() is None
    only = one("v1", 5.0, case=cases_for("prefill", "seed")[0])
    assert Book([only], "prefill").headline() == Cell.of(only)


def test_every_cell_is_in_one_sweep_of_one_layout():
    book = Book(synthetic.grid("prefill"), "prefill")
    found = sweeps(book.cells)
    assert sorted(cell for cells in found.values() for cell in cells) == sorted(book.cells)
    for sweep, cells in found.items():
        tokens, batches = {c.batch * c.seqlen_k for c in cells}, {c.batch for c in cells}
        assert tokens == {sweep.tokens} or batches == {sweep.batch}
    (paper,) = [cells for sweep, cells in found.items() if sweep.label() == "fp16, D=64, full, 32 heads, 16k tokens"]
    assert [cell.seqlen_k for cell in paper] == [512, 1024, 2048, 4096, 8192, 16384]


def test_comparison_says_what_changed_beyond_noise_slowest_first():
    old = [one(v, 100.0, case=QUICK[0]) for v in ("v1", "v2", "v3", "v4")] + [one("fa3", 400.0, "peer")]
    new = [one("v1", 101.0, run_id=LATER), one("v2", 80.0, run_id=LATER), one("v3", 140.0, run_id=LATER)]
    new += [red(one("v4", 900.0, run_id=LATER), "wrong"), one("fa3", 408.0, "peer", run_id=LATER)]
    text = tables.comparison_table(old, new)
    assert "5 measurements in common, 2 of them the same" in text
    assert "peers changed by +2.0%" in text
    names = [line.split()[0] for line in text.splitlines() if re.match(r"v\d", line)]
    assert names == ["v4", "v2", "v3"]
    assert row(text, "v4")[-1] == "red: wrong" and "900" not in text
    assert row(text, "v2")[-1] == "-20.0%" and row(text, "v3")[-1] == "+40.0%"
    assert "no measurement in common" in tables.comparison_table(old, [one("v9", 1.0)])


def test_every_number_of_a_preset_reaches_the_full_table():
    for family in ("prefill", "decoding"):
        book = Book(synthetic.records(family), family)
        text = tables.cells_table(book)
        for record in book.records:
            if record.get("variant") == OWN and record["timing"] != "eager":
                assert tables.number(book.speed(record)) in text


def test_fp8_table_gives_error_limit_and_gain():
    text = tables.fp8_table(Book(synthetic.records("prefill"), "prefill"))
    cells = row(text, "v3")
    assert cells[1] == "e4m3" and cells[-2:] == ["0.05", "0.06"] and cells[3] == "1.71x"


# ---- decoding's targets

SHAPE, SMALL = targets.wanted_cells(("fp16",))[5], targets.wanted_cells(("fp16",))[2]


def step(version: str, speed: float, role: str = "version", dtype: str = "fp16", run_id: str = RUN, **fields) -> dict:
    """A record of the shape SHAPE of preset paper, or of what `fields` make of it."""
    case = next(c for c in cases_for("decoding", "paper") if Cell.of(results.case_fields(c)) == SHAPE)
    changed = {name: fields.pop(name) for name in ("page_size", "lengths", "seqlen_k", "batch") if name in fields}
    case = replace(case, dtype=dtype, **changed)
    return synthetic.record(case, version, role, speed, run_id=run_id, **fields)


def found(records: list[dict]) -> dict[str, targets.Target]:
    return {target.what: target for target in targets.targets(Book(records, "decoding"), tables.geomean)}


def test_the_best_of_ours_meets_the_best_peer_of_its_own_run():
    records = [step("v1", 900.0), step("v2", 990.0), step("cudnn", 1000.0, "peer"), step("fa3", 800.0, "peer"),
               step("v2", 1500.0, run_id=LATER)]  # fmt: skip
    (row,) = [row for row in targets.shape_rows(Book(records, "decoding")) if row.ours]
    assert row.cell == SHAPE and row.ours["gbps"] == 990.0 and row.peer["version"] == "cudnn"
    assert row.ratio == pytest.approx(0.99)
    target = found(records)["speed over the best peer, every 16-bit shape"]
    assert target.met == "so far" and target.values == {SHAPE: pytest.approx(0.99)}
    slower = found([step("v2", 989.0), *records[2:4]])["speed over the best peer, every 16-bit shape"]
    assert slower.met == "no" and slower.worst == SHAPE


def test_a_red_gate_meets_no_target():
    records = [red(step("v2", 2000.0)), step("v1", 500.0), step("cudnn", 1000.0, "peer")]
    (row,) = [row for row in targets.shape_rows(Book(records, "decoding")) if row.ours]
    assert row.ours["version"] == "v1"
    assert all(row.ours is None for row in targets.shape_rows(Book(records[:1], "decoding")))


def test_shares_of_the_ceiling_go_where_their_size_is():
    ceiling = dict.fromkeys(results.SHAPE) | {
        "family": "decoding", "pass": "ceiling", "role": "ceiling", "tflops": None, "version": "read", "dtype": "fp16",
        "run_id": RUN, "gbps": 4000.0, "stale": False,
    }  # fmt: skip
    small = {"batch": SMALL.batch, "seqlen_k": SMALL.seqlen_k}
    records = [step("v1", 3900.0), step("v1", 2000.0, **small), ceiling | {"bytes": 537e6}, ceiling | {"bytes": 34e6}]
    shares = found(records)
    assert shares["of the read ceiling, 268 MB and more"].values == {SHAPE: pytest.approx(0.975)}
    assert shares["of the read ceiling, 34 MB"].values == {SMALL: pytest.approx(0.5)}
    assert found(records[:3])["of the read ceiling, 34 MB"].values == {}, "no ceiling of another size"


def test_eight_bits_and_pages_are_set_against_the_same_shape_and_run():
    """Of e4m3 half the bytes at 0.95 of the rate are 1.9 times as fast; the bytes of q and out count too."""
    records = [step("v5", 4000.0), step("v6", 4000.0, dtype="e4m3", run_id=LATER), step("v5", 3800.0, dtype="e4m3"),
               step("v5", 3900.0, page_size=16)]  # fmt: skip
    fp8, paged = (found(records)[name] for name in ("FP8 caches over 16 bits, from 268 MB on",
                                                    "pages of 16 over contiguous"))  # fmt: skip
    assert list(fp8.values.values()) == [pytest.approx(1.9, rel=0.01)] and fp8.met == "yes"
    assert list(paged.values.values()) == [pytest.approx(0.975)] and paged.met == "yes"
    small = step("v5", 3800.0, dtype="e4m3", batch=1), step("v5", 4000.0, batch=1)
    assert found(list(small))["FP8 caches over 16 bits, from 268 MB on"].values == {}


def test_what_a_launch_costs_is_of_the_newest_version_and_of_one_run():
    kernel = [step("v1", 4000.0), step("v2", 4000.0)]
    ms = kernel[1]["median_ms"]
    calls = [step("v2", 1.0, timing="eager", variant=variant, latency_ms=ms + gap)
             for variant, gap in ((OWN, 0.03), ("plain call", 0.036), ("plan", 0.0115))]  # fmt: skip
    old = step("v1", 1.0, timing="eager", latency_ms=9.0)
    (launch,) = targets.launches(Book([*kernel, *calls, old], "decoding"))
    assert launch.name == "v2" and launch.plan - launch.kernel == pytest.approx(11.5)
    text = tables.terminal_table([*kernel, *calls], "decoding")
    assert "(+36.0)" in text and "(+11.5)" in text and "until the GPU is done" in text
    met = {what: target.met for what, target in found([*kernel, *calls]).items() if "call to finished" in what}
    assert list(met.values()) == ["yes", "no"]
    assert targets.launches(Book([*kernel, step("v2", 1.0, timing="eager")], "decoding")) == [], "older records"


def test_targets_without_records_say_so():
    text = tables.targets_table(Book([step("v1", 900.0)], "decoding")).replace("\u00a0", " ")
    assert row(text, "ragged batch, of the read ceiling")[3] == "no record yet"
    assert text.count("no record yet") == 11 + len(targets.wanted_cells()) - 1, "every target; every shape but one"
    assert tables.targets_table(Book([], "decoding")) is None


@pytest.mark.parametrize("records", [[], synthetic.records("decoding", preset="quick")])
def test_no_records_of_a_family_say_so(records):
    assert tables.terminal_table(records, "prefill") == tables.NO_RECORDS


def test_fill_writes_between_markers_and_nowhere_else():
    text = "a\n<!-- table:x -->\nold\n<!-- /table -->\nb\n<!-- table:none -->\n<!-- /table -->\n"
    made = {"x": lambda: "| new |", "none": lambda: None}
    new = tables.fill(text, made)
    assert new.startswith("a\n<!-- table:x -->\n\n| new |\n\n<!-- /table -->\nb\n") and tables.NO_RECORDS in new
    assert tables.fill(new, made) == new


@pytest.mark.parametrize("text, message", [
    ("<!-- table:y -->\n<!-- /table -->", "'y' does not exist; there are x"),
    ("<!-- table:x -->\n", "needs a line"),
    ("<!-- table:x -->\n<!-- table:x -->\n<!-- /table -->\n", "needs a line"),
    ("<!-- /table -->\n", "needs a line"),
])  # fmt: skip
def test_fill_refuses_broken_markers(text, message):
    with pytest.raises(ValueError, match=message):
        tables.fill(text, {"x": lambda: ""})


def test_generated_tables_follow_the_records(tmp_path, monkeypatch, capsys):
    """write, check, then change one number: check fails."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder, page = tmp_path / tables.SHOWN, tmp_path / "page.md"
    page.write_text("".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in tables.TABLES))
    assert tables.main(["--write", str(page)]) == 0
    assert page.read_text().count(tables.NO_RECORDS) == len(tables.TABLES)
    assert "(prefill/flash_attention_v1.py)" in page.read_text(), "the ladder's ideas are there before its numbers"
    for family in ("prefill", "decoding"):
        results.append(folder, family, synthetic.grid(family))
        results.save_env(folder, family, RUN, synthetic.environment()[RUN])
    assert tables.main(["--check", str(page)]) == 1
    assert tables.main(["--write", str(page)]) == 0
    assert tables.main(["--check", str(page)]) == 0
    text = page.read_text()
    assert "Test GPU, 2026-01-01: fp16 D=128 S=8k full" in text and "(prefill/flash_attention_v1.py)" in text
    results.append(folder, "prefill", [one("v1", 123.4, run_id=LATER, stale=False)])
    capsys.readouterr()
    assert tables.main(["--check", str(page)]) == 1
    assert "make readme" in capsys.readouterr().out


def test_flags_that_make_no_sense(tmp_path, capsys):
    assert tables.main(["--check", str(tmp_path / "absent.md")]) == 2
    assert "absent.md" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        tables.main([])
    assert stop.value.code == 2


def test_gpu_info_names_every_version_or_says_why_there_is_no_gpu():
    text = tables.gpu_info()
    assert text.startswith("No GPU") or all(v.label in text for family in tables.METRIC for v in versions_of(family))
