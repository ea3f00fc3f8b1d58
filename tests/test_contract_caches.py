"""The contract of decoding over real caches: pages, first keys, windows, new keys. Versions without them say so."""

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
    guarded_memory,
    huge,
    ints,
    needs_gpu,
    oracle_between,
    paged,
    relative_error,
    skip_unless_served,
    small_tiles,
    splits_for,
    table,
    tensor_bytes,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

import decoding
from common.lineage import CACHE_ARGUMENTS, find_version, versions_of
from common.merge import merge
from common.reference import attention_oracle

every_version = all_versions("decoding")
every_dtype = all_versions_and_dtypes("decoding", *HALF_AND_FULL)
PAGE_SIZES = (1, 16, 64, 256)


def both(version, q, k, v, lengths, page_size, device, *, splits=3, dtype="fp16", tiles=None, **options):
    """Attention over the contiguous cache and over its pages, the same bits; checked against the oracle."""
    tiles = tiles or small_tiles(version)
    seqlens_k = ints(lengths, device)
    skip_unless_served(version, q, k, v, block_table=seqlens_k)  # before the work of making pages
    k_pages, v_pages, block_table = paged(k, v, lengths, page_size, shared=options.pop("shared", 0))
    splits = splits_for(version, splits)
    arguments = dict(seqlens_k=seqlens_k, num_splits=splits, tiles=tiles, return_lse=True) | options
    out, lse = call(version, q, k_pages, v_pages, dtype, block_table=block_table, **arguments)
    flat, flat_lse = call(version, q, k, v, dtype, **arguments)
    assert torch.equal(out, flat) and torch.equal(lse, flat_lse)
    masks = {"window": options.get("window"), "is_causal": True}
    if options.get("starts") is None:
        assert_close(out, q, k, v, dtype, lse=lse, seqlens_k=seqlens_k, **masks)
    return out, lse


def lengths_around(page_size):
    return (0, 1, page_size - 1, page_size, page_size + 1)


@all_versions_and_dtypes("decoding", "fp32", "bf16")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages(version, dtype, page_size, device):
    """Pages anywhere, the last one not full, none at all; NaN in all others and past the lengths; entries of -1."""
    lengths = lengths_around(page_size)
    q, k, v = Case(5, 4, 2, 1, page_size + 1, 24).tensors(dtype, device)
    both(version, q, k, v, lengths, page_size, device, dtype=dtype)


# query heads, KV heads, head dimension, page size: ratios of 1 to 64, what a model has and what no tile has
RATIOS = [(2, 2, 64, 2), (4, 2, 80, 4), (3, 1, 128, 8), (8, 2, 256, 32), (8, 1, 128, 128), (16, 1, 80, 2),
          (17, 1, 64, 16), (32, 1, 256, 64), (64, 1, 128, 8), (64, 1, 80, 256)]  # fmt: skip


@every_version
@pytest.mark.parametrize("heads_q, heads_kv, head_dim, page_size", RATIOS)
def test_own_tiles(version, heads_q, heads_kv, head_dim, page_size, device):
    """The version's own tiles and number of splits, several blocks of keys, every other size of pages."""
    q, k, v = Case(2, heads_q, heads_kv, 1, 200, head_dim).tensors("bf16", device)
    lengths = ints((200, 129), device)
    k_pages, v_pages, block_table = paged(k, v, (200, 129), page_size)
    out = call(version, q, k_pages, v_pages, "bf16", block_table=block_table, seqlens_k=lengths)
    assert_close(out, q, k, v, "bf16", seqlens_k=lengths)


GROUPS = {"1": (2, 2, 1), "mqa-64": (64, 1, 1), "3-x-3-queries": (3, 1, 3), "5-x-16-queries": (5, 1, 16)}


@every_dtype
@table("heads_q, heads_kv, seqlen_q", GROUPS)
def test_groups(version, dtype, heads_q, heads_kv, seqlen_q, device):
    """One row and several, several tiles of rows; a window, for each query its own."""
    q, k, v = Case(2, heads_q, heads_kv, seqlen_q, 60, 32).tensors(dtype, device)
    both(version, q, k, v, (60, 2), 16, device, dtype=dtype, splits=2, window=(20, None))


@every_version
@pytest.mark.parametrize("splits", [1, 2, 13])
def test_shared_pages(version, splits, device):
    """A prefix that several sequences have in common lies in the cache once. No split has all keys, or each has few."""
    q, k, v = Case(3, 2, 1, 1, 75, 32).tensors("fp16", device)
    k[1:, :, :32], v[1:, :, :32] = k[:1, :, :32], v[:1, :, :32]
    both(version, q, k, v, (75, 40, 32), 16, device, splits=splits, shared=2)


@every_version
@pytest.mark.parametrize("order", ["page-first", "head-first", "interleaved"])
def test_layouts_of_pages(version, order, device):
    """Strides assumed: heads before or after the rows of a page, K and V side by side."""
    q, k, v = Case(2, 4, 2, 1, 75, 40).tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (75, 20), 8)
    if order == "head-first":
        k_pages, v_pages = k_pages.contiguous(), v_pages.contiguous()
    if order == "interleaved":
        k_pages, v_pages = torch.stack([k_pages, v_pages], 1).unbind(1)
    lengths = ints((75, 20), device)
    wide = torch.stack([block_table, torch.full_like(block_table, -7)], 2)[:, :, 0]  # entries that are not neighbours
    out = call(version, q, k_pages, v_pages, block_table=wide, seqlens_k=lengths, tiles=small_tiles(version))
    assert_close(out, q, k, v, "fp16", seqlens_k=lengths)


@every_version
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("page_size", [None, 8])
def test_starts(version, seqlen_q, page_size, device):
    """Left padding: what is before a sequence's first key is NaN, pages before it do not exist. Starts at the end."""
    lengths, first = (75, 75, 40, 9, 0), (0, 33, 39, 9, 0)
    q, k, v = Case(5, 2, 1, seqlen_q, 75, 32).tensors("fp16", device)
    seqlens_k, starts = ints(lengths, device), ints(first, device)
    wanted, wanted_lse = oracle_between(q, k, v, first, lengths)
    for b, (start, end) in enumerate(zip(first, lengths, strict=True)):
        k[b, :, :start] = v[b, :, :start] = k[b, :, end:] = v[b, :, end:] = math.nan
    splits, tiles = splits_for(version, 3), small_tiles(version)
    arguments = dict(seqlens_k=seqlens_k, starts=starts, num_splits=splits, return_lse=True, tiles=tiles)
    if page_size is None:
        out, lse = call(version, q, k, v, **arguments)
    else:
        k, v, block_table = paged(k, v, lengths, page_size)
        for b, start in enumerate(first):
            block_table[b, : start // page_size] = -1
        out, lse = call(version, q, k, v, block_table=block_table, **arguments)
    assert (out.double() - wanted).abs().max() < 4e-3
    assert_lse_close(lse, wanted_lse)


@every_version
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_window(version, seqlen_q, device):
    """The left bound, inclusive; what no query sees is neither read nor counted, and may be NaN or have no page."""
    lengths = (75, 3, 0)
    q, k, v = Case(3, 2, 1, seqlen_q, 75, 32).tensors("fp16", device)
    seqlens_k = ints(lengths, device)
    for left in (0, 17, 74, 500):
        options = dict(seqlens_k=seqlens_k, window=(left, 0))
        wanted, wanted_lse = attention_oracle(q, k, v, is_causal=True, return_lse=True, **options)
        k_now, v_now = k.clone(), v.clone()
        for b, length in enumerate(lengths):
            gone = max(0, length - seqlen_q - left)
            k_now[b, :, :gone] = v_now[b, :, :gone] = math.nan
        k_pages, v_pages, block_table = paged(k_now, v_now, lengths, 8)
        for b, length in enumerate(lengths):
            block_table[b, : max(0, length - seqlen_q - left) // 8] = 10**6
        options |= dict(num_splits=splits_for(version, 2), tiles=small_tiles(version), return_lse=True)
        out, lse = call(version, q, k_now, v_now, **options)
        if version.lacks(block_table=block_table) is None:
            in_pages, _ = call(version, q, k_pages, v_pages, block_table=block_table, **options)
            assert torch.equal(in_pages, out)
        assert out.isfinite().all()
        assert (out.double() - wanted).abs().max() < 4e-3
        assert_lse_close(lse, wanted_lse)


@every_version
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("heads_q, heads_kv, seqlen_q", [(2, 2, 1), (2, 1, 3), (5, 1, 16)])
def test_append(version, page_size, heads_q, heads_kv, seqlen_q, device):
    """Append and attend is attend over the appended cache, to the bit; the cache then holds the new keys, and nothing
    else of it has changed. Sequences shorter than the queries; keys at the seam of two splits and of two pages.
    """
    lengths = (41, 17, 16, 2, 0)  # of the 41 keys a split has 14, of the last 16 some are in each
    case = Case(5, heads_q, heads_kv, seqlen_q, 41, 24, layout="bshd")
    q, k, v = case.tensors("fp16", device)
    for starts, splits in ((None, 3), (ints((30, 3, 16, 1, 0), device), 2)):
        caches, new = [], []
        for x in (k, v):
            x, fresh = x.clone(), torch.full((5, heads_kv, seqlen_q, 24), math.nan, dtype=x.dtype, device=device)
            for b, length in enumerate(lengths):
                count = min(length, seqlen_q)
                fresh[b, :, seqlen_q - count :] = x[b, :, length - count : length]
            caches.append(x)
            new.append(fresh)
        block_table = None
        if page_size:
            *caches, block_table = paged(*caches, lengths, page_size)
        before = [x.clone() for x in caches]
        arguments = dict(seqlens_k=ints(lengths, device), starts=starts, block_table=block_table)
        options = arguments | dict(num_splits=splits, return_lse=True, tiles=small_tiles(version))
        skip_unless_served(version, q, *caches, k_new=new[0], v_new=new[1], **options)
        wanted, wanted_lse = call(version, q, *before, **options)
        for x in caches:
            for b, length in enumerate(lengths):
                for n in range(max(0, length - seqlen_q), length):
                    at = (b, n) if not page_size else (int(block_table[b, n // page_size]), n % page_size)
                    x[at[0], :, at[1]] = math.nan
        with guarded_memory():
            out, lse = version.call(q, *caches, k_new=new[0], v_new=new[1], **options)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
        for x, was in zip(caches, before, strict=True):
            assert torch.equal(tensor_bytes(x), tensor_bytes(was))


@every_version
def test_steps(version, device):
    """Six steps of generation that begin with nothing: each writes its key, the last sees all."""
    q, k, v = Case(1, 4, 2, 6, 6, 16).tensors("fp32", device)
    k_pages, v_pages, block_table = paged(k, v, (6,), 4)
    k_pages.fill_(math.nan), v_pages.fill_(math.nan)
    for n in range(6):
        now = slice(n, n + 1)
        options = dict(block_table=block_table, seqlens_k=ints((n + 1,), device), k_new=k[:, :, now])
        skip_unless_served(version, q[:, :, now], k_pages, v_pages, v_new=v[:, :, now], **options)
        out = version.call(q[:, :, now], k_pages, v_pages, v_new=v[:, :, now], **options)
        assert_close(out, q[:, :, now], k[:, :, : n + 1], v[:, :, : n + 1], "fp32")


@every_version
def test_touches_its_own_memory_alone(version, device, own_memory_alone):
    """Entries of the table that nobody needs are not followed, those behind its end not read."""
    q, k, v = Case(2, 4, 2, 1, 64, 24, layout="bshd").tensors("fp16", device)
    lengths = (64, 17)
    k_pages, v_pages, block_table = paged(k, v, lengths, 16, unused=10**9)
    block_table = block_table[:, :4].contiguous()
    new = {"k_new": k[:, :, :1].contiguous(), "v_new": v[:, :, :1].contiguous()}
    options = dict(block_table=block_table, seqlens_k=ints(lengths, device), num_splits=3, tiles=small_tiles(version))
    skip_unless_served(version, q, k_pages, v_pages, **options)
    version.call(q, k_pages, v_pages, **options, **new)
    version.call(q, k_pages, v_pages, **options, window=(20, 0), starts=ints((3, 16), device))


@every_version
@pytest.mark.parametrize("entry", [-1, 99, 2**31 - 1])
def test_a_page_that_is_none_is_said(version, entry, device, monkeypatch):
    """Where nobody looked at the table: NaN for its sequence, no other's, and nothing outside the cache is read."""
    from common.problem import AttentionProblem

    monkeypatch.setattr(AttentionProblem, "_check_pages", lambda self: None)
    q, k, v = Case(2, 2, 1, 1, 75, 24).tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (75, 75), 16)
    splits, tiles = splits_for(version, 2), small_tiles(version)
    options = dict(seqlens_k=ints((75, 75), device), num_splits=splits, tiles=tiles)
    good = call(version, q, k_pages, v_pages, block_table=block_table, **options)
    block_table[1, 2] = entry
    out, lse = call(version, q, k_pages, v_pages, block_table=block_table, return_lse=True, **options)
    assert torch.equal(out[0], good[0]) and out[1].isnan().all() and lse[1].isnan().all()


@every_version
@pytest.mark.parametrize("strides", [(2**31 + 64, 16, 32, 1), (40 * 16, 2**31 + 64, 16, 1)], ids=["page", "head"])
def test_offsets_beyond_int32(version, strides, device, in_place):
    """A page number times a stride, and a head's, pass 2^31; read and written."""
    q, k, v = Case(1, 2, 2, 1, 32, 16, layout="bhsd").tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (32,), 16, spare=0)
    far = huge((2, 2, 16, 16), strides, torch.float16, device)
    far.copy_(k_pages)
    new = {"k_new": k[:, :, 31:].clone(), "v_new": v[:, :, 31:].clone()}
    options = dict(block_table=block_table, seqlens_k=ints((32,), device), tiles=small_tiles(version))
    options |= dict(num_splits=splits_for(version, 2))
    skip_unless_served(version, q, far, v_pages, **options)
    if version.lacks(**new):
        new = {}
    else:
        far[int(block_table[0, 1]), :, 15] = math.nan
    assert_close(version.call(q, far, v_pages, **options, **new), q, k, v, "fp16")
    assert_close(version.call(q, v_pages, far, **options), q, v, k, "fp16")


ZERO_SIZE = {
    "no-sequences": lambda q, k, t, n: (q[:0], k, t[:0], n[:0]),
    "no-pages": lambda q, k, t, n: (q, k[:0], t, n * 0),
    "no-table": lambda q, k, t, n: (q, k, t[:, :0], n * 0),
}


@every_version
@table("less", ZERO_SIZE)
def test_zero_size(version, less, device):
    """Nothing to attend to is 0, and -inf."""
    q, k, v = Case(2, 4, 2, 1, 20, 16).tensors("fp16", device)
    k, v, block_table = paged(k, v, (20, 20), 4)
    q, k, block_table, lengths = less(q, k, block_table, ints((20, 20), device))
    options = dict(block_table=block_table, seqlens_k=lengths, return_lse=True, num_splits=splits_for(version, 2))
    out, lse = call(version, q, k, k, **options)
    assert out.shape == q.shape and not out.any() and (lse == -math.inf).all()


@st.composite
def ragged(draw):
    """(case, lengths, first keys, page size, window)"""
    batch, heads_kv, seqlen_q = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 5]))
    seqlen_k = draw(st.integers(1, 150))
    lengths = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch))
    starts = draw(st.one_of(st.none(), st.just([draw(st.integers(0, seqlen_k)) for _ in range(batch)])))
    heads_q, head_dim = heads_kv * draw(st.integers(1, 3)), draw(st.sampled_from([16, 40]))
    case = Case(batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim)
    window = draw(st.one_of(st.none(), st.tuples(st.integers(0, 80), st.just(0))))
    return case, lengths, starts, draw(st.sampled_from([1, 2, 8, 16, 64])), window


@every_version
@given(drawn=ragged(), seed=st.integers(0, 2**31), splits=st.integers(1, 6))
def test_pages_are_contiguous_caches_to_the_bit(version, drawn, seed, splits, device):
    """Where the keys lie changes nothing: paged equals contiguous for equal splits."""
    case, lengths, starts, page_size, window = drawn
    q, k, v = case.tensors("fp16", device, seed)
    starts = None if starts is None else ints(starts, device)
    both(version, q, k, v, lengths, page_size, device, splits=splits, starts=starts, window=window)


@every_version
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shards_merge_into_the_whole(version, shards, device):
    """A cache whose pages are held in several places, some of which have none of a sequence's keys: common.merge."""
    lengths, page_size = (130, 40), 16
    q, k, v = Case(2, 2, 1, 1, 130, 32).tensors("fp32", device)
    k_pages, v_pages, block_table = paged(k, v, lengths, page_size)
    each = -(-9 // shards)
    parts = []
    for i in range(shards):
        held = block_table[:, i * each : (i + 1) * each]
        here = [min(max(length - i * each * page_size, 0), held.shape[1] * page_size) for length in lengths]
        options = dict(block_table=held, seqlens_k=ints(here, device), return_lse=True)
        parts.append(call(version, q, k_pages, v_pages, "fp32", **options))
    out, lse = merge(*(torch.stack(part) for part in zip(*parts, strict=True)))
    assert_close(out, q, k, v, "fp32", limit=FINEST["fp32"], lse=lse, seqlens_k=ints(lengths, device))


@all_versions_and_dtypes("decoding", "fp32", "fp16")
@pytest.mark.parametrize("page_size", [None, 256])
def test_deterministic(version, dtype, page_size, device):
    """A sequence's bits do not depend on who is beside it, nor on how many keys its cache would hold."""
    lengths = (2300, 1024, 0, 1025)
    q, k, v = Case(4, 2, 1, 1, 2400, 16).tensors(dtype, device)
    x = dict(deterministic=True, return_lse=True)
    block_table, longest = None, 2400
    if page_size:
        k, v, block_table = paged(k, v, (2400,) * 4, page_size, unused=0)
        longest = block_table.shape[1] * page_size

    def some(chosen, lengths, capacity):
        """Of the chosen sequences, in a cache with room for so many keys each."""
        if page_size:
            caches, x["block_table"] = (k, v), block_table[chosen, : capacity // page_size]
        else:
            caches = [cache[chosen, :, :capacity] for cache in (k, v)]
        return call(version, q[chosen], *caches, dtype, seqlens_k=ints(lengths, device), **x)

    together = some(slice(None), lengths, longest)
    for b, length in enumerate(lengths):
        for capacity in {max(256, -(-length // 256) * 256), longest}:
            alone = some(slice(b, b + 1), (length,), min(capacity, longest))
            assert all(torch.equal(part, whole[b : b + 1]) for part, whole in zip(alone, together, strict=True))
    others = some(slice(None), (2300, 7, 2400, 1025), longest)
    for part, whole in zip(others, together, strict=True):
        assert torch.equal(part[[0, 3]], whole[[0, 3]]) and not torch.equal(part[1], whole[1])


# ---- what takes a GPU


@needs_gpu
@every_version
def test_replays_with_other_tables(version, device):
    """A captured step follows lengths, first keys and a table that change in place, and writes where they say."""
    q, k, v = Case(2, 8, 2, 1, 512, 64).tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (512, 512), 16)
    now, lengths, starts = block_table.clone(), ints((512, 512), device), ints((0, 0), device)
    new = {"k_new": torch.empty_like(k[:, :, :1]), "v_new": torch.empty_like(v[:, :, :1])}
    new = {} if version.lacks(**new) else new
    step = dict(block_table=now, seqlens_k=lengths, starts=starts, num_splits=splits_for(version, 5)) | new
    skip_unless_served(version, q, k_pages, v_pages, **step)
    for name, x in zip(new, (k, v), strict=False):
        new[name].copy_(x[:, :, 511:])
    version.call(q, k_pages, v_pages, **step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = version.call(q, k_pages, v_pages, **step)
    for given_lengths, first in (((512, 17), (0, 0)), ((1, 333), (0, 300)), ((480, 512), (479, 33))):
        lengths.copy_(ints(given_lengths, device))
        starts.copy_(ints(first, device))
        now.copy_(block_table.roll(1, 0) if first[1] == 33 else block_table)
        sequences = [1, 0] if first[1] == 33 else [0, 1]  # whose pages each row of the table has
        for b, length in enumerate(given_lengths):
            now[b, -(-length // 16) :] = now[b, : first[b] // 16] = -1
            for name, x in zip(new, (k, v), strict=False):
                new[name][b] = x[sequences[b], :, length - 1 : length]
        graph.replay()
        torch.cuda.synchronize()
        wanted, _ = oracle_between(q, k[sequences], v[sequences], first, given_lengths)
        assert relative_error(out, wanted) < FINEST["fp16"]


@needs_gpu
@every_version
@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_128k_keys(version, page_size, device):
    """The length that a model is trained for, and one less; the version's own tiles; to the bit in any batch."""
    q, k, v = Case(2, 8, 2, 1, 131072, 128, layout="bshd").tensors("fp16", device)
    lengths = ints((131072, 131071), device)
    order = torch.randperm(2 * 131072 // page_size, device=device).int()
    k_pages, v_pages = (torch.empty_like(x.transpose(1, 2)).view(-1, page_size, 2, 128) for x in (k, v))
    k_pages[order], v_pages[order] = (x.transpose(1, 2).view(-1, page_size, 2, 128) for x in (k, v))
    k_pages, v_pages, block_table = k_pages.transpose(1, 2), v_pages.transpose(1, 2), order.view(2, -1)
    options = dict(seqlens_k=lengths, return_lse=True)
    for splits in (None, 37):
        for x in (dict(k=k, v=v), dict(k=k_pages, v=v_pages, block_table=block_table)):
            out, lse = call(version, q, **x, **options, num_splits=splits_for(version, splits))
            assert_close(out, q, k, v, "fp16", limit=FINEST["fp16"], lse=lse, seqlens_k=lengths)
    options |= dict(deterministic=True)
    together = call(version, q, k_pages, v_pages, block_table=block_table, **options)
    options["seqlens_k"] = lengths[1:]
    alone = call(version, q[1:], k_pages, v_pages, block_table=block_table[1:], **options)
    flat = call(version, q[1:], k[1:], v[1:], **options)
    for one, other, whole in zip(alone, flat, together, strict=True):
        assert torch.equal(one, whole[1:]) and torch.equal(other, whole[1:])


@needs_gpu
@every_version
def test_more_elements_than_int32_counts(version, device):
    """2.7 billion elements of K and as many of V, contiguous, and in pages that are mixed up within each sequence."""
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB of GPU memory")
    torch.manual_seed(0)
    k, v = (torch.randn(5, 65536, 8, 128, dtype=torch.float16, device=device).transpose(1, 2) for _ in range(2))
    q = torch.randn(5, 16, 1, 128, dtype=torch.float16, device=device)
    wanted = attention_oracle(q, k, v)
    rows = torch.stack([torch.randperm(4096, device=device) + 4096 * b for b in range(5)])
    pages = [x.transpose(1, 2).view(-1, 16, 8, 128).transpose(1, 2) for x in (k, v)]
    for x in (dict(k=k, v=v), dict(k=pages[0], v=pages[1], block_table=rows.int())):
        if version.lacks(**x):
            continue
        skip_unless_served(version, q, **x)
        assert relative_error(version.call(q, **x), wanted) < FINEST["fp16"]


# ---- the entry point


def test_entry_point(device):
    """Picks a version that takes the arguments; one that does not, asked for by name, says what it lacks."""
    q, k, v = Case(2, 4, 2, 1, 40, 16).tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (40, 20), 16)
    options = dict(seqlens_k=ints((40, 20), device), block_table=block_table, window=(30, 0), check_table=True)
    out, lse = decoding.flash_decoding(q, k_pages, v_pages, return_lse=True, **options)
    masks = {"seqlens_k": options["seqlens_k"], "window": (30, 0), "is_causal": True}
    assert_close(out, q, k, v, "fp16", lse=lse, **masks)
    for name in ("v1", "v3"):
        with pytest.raises(ValueError, match=f"version: {name} takes no block_table, window; v4 does"):
            decoding.flash_decoding(q, k_pages, v_pages, version=name, **options)


def test_older_versions_decline():
    """By name, so that a benchmark can say why there is no number."""
    q, cache = (torch.empty(1, 1, n, 16, dtype=torch.float16) for n in (1, 16))  # of keys, or a page of them
    for version in versions_of("decoding"):
        (k,) = as_cache(version, cache)
        for name in CACHE_ARGUMENTS:
            assert (version.why_not_call(q, k, k, **{name: q}) == f"takes no {name}") == (name not in version.takes)
            assert version.why_not_call(q, k, k, **{name: None}) is None
    assert not any(name in find_version("decoding", "v3").takes for name in CACHE_ARGUMENTS)
    assert "block_table" in find_version("decoding", "v4").takes
