"""Flash decoding v10: old keys are read before the kernel ahead has ended.

Idea: in a step of generation the kernel ahead writes the newest key of each sequence, and no other. A caller who says
  so (fresh_keys=1) lets the loader take all blocks but those at once, under the end of that kernel.
Changed: griddepcontrol.wait stands before the blocks with fresh keys, and no longer before the first; queries, scratch
  memory and the output wait as before. Where the ring is full before that, the next blocks come to the L2. Without
  fresh_keys it is v8.
Expect: memory has work while the step before merges its parts: 11.3 to 10.6 us at 34 MB, 63.6 to 62.6 at 268 MB; more
  where lengths are given, by which v8 divides its work after the wait.
Limits: v8's.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from common.equal_pieces import (
    blocks_of_a_piece,
    end_of_keys,
    item_at,
    keys_in_reach,
    lengths_for,
    next_sequence,
    piece,
    pieces_for,
    sharers,
    why_no_pieces,
)
from common.exponent import LOG2_E
from common.hopper import (
    bring_to_l2,
    descriptor,
    fill,
    let_next_kernel_start,
    refuse,
    release,
    wait_for_kernel_before,
    wait_full,
    zero_rows,
)
from common.launch import Tiles, block_d, cdiv, launch, tuned_tiles
from common.lineage import Requires, Version
from common.paged_ring import PANEL, allocate_blocks, fill_from_pages, numbers_of_pages, pages_are_missing
from common.parts import is_last, merge_parts, row_offsets, rows_of_parts, store_part, store_rows
from common.problem import AttentionProblem
from common.tickets import tickets


@gluon.jit
def producer(
    k_desc, v_desc, caches, k_ring, v_ring, work, batch, items, row_blocks, keys, pages, fresh_keys,
    BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    start, end, total, off_b, base = work
    table, stride_table, num_pages = pages
    i = start * 0
    if fresh_keys is None and table is None and keys[1] is None and keys[2] is None:
        if start < end:
            K, V, stride_k, stride_v = caches
            b, item, begin, _, _ = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
            _, _, lo, _ = keys_in_reach(b, batch, keys, BLOCK_N)
            start_n = (lo + start - begin) * BLOCK_N
            bring_to_l2(K, stride_k, b, item // row_blocks, start_n, keys[0], BLOCK_N, HEAD_DIM)
            bring_to_l2(V, stride_v, b, item // row_blocks, start_n, keys[0], BLOCK_N, HEAD_DIM)
    while start < end:
        b, item, begin, last, finish = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
        _, len_k, lo, _ = keys_in_reach(b, batch, keys, BLOCK_N)
        stop = gl.minimum(finish, end)
        for j in range(start, end_of_keys(start, stop, last, keys)):
            start_n = (lo + j - begin) * BLOCK_N
            if fresh_keys is None:
                wait_for_kernel_before()
            elif start_n + BLOCK_N > len_k - fresh_keys:  # v10: all other keys are as they stay
                wait_for_kernel_before()
            if table is None:
                if AHEAD > 0:
                    if i == STAGES:  # v10: the ring is full, and nobody reads it before the kernel ahead has ended
                        K, V, stride_k, stride_v = caches
                        for more in range(j, gl.minimum(j + AHEAD, stop)):
                            more_n = (lo + more - begin) * BLOCK_N
                            bring_to_l2(K, stride_k, b, item // row_blocks, more_n, keys[0], BLOCK_N, HEAD_DIM)
                            bring_to_l2(V, stride_v, b, item // row_blocks, more_n, keys[0], BLOCK_N, HEAD_DIM)
                fill(k_ring, k_desc, [b, item // row_blocks, start_n, 0], i, STAGES)
                fill(v_ring, v_desc, [b, item // row_blocks, start_n, 0], i, STAGES)
            else:
                row = table + b.to(gl.int64) * stride_table
                found = numbers_of_pages(row, start_n, len_k, num_pages, BLOCK_N, PAGE_SIZE)
                fill_from_pages(k_ring, k_desc, found, item // row_blocks, start_n % PAGE_SIZE, i, STAGES)
                fill_from_pages(v_ring, v_desc, found, item // row_blocks, start_n % PAGE_SIZE, i, STAGES)
            i += 1
        start = stop
        off_b, base = next_sequence(start, off_b, base, finish, item, items, keys)


@gluon.jit
def step(
    i, start_n, q, p_smem, acc, m_i, l_i, first, len_k, last_key, k_ring, v_ring, scale_log2, keys, STAGES: gl.constexpr
):
    """Block i of the ring, keys start_n...: S^T = K Q^T, softmax down the columns, O^T += V^T P^T."""
    BLOCK_N: gl.constexpr = l_i.shape[0]
    WIDTH: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = acc.type.layout
    _, seqlens_k, starts, window_left, _ = keys
    k = k_ring[0].index(i % STAGES).reshape([BLOCK_N, WIDTH])
    v = v_ring[0].index(i % STAGES).reshape([BLOCK_N, WIDTH])
    wait_full(k_ring, i, STAGES)
    qk = warpgroup_mma(k, q.permute((1, 0)), gl.zeros_like(l_i), use_acc=False, is_async=True)  # [keys, rows]
    qk = warpgroup_mma_wait(0, deps=[qk])
    release(k_ring, i, STAGES)
    offs_n = gl.expand_dims(start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT)), 1)
    visible = offs_n <= last_key
    if starts is not None or window_left is not None:
        visible = visible & (offs_n >= first)
    if window_left is not None:
        visible = visible & (offs_n >= last_key - window_left)
    qk = gl.where(visible, qk * scale_log2, -float("inf"))
    m_new = gl.maximum(m_i, gl.max(qk, 0))
    m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)  # a query may be ahead of all keys so far
    p = gl.exp2(qk - gl.expand_dims(m_safe, 0))
    alpha = gl.expand_dims(gl.exp2(m_i - m_safe), 0)
    wait_full(v_ring, i, STAGES)
    if seqlens_k is not None or starts is not None or window_left is not None:
        if (start_n + BLOCK_N > len_k) | (start_n < first):  # what lies there may be NaN, which times 0 is NaN
            for r in gl.static_range(0, BLOCK_N, 16):
                zero_rows(v.slice(r, 16), first - start_n - r, len_k - start_n - r)
    p_smem.store(gl.permute(p.to(p_smem.dtype), (1, 0)))
    fence_async_shared()
    acc = warpgroup_mma(v.permute((1, 0)), p_smem.permute((1, 0)), acc * alpha, is_async=True)  # [WIDTH, rows]
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(v_ring, i, STAGES)
    return acc, m_new, l_i * alpha + p


@gluon.jit
def consumer(
    args, k_ring, v_ring, work, batch, items, row_blocks, keys, pages, PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    Q, Out, LSE, Parts, Tickets, stride_q, stride_o, group, scale_log2 = args
    table, stride_table, num_pages = pages
    seqlen_q = keys[4]
    rows = group * seqlen_q
    start, end, total, off_b, base = work
    BLOCK_N: gl.constexpr = k_ring[0].shape[3]
    WIDTH: gl.constexpr = k_ring[0].shape[4]
    dtype: gl.constexpr = Q.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])  # of S^T and O^T
    q_smem = gl.allocate_shared_memory(dtype, [N, WIDTH], gl.NVMMASharedLayout.get_default_for([N, WIDTH], dtype))
    p_smem = gl.allocate_shared_memory(dtype, [N, BLOCK_N], gl.NVMMASharedLayout.get_default_for([N, BLOCK_N], dtype))
    offs_r = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    i = start * 0
    part = gl.program_id(0) * 2
    wait_for_kernel_before()  # also where there is nothing to do, or the kernel after this one came too early
    while start < end:
        b, item, begin, last, finish = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
        first, len_k, lo, _ = keys_in_reach(b, batch, keys, BLOCK_N)
        stop = gl.minimum(finish, end)
        until = end_of_keys(start, stop, last, keys)
        p_first, p_last, slot = sharers(begin, finish, total)  # early: nobody waits for it here
        first_head, start_m = item // row_blocks * group, item % row_blocks * N
        offsets, mask = row_offsets(stride_q, b, first_head, start_m, rows, seqlen_q, HEAD_DIM, N, WIDTH)
        q_smem.store(gl.load(Q + offsets, mask=mask, other=0.0))
        fence_async_shared()
        missing = start < 0
        if table is not None:  # said aloud, where nobody could refuse it; looked at while the first block comes
            here, gone = (lo + start - begin) * BLOCK_N, (lo + stop - begin) * BLOCK_N
            row = table + b.to(gl.int64) * stride_table
            missing = pages_are_missing(row, gl.maximum(here, first), gl.minimum(gone, len_k), num_pages, PAGE_SIZE)
        last_key = gl.expand_dims((start_m + offs_r) % seqlen_q + (len_k - seqlen_q), 0)  # causal; [1, N]
        m_i = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
        l_i = gl.zeros([BLOCK_N, N], gl.float32, LAYOUT)
        acc = gl.zeros([WIDTH, N], gl.float32, LAYOUT)
        for j in range(start, until):
            acc, m_i, l_i = step(
                i + j - start, (lo + j - begin) * BLOCK_N, q_smem, p_smem, acc, m_i, l_i, first, len_k, last_key,
                k_ring, v_ring, scale_log2, keys, STAGES,
            )  # fmt: skip
        l_i = gl.sum(l_i, 0) * gl.where(missing, float("nan"), 1.0)
        out = acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, 1.0 / l_i), 0)
        lse = m_i + gl.log2(l_i)  # -inf for a row without keys
        i += until - start
        place = (stride_o, b, items // row_blocks, item // row_blocks, start_m, rows, seqlen_q)
        if stop - start == finish - begin:
            store_rows(Out, LSE, gl.permute(out, (1, 0)), lse, *place, HEAD_DIM)
        else:
            store_part(Parts, part, out, lse, ROWS)
            if is_last(Tickets + (b * items + item), p_last - p_first + 1):
                merged, merged_lse = merge_parts(Parts, p_first, p_last, slot, ROWS, WIDTH)
                store_rows(Out, LSE, merged, merged_lse, *place, HEAD_DIM)
        part = gl.program_id(0) * 2 + 1
        start = stop
        off_b, base = next_sequence(start, off_b, base, finish, item, items, keys)


@gluon.jit(do_not_specialize=["batch", "seqlen_k", "fresh_keys"])
def split_kernel(
    Q, k_desc, v_desc,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    K, V,  # what the descriptors describe
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    Parts,  # float32 [2 * programs, ROWS, WIDTH], then the like without WIDTH
    Tickets,  # int32 [items of all sequences], zeros
    seqlens_k, starts,  # int32 [batch] or None
    BlockTable,  # int32 [batch, pages of a sequence] or None: k and v are [num_pages, heads_kv, PAGE_SIZE, HEAD_DIM]
    stride_q, stride_k, stride_v, stride_o, stride_table,  # (batch, head, row, 1), elements; of a sequence, entries
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, row_blocks, scale_log2, window_left, num_pages,
    fresh_keys,  # at each sequence's end, which the kernel before may write; None: all keys, lengths and pages too
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr, BATCH: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    k_ring = allocate_blocks(k_desc, BLOCK_N, WIDTH, STAGES)
    v_ring = allocate_blocks(v_desc, BLOCK_N, WIDTH, STAGES)
    let_next_kernel_start()
    if fresh_keys is None and (seqlens_k is not None or starts is not None):  # where the pieces depend on memory
        wait_for_kernel_before()
    keys = (seqlen_k, seqlens_k, starts, window_left, seqlen_q)
    pages = (BlockTable, stride_table, num_pages)
    items = heads_kv * row_blocks
    work = piece(batch, items, keys, BLOCK_N, BATCH)
    args = (Q, Out, LSE, Parts, Tickets, stride_q, stride_o, heads_q // heads_kv, scale_log2)
    gl.warp_specialize([
        (consumer, (args, k_ring, v_ring, work, batch, items, row_blocks, keys, pages, PAGE_SIZE, HEAD_DIM, N, ROWS,
                    STAGES)),
        (producer, (k_desc, v_desc, (K, V, stride_k, stride_v), k_ring, v_ring, work, batch, items, row_blocks, keys,
                    pages, fresh_keys, BLOCK_N, PAGE_SIZE, HEAD_DIM, STAGES, AHEAD)),
    ], [1], [56])  # fmt: skip


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Blocks of 128 keys where registers allow, two slots for K's and two for V's.

    v10: three where a piece is short, so that more of it comes under the kernel ahead: 2 % less at 34 MB, 1.4 at 134
    (D = 128), and 0.5 % more at 268 MB. Where more comes to the L2, slots of 32 KB for K and V: three, two from 537 MB.
    """
    rows, width = rows_of_a_tile(problem), max(64, block_d(problem))
    block_n = 128 if rows <= 16 and width <= 128 else 64
    blocks = blocks_of_a_piece(problem, problem.heads_kv, cdiv(problem.group * problem.seqlen_q, rows), block_n)
    slots = 3 if problem.fresh_keys is not None and blocks * block_n <= 20 * 128 else 2
    found = Tiles(rows, block_n, 4, slots * (128 // block_n if width <= 128 else 1))
    if blocks_ahead(problem):
        block_n = 8192 // width
        found = Tiles(rows, block_n, 4, 3 if blocks_of_a_piece(problem, problem.heads_kv, 1, block_n) <= 96 else 2)
    return tuned_tiles("decoding v10", problem) or found


def blocks_ahead(problem: AttentionProblem) -> int:
    """AHEAD: how many blocks come to the L2 when the ring is full.

    Where a program has more than 20 blocks and programs share heads, whose parts the kernel ahead takes long to merge:
    at 268 MB 0.1 to 0.8 % less in four runs (D = 128), 1.4 % less to 0.5 more (D = 64), 0.8 to 2.1 % less at 537. Where
    a program has few blocks 3 % more, and 1 where it has whole heads.
    """
    p = problem
    if p.fresh_keys is None or not (p.block_table is p.seqlens_k is p.starts is p.window_left is None):
        return 0
    few_rows = p.group * p.seqlen_q <= 8 and block_d(p) <= 128
    shared = p.batch * p.heads_kv % pieces_for(p) != 0
    return 2 if few_rows and shared and blocks_of_a_piece(p, p.heads_kv, 1, 128) > 20 else 0


def rows_of_a_tile(problem: AttentionProblem) -> int:
    """The rows that share a KV head, or some of them, as many as the accumulators have registers for."""
    most = {64: 64, 128: 64, 256: 16}[max(64, block_d(problem))]
    return min(most, max(8, 1 << (problem.group * problem.seqlen_q - 1).bit_length()))


def declines(q, k, v, **arguments):
    """What this version does not serve of a call's arguments: one line, or None."""
    if q.dtype.itemsize != 2 or k.dtype.itemsize != 2:
        return f"takes q, k and v of 16 bits, not {k.dtype}"
    return why_no_pieces(q, k, v, **arguments)


def call_flash_decoding_v10(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None, window=None,
    starts=None, block_table=None, check_table=False, fresh_keys=None,
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D]: see decoding.flash_decoding."""
    p = problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries, window=window, starts=starts, block_table=block_table,
        check_table=check_table, fresh_keys=fresh_keys,
    )  # fmt: skip
    beyond = dict(num_splits=num_splits, seqlens_k=seqlens_k, starts=starts, block_table=block_table)
    refuse(problem, declines(p.q, p.k, p.v, **beyond), "decoding.flash_decoding")
    n, block_n, num_warps, stages = tiles or tiles_for(problem)
    width, row_blocks, programs = max(64, block_d(p)), cdiv(p.group * p.seqlen_q, n), pieces_for(p)
    box = (block_n, width) if p.block_table is None else (min(block_n, p.page_size), PANEL)
    table_stride = None if p.block_table is None else p.block_table.stride(0)
    held = rows_of_parts(p.group * p.seqlen_q, n)
    parts = torch.empty(2 * programs * held * (width + 1), dtype=torch.float32, device=p.q.device)
    launch(
        split_kernel, (programs,), p.q.device,
        p.q, descriptor(p.k, *box), descriptor(p.v, *box), p.k, p.v, p.out, p.lse,
        parts, tickets(p.batch * p.heads_kv * row_blocks, p.q.device), p.seqlens_k, p.starts,
        p.block_table, p.q.stride(), p.k.stride(), p.v.stride(), p.out.stride(), table_stride, p.batch, p.heads_q,
        p.heads_kv, p.seqlen_q, p.seqlen_k, row_blocks, p.scale * LOG2_E.value, p.window_left, p.k.shape[0],
        p.fresh_keys,
        HEAD_DIM=p.head_dim, WIDTH=width, N=n, ROWS=held, BLOCK_N=block_n, STAGES=stages,
        AHEAD=blocks_ahead(p), BATCH=lengths_for(p), PAGE_SIZE=p.page_size, num_warps=num_warps, launch_pdl=True,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=10, title="old keys do not wait",
    idea="Told that the kernel ahead writes the newest keys alone, it reads all others before that one has ended.",
    parent=8, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_decoding_v10, kernels=(split_kernel,), tiles=tiles_for, declines=declines, most_queries=16,
    takes=("window", "starts", "block_table", "check_table", "fresh_keys"),
)  # fmt: skip
