"""Flash decoding v2: each byte of the cache once.

Idea: the queries of all heads that share a KV head are the rows of one tile, so that K and V are read once for all of
  them, and the tensor cores do the products.
Changed: a program takes a KV head. Several queries a sequence, each a row for each head. A tile of 16 rows and more
  goes through tl.dot, filled up with rows of nothing; one row of float32 stays with products and sums. All splits are
  equal, to the key, and as many as make whole waves.
Expect: with 4 heads a group v1 gets 1030 GB/s out of the memory and four times that out of the L2. Read once: 4 times
  v1, 90 % of the ceiling at 268 MB. One row alone: the loop is 482 instructions for 128 keys where v1's is 654: 1.02.
Limits: the second launch is 2 to 3 us, a fifth of the time at 34 MB; a ragged batch is cut as its longest sequence is.
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
from common.schedule import splits_of_whole_waves

MOST_ROWS = {2: 64, 4: 16}  # of a tile, by the bytes of an element: float32 products take registers, not tensor cores
PARTS = 32  # splits that the second stage takes in at a time


@triton.jit(do_not_specialize=["seqlen_k", "num_splits"])
def split_kernel(
    Q, K, V,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    PartOut, PartLSE,  # float32 [batch * heads_q * seqlen_q, num_splits, HEAD_DIM], the same without HEAD_DIM
    seqlens_k,  # int32 [batch] or None
    stride_q, stride_k, stride_v,  # (batch, head, row, 1), in elements
    heads_q, heads_kv, seqlen_q, seqlen_k, num_splits, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stage 1: some of the rows that share a KV head over one split of its keys."""
    rows = heads_q // heads_kv * seqlen_q  # v2: head by head, all queries of each
    row_blocks = tl.cdiv(rows, BLOCK_M)  # v2
    kv_head = tl.program_id(0) // row_blocks  # v2
    start_m = tl.program_id(0) % row_blocks * BLOCK_M  # v2
    off_b = kv_head // heads_kv
    off_hk = kv_head % heads_kv
    _, len_k = sequence_lengths(None, seqlens_k, off_b, 1, seqlen_k)
    keys_per_split = tl.cdiv(len_k, num_splits)
    lo = tl.program_id(1) * keys_per_split
    hi = tl.minimum(lo + keys_per_split, len_k)

    offs_m = start_m + tl.arange(0, BLOCK_M)  # v2
    off_h = off_hk * (heads_q // heads_kv) + offs_m // seqlen_q
    last_key = tl.minimum(offs_m % seqlen_q + len_k - seqlen_q, hi - 1)  # v2: causal; [BLOCK_M]
    offs_n = lo + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_q = (offs_m < rows)[:, None] & mask_d[None, :]
    Q += off_b.to(tl.int64) * stride_q[0]
    q_rows = Q + off_h.to(tl.int64) * stride_q[1] + (offs_m % seqlen_q).to(tl.int64) * stride_q[2]  # [BLOCK_M]
    K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1] + lo.to(tl.int64) * stride_k[2]
    V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1] + lo.to(tl.int64) * stride_v[2]
    k_ptrs = K + tl.arange(0, BLOCK_N)[:, None] * stride_k[2] + offs_d[None, :]
    v_ptrs = V + tl.arange(0, BLOCK_N)[:, None] * stride_v[2] + offs_d[None, :]
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]

    KEYS: tl.constexpr = 0 if BLOCK_M == 1 else 1  # v2: the axis of the scores that keys run along
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        mask = (offs_n < hi)[:, None] & mask_d[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        if BLOCK_M == 1:
            qk = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None]  # [BLOCK_N, 1]
            visible = (offs_n < hi)[:, None]
        else:  # v2
            qk = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            visible = offs_n[None, :] <= last_key[:, None]
        qk = tl.where(visible, qk * scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, KEYS))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # v2: a query may be ahead of all keys so far
        p = tl.exp(qk - tl.expand_dims(m_safe, KEYS))
        alpha = tl.exp(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, KEYS)
        acc = acc * alpha[:, None]
        if BLOCK_M == 1:
            acc += tl.sum(p * v.to(tl.float32), 0)[None, :]
        else:  # v2
            acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
        offs_n += BLOCK_N
        k_ptrs += BLOCK_N * stride_k[2]
        v_ptrs += BLOCK_N * stride_v[2]

    part = (kv_head.to(tl.int64) * rows + offs_m) * num_splits + tl.program_id(1)  # [BLOCK_M]
    out = tl.where(l_i == 0.0, 0.0, 1.0 / l_i)[:, None] * acc
    tl.store(PartOut + part[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask_q)
    tl.store(PartLSE + part, m_i + tl.log(l_i), mask=offs_m < rows)  # -inf for a split without keys


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    PartOut, PartLSE,  # float32 [batch * heads_q * seqlen_q, num_splits, HEAD_DIM], the same without HEAD_DIM
    Out, LSE,  # [batch, heads_q, seqlen_q, HEAD_DIM], float32 [batch, heads_q, seqlen_q] or None
    stride_o, heads_q, seqlen_q, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stage 2: merge the splits of one query."""
    off_b = (tl.program_id(0) // (heads_q * seqlen_q)).to(tl.int64)
    off_h = (tl.program_id(0) // seqlen_q % heads_q).to(tl.int64)
    off_m = (tl.program_id(0) % seqlen_q).to(tl.int64)
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
    Out += off_b * stride_o[0] + off_h * stride_o[1] + off_m * stride_o[2]
    tl.store(Out + offs_d, out.to(Out.dtype.element_ty), mask=mask_d)
    if LSE is not None:
        tl.store(LSE + tl.program_id(0), m_i + tl.log(l_i))


def tiles_for(problem: AttentionProblem) -> Tiles:
    """About 16 KB of K and as much of V a block, in two buffers where shared memory is large."""
    block_n = max(16, min(256, 16384 // (block_d(problem) * problem.dtype.itemsize)))
    if problem.dtype == torch.float32:
        own = Tiles(1, block_n, 4, 2) if problem.group * problem.seqlen_q == 1 else Tiles(16, block_n, 8, 2)
    else:
        own = Tiles(16, block_n, 4, 3 if has_large_shared_memory(problem) else 2)
    return tuned_tiles("decoding v2", problem) or own


def has_large_shared_memory(problem: AttentionProblem) -> bool:
    return detect_gpu(problem.q.device).shared_memory >= 160 * 1024


def rows_of_a_tile(problem: AttentionProblem, least: int) -> int:
    """The rows that share a KV head, or some of them, filled up to what tl.dot takes. A single one is up to `least`."""
    rows = problem.group * problem.seqlen_q
    return least if rows == 1 else min(MOST_ROWS[problem.dtype.itemsize], max(16, 1 << (rows - 1).bit_length()))


def splits_for(problem: AttentionProblem, block_n: int) -> int:
    """As many splits as make whole waves of programs, of which three or two are beside each other on an SM."""
    row_blocks = cdiv(problem.group * problem.seqlen_q, rows_of_a_tile(problem, 1))
    slots = detect_gpu(problem.q.device).sm_count * (3 if has_large_shared_memory(problem) else 2)
    programs = problem.batch * problem.heads_kv * row_blocks
    return splits_of_whole_waves(programs, slots, cdiv(problem.seqlen_k, block_n))


def call_flash_decoding_v2(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D]: see decoding.flash_decoding."""
    problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries,
    )  # fmt: skip
    p, (block_m, block_n, num_warps, num_stages) = problem, tiles or tiles_for(problem)
    block_m, splits = rows_of_a_tile(p, block_m), p.num_splits or splits_for(p, block_n)
    queries, row_blocks = p.batch * p.heads_q * p.seqlen_q, cdiv(p.group * p.seqlen_q, block_m)
    part_out = torch.empty(queries, splits, p.head_dim, dtype=torch.float32, device=p.q.device)
    part_lse = torch.empty(queries, splits, dtype=torch.float32, device=p.q.device)
    launch(
        split_kernel, (p.batch * p.heads_kv * row_blocks, splits), p.q.device, p.q, p.k, p.v, part_out, part_lse,
        p.seqlens_k, p.q.stride(), p.k.stride(), p.v.stride(), p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, splits,
        p.scale, HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), BLOCK_M=block_m, BLOCK_N=block_n, STAGES=num_stages,
        num_warps=num_warps,
    )  # fmt: skip
    launch(
        merge_kernel, (queries,), p.q.device, part_out, part_lse, p.out, p.lse, p.out.stride(), p.heads_q, p.seqlen_q,
        splits, HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), PARTS=PARTS, num_warps=4,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=2, title="a KV head once",
    idea="All queries that share a KV head go through one tile, on the tensor cores: the cache is read once.",
    parent=1, requires=Requires(), call=call_flash_decoding_v2, kernels=(split_kernel, merge_kernel), tiles=tiles_for,
    most_queries=16,
)  # fmt: skip
