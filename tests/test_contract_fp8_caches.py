"""The contract of decoding over float8 caches: against the oracle on what the cache holds, in every form of a cache."""

import math

import pytest
import torch
from attention_checks import (
    FINEST,
    Case,
    all_versions,
    assert_close,
    assert_lse_close,
    call,
    guarded_memory,
    ints,
    needs_gpu,
    oracle_between,
    paged,
    relative_error,
    skip_unless_served,
    small_tiles,
    splits_for,
    storage_bytes,
    store,
    table,
    tensor_bytes,
)  # fmt: skip

import decoding
from common.hardware import KNOWN, detect_gpu, pretend
from common.launch import Tiles
from common.lineage import versions_of
from common.merge import merge
from common.problem import FP8, AttentionProblem
from common.quantize import quantize_cache
from common.reference import attention_oracle

fp8_versions = all_versions("decoding", fp8=True)
formats = pytest.mark.parametrize("fp8_dtype", ["e4m3", "e5m2"])
LIMIT = {"fp16": FINEST["fp16"], "bf16": 4e-3}  # of what the cache holds no more is lost than in 16 bits
SMALL = Tiles(16, 32, 4, 2)  # a tile that takes columns two by two


def small(version) -> Tiles | None:
    """SMALL; None for kernels written for the tiles that they bring."""
    return SMALL if version.requires.interpreter else None


@pytest.fixture(autouse=True)
def skip_without_float8(request):
    """This GPU may have no such float8."""
    parameters = getattr(request.node, "callspec", None)
    if parameters and "version" in parameters.params:
        reason = parameters.params["version"].why_not(detect_gpu(), parameters.params.get("fp8_dtype", "e4m3"))
        if reason:
            pytest.skip(reason)


def dequantised(cache, block=None):
    """k and v, float32, that a quantised cache stands for."""
    for x, descale in ((cache.k, cache.descale_k), (cache.v, cache.descale_v)):
        of_keys = descale[..., None] if block is None else descale.repeat_interleave(block, 2)[:, :, : x.shape[2]]
        yield x.float() * of_keys[..., None]


def uneven(x):
    """x [B, H, S, D] with blocks and heads of very different size: a factor in the wrong place shows."""
    keys = torch.arange(x.shape[2], device=x.device)
    heads = torch.arange(1, x.shape[1] + 1, device=x.device)
    sizes = torch.where(keys // 16 % 3 == 0, 0.05, 1.0)
    return (x * sizes[:, None] * heads[:, None, None]).to(x.dtype)


def cache_and_options(case, dtype, fp8_dtype, block, device):
    """q, the quantised cache, and its descales as arguments."""
    q, k, v = case.tensors(dtype, device)
    cache = quantize_cache(uneven(k), uneven(v), fp8_dtype, block)
    return q, cache, {"descale_k": cache.descale_k, "descale_v": cache.descale_v}


@fp8_versions
@formats
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("block", [None, 16, 64])
def test_values(version, fp8_dtype, dtype, block, device):
    """Factors of a head or of a block of keys, in the right place; tails of keys; q in both formats."""
    case = Case(2, 8, 2, 1, 75, 64, lengths_k=(75, 33))
    q, cache, options = cache_and_options(case, dtype, fp8_dtype, block, device)
    options |= case.options(device)
    for tiles in (None, small(version)):
        more = dict(num_splits=splits_for(version, 2), return_lse=True, tiles=tiles)
        out, lse = call(version, q, cache.k, cache.v, **more, **options)
        assert_close(out, q, *dequantised(cache, block), dtype, limit=LIMIT[dtype], lse=lse, **case.options(device))


# Cases, and what a step has beside its lengths: first keys, a window, the keys of a page.
STEPS = {
    "D16": (Case(2, 2, 2, 1, 75, 16), {}),
    "gqa-D128": (Case(2, 8, 2, 1, 300, 128, layout="bshd"), {}),
    "mqa-D256": (Case(2, 16, 1, 1, 150, 256, lengths_k=(150, 64)), {}),
    "5-queries-D80": (Case(2, 4, 2, 5, 200, 80, lengths_k=(200, 3)), {}),
    "80-rows": (Case(2, 5, 1, 16, 140, 128, lengths_k=(140, 9)), {}),
    "lengths-with-0": (Case(4, 4, 2, 1, 260, 64, lengths_k=(260, 0, 1, 129)), {}),
    "side-by-side": (Case(3, 8, 4, 2, 300, 64, lengths_k=(300, 0, 131), layout="bshd"), {}),
    "side-by-side-of-3": (Case(2, 6, 3, 1, 140, 64, lengths_k=(140, 65), layout="bshd"), {}),
    "side-by-side-40-rows": (Case(1, 40, 2, 1, 140, 64, layout="bshd"), {}),
    "starts": (Case(4, 4, 2, 1, 300, 64, layout="bshd"), {"starts": (0, 299, 300, 130)}),
    "window": (Case(2, 4, 2, 3, 400, 128), {"window": (70, 0)}),
    "everything": (Case(3, 8, 2, 4, 400, 64, lengths_k=(400, 290, 3), layout="bshd"),
                   {"starts": (380, 20, 1), "window": (150, 0)}),
    "pages-of-8": (Case(2, 4, 4, 1, 200, 80, lengths_k=(150, 0)), {"starts": (20, 0), "page_size": 8}),
    "pages-of-64": (Case(2, 8, 2, 4, 320, 64, lengths_k=(77, 320)), {"window": (100, 0), "page_size": 64}),
    "pages-of-256": (Case(2, 4, 2, 1, 512, 128, lengths_k=(400, 512)), {"page_size": 256}),
}  # fmt: skip


@fp8_versions
@pytest.mark.parametrize(
    "dtype, fp8_dtype, factors", [("fp16", "e4m3", True), ("fp16", "e4m3", False), ("bf16", "e5m2", True)]
)
@table("case, more", STEPS)
def test_steps(version, case, more, factors, dtype, fp8_dtype, device):
    """Heads beside each other in memory or not, one query and several, with and without factors; NaN wherever no query
    looks; a sequence without keys.
    """
    q, cache, options = cache_and_options(case, dtype, fp8_dtype, None, device)
    caches, (k, v) = [cache.k, cache.v], dequantised(cache)
    if not factors:
        _, k, v = case.tensors(dtype, device)
        caches = [store(x.to(FP8[fp8_dtype]), case.layout) for x in (k, v)]
        (k, v), options = (x.float() for x in caches), {}
    ends = case.lengths_k or (case.seqlen_k,) * case.batch
    starts, window, page_size = (more.get(name) for name in ("starts", "window", "page_size"))
    firsts, parts = [], []
    for b, (first, end) in enumerate(zip(starts or (0,) * case.batch, ends, strict=True)):
        seen = dict(is_causal=True, window=window, return_lse=True)
        parts.append(attention_oracle(q[b : b + 1], *(x[b : b + 1, :, first:end] for x in (k, v)), **seen))
        firsts.append(first if window is None else max(first, end - case.seqlen_q - window[0]))
        for x in caches:
            x.view(torch.uint8)[b, :, : firsts[b]] = x.view(torch.uint8)[b, :, end:] = 255
    wanted, wanted_lse = (torch.cat(part) for part in zip(*parts, strict=True))
    options |= case.options(device) | {"window": window, "starts": None if starts is None else ints(starts, device)}
    if page_size:
        *caches, options["block_table"] = paged(*caches, ends, page_size)
        for row, first in zip(options["block_table"], firsts, strict=True):
            row[: first // page_size] = 10**6
    options |= {"num_splits": splits_for(version, 2), "tiles": small(version)}
    out, lse = call(version, q, *caches, return_lse=True, **options)
    assert out.isfinite().all() and not out[wanted_lse == -math.inf].any()
    assert relative_error(out, wanted) < LIMIT[dtype]
    assert_lse_close(lse, wanted_lse)


@fp8_versions
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(version, scale, device):
    """A scale that is 0 or negative, beside the factors that join it."""
    case = Case(2, 8, 2, 1, 150, 64, lengths_k=(150, 0), scale=scale, layout="bshd")
    q, cache, options = cache_and_options(case, "bf16", "e4m3", None, device)
    more = case.options(device)
    out, lse = call(version, q, cache.k, cache.v, return_lse=True, tiles=small(version), **options, **more)
    assert_close(out, q, *dequantised(cache), "bf16", limit=LIMIT["bf16"], lse=lse, **more)


@fp8_versions
@pytest.mark.parametrize("layout", ["padded", "sliced", "bhsd"])
@pytest.mark.parametrize("kv_layout, head_dim", [("bshd", 64), ("bhsd", 48)])
def test_out(version, kv_layout, head_dim, layout, device):
    """A preallocated output is filled whole, also with what has no keys, returned itself, nothing beside it written."""
    case = Case(3, 8, 2, 2, 70, head_dim, lengths_k=(70, 0, 1), layout=kv_layout)
    q, cache, options = cache_and_options(case, "fp16", "e5m2", None, device)
    given = store(torch.full_like(q, math.nan), layout)
    before = storage_bytes(given)
    options |= case.options(device) | {"tiles": small(version)}
    assert call(version, q, cache.k, cache.v, out=given, **options) is given
    assert_close(given, q, *dequantised(cache), "fp16", limit=LIMIT["fp16"], is_causal=True, **case.options(device))
    given.fill_(math.nan)
    assert torch.equal(storage_bytes(given), before), "memory beside the output was written"


@fp8_versions
@formats
def test_shards_merge_into_the_whole(version, fp8_dtype, device):
    """A cache held in several places, each attended alone; the last has no keys of the second sequence."""
    lengths = (150, 60)
    q, cache, options = cache_and_options(Case(2, 8, 2, 1, 150, 64, layout="bshd"), "fp16", fp8_dtype, None, device)
    parts = []
    for start, end in ((0, 20), (20, 70), (70, 150)):
        options["seqlens_k"] = ints([min(max(length - start, 0), end - start) for length in lengths], device)
        shard = (x[:, :, start:end] for x in (cache.k, cache.v))
        parts.append(call(version, q, *shard, return_lse=True, tiles=small(version), **options))
    out, lse = merge(*(torch.stack(part) for part in zip(*parts, strict=True)))
    whole = {"lse": lse, "seqlens_k": ints(lengths, device)}
    assert_close(out, q, *dequantised(cache), "fp16", limit=LIMIT["fp16"], **whole)


@fp8_versions
@formats
def test_every_number_of_the_format(version, fp8_dtype, device):
    """All 256, subnormal, infinite and NaN: v of one key is the output, whatever q is; both ways to convert."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device).view(1, 4, 1, 64).view(FP8[fp8_dtype])
    q, keys = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16, device=device), torch.zeros_like(numbers)
    wanted = numbers.float().to(torch.bfloat16).repeat_interleave(2, 1)
    for tiles in (None, Tiles(1, 16, 4, 2) if version.requires.interpreter else None):
        out = version.call(q, keys, numbers, tiles=tiles)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    scores = numbers.transpose(1, 2).contiguous()  # and in K: a query that asks for column d finds its number
    scores = scores.view(1, 1, 4, 64)
    for column in (0, 31, 62, 63):
        q = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device=device)
        q[..., column] = 1.0
        for key in range(4):
            one = scores[:, :, key : key + 1].contiguous()
            _, lse = version.call(q, one, torch.zeros_like(one), scale=1.0, return_lse=True)
            number = one[0, 0, 0].float()
            if number.isfinite().all():
                assert lse.item() == pytest.approx(number[column].item(), rel=1e-6)  # formats have steps of 1/16


ROWS = {"one-row": (2, 2, 1), "4": (4, 1, 1), "mqa-64": (64, 1, 1), "3-x-5-queries": (3, 1, 5), "80": (5, 1, 16)}


@fp8_versions
@table("heads_q, heads_kv, seqlen_q", ROWS)
@pytest.mark.parametrize("page_size, block", [(16, None), (64, 16), (16, 16)])
def test_pages(version, heads_q, heads_kv, seqlen_q, page_size, block, device):
    """Pages anywhere are a contiguous cache to the bit, their factors beside them; NaN in pages of nobody and past the
    lengths, in keys and in factors.
    """
    lengths = (75, 33)
    case = Case(2, heads_q, heads_kv, seqlen_q, 75, 32, lengths_k=lengths)
    q, cache, options = cache_and_options(case, "fp16", "e4m3", block, device)
    more = {"num_splits": splits_for(version, 2), "window": (60, 0), "return_lse": True, "tiles": small(version)}
    more |= case.options(device)
    flat = call(version, q, cache.k, cache.v, **options, **more)
    wanted = attention_oracle(
        q, *dequantised(cache, block), is_causal=True, window=(60, 0), seqlens_k=ints(lengths, device)
    )
    assert relative_error(flat[0], wanted) < LIMIT["fp16"]
    k_pages, v_pages, block_table = paged(cache.k, cache.v, lengths, page_size)
    if block:
        for name, descale in options.items():
            pages = torch.full((k_pages.shape[0], heads_kv, page_size // block), math.nan, device=device)
            for b, length in enumerate(lengths):
                for i in range(-(-length // page_size)):
                    some = descale[b, :, i * page_size // block : (i + 1) * page_size // block]
                    pages[block_table[b, i], :, : some.shape[1]] = some
            options[name] = pages
    found = call(version, q, k_pages, v_pages, block_table=block_table, **options, **more)
    assert all(torch.equal(x, y) for x, y in zip(found, flat, strict=True))


LAYOUTS = {
    "odd": ("padded", 59),
    "side-by-side": ("bshd", 64),
    "rows-of-128": ("bshd", 128),
    "packed": ("packed", 64),
    "unaligned": ("unaligned", 64),
    "strided": ("last-strided", 40),
}


@fp8_versions
@table("layout, head_dim", LAYOUTS)
def test_layouts(version, layout, head_dim, device):
    """Columns are loaded two by two where that can be; odd widths, strides and addresses are not."""
    q, k, v = Case(2, 4, 2, 1, 75, head_dim).tensors("fp16", device)
    cache = quantize_cache(k, v)
    k8, v8 = (store(x, layout) for x in (cache.k, cache.v))
    out = call(version, q, k8, v8, descale_k=cache.descale_k, descale_v=cache.descale_v, tiles=small(version))
    assert_close(out, q, *dequantised(cache), "fp16", limit=LIMIT["fp16"])


@fp8_versions
@formats
@pytest.mark.parametrize("page_size", [None, 16])
def test_append(version, fp8_dtype, page_size, device):
    """New rows are float8 too, written as they are; then the call is one over the appended cache, to the bit."""
    lengths = (41, 17, 2, 0)
    q, cache, options = cache_and_options(Case(4, 4, 2, 3, 41, 32), "fp16", fp8_dtype, None, device)
    caches, block_table = [cache.k, cache.v], None
    new = [torch.zeros(4, 2, 3, 32, device=device).to(x.dtype) for x in caches]
    skip_unless_served(version, q, *caches, k_new=new[0], v_new=new[1], **options)
    for b, length in enumerate(lengths):
        count = min(length, 3)
        for fresh, x in zip(new, caches, strict=True):
            fresh[b, :, 3 - count :].copy_(x[b, :, length - count : length])
    if page_size:
        *caches, block_table = paged(*caches, lengths, page_size)
    options |= dict(block_table=block_table, seqlens_k=ints(lengths, device))
    options |= dict(num_splits=splits_for(version, 3), tiles=small(version))
    wanted = call(version, q, *caches, **options)
    before = [tensor_bytes(x).clone() for x in caches]
    for x in caches:
        raw = x.view(torch.uint8)
        for b, length in enumerate(lengths):
            for n in range(max(0, length - 3), length):
                at = (b, n) if not page_size else (int(block_table[b, n // page_size]), n % page_size)
                raw[at[0], :, at[1]] = 255
    with guarded_memory():
        out = version.call(q, *caches, k_new=new[0], v_new=new[1], **options)
    assert torch.equal(out, wanted)
    assert all(torch.equal(tensor_bytes(x), was) for x, was in zip(caches, before, strict=True))


@fp8_versions
@pytest.mark.parametrize("block", [None, 16])
def test_touches_its_own_memory_alone(version, block, device, own_memory_alone):
    """Loads of factors past their end too."""
    q, cache, options = cache_and_options(Case(2, 4, 2, 1, 75, 24), "fp16", "e4m3", block, device)
    skip_unless_served(version, q, cache.k, cache.v, **options)
    version.call(q, cache.k, cache.v, num_splits=splits_for(version, 3), tiles=small(version), **options)
    version.call(q, cache.k, cache.v, num_splits=splits_for(version, 3), tiles=small_tiles(version), **options)


@fp8_versions
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_queries_beyond_float16(version, size, device):
    """A bfloat16 query has numbers that float16 has not; a head of zeros beside it."""
    q, cache, options = cache_and_options(Case(1, 4, 2, 1, 75, 32), "bf16", "e4m3", None, device)
    q = (q * size).to(torch.bfloat16)
    q[:, 1] = 0.0
    out = call(version, q, cache.k, cache.v, scale=0.2 / size, tiles=small(version), **options)
    wanted = attention_oracle(q, *dequantised(cache), scale=0.2 / size)
    assert relative_error(out, wanted) < LIMIT["bf16"]


@fp8_versions
@pytest.mark.parametrize("block", [None, 16])
def test_factors_beyond_float16(version, block, device):
    """Weights times small factors are no float16 any more, factors of v alone neither."""
    q, cache, options = cache_and_options(Case(1, 4, 2, 1, 75, 32), "bf16", "e4m3", block, device)
    cache = cache._replace(descale_v=cache.descale_v * 1e-12)
    out = call(version, q, cache.k, cache.v, tiles=small(version), **options | {"descale_v": cache.descale_v})
    assert_close(out, q, *dequantised(cache, block), "bf16", limit=LIMIT["bf16"])


@fp8_versions
def test_deterministic(version, device):
    """A sequence's bits do not depend on the batch."""
    q, cache, options = cache_and_options(Case(3, 4, 1, 1, 2100, 32), "fp16", "e4m3", None, device)
    lengths = ints((2100, 30, 1025), device)
    out = call(version, q, cache.k, cache.v, deterministic=True, seqlens_k=lengths, **options)
    alone = {name: x[2:] for name, x in options.items()}
    one = call(
        version, q[2:], cache.k[2:, :, :1100], cache.v[2:, :, :1100], deterministic=True, seqlens_k=lengths[2:], **alone
    )
    assert torch.equal(one, out[2:])


@needs_gpu
@fp8_versions
@formats
def test_replays_with_other_contents(version, fp8_dtype, device):
    """A captured step follows lengths, first keys, factors and a table that change in place."""
    case = Case(2, 8, 2, 1, 512, 64, layout="bshd")
    q, cache, options = cache_and_options(case, "fp16", fp8_dtype, None, device)
    k, v = dequantised(cache)
    k_pages, v_pages, block_table = paged(cache.k, cache.v, (512, 512), 16)
    step = {name: x.clone() for name, x in options.items()} | {"block_table": block_table.clone()}
    step |= {"seqlens_k": ints((512, 512), device), "starts": ints((0, 0), device)}
    version.call(q, k_pages, v_pages, num_splits=splits_for(version, 5), **step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = version.call(q, k_pages, v_pages, num_splits=splits_for(version, 5), **step)
    for lengths, first, factor in (((512, 17), (0, 0), 1.0), ((1, 333), (0, 300), 3.0), ((480, 0), (479, 0), 0.5)):
        step["seqlens_k"].copy_(ints(lengths, device))
        step["starts"].copy_(ints(first, device))
        step["block_table"].copy_(block_table)
        for b, length in enumerate(lengths):
            step["block_table"][b, -(-length // 16) :] = step["block_table"][b, : first[b] // 16] = -1
        step["descale_k"].copy_(options["descale_k"] / factor)
        step["descale_v"].copy_(options["descale_v"] * factor)
        graph.replay()
        torch.cuda.synchronize()
        wanted, _ = oracle_between(q, k / factor, v * factor, first, lengths)
        assert relative_error(out, wanted) < LIMIT["fp16"]


@needs_gpu
@fp8_versions
@pytest.mark.parametrize("head_dim", [64, 128])
def test_128k_keys(version, head_dim, device):
    """The length that a model is trained for, and other lengths beside it, in one batch; the same in pages."""
    lengths = (131072, 1, 131071)
    case = Case(3, 8, 2, 1, 131072, head_dim, lengths_k=lengths, layout="bshd")
    q, k, v = case.tensors("fp16", device)
    cache = quantize_cache(k, v)
    options = case.options(device) | {"descale_k": cache.descale_k, "descale_v": cache.descale_v, "return_lse": True}
    flat = call(version, q, cache.k, cache.v, **options)
    assert_close(flat[0], q, *dequantised(cache), "fp16", limit=LIMIT["fp16"], lse=flat[1], **case.options(device))
    order = torch.randperm(3 * 8192, device=device).int()
    pages = [torch.empty_like(x.transpose(1, 2)).view(-1, 16, 2, head_dim) for x in cache[:2]]
    for x, y in zip(pages, cache[:2], strict=True):
        x.view(torch.uint8)[order.long()] = y.transpose(1, 2).reshape(-1, 16, 2, head_dim).view(torch.uint8)
    pages = [x.transpose(1, 2) for x in pages]
    found = call(version, q, *pages, block_table=order.view(3, -1), **options)
    assert relative_error(found[0], flat[0]) < LIMIT["fp16"]
    assert_lse_close(found[1], flat[1].double())


@needs_gpu
@fp8_versions
def test_more_elements_than_int32_counts(version, device):
    """4.8 billion bytes of K and as many of V, contiguous, and in pages mixed up within each sequence."""
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("needs 64 GiB of GPU memory")
    torch.manual_seed(0)
    k, v = (torch.randn(9, 65536, 8, 128, dtype=torch.float16, device=device).transpose(1, 2) for _ in range(2))
    q = torch.randn(9, 16, 1, 128, dtype=torch.float16, device=device)
    cache = quantize_cache(k, v)
    wanted = attention_oracle(q, *(x.half() for x in dequantised(cache)))
    rows = torch.stack([torch.randperm(4096, device=device) + 4096 * b for b in range(9)])
    pages = [x.transpose(1, 2).view(-1, 16, 8, 128).transpose(1, 2) for x in cache[:2]]
    for x in (dict(k=cache.k, v=cache.v), dict(k=pages[0], v=pages[1], block_table=rows.int())):
        out = version.call(q, **x, descale_k=cache.descale_k, descale_v=cache.descale_v)
        assert relative_error(out, wanted) < LIMIT["fp16"]


# ---- what is refused, and who serves


def test_entry_point(device):
    """The newest version that takes them; older ones, by name, say who does."""
    q, cache, options = cache_and_options(Case(1, 4, 2, 1, 40, 16), "fp16", "e5m2", None, device)
    out = decoding.flash_decoding(q, cache.k, cache.v, **options)
    assert_close(out, q, *dequantised(cache), "fp16", limit=LIMIT["fp16"])
    able = next(version for version in versions_of("decoding") if version.fp8).name
    with pytest.raises(ValueError, match=f"version: v4 takes no float8 caches; {able} does"):
        decoding.flash_decoding(q, cache.k, cache.v, version="v4")
    with pytest.raises(ValueError, match=f"version: v4 takes no descale_k, descale_v; {able} does"):
        decoding.flash_decoding(q, q, q, version="v4", **options)
    for version in versions_of("decoding"):
        if not version.fp8:
            with pytest.raises(
                TypeError, match="k: is torch.float8_e5m2 and q is torch.float16; .* but for float8 caches"
            ):
                version.call(q, cache.k, cache.v)


def replaced(**changes):
    return lambda a: a | {name: change(a[name]) for name, change in changes.items()}


WRONG = {
    "q-fp32": (replaced(q=lambda x: x.float()), TypeError, "q: over float8 caches must be float16 or bfloat16"),
    "q-fp8": (replaced(q=lambda x: x.to(FP8["e4m3"])), TypeError, "q: must be float16, bfloat16 or float32"),
    "k-alone": (replaced(v=lambda x: x.half()), TypeError, "k: is .*e4m3.* and v is torch.float16; k and v must have"),
    "v-alone": (replaced(k=lambda x: x.half()), TypeError, "v: is .*e4m3.* and k is torch.float16; k and v must have"),
    "mixed": (replaced(v=lambda x: x.float().to(FP8["e5m2"])), TypeError, "k and v must have one dtype"),
    "number": (replaced(descale_k=lambda x: 2.0), TypeError, "descale_k: must be a float32 tensor, it is float"),
    "half": (replaced(descale_v=lambda x: x.half()), TypeError, "descale_v: must be float32, it is torch.float16"),
    "device": (replaced(descale_v=lambda x: x.to("meta")), ValueError, "descale_v: is on meta and q is on"),
    "heads": (replaced(descale_k=lambda x: x[:, :1]), ValueError, r"descale_k: must have shape \[2, 2\] or \[2, 2, "),
    "blocks": (
        replaced(descale_k=lambda x: x[..., None].expand(2, 2, 6)), ValueError, r"from 16 on; it has \[2, 2, 6\]"
    ),
    "of-16-bits": (
        replaced(k=lambda x: x.half(), v=lambda x: x.half()), ValueError, "descale_k: belongs to float8 caches"
    ),
}  # fmt: skip


@table("wrong, error, message", WRONG)
def test_refused(wrong, error, message, device):
    q, cache, options = cache_and_options(Case(2, 4, 2, 1, 75, 16), "fp16", "e4m3", None, device)
    arguments = wrong(dict(q=q, k=cache.k, v=cache.v) | options)
    with pytest.raises(error, match=message):
        AttentionProblem.decoding(**arguments, fp8_caches=True)
    with pytest.raises(error, match=message):
        decoding.flash_decoding(**arguments)


@pytest.mark.parametrize("keys, blocks, of_block", [(75, 5, 16), (75, 3, 32), (75, 1, 128), (8, 1, 16), (4096, 64, 64)])
def test_blocks_follow_from_the_shape(keys, blocks, of_block, device):
    cache = torch.zeros(2, 2, keys, 16, device=device).to(FP8["e4m3"])
    q = torch.zeros(2, 2, 1, 16, dtype=torch.float16, device=device)
    descale = torch.ones(2, 2, blocks, device=device)
    problem = AttentionProblem.decoding(q, cache, cache, descale_k=descale, fp8_caches=True)
    assert problem.keys_of_descales == (of_block, 0)


def test_gpus_without_float8():
    """Of NVIDIA's, e4m3 begins with 8.9; e5m2 is everywhere."""
    q = torch.empty(1, 2, 1, 16, dtype=torch.float16, device="meta")
    cache = {name: torch.empty(1, 2, 40, 16, dtype=dtype, device="meta") for name, dtype in FP8.items()}
    for arch in ("sm_80", "gfx942"):
        with pretend(KNOWN[arch]):
            AttentionProblem.decoding(q, cache["e5m2"], cache["e5m2"], fp8_caches=True)
            with pytest.raises(
                ValueError, match="e4m3 needs an NVIDIA GPU of compute capability 8.9, this is .*e5m2 would"
            ):
                AttentionProblem.decoding(q, cache["e4m3"], cache["e4m3"], fp8_caches=True)


# ---- quantize_cache


@formats
@pytest.mark.parametrize("block", [None, 16, 64])
def test_quantize_cache(fp8_dtype, block, device):
    """A head's or block's largest number is the format's largest; layout kept; keys past the lengths set no scale."""
    _, k, v = Case(2, 2, 2, 1, 75, 24, layout="bshd").tensors("bf16", device)
    k[1, :, 40:] = math.nan
    cache = quantize_cache(k, v, fp8_dtype, block, seqlens_k=ints((75, 40), device))
    assert cache.k.stride() == k.stride() and cache.k.dtype == FP8[fp8_dtype]
    assert cache.descale_v.shape == ((2, 2) if block is None else (2, 2, -(-75 // block)))
    limit = {"e4m3": 2**-4, "e5m2": 2**-3}[fp8_dtype]
    for x, y, b, n in ((k, next(dequantised(cache, block)), 0, 75), (k, next(dequantised(cache, block)), 1, 40)):
        assert ((x[b, :, :n].float() - y[b, :, :n]).abs() <= limit * x[b, :, :n].abs() + 1e-2).all()
    assert cache.k[0].float().abs().max() == torch.finfo(FP8[fp8_dtype]).max
    with pytest.raises(ValueError, match="block: must be a power of two from 16 on, or None, it is 24"):
        quantize_cache(k, v, block=24)
    with pytest.raises(ValueError, match="fp8_dtype: must be 'e4m3' or 'e5m2', it is 'fp8'"):
        quantize_cache(k, v, "fp8")
