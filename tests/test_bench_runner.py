"""The scripts' flags, the plan, the rounds, and what a provider that fails costs the others.

Needs no GPU: objects of this process stand in for the worker processes, and eager PyTorch for the kernels.
"""

import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import synthetic
import torch

import decoding
from bench import providers, results, runner, without_gpu
from bench.cases import FP8, Case
from bench.command_line import parser
from bench.providers import OWN, PARENT, PLAN, Bound, Entrant, NotHere, why_not_case
from bench.runner import Run, main, plan
from bench.timing import HostClock
from bench.worker import Failed, Server, WorkerLost, explain, timings_of
from common.hardware import INTERPRETER, KNOWN, interpreting, pretend
from common.lineage import find_version, versions_of
from common.reference import eager_attention

TINY = Case("prefill", "fp32", 1, 2, 2, 16, 16, 16, preset="quick")
V1, V2, V2_PARENT = (Entrant("version", *who) for who in (("v1",), ("v2",), ("v2", PARENT)))
FA2, FA3 = Entrant("peer", "fa2"), Entrant("peer", "fa3", process="fa3")


class Crash(BaseException):
    """The process of whoever raises it is gone."""


class Process:
    """A Worker without a process: requests and answers go through JSON all the same."""

    def __init__(self, *_):
        self.stop()

    def start(self):
        pass

    def stop(self):
        self.server = Server(HostClock(), INTERPRETER)

    def ask(self, do, timeout=60.0, **request):
        try:
            reply = json.loads(json.dumps(self.server.answer(json.loads(json.dumps({"do": do} | request)))))
        except Crash as last_words:
            self.stop()
            raise WorkerLost(str(last_words)) from None
        if "ok" in reply:
            return reply["ok"]
        raise NotHere(reply["absent"]) if "absent" in reply else Failed(reply["failed"])


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """stage(behaviour) gives a Run; behaviour maps an entrant to a function of (right answer, number of the call) that
    gives its answer; who is not named is right. run.calls lists who was called.
    """
    calls = []

    def begin(behaviour=None, cells=((TINY, (V1, V2, FA2)),), configs=None, rounds=5):
        def bind(entrant, inputs):
            act = (behaviour or {}).get(entrant)
            count = iter(range(10**6))

            def run(out):
                calls.append(entrant)
                number = next(count)
                answer = eager_attention(inputs.q, inputs.k, inputs.v, is_causal=inputs.case.causal)
                return answer if act is None else act(answer, number)

            return Bound(run, config=(configs or {}).get(entrant))

        monkeypatch.setattr(providers, "bind", bind)
        monkeypatch.setattr(runner, "Worker", Process)
        args = parser("prefill").parse_args(["--rounds", str(rounds), "--out", str(tmp_path)])
        run = Run("prefill", args, [(case, list(entrants)) for case, entrants in cells], None, ["run_prefill_bench.py"])
        run.calls = calls
        return run

    return begin


def by_name(records, variant=OWN):
    return {r["version"]: r for r in records if r["role"] != "ceiling" and r["variant"] == variant}


def test_everyone_who_is_right_gets_a_record_with_a_time(stage, tmp_path, capsys):
    run = stage()
    assert run.everything(["absent: fa3"]) == 0
    records = results.load(tmp_path, "prefill")
    assert set(by_name(records)) == {"v1", "v2", "fa2"}
    for record in records:
        assert record["gate"] == "pass" and record["error"] <= record["error_limit"]
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"] and record["run_id"] == run.run_id
    assert by_name(records)["v2"]["source_hash"] == find_version("prefill", "v2").source_hash
    env = results.load_envs(tmp_path, "prefill")[run.run_id]
    assert env["torch"] == torch.__version__ and env["seconds"] > 0
    said = capsys.readouterr().out
    assert "absent: fa3" in said and "[1/1, about 0 s left]" in said


def test_rounds_are_interleaved_in_changing_order(stage):
    run = stage(rounds=8)
    asked = []
    original = Process.ask

    def listen(self, do, timeout=60.0, **request):
        if do == "samples":
            asked.append(request["entrant"]["name"])
        return original(self, do, timeout, **request)

    Process.ask = listen
    try:
        run.everything([])
    finally:
        Process.ask = original
    rounds = [tuple(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert len(rounds) == 8 and all(set(turn) == {"v1", "v2", "fa2"} for turn in rounds)
    assert len(set(rounds)) > 1


def test_a_wrong_kernel_gets_a_reason_and_no_time(stage):
    run = stage({V2: lambda answer, number: answer * 1.1})
    run.everything([])
    record = by_name(run.records)["v2"]
    assert "above the limit" in record["gate"] and record["error"] == pytest.approx(0.1, rel=1e-3)
    assert record["median_ms"] is record["tflops"] is record["gbps"] is None
    assert by_name(run.records)["v1"]["gate"] == "pass"


def test_a_kernel_that_goes_wrong_while_it_is_timed_is_caught(stage):
    run = stage({V2: lambda answer, number: answer if number < 4 else answer * 2})
    run.everything([])
    assert by_name(run.records)["v2"]["gate"].startswith("after timing: error")


@pytest.mark.parametrize("when", [0, 6], ids=["first call", "while it is timed"])
def test_a_crash_costs_its_own_number_and_nobody_elses(stage, when):
    def crash(answer, number):
        if number >= when:
            raise Crash("the process ended with status -11")
        return answer

    run = stage({V2: crash}, cells=[(TINY, (V1, V2, FA2, FA3))])
    run.everything([])
    found = by_name(run.records)
    assert found["v2"]["gate"] == "the process ended with status -11" and found["v2"]["median_ms"] is None
    assert {name for name, record in found.items() if record["gate"] == "pass"} == {"v1", "fa2", "fa3"}
    assert len(run.records) == 4


def test_an_exception_is_the_reason_of_a_red_gate(stage):
    def fail(answer, number):
        raise RuntimeError("no kernel image")

    run = stage({FA2: fail})
    run.everything([])
    assert by_name(run.records)["fa2"]["gate"] == explain(RuntimeError("no kernel image"))


def test_equal_tiles_are_measured_once(stage):
    tiles = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    run = stage(cells=[(TINY, (V2, V2_PARENT))], configs={V2: tiles, V2_PARENT: tiles})
    run.everything([])
    own, parent = by_name(run.records)["v2"], by_name(run.records, PARENT)["v2"]
    assert own["median_ms"] == parent["median_ms"] and parent["config"] == tiles
    assert run.calls.count(V2_PARENT) < 4 < run.calls.count(V2)


def test_different_tiles_are_measured_apart(stage):
    run = stage(cells=[(TINY, (V2, V2_PARENT))], configs={V2: {"BLOCK_M": 128}, V2_PARENT: {"BLOCK_M": 32}})
    run.everything([])
    assert run.calls.count(V2_PARENT) > 10
    assert by_name(run.records, PARENT)["v2"]["config"] == {"BLOCK_M": 32}


def test_equal_tiles_survive_a_crash_of_somebody_else(stage):
    def crash(answer, number):
        if number >= 6:
            raise Crash("gone")
        return answer

    tiles = {"BLOCK_M": 128}
    run = stage({FA2: crash}, cells=[(TINY, (V2, V2_PARENT, FA2))], configs={V2: tiles, V2_PARENT: tiles})
    run.everything([])
    assert by_name(run.records)["v2"]["gate"] == by_name(run.records, PARENT)["v2"]["gate"] == "pass"
    assert len(run.records) == 3


def test_parent_tiles_that_do_not_run_are_said_and_are_no_red_gate(stage, capsys):
    def fail(answer, number):
        raise RuntimeError("out of resource: shared memory")

    run = stage({V2_PARENT: fail}, cells=[(TINY, (V2, V2_PARENT))])
    run.everything([])
    assert [(r["version"], r["variant"]) for r in run.records] == [("v2", OWN)]
    assert "v2 does not run with its parent's tiles: RuntimeError: out of resource" in capsys.readouterr().out


def test_ctrl_c_keeps_and_shows_what_was_measured(stage, tmp_path, capsys):
    other = Case("prefill", "fp32", 1, 2, 2, 24, 24, 16, preset="quick")

    def stop(answer, number):
        if answer.shape[2] == 24:
            raise KeyboardInterrupt
        return answer

    run = stage({V1: stop}, cells=[(TINY, (V1, V2)), (other, (V1, V2))])
    assert run.everything([]) == 0
    assert [r["seqlen_k"] for r in results.load(tmp_path, "prefill")] == [16, 16]
    said = capsys.readouterr().out
    assert "stopped: what was measured is kept" in said and re.search(r"v2\s+\S+", said.split("stopped")[1])


def test_a_second_run_adds_to_the_first(stage, tmp_path):
    stage().everything([])
    first = results.records_path(tmp_path, "prefill").read_text()
    stage().everything([])
    assert results.records_path(tmp_path, "prefill").read_text().startswith(first)
    assert len(results.load(tmp_path, "prefill")) == 6 and len(results.load_envs(tmp_path, "prefill")) == 2


# ---- the plan


def planned(family, *words):
    return plan(family, parser(family).parse_args(list(words)))


def test_every_version_runs_with_its_own_and_its_parents_tiles():
    cells, _ = planned("prefill", "--versions", "v1,v2", "--peers", "none", "--dtypes", "fp16")
    assert all(entrants == [V1, V2, V2_PARENT] for _, entrants in cells)


def test_eight_bits_are_for_versions_that_have_them():
    cells, _ = planned("prefill", "--peers", "none", "--dtypes", "e4m3")
    names = {entrant.name for _, entrants in cells for entrant in entrants}
    assert names and all(find_version("prefill", name).fp8 for name in names)
    first = min(names, key=lambda name: int(name[1:]))
    assert not any(e.name == first and e.variant == PARENT for _, entrants in cells for e in entrants)


def test_absent_peers_are_named_in_one_line(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    cells, notes = planned("prefill")
    assert len(notes) == 1 and "fa3 (flash_attn_interface is not installed)" in notes[0] and "flashinfer" in notes[0]
    assert {"eager", "fa2", "cudnn"} <= {entrant.name for _, entrants in cells for entrant in entrants}
    assert not any(entrant.name == "fa3" for _, entrants in cells for entrant in entrants)


def test_the_paper_preset_is_thinned_and_named_peers_are_not():
    cells, _ = planned("prefill", "--preset", "paper")
    flex = {case.seqlen_k for case, entrants in cells if any(e.name == "flex" for e in entrants)}
    assert flex == {4096, 16384}
    assert not any(e.name == "eager" for case, entrants in cells if case.dtype == "bf16" for e in entrants)
    cells, _ = planned("prefill", "--preset", "paper", "--peers", "flex,eager", "--dtypes", "bf16")
    assert all([e.name for e in entrants if e.role == "peer"] == ["flex", "eager"] for _, entrants in cells)


def test_a_whole_paper_run_is_estimated_under_ten_minutes():
    for family in ("prefill", "decoding"):
        assert 60 < runner.estimate_seconds(planned(family, "--preset", "paper")[0]) < 600


@pytest.mark.parametrize("peer", providers.PEERS, ids=lambda peer: peer.name)
def test_peers_say_what_they_do_not_do(peer):
    window = Case("prefill", "fp16", 1, 2, 2, 16, 16, 16, window=(4, 0))
    assert bool(peer.why_not(window)) == (peer.name != "eager")
    assert peer.why_not(Case("prefill", "e5m2", 1, 2, 2, 16, 16, 16)).startswith("takes ")
    shifted = Case("prefill", peer.dtypes[0], 1, 2, 2, 16, 32, 16, causal=True)
    assert ("top left" in (peer.why_not(shifted) or "")) == peer.top_left


# ---- decoding: caches as they are in use, and plans


def test_who_takes_no_such_cache_is_named(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())
    cells, notes = planned("decoding", "--preset", "paper")
    for case, entrants in cells:
        names = {entrant.name for entrant in entrants}
        assert case.plain or case.dtype in FP8 or "fa3" in names
        assert not (case.page_size and names & {"v1", "v2", "v3", "cudnn", "fa2", "eager"})
        assert not (case.seqlen_q > 1 and "v1" in names) and not (case.lengths and "cudnn" in names)
        assert case.plain and case.dtype == "fp16" or all(e.variant == OWN for e in entrants)
    said = " | ".join(notes)
    assert re.search(r"v1, v2, v3(, v\d+)* \(takes no block_table\): not in 3 of the cases", said)
    assert re.search(r"v1, v2, v3, v4(, v\d+)* \(has no FP8 path\): not in 10 of the cases", said)
    assert re.search(r"cudnn, fa2, flash_attn, eager \(takes no pages here\): not in 3 of the cases", said)


def test_a_plan_is_a_further_way_to_call_the_newest():
    cells, _ = planned("decoding", "--preset", "paper", "--peers", "none", "--versions", "v1,v3")
    for case, entrants in cells:
        plans = [entrant.name for entrant in entrants if entrant.variant == PLAN]
        assert plans == (["v3"] if case.plain and case.dtype == "fp16" else [])
    assert timings_of("decoding", Entrant("version", "v3", PLAN)) == ("eager",)


def asked(case, entrant, *requests):
    """The answers to "enter" and to further requests, of a process on the CPU."""
    server, entrant = Server(HostClock(), INTERPRETER), vars(entrant)
    first = server.answer({"do": "enter", "case": json.loads(json.dumps(vars(case))), "entrant": entrant, "seed": 0})
    return [first, *(server.answer(request | {"entrant": entrant}) for request in requests)]


STEP = Case("decoding", "fp16", 2, 4, 2, 1, 40, 16, preset="quick")


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", [
    STEP, replace(STEP, page_size=16), replace(STEP, lengths=(0, 33)), replace(STEP, seqlen_q=3, causal=True),
], ids=lambda case: case.label())  # fmt: skip
def test_caches_in_use_go_through_bind_and_gate(case):
    first, ready = asked(case, Entrant("version", "v4"), {"do": "prepare", "timing": "eager"})
    assert first["ok"]["gate"] == "pass" and first["ok"]["config"]["num_splits"] >= 1
    assert ready["ok"]["gate"] == "pass" and ready["ok"]["latency_ms"] > 0


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
@pytest.mark.parametrize("version", [v for v in versions_of("decoding") if v.fp8], ids=lambda version: version.name)
@pytest.mark.parametrize("case", [
    replace(STEP, dtype="e4m3"), replace(STEP, dtype="e5m2", lengths=(40, 7)),
    replace(STEP, dtype="e4m3", page_size=16),
], ids=lambda case: case.label())  # fmt: skip
def test_fp8_caches_go_through_bind_and_gate(version, case):
    if reason := version.why_not(INTERPRETER, case.dtype) or why_not_case(version, case):
        pytest.skip(reason)
    (first,) = asked(case, Entrant("version", version.name))
    assert first["ok"]["gate"] == "pass" and first["ok"]["error"] < 0.01 < first["ok"]["error_unquantised"]


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
def test_a_plan_goes_through_bind_and_gate(monkeypatch):
    ragged, eager = replace(STEP, lengths=(40, 7)), {"do": "prepare", "timing": "eager"}
    first, ready = asked(ragged, Entrant("version", "v2", PLAN), eager)
    assert first["ok"]["gate"] == ready["ok"]["gate"] == "pass" and ready["ok"]["latency_ms"] > 0

    def refuse(*tensors, **options):
        raise ValueError("version: v2 cannot be planned")

    monkeypatch.setattr(decoding, "plan_decoding", refuse)
    (first,) = asked(STEP, Entrant("version", "v2", PLAN))
    assert first == {"absent": "has no plan: version: v2 cannot be planned"}


@pytest.mark.parametrize("case", [
    STEP, replace(STEP, page_size=16), replace(STEP, lengths=(40, 33)), replace(STEP, seqlen_q=3, causal=True),
    replace(STEP, page_size=16, lengths=(40, 33)),
], ids=lambda case: case.label())  # fmt: skip
def test_fa3_is_given_its_own_arguments(case, monkeypatch):
    """[B, S, H, D] or [pages, page, H, D], cache_seqlens, page_table: as its own Python function takes them."""

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=None, page_table=None, causal=True):
        if page_table is not None:
            assert k_cache.shape[1] == 16 and cache_seqlens is not None
            k_cache, v_cache = (x[page_table.long()].flatten(1, 2) for x in (k_cache, v_cache))
        tensors = [x.transpose(1, 2) for x in (q, k_cache, v_cache)]
        return eager_attention(*tensors, is_causal=causal, seqlens_k=cache_seqlens).transpose(1, 2)

    library = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", library)
    (first,) = asked(case, Entrant("peer", "fa3"))
    assert first["ok"]["gate"] == "pass"


# ---- the flags


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--preset", "huge"], ["huge", "paper", "quick"]),
        (["--versions", "v99"], ["v99", "v1"]),
        (["--peers", "fa9"], ["fa9", "fa3", "eager"]),
        (["--dtypes", "int8"], ["int8", "e4m3"]),
        (["--seq-lens", "4x"], ["4x", "16k"]),
        (["--head-dims", "300"], ["300", "256"]),
        (["--heads", "6", "--heads-kv", "4"], ["6", "4", "multiple"]),
        (["--rounds", "0"], ["'0'", "1 or more"]),
        (["--layout", "sbhd"], ["sbhd", "bshd"]),
        (["--replay", "/nowhere"], ["/nowhere"]),
        (["--compare", "never"], ["never"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--dtypes", "e5m2", "--versions", "v1", "--peers", "none"], ["nothing to measure"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_flags_that_make_no_sense_cost_one_line_and_status_2(words, wanted, capsys):
    with pytest.raises(SystemExit) as end:
        main("prefill", words)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("run_prefill_bench.py: ") and all(word in said.err for word in wanted)


def test_both_scripts_take_the_same_flags():
    flags = [
        {o for action in parser(family)._actions for o in action.option_strings} for family in ("prefill", "decoding")
    ]
    assert flags[0] == flags[1] >= {"--preset", "--seq-lens", "--heads-kv", "--replay", "--compare", "--tune"}


def test_the_script_itself_ends_with_status_2():
    words = [sys.executable, "run_decoding_bench.py", "--versions", "v99"]
    done = subprocess.run(words, cwd=results.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


# ---- what was recorded


def test_replay_shows_and_draws_without_measuring(tmp_path, capsys, monkeypatch):
    results.append(tmp_path, "prefill", synthetic.records("prefill", preset="quick"))
    results.save_env(tmp_path, "prefill", synthetic.RUN, synthetic.environment()[synthetic.RUN])
    before = results.records_path(tmp_path, "prefill").read_bytes()
    monkeypatch.setattr(runner, "Worker", None)  # nothing may start
    assert main("prefill", ["--replay", str(tmp_path), "--out", str(tmp_path / "drawn")]) == 0
    said = capsys.readouterr().out
    assert "recorded on Test GPU 2026-01-01; nothing here was measured now" in said and "cudnn" in said
    assert results.records_path(tmp_path, "prefill").read_bytes() == before
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn and all(name in said for name in drawn)


def test_compare_names_a_run_or_a_folder(stage, tmp_path, capsys):
    run = stage()
    run.everything([])
    shutil.copytree(tmp_path, tmp_path / "old")
    capsys.readouterr()
    for earlier in (run.run_id, str(tmp_path / "old")):
        assert main("prefill", ["--replay", str(tmp_path), "--compare", earlier]) == 0
        assert "3 of them the same within noise" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("prefill", ["--replay", str(tmp_path), "--compare", "20000101T000000Z-0000"])
    assert run.run_id in capsys.readouterr().err


# ---- without a GPU


@pytest.mark.parametrize("wrong", [0, 1])
def test_without_a_gpu_the_check_decides_and_the_records_are_shown(wrong, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "results" / "test-gpu"
    results.append(folder, "decoding", synthetic.records("decoding", preset="quick"))
    results.save_env(folder, "decoding", synthetic.RUN, synthetic.environment()[synthetic.RUN])
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(without_gpu, "_check_elsewhere", lambda family, names: wrong)
    monkeypatch.setattr(without_gpu, "_print_machine_code", lambda family, folder: print(f"compiled for {folder.name}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("decoding", ["--compare", synthetic.RUN]) == wrong
    said = capsys.readouterr().out
    assert "No GPU here" in said and "compiled for test-gpu" in said and "recorded on Test GPU 2026-01-01" in said
    assert "the same within noise" in said and list((tmp_path / "build" / "charts" / "test-gpu").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["decoding.env.json", "decoding.jsonl"]


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
@pytest.mark.parametrize("family", ["prefill", "decoding"])
def test_the_check_without_a_gpu_passes_v1(family):
    right, lines = without_gpu.check_version(find_version(family, "v1"))
    assert right and len(lines) == 3 and all("limit" in line and "WRONG" not in line for line in lines)


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
def test_the_check_without_a_gpu_covers_pages_and_says_so():
    right, lines = without_gpu.check_version(find_version("decoding", "v4"))
    assert right and any("fp16 in pages: relative error" in line for line in lines)


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
def test_the_check_without_a_gpu_finds_a_wrong_version(monkeypatch):
    def bind(entrant, inputs):
        out = torch.zeros_like(inputs.q)
        return Bound(lambda out: out.zero_(), out=out)

    monkeypatch.setattr(without_gpu, "bind", bind)
    right, lines = without_gpu.check_version(find_version("prefill", "v1"))
    assert not right and all("WRONG at" in line for line in lines)


@pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only with TRITON_INTERPRET=1")
@pytest.mark.parametrize("name, variant", [("v1", OWN), ("v2", PARENT)])
def test_a_version_runs_through_bind_and_gate(name, variant):
    """The path of the timed run, on the CPU: arguments, poisoned output, tiles in the record."""
    case = {"case": json.loads(json.dumps(vars(TINY))), "seed": 0}
    entrant = vars(Entrant("version", name, variant))
    answer = Server(HostClock(), INTERPRETER).answer({"do": "enter", "entrant": entrant} | case)
    assert answer["ok"]["gate"] == "pass"
    assert answer["ok"]["config"]["BLOCK_M"] == 32  # v1's tile


@pytest.mark.parametrize("cache, chosen", [("fp16", "v10"), ("e4m3", "v11"), ("e5m2", "v11")])
def test_the_plain_call_is_of_the_version_that_it_chooses(cache, chosen, monkeypatch):
    """On an H200, of v5 to v11: an older one's number would be another version's."""
    upto = [version for version in versions_of("decoding") if 5 <= version.number <= 11]
    monkeypatch.setattr(providers, "versions_of", lambda family: upto)
    q, k = (torch.empty(1, keys, 2, 64, dtype=torch.float16, device="meta").transpose(1, 2) for keys in (1, 64))
    k = k.to({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(cache, k.dtype))
    with pretend(KNOWN["sm_90"]):
        for version in upto:
            if version.why_not_call(q, k, k) is not None:
                continue
            if version.name == chosen:
                providers._plain(version, (q, k, k), {})
            else:
                with pytest.raises(NotHere, match="is not the version that flash_decoding chooses"):
                    providers._plain(version, (q, k, k), {})
