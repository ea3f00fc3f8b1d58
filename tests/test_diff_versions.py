"""diff_versions.py: every pair with and without records, in every form; what does not exist is named in one line."""

import json
import re
import shutil
import subprocess
import sys
import time

import diff_setting
import pytest

import diff_versions
from bench import machine_code, version_diff
from bench.version_diff import ROOT, Request, gather, normalised
from common.lineage import FAMILIES, versions_of

PAIRS = [(family, *pair) for family in FAMILIES for pair in diff_setting.pairs_of(family)]
TO_PARENT = [(v.family, f"v{v.parent}", v.name) for family in FAMILIES for v in versions_of(family) if v.parent]
FARTHEST = [(family, "v1", versions_of(family)[-1].name) for family in FAMILIES]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        diff_setting.with_tiles_of(patch)
        diff_setting.compile_everything()
        yield


@pytest.fixture(scope="module")
def gatherers(request, tmp_path_factory):
    """{family: Gatherer}, without records and with made-up ones; each reads every kernel once."""
    folder = tmp_path_factory.mktemp("results")
    if request.param == "records":
        diff_setting.made_up_records(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version_diff, "RESULTS", folder)
        return {family: version_diff.Gatherer(family) for family in FAMILIES}


@pytest.fixture
def records(gatherers, monkeypatch):
    """Whether there are records."""

    def gathered(request):
        return json.loads(json.dumps(gatherers[request.family].pair(request)))

    monkeypatch.setattr(diff_versions, "gather", gathered)
    return all(gatherer.book for gatherer in gatherers.values())


def output(capsys, *arguments: str) -> str:
    assert diff_versions.main([*arguments, "--color", "never"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "gatherers, pair",
    [pytest.param("records", pair, id="-".join(pair)) for pair in PAIRS]
    + [pytest.param("no records", pair, id="-".join(("no records", *pair))) for pair in TO_PARENT + FARTHEST],
    indirect=["gatherers"],
)
def test_every_pair(pair, records, capsys):
    """The four parts, in order; and the same numbers for programs."""
    family, old, new = pair
    text = output(capsys, *pair)
    parts = [f"{family}: {old} ", "predicted  ", "measured   ", "--- ", "+++ ", "Machine code, ", "Measured"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    found = json.loads(output(capsys, *pair, "--json"))
    assert (found["old"]["name"], found["new"]["name"]) == (old, new)
    for row in found["machine_code"]["table"]["rows"]:
        values = [value for pair in zip(row["shown"][1:], row["change"], strict=True) for value in pair if value]
        assert re.search(
            r"\s+".join(map(re.escape, [row["what"].strip(), row["shown"][0], *values])).rstrip(r"\s+"), text
        )
    if records:
        mean = found["gain"]["own tiles"]["mean"]
        assert f"own tiles {mean:.2f}x" in text and "own tiles: idea and retuning" in text
        assert (found["gain"]["idea alone"] is None) == (found["new"]["parent"] != old)
    else:
        assert f"No records of {family} yet" in text


@pytest.mark.parametrize("pair", TO_PARENT + FARTHEST, ids="-".join)
def test_both_diffs_hold_every_changed_line(pair, capsys):
    family, old, new = pair
    found = gather(Request(*pair))
    plain, beside = output(capsys, *pair), output(capsys, *pair, "--side-by-side")
    flat = re.sub(r"\s", "", beside)
    for side, sign in ((0, "- "), (1, "+ ")):
        lines = found["old" if side == 0 else "new"]["lines"]
        for row in found["source"]["rows"]:
            if not row[4] and row[side] is not None:
                assert f"{sign}{lines[row[side]]}".rstrip() in plain
                assert re.sub(r"\s", "", lines[row[side]][:30]) in flat


def test_side_by_side_keeps_to_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = output(capsys, "prefill", "v1", "v2", "--side-by-side", "--code-only")
    diff = text[text.index("prefill/flash_attention_v1.py") : text.index("Machine code")]
    assert max(map(len, diff.splitlines())) <= 100
    assert '"""' not in diff and "# [BLOCK_M" not in diff


def test_a_version_alone_means_its_parent_to_it(capsys):
    assert output(capsys, "prefill", "v2") == output(capsys, "prefill", "v1", "v2")


def test_notes_stand_above_their_hunks(capsys):
    text = output(capsys, "prefill", "v1", "v2", "--code-only")
    note = next(line for line in text.splitlines() if line.startswith("   v2: "))
    before = text[: text.index(note)].rstrip().splitlines()[-1]
    assert before.startswith(("@@ line", "   v"))


def test_colour_only_where_it_is_asked_for(capsys):
    assert "\033" not in output(capsys, "prefill", "v2")  # the test's output is no terminal
    assert diff_versions.main(["prefill", "v2", "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    assert "\033[32;7m" in coloured
    assert re.sub(r"\033\[[\d;]*m", "", coloured) == output(capsys, "prefill", "v2")


@pytest.mark.parametrize("stage", machine_code.STAGES)
def test_stages(stage, capsys):
    """Only differences, and none of what only numbers things."""
    text = output(capsys, "prefill", "v1", "v2", "--stage", stage)
    assert f"{stage} of v1 and of v2, tiles of v1" in text and "+++ flash_attention_kernel" in text
    changed = [line for line in text.splitlines()[3:] if line[:1] in "+-"]
    assert changed
    leftover = {
        "ttir": r"loc\(|%\d|%\w+_\d+\b",
        "ttgir": r"loc\(",
        "llir": r"!dbg|%\d",
        "ptx": r"%r\d|\.loc",
        "sass": r"\bR\d+\b",
    }
    assert not [line for line in changed if re.search(leftover[stage], line)]


def test_the_same_stage_twice_is_no_difference(capsys):
    assert "no difference" in output(capsys, "prefill", "v2", "v2", "--stage", "sass")


def test_normalising_keeps_what_matters():
    assert normalised("sass", "        /*0010*/              @!P0 FFMA R12, R3.reuse, R4, 1.5 ;\n\t//## File") == [
        "@!P FFMA R, R, R, 1.5"
    ]
    assert normalised("ptx", "\tfma.rn.f32 \t%f12, %f3, %f4, 0f3F800000; // x\n\t.loc 1 2 3\n") == [
        "\tfma.rn.f32 \t%f, %f, %f, 0f3F800000;"
    ]
    assert normalised(
        "ttir", '    %acc_12 = arith.mulf %acc, %3 : tensor<32xf32> loc(#loc7)\n#loc7 = loc("a":1:2)'
    ) == ["    %acc = arith.mulf %acc, % : tensor<32xf32>"]


def test_amd_has_its_own_last_stage(capsys):
    text = output(capsys, "prefill", "v1", "v2", "--arch", "gfx942", "--stage", "sass")
    assert "+++ flash_attention_kernel amdgcn" in text and "v_mfma" in text


def test_the_division_left_the_loop():
    rows = {row["what"].strip(): row for row in gather(Request("prefill", "v1", "v2"))["machine_code"]["table"]["rows"]}
    assert rows["reciprocals and divisions"]["change"] == ["gone", "gone"]
    assert rows["tile"]["shown"][0] == rows["tile"]["shown"][1] != rows["tile"]["shown"][2]


def test_tools(capfd):
    assert diff_versions.main(["prefill", "v1", "v2", "--tool", "git"]) == 0
    assert "+++ b/prefill/flash_attention_v2.py" in capfd.readouterr().out
    if shutil.which("difft") is None:
        assert diff_versions.main(["prefill", "v1", "v2", "--tool", "difftastic"]) == 2
        assert "there is no difft" in capfd.readouterr().err


def test_family_lists(capsys):
    text = output(capsys, "--family")
    for family in FAMILIES:
        for version in versions_of(family):
            assert f"{version.label}: {version.idea}" in text


@pytest.mark.parametrize(
    "arguments, exists",
    [
        (["training", "v1", "v2"], "prefill, decoding"),
        (["--family", "training"], "prefill, decoding"),
        (["prefill", "v1", "v99"], "there are v1, v2"),
        (["prefill", "v1"], "has no parent"),
        (["prefill"], "prefill v1 v2"),
        (["prefill", "v2", "--stage", "gcn"], "ttir, ttgir, llir, ptx, sass"),
        (["prefill", "v2", "--arch", "sm_70"], "sm_80, sm_86"),
        (["prefill", "v2", "--dtype", "int8"], "fp16, bf16, fp32"),
        (["prefill", "v2", "--head-dim", "512"], "1 to 256"),
        (["prefill", "v2", "--tool", "vim"], "git, delta, difftastic"),
        (["prefill", "v2", "--color", "blue"], "auto, always, never"),
        (["prefill", "v2", "--device", "abacus"], "there are"),
        (["--html", "DIR", "--arch", "sm_70"], "sm_80, sm_86"),
        (["prefill", "v2", "--wat"], "--wat"),
    ],
)
def test_what_does_not_exist_is_answered_in_one_line(arguments, exists, capsys, tmp_path):
    arguments = [str(tmp_path) if argument == "DIR" else argument for argument in arguments]
    assert diff_versions.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and exists in said.err


def test_a_version_that_does_not_run_there_has_a_note_and_the_rest_is_shown(capsys):
    text = output(capsys, "prefill", "v1", "v2", "--dtype", "e4m3")
    assert "v1 on sm_90: has no FP8 path" in text and "+++ prefill" in text


def test_versions_without_records_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(version_diff, "RESULTS", tmp_path)
    diff_setting.made_up_records(tmp_path)
    path = tmp_path / "nvidia-h200" / "prefill.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"v1"' not in line))
    assert "No records of v1; there are some of v2" in output(capsys, "prefill", "v1", "v2")


def test_the_second_time_is_quick():
    """A cached answer loads neither torch nor triton. CPU time, for machines that are busy."""
    program = (
        "import resource, sys; sys.argv = ['', 'prefill', 'v1', 'v2']; import diff_versions; diff_versions.main();"
    )
    program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, 'torch' in sys.modules, file=sys.stderr)"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, torch_loaded = done.stderr.split()[-2:]
    assert float(seconds) < 2 and torch_loaded == "False"


def test_cold_is_quick_enough(tmp_path, monkeypatch):
    """Nothing cached, compilation included; CPU time of the process and of those that it started."""
    import resource

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, start = spent(), time.monotonic()
    done = subprocess.run([sys.executable, "diff_versions.py", "prefill", "v1", "v2"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert min(spent() - before, time.monotonic() - start) < 15
