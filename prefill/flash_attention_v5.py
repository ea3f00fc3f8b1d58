"""FlashAttention v5: TMA + automatic warp specialization.

Idea: let the TMA unit address, bound and copy K and V, and give the copying to warps of its own: Triton makes a
  producer and two groups of consumers, 64 rows each, out of the one loop.
Changed: tensor descriptors made in the kernel; tl.range(warp_specialize=True). The pass takes one loop without a
  branch, so where there is a mask every block of a specialised loop pays for it.
Expect: without addresses, bounds and barriers between all warps the loop of 570 becomes 450, and one group's softmax
  runs under the other's products: 1.1 times v4 at D=128 full; causal 1.05, as the mask takes a fifth of the loop again.
Limits: Hopper; 16-byte steps in memory, no float32. Inside a group products and softmax still take turns. D=64, D=256
  and FP8 stay unspecialised, where exponentials, registers and the mask leave it nothing to gain.
"""

import torch
import triton
import triton.language as tl

from common.exponent import LN_2, LOG2_E, SMALLEST, turn_negative_scale
from common.hopper import why_no_tma
from common.launch import Tiles, cdiv, launch_attention, plain_tiles, tuned_tiles
from common.lineage import Requires, Version
from common.masking import sequence_lengths, unmasked_range, visible_range, visible_scores
from common.problem import AttentionProblem
from common.quantize import quantize_problem
from common.schedule import heads_in_l2, row_block_and_head

P_SHIFT = tl.constexpr(8.0)  # log2(256): e4m3 reaches from 2^-9 to 448, and p is at most 1


@triton.jit(do_not_specialize=["heads_together"])
def flash_attention_kernel(
    Q, K, V,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    seqlens_q, seqlens_k,  # int32 [batch] or None
    stride_q, stride_k, stride_v, stride_o,  # (batch, head, row, 1), in elements
    heads_q, heads_kv, seqlen_q, seqlen_k, scale, window_left, window_right,
    descale_q, descale_k, descale_v,  # float32 [batch, heads_q], [batch, heads_kv] twice; None for 16-bit tensors
    heads_together,  # how many walk their rows side by side
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPECIALIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row_block, head = row_block_and_head(tl.cdiv(seqlen_q, BLOCK_M), heads_together, window_right)
    start_m = row_block * BLOCK_M
    off_b = head // heads_q
    off_h = head % heads_q
    off_hk = off_h // (heads_q // heads_kv)
    len_q, len_k = sequence_lengths(seqlens_q, seqlens_k, off_b, seqlen_q, seqlen_k)
    lo, hi = visible_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N)
    whole_lo, whole_hi = unmasked_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    Q += off_b.to(tl.int64) * stride_q[0] + off_h.to(tl.int64) * stride_q[1]
    K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1]
    V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1]
    Out += off_b.to(tl.int64) * stride_o[0] + off_h.to(tl.int64) * stride_o[1]
    # v5: descriptors know a tensor's rows and columns: loads past them give 0, stores past them write nothing
    q_desc = tl.make_tensor_descriptor(Q, [seqlen_q, HEAD_DIM], [stride_q[2], 1], [BLOCK_M, BLOCK_D])
    o_desc = tl.make_tensor_descriptor(Out, [seqlen_q, HEAD_DIM], [stride_o[2], 1], [BLOCK_M, BLOCK_D])
    rows_k = tl.maximum(len_k, 1)
    k_desc = tl.make_tensor_descriptor(K, [rows_k, HEAD_DIM], [stride_k[2], 1], [BLOCK_N, BLOCK_D])
    if descale_v is None:
        v_desc = tl.make_tensor_descriptor(V, [rows_k, HEAD_DIM], [stride_v[2], 1], [BLOCK_N, BLOCK_D])
    else:
        v_desc = tl.make_tensor_descriptor(V, [HEAD_DIM, rows_k], [stride_v[3], 1], [BLOCK_D, BLOCK_N])
    # The pass hands the second group the rows from 64 on by adding 64 to this coordinate, and to every other use of the
    # same value: were it start_m, offs_m would be off by 64. A value of its own, though equal, keeps them apart.
    first_row = tl.minimum(start_m, seqlen_q - 1)
    q = q_desc.load([first_row, 0])
    if descale_q is not None:
        scale *= tl.load(descale_q + head) * tl.load(descale_k + off_b * heads_kv + off_hk)
    scale = tl.maximum(scale * LOG2_E, SMALLEST)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIALIZE):  # v5
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = k_desc.load([start_n, 0])  # [BLOCK_N, BLOCK_D]
        qk = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        edge = MASKED if SPECIALIZE else (start_n < whole_lo) | (start_n >= whole_hi)  # v5: no branch if specialised
        if edge:
            visible = visible_scores(offs_m, offs_n, len_q, len_k, window_left, window_right)
            qk = tl.where(visible, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new * scale)  # rows that have seen nothing: exp(-inf), not NaN
        if descale_v is None:
            p = tl.exp2(qk * scale - m_safe[:, None])
        else:
            p = tl.exp2(qk * scale - (m_safe - P_SHIFT)[:, None])
        alpha = tl.exp2(m_i * scale - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        if descale_v is None:
            v = v_desc.load([start_n, 0])  # [BLOCK_N, BLOCK_D]
        else:
            v = v_desc.load([0, start_n]).T
        acc = acc * alpha[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new

    empty = (l_i == 0.0) | (offs_m >= len_q)
    acc = tl.where(empty[:, None], 0.0, acc / l_i[:, None])
    if descale_v is not None:
        acc *= tl.load(descale_v + off_b * heads_kv + off_hk)
        l_i *= 1 / 256
    o_desc.store([first_row, 0], acc.to(Out.dtype.element_ty))
    if LSE is not None:
        lse = tl.where(empty, float("-inf"), (m_i * scale + tl.log2(l_i)) * LN_2)
        tl.store(LSE + head.to(tl.int64) * seqlen_q + offs_m, lse, mask=offs_m < seqlen_q)


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Tuned for the GPU and the head dimension."""
    return tuned_tiles("v5", problem) or plain_tiles(problem, "v5")


def allocate(size, alignment, stream):
    """Memory for the descriptors that a launch makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def has_mask(p: AttentionProblem, tiles: Tiles) -> bool:
    """Whether some block holds a score that does not count."""
    return not (p.window_left is p.window_right is p.seqlens_k is None and p.seqlen_k % tiles.BLOCK_N == 0)


def part_of_a_piece(head_dim: int, itemsize: int) -> str | None:
    """Why rows of that many elements cannot be stored, if they cannot."""
    if head_dim * itemsize % 16 == 0:
        return None
    return f"needs rows of whole 16 bytes, TMA's pieces, not head_dim {head_dim} of {itemsize} bytes"


def declines(q, k, v, *, out=None, use_fp8=False, **_):
    """Why these arguments are not served: one line, or None."""
    itemsize = 1 if use_fp8 else q.dtype.itemsize
    if itemsize == 4:
        return "takes no float32: its products are not WGMMA's"
    if reason := part_of_a_piece(q.shape[-1], itemsize):
        return reason
    tensors = (q, k) if v.dtype.itemsize == 1 else (q, k, v)  # a float8 v is laid out anew where it must be
    return why_no_tma(*tensors, *(() if out is None else (out,)))


def call_flash_attention_v5(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None, use_fp8=False, fp8_dtype="e4m3", descale_q=None, descale_k=None, descale_v=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out, use_fp8=use_fp8, fp8_dtype=fp8_dtype,
        descales=(descale_q, descale_k, descale_v),
    )  # fmt: skip
    turn_negative_scale(problem)
    if use_fp8:
        quantize_problem(problem, fp8_dtype)
    reason = part_of_a_piece(problem.head_dim, problem.q.itemsize)
    v = problem.v.transpose(2, 3) if problem.fp8 else problem.v
    if reason := reason or why_no_tma(problem.q, problem.k, v, problem.out):
        raise ValueError(f"this version {reason}; prefill.flash_attention takes the newest that serves the call")
    tiles = tiles or tiles_for(problem)
    specialize = tiles.BLOCK_M >= 128 and tiles.num_warps == 4  # the pass takes 4 warps alone, and 64 rows a group
    if specialize and tiles.num_stages != 2:  # seen on an H200 with Triton 3.6: 3 or 4 compile and give NaN
        raise ValueError(f"tiles: 128 rows and 4 warps are specialised, right with 2 stages alone, not {tiles}")
    triton.set_allocator(allocate)
    grid = (problem.batch * problem.heads_q * cdiv(problem.seqlen_q, tiles.BLOCK_M),)
    descale_q, descale_k, descale_v = problem.descales or (None, None, None)
    launch_attention(
        flash_attention_kernel, grid, problem, tiles, descale_q=descale_q, descale_k=descale_k, descale_v=descale_v,
        heads_together=heads_in_l2(problem), SPECIALIZE=specialize,
        MASKED=has_mask(problem, tiles),
    )
    return problem.result()


VERSION = Version(
    family="prefill", number=5, title="TMA + automatic warp specialization",
    idea="TMA copies K and V, in warps of their own that Triton splits off the loop.",
    parent=4, requires=Requires(capability=(9, 0), exactly=True, amd=False), call=call_flash_attention_v5,
    kernels=(flash_attention_kernel,), tiles=tiles_for, fp8=True, declines=declines,
)  # fmt: skip
