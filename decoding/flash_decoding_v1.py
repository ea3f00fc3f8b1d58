"""Flash decoding v1: split-K.

Idea: cut the KV cache along the sequence, so that one query a head still fills the GPU; each split gives a partial
  output and its log-sum-exp, and a second kernel merges them (Flash-Decoding, Dao et al. 2023).
Changed: the beginning. Compare with one program a head, which would use 16 of 132 SMs at 16 heads.
Expect: decoding reads K and V once and does almost no arithmetic, so 85 % of the read bandwidth at long context; at
  short context the second launch and the ramp of the first show, and half of it is left.
Limits: one query head a program: with GQA the heads that share K and V each read it, the second time from the L2.
"""

import torch
import triton
import triton.language as tl

from common.hardware import detect_gpu
from common.launch import Tiles, block_d, cdiv, launch, tuned_tiles
from common.lineage import Requires, Version
from common.masking import sequence_lengths
from common.merge import merge_step
from common.problem import AttentionProblem

PROGRAMS_PER_SM = 4  # that fit beside each other with these tiles: one wave of them
PARTS = 32  # splits that the second stage takes in at a time


@triton.jit
def split_kernel(
    Q, K, V,  # [batch, heads_q, 1, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    PartOut, PartLSE,  # float32 [batch * heads_q, num_splits, HEAD_DIM], [batch * heads_q, num_splits]
    seqlens_k,  # int32 [batch] or None
    stride_q, stride_k, stride_v,  # (batch, head, row, 1), in elements
    heads_q, heads_kv, seqlen_k, num_splits, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stage 1: one query head over one split of its keys."""
    off_b = tl.program_id(0) // heads_q
    off_h = tl.program_id(0) % heads_q
    off_hk = off_h // (heads_q // heads_kv)
    _, len_k = sequence_lengths(None, seqlens_k, off_b, 1, seqlen_k)
    keys_per_split = tl.cdiv(tl.cdiv(len_k, BLOCK_N), num_splits) * BLOCK_N
    lo = tl.program_id(1) * keys_per_split
    hi = tl.minimum(lo + keys_per_split, len_k)

    offs_n = lo + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    Q += off_b.to(tl.int64) * stride_q[0] + off_h.to(tl.int64) * stride_q[1]
    K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1] + lo.to(tl.int64) * stride_k[2]
    V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1] + lo.to(tl.int64) * stride_v[2]
    k_ptrs = K + tl.arange(0, BLOCK_N)[:, None] * stride_k[2] + offs_d[None, :]
    v_ptrs = V + tl.arange(0, BLOCK_N)[:, None] * stride_v[2] + offs_d[None, :]
    q = tl.load(Q + offs_d, mask=mask_d, other=0.0).to(tl.float32) * scale  # [BLOCK_D]

    m_i = tl.full([], float("-inf"), tl.float32)
    l_i = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for _ in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        mask = (offs_n < hi)[:, None] & mask_d[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        qk = tl.where(offs_n < hi, tl.sum(q[None, :] * k, 1), float("-inf"))  # [BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(qk, 0))  # finite: every block of a split has a key
        p = tl.exp(qk - m_new)
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v, 0)
        m_i = m_new
        offs_n += BLOCK_N
        k_ptrs += BLOCK_N * stride_k[2]
        v_ptrs += BLOCK_N * stride_v[2]

    part = tl.program_id(0).to(tl.int64) * num_splits + tl.program_id(1)
    tl.store(PartOut + part * HEAD_DIM + offs_d, tl.where(l_i == 0.0, 0.0, acc / l_i), mask=mask_d)
    tl.store(PartLSE + part, m_i + tl.log(l_i))  # -inf for a split without keys


@triton.jit
def merge_kernel(
    PartOut, PartLSE,  # float32 [batch * heads_q, num_splits, HEAD_DIM], [batch * heads_q, num_splits]
    Out, LSE,  # [batch, heads_q, 1, HEAD_DIM], float32 [batch, heads_q, 1] or None
    stride_o, heads_q, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stage 2: merge the splits of one query head."""
    off_b = (tl.program_id(0) // heads_q).to(tl.int64)
    off_h = (tl.program_id(0) % heads_q).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * num_splits
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    m_i = tl.full([], float("-inf"), tl.float32)
    l_i = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, PARTS):
        offs_s = start + tl.arange(0, PARTS)
        mask_s = offs_s < num_splits
        lses = tl.load(PartLSE + first + offs_s, mask=mask_s, other=float("-inf"))  # [PARTS]
        outs_ptrs = PartOut + (first + offs_s)[:, None] * HEAD_DIM + offs_d[None, :]
        outs = tl.load(outs_ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)  # [PARTS, BLOCK_D]
        acc, m_i, l_i = merge_step(acc, m_i, l_i, outs, lses)
    out = tl.where(l_i == 0.0, 0.0, acc / l_i)
    tl.store(Out + off_b * stride_o[0] + off_h * stride_o[1] + offs_d, out.to(Out.dtype.element_ty), mask=mask_d)
    if LSE is not None:
        tl.store(LSE + tl.program_id(0), m_i + tl.log(l_i))


def tiles_for(problem: AttentionProblem) -> Tiles:
    """About 16 KB of K and as much of V a block."""
    block_n = max(16, min(256, 16384 // (block_d(problem) * problem.dtype.itemsize)))
    return tuned_tiles("decoding v1", problem) or Tiles(1, block_n, 4, 2)


def splits_for(problem: AttentionProblem, block_n: int) -> int:
    """As many splits as make one wave of programs, and none without a block of keys."""
    heads = max(1, problem.batch * problem.heads_q)
    wanted = detect_gpu(problem.q.device).sm_count * PROGRAMS_PER_SM // heads
    return max(1, min(wanted, cdiv(problem.seqlen_k, block_n)))


def call_flash_decoding(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None
):  # fmt: skip
    """Attention of one query a sequence, q [B, Hq, 1, D], k, v [B, Hkv, Sk, D], as decoding.flash_decoding says."""
    problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out
    )
    p, (_, block_n, num_warps, num_stages) = problem, tiles or tiles_for(problem)
    splits = p.num_splits or splits_for(p, block_n)
    heads = p.batch * p.heads_q
    part_out = torch.empty(heads, splits, p.head_dim, dtype=torch.float32, device=p.q.device)
    part_lse = torch.empty(heads, splits, dtype=torch.float32, device=p.q.device)
    launch(
        split_kernel, (heads, splits), p.q.device, p.q, p.k, p.v, part_out, part_lse, p.seqlens_k,
        p.q.stride(), p.k.stride(), p.v.stride(), p.heads_q, p.heads_kv, p.seqlen_k, splits, p.scale,
        HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), BLOCK_N=block_n, STAGES=num_stages, num_warps=num_warps,
    )  # fmt: skip
    launch(
        merge_kernel, (heads,), p.q.device, part_out, part_lse, p.out, p.lse, p.out.stride(), p.heads_q, splits,
        HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), PARTS=PARTS, num_warps=4,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=1, title="split-K",
    idea="The KV cache is cut along the sequence over all SMs; a second kernel merges the parts by their log-sum-exp.",
    parent=None, requires=Requires(), call=call_flash_decoding, kernels=(split_kernel, merge_kernel), tiles=tiles_for,
)  # fmt: skip
