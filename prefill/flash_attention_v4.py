"""FlashAttention v4: no wasted instructions.

Idea: spend nothing in the loop that the result does not need, and leave no SM idle at the end of the grid.
Changed: exp2 with the scale folded in; the mask only in blocks that an edge crosses; heaviest row blocks first, heads
  whose K and V fill the L2 side by side. Block pointers go again: Triton 3.9 has none, and pointers that advance take
  fewer registers for the same loads.
Expect: tl.exp is 7 instructions a score on sm_90, exp2 and its FFMA are 2, and the mask was 1 to 5: the loop of 1040
  (128 x 128, D=128; 1460 causal) becomes 570. 1.2 times v3 without a mask; with one 1.5 times, because v3 starts the
  longest rows last.
Limits: softmax and products take turns inside a warp; addresses and bounds of K and V are 110 of the 570.
"""

import triton
import triton.language as tl

from common.exponent import LN_2, LOG2_E, SMALLEST, turn_negative_scale
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
):  # fmt: skip
    row_block, head = row_block_and_head(tl.cdiv(seqlen_q, BLOCK_M), heads_together, window_right)  # v4
    start_m = row_block * BLOCK_M
    off_b = head // heads_q
    off_h = head % heads_q
    off_hk = off_h // (heads_q // heads_kv)
    len_q, len_k = sequence_lengths(seqlens_q, seqlens_k, off_b, seqlen_q, seqlen_k)
    lo, hi = visible_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N)
    whole_lo, whole_hi = unmasked_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N)  # v4

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    Q += off_b.to(tl.int64) * stride_q[0] + off_h.to(tl.int64) * stride_q[1]
    K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1] + lo.to(tl.int64) * stride_k[2]
    V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1] + lo.to(tl.int64) * stride_v[2]
    Out += off_b.to(tl.int64) * stride_o[0] + off_h.to(tl.int64) * stride_o[1]
    # v4: plain pointers again, to a block of K and V
    k_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_k[2] + offs_d[None, :]
    v_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_v[2] + offs_d[None, :] * stride_v[3]
    # rows past the end repeat the last one: a mask would hold its predicate registers through the loop
    q_ptrs = Q + tl.minimum(offs_m, seqlen_q - 1).to(tl.int64)[:, None] * stride_q[2] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    if descale_q is not None:
        scale *= tl.load(descale_q + head) * tl.load(descale_k + off_b * heads_kv + off_hk)
    scale = tl.maximum(scale * LOG2_E, SMALLEST)  # v4: exp(score) is exp2(qk * scale)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = tl.load(K + k_offsets, mask=(offs_n < len_k)[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        qk = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if (start_n < whole_lo) | (start_n >= whole_hi):  # v4: an edge of the mask crosses this block
            visible = visible_scores(offs_m, offs_n, len_q, len_k, window_left, window_right)
            qk = tl.where(visible, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new * scale)  # rows that have seen nothing: exp(-inf), not NaN
        if descale_v is None:
            p = tl.exp2(qk * scale - m_safe[:, None])  # v4: one FFMA, one MUFU.EX2
        else:
            p = tl.exp2(qk * scale - (m_safe - P_SHIFT)[:, None])
        alpha = tl.exp2(m_i * scale - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(V + v_offsets, mask=(offs_n < len_k)[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        acc = acc * alpha[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
        K += BLOCK_N * stride_k[2]
        V += BLOCK_N * stride_v[2]

    empty = (l_i == 0.0) | (offs_m >= len_q)
    acc = tl.where(empty[:, None], 0.0, acc / l_i[:, None])
    if descale_v is not None:
        acc *= tl.load(descale_v + off_b * heads_kv + off_hk)
        l_i *= 1 / 256
    out_ptrs = Out + offs_m.to(tl.int64)[:, None] * stride_o[2] + offs_d[None, :]
    tl.store(out_ptrs, acc.to(Out.dtype.element_ty), mask=(offs_m < seqlen_q)[:, None] & mask_d[None, :])
    if LSE is not None:
        lse = tl.where(empty, float("-inf"), (m_i * scale + tl.log2(l_i)) * LN_2)
        tl.store(LSE + head.to(tl.int64) * seqlen_q + offs_m, lse, mask=offs_m < seqlen_q)


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Tuned for the GPU and the head dimension."""
    return tuned_tiles("v4", problem) or plain_tiles(problem, "v4")


def call_flash_attention_v4(
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
    tiles = tiles or tiles_for(problem)
    grid = (problem.batch * problem.heads_q * cdiv(problem.seqlen_q, tiles.BLOCK_M),)
    descale_q, descale_k, descale_v = problem.descales or (None, None, None)
    launch_attention(
        flash_attention_kernel, grid, problem, tiles, descale_q=descale_q, descale_k=descale_k, descale_v=descale_v,
        heads_together=heads_in_l2(problem),
    )
    return problem.result()


VERSION = Version(
    family="prefill", number=4, title="no wasted instructions",
    idea="exp2 with the scale folded in, masks only where an edge crosses, heaviest row blocks first.",
    parent=3, requires=Requires(), call=call_flash_attention_v4, kernels=(flash_attention_kernel,),
    tiles=tiles_for, fp8=True,
)  # fmt: skip
