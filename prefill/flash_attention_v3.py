"""FlashAttention v3: block pointers and FP8.

Idea: address K and V by block pointers that advance, with boundary checks in place of masks; and let the same loop run
  on FP8 tensor cores, with static scales applied before the kernel.
Changed: loads; scales of q, k, v (None for 16-bit); p is multiplied by 256 before it becomes e4m3, so that small
  weights do not underflow. V comes with its keys contiguous (common/quantize.py).
Expect: 16-bit equal to v2 within noise: since Triton 3.7 block pointers are sugar for the same pointers. FP8 1.3 to 1.5
  times that: the products take half as long, exp and the conversions of p do not.
Limits: FP8 needs compute capability 8.9; from Triton 3.9 the block pointers are our own type (common/block_pointer.py).
"""

import triton
import triton.language as tl

from common.block_pointer import advance, load_block, make_block
from common.launch import Tiles, cdiv, launch_attention, plain_tiles, tuned_tiles
from common.lineage import Requires, Version
from common.masking import sequence_lengths, visible_range, visible_scores
from common.problem import AttentionProblem
from common.quantize import quantize_problem

P_SHIFT = tl.constexpr(5.545177444479562)  # log(256): e4m3 reaches from 2^-9 to 448, and p is at most 1


@triton.jit
def flash_attention_kernel(
    Q, K, V,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    seqlens_q, seqlens_k,  # int32 [batch] or None
    stride_q, stride_k, stride_v, stride_o,  # (batch, head, row, 1), in elements
    heads_q, heads_kv, seqlen_q, seqlen_k, scale, window_left, window_right,
    descale_q, descale_k, descale_v,  # float32 [batch, heads_q], [batch, heads_kv] twice; None for 16-bit tensors
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(1) * BLOCK_M
    off_b = tl.program_id(0) // heads_q
    off_h = tl.program_id(0) % heads_q
    off_hk = off_h // (heads_q // heads_kv)
    len_q, len_k = sequence_lengths(seqlens_q, seqlens_k, off_b, seqlen_q, seqlen_k)
    lo, hi = visible_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    Q += off_b.to(tl.int64) * stride_q[0] + off_h.to(tl.int64) * stride_q[1]
    K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1]
    V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1]
    Out += off_b.to(tl.int64) * stride_o[0] + off_h.to(tl.int64) * stride_o[1]
    # v3: blocks know their tensor's shape, so that loads past its end give 0 and no mask is built
    q_block = make_block(Q, (len_q, HEAD_DIM), (stride_q[2], stride_q[3]), (start_m, 0), BLOCK_M, BLOCK_D, (1, 0))
    k_block = make_block(K, (len_k, HEAD_DIM), (stride_k[2], stride_k[3]), (lo, 0), BLOCK_N, BLOCK_D, (1, 0))
    V_ORDER: tl.constexpr = (1, 0) if descale_v is None else (0, 1)
    v_block = make_block(V, (len_k, HEAD_DIM), (stride_v[2], stride_v[3]), (lo, 0), BLOCK_N, BLOCK_D, V_ORDER)
    q = load_block(q_block, BLOCK_M, BLOCK_D)
    if descale_q is not None:  # v3: static scales, one a head: the loop does not see them
        scale *= tl.load(descale_q + tl.program_id(0)) * tl.load(descale_k + off_b * heads_kv + off_hk)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_block(k_block, BLOCK_N, BLOCK_D)  # v3
        qk = tl.dot(q, k.T, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        visible = visible_scores(offs_m, offs_n, len_q, len_k, window_left, window_right)
        qk = tl.where(visible, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing: exp(-inf), not NaN
        if descale_v is None:
            p = tl.exp(qk - m_safe[:, None])
        else:
            p = tl.exp(qk - (m_safe - P_SHIFT)[:, None])  # v3: 256 p; l_i sums the same, so the division takes it out
        alpha = tl.exp(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_block(v_block, BLOCK_N, BLOCK_D)  # v3
        acc = acc * alpha[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
        k_block = advance(k_block, BLOCK_N, 0)  # v3
        v_block = advance(v_block, BLOCK_N, 0)  # v3

    empty = (l_i == 0.0) | (offs_m >= len_q)
    acc = tl.where(empty[:, None], 0.0, acc / l_i[:, None])
    if descale_v is not None:
        acc *= tl.load(descale_v + off_b * heads_kv + off_hk)
        m_i -= P_SHIFT  # v3: for the LSE
    out_ptrs = Out + offs_m.to(tl.int64)[:, None] * stride_o[2] + offs_d[None, :]
    tl.store(out_ptrs, acc.to(Out.dtype.element_ty), mask=(offs_m < seqlen_q)[:, None] & (offs_d < HEAD_DIM)[None, :])
    if LSE is not None:
        lse = tl.where(empty, float("-inf"), m_i + tl.log(l_i))
        tl.store(LSE + tl.program_id(0).to(tl.int64) * seqlen_q + offs_m, lse, mask=offs_m < seqlen_q)


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Tuned for the GPU and the head dimension."""
    return tuned_tiles("v3", problem) or plain_tiles(problem)


def call_flash_attention_v3(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None, use_fp8=False, fp8_dtype="e4m3", descale_q=None, descale_k=None, descale_v=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out, use_fp8=use_fp8, fp8_dtype=fp8_dtype,
        descales=(descale_q, descale_k, descale_v),
    )  # fmt: skip
    if use_fp8:
        quantize_problem(problem, fp8_dtype)
    tiles = tiles or tiles_for(problem)
    grid = (problem.batch * problem.heads_q, cdiv(problem.seqlen_q, tiles.BLOCK_M))
    descale_q, descale_k, descale_v = problem.descales or (None, None, None)
    launch_attention(
        flash_attention_kernel, grid, problem, tiles, descale_q=descale_q, descale_k=descale_k, descale_v=descale_v
    )
    return problem.result()


VERSION = Version(
    family="prefill", number=3, title="block pointers + FP8",
    idea="Block pointers that advance, with boundary checks; the same loop on FP8 tensor cores with static scales.",
    parent=2, requires=Requires(), call=call_flash_attention_v3, kernels=(flash_attention_kernel,),
    tiles=tiles_for, fp8=True,
)  # fmt: skip
