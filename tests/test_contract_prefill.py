"""The contract that every prefill version keeps. Each test names the class of bug that it guards against."""

import math

import pytest
import torch
from attention_checks import (
    HALF_AND_FULL,
    Case,
    all_versions,
    all_versions_and_dtypes,
    assert_close,
    assert_lse_close,
    call,
    check,
    dtype_for,
    huge,
    needs_gpu,
    skip_unless_served,
    small_tiles,
    storage_bytes,
    store,
    table,
    vary,
)  # fmt: skip

import prefill
from common.hardware import KNOWN, detect_gpu, interpreting, pretend
from common.lineage import versions_of
from common.quantize import quantize_fp8
from common.reference import attention_oracle

every_version = all_versions("prefill")
every_dtype = all_versions_and_dtypes("prefill", *HALF_AND_FULL, "e4m3", "e5m2")
half_and_full = all_versions_and_dtypes("prefill", *HALF_AND_FULL)
half_and_fp8 = all_versions_and_dtypes("prefill", "bf16", "e4m3")

SHAPES = {
    "D1-mqa-33x47-causal": Case(1, 3, 1, 33, 47, 1, causal=True),
    "D59-1x37": Case(2, 2, 2, 1, 37, 59),
    "D64-gqa-64x64-causal": Case(1, 4, 2, 64, 64, 64, causal=True),
    "D64-1x1": Case(1, 1, 1, 1, 1, 64),
    "D80-gqa-17x130": Case(2, 2, 1, 17, 130, 80),
    "D111-130x17-causal": Case(1, 2, 2, 130, 17, 111, causal=True),
    "D128-65x65-lengths": Case(2, 2, 1, 65, 65, 128, lengths_q=(65, 30), lengths_k=(40, 65)),
    "D256-33x70-window": Case(1, 1, 1, 33, 70, 256, window=(20, 3)),
}


@every_dtype
@table("case", SHAPES)
def test_shapes(version, dtype, case, device):
    """Head dimensions hard-coded or not a power of two; tails of rows, keys and columns; GQA's head index; Sq != Sk."""
    check(version, case, dtype, device)


MASKS = {
    "causal": ("fp16", Case(2, 2, 1, 70, 70, causal=True)),
    "causal-more-keys": ("bf16", Case(1, 2, 2, 40, 75, causal=True)),
    "causal-more-rows": ("fp32", Case(1, 2, 2, 75, 40, causal=True)),
    "window": ("e4m3", Case(1, 2, 1, 70, 70, window=(10, 5))),
    "window-left": ("fp16", Case(1, 1, 1, 70, 75, window=(33, None))),
    "window-right": ("bf16", Case(1, 1, 1, 75, 70, window=(None, 7))),
    "window-own-key": ("fp32", Case(1, 2, 2, 70, 70, window=(0, 0))),
    "window-causal": ("e5m2", Case(1, 2, 2, 70, 70, causal=True, window=(16, 9))),
    "window-rows-before-keys": ("fp16", Case(1, 2, 2, 75, 20, window=(3, 3))),
    "window-past-everything": ("bf16", Case(1, 1, 1, 40, 70, window=(1000, 1000))),
    "lengths-k": ("fp16", Case(3, 2, 1, 40, 70, lengths_k=(0, 1, 45))),
    "lengths-q": ("e4m3", Case(3, 1, 1, 70, 40, lengths_q=(0, 33, 70))),
    "lengths-both": ("bf16", Case(3, 2, 1, 70, 70, lengths_q=(5, 0, 40), lengths_k=(70, 33, 0))),
    "lengths-causal": ("fp16", Case(3, 1, 1, 70, 70, causal=True, lengths_q=(40, 70, 64), lengths_k=(70, 40, 64))),
    "lengths-k-causal": ("fp32", Case(3, 2, 1, 70, 70, causal=True, lengths_k=(20, 70, 1))),
    "lengths-window": ("e5m2", Case(2, 2, 2, 70, 70, window=(12, 4), lengths_q=(33, 70), lengths_k=(64, 31))),
}


@every_version
@table("dtype, case", MASKS)
def test_masks(version, dtype, case, device):
    """Alignment of the diagonal, bounds off by one, blocks skipped that count, lengths ignored, rows without a key."""
    check(version, case, dtype_for(version, dtype), device, tiles=small_tiles(version))


LAYOUTS = {
    "bhsd": "bhsd",
    "bshd": "bshd",
    "sliced": "sliced",
    "packed": "packed",
    "unaligned": "unaligned",
    "last-strided": "last-strided",
    "one-kv-head": ("bshd", "one-head", "one-head"),
    "one-sequence": "one-sequence",
    "all-different": ("bhsd", "packed", "last-strided"),
}


@half_and_fp8
@table("layout", LAYOUTS)
def test_layouts(version, dtype, layout, device):
    """Strides assumed or exchanged, stride 0, pointers that are not aligned, reads between and beside the rows."""
    check(version, Case(2, 2, 2, 33, 45, 40, causal=True, layout=layout), dtype, device)


MASKED = {"full": {}, "causal": {"causal": True}, "window": {"window": (100, 30)}}


@every_dtype
@pytest.mark.parametrize("head_dim", (64,) if interpreting() else (64, 128, 256))
@table("mask", MASKED)
def test_own_tiles(version, dtype, head_dim, mask, device):
    """A default configuration that is wrong, or that does not fit: two of its blocks and a bit, in each direction."""
    case = Case(1, 1, 1, 260, 275, head_dim, layout="bshd", **mask)
    check(version, case if interpreting() else vary(case, heads_q=4, seqlen_q=1041, seqlen_k=1064), dtype, device)


@all_versions_and_dtypes("prefill", "fp16", "e5m2")
def test_nan_past_the_lengths(version, dtype, device):
    """0 * NaN: unused rows of q and of the cache hold anything, and must not be seen, not even by way of a scale."""
    case = Case(2, 2, 1, 70, 70, causal=True, lengths_q=(30, 65), lengths_k=(40, 65))
    q, k, v = case.tensors(dtype, device)
    options = case.options(device)
    clean = call(version, q, k, v, dtype, tiles=small_tiles(version), **options)
    for x, lengths in ((q, case.lengths_q), (k, case.lengths_k), (v, case.lengths_k)):
        for b, length in enumerate(lengths):
            x[b, :, length:] = math.nan
    dirty = call(version, q, k, v, dtype, tiles=small_tiles(version), **options)
    assert torch.equal(dirty, clean)


TIGHT = {
    "tails": Case(1, 2, 2, 33, 45, 59, layout="bhsd"),
    "lengths": Case(2, 1, 1, 40, 70, 40, lengths_q=(40, 17), lengths_k=(70, 35), layout="bhsd"),
    "causal-gqa": Case(1, 4, 2, 75, 40, 80, causal=True, layout="bshd"),
}


@half_and_fp8
@table("case", TIGHT)
def test_touches_its_own_memory_alone(version, dtype, case, device, own_memory_alone):
    """Loads past the end of a tensor: invisible until nothing lies there."""
    check(version, case, dtype, device, tiles=small_tiles(version))


@every_version
def test_nan_in_keys_not_seen(version, device):
    """NaN in K at a position that a row does not see, but that lies in a block it visits, stays away from that row."""
    case = Case(1, 2, 2, 70, 70, causal=True)
    q, k, v = case.tensors("fp16", device)
    clean = call(version, q, k, v, tiles=small_tiles(version), is_causal=True)
    k[:, :, 41] = math.nan
    dirty = call(version, q, k, v, tiles=small_tiles(version), is_causal=True)
    assert torch.equal(dirty[:, :, :41], clean[:, :, :41])


@all_versions_and_dtypes("prefill", "fp32", "e4m3")
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0, 1e-310])
def test_scale(version, dtype, scale, device):
    """A scale that is 0, negative, or 0 in float32: -inf * 0 = NaN, -inf * -1 = +inf, the maximum that is a minimum."""
    case = Case(2, 1, 1, 60, 60, 32, causal=True, window=(40, 0), lengths_k=(60, 37), scale=scale)
    check(version, case, dtype, device, tiles=small_tiles(version))


LOGITS = {
    "all-very-negative": lambda keys: torch.full_like(keys, -4000.0),
    "all-very-positive": lambda keys: torch.full_like(keys, 4000.0),
    "first-block-far-below": lambda keys: torch.where(keys < 32, -4000.0, 0.0),
    "last-block-far-below": lambda keys: torch.where(keys < 64, 0.0, -4000.0),
    "growing": lambda keys: keys * 64.0,
}


@half_and_full
@table("logits", LOGITS)
def test_large_logits(version, dtype, logits, device):
    """Finite stand-ins for -inf that real scores fall below; overflow of exp; a running maximum that is reset."""
    q, k, v = Case(1, 1, 1, 40, 70, 32).tensors(dtype, device)
    q[..., 0] = 64.0  # the logit of key n is logits(n), exact in every dtype, plus N(0, 31)
    k[..., 0] = (logits(torch.arange(70.0, device=device)) / 64.0).to(k.dtype)
    out, lse = call(version, q, k, v, scale=1.0, return_lse=True, tiles=small_tiles(version))
    # logits of thousands carry float32's rounding, up to 2^-12, into the weights
    assert_close(out, q, k, v, dtype, limit={"fp32": 1e-3, "fp16": 2e-3, "bf16": 1e-2}[dtype], lse=lse, scale=1.0)


@all_versions("prefill", fp8=True)
def test_fp8_beside_a_sink(version, device):
    """One key takes nearly all the weight: the others' weights must not underflow when they become e4m3."""
    q, k, v = Case(1, 1, 1, 40, 70, 64).tensors("e4m3", device)
    q[..., 0], k[..., 0], k[:, :, 0, 0] = 8.0, 0.0, 8.0  # key 0: 8 above the rest
    v[:, :, 0] = 0.0  # so that the output is the others' alone
    assert_close(call(version, q, k, v, "e4m3"), q, k, v, "e4m3")


ZERO_SIZE = {
    "no-sequences": Case(0, 2, 2, 5, 7, 16),
    "no-heads": Case(2, 0, 0, 5, 7, 16),
    "no-rows": Case(2, 2, 1, 0, 7, 16),
    "no-keys": Case(2, 2, 1, 5, 0, 16),
    "nothing": Case(0, 0, 0, 0, 0, 16),
}


@half_and_fp8
@table("case", ZERO_SIZE)
def test_zero_size(version, dtype, case, device):
    """Empty tensors: divisions by a count of 0, empty grids, an output that nobody writes."""
    lengths = (0,) * case.batch
    for each in (case, vary(case, causal=True, window=(3, 3)), vary(case, lengths_q=lengths, lengths_k=lengths)):
        check(version, vary(each, layout="bhsd"), dtype, device)


@half_and_fp8
def test_three_dimensions(version, dtype, device):
    """[S, H, D] is one sequence: the same numbers as in [1, H, S, D], in [S, H, D] again."""
    q, k, v = vary(Case(1, 4, 2, 33, 45, 59, causal=True), layout="bshd").tensors(dtype, device)
    expected, expected_lse = call(version, q, k, v, dtype, is_causal=True, return_lse=True)
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    out, lse = call(version, *flat, dtype, is_causal=True, return_lse=True)
    assert out.shape == (33, 4, 59) and lse.shape == (4, 33)
    assert torch.equal(out, expected[0].transpose(0, 1)) and torch.equal(lse, expected_lse[0])
    given = torch.full((33, 4, 59), math.nan, dtype=q.dtype, device=device)
    assert call(version, *flat, dtype, is_causal=True, out=given).data_ptr() == given.data_ptr()
    assert torch.equal(given, out)


@all_versions_and_dtypes("prefill", *HALF_AND_FULL, "e4m3")
@pytest.mark.parametrize("layout", ["padded", "sliced", "bhsd"])
def test_out(version, dtype, layout, device):
    """A preallocated output is filled whole, returned itself, and nothing beside it is written."""
    case = Case(2, 2, 1, 45, 33, 59, causal=True, lengths_q=(45, 20), lengths_k=(33, 0), layout=layout)
    q, k, v = case.tensors(dtype, device)
    options = case.options(device)
    given = store(torch.full_like(q, math.nan), layout)
    before = storage_bytes(given)
    out = call(version, q, k, v, dtype, out=given, **options)
    assert out.data_ptr() == given.data_ptr() and out.stride() == given.stride()
    assert_close(out, q, k, v, dtype, **options)
    given.fill_(math.nan)
    assert torch.equal(storage_bytes(given), before), "memory beside the output was written"


@every_version
def test_output_does_not_depend_on_lse(version, device):
    """return_lse changes what is returned, not the numbers; the same call twice gives the same bits."""
    q, k, v = Case(1, 2, 1, 70, 70).tensors("fp16", device)
    out, lse = call(version, q, k, v, is_causal=True, return_lse=True)
    alone = call(version, q, k, v, is_causal=True)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)
    wanted_lse = attention_oracle(q, k, v, is_causal=True, return_lse=True)[1]
    assert_lse_close(lse, wanted_lse)


@every_version
def test_lengths_checked_once_are_checked_again_when_changed(version, device):
    """Lengths are read on every call: a tensor changed in place must not be served from a memory of the last call."""
    case = Case(2, 1, 1, 20, 20, 16, lengths_k=(5, 20))
    q, k, v = case.tensors("fp32", device)
    lengths = torch.tensor((5, 20), dtype=torch.int32, device=device)
    call(version, q, k, v, seqlens_k=lengths)
    lengths[0] = 17
    out = call(version, q, k, v, seqlens_k=lengths)
    assert_close(out, q, k, v, "fp32", seqlens_k=lengths)
    lengths[0] = 21
    with pytest.raises(ValueError, match="seqlens_k: lengths must lie in 0..20, they reach from 20 to 21"):
        version.call(q, k, v, seqlens_k=lengths)


@all_versions("prefill", runs=False)
def test_grid_axes(version, launches):
    """65 536 heads and more: only the first axis of a grid is longer than 65 535."""
    q = torch.empty(700, 100, 33, 16, dtype=torch.float16, device="meta")
    with pretend(KNOWN["sm_90"]):
        skip_unless_served(version, q, q, q)
        version.call(q, q, q, is_causal=True, return_lse=True)
    assert launches and all(max(grid[1:], default=1) <= 65535 for grid in launches), launches


@needs_gpu
@every_version
def test_many_heads(version, device):
    """The same, run: batch * heads above 65 535."""
    check(version, Case(700, 100, 100, 3, 5, 16, layout="bhsd"), "fp16", device)


@needs_gpu
@all_versions_and_dtypes("prefill", "fp16", "e4m3")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_thousand_runs_are_equal(version, dtype, head_dim, device):
    """Races between warps that hand each other shared memory: a rare one shows in a thousand runs."""
    if version.requires.interpreter:
        pytest.skip("its warps hand each other nothing")
    q, k, v = Case(2, 16, 4, 1041, 1064, head_dim, causal=True, layout="bshd").tensors(dtype, device)
    options = {"is_causal": True}
    if dtype == "e4m3":
        q, k, v, *descales = quantize_fp8(q, k, v, dtype)
        options |= {"use_fp8": True} | dict(zip(("descale_q", "descale_k", "descale_v"), descales, strict=True))
    skip_unless_served(version, q, k, v, **options)
    first = version.call(q, k, v, **options)
    differing = sum(not torch.equal(version.call(q, k, v, **options), first) for _ in range(999))
    assert not differing, f"{differing} of 999 runs differ from the first"


STRIDES = {
    "sequence": (2**31 + 64, 40 * 16, 16, 1),
    "head": (40 * 16, 2**31 + 64, 16, 1),
    "row": (16, 32, 2**26, 1),
}


@every_version
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
@table("strides", STRIDES)
def test_offsets_beyond_int32(version, which, strides, device, in_place):
    """Offsets that wrap at 2^31 elements, in each tensor and by each stride."""
    sizes = (2, 1, 40, 16) if strides[0] >= 2**31 else (1, 2, 40, 16)
    case = Case(sizes[0], sizes[1], sizes[1], 40, 40, 16, layout="bhsd")
    tensors = dict(zip(("q", "k", "v"), case.tensors("fp16", device), strict=True))
    far = huge(sizes, strides, torch.float16, device)
    if which != "out":
        far.copy_(tensors[which])
        tensors[which] = far
    out = call(version, **tensors, **({"out": far} if which == "out" else {}))
    assert_close(out, **tensors, dtype="fp16")


# ---- the entry point


def newest(q, k, v, **arguments):
    """The version that flash_attention should choose."""
    served = [x for x in versions_of("prefill") if not x.why_not(detect_gpu()) and not x.declines(q, k, v, **arguments)]
    return served[-1]


@table("case", {"causal": Case(2, 2, 1, 40, 40, causal=True, layout="bshd"), "scale-0": Case(1, 1, 1, 9, 9, scale=0.0)})
def test_entry_point_runs_the_newest_that_serves(case, device):
    """And `version` any other."""
    q, k, v = case.tensors("fp16", device)
    options = case.options(device)
    causal = options.pop("is_causal", False)
    out = prefill.flash_attention(q, k, v, causal, **options)
    assert torch.equal(out, newest(q, k, v, is_causal=causal, **options).call(q, k, v, is_causal=causal, **options))
    out, lse = prefill.flash_attention(q, k, v, causal=causal, version="v2", return_lse=True, **options)
    assert_close(out, q, k, v, "fp16", lse=lse, is_causal=causal, **options)


def test_entry_point_sets_both_lengths(device):
    """seq_lens alone leaves the diagonal where it is: row i sees keys up to i."""
    q, k, v = Case(2, 1, 1, 40, 40).tensors("fp16", device)
    lengths = torch.tensor([25, 40], dtype=torch.int32, device=device)
    out = prefill.flash_attention(q, k, v, causal=True, seq_lens=lengths)
    assert_close(out, q, k, v, "fp16", is_causal=True, seqlens_q=lengths, seqlens_k=lengths)


def test_the_call_of_the_seed(device):
    """[seq_len, heads, head_dim], FP8, causal, as a reader of the first description would write it."""
    from prefill.flash_attention_v3 import VERSION, call_flash_attention_v3

    reason = VERSION.why_not(detect_gpu(), "e4m3")
    if reason:
        pytest.skip(f"v3 {reason}")
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(48, 2, 16, generator=random).to(device, torch.float16) for _ in range(3))
    out = call_flash_attention_v3(q, k, v, use_fp8=True, is_causal=True)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    assert_close(out.transpose(0, 1)[None], *heads_first, "e4m3", is_causal=True)
