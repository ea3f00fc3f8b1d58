"""FlashAttention v1: naive, normalised in the loop.

Idea: online softmax over tiles: the S x S matrix is never written. The running output is a true average at every step.
Changed: the beginning. Compare with eager PyTorch, which writes and rereads seqlen_q x seqlen_k scores.
Expect: linear memory. Slow: 32 x 32 tiles re-read K and V for every 32 rows and are too small for Hopper's WGMMA, so
  about 100 TFLOP/s of the H200's 989; the divisions cost less than they look, being one reciprocal a row.
Limits: one tile for every GPU; at most 2 million rows a sequence (65 535 row blocks on the grid's second axis).
"""

import triton
import triton.language as tl

from common.launch import Tiles, cdiv, launch_attention
from common.lineage import Requires, Version
from common.masking import sequence_lengths, visible_range, visible_scores
from common.problem import AttentionProblem


@triton.jit
def flash_attention_kernel(
    Q, K, V,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    seqlens_q, seqlens_k,  # int32 [batch] or None
    stride_q, stride_k, stride_v, stride_o,  # (batch, head, row, 1), in elements
    heads_q, heads_kv, seqlen_q, seqlen_k, scale, window_left, window_right,
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
    mask_d = offs_d < HEAD_DIM
    Q += off_b.to(tl.int64) * stride_q[0] + off_h.to(tl.int64) * stride_q[1]
    K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1] + lo.to(tl.int64) * stride_k[2]
    V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1] + lo.to(tl.int64) * stride_v[2]
    Out += off_b.to(tl.int64) * stride_o[0] + off_h.to(tl.int64) * stride_o[1]
    k_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_k[2] + offs_d[None, :]
    v_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_v[2] + offs_d[None, :]
    # rows past the end repeat the last one: a mask would hold its predicate registers through the loop
    q_ptrs = Q + tl.minimum(offs_m, seqlen_q - 1).to(tl.int64)[:, None] * stride_q[2] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = tl.load(K + k_offsets, mask=(offs_n < len_k)[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        qk = tl.dot(q, k.T, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        visible = visible_scores(offs_m, offs_n, len_q, len_k, window_left, window_right)
        qk = tl.where(visible, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing: exp(-inf), not NaN
        p = tl.exp(qk - m_safe[:, None])
        alpha = tl.exp(m_i - m_safe)
        l_new = l_i * alpha + tl.sum(p, 1)
        l_safe = tl.where(l_new == 0.0, 1.0, l_new)
        v = tl.load(V + v_offsets, mask=(offs_n < len_k)[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        acc = acc * (alpha * l_i / l_safe)[:, None]  # v1: the average so far, weighed anew
        p = p / l_safe[:, None]  # v1: and the block's share of the new average
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
        l_i = l_new
        K += BLOCK_N * stride_k[2]
        V += BLOCK_N * stride_v[2]

    empty = (l_i == 0.0) | (offs_m >= len_q)
    acc = tl.where(empty[:, None], 0.0, acc)
    out_ptrs = Out + offs_m.to(tl.int64)[:, None] * stride_o[2] + offs_d[None, :]
    tl.store(out_ptrs, acc.to(Out.dtype.element_ty), mask=(offs_m < seqlen_q)[:, None] & mask_d[None, :])
    if LSE is not None:
        lse = tl.where(empty, float("-inf"), m_i + tl.log(l_i))
        tl.store(LSE + tl.program_id(0).to(tl.int64) * seqlen_q + offs_m, lse, mask=offs_m < seqlen_q)


def tiles_for(problem: AttentionProblem) -> Tiles:
    """One small tile for everything; wide 4-byte rows need more warps and fewer stages to stay in registers."""
    wide = problem.dtype.itemsize == 4 and problem.head_dim > 64
    return Tiles(32, 32, 8, 1) if wide else Tiles(32, 32, 4, 2)


def call_flash_attention_v1(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out,
    )  # fmt: skip
    tiles = tiles or tiles_for(problem)
    grid = (problem.batch * problem.heads_q, cdiv(problem.seqlen_q, tiles.BLOCK_M))
    launch_attention(flash_attention_kernel, grid, problem, tiles)
    return problem.result()


VERSION = Version(
    family="prefill", number=1, title="naive normalized",
    idea="Online softmax over tiles; the output is normalised after every KV block.",
    parent=None, requires=Requires(), call=call_flash_attention_v1, kernels=(flash_attention_kernel,),
    tiles=tiles_for,
)  # fmt: skip
