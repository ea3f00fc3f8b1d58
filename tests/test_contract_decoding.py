"""The contract that every decoding version keeps. Each test names the class of bug that it guards against."""

import dataclasses
import math

import pytest
import torch
from attention_checks import (
    FINEST,
    HALF_AND_FULL,
    Case,
    all_versions,
    all_versions_and_dtypes,
    as_cache,
    assert_close,
    assert_lse_close,
    call,
    check,
    finest_dtype,
    huge,
    needs_gpu,
    skip_unless_served,
    small_tiles,
    splits_for,
    storage_bytes,
    store,
    table,
    vary,
)  # fmt: skip
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import decoding
from common.hardware import KNOWN, pretend
from common.hopper import let_next_kernel_start
from common.lineage import versions_of
from common.merge import merge
from common.problem import FP8
from common.reference import attention_oracle

every_version = all_versions("decoding")
every_dtype = all_versions_and_dtypes("decoding", *HALF_AND_FULL)

SHAPES = {
    "D1-mqa-37": Case(2, 3, 1, seqlen_k=37, head_dim=1),
    "D59-1": Case(2, 2, 2, seqlen_k=1, head_dim=59),
    "D64-gqa-256": Case(1, 8, 2, seqlen_k=256, head_dim=64),
    "D80-mqa-130": Case(3, 4, 1, seqlen_k=130, head_dim=80, lengths_k=(130, 0, 77)),
    "D111-65": Case(2, 2, 2, seqlen_k=65, head_dim=111, scale=-0.3),
    "D128-gqa-515": Case(1, 6, 2, seqlen_k=515, head_dim=128),
    "D256-300": Case(1, 1, 1, seqlen_k=300, head_dim=256, lengths_k=(299,)),
    "D128-8-heads": Case(1, 16, 8, seqlen_k=530, head_dim=128, lengths_k=(515,)),
    "D64-64-heads": Case(8, 8, 8, 2, seqlen_k=70, head_dim=64),
}


@every_dtype
@table("case", SHAPES)
def test_shapes(version, dtype, case, device):
    """Head dimensions hard-coded or not a power of two; tails of keys and columns; the head index of GQA and MQA."""
    check(version, case, dtype, device)


# name: query heads, KV heads, queries of a sequence
GROUPS = {
    "1": (3, 3, 1),
    "2": (4, 2, 1),
    "3": (6, 2, 1),
    "mqa-5": (5, 1, 1),
    "8": (16, 2, 1),
    "mqa-16": (16, 1, 1),
    "mqa-17": (17, 1, 1),
    "32": (64, 2, 1),
    "64": (64, 1, 1),
    "two-queries": (2, 2, 2),
    "3-x-3-queries": (6, 2, 3),
    "8-x-5-queries": (8, 1, 5),
    "16-queries": (2, 2, 16),
    "9-x-16-queries": (9, 1, 16),
}


@all_versions_and_dtypes("decoding", "fp16")
@table("heads_q, heads_kv, seqlen_q", GROUPS)
def test_groups(version, dtype, heads_q, heads_kv, seqlen_q, device):
    """Rows of one tile, or of several, that are mixed up; rows that fill a tile up and are none; lengths 0, 1, < Sq."""
    many = heads_q >= 32 and device.type == "cpu"  # v1 has a program for each head: 14 s, interpreted
    lengths = (40,) if many else (75, 0, 1, 40)
    case = Case(len(lengths), heads_q, heads_kv, seqlen_q, seqlen_k=75, head_dim=32, lengths_k=lengths)
    check(version, case, dtype, device, tiles=small_tiles(version), num_splits=splits_for(version, 3))


@all_versions_and_dtypes("decoding", "fp32", "fp16")
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@table("heads_q, heads_kv, seqlen_q", {name: GROUPS[name] for name in ("3", "8-x-5-queries")})
def test_groups_in_own_tiles(version, dtype, head_dim, heads_q, heads_kv, seqlen_q, device):
    """The tiles that a version chooses for each head dimension, and its own number of splits."""
    case = Case(2, heads_q, heads_kv, seqlen_q, seqlen_k=300, head_dim=head_dim, lengths_k=(300, 129))
    check(version, case, dtype, device)


@every_version
@pytest.mark.parametrize("num_splits", [1, 4])
def test_nan_in_keys_that_a_query_does_not_see(version, num_splits, device):
    """The causal mask of several queries: the first does not see what came after it, even NaN."""
    case = Case(2, 4, 2, seqlen_q=3, seqlen_k=70, head_dim=32, lengths_k=(70, 35))
    q, k, v = case.tensors("fp16", device)
    arguments = case.options(device) | {"num_splits": splits_for(version, num_splits), "tiles": small_tiles(version)}
    clean = call(version, q, k, v, **arguments)
    for b, length in enumerate(case.lengths_k):
        k[b, :, length - 1 :] = v[b, :, length:] = math.nan
    out = call(version, q, k, v, **arguments)
    assert torch.equal(out[:, :, :2], clean[:, :, :2]) and out[:, :, 2].isnan().all()


@all_versions_and_dtypes("decoding", "fp32", "fp16")
@pytest.mark.parametrize("num_splits", [1, 2, 3, 5, 34])
def test_splits(version, num_splits, dtype, device):
    """Splits without a key, more splits than blocks or than a step of the merge takes: exp(-inf + inf), no weights."""
    case = Case(3, 1, 1, seqlen_k=130, head_dim=32, lengths_k=(130, 0, 33))
    check(version, case, dtype, device, tiles=small_tiles(version), num_splits=num_splits)


@every_version
def test_more_splits_than_the_merge_takes_at_once(version, device):
    """Forty splits with keys, so that the merge has several steps; the last ones weigh most, so that it rescales."""
    q, k, v = Case(1, 1, 1, seqlen_k=40 * 16, head_dim=16).tensors("fp16", device)
    k[:, :, 39 * 16 :] *= 4
    out, lse = call(version, q, k, v, return_lse=True, tiles=small_tiles(version, block_n=16), num_splits=40)
    assert_close(out, q, k, v, "fp16", lse=lse)


@every_version
def test_calls_leave_nothing_behind(version, device):
    """Counters and scratch that a call leaves to the next one, which may have more heads, fewer splits, other rows."""
    cases = [Case(2, 4, 2, seqlen_k=75), Case(3, 2, 2, seqlen_k=40, head_dim=32), Case(2, 4, 2, seqlen_k=75)]
    for splits in (5, 2, 1):
        for case in cases:
            check(version, case, "fp16", device, tiles=small_tiles(version), num_splits=splits_for(version, splits))


@every_version
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shards_merge_into_the_whole(version, shards, device):
    """A cache held in several places: each attended alone, merged by common.merge, with one shard that has no keys, of
    versions that take such a cache.
    """
    dtype = finest_dtype(version)
    q, k, v = Case(2, 4, 2, seqlen_k=150, head_dim=32).tensors(dtype, device)
    cuts = [0, *range(20, 150, 130 // shards)][:shards] + [150]
    if version.why_not_call(q, k[:, :, :0], v[:, :, :0]) is None:
        cuts[1] = cuts[0]
    parts = [
        call(version, q, k[:, :, start:end], v[:, :, start:end], return_lse=True)
        for start, end in zip(cuts, cuts[1:], strict=False)
    ]
    outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
    out, lse = merge(outs, lses)
    assert_close(out, q, k, v, dtype, limit=FINEST[dtype], lse=lse)


TIGHT = {
    "tails": Case(1, 2, 2, 1, 75, 59),
    "lengths": Case(2, 2, 1, 1, 130, 40, lengths_k=(130, 35)),
    "queries": Case(2, 6, 2, 3, 75, 24, lengths_k=(2, 75)),
}


@every_version
@table("case", TIGHT)
def test_touches_its_own_memory_alone(version, case, device, own_memory_alone):
    """Loads past the end of a tensor: invisible until nothing lies there."""
    options = {"tiles": small_tiles(version), "num_splits": splits_for(version, 3)}
    check(version, vary(case, layout="bhsd"), "fp16", device, **options)


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


@every_version
@table("layout", LAYOUTS)
def test_layouts(version, layout, device):
    """Strides assumed or exchanged, stride 0, pointers that are not aligned, reads between and beside the rows."""
    case = Case(2, 2, 2, seqlen_k=75, head_dim=40, layout=layout)
    check(version, case, "bf16", device, tiles=small_tiles(version), num_splits=splits_for(version, 2))


@every_version
def test_nan_past_the_lengths(version, device):
    """0 * NaN: the unused part of a cache holds anything, and must not be seen."""
    case = Case(2, 2, 1, seqlen_k=130, head_dim=32, lengths_k=(40, 97))
    q, k, v = case.tensors("fp16", device)
    arguments = case.options(device) | {"num_splits": splits_for(version, 3), "tiles": small_tiles(version)}
    clean = call(version, q, k, v, **arguments)
    for b, length in enumerate(case.lengths_k):
        k[b, :, length:] = v[b, :, length:] = math.nan
    assert torch.equal(call(version, q, k, v, **arguments), clean)


LOGITS = {
    "all-very-negative": lambda keys: torch.full_like(keys, -4000.0),
    "all-very-positive": lambda keys: torch.full_like(keys, 4000.0),
    "first-split-far-below": lambda keys: torch.where(keys < 64, -4000.0, 0.0),
    "last-split-far-below": lambda keys: torch.where(keys < 64, 0.0, -4000.0),
    "growing": lambda keys: keys * 64.0,
}


@every_dtype
@table("logits", LOGITS)
def test_large_logits(version, dtype, logits, device):
    """Finite stand-ins for -inf that real scores fall below; overflow of exp in a split or in the merge."""
    q, k, v = Case(1, 2, 1, seqlen_k=130, head_dim=32).tensors(dtype, device)
    q[..., 0] = 64.0  # the logit of key n is logits(n), exact in every dtype, plus N(0, 31)
    k[..., 0] = (logits(torch.arange(130.0, device=device)) / 64.0).to(k.dtype)
    arguments = {"scale": 1.0, "return_lse": True, "num_splits": splits_for(version, 2), "tiles": small_tiles(version)}
    out, lse = call(version, q, k, v, **arguments)
    # logits of thousands carry float32's rounding, up to 2^-12, into the weights
    assert_close(out, q, k, v, dtype, limit={"fp32": 1e-3, "fp16": 2e-3, "bf16": 1e-2}[dtype], lse=lse, scale=1.0)


@every_version
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0, 1e-310])
def test_scale(version, scale, device):
    """A scale that is 0, negative, or 0 in float32."""
    case = Case(2, 2, 2, seqlen_k=70, head_dim=32, scale=scale, lengths_k=(70, 0))
    options = {"tiles": small_tiles(version), "num_splits": splits_for(version, 2)}
    check(version, case, finest_dtype(version), device, **options)


ZERO_SIZE = {
    "no-sequences": Case(0, 2, 2, seqlen_k=7, head_dim=16),
    "no-heads": Case(2, 0, 0, seqlen_k=7, head_dim=16),
    "no-keys": Case(2, 2, 1, seqlen_k=0, head_dim=16),
    "no-keys-used": Case(2, 2, 1, seqlen_k=7, head_dim=16, lengths_k=(0, 0)),
}


@every_version
@pytest.mark.parametrize("num_splits", [None, 3])
@table("case", ZERO_SIZE)
def test_zero_size(version, num_splits, case, device):
    """Empty tensors: divisions by a count of 0, empty grids, an output that nobody writes."""
    check(version, vary(case, layout="bhsd"), "fp16", device, num_splits=num_splits)


@needs_gpu
@every_version
@table("case", {
    "8-heads": Case(1, 8, 8, 1, 4096, 64), "one-row": Case(2, 2, 2, 1, 4096, 64), "rows": Case(2, 16, 2, 3, 4096, 128)
})  # fmt: skip
def test_the_same_call_gives_the_same_bits(version, case, device):
    """A merge that starts before all parts are there, or takes them in the order in which they came."""
    q, k, v = case.tensors("fp16", device)
    k, v = as_cache(version, k, v)
    first = call(version, q, k, v, return_lse=True, num_splits=splits_for(version, 60))
    for _ in range(1000):
        again = version.call(q, k, v, return_lse=True, num_splits=splits_for(version, 60))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@needs_gpu
@every_version
@pytest.mark.parametrize("generation", [False, True], ids=["any-key", "the-newest-key"])
def test_steps_in_a_row(version, generation, device):
    """A kernel that is launched before the one ahead of it has ended, and reads or writes too early: each step's query
    is the output of the step before, a key and its value are written in between; in generation that is the newest.
    """
    told = {"fresh_keys": 1} if generation and "fresh_keys" in version.takes else {}
    q, k, v = Case(8, 8, 8, seqlen_k=2048, head_dim=64, layout="bshd").tensors("fp16", device)
    k, v = as_cache(version, k, v)
    skip_unless_served(version, q, k, v, scale=1.0)

    def steps(after=lambda: None):
        keys, values, x, outs = k.clone(), v.clone(), q, []
        for n in range(24):
            at = slice(2047, 2048) if generation else slice(n, n + 1)
            keys[:, :, at].copy_(x)  # the query's own: it weighs most by far
            values[:, :, at].copy_(x.flip(3))
            x = version.call(x, keys, values, scale=1.0, **told)
            after()
            outs.append(x)
        return torch.stack(outs)

    apart = steps(torch.cuda.synchronize)
    assert apart.isfinite().all()
    for _ in range(20):
        assert torch.equal(steps(), apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = steps()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(together, apart)


@gluon.jit
def append_late(K, V, new_k, new_v, stride, D: gl.constexpr):
    """Lets the next kernel start, and writes the last key of each head 3 ms later."""
    let_next_kernel_start()
    began, now = clock(), clock()
    while now < began + 3_000_000:
        now = clock()
    at = gl.arange(0, D, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(K + gl.program_id(0) * stride + at, gl.load(new_k + gl.program_id(0) * D + at))
    gl.store(V + gl.program_id(0) * stride + at, gl.load(new_v + gl.program_id(0) * D + at))


@gluon.jit
def clock():
    return gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], gl.int64, is_pure=False, pack=1)


@needs_gpu
@every_version
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen_k", [128, 129, 2000])
def test_fresh_keys(version, seqlen_k, head_dim, device):
    """They are waited for: until then the newest is NaN. (That no other key is, tests/test_gluon_decoding.py sees.)"""
    if "fresh_keys" not in version.takes:
        pytest.skip("waits for all keys")
    case = Case(1, 16, 4, seqlen_k=seqlen_k, head_dim=head_dim, layout="bhsd")
    q, k, v = case.tensors("fp16", device)
    wanted = q, *(x.half() for x in as_cache(version, k, v))
    k, v = as_cache(version, k, v)
    new = [x[:, :, -1].clone() for x in (k, v)]

    def step(fresh_keys):
        for x in (k, v):
            x.view(torch.uint8)[:, :, -1] = 0x7F  # NaN in float8 and in float16
        torch.cuda.synchronize()
        heads = [x.view(torch.uint8)[0, :, -1] for x in (k, v)], [x.view(torch.uint8)[0] for x in new]
        width = heads[0][0].shape[-1]
        append_late[(4,)](*heads[0], *heads[1], heads[0][0].stride(0), D=width)
        return version.call(q, k, v, fresh_keys=fresh_keys)

    step(1)  # compiles
    assert_close(step(1), *wanted, "fp16")
    assert_close(step(None), *wanted, "fp16")
    assert_close(step(seqlen_k + 7), *wanted, "fp16")


@needs_gpu
@every_version
def test_replays_with_other_lengths(version, device):
    """Captured steps follow lengths that change in place, and do not share counters when they run side by side."""
    case = Case(2, 8, 2, seqlen_k=1000, head_dim=64)
    q, k, v = case.tensors("fp16", device)
    k, v = as_cache(version, k, v)
    lengths = torch.tensor([1000, 1000], dtype=torch.int32, device=device)
    version.call(q, k, v, seqlens_k=lengths, num_splits=splits_for(version, 9))
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    outs = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(version.call(q, k, v, seqlens_k=lengths, num_splits=splits_for(version, 9)))
    streams = [torch.cuda.Stream() for _ in graphs]
    for given in ((1000, 1), (0, 999), (17, 512)):
        lengths.copy_(torch.tensor(given, dtype=torch.int32))
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for out in outs:
            assert_close(out, q, k.half(), v.half(), "fp16", seqlens_k=lengths)


@every_dtype
@pytest.mark.parametrize("layout", ["padded", "sliced", "bhsd"])
@pytest.mark.parametrize("head_dim", [59, 56])
def test_out(version, dtype, layout, head_dim, device):
    """A preallocated output is filled whole, returned itself, and nothing beside it is written."""
    case = Case(3, 4, 2, seqlen_k=70, head_dim=head_dim, lengths_k=(70, 0, 1), layout=layout)
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
    q, k, v = Case(2, 2, 1, seqlen_k=130).tensors("fp16", device)
    out, lse = call(version, q, k, v, return_lse=True)
    alone = call(version, q, k, v)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)
    assert_lse_close(lse, attention_oracle(q, k, v, return_lse=True)[1])


@all_versions("decoding", runs=False)
def test_grid_axes(version, launches):
    """65 536 heads and more: only the first axis of a grid is longer than 65 535."""
    q = torch.empty(700, 100, 1, 16, dtype=torch.float16, device="meta")
    cache = torch.empty(700, 100, 300, 16, dtype=torch.float16, device="meta")
    (cache,) = as_cache(version, cache)
    with pretend(KNOWN["sm_90"]):
        skip_unless_served(version, q, cache, cache)
        version.call(q, cache, cache, return_lse=True, num_splits=splits_for(version, 4))
        version.call(q[:1, :1], cache[:1, :1], cache[:1, :1], num_splits=splits_for(version, 65535))
    assert launches and all(max(grid[1:], default=1) <= 65535 for grid in launches), launches


@needs_gpu
@every_version
def test_many_heads(version, device):
    """The same, run: batch * heads above 65 535."""
    check(version, Case(700, 100, 100, seqlen_k=5, head_dim=16, layout="bhsd"), "fp16", device)


STRIDES = {
    "sequence": (2**31 + 64, 40 * 16, 16, 1),
    "head": (40 * 16, 2**31 + 64, 16, 1),
    "key": (16, 32, 2**26, 1),
}


@every_version
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
@table("strides", STRIDES)
def test_offsets_beyond_int32(version, which, strides, device, in_place):
    """Offsets that wrap at 2^31 elements, in each tensor and by each stride."""
    batch, heads = (2, 1) if strides[0] >= 2**31 else (1, 2)
    tensors = dict(zip("qkv", Case(batch, heads, heads, 1, 40, 16, layout="bhsd").tensors("fp16", device), strict=True))
    rows = 1 if which in ("q", "out") else 40
    far = huge((batch, heads, rows, 16), strides, torch.float16, device)
    if which != "out":
        far.copy_(tensors[which])
        tensors[which] = far
    out = call(version, **tensors, num_splits=splits_for(version, 2), **({"out": far} if which == "out" else {}))
    assert_close(out, **tensors, dtype="fp16")


@needs_gpu
@every_version
def test_128k_keys(version, device):
    """The length that a model is trained for, and other lengths beside it, in one batch."""
    case = Case(3, 8, 2, seqlen_k=131072, head_dim=128, lengths_k=(131072, 1, 131071), layout="bshd")
    check(version, case, "fp16", device, limit=FINEST["fp16"])


# ---- the entry point


PLAIN = Case(2, 4, 2, seqlen_k=48, head_dim=64)
CHOSEN = {  # for a case and further arguments on an H200: what is chosen of v1 to v11
    "plain": (PLAIN, {}, "v10"),
    "bf16": (PLAIN, {"dtype": "bf16"}, "v10"),
    "16-queries": (vary(PLAIN, seqlen_q=16), {"return_lse": True}, "v10"),
    "D8": (vary(PLAIN, head_dim=8), {}, "v10"),
    "ragged": (PLAIN, {"seqlens_k": [2], "starts": [2], "window": (9, 0)}, "v10"),
    "fresh-keys": (PLAIN, {"fresh_keys": 1}, "v10"),
    "fp32": (PLAIN, {"dtype": "fp32"}, "v5"),
    "fp32-fresh-keys": (PLAIN, {"dtype": "fp32", "fresh_keys": 1}, "v5"),
    "splits": (PLAIN, {"num_splits": 3}, "v5"),
    "deterministic": (PLAIN, {"deterministic": True}, "v5"),
    "D59": (vary(PLAIN, head_dim=59), {}, "v5"),
    "no-strides-for-TMA": (vary(PLAIN, layout="sliced"), {}, "v5"),
    "no-keys": (vary(PLAIN, seqlen_k=0), {}, "v5"),
    "pages-of-16": (vary(PLAIN, seqlen_k=16), {"seqlens_k": [2], "block_table": [2, 4]}, "v10"),
    "pages-of-4": (vary(PLAIN, seqlen_k=4), {"seqlens_k": [2], "block_table": [2, 4]}, "v5"),
    "new-keys": (PLAIN, {"k_new": (2, 2, 1, 64), "v_new": (2, 2, 1, 64)}, "v5"),
    "many-lengths": (vary(PLAIN, batch=5000, seqlen_k=1), {"seqlens_k": [5000]}, "v5"),
    "float8": (PLAIN, {"cache": "e4m3"}, "v11"),
    "float8-bf16": (PLAIN, {"cache": "e5m2", "dtype": "bf16"}, "v11"),
    "float8-heads": (PLAIN, {"cache": "e4m3", "descale_k": (2, 2), "descale_v": (2, 2)}, "v11"),
    "float8-pages": (vary(PLAIN, seqlen_k=8), {"cache": "e4m3", "block_table": [2, 4], "descale_k": (2, 2)}, "v11"),
    "float8-ragged": (vary(PLAIN, seqlen_q=4), {"cache": "e4m3", "seqlens_k": [2], "starts": [2]}, "v11"),
    "float8-blocks": (PLAIN, {"cache": "e4m3", "descale_k": (2, 2, 3), "descale_v": (2, 2, 3)}, "v5"),
    "float8-D8": (vary(PLAIN, head_dim=8), {"cache": "e4m3"}, "v5"),
    "float8-strides": (vary(PLAIN, layout="sliced"), {"cache": "e4m3"}, "v5"),
    "float8-splits": (PLAIN, {"cache": "e4m3", "num_splits": 3}, "v5"),
    "float8-new-keys": (PLAIN, {"cache": "e4m3", "k_new": (2, 2, 1, 64), "v_new": (2, 2, 1, 64)}, "v5"),
}


@table("case, arguments, chosen", CHOSEN)
def test_the_newest_that_serves_the_call(case, arguments, chosen, monkeypatch):
    """The newest for what it serves; what it declines, a version before it gets."""
    upto = [version for version in versions_of("decoding") if version.number <= 11]
    named = tuple(dataclasses.replace(v, call=lambda *args, name=v.name, **kwargs: name) for v in upto)
    monkeypatch.setattr(decoding, "versions_of", lambda family: named)
    arguments = dict(arguments)
    tensors = case.tensors(arguments.pop("dtype", "fp16"), torch.device("cpu"))
    of_cache = FP8.get(arguments.pop("cache", None), tensors[0].dtype)
    dtypes = tensors[0].dtype, of_cache, of_cache
    tensors = [
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    for name, shape in arguments.items():
        if isinstance(shape, list):
            arguments[name] = torch.empty(shape, dtype=torch.int32, device="meta")
        elif name.endswith("_new"):
            arguments[name] = torch.empty(shape, dtype=of_cache, device="meta")
        elif name.startswith("descale_"):
            arguments[name] = torch.empty(shape, device="meta")
    with pretend(KNOWN["sm_90"]):
        assert decoding.flash_decoding(*tensors, **arguments) == chosen
    with pretend(KNOWN["sm_80"]):
        assert decoding.flash_decoding(*tensors, **arguments) == "v5"


def test_entry_point(device):
    """Runs the newest version, or the one that `version` names."""
    q, k, v = Case(2, 4, 2, seqlen_k=75, lengths_k=(75, 20), layout="bshd").tensors("fp16", device)
    lengths = torch.tensor([75, 20], dtype=torch.int32, device=device)
    for version in (None, "v1"):
        out, lse = decoding.flash_decoding(
            q, k, v, seqlens_k=lengths, num_splits=2, return_lse=True, version=version
        )  # fmt: skip
        assert_close(out, q, k, v, "fp16", lse=lse, seqlens_k=lengths)


def test_the_call_of_the_seed(device):
    """q [B, H, 1, D], as a reader of the first description would write it."""
    from decoding.flash_decoding_v1 import call_flash_decoding

    q, k, v = Case(2, 4, 4, seqlen_k=100, head_dim=64, layout="bhsd").tensors("fp16", device)
    assert_close(call_flash_decoding(q, k, v), q, k, v, "fp16")
