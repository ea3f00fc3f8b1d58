"""FP8 inputs: static scales, found and applied before the attention kernel, once for each head.

A descale is amax / max(format), the number that a stored value is multiplied with to get the original back. V is stored
with its keys contiguous, [B, H, D, Sk] with Sk padded to a multiple of 16: Hopper's FP8 products read their second
operand only in that order, and its rows must start on 16 bytes to be loaded 16 bytes at a time.

Q and K are rounded to nearest, V so that over 128 keys the errors cancel: the output is a weighted sum over keys, and
what the weights have in common multiplies the sum of the errors. Of weights of N(0, 1) scores that is a third of their
square; what rounding V does to the output falls by a sixth.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from common.launch import cdiv, launch
from common.problem import FP8, LEAST_KEYS_OF_DESCALE, AttentionProblem

SMALLEST_AMAX = 1e-30  # below, 1 / descale would leave float32: such a head is as good as zero
FORMAT_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class Quantized(NamedTuple):
    """q, k float8 [B, H, S, D]; v float8 [B, Hkv, Sk, D] with stride 1 along Sk; descales float32 [B, H]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    descale_q: torch.Tensor
    descale_k: torch.Tensor
    descale_v: torch.Tensor


class QuantizedCache(NamedTuple):
    """k, v float8 like the caches that they were; descales float32 [B, Hkv], or [B or pages, Hkv, blocks of keys]."""

    k: torch.Tensor
    v: torch.Tensor
    descale_k: torch.Tensor
    descale_v: torch.Tensor


@triton.jit
def within(x, limit):
    """x clamped to -limit .. limit; NaN stays NaN."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -limit), limit))


@triton.jit
def errors(x, shifted, counts, DTYPE: tl.constexpr):
    """What rounding `shifted` in place of x adds to each column [1, columns], over the rows that count."""
    error = tl.where(counts, shifted.to(DTYPE).to(tl.float32) - x, 0.0)
    return tl.sum(error, 0)[None, :]


@triton.jit
def balanced(x, counts, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """x, moved a little before it is rounded, so that the errors of a column cancel, in each column where that helps.

    All of a column are moved by its mean error, but none by more than |x| * SHIFT, an eighth of its step in the format:
    small numbers keep their precision beside large ones, and what the format holds stays as it is.
    """
    error = errors(x, x, counts, DTYPE)
    shifted = x - within(error / x.shape[0], tl.abs(x) * SHIFT)
    return tl.where(tl.abs(errors(x, shifted, counts, DTYPE)) < tl.abs(error), shifted, x)


@triton.jit
def quantize_kernel(
    X, Y, scales,  # [batch, heads, seqlen, HEAD_DIM] twice; float32 [batch, heads]
    lengths,  # int32 [batch] or None: rows past it have no say in how the others are rounded
    stride_x, stride_y, heads, seqlen, limit,
    SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Y = X * scale of its head, clamped to the format; BLOCK_M x BLOCK_D a program. SHIFT: None rounds to nearest."""
    off_b = (tl.program_id(0) // heads).to(tl.int64)
    off_h = (tl.program_id(0) % heads).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_m < seqlen)[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    x_ptrs = X + off_b * stride_x[0] + off_h * stride_x[1] + rows * stride_x[2] + offs_d[None, :] * stride_x[3]
    y_ptrs = Y + off_b * stride_y[0] + off_h * stride_y[1] + rows * stride_y[2] + offs_d[None, :] * stride_y[3]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32) * tl.load(scales + tl.program_id(0))
    x = within(x, limit)
    if SHIFT is not None:
        length = seqlen if lengths is None else tl.load(lengths + off_b)
        x = balanced(x, (offs_m < length)[:, None], SHIFT, Y.dtype.element_ty)
    tl.store(y_ptrs, x.to(Y.dtype.element_ty), mask=mask)


def _keys_contiguous(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Empty [B, H, S, D] whose dimension S is contiguous and whose rows start on 16 bytes."""
    batch, heads, seqlen, head_dim = x.shape
    padded = cdiv(max(seqlen, 1), 16) * 16
    return torch.empty(batch, heads, head_dim, padded, dtype=dtype, device=x.device)[..., :seqlen].transpose(2, 3)


def _largest(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Of each row of x [B, H, S, D]: [B, H, S]; 0 past the lengths: what lies there is nobody's, and sets no scale."""
    largest = x.abs().amax(3)
    if lengths is not None:
        unused = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
        largest = largest.masked_fill(unused[:, None], 0.0)
    return largest


def _descale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    amax = amax.float()
    usable = (amax > SMALLEST_AMAX) & torch.isfinite(amax)
    return torch.where(usable, amax / FORMAT_MAX[dtype], 1.0)


def _quantize(x: torch.Tensor, dtype: torch.dtype, keys_contiguous: bool, lengths: torch.Tensor | None):
    batch, heads, seqlen, _ = x.shape
    amax = _largest(x, lengths).amax(2) if seqlen else x.new_zeros(batch, heads)
    descale = _descale(amax, dtype)
    y = _keys_contiguous(x, dtype) if keys_contiguous else torch.empty_like(x, dtype=dtype)
    shift = torch.finfo(dtype).eps / 16 if keys_contiguous else None  # so laid out is V
    _store(x, y, 1.0 / descale, lengths, shift)
    return y, descale


def _store(x: torch.Tensor, y: torch.Tensor, scales: torch.Tensor, lengths=None, shift=None):
    batch, heads, seqlen, head_dim = x.shape
    BLOCK_D = min(max(16, triton.next_power_of_2(head_dim)), 128)
    BLOCK_M = 128  # the longer a column, the better its errors cancel
    launch(
        quantize_kernel, (batch * heads, cdiv(seqlen, BLOCK_M), cdiv(head_dim, BLOCK_D)), x.device,
        x, y, scales, lengths, x.stride(), y.stride(), heads, seqlen, FORMAT_MAX[y.dtype],
        SHIFT=shift, HEAD_DIM=head_dim, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, num_warps=max(4, BLOCK_D // 16),
    )  # fmt: skip


def quantize_fp8(q, k, v, fp8_dtype="e4m3") -> Quantized:
    """Float8 copies of 16-bit q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], one scale a head, for use_fp8=True calls.

    fp8_dtype "e4m3" or "e5m2". Each number is the nearest one, in v here and there the one next to it, so that errors
    cancel. Errors as AttentionProblem.prefill has them.
    """
    problem = AttentionProblem.prefill(q, k, v, use_fp8=True, fp8_dtype=fp8_dtype)
    quantize_problem(problem, fp8_dtype)
    return Quantized(problem.q, problem.k, problem.v, *problem.descales)


def quantize_cache(k, v, fp8_dtype="e4m3", block=None, seqlens_k=None) -> QuantizedCache:
    """Float8 copies of a cache, k and v [B, Hkv, Sk, D], any float dtype and strides, for decoding from v5 on.

    fp8_dtype "e4m3" or "e5m2". block: None gives one scale for each head of a sequence, which its pages share; a power
    of two from 16 on gives one for every so many keys, and k and v may also be pages, [pages, Hkv, page_size, D].
    seqlens_k: int32 [B], keys past which set no scale. Raises ValueError naming the argument.
    """
    if fp8_dtype not in FP8:
        raise ValueError(f"fp8_dtype: must be 'e4m3' or 'e5m2', it is {fp8_dtype!r}")
    if block is not None and (block < LEAST_KEYS_OF_DESCALE or block & (block - 1)):
        raise ValueError(f"block: must be a power of two from {LEAST_KEYS_OF_DESCALE} on, or None, it is {block}")
    dtype = FP8[fp8_dtype]
    if block is None:
        (k, descale_k), (v, descale_v) = (_quantize(x, dtype, False, seqlens_k) for x in (k, v))
    else:
        (k, descale_k), (v, descale_v) = (_quantize_blocks(x, dtype, block, seqlens_k) for x in (k, v))
    return QuantizedCache(k, v, descale_k, descale_v)


def _quantize_blocks(x: torch.Tensor, dtype: torch.dtype, block: int, lengths: torch.Tensor | None):
    places, heads, keys, head_dim = x.shape
    blocks = cdiv(keys, block)
    largest = torch.nn.functional.pad(_largest(x, lengths), (0, blocks * block - keys))
    descale = _descale(largest.view(places, heads, blocks, block).amax(3), dtype)
    scales = (1.0 / descale).repeat_interleave(block, 2)[:, :, :keys, None]
    y, limit = torch.empty_like(x, dtype=dtype), FORMAT_MAX[dtype]
    at_once = max(1, 2**26 // max(1, heads * keys * head_dim))
    for some, into, scale in zip(*(t.split(at_once) for t in (x, y, scales)), strict=True):
        into.copy_((some.float() * scale).clamp(-limit, limit))  # NaN stays NaN
    return y, descale


def quantize_problem(problem: AttentionProblem, fp8_dtype: str):
    """Make the problem's tensors what an FP8 kernel reads: 16-bit ones quantised, a float8 v laid out if it must be."""
    p = problem
    if not p.fp8:
        q, descale_q = _quantize(p.q, FP8[fp8_dtype], False, p.seqlens_q)
        k, descale_k = _quantize(p.k, FP8[fp8_dtype], False, p.seqlens_k)
        v, descale_v = _quantize(p.v, FP8[fp8_dtype], True, p.seqlens_k)
        p.q, p.k, p.v, p.descales = q, k, v, (descale_q, descale_k, descale_v)
    elif p.v.stride(2) != 1 or any(stride % 16 for stride in (p.v.stride(0), p.v.stride(1), p.v.stride(3))):
        v = _keys_contiguous(p.v, p.v.dtype)
        _store(p.v, v, torch.ones(p.batch, p.heads_kv, device=v.device))
        p.v = v
