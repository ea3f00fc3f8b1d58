"""Plans for decoding steps: what flash_decoding gives, for contents that change, and refusals where kinds do."""

import math
import weakref

import pytest
import torch
from attention_checks import Case, needs_gpu, table

from common import replay
from common.hardware import detect_gpu
from common.lineage import versions_of
from common.quantize import quantize_cache
from decoding import flash_decoding, plan_decoding


def lengths(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def paged(x: torch.Tensor, order: torch.Tensor, page_size: int) -> torch.Tensor:
    """x [B, H, S, D] as pages [pages, H, page_size, D]: page order[b, i] holds the keys of b from i * page_size on."""
    b, h, s, d = x.shape
    pages = torch.full((order.numel() + 1, h, page_size, d), math.nan, dtype=x.dtype, device=x.device)
    pages[order.flatten().long()] = x.view(b, h, -1, page_size, d).transpose(1, 2).flatten(0, 1)
    return pages


STEPS = {
    "plain": lambda device, seed: {},
    "lengths": lambda device, seed: {"seqlens_k": lengths(device, 64 - seed, 7 * seed)},
    "three queries": lambda device, seed: {"seqlens_k": lengths(device, 64 - seed, 3 + seed)},
    "lse": lambda device, seed: {"return_lse": True},
    "splits": lambda device, seed: {"num_splits": 3, "seqlens_k": lengths(device, 64, 31 + seed)},
    "one split": lambda device, seed: {"num_splits": 1},
    "window": lambda device, seed: {"window": (20, 0), "seqlens_k": lengths(device, 60 - seed, 17)},
    "starts": lambda device, seed: {"starts": lengths(device, seed, 40), "return_lse": True},
    "pages": lambda device, seed: {"block_table": None, "seqlens_k": lengths(device, 60 - seed, 17)},
    "deterministic": lambda device, seed: {"deterministic": True, "seqlens_k": lengths(device, 60 - seed, 17)},
    "float8 caches": lambda device, seed: {"descale_k": None, "descale_v": None, "seqlens_k": lengths(device, 64, 17)},
    "float8 heads side by side": lambda device, seed: {"descale_k": None, "descale_v": None, "window": (20, 0)},
    "new keys": lambda device, seed: {"k_new": None, "v_new": None, "seqlens_k": lengths(device, 50 + seed, 17)},
}


def step(name: str, device, seed: int):
    """q, k, v and the options of one step."""
    layout = "bshd" if "side by side" in name else "bhsd"
    q, k, v = Case(2, 4, 2, 3 if name == "three queries" else 1, 64, 64, layout=layout).tensors("fp16", device, seed)
    options = STEPS[name](device, seed)
    if "block_table" in options:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed)).view(2, 8).to(device)
        k, v = paged(k, order, 8), paged(v, order, 8)
        options["block_table"] = order.int()
    if "descale_k" in options:
        k, v, options["descale_k"], options["descale_v"] = quantize_cache(k, v, "e5m2")
    if "k_new" in options:
        _, options["k_new"], options["v_new"] = Case(2, 4, 2, 1, 1, 64, layout="bhsd").tensors("fp16", device, seed)
    return q, k, v, options


def tensors_of(options: dict) -> dict:
    return {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}


def results(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def check_step(plan, q, k, v, options, **out):
    """One step of a plan, against the call; caches that are written too."""
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    found = results(plan(q, *ours, **tensors_of(options), **out))
    expected = results(flash_decoding(q, *theirs, **options))
    assert len(found) == len(expected)
    for x, y in zip((*found, *ours), (*expected, *theirs), strict=True):
        assert torch.equal(x.float().nan_to_num(nan=-7.0), y.float().nan_to_num(nan=-7.0)) and x.dtype == y.dtype
    return found


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("version", [None, *(found.name for found in versions_of("decoding"))])
def test_steps_are_those_of_the_call(name, version, device):
    """By the newest version and by each; contents change from step to step, kinds do not."""
    q, k, v, options = step(name, device, 0)
    if version is not None:
        chosen = next(found for found in versions_of("decoding") if found.name == version)
        dtype = "fp16" if chosen.half else "e5m2"
        if reason := chosen.why_not(detect_gpu(), dtype) or chosen.why_not_call(q, k, v, **options):
            pytest.skip(reason)
        options["version"] = version
    plan = plan_decoding(q, k, v, **options)
    for seed in (1, 2):
        q, k, v, changed = step(name, device, seed)
        check_step(plan, q, k, v, changed | ({} if version is None else {"version": version}))


def test_planning_writes_nothing(device):
    """Neither outputs nor new keys."""
    q, k, v, options = step("new keys", device, 0)
    before, out = k.clone(), torch.full_like(q, 7)
    plan_decoding(q, k, v, **options, out=out)
    assert torch.equal(k, before) and (out == 7).all()


def test_outputs(device):
    """Each step's own, or the one that it is given."""
    q, k, v, _ = step("plain", device, 0)
    plan = plan_decoding(q, k, v)
    one, other = plan(q, k, v), plan(q, k, v)
    assert one.data_ptr() != other.data_ptr() and torch.equal(one, other)
    out = torch.full_like(q, math.nan)
    assert plan(q, k, v, out=out) is out and torch.equal(out, one)


def test_an_output_of_other_strides(device):
    """Given to the plan it is given to each step."""
    q, k, v, _ = step("three queries", device, 0)
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    assert out.stride() != q.stride()
    plan = plan_decoding(q, k, v, out=out)
    assert plan(q, k, v, out=out) is out and torch.equal(out, flash_decoding(q, k, v))
    with pytest.raises(ValueError, match="its tensors besides q, k and v are out; this call has none"):
        plan(q, k, v)
    with pytest.raises(ValueError, match="out: this plan is for strides"):
        plan(q, k, v, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="out: this plan is for strides"):
        plan_decoding(q, k, v)(q, k, v, out=out)


WRONG = {
    "shape": (lambda x: {"k": x["k"][:, :, :40]}, ValueError, r"k: .* shape \[2, 2, 64, 64\], not \[2, 2, 40, 64\]"),
    "strides": (lambda x: {"v": x["v"].mT.contiguous().mT}, ValueError, "v: this plan is for strides"),
    "dtype": (lambda x: {"q": x["q"].bfloat16()}, ValueError, "q: this plan is for dtype torch.float16"),
    "device": (lambda x: {"q": x["q"].to("meta")}, ValueError, "q: this plan is for device"),
    "address": (
        lambda x: {"q": torch.zeros(x["q"].numel() + 1).half().to(x["q"].device)[1:].view(x["q"].shape)},
        ValueError, "q: this plan is for address modulo 16 0, not 2",
    ),
    "gradient": (lambda x: {"q": x["q"].clone().requires_grad_()}, ValueError, "q: requires grad"),
    "no tensor": (lambda x: {"v": [1]}, TypeError, "v: must be a torch.Tensor, it is list"),
    "lengths missing": (lambda x: {"seqlens_k": ...}, ValueError, "are seqlens_k; this call has none"),
    "lengths int64": (lambda x: {"seqlens_k": x["seqlens_k"].long()}, ValueError, "seqlens_k: this plan is for dtype"),
    "one too many": (lambda x: {"starts": x["seqlens_k"]}, ValueError, "this call has seqlens_k, starts"),
    "out": (lambda x: {"out": x["q"].float()}, ValueError, "out: this plan is for dtype"),
    "out missing": (lambda x: {"out": 5}, TypeError, "out: must be a torch.Tensor, it is int"),
}  # fmt: skip


@table("change, error, message", WRONG)
@pytest.mark.parametrize("warm", [False, True])
def test_other_kinds_are_refused(change, error, message, warm, device, monkeypatch):
    """After a good step too, whose tensors the plan knows; before anything is launched."""
    q, k, v, options = step("lengths", device, 0)
    plan = plan_decoding(q, k, v, **options)
    given = {"q": q, "k": k, "v": v} | options
    if warm:
        plan(**given)
    monkeypatch.setattr(replay.Launch, "run", lambda *args: pytest.fail("launched"))
    given = {name: x for name, x in (given | change(given)).items() if x is not ...}
    with pytest.raises(error, match=message):
        plan(**given)


@pytest.mark.parametrize("name", ["q", "v", "seqlens_k"])
def test_none_is_no_tensor(name, device):
    """Not even where the last call's has gone."""
    q, k, v, options = step("lengths", device, 0)
    plan, given = plan_decoding(q, k, v, **options), {"q": q, "k": k, "v": v} | options
    del q, k, v, options
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name}: must be a torch.Tensor, it is NoneType"):
            plan(**given | {name: None})
        plan(**given)
        given[name] = given[name].clone()


@pytest.mark.parametrize("name", ["q", "k", "v", "seqlens_k", "out"])
def test_a_tensor_that_has_moved(name, device):
    """The same object with other memory: contents there count, and the kind of its address."""
    q, k, v, options = step("lengths", device, 0)
    plan, given = plan_decoding(q, k, v, **options), {"q": q, "k": k, "v": v, "out": torch.empty_like(q)} | options
    plan(**given)
    *others, changed = step("lengths", device, 1)
    given[name].data = (dict(zip("qkv", others, strict=True)) | changed | {"out": torch.empty_like(q)})[name]
    assert plan(**given) is given["out"]
    assert torch.equal(given["out"], flash_decoding(q, k, v, **options))
    x = given[name]
    x.data = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    with pytest.raises(ValueError, match=f"{name}: this plan is for address modulo 16 0, not {x.itemsize}"):
        plan(**given)


def test_nothing_of_the_callers_is_kept(device):
    q, k, v, options = step("lengths", device, 0)
    plan, out = plan_decoding(q, k, v, **options), torch.empty_like(q)
    plan(q, k, v, **options, out=out)
    gone = [weakref.ref(x) for x in (q, k, v, out, *options.values())]
    del q, k, v, options, out
    assert all(x() is None for x in gone)


def test_no_plan_for_copies(device):
    """Kernels would work on a copy of the planned tensor for ever."""
    q, k, v, _ = step("plain", device, 0)
    with pytest.raises(ValueError, match="plan: there is none for a call that computes with aten::clone"):
        plan_decoding(q, k.mT.contiguous().mT, v)


@pytest.mark.parametrize("wrong, message", [
    (dict(num_splits=0), "num_splits: must be"), (dict(scale=math.nan), "scale: must be"),
    (dict(version="v99"), "version 'v99' of decoding does not exist"),
    (dict(seqlens_k=(1, 65)), r"seqlens_k: lengths must lie in 0\.\.64"),
])  # fmt: skip
def test_planning_refuses_what_the_call_refuses(wrong, message, device):
    q, k, v, _ = step("plain", device, 0)
    wrong = {name: lengths(device, *x) if isinstance(x, tuple) else x for name, x in wrong.items()}
    with pytest.raises(ValueError, match=message):
        plan_decoding(q, k, v, **wrong)


def test_planning_checks_pages(device):
    q, k, v, options = step("pages", device, 0)
    options["block_table"][0, 0] = 99
    with pytest.raises(ValueError, match="block_table: pages in use must lie in 0..16, the one at .0, 0. is 99"):
        plan_decoding(q, k, v, **options, check_table=True)


@needs_gpu
def test_a_captured_step(device):
    """Replayed with other lengths, queries and keys, in a graph of its own; eager steps in between."""
    q, k, v, options = step("lengths", device, 0)
    plan, out = plan_decoding(q, k, v, **options), torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(q, k, v, **options, out=out)
    for seed in range(1, 4):
        *others, changed = step("lengths", device, seed)
        for x, y in zip((q, k, v, options["seqlens_k"]), (*others, changed["seqlens_k"]), strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, flash_decoding(q, k, v, **options))
        assert torch.equal(plan(q, k, v, **options), out)


@needs_gpu
def test_the_current_stream(device):
    """A step waits for what its stream has queued before it."""
    q, k, v, _ = step("plain", device, 0)
    plan, stream = plan_decoding(q, k, v), torch.cuda.Stream()
    late = torch.full_like(q, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        out = plan(late, k, v)
    stream.synchronize()
    assert torch.equal(out, flash_decoding(q, k, v))
