"""Merging partial outputs by their log-sum-exp: in any order and grouping it is the softmax over all keys."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from attention_checks import relative_error
from hypothesis import given
from hypothesis import strategies as st

from common.merge import merge, merge_parts, merge_step


def make_parts(seed: int, counts: tuple, scale: float = 1.0, rows: int = 3, dim: int = 5):
    """Attention over `counts` keys a part: outs [parts, rows, dim], lses [parts, rows]; and over all, float64."""
    random = torch.Generator().manual_seed(seed)
    scores = [torch.randn(rows, n, generator=random, dtype=torch.float64) * scale for n in counts]
    values = [torch.randn(n, dim, generator=random, dtype=torch.float64) for n in counts]

    def attend(s, v):
        lse = torch.logsumexp(s, 1)
        return torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[:, None]) @ v, lse

    parts = [attend(s, v) for s, v in zip(scores, values, strict=True)]
    joint = attend(torch.cat(scores, 1), torch.cat(values))
    return torch.stack([out for out, _ in parts]).float(), torch.stack([lse for _, lse in parts]).float(), *joint


def assert_merged(out, lse, wanted, wanted_lse, limit=1e-5):
    assert torch.isfinite(out).all()
    assert relative_error(out, wanted) <= limit
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-5)


counts = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple)


@given(seed=st.integers(0, 2**31), counts=counts, scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_agrees_with_the_joint_softmax(seed, counts, scale):
    """Weights left out or in the wrong base, parts without a key, one part only, one part that outweighs the rest."""
    outs, lses, wanted, wanted_lse = make_parts(seed, counts, scale)
    assert_merged(*merge(outs, lses), wanted, wanted_lse)


@given(seed=st.integers(0, 2**31), counts=counts, data=st.data())
def test_any_order_and_grouping(seed, counts, data):
    """Associative and commutative: a tree, a ring and one step agree."""
    outs, lses, wanted, wanted_lse = make_parts(seed, counts)
    parts = data.draw(st.permutations(list(zip(outs, lses, strict=True))))
    while len(parts) > 1:
        size = data.draw(st.integers(2, len(parts)))
        group, parts = parts[:size], parts[size:]
        parts.append(merge(torch.stack([out for out, _ in group]), torch.stack([lse for _, lse in group])))
    assert_merged(*parts[0], wanted, wanted_lse)


def test_both_sides_empty():
    """-inf - (-inf) = NaN: no key on either side is 0 with LSE -inf, whatever the outputs hold."""
    out, lse = merge(torch.full((2, 3, 4), math.nan), torch.full((2, 3), -math.inf))
    assert torch.equal(out, torch.zeros(3, 4)) and torch.equal(lse, torch.full((3,), -math.inf))


def test_an_empty_side_changes_nothing():
    """NaN in the output of a part that saw no key is not read: 0 * NaN."""
    outs, lses, _, _ = make_parts(0, (4,))
    empty, nothing = torch.full_like(outs, math.nan), torch.full_like(lses, -math.inf)
    for order in itertools.permutations([(outs, lses), (empty, nothing)]):
        out, lse = merge(*(torch.cat(parts) for parts in zip(*order, strict=True)))
        assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


def test_a_single_part_comes_back():
    outs, lses, _, _ = make_parts(1, (7,))
    out, lse = merge(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


@pytest.mark.parametrize("far", [200.0, 1e5, 3e38])
def test_huge_differences(far):
    """exp(difference) overflows: the heavier part alone is left, its weight 1 and not inf / inf."""
    outs = torch.tensor([[[1.0]], [[2.0]]])
    for lses in (torch.tensor([[far], [-far]]), torch.tensor([[0.0], [-far]]), torch.tensor([[far], [0.0]])):
        out, lse = merge(outs, lses)
        assert out.item() == 1.0 and lse.item() == lses[0].item()
        out, lse = merge(outs.flip(0), lses.flip(0))
        assert out.item() == 1.0 and lse.item() == lses[0].item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_in_float32(dtype):
    """Sixty-four parts in 16 bits: rounded once, at the end."""
    outs, lses, wanted, wanted_lse = make_parts(2, (3,) * 64)
    out, lse = merge(outs.to(dtype), lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_merged(out, lse, wanted, wanted_lse, limit={torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps * 2))


def test_rejects_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"lses: must have shape \[2, 3\] .* it has \[2, 4\]"):
        merge(torch.zeros(2, 3, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="outs: has no parts to merge"):
        merge(torch.zeros(0, 3, 5), torch.zeros(0, 3))


@triton.jit
def merge_kernel(Outs, LSEs, Out, LSE, parts, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Row program_id(0) of outs [parts, rows, DIM], lses [parts, rows], PARTS parts a step."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    m_i = tl.full([], float("-inf"), tl.float32)
    l_i = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, PARTS):
        offs_s = start + tl.arange(0, PARTS)
        lses = tl.load(LSEs + offs_s * rows + row, mask=offs_s < parts, other=float("-inf"))
        ptrs = Outs + (offs_s * rows + row)[:, None] * DIM + offs_d[None, :]
        outs = tl.load(ptrs, mask=(offs_s < parts)[:, None] & (offs_d < DIM)[None, :], other=0.0)
        acc, m_i, l_i = merge_step(acc, m_i, l_i, outs, lses)
    tl.store(Out + row * DIM + offs_d, tl.where(l_i == 0.0, 0.0, acc / l_i), mask=offs_d < DIM)
    tl.store(LSE + row, m_i + tl.log(l_i))


@pytest.mark.parametrize("counts", [(5,), (0, 0, 0), (0, 4), (4, 0), (3,) * 9, (0, 0, 0, 0, 2, 0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_merge_step_does_the_same_in_a_kernel(counts, scale, device):
    """The running form: first steps without a key, a maximum that grows from step to step."""
    outs, lses, wanted, wanted_lse = make_parts(3, counts, scale)
    out, lse = torch.full((3, 5), math.nan, device=device), torch.full((3,), math.nan, device=device)
    merge_kernel[(3,)](outs.to(device), lses.to(device), out, lse, len(counts), DIM=5, BLOCK_D=16, PARTS=4)
    assert_merged(out.cpu(), lse.cpu(), wanted, wanted_lse)


@triton.jit
def merge_rows_kernel(
    Outs, LSEs, Out, LSE, rows, parts, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """ROWS rows of outs [parts, rows, DIM], lses [parts, rows] for each program."""
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    out, lse = merge_parts(Outs, LSEs, offs_m, rows, parts, DIM, BLOCK_D, ROWS, PARTS, LSES=4)
    mask = (offs_m < rows)[:, None] & (offs_d < DIM)[None, :]
    tl.store(Out + offs_m[:, None] * DIM + offs_d[None, :], out, mask=mask)
    tl.store(LSE + offs_m, lse, mask=offs_m < rows)


@pytest.mark.parametrize("counts", [(5,), (0, 0, 0), (0, 4), (4, 0), (3,) * 9, (0, 0, 0, 0, 2, 0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_merge_parts_does_the_same_in_a_kernel(counts, scale, rows_at_once, device):
    """Rows and parts that do not fill a step; a largest LSE in any of several steps, or none at all."""
    outs, lses, wanted, wanted_lse = make_parts(4, counts, scale)
    out, lse = torch.full((3, 5), math.nan, device=device), torch.full((3,), math.nan, device=device)
    merge_rows_kernel[(triton.cdiv(3, rows_at_once),)](
        outs.to(device), lses.to(device), out, lse, 3, len(counts), DIM=5, BLOCK_D=16, ROWS=rows_at_once, PARTS=2
    )
    assert_merged(out.cpu(), lse.cpu(), wanted, wanted_lse)
