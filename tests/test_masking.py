"""The range of KV blocks that a block of rows visits and the mask inside a block, against one plain definition."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import masking
from common.masking import sequence_lengths, visible_range, visible_scores
from common.reference import visible_mask

BLOCK = 16
VARYING = ["len_q", "len_k", "window_left", "window_right", "seqlen_k"]  # compiled once, whatever they are


@triton.jit(do_not_specialize=VARYING)
def range_kernel(
    Range, Mask, len_q, len_k, window_left, window_right, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Range int32 [programs, 2] and the mask int8 [programs * BLOCK_M, seqlen_k], without regard to the range."""
    start_m = tl.program_id(0) * BLOCK_M
    lo, hi = visible_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N)
    tl.store(Range + 2 * tl.program_id(0), lo)
    tl.store(Range + 2 * tl.program_id(0) + 1, hi)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        visible = visible_scores(offs_m, offs_n, len_q, len_k, window_left, window_right)
        ptrs = Mask + offs_m[:, None] * seqlen_k + offs_n[None, :]
        tl.store(ptrs, visible.to(tl.int8), mask=(offs_n < seqlen_k)[None, :] & (offs_m >= 0)[:, None])


@triton.jit(do_not_specialize=VARYING)
def unmasked_kernel(Range, len_q, len_k, window_left, window_right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    lo, hi = masking.unmasked_range(
        tl.program_id(0) * BLOCK_M, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N
    )
    tl.store(Range + 2 * tl.program_id(0), lo)
    tl.store(Range + 2 * tl.program_id(0) + 1, hi)


@triton.jit
def lengths_kernel(Lengths, seqlens_q, seqlens_k, seqlen_q, seqlen_k):
    len_q, len_k = sequence_lengths(seqlens_q, seqlens_k, tl.program_id(0), seqlen_q, seqlen_k)
    tl.store(Lengths + 2 * tl.program_id(0), len_q)
    tl.store(Lengths + 2 * tl.program_id(0) + 1, len_k)


side = st.one_of(st.none(), st.integers(0, 45))
masks = given(
    seqlen_q=st.integers(1, 45), seqlen_k=st.integers(1, 45), unused_q=st.integers(0, 45), unused_k=st.integers(0, 45),
    window_left=side, window_right=side,
)  # fmt: skip


thorough = settings(max_examples=60)  # a program each, no products


def reference(seqlen_q, seqlen_k, unused_q, unused_k, window_left, window_right):
    """True lengths, and the boolean mask padded to whole blocks of rows."""
    len_q, len_k = max(0, seqlen_q - unused_q), max(0, seqlen_k - unused_k)
    rows = torch.arange(math.ceil(seqlen_q / BLOCK) * BLOCK)
    return len_q, len_k, visible_mask(rows, seqlen_k, len_q, len_k, False, (window_left, window_right), "cpu")


def block_ranges(kernel, blocks, device, *arguments, **options):
    found = torch.full((blocks, 2), -1, dtype=torch.int32, device=device)
    kernel[(blocks,)](found, *arguments, **options, BLOCK_M=BLOCK, BLOCK_N=BLOCK)
    return found.tolist()


@thorough
@masks
@example(seqlen_q=40, seqlen_k=24, unused_q=0, unused_k=0, window_left=None, window_right=0)  # rows that see nothing
@example(seqlen_q=17, seqlen_k=45, unused_q=0, unused_k=0, window_left=16, window_right=0)  # bounds on a block's edge
def test_range_and_mask(device, seqlen_q, seqlen_k, unused_q, unused_k, window_left, window_right):
    """Every visible key lies in the range, the range starts on a block, and no block in it is invisible to all rows."""
    arguments = (seqlen_q, seqlen_k, unused_q, unused_k, window_left, window_right)
    len_q, len_k, wanted = reference(*arguments)
    blocks = len(wanted) // BLOCK
    mask = torch.full((len(wanted), seqlen_k), -1, dtype=torch.int8, device=device)
    ranges = block_ranges(range_kernel, blocks, device, mask, len_q, len_k, window_left, window_right, seqlen_k)
    mask = mask.cpu() == 1
    assert torch.equal(mask[:len_q], wanted[:len_q])  # rows at and past len_q are dropped when the output is stored
    for start, (lo, hi) in zip(range(0, len(wanted), BLOCK), ranges, strict=True):
        assert lo % BLOCK == 0 and lo >= 0 and hi <= len_k
        seen = wanted[start : start + BLOCK].any(0).nonzero().flatten().tolist()
        assert not seen or lo <= seen[0] and seen[-1] < hi
        for start_n in range(lo, hi, BLOCK):
            assert wanted[start : start + BLOCK, start_n : start_n + BLOCK].any(), "a block that no row sees is visited"


@pytest.mark.skipif(not hasattr(masking, "unmasked_range"), reason="no version skips masks")
@thorough
@masks
@example(seqlen_q=16, seqlen_k=32, unused_q=0, unused_k=0, window_left=16, window_right=0)
def test_unmasked_range(device, seqlen_q, seqlen_k, unused_q, unused_k, window_left, window_right):
    """A block of keys that is taken without a mask is seen whole by every row of the sequence."""
    arguments = (seqlen_q, seqlen_k, unused_q, unused_k, window_left, window_right)
    len_q, len_k, wanted = reference(*arguments)
    blocks = len(wanted) // BLOCK
    ranges = block_ranges(unmasked_kernel, blocks, device, len_q, len_k, window_left, window_right)
    for start, (lo, hi) in zip(range(0, len(wanted), BLOCK), ranges, strict=True):
        for start_n in range(0, seqlen_k, BLOCK):
            if lo <= start_n < hi:
                assert start_n + BLOCK <= len_k, "keys past the length are taken without a mask"
                assert wanted[start : min(start + BLOCK, len_q), start_n : start_n + BLOCK].all()


def test_lengths_stay_inside_the_tensors(device):
    """A length that is negative or too long, which a graph capture does not check, reaches no foreign memory."""
    lengths = torch.tensor([-5, 0, 7, 10, 99], dtype=torch.int32, device=device)
    found = torch.full((5, 2), -1, dtype=torch.int32, device=device)
    lengths_kernel[(5,)](found, lengths, lengths.flip(0).contiguous(), 10, 8)
    assert found.tolist() == [[0, 8], [0, 8], [7, 7], [10, 0], [10, 0]]
    lengths_kernel[(5,)](found, None, None, 10, 8)
    assert found.tolist() == [[10, 8]] * 5
