"""Calls that repeat what an earlier one of their kind launched: the same results, and nothing else."""

import inspect
import math
import pathlib
import subprocess
import sys
import weakref

import pytest
import torch
from attention_checks import Case, all_versions, as_cache, skip_unless_served

from common import dispatch, replay
from common.launch import Tiles, remember_tiles
from common.lineage import find_version
from common.problem import AttentionProblem
from common.replay import NoRecipe, Recipe, remembered

every_version = all_versions("prefill", "decoding")
KINDS = {
    "plain": dict(),
    "lengths": dict(lengths_k=(70, 13)),
    "window": dict(window=(9, 3)),
    "other layouts": dict(layout=("padded", "bshd", "packed")),
    "head_dim": dict(head_dim=80),
}


def result_list(result) -> list:
    return list(result) if isinstance(result, tuple) else [result]


@every_version
@pytest.mark.parametrize(
    "changes, return_lse", [(KINDS["plain"], False), *((changes, True) for changes in KINDS.values())],
    ids=["one result", *KINDS],
)  # fmt: skip
def test_a_recipe_gives_what_the_call_gives(version, changes, return_lse, device):
    """For other tensors of the kind, other lengths too: nothing of the recorded call's contents or memory is left."""
    shape = dict(head_dim=64, layout="bshd") | changes
    case = Case(2, 4, 2, 40 if version.family == "prefill" else 1, 70, **shape)
    if version.family == "decoding" and "window" in changes and "window" not in version.takes:
        pytest.skip("takes no window")
    call = inspect.unwrap(version.call)
    first, second = case.tensors("fp16", device, seed=1), case.tensors("fp16", device, seed=2)
    if version.family == "decoding":
        first[1:], second[1:] = as_cache(version, *first[1:]), as_cache(version, *second[1:])
    options, others = case.options(device), case.options(device)
    if "lengths_k" in changes and version.declines(*first, **options):
        pytest.skip("takes no lengths")
    skip_unless_served(version, *first, **options)
    if "seqlens_k" in others:
        others["seqlens_k"] = torch.tensor([0, 59], dtype=torch.int32, device=device)
    call(*first, **options)  # the first of its kind makes the tables that persistent kernels look up
    recipe = Recipe(call, tuple(first), options | {"return_lse": return_lse})
    for x in first:
        x.fill_(math.nan)
    expected = result_list(call(*second, **others, return_lse=return_lse))
    for _ in range(2):  # tickets are as they were
        found = result_list(recipe([*second, *(x for x in others.values() if isinstance(x, torch.Tensor))]))
        assert len(found) == len(expected) == 1 + return_lse
        for x, y in zip(found, expected, strict=True):
            assert x.stride() == y.stride() and torch.equal(x, y)


def test_recording_launches_nothing(device):
    """And writes nothing."""
    q, k, v = Case(1, 2, 2, 1, 40).tensors("fp16", device)
    out = torch.full_like(q, 7)
    Recipe(inspect.unwrap(find_version("decoding", "v3").call), (q, k, v), {"out": out})
    assert (out == 7).all()


# ---- which calls have a recipe


@pytest.fixture
def counted(monkeypatch):
    """A call that is remembered wherever it runs, and how often it was made."""
    monkeypatch.setattr(replay, "_least_device", -1)
    monkeypatch.setattr(replay, "_recipes", {})
    made = []

    def call(q, k, v, **options):
        made.append(1)
        return inspect.unwrap(find_version("decoding", "v3").call)(q, k, v, **options)

    return remembered(call), made


def tensors(device, seed=0, seqlen_k=40, dtype="fp16", **changes):
    return Case(2, 4, 2, 1, seqlen_k, 64, **({"layout": "bhsd"} | changes)).tensors(dtype, device, seed)


def plain(q, k, v, **options):
    return inspect.unwrap(find_version("decoding", "v1").call)(q, k, v, **options)


def close(x, y):
    return torch.allclose(x.float(), y.float(), atol=4e-3)


def test_the_third_call_of_a_kind_repeats(counted, device):
    """With an output of its own, in memory of its own."""
    call, made = counted
    outputs = []
    for seed in range(5):
        q, k, v = tensors(device, seed)
        outputs.append(call(q, k, v))
        assert close(outputs[-1], plain(q, k, v))
        assert len(made) == min(seed + 1, 2)
    assert len({x.data_ptr() for x in outputs}) == 5


OTHER = {
    "shape": lambda device: (tensors(device, seqlen_k=41), {}),
    "strides": lambda device: (tensors(device, layout="bshd"), {}),
    "dtype": lambda device: (tensors(device, dtype="bf16"), {}),
    "address": lambda device: (tensors(device, layout="unaligned"), {}),
    "scale": lambda device: (tensors(device), {"scale": 0.5}),
    "lengths": lambda device: (tensors(device), {"seqlens_k": torch.tensor([3, 9], dtype=torch.int32, device=device)}),
    "one split": lambda device: (tensors(device), {"num_splits": 1}),
    "lse": lambda device: (tensors(device), {"return_lse": True}),
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_another_kind_has_a_recipe_of_its_own(counted, other, device):
    call, made = counted
    for _ in range(3):
        call(*tensors(device))
    assert len(made) == 2
    for times in (3, 4, 4):
        (q, k, v), options = other(device)
        found, expected = call(q, k, v, **options), plain(q, k, v, **options)
        assert all(close(x, y) for x, y in zip(result_list(found), result_list(expected), strict=True))
        assert len(made) == times


def test_a_given_output_is_written(counted, device):
    call, made = counted
    for seed in range(4):
        q, k, v = tensors(device, seed)
        out = torch.empty_like(q)
        assert call(q, k, v, out=out) is out and close(out, plain(q, k, v))
    assert len(made) == 2


def test_lengths_are_checked_each_time(counted, device):
    """Those of the repeated call."""
    call, made = counted
    q, k, v = tensors(device)
    for _ in range(3):
        call(q, k, v, seqlens_k=torch.tensor([1, 40], dtype=torch.int32, device=device))
    assert len(made) == 2
    with pytest.raises(ValueError, match=r"seqlens_k: lengths must lie in 0\.\.40"):
        call(q, k, v, seqlens_k=torch.tensor([1, 41], dtype=torch.int32, device=device))


@pytest.mark.parametrize("what", ["last-strided", "equal tensors", "requires grad"])
def test_calls_without_a_recipe(counted, what, device):
    """Copies, which hold what the tensors held; one address for two; what is refused. Right as ever, never repeated."""
    call, made = counted
    for seed in range(4):
        q, k, v = tensors(device, seed, layout="last-strided" if what == "last-strided" else "bhsd")
        if what == "equal tensors":
            v = k
        if what == "requires grad":
            with pytest.raises(ValueError, match="requires grad"):
                call(q.requires_grad_(), k, v)
        else:
            assert close(call(q, k, v), plain(q, k, v))
    assert len(made) >= 4


def test_equal_tensors_may_become_two(counted, device):
    """The recipe of a call with two tensors serves one that gives the same tensor twice."""
    call, _ = counted
    for _ in range(3):
        call(*tensors(device))
    q, k, _ = tensors(device, 5)
    assert close(call(q, k, k), plain(q, k, k))


def test_options_that_are_equal_and_not_the_same(device, monkeypatch):
    """1, True and 1.0 are one key of a dict."""
    monkeypatch.setattr(replay, "_least_device", -1)
    x = torch.zeros(4, device=device)
    keys = {replay.known_by(len, (x,), {"n": n})[0] for n in (1, True, 1.0, "1", (1,), None)}
    keys |= {replay.known_by(len, (x, 1), {})[0], replay.known_by(len, (x,), {"m": 1})[0]}
    assert len(keys) == 8 and None not in keys
    for unknown in (object(), [1], Tiles(1, 2, 3, 4), torch.float16, torch.nn.Parameter(x)):
        assert replay.known_by(len, (x, unknown), {})[0] is None


def test_what_runs_elsewhere_is_not_remembered():
    assert replay.known_by(len, (torch.zeros(4),), {})[0] is None
    assert replay.known_by(len, (torch.zeros(4, device="meta"),), {})[0] is None


def test_nothing_of_the_callers_is_kept(counted, device):
    call, _ = counted
    given = tensors(device)
    gone = [weakref.ref(x) for x in given]
    for _ in range(3):
        call(*given)
    assert any(isinstance(found, Recipe) for found in replay._recipes.values())
    del given
    assert all(x() is None for x in gone)


def test_the_table_is_bounded(counted, device, monkeypatch):
    call, _ = counted
    monkeypatch.setattr(replay, "MOST", 3)
    for splits in range(1, 9):
        call(*tensors(device), num_splits=splits)
        assert len(replay._recipes) <= 3


def test_new_tiles_count_at_once(counted, device, monkeypatch, tmp_path):
    """A tuned tile is what the next call launches, repeated or not."""
    from common import launch

    monkeypatch.setattr(launch, "_tuned_file", lambda: tmp_path / "tiles.json")
    launch._tuned.cache_clear()
    call, made = counted
    q, k, v = tensors(device)
    for _ in range(3):
        call(q, k, v)
    remember_tiles("decoding v3", AttentionProblem.decoding(q, k, v), Tiles(16, 16, 4, 2))
    call(q, k, v)
    launch._tuned.cache_clear()
    assert len(made) == 3


def test_a_profiler_sees_triton_launch(counted, device, monkeypatch):
    call, made = counted
    q, k, v = tensors(device)
    for _ in range(3):
        call(q, k, v)
    monkeypatch.setattr(dispatch, "is_watched", lambda: True)
    call(q, k, v)
    assert len(made) == 3


@pytest.mark.parametrize("quick", [True, False])
def test_what_a_call_makes(quick, device, monkeypatch):
    """Of the same kind and always other memory, with the function that PyTorch's compiled code has or without."""
    if not quick:
        monkeypatch.setattr(torch._C._dynamo, "guards", None)
    for shape, strides in ((2, 3), (3, 1)), ((2, 3), (1, 2)), ((2, 3), (5, 1)), ((0, 3), (3, 1)), ((), ()):
        for dtype in torch.float16, torch.int32, torch.float8_e5m2:
            like = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            make = replay._maker(like)
            assert quick == (make.func is not torch.empty_strided)
            one, other = make(), make()
            for x in one, other:
                assert type(x) is torch.Tensor and not x.requires_grad
                assert (x.shape, x.stride(), x.dtype, x.device) == (shape, strides, dtype, like.device)
            assert not one.numel() or len({x.data_ptr() for x in (like, one, other)}) == 3


def test_why_there_is_no_recipe(device):
    x, y = torch.ones(2, 8, device=device)
    for call, reason in (
        (lambda x, y: x + y, "computes with aten::add"),
        (lambda x, y: x.zero_(), "computes with aten::zero_"),
        (lambda x, y: torch.zeros(4), "computes with aten::zeros"),
        (lambda x, y: x[4:], "launches with a part of a tensor"),
    ):
        with pytest.raises(NoRecipe, match=reason):
            Recipe(call, (x, y), {})
    assert replay.recording() is None


def test_recording_is_quick():
    """PyTorch's modes import its compiler unless they are told not to: seconds, in a process's second call."""
    script = """if True:
        import sys, torch
        from common.replay import Recipe
        Recipe(lambda x: torch.empty_like(x), (torch.ones(4),), {})
        assert "torch._dynamo" not in sys.modules
        """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=pathlib.Path(__file__).parents[1])
