"""Flash decoding v5: FP8 caches.

Idea: half the bytes. Keys and values are float8, with a factor for each head or block of keys, and become float16 on
  their way to the tensor cores.
Changed: rows are loaded two columns at a time: 16-bit numbers can be read as the tensor cores want them, transposed
  too, where of 8-bit ones each is a load. Then they are even and odd columns: two products make the scores, two halves
  the output, joined behind the loop. Factors join the scale, the weights or the output. 16-bit caches go v4's way.
Expect: 1.9 times v4's speed where the memory is the limit. 64 keys (D=128) take a warp 438 instructions, v4 415: of an
  SM's four schedulers more than half the time that the memory leaves, 815 cycles; in pages 556, two thirds.
Limits: factors of blocks cost 170 instructions more, a maximum among them. Odd widths and strides are loaded bytewise.
"""

import torch
import triton
import triton.language as tl

from common.caches import append_rows, first_visible_key, page_rows, pages_are_missing, pages_of
from common.float8 import columns_of_pairs, descales_of, power_of_two_below
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
    DescaleK, DescaleV,  # float32 [batch, heads_kv], or [batch or page, heads_kv, blocks of keys], or None
    stride_q, stride_k, stride_v, stride_o,  # (batch or page, head, row, 1), in elements
    stride_k_new, stride_v_new, stride_table,  # the like, or None; of a sequence, in entries
    heads_q, heads_kv, seqlen_q, seqlen_k, num_splits, scale, window_left, num_pages,
    keys_per_split,  # int or None: equal shares
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PAGE_SIZE: tl.constexpr, NEW_ROWS: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # of k and v
    SCALED_K: tl.constexpr, SCALED_V: tl.constexpr,  # keys of a descale, 0 for one a head
    PAIRS: tl.constexpr, PTX: tl.constexpr,  # k and v are loaded two columns at a time; conversions are NVIDIA's
):  # fmt: skip
    """Some of the rows that share a KV head over one split of its keys; the last split to finish merges all."""
    rows = heads_q // heads_kv * seqlen_q  # head by head, all queries of each
    row_blocks = tl.cdiv(rows, BLOCK_M)
    kv_head = tl.program_id(0) // row_blocks
    start_m = tl.program_id(0) % row_blocks * BLOCK_M
    off_b = kv_head // heads_kv
    off_hk = kv_head % heads_kv
    _, len_k = sequence_lengths(None, seqlens_k, off_b, 1, seqlen_k)
    first = first_visible_key(starts, off_b, len_k, seqlen_q, window_left)
    if keys_per_split is None:
        keys_per_split = tl.cdiv(len_k - first, num_splits)
    lo = first + tl.program_id(1) * keys_per_split
    hi = tl.minimum(lo + keys_per_split, len_k)

    table = BlockTable
    if BlockTable is not None:
        table += off_b.to(tl.int64) * stride_table
    if KNew is not None and hi + seqlen_q > len_k:  # before anyone reads them; all row blocks write the same
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
    FP8: tl.constexpr = K.dtype.element_ty.primitive_bitwidth == 8
    FORMAT: tl.constexpr = V.dtype.element_ty
    WIDTH: tl.constexpr = 2 if PAIRS else 1  # v5: columns of K and V that are one number
    offs_c = tl.arange(0, BLOCK_D // WIDTH)
    mask_c = offs_c < HEAD_DIM // WIDTH
    Q += off_b.to(tl.int64) * stride_q[0]
    q_rows = Q + off_h.to(tl.int64) * stride_q[1] + (offs_m % seqlen_q).to(tl.int64) * stride_q[2]  # [BLOCK_M]
    if PAIRS:  # v5
        K, V = K.to(tl.pointer_type(tl.uint16)), V.to(tl.pointer_type(tl.uint16))
        stride_k = stride_k[0] // 2, stride_k[1] // 2, stride_k[2] // 2
        stride_v = stride_v[0] // 2, stride_v[1] // 2, stride_v[2] // 2
    if BlockTable is not None:
        K += off_hk.to(tl.int64) * stride_k[1]
        V += off_hk.to(tl.int64) * stride_v[1]
    else:
        K += off_b.to(tl.int64) * stride_k[0] + off_hk.to(tl.int64) * stride_k[1] + lo.to(tl.int64) * stride_k[2]
        V += off_b.to(tl.int64) * stride_v[0] + off_hk.to(tl.int64) * stride_v[1] + lo.to(tl.int64) * stride_v[2]
        k_ptrs = K + tl.arange(0, BLOCK_N)[:, None] * stride_k[2] + offs_c[None, :]
        v_ptrs = V + tl.arange(0, BLOCK_N)[:, None] * stride_v[2] + offs_c[None, :]
    mask_q = (offs_m < rows)[:, None] & mask_c[None, :]
    q = tl.load(q_rows[:, None] + WIDTH * offs_c[None, :], mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D // WIDTH]
    q_odd = q
    if PAIRS:  # v5
        q_odd = tl.load(q_rows[:, None] + 2 * offs_c[None, :] + 1, mask=mask_q, other=0.0)
    unit = tl.full([BLOCK_M], 1.0, tl.float32)
    if FP8 and q.dtype == tl.bfloat16:  # v5: float8 becomes float16 in one step, bfloat16 in several
        unit = power_of_two_below(tl.maximum(tl.max(tl.abs(q), 1), tl.max(tl.abs(q_odd), 1)))
        q = (q.to(tl.float32) / unit[:, None]).to(tl.float16)
        q_odd = (q_odd.to(tl.float32) / unit[:, None]).to(tl.float16)
    scales = unit * scale
    if DescaleK is not None and SCALED_K == 0:  # v5
        scales *= tl.load(DescaleK + kv_head)

    KEYS: tl.constexpr = 0 if BLOCK_M == 1 else 1  # the axis of the scores that keys run along
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D // WIDTH], tl.float32)
    acc_odd = acc  # v5: of the odd columns, where acc has the even ones
    for _ in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        here, pages = offs_n < hi, None
        if BlockTable is not None:
            pages = pages_of(table, offs_n, hi, num_pages, PAGE_SIZE)  # [BLOCK_N]
            here = pages >= 0
            k_rows = page_rows(0, stride_k, pages, offs_n, PAGE_SIZE)
            v_rows = k_rows if SAME_STRIDES else page_rows(0, stride_v, pages, offs_n, PAGE_SIZE)
            k_ptrs = K + (k_rows[:, None] + offs_c[None, :])
            v_ptrs = V + (v_rows[:, None] + offs_c[None, :])
        mask = here[:, None] & mask_c[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D // WIDTH]
        v = tl.load(v_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D // WIDTH]
        k_odd, v_odd = k, v
        if PAIRS:  # v5
            k, k_odd = columns_of_pairs(k, FORMAT, PTX)
            v, v_odd = columns_of_pairs(v, FORMAT, PTX)
        elif FP8:
            k, v = k.to(tl.float16), v.to(tl.float16)
        if BLOCK_M == 1:
            qk = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None]  # [BLOCK_N, 1]
            visible = (offs_n < hi)[:, None]
        else:
            qk = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if PAIRS:  # v5
                qk = tl.dot(q_odd, k_odd.T, qk)
            visible = offs_n[None, :] <= last_key[:, None]
            if window_left is not None:
                visible &= offs_n[None, :] >= (offs_m % seqlen_q + len_k - seqlen_q - window_left)[:, None]
        qk *= tl.expand_dims(scales, KEYS)
        if SCALED_K != 0:  # v5
            k_scales = descales_of(
                DescaleK, off_b, heads_kv, off_hk, pages, offs_n, here, seqlen_k, SCALED_K, PAGE_SIZE
            )  # fmt: skip
            qk *= tl.expand_dims(k_scales, 1 - KEYS)
        qk = tl.where(visible, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, KEYS))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query may be ahead of all keys so far
        p = tl.exp(qk - tl.expand_dims(m_safe, KEYS))
        alpha = tl.exp(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, KEYS)
        largest = 1.0
        if SCALED_V != 0:  # v5: weights times factors stay below 1, as float16 wants them
            v_scales = descales_of(
                DescaleV, off_b, heads_kv, off_hk, pages, offs_n, here, seqlen_k, SCALED_V, PAGE_SIZE
            )  # fmt: skip
            largest = tl.max(v_scales, 0)
            p *= tl.expand_dims(v_scales / tl.where(largest == 0.0, 1.0, largest), 1 - KEYS)
        acc = weigh(acc * alpha[:, None], p, v, largest, BLOCK_M, SCALED_V)
        if PAIRS:  # v5
            acc_odd = weigh(acc_odd * alpha[:, None], p, v_odd, largest, BLOCK_M, SCALED_V)
        m_i = m_new
        offs_n += BLOCK_N
        if BlockTable is None:
            k_ptrs += BLOCK_N * stride_k[2]
            v_ptrs += BLOCK_N * stride_v[2]

    if PAIRS:  # v5
        acc = tl.join(acc, acc_odd).reshape(BLOCK_M, BLOCK_D)
    if DescaleV is not None and SCALED_V == 0:  # v5
        acc *= tl.load(DescaleV + kv_head)
    if BlockTable is not None:  # said aloud, where nobody could refuse it
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
        mask_out = (offs_m < rows)[:, None] & mask_d[None, :]
        tl.store(Parts + part[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask_out)
        tl.store(PartLSE + part, lse, mask=offs_m < rows)
        tl.debug_barrier()  # every warp has stored its share before the ticket is drawn, which publishes them all
        ticket = tl.atomic_add(Tickets + tl.program_id(0), 1, sem="acq_rel")
        if ticket == num_splits - 1:  # the last one: all parts are there
            tl.store(Tickets + tl.program_id(0), 0)  # for the next call
            for start in range(start_m, tl.minimum(start_m + BLOCK_M, rows), ROWS):
                offs_r = start + tl.arange(0, ROWS)
                whole, lses = merge_parts(Parts, PartLSE, offs_r, rows, num_splits, HEAD_DIM, BLOCK_D, ROWS, PARTS)
                store_rows(Out, LSE, whole, lses, offs_r, rows, seqlen_q, stride_o, HEAD_DIM, BLOCK_D)


@triton.jit
def weigh(acc, p, v, largest, BLOCK_M: tl.constexpr, SCALED: tl.constexpr):
    """acc + p v, with SCALED acc + p v largest; [BLOCK_M, columns]. One row has p [BLOCK_N, 1]."""
    if BLOCK_M == 1:
        acc += tl.sum(p * v.to(tl.float32), 0)[None, :] * largest
    elif SCALED:
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee") * largest
    else:
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc


def tiles_for(problem: AttentionProblem) -> Tiles:
    """About 16 KB of K and as much of V a block, in two buffers where shared memory is large."""
    block_n = max(16, min(128, 16384 // (block_d(problem) * problem.dtype.itemsize)))
    paged, large = problem.block_table is not None, has_large_shared_memory(problem)
    if problem.dtype == torch.float32:
        warps = 4 if large and not paged else 8  # which have room for the addresses
        own = Tiles(1, block_n, warps, 2) if problem.group * problem.seqlen_q == 1 else Tiles(16, block_n, 8, 2)
    elif problem.fp8 or (paged and block_n > 64):  # v5: as many bytes on the way, in smaller blocks
        many = large and has_register_limit(problem)  # the compiler for sm_100 spills two numbers with five stages
        own = Tiles(16, min(block_n, 64) if paged else block_n, 4, 5 if many else 3)
    else:
        own = Tiles(16, block_n, 4, 3 if large else 2)
    return tuned_tiles("decoding v5", problem) or own


def stages_of_pages(problem: AttentionProblem) -> int:
    """Further stages, in which page numbers arrive, so that as many blocks of keys as without pages are on the way.

    None on AMD's GPUs, whose shared memory is full.
    """
    return 2 if problem.block_table is not None and detect_gpu(problem.q.device).backend != "hip" else 0


def has_pairs(problem: AttentionProblem, block_m: int) -> bool:
    """v5: whether two columns of k and of v are one number, on an even address."""
    p = problem
    if not p.fp8 or block_m == 1 or p.head_dim % 2:
        return False
    return not any(x % 2 for y in (p.k, p.v) for x in (y.data_ptr(), *y.stride()[:3]))


def call_flash_decoding_v5(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None, block_table=None,
    window=None, starts=None, k_new=None, v_new=None, check_table=False, deterministic=False,
    descale_k=None, descale_v=None,
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], over k, v [B, Hkv, Sk, D] or pages of them,
    [pages, Hkv, page_size, D], also float8: see decoding.flash_decoding."""
    problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries, block_table=block_table, window=window, starts=starts, k_new=k_new,
        v_new=v_new, check_table=check_table, deterministic=deterministic, descale_k=descale_k, descale_v=descale_v,
        fp8_caches=True,
    )  # fmt: skip
    p, (block_m, block_n, num_warps, num_stages) = problem, tiles or tiles_for(problem)
    block_m, splits = rows_of_a_tile(p, block_m), p.num_splits or splits_for(p, block_n)
    programs = p.batch * p.heads_kv * cdiv(p.group * p.seqlen_q, block_m)
    registers = REGISTERS if p.block_table is None else REGISTERS_PAGED
    limit = {"maxnreg": registers} if block_m == 16 and num_warps == 4 and has_register_limit(p) else {}
    table, k_new, v_new, (keys_k, keys_v) = p.block_table, p.k_new, p.v_new, p.keys_of_descales
    launch(
        split_kernel, (programs, splits), p.q.device, p.q, p.k, p.v, p.out, p.lse, parts_of(p, splits),
        tickets(programs, p.q.device), p.seqlens_k, p.starts, table, k_new, v_new, p.descale_k,
        p.descale_v, p.q.stride(), p.k.stride(), p.v.stride(), p.out.stride(),
        *(None if x is None else x.stride() for x in (k_new, v_new)),
        None if table is None else table.stride(0), p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, splits, p.scale,
        p.window_left, p.k.shape[0], p.keys_per_split, HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), BLOCK_M=block_m,
        BLOCK_N=block_n, STAGES=num_stages + stages_of_pages(p), PAGE_SIZE=p.page_size,
        NEW_ROWS=1 << (p.seqlen_q - 1).bit_length(), SAME_STRIDES=p.k.stride() == p.v.stride(), SCALED_K=keys_k,
        SCALED_V=keys_v, PAIRS=has_pairs(p, block_m), PTX=detect_gpu(p.q.device).backend == "cuda", num_warps=num_warps,
        **merge_tile(p, num_warps), **limit,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=5, title="FP8 caches",
    idea="Keys and values are float8, half the bytes, and become float16 on their way to the tensor cores.",
    parent=4, requires=Requires(e5m2_capability=(8, 0), e5m2_amd=True), call=call_flash_decoding_v5,
    kernels=(split_kernel,), tiles=tiles_for, fp8=True, most_queries=16,
    takes=(
        "block_table", "window", "starts", "k_new", "v_new", "check_table", "deterministic", "descale_k", "descale_v",
    ),
)  # fmt: skip
