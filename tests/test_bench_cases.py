"""FLOPs and bytes against counting one pair at a time; presets and what the flags make of them."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cases import (
    DECODING_SHAPES,
    DTYPES,
    FP8,
    ITEMSIZE,
    PRESETS,
    Case,
    cases_for,
    parse_size,
    ragged_lengths,
    short,
)


@st.composite
def small_cases(draw):
    batch, group, heads_kv = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seqlen_q, seqlen_k = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    side = st.none() | st.integers(0, 10)
    lengths = draw(st.none() | st.tuples(*[st.integers(0, seqlen_k)] * batch))
    return Case(
        draw(st.sampled_from(tuple(PRESETS))), draw(st.sampled_from(DTYPES)), batch, heads_kv * group, heads_kv,
        seqlen_q, seqlen_k, draw(st.integers(1, 8)), draw(st.booleans()), draw(st.none() | st.tuples(side, side)),
        lengths,
    )  # fmt: skip


def sees(case: Case, row: int, key: int, len_k: int) -> bool:
    """The contract, one pair at a time: bottom-right alignment on the true lengths, inclusive window."""
    distance = key - (row + len_k - case.seqlen_q)
    left, right = case.window or (None, None)
    if case.causal and distance > 0:
        return False
    return key < len_k and (left is None or distance >= -left) and (case.causal or right is None or distance <= right)


@given(small_cases())
@settings(deadline=None, max_examples=300)
def test_flops_and_bytes_are_what_counting_gives(case):
    pairs = keys = 0
    for len_k in case.lengths or (case.seqlen_k,) * case.batch:
        seen = [
            (i, j) for i, j in itertools.product(range(case.seqlen_q), range(case.seqlen_k)) if sees(case, i, j, len_k)
        ]
        pairs += len(seen)
        keys += len({key for _, key in seen})
    assert case.flops() == 4 * case.heads_q * case.head_dim * pairs
    rows = case.batch * case.heads_q * case.seqlen_q
    size = ITEMSIZE[case.dtype]
    out_size = 2 if size == 1 else size
    size_q = out_size if case.family == "decoding" else size  # of FP8 caches alone the caches are FP8
    assert case.bytes() == case.head_dim * (rows * (size_q + out_size) + 2 * case.heads_kv * keys * size)


def test_a_known_decoding_step():
    """268 MB of keys and values: 16 heads of 64, 65536 positions, 2 bytes, twice."""
    case = Case("decoding", "fp16", 1, 16, 16, 1, 65536, 64)
    assert case.bytes() == 2 * 16 * 65536 * 64 * 2 + 2 * 16 * 64 * 2
    assert case.flops() == 4 * 16 * 65536 * 64


def test_paper_preset_has_its_tokens_and_width():
    found = cases_for("prefill", "paper")
    assert {case.batch * case.seqlen_q for case in found} == {16384}
    assert {case.heads_q * case.head_dim for case in found} == {2048}
    assert len(found) == len(set(found)) == 3 * 3 * 2 * 6


@pytest.mark.parametrize("family", PRESETS)
@pytest.mark.parametrize("preset", ("paper", "seed", "quick"))
def test_every_preset_gives_cases_of_its_family(family, preset):
    found = cases_for(family, preset)
    assert found and {(case.family, case.preset) for case in found} == {(family, preset)}
    if family == "prefill":
        assert all(case.seqlen_q == case.seqlen_k and case.plain for case in found)
    else:
        assert all(case.causal == (case.seqlen_q > 1) for case in found), "a single query sees every key"


def test_the_decoding_paper_has_every_kind_of_cache():
    found = cases_for("decoding", "paper")
    for dtype in ("fp16", "bf16"):
        here = [c for c in found if c.dtype == dtype and c.plain]
        assert set(DECODING_SHAPES) <= {(c.batch, c.heads_q, c.heads_kv, c.seqlen_k, c.head_dim) for c in here}
    kinds = {(c.dtype, c.page_size, bool(c.lengths), c.seqlen_q) for c in found}
    assert kinds >= {("e4m3", None, False, 1), ("e5m2", None, False, 1), ("fp16", 16, False, 1),
                     ("fp16", None, True, 1), ("fp16", None, False, 4)}  # fmt: skip
    contiguous = {replace(c, page_size=None) for c in found if c.page_size} | {
        replace(c, dtype="fp16") for c in found if c.dtype in FP8
    }
    assert contiguous <= set(found), "what pages and eight bits cost and buy is measured at the same shapes without"
    assert all(c.dtype != "e4m3" or 2 * c.bytes() >= 268e6 for c in found)


def test_the_ragged_batch():
    case, eight = [case for case in cases_for("decoding", "paper") if case.lengths]
    assert (case.dtype, eight.dtype) == ("fp16", "e4m3") and eight.lengths == case.lengths
    assert len(case.lengths) == 64 and min(case.lengths) == 1 and max(case.lengths) == 65536
    assert list(case.lengths) not in (sorted(case.lengths), sorted(case.lengths, reverse=True))
    assert case.lengths == ragged_lengths(64, 65536), "the same in every process"
    assert case.bytes() == 128 * (2 * 64 * 32 * 2 + 2 * 8 * sum(case.lengths) * 2)
    (short_one,) = cases_for("decoding", "quick", batch=[3], seqlen_k=[400], head_dim=[64], heads_q=[2], ragged=(True,),
                             page_size=[16], dtype=["fp16"])  # fmt: skip
    assert sorted(short_one.lengths) == [1, 20, 400] and short_one.page_size == 16
    assert ragged_lengths(1, 7) == (7,)


def test_the_seeds_own_shapes_are_there():
    prefill = {(c.dtype, c.batch, c.heads_q, c.seqlen_k, c.head_dim) for c in cases_for("prefill", "seed")}
    assert {("fp16", 1, 16, 8192, 16), ("fp16", 1, 8, 1024, 16), ("fp16", 2, 4, 8192, 128)} <= prefill
    decoding = {(c.dtype, c.batch, c.heads_q, c.seqlen_k, c.head_dim) for c in cases_for("decoding", "seed")}
    assert {("fp32", 1, 16, 8192, 64), ("fp32", 1, 16, 65536, 64)} <= decoding


def test_an_axis_takes_the_place_of_the_presets_own():
    found = cases_for("prefill", "paper", seqlen_k=[256], head_dim=[64], dtype=["bf16"], causal=(True,), layout="bhsd")
    assert found == [Case("prefill", "bf16", 64, 32, 32, 256, 256, 64, True, layout="bhsd", preset="paper")]


def test_heads_alone_means_as_many_kv_heads():
    assert {(c.heads_q, c.heads_kv) for c in cases_for("decoding", "paper", heads_q=[6])} == {(6, 6)}
    assert {(c.heads_q, c.heads_kv) for c in cases_for("decoding", "paper", heads_q=[6], heads_kv=[2])} == {(6, 2)}


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"dtype": ["fp17"]}, ["fp17", "e4m3"]),
        ({"head_dim": [512]}, ["--head-dims 512", "256"]),
        ({"heads_q": [6], "heads_kv": [4]}, ["--heads 6", "--heads-kv 4"]),
        ({"layout": "sbhd"}, ["sbhd", "bshd"]),
        ({"page_size": [16]}, ["--page-size", "decoding"]),
        ({"seqlen_q": [4]}, ["--queries", "decoding"]),
        ({"ragged": (True,)}, ["--ragged", "decoding"]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(axes, words):
    with pytest.raises(ValueError) as refusal:
        cases_for("prefill", "quick", **axes)
    assert all(word in str(refusal.value) for word in words)


def test_pages_of_no_power_of_two_are_refused():
    with pytest.raises(ValueError, match="--page-size 24.*256"):
        cases_for("decoding", "quick", page_size=[24])


@given(st.integers(1, 10**7))
def test_sizes_are_read_back_as_they_are_written(number):
    assert parse_size(short(number)) == number


@pytest.mark.parametrize("text", ["", "k", "0", "-4", "1.5k", "5q", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
