"""The contract of decoding over real caches: pages, first keys, windows, new keys. Versions without them say so."""

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
    guarded_memory,
    huge,
    needs_gpu,
    skip_unless_served,
    small_tiles,
    table,
    tensor_bytes,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

import decoding
from common.lineage import CACHE_ARGUMENTS, find_version, versions_of
from common.reference import attention_oracle

every_version = all_versions("decoding")
every_dtype = all_versions_and_dtypes("decoding", *HALF_AND_FULL)
PAGE_SIZES = (1, 16, 64, 256)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def paged(k, v, lengths, page_size, *, shared=0, spare=2, seed=0, unused=-1):
    """k and v [B, H, S, D] in pages [pages, H, page_size, D], stored [pages, page_size, H, D], and their block table.

    Pages lie in a drawn order, `spare` of them in nobody's use; every row that is no key is NaN, table entries past a
    sequence's pages are `unused`. The first `shared` pages of all sequences are those of the first, which they equal.
    """
    batch, heads, seqlen, head_dim = k.shape
    most = -(-seqlen // page_size)
    order = torch.randperm(batch * most + spare, generator=torch.Generator().manual_seed(seed)).tolist()
    caches = [torch.full((len(order), page_size, heads, head_dim), math.nan, dtype=k.dtype) for _ in range(2)]
    block_table = torch.full((batch, most + 1), unused, dtype=torch.int32)
    for b in range(batch):
        for i in range(-(-lengths[b] // page_size)):
            page = order[(0 if i < shared else b) * most + i]
            block_table[b, i] = page
            keys = slice(i * page_size, min((i + 1) * page_size, lengths[b]))
            for cache, x in zip(caches, (k, v), strict=True):
                cache[page, : keys.stop - keys.start] = x[b, :, keys].transpose(0, 1)
    return *(cache.transpose(1, 2).to(k.device) for cache in caches), block_table.to(k.device)


def both(version, q, k, v, lengths, page_size, device, *, splits=3, dtype="fp16", tiles=None, **options):
    """Attention over the contiguous cache and over its pages, the same bits; checked against the oracle."""
    tiles = tiles or small_tiles(version)
    seqlens_k = ints(lengths, device)
    k_pages, v_pages, block_table = paged(k, v, lengths, page_size, shared=options.pop("shared", 0))
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


@every_dtype
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages(version, dtype, page_size, device):
    """Pages anywhere, the last one not full, none at all; NaN in all others and past the lengths; entries of -1."""
    lengths = lengths_around(page_size)
    q, k, v = Case(5, 4, 2, 1, page_size + 1, 24).tensors(dtype, device)
    both(version, q, k, v, lengths, page_size, device, dtype=dtype)


@every_version
@pytest.mark.parametrize("page_size", [2, 4, 8, 32, 128])
def test_other_pages_in_own_tiles(version, page_size, device):
    """The other powers of two, the version's own tiles, several blocks of keys."""
    q, k, v = Case(2, 4, 2, 1, 300, 64).tensors("bf16", device)
    lengths = ints((300, 129), device)
    k_pages, v_pages, block_table = paged(k, v, (300, 129), page_size)
    out = call(version, q, k_pages, v_pages, "bf16", block_table=block_table, seqlens_k=lengths)
    assert_close(out, q, k, v, "bf16", seqlens_k=lengths)


GROUPS = {"1": (2, 2, 1), "mqa-64": (64, 1, 1), "3-x-3-queries": (6, 2, 3), "5-x-16-queries": (5, 1, 16)}


@every_dtype
@table("heads_q, heads_kv, seqlen_q", GROUPS)
def test_groups(version, dtype, heads_q, heads_kv, seqlen_q, device):
    """One row and several, several tiles of rows; a window, for each query its own."""
    q, k, v = Case(3, heads_q, heads_kv, seqlen_q, 75, 32).tensors(dtype, device)
    for window in (None, (20, 0), (0, None)):
        both(version, q, k, v, (75, 2, 40), 16, device, dtype=dtype, window=window)


@every_version
@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_shared_pages(version, splits, device):
    """A prefix that several sequences have in common lies in the cache once."""
    q, k, v = Case(3, 2, 2, 1, 75, 32).tensors("fp16", device)
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
    q, k, v = Case(5, 4, 2, seqlen_q, 75, 32).tensors("fp16", device)
    seqlens_k, starts = ints(lengths, device), ints(first, device)
    wanted = []
    for b, (start, end) in enumerate(zip(first, lengths, strict=True)):
        here = (x[b : b + 1, :, start:end] for x in (k, v))
        wanted.append(attention_oracle(q[b : b + 1], *here, is_causal=True, return_lse=True))
        k[b, :, :start] = v[b, :, :start] = k[b, :, end:] = v[b, :, end:] = math.nan
    arguments = dict(seqlens_k=seqlens_k, starts=starts, num_splits=3, return_lse=True, tiles=small_tiles(version))
    if page_size is None:
        out, lse = call(version, q, k, v, **arguments)
    else:
        k, v, block_table = paged(k, v, lengths, page_size)
        for b, start in enumerate(first):
            block_table[b, : start // page_size] = -1
        out, lse = call(version, q, k, v, block_table=block_table, **arguments)
    assert (out.double() - torch.cat([o for o, _ in wanted])).abs().max() < 4e-3
    assert_lse_close(lse, torch.cat([x for _, x in wanted]))


@every_version
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_window(version, seqlen_q, device):
    """The left bound, inclusive; what no query sees is neither read nor counted, and may be NaN or have no page."""
    lengths = (75, 3, 0, 30)
    q, k, v = Case(4, 4, 2, seqlen_q, 75, 32).tensors("fp16", device)
    seqlens_k = ints(lengths, device)
    for left in (0, 1, 17, 74, 500):
        options = dict(seqlens_k=seqlens_k, window=(left, 0))
        wanted, wanted_lse = attention_oracle(q, k, v, is_causal=True, return_lse=True, **options)
        k_now, v_now = k.clone(), v.clone()
        for b, length in enumerate(lengths):
            gone = max(0, length - seqlen_q - left)
            k_now[b, :, :gone] = v_now[b, :, :gone] = math.nan
        k_pages, v_pages, block_table = paged(k_now, v_now, lengths, 8)
        for b, length in enumerate(lengths):
            block_table[b, : max(0, length - seqlen_q - left) // 8] = 10**6
        options |= dict(num_splits=3, tiles=small_tiles(version), return_lse=True)
        out, lse = call(version, q, k_pages, v_pages, block_table=block_table, **options)
        flat, _ = call(version, q, k_now, v_now, **options)
        assert torch.equal(out, flat) and out.isfinite().all()
        assert (out.double() - wanted).abs().max() < 4e-3
        assert_lse_close(lse, wanted_lse)


@every_version
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("heads_q, heads_kv, seqlen_q", [(2, 2, 1), (2, 1, 3), (5, 1, 16)])
def test_append(version, page_size, heads_q, heads_kv, seqlen_q, device):
    """Append and attend is attend over the appended cache, to the bit; the cache then holds the new keys, and nothing
    else of it has changed. Sequences shorter than the queries; keys at the seam of two splits and of two pages.
    """
    lengths = (75, 33, 17, 2, 0, 16)
    case = Case(6, heads_q, heads_kv, seqlen_q, 75, 24, layout="bshd")
    q, k, v = case.tensors("fp16", device)
    for starts in (None, ints((0, 33, 3, 2, 0, 16), device)):
        caches, new = [], []
        for x in (k, v):
            x, fresh = x.clone(), torch.full((6, heads_kv, seqlen_q, 24), math.nan, dtype=x.dtype, device=device)
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
        for splits in (1, 5):
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
    """Eight steps of generation that begin with nothing: each writes its key, the last sees all."""
    q, k, v = Case(2, 4, 2, 8, 8, 16).tensors("fp32", device)
    k_pages, v_pages, block_table = paged(k, v, (8, 8), 4)
    k_pages.fill_(math.nan), v_pages.fill_(math.nan)
    for n in range(8):
        now = slice(n, n + 1)
        options = dict(block_table=block_table, seqlens_k=ints((n + 1, n + 1), device), k_new=k[:, :, now])
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
    q, k, v = Case(2, 4, 2, 1, 75, 24).tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (75, 75), 16)
    options = dict(seqlens_k=ints((75, 75), device), num_splits=3, tiles=small_tiles(version))
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
    options = dict(block_table=block_table, seqlens_k=ints((32,), device), num_splits=2, tiles=small_tiles(version))
    skip_unless_served(version, q, far, v_pages, **options)
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
    out, lse = call(version, q, k, k, block_table=block_table, seqlens_k=lengths, return_lse=True, num_splits=2)
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


@needs_gpu
@every_version
def test_replays_with_other_tables(version, device):
    """A captured step follows lengths and a table that change in place, and writes where they say."""
    q, k, v = Case(2, 8, 2, 1, 512, 64).tensors("fp16", device)
    k_pages, v_pages, block_table = paged(k, v, (512, 512), 16)
    now, lengths = block_table.clone(), ints((512, 512), device)
    new = {"k_new": torch.empty_like(k[:, :, :1]), "v_new": torch.empty_like(v[:, :, :1])}
    skip_unless_served(version, q, k_pages, v_pages, block_table=now, seqlens_k=lengths, **new)
    for name, x in zip(new, (k, v), strict=True):
        new[name].copy_(x[:, :, 511:])
    step = dict(block_table=now, seqlens_k=lengths, num_splits=5) | new
    version.call(q, k_pages, v_pages, **step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = version.call(q, k_pages, v_pages, **step)
    for given_lengths in ((512, 17), (1, 333)):
        lengths.copy_(ints(given_lengths, device))
        now.copy_(block_table)
        for b, length in enumerate(given_lengths):
            now[b, -(-length // 16) :] = -1
            for name, x in zip(new, (k, v), strict=True):
                new[name][b] = x[b, :, length - 1 : length]
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, q, k, v, "fp16", seqlens_k=lengths)


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
    q = torch.empty(1, 1, 1, 16)
    for version in versions_of("decoding")[:3]:
        for name in CACHE_ARGUMENTS:
            assert version.why_not_call(q, q, q, **{name: q}) == f"takes no {name}"
            assert version.why_not_call(q, q, q, **{name: None}) is None
    assert find_version("decoding", "v4").why_not_call(q, q, q, **dict.fromkeys(CACHE_ARGUMENTS, q)) is None
