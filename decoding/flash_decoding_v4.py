"""Flash decoding v4: real caches.

Idea: a cache is where its keys are. Pages anywhere, found by a block table; keys that begin late, by left padding or a
  window; new keys, which the program that reads them first writes.
Changed: the splits share the keys that some query sees. With pages, the addresses of each block are computed from page
  numbers that arrive in two further stages of the pipeline, so that no load waits for another. A page that does not
  exist is not read, and makes its sequence NaN. Without pages the loop is v3's.
Expect: without pages v3's time. With pages 643 instructions a block of 64 keys where v3 has 415 (D=128), hidden behind
  the memory while three programs share an SM: 3 % slower. A window costs what its own keys cost.
Limits: pages of 64 and more would need one number a block; a ragged batch is still cut as its longest sequence is.
"""

import torch
import triton
import triton.language as tl

from common.caches import append_rows, first_visible_key, page_rows, pages_are_missing, pages_of
from common.hardware import detect_gpu
from common.launch import Tiles, block_d, cdiv, launch, tuned_tiles
from common.lineage import Requires, Version
from common.masking import sequence_lengths
from common.merge import merge_parts
from common.problem import AttentionProblem
from common.split_keys import (
    has_large_shared_memory,
    has_register_limit,
    merge_tile,
    parts_of,
    rows_of_a_tile,
    splits_for,
    store_rows,
)
from common.tickets import tickets

REGISTERS = 160  # a thread, so that three programs of four warps have room on an SM, whatever the merge would like
REGISTERS_PAGED = 168  # the most of which that is true


@triton.jit(do_not_specialize=["seqlen_k", "num_splits", "num_pages", "window_left"])
def split_kernel(
    Q, K, V,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch or num_pages, heads_kv, keys, HEAD_DIM] twice
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    Parts,  # float32 [batch * heads_kv, num_splits, rows, HEAD_DIM], then the same without HEAD_DIM; None for one split
    Tickets,  # int32 [programs of a split], zeros
    seqlens_k, starts,  # int32 [batch] or None
    BlockTable,  # int32 [batch, pages of a sequence] or None
    KNew, VNew,  # [batch, heads_kv, seqlen_q, HEAD_DIM] or None
    stride_q, stride_k, stride_v, stride_o,  # (batch or page, head, row, 1), in elements
    stride_k_new, stride_v_new, stride_table,  # the like, or None; of a sequence, in entries
    heads_q, heads_kv, seqlen_q, seqlen_k, num_splits, scale, window_left, num_pages,
    keys_per_split,  # int or None: equal shares
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PAGE_SIZE: tl.constexpr, NEW_ROWS: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # of k and v
):  # fmt: skip
    """Some of the rows that share a KV head over one split of its keys; the last split to finish merges all."""
    rows = heads_q // heads_kv * seqlen_q  # head by head, all queries of each
    row_blocks = tl.cdiv(rows, BLOCK_M)
    kv_head = tl.program_id(0) // row_blocks
    start_m = tl.program_id(0) % row_blocks * BLOCK_M
    off_b = kv_head // heads_kv
    off_hk = kv_head % heads_kv
    _, len_k = sequence_lengths(None, seqlens_k, off_b, 1, seqlen_k)
    first = first_visible_key(starts, off_b, len_k, seqlen_q, window_left)  # v4
    if keys_per_split is None:  # v4
        keys_per_split = tl.cdiv(len_k - first, num_splits)
    lo = first + tl.program_id(1) * keys_per_split  # v4
    hi = tl.minimum(lo + keys_per_split, len_k)

    table = BlockTable
    if BlockTable is not None:  # v4
        table += off_b.to(tl.int64) * stride_table
    if KNew is not None and hi + seqlen_q > len_k:  # v4: before anyone reads them; all row blocks write the same
        write_lo = tl.where(tl.program_id(1) == 0, 0, lo)  # the first split, also those that nobody sees
        append_rows(
            K, KNew, stride_k, stride_k_new, table, off_b, off_hk, write_lo, hi, len_k, seqlen_q, num_pages,
            HEAD_DIM, BLOCK_D, PAGE_SIZE, NEW_ROWS,
        )  # fmt: skip
        append_rows(
            V, VNew, stride_v, stride_v_new, table, off_b, off_hk, write_lo, hi, len_k, seqlen_q, num_pages,
            HEAD_DIM, BLOCK_D, PAGE_SIZE, NEW_ROWS,
        )  # fmt: skip
        tl.debug_barrier()

    offs_m = start_m + tl.arange(0, BLOCK_M)
    off_h = off_hk * (heads_q // heads_kv) + offs_m // seqlen_q
    last_key = tl.minimum(offs_m % seqlen_q + len_k - seqlen_q, hi - 1)  # causal; [BLOCK_M]
    offs_n = lo + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_q = (offs_m < rows)[:, None] & mask_d[None, :]
    Q += off_b.to(tl.int64) * stride_q[0]
    q_rows = Q + off_h.to(tl.int64) * stride_q[1] + (offs_m % seqlen_q).to(tl.int64) * stride_q[2]  # [BLOCK_M]
    if BlockTable is not None:  # v4
        K += off_hk.to(tl.int64) * stride_k[1]
        V += off_hk.to(tl.int64) * stride_v[1]
    else:
        K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1] + lo.to(tl.int64) * stride_k[2]
        V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1] + lo.to(tl.int64) * stride_v[2]
        k_ptrs = K + tl.arange(0, BLOCK_N)[:, None] * stride_k[2] + offs_d[None, :]
        v_ptrs = V + tl.arange(0, BLOCK_N)[:, None] * stride_v[2] + offs_d[None, :]
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]

    KEYS: tl.constexpr = 0 if BLOCK_M == 1 else 1  # the axis of the scores that keys run along
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        here = offs_n < hi
        if BlockTable is not None:  # v4
            pages = pages_of(table, offs_n, hi, num_pages, PAGE_SIZE)  # [BLOCK_N]
            here = pages >= 0
            k_rows = page_rows(0, stride_k, pages, offs_n, PAGE_SIZE)
            v_rows = k_rows if SAME_STRIDES else page_rows(0, stride_v, pages, offs_n, PAGE_SIZE)
            k_ptrs = K + (k_rows[:, None] + offs_d[None, :])
            v_ptrs = V + (v_rows[:, None] + offs_d[None, :])
        mask = here[:, None] & mask_d[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        if BLOCK_M == 1:
            qk = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None]  # [BLOCK_N, 1]
            visible = (offs_n < hi)[:, None]
        else:
            qk = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            visible = offs_n[None, :] <= last_key[:, None]
            if window_left is not None:  # v4
                visible &= offs_n[None, :] >= (offs_m % seqlen_q + len_k - seqlen_q - window_left)[:, None]
        qk = tl.where(visible, qk * scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, KEYS))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query may be ahead of all keys so far
        p = tl.exp(qk - tl.expand_dims(m_safe, KEYS))
        alpha = tl.exp(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, KEYS)
        acc = acc * alpha[:, None]
        if BLOCK_M == 1:
            acc += tl.sum(p * v.to(tl.float32), 0)[None, :]
        else:
            acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
        offs_n += BLOCK_N
        if BlockTable is None:
            k_ptrs += BLOCK_N * stride_k[2]
            v_ptrs += BLOCK_N * stride_v[2]

    if BlockTable is not None:  # v4: said aloud, where nobody could refuse it
        l_i = tl.where(pages_are_missing(table, lo, hi, num_pages, PAGE_SIZE), float("nan"), l_i)
    out = tl.where(l_i == 0.0, 0.0, 1.0 / l_i)[:, None] * acc
    lse = m_i + tl.log(l_i)  # -inf for a row without keys
    first_row = kv_head.to(tl.int64) * rows
    Out += off_b.to(tl.int64) * stride_o[0] + (off_hk * (heads_q // heads_kv)).to(tl.int64) * stride_o[1]
    if LSE is not None:
        LSE += first_row
    if Parts is None:  # one split has it all
        store_rows(Out, LSE, out, lse, offs_m, rows, seqlen_q, stride_o, HEAD_DIM, BLOCK_D)
    else:
        PartLSE = Parts + tl.num_programs(0).to(tl.int64) // row_blocks * num_splits * rows * HEAD_DIM
        PartLSE += first_row * num_splits
        Parts += first_row * num_splits * HEAD_DIM
        part = tl.program_id(1).to(tl.int64) * rows + offs_m  # [BLOCK_M]
        tl.store(Parts + part[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask_q)
        tl.store(PartLSE + part, lse, mask=offs_m < rows)
        tl.debug_barrier()  # every warp has stored its share before the ticket is drawn, which publishes them all
        ticket = tl.atomic_add(Tickets + tl.program_id(0), 1, sem="acq_rel")
        if ticket == num_splits - 1:  # the last one: all parts are there
            tl.store(Tickets + tl.program_id(0), 0)  # for the next call
            for start in range(start_m, tl.minimum(start_m + BLOCK_M, rows), ROWS):
                offs_r = start + tl.arange(0, ROWS)
                whole, lses = merge_parts(Parts, PartLSE, offs_r, rows, num_splits, HEAD_DIM, BLOCK_D, ROWS, PARTS)
                store_rows(Out, LSE, whole, lses, offs_r, rows, seqlen_q, stride_o, HEAD_DIM, BLOCK_D)


def tiles_for(problem: AttentionProblem) -> Tiles:
    """About 16 KB of K and as much of V a block, in two buffers where shared memory is large."""
    block_n = max(16, min(128, 16384 // (block_d(problem) * problem.dtype.itemsize)))
    paged, large = problem.block_table is not None, has_large_shared_memory(problem)
    if problem.dtype == torch.float32:
        warps = 4 if large and not paged else 8  # v4: which have room for the addresses
        own = Tiles(1, block_n, warps, 2) if problem.group * problem.seqlen_q == 1 else Tiles(16, block_n, 8, 2)
    elif paged and block_n > 64:  # v4: the like, in smaller blocks, of which more are on the way
        own = Tiles(16, 64, 4, 5 if large else 3)
    else:
        own = Tiles(16, block_n, 4, 3 if large else 2)
    return tuned_tiles("decoding v4", problem) or own


def stages_of_pages(problem: AttentionProblem) -> int:
    """v4: further stages, in which page numbers arrive, so that as many blocks of keys as without pages are on the way.

    None on AMD's GPUs, whose shared memory is full.
    """
    return 2 if problem.block_table is not None and detect_gpu(problem.q.device).backend != "hip" else 0


def call_flash_decoding_v4(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None, block_table=None,
    window=None, starts=None, k_new=None, v_new=None, check_table=False, deterministic=False,
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], over k, v [B, Hkv, Sk, D] or pages of them,
    [pages, Hkv, page_size, D]: see decoding.flash_decoding."""
    problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries, block_table=block_table, window=window, starts=starts, k_new=k_new,
        v_new=v_new, check_table=check_table, deterministic=deterministic,
    )  # fmt: skip
    p, (block_m, block_n, num_warps, num_stages) = problem, tiles or tiles_for(problem)
    block_m, splits = rows_of_a_tile(p, block_m), p.num_splits or splits_for(p, block_n)
    programs = p.batch * p.heads_kv * cdiv(p.group * p.seqlen_q, block_m)
    registers = REGISTERS if p.block_table is None else REGISTERS_PAGED
    limit = {"maxnreg": registers} if block_m == 16 and num_warps == 4 and has_register_limit(p) else {}
    table, k_new, v_new = p.block_table, p.k_new, p.v_new
    launch(
        split_kernel, (programs, splits), p.q.device, p.q, p.k, p.v, p.out, p.lse, parts_of(p, splits),
        tickets(programs, p.q.device), p.seqlens_k, p.starts, table, k_new, v_new, p.q.stride(), p.k.stride(),
        p.v.stride(), p.out.stride(), *(None if x is None else x.stride() for x in (k_new, v_new)),
        None if table is None else table.stride(0), p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, splits, p.scale,
        p.window_left, p.k.shape[0], p.keys_per_split, HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), BLOCK_M=block_m,
        BLOCK_N=block_n, STAGES=num_stages + stages_of_pages(p), PAGE_SIZE=p.page_size,
        NEW_ROWS=1 << (p.seqlen_q - 1).bit_length(), SAME_STRIDES=p.k.stride() == p.v.stride(), num_warps=num_warps,
        **merge_tile(p, num_warps), **limit,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=4, title="real caches",
    idea="Pages found by a block table, padding, a window, and new keys written by the program that reads them.",
    parent=3, requires=Requires(), call=call_flash_decoding_v4, kernels=(split_kernel,), tiles=tiles_for,
    most_queries=16, takes=("block_table", "window", "starts", "k_new", "v_new", "check_table", "deterministic"),
)  # fmt: skip
