"""Properties that hold for all inputs, on shapes and masks that hypothesis draws. Tensors come from a drawn seed."""

import math

import pytest
import torch
from attention_checks import (
    FEW,
    FINEST,
    FLOOR,
    HALF_AND_FULL,
    Case,
    all_versions,
    assert_close,
    assert_lse_close,
    call,
    check,
    error_limit,
    finest_dtype,
    relative_error,
    small_tiles,
    store,
    vary,
)
from hypothesis import example, given
from hypothesis import strategies as st

from common.merge import merge
from common.reference import attention_oracle, eager_attention

prefill_versions = all_versions("prefill")
decoding_versions = all_versions("decoding")
seeds = st.integers(0, 2**31)
head_dims = st.sampled_from([1, 16, 40, 59, 64, 80])  # each is compiled anew on a GPU
sides = st.one_of(st.none(), st.integers(0, 70))


@st.composite
def prefill_cases(draw, batch=None):
    """Small calls: `batch` or at most 2 sequences, 4 heads, 70 rows and keys."""
    heads_kv, seqlen_q, seqlen_k = draw(st.integers(1, 2)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    batch = batch or draw(st.integers(1, 2))

    def lengths(longest):
        return draw(st.one_of(st.none(), st.tuples(*[st.integers(0, longest)] * batch)))

    return Case(
        batch, heads_kv * draw(st.integers(1, 2)), heads_kv, seqlen_q, seqlen_k, draw(head_dims),
        causal=draw(st.booleans()), window=draw(st.one_of(st.none(), st.tuples(sides, sides))),
        lengths_q=lengths(seqlen_q), lengths_k=lengths(seqlen_k),
        scale=draw(st.one_of(st.none(), st.floats(-0.5, 0.5))),
        layout=draw(st.sampled_from(["bhsd", "bshd", "padded", "sliced"])),
    )  # fmt: skip


@st.composite
def decoding_cases(draw):
    """Small steps: at most 2 sequences, 4 heads, 200 keys."""
    batch, heads_kv, seqlen_k = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 200))
    return Case(
        batch, heads_kv * draw(st.integers(1, 2)), heads_kv, 1, seqlen_k, draw(head_dims),
        lengths_k=draw(st.one_of(st.none(), st.tuples(*[st.integers(0, seqlen_k)] * batch))),
        layout=draw(st.sampled_from(["bhsd", "bshd", "padded", "sliced"])),
    )  # fmt: skip


# ---- prefill


@prefill_versions
@given(case=prefill_cases(), dtype=st.sampled_from(HALF_AND_FULL), seed=seeds)
def test_prefill_agrees_with_the_oracle(version, case, dtype, seed, device):
    """Whatever combination of shape, mask, lengths and layout nobody thought of."""
    check(version, case, dtype, device, tiles=small_tiles(version), seed=seed)


@prefill_versions
@given(
    case=prefill_cases(batch=1), seed=seeds,
    tiles=st.tuples(st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 32, 64])),
)  # fmt: skip
@example(case=Case(1, 1, 1, 70, 70, 64, causal=True), seed=0, tiles=(16, 64))
@example(case=Case(1, 1, 1, 70, 70, 64, causal=True), seed=0, tiles=(64, 16))
def test_prefill_does_not_depend_on_the_tiles(version, case, seed, tiles, device):
    """Block-size invariance: rescaling lost between blocks, bounds that only fit one block size."""
    dtype = finest_dtype(version)
    q, k, v = case.tensors(dtype, device, seed)
    options = case.options(device)
    own, own_lse = call(version, q, k, v, return_lse=True, **options)
    out, lse = call(version, q, k, v, return_lse=True, tiles=small_tiles(version, *tiles), **options)
    assert relative_error(out, own) <= FINEST[dtype]
    assert_lse_close(lse, own_lse.double())


@prefill_versions
@given(seed=seeds, seqlen=st.integers(2, 100), data=st.data(), dtype=st.sampled_from(HALF_AND_FULL))
def test_prefill_does_not_see_the_future(version, seed, seqlen, data, dtype, device):
    """Causal: other keys and values from some position on leave every earlier row as it was, to the bit."""
    q, k, v = Case(1, 2, 1, seqlen, seqlen, 32).tensors(dtype, device, seed)
    now = data.draw(st.integers(1, seqlen - 1))
    before = call(version, q, k, v, is_causal=True, tiles=small_tiles(version))
    other = Case(1, 2, 1, seqlen, seqlen, 32).tensors(dtype, device, seed + 1)
    k[:, :, now:], v[:, :, now:] = other[1][:, :, now:] * 9, other[2][:, :, now:] * 9
    after = call(version, q, k, v, is_causal=True, tiles=small_tiles(version))
    assert torch.equal(after[:, :, :now], before[:, :, :now])
    assert not torch.equal(after[:, :, now:], before[:, :, now:])


@prefill_versions
@given(seed=seeds, case=prefill_cases(batch=3), data=st.data())
def test_prefill_sequences_and_heads_are_independent(version, seed, case, data, device):
    """Sequences and heads in another order give the same outputs in that order, to the bit; alone too."""
    case = vary(case, heads_q=case.heads_kv)
    q, k, v = case.tensors("fp16", device, seed)
    options = case.options(device)
    out = call(version, q, k, v, **options)
    batch = torch.tensor(data.draw(st.permutations(range(3))), device=device)
    heads = torch.tensor(data.draw(st.permutations(range(case.heads_q))), device=device)
    moved = {name: x[batch] if name.startswith("seqlens") else x for name, x in options.items()}
    found = call(version, *(store(x[batch][:, heads], case.layout) for x in (q, k, v)), **moved)
    assert torch.equal(found, out[batch][:, heads])
    alone = {name: x[1:2] if name.startswith("seqlens") else x for name, x in options.items()}
    found = call(version, *(store(x[1:2], case.layout) for x in (q, k, v)), **alone)
    assert torch.equal(found, out[1:2])


@prefill_versions
@given(seed=seeds, case=prefill_cases(), cut=st.integers(0, 70))
def test_prefill_of_parts_merges_into_the_whole(version, seed, case, cut, device):
    """Two shards of the keys, each attended alone, merge by their LSEs: the natural logarithm, and no other."""
    case, cut = vary(case, causal=False, window=None, lengths_k=None), min(cut, case.seqlen_k)
    dtype = finest_dtype(version)
    q, k, v = case.tensors(dtype, device, seed)
    options = case.options(device)
    shards = [(k[:, :, :cut], v[:, :, :cut]), (k[:, :, cut:], v[:, :, cut:])]
    parts = [call(version, q, *shard, return_lse=True, **options) for shard in shards]
    out, lse = merge(*(torch.stack(part) for part in zip(*parts, strict=True)))
    assert_close(out, q, k, v, dtype, limit=FINEST[dtype], lse=lse, **options)


# ---- decoding


@decoding_versions
@given(case=decoding_cases(), dtype=st.sampled_from(HALF_AND_FULL), seed=seeds)
def test_decoding_agrees_with_the_oracle(version, case, dtype, seed, device):
    check(version, case, dtype, device, seed=seed)


@decoding_versions
@given(case=decoding_cases(), seed=seeds, splits=st.integers(1, 9), block=st.sampled_from([16, 32, 64, 128]))
@example(case=Case(1, 1, 1, 1, 130, 64), seed=0, splits=3, block=32)
def test_decoding_does_not_depend_on_the_splits(version, case, seed, splits, block, device):
    """Split-count and block-size invariance: keys lost or counted twice where one split ends and the next begins."""
    dtype = finest_dtype(version)
    q, k, v = case.tensors(dtype, device, seed)
    options = case.options(device) | {"return_lse": True}
    out, lse = call(version, q, k, v, num_splits=splits, tiles=small_tiles(version, block_n=block), **options)
    whole, whole_lse = call(version, q, k, v, num_splits=1, **options)
    assert relative_error(out, whole) <= FINEST[dtype]
    assert_lse_close(lse, whole_lse.double())


@decoding_versions
@given(case=decoding_cases(), seed=seeds, data=st.data())
def test_decoding_sequences_and_heads_are_independent(version, case, seed, data, device):
    """Sequences and heads in another order give the same outputs in that order, to the bit."""
    case = vary(case, heads_q=case.heads_kv)
    q, k, v = case.tensors("fp16", device, seed)
    options = case.options(device)
    out = call(version, q, k, v, num_splits=2, **options)
    batch = torch.tensor(data.draw(st.permutations(range(case.batch))), device=device)
    heads = torch.tensor(data.draw(st.permutations(range(case.heads_q))), device=device)
    moved = {name: x[batch] if name.startswith("seqlens") else x for name, x in options.items()}
    found = call(version, *(store(x[batch][:, heads], case.layout) for x in (q, k, v)), num_splits=2, **moved)
    assert torch.equal(found, out[batch][:, heads])


@decoding_versions
@given(case=decoding_cases(), seed=seeds)
def test_decoding_is_the_last_row_of_prefill(version, case, seed, device):
    """One step over a cache is the last row of causal attention over all of it."""
    case = vary(case, lengths_k=None)
    dtype = finest_dtype(version)
    q, k, v = case.tensors(dtype, device, seed)
    whole = attention_oracle(q.expand(-1, -1, case.seqlen_k, -1), k, v, is_causal=True)
    out = call(version, q, k, v)
    assert relative_error(out, whole[:, :, -1:]) <= error_limit(q, k, v, dtype)


# ---- the limit itself, for outputs of a few numbers


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("head_dim", [1, 4])
@pytest.mark.parametrize("keys", [3, 33])
def test_of_a_few_numbers_wrong_ones_are_refused(keys, head_dim, dtype):
    """What rounds its weights and its output passes, whatever cancels in them; what drops or repeats a key does not."""
    for seed in range(20):
        q, k, v = Case(1, 1, 1, 1, keys, head_dim).tensors(dtype, torch.device("cpu"), seed)
        weights = torch.softmax(q.double() @ k.double().mT / math.sqrt(head_dim), -1)
        assert_close((weights.to(q.dtype).double() @ v.double()).to(q.dtype), q, k, v, dtype)
        heaviest = int(weights.argmax())
        for count in (0, 2):
            kept = [n for n in range(keys) for _ in range(count if n == heaviest else 1)]
            wrong = attention_oracle(q, k[:, :, kept], v[:, :, kept]).to(q.dtype)
            with pytest.raises(AssertionError, match="relative error"):
                assert_close(wrong, q, k, v, dtype)


def test_the_limit_of_many_numbers_is_pytorchs_error():
    """As it was: what rounding may cost at most is no excuse where luck averages out."""
    for dtype in HALF_AND_FULL:
        q, k, v = Case(1, 1, 1, 1, 155, FEW).tensors(dtype, torch.device("cpu"))
        error = relative_error(eager_attention(q, k, v), attention_oracle(q, k, v))
        assert error_limit(q, k, v, dtype) == max(2 * error, FLOOR[dtype])
