"""Records: what goes in comes out, nothing is overwritten, stale is told from current, noise from change."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import environment, results
from bench.cases import Case
from bench.runner import ceiling_record, rate_fields
from common.lineage import versions_of

CASE = Case("prefill", "fp16", 1, 16, 16, 8192, 8192, 128, True, preset="quick")


def record(run_id="r1", median=1.0, spread=0.01, **fields):
    times = {"median_ms": median, "p20_ms": median * (1 - spread), "p80_ms": median * (1 + spread)}
    who = {"version": "v1", "role": "version", "variant": "own tiles", "timing": "events", "run_id": run_id}
    return results.case_fields(CASE) | times | who | {"gate": "pass", "source_hash": "x"} | fields


def test_records_come_back_as_they_went(tmp_path):
    written = [record(error=1.234567e-4, config={"BLOCK_M": 128}, note="kept"), record("r2", window=[3, None])]
    results.append(tmp_path / "new", "prefill", written)
    assert results.load(tmp_path / "new", "prefill") == written
    assert results.load(tmp_path / "new", "decoding") == []


def test_append_never_overwrites(tmp_path):
    results.append(tmp_path, "prefill", [record("r1")])
    before = results.records_path(tmp_path, "prefill").read_bytes()
    results.append(tmp_path, "prefill", [record("r2")])
    after = results.records_path(tmp_path, "prefill").read_bytes()
    assert after.startswith(before) and len(after) > len(before)


def test_a_line_cut_short_by_a_crash_costs_only_itself(tmp_path, capsys):
    results.append(tmp_path, "prefill", [record("r1")])
    with results.records_path(tmp_path, "prefill").open("a") as file:
        file.write('{"family": "pre')
    results.append(tmp_path, "prefill", [record("r2")])
    assert [r["run_id"] for r in results.load(tmp_path, "prefill")] == ["r1", "r2"]
    assert "line 2" in capsys.readouterr().err


def test_nan_is_no_record(tmp_path):
    with pytest.raises(ValueError):
        results.append(tmp_path, "prefill", [record(error=float("nan"))])


def test_environments_of_other_runs_stay(tmp_path):
    results.save_env(tmp_path, "prefill", "r1", {"gpu": "A"})
    results.save_env(tmp_path, "prefill", "r2", {"gpu": "B"})
    results.save_env(tmp_path, "prefill", "r2", {"gpu": "C"})
    assert results.load_envs(tmp_path, "prefill") == {"r1": {"gpu": "A"}, "r2": {"gpu": "C"}}
    assert [path.name for path in tmp_path.iterdir()] == ["prefill.env.json"]


def test_the_newest_run_of_each_cell_counts():
    records = [record("r2", 2.0), record("r1", 1.0), record("r1", 5.0, variant="parent tiles")]
    assert [(r["run_id"], r["variant"]) for r in results.newest(records)] == [
        ("r2", "own tiles"),
        ("r1", "parent tiles"),
    ]


def test_every_run_keeps_its_ceiling():
    """A version that was measured in an earlier run is a share of that run's ceiling."""
    ceilings = [record(run, version="matmul", role="ceiling") for run in ("r1", "r2")]
    assert results.newest([ceilings[0], record("r1"), ceilings[1]]) == [ceilings[0], record("r1"), ceilings[1]]


def test_within_a_run_the_later_record_counts():
    assert results.newest([record("r1", 1.0), record("r1", 2.0)])[0]["median_ms"] == 2.0


@pytest.mark.parametrize(
    "field, value", [("layout", "bhsd"), ("batch", 2), ("causal", False), ("lengths", [5]), ("timing", "graph")]
)
def test_other_shapes_are_other_cells(field, value):
    assert len(results.newest([record(), record(**{field: value})])) == 2


def test_read_ceilings_of_different_sizes_are_kept_apart():
    sizes = [{"name": "read", "dtype": "fp16", "timing": "graph", "flops": 0, "bytes": size} for size in (10**6, 10**9)]
    records = [ceiling_record("decoding", ceiling, [0.1, 0.2, 0.3], "r1") for ceiling in sizes]
    assert [r["gbps"] for r in results.newest(records)] == pytest.approx([5.0, 5000.0])
    assert {r["role"] for r in records} == {r["pass"] for r in records} == {"ceiling"}


def test_a_version_is_stale_when_its_code_changed_or_is_gone():
    version = versions_of("prefill")[0]
    current = record(version=version.name, source_hash=version.source_hash)
    assert not results.is_stale(current)
    assert results.is_stale(current | {"source_hash": "0" * 12})
    assert results.is_stale(current | {"version": "v999"})
    assert not results.is_stale(current | {"version": "fa3", "role": "peer", "source_hash": None})


def verdict(old, new):
    return [change.verdict for change in results.changes([old], [new])]


def test_a_change_is_more_than_two_percent_and_more_than_the_spread():
    assert verdict(record(), record("r2", 0.90)) == ["faster"]
    assert verdict(record(), record("r2", 1.10)) == ["slower"]
    assert verdict(record(), record("r2", 0.90, spread=0.2)) == ["same"]  # the spreads overlap
    assert verdict(record(spread=0.001), record("r2", 0.985, spread=0.001)) == ["same"]  # apart, but by 1.5 %
    assert verdict(record(), record("r2", gate="error", median_ms=None)) == ["broke"]
    assert verdict(record(gate="error", median_ms=None), record("r2")) == ["mended"]
    assert verdict(record(), record("r2", batch=9)) == []


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 0.3))
def test_comparing_the_other_way_round_gives_the_opposite(old, new, spread):
    opposite = {"faster": "slower", "slower": "faster", "same": "same"}
    there, back = verdict(record(median=old, spread=spread), record("r2", new, spread)), None
    back = verdict(record(median=new, spread=spread), record("r2", old, spread))
    assert [opposite[v] for v in there] == back


def test_rates_follow_from_the_median():
    fields = rate_fields(CASE, "pass", [1.0, 2.0, 9.0], (989, 4800))
    assert fields["median_ms"] == 2.0 and fields["gate"] == "pass" and fields["samples"] == 3
    assert fields["tflops"] == pytest.approx(CASE.flops() / 2e9) and fields["gbps"] == pytest.approx(CASE.bytes() / 2e6)


@pytest.mark.parametrize(
    "gate, samples, words",
    [("error 1", [1.0], "error 1"), ("pass", [], "no samples"), ("pass", [1e-4], "above the hardware")],
)
def test_a_red_gate_has_no_time(gate, samples, words):
    fields = rate_fields(CASE, gate, samples, (989, 4800))
    assert words in fields["gate"]
    assert {fields[name] for name in ("median_ms", "p20_ms", "p80_ms", "tflops", "gbps")} == {None}


def test_the_designs_fields_are_all_named():
    wanted = """family version role dtype batch heads_q heads_kv seqlen_q seqlen_k head_dim causal variant config timing
        median_ms p20_ms p80_ms tflops gbps peak_mem_mb error error_limit gate source_hash run_id case window lengths
        layout page_size num_splits first_call_ms""".split()
    assert set(wanted) == set(results.Record.__annotations__)
    assert json.loads(json.dumps(results.case_fields(CASE)))["pass"] == "fwd"


def test_the_environment_names_no_absolute_path():
    gpu = {"name": "GPU", "arch": "sm_90", "sm_count": 1, "tflops": {}, "gbps": None}
    telemetry = environment.Telemetry("no such GPU")
    argv = ["/opt/bench/run_prefill_bench.py", "--out", "/tmp/there", "--replay=/tmp/a/b", "--seq-lens", "1k"]
    env = environment.describe(gpu, 3, argv, telemetry)
    telemetry.close()
    assert env["command"] == "run_prefill_bench.py --out there --replay=b --seq-lens 1k" and env["seed"] == 3
    assert not re.search(r"[\s\"=]/\w", json.dumps(env))


def test_run_ids_sort_by_time():
    first, second = environment.new_run_id(), environment.new_run_id()
    assert first != second and first[:16] <= second[:16] and re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", first)
