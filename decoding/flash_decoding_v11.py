"""Flash decoding v11: FP8 caches whose old keys do not wait.

Idea: v10's for v9: fresh_keys says which keys the kernel ahead may write, and the loader waits for those alone.
Changed: as from v8 to v10.
Expect: as much as there, 0.5 to 1 us, of half the time: 35.4 to 34.6 us at 134 MB, 9.5 to 8.9 at 17 MB.
Limits: v9's.
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
from common.pairs import as_float16, columns_of_pairs, in_order, in_pairs, pairs_layout, rows_of_pairs
from common.parts import is_last, merge_parts, row_offsets, rows_of_parts, store_part, store_rows
from common.problem import AttentionProblem
from common.tickets import tickets
from common.two_groups import allocate_hand_over, hand_over, take_over

MOST_ROWS = {64: 64, 128: 32, 256: 16}  # of a tile, by its columns: what the registers hold


@gluon.jit
def producer(
    shared, k_desc, v_desc, caches, fresh_keys, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    SIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_ring, v_ring, work, batch, items, row_blocks, keys, pages = shared
    start, end, total, off_b, base = work
    table, stride_table, num_pages = pages
    i = start * 0
    if fresh_keys is None and table is None and keys[1] is None and keys[2] is None:
        if start < end:
            K, V, stride_k, stride_v = caches
            b, item, begin, _, _ = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
            _, _, lo, _ = keys_in_reach(b, batch, keys, BLOCK_N)
            start_n = (lo + start - begin) * BLOCK_N
            bring_to_l2(K, stride_k, b, item // row_blocks * SIDE, start_n, keys[0], BLOCK_N, SIDE * HEAD_DIM)
            bring_to_l2(V, stride_v, b, item // row_blocks * SIDE, start_n, keys[0], BLOCK_N, SIDE * HEAD_DIM)
    while start < end:
        b, item, begin, last, finish = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
        _, len_k, lo, _ = keys_in_reach(b, batch, keys, BLOCK_N)
        stop = gl.minimum(finish, end)
        for j in range(start, end_of_keys(start, stop, last, keys)):
            start_n = (lo + j - begin) * BLOCK_N
            if fresh_keys is None:
                wait_for_kernel_before()
            elif start_n + BLOCK_N > len_k - fresh_keys:  # v11: all other keys are as they stay
                wait_for_kernel_before()
            if table is None:
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
    i, start_n, q, p_smem, acc, m_i, l_i, first, len_k, last_key, scales, k_ring, v_ring, keys, E5M2: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Block i of the ring, keys start_n...: S^T = K Q^T, softmax down the columns, O^T += V^T P^T."""
    BLOCK_N: gl.constexpr = l_i.shape[0]
    WIDTH: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = acc.type.layout
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)  # v9: the left operand of a product, in registers
    _, seqlens_k, starts, window_left, _ = keys
    k = k_ring[0].index(i % STAGES).reshape([BLOCK_N, WIDTH // 2])
    v = v_ring[0].index(i % STAGES).reshape([BLOCK_N, WIDTH // 2])
    wait_full(k_ring, i, STAGES)
    k_even, k_odd = columns_of_pairs(k.load(LEFT), E5M2)  # v9
    release(k_ring, i, STAGES)
    qk = warpgroup_mma(k_even, q.index(0).permute((1, 0)), gl.zeros_like(l_i), use_acc=False, is_async=True)
    qk = warpgroup_mma(k_odd, q.index(1).permute((1, 0)), qk, is_async=True)  # [keys, rows]
    wait_full(v_ring, i, STAGES)
    if seqlens_k is not None or starts is not None or window_left is not None:
        if (start_n + BLOCK_N > len_k) | (start_n < first):  # what lies there may be NaN, which times 0 is NaN
            for r in gl.static_range(0, BLOCK_N, 16):
                zero_rows(v.slice(r, 16), first - start_n - r, len_k - start_n - r)
            fence_async_shared()
    v16 = rows_of_pairs(v.permute((1, 0)).load(pairs_layout(WIDTH // 2, BLOCK_N)), LEFT, E5M2)  # v9
    release(v_ring, i, STAGES)
    qk = warpgroup_mma_wait(0, deps=[qk])
    offs_n = gl.expand_dims(start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT)), 1)
    visible = offs_n <= last_key
    if starts is not None or window_left is not None:
        visible = visible & (offs_n >= first)
    if window_left is not None:
        visible = visible & (offs_n >= last_key - window_left)
    qk = gl.where(visible, qk * gl.expand_dims(scales, 0), -float("inf"))
    m_new = gl.maximum(m_i, gl.max(qk, 0))
    m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)  # a query may be ahead of all keys so far
    p = gl.exp2(qk - gl.expand_dims(m_safe, 0))
    alpha = gl.expand_dims(gl.exp2(m_i - m_safe), 0)
    p_smem.store(gl.permute(p.to(p_smem.dtype), (1, 0)))
    fence_async_shared()
    acc = warpgroup_mma(v16, p_smem.permute((1, 0)), acc * alpha, is_async=True)  # [WIDTH, rows]
    acc = warpgroup_mma_wait(0, deps=[acc])
    return acc, m_new, l_i * alpha + p


@gluon.jit
def consumer(
    shared, args, handed, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    SIDE: gl.constexpr, E5M2: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    k_ring, v_ring, work, batch, items, row_blocks, keys, pages = shared
    Q, Out, LSE, Parts, Tickets, DescaleK, DescaleV, stride_q, stride_o, group, scale_log2 = args
    table, stride_table, num_pages = pages
    seqlen_q = keys[4]
    rows = group * seqlen_q
    start, end, total, off_b, base = work
    BLOCK_N: gl.constexpr = k_ring[0].shape[3]
    WIDTH: gl.constexpr = 2 * k_ring[0].shape[4]
    dtype: gl.constexpr = Q.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])  # of S^T and O^T
    HALF_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, WIDTH // 2], gl.float16)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, BLOCK_N], gl.float16)
    q_smem = gl.allocate_shared_memory(gl.float16, [2, N, WIDTH // 2], HALF_Q)  # even and odd columns
    p_smem = gl.allocate_shared_memory(gl.float16, [N, BLOCK_N], WEIGHTS)
    offs_r = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    i = start * 0
    h = start * 0
    part = gl.program_id(0) * 2
    wait_for_kernel_before()  # also where there is nothing to do, or the kernel after this one came too early
    while start < end:
        b, item, begin, last, finish = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
        first, len_k, lo, _ = keys_in_reach(b, batch, keys, BLOCK_N)
        stop = gl.minimum(finish, end)
        until = end_of_keys(start, stop, last, keys)
        p_first, p_last, slot = sharers(begin, finish, total)  # early: nobody waits for it here
        first_head, start_m = item // row_blocks * group, item % row_blocks * N
        even, mask_q = row_offsets(stride_q, b, first_head, start_m, rows, seqlen_q, HEAD_DIM, N, WIDTH // 2, 2, SIDE)
        q_even = gl.load(Q + even, mask=mask_q, other=0.0)
        q_odd = gl.load(Q + even + 1, mask=mask_q, other=0.0)
        scales = gl.full([N], scale_log2, gl.float32, gl.SliceLayout(0, LAYOUT))
        descale_v = 1.0
        kv_heads = (b * (items // row_blocks) + item // row_blocks) * SIDE  # [N] from here on: each row has its own
        kv_heads += gl.minimum(start_m + offs_r, rows - 1) // (rows // SIDE)
        if DescaleK is not None:  # loaded together with the queries: each may be far away
            scales *= gl.load(DescaleK + kv_heads)
        if DescaleV is not None:
            descale_v = gl.load(DescaleV + kv_heads)
        if dtype == gl.bfloat16:  # float8 becomes float16 in one step, and so must what it is multiplied with
            q_even, q_odd, unit = as_float16(q_even, q_odd)
            scales *= gl.convert_layout(unit, scales.type.layout)
        q_smem.index(0).store(q_even)
        q_smem.index(1).store(q_odd)
        fence_async_shared()
        missing = start < 0
        if table is not None and GROUP == 0:  # said aloud, where nobody could refuse it
            here, gone = (lo + start - begin) * BLOCK_N, (lo + stop - begin) * BLOCK_N
            row = table + b.to(gl.int64) * stride_table
            missing = pages_are_missing(row, gl.maximum(here, first), gl.minimum(gone, len_k), num_pages, PAGE_SIZE)
        last_key = gl.expand_dims((start_m + offs_r) % seqlen_q + (len_k - seqlen_q), 0)  # causal; [1, N]
        m_i = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
        l_i = gl.zeros([BLOCK_N, N], gl.float32, LAYOUT)
        acc = gl.zeros([WIDTH, N], gl.float32, LAYOUT)
        for j in range(start + (i + GROUP) % 2, until, 2):  # every other block of the ring
            acc, m_i, l_i = step(
                i + j - start, (lo + j - begin) * BLOCK_N, q_smem, p_smem, acc, m_i, l_i, first, len_k, last_key,
                scales, k_ring, v_ring, keys, E5M2, STAGES,
            )  # fmt: skip
        l_i = gl.sum(l_i, 0) * gl.where(missing, float("nan"), 1.0)
        i += until - start
        if GROUP == 1:
            hand_over(handed, h, acc, m_i, l_i)
        else:
            acc, m_i, l_i = take_over(handed, h, acc, m_i, l_i)
            out = in_order(acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, descale_v / l_i), 0))
            lse = m_i + gl.log2(l_i)  # -inf for a row without keys
            place = (stride_o, b, items // row_blocks, item // row_blocks, start_m, rows, seqlen_q)
            if stop - start == finish - begin:
                store_rows(Out, LSE, gl.permute(out, (1, 0)), lse, *place, HEAD_DIM, SIDE)
            else:
                store_part(Parts, part, out, lse, ROWS)
                if is_last(Tickets + (b * items + item), p_last - p_first + 1):
                    merged, merged_lse = merge_parts(Parts, p_first, p_last, slot, ROWS, WIDTH)
                    store_rows(Out, LSE, merged, merged_lse, *place, HEAD_DIM, SIDE)
        h += 1
        part = gl.program_id(0) * 2 + 1
        start = stop
        off_b, base = next_sequence(start, off_b, base, finish, item, items, keys)


@gluon.jit(do_not_specialize=["batch", "seqlen_k", "fresh_keys"])
def split_kernel(
    Q, k_desc, v_desc,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, pairs of HEAD_DIM] twice
    K, V,  # float8 [batch, heads_kv, seqlen_k, HEAD_DIM], what the descriptors describe
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    Parts,  # float32 [2 * programs, ROWS, WIDTH], then the like without WIDTH
    Tickets,  # int32 [items of all sequences], zeros
    DescaleK, DescaleV,  # float32 [batch, heads_kv] or None
    seqlens_k, starts,  # int32 [batch] or None
    BlockTable,  # int32 [batch, pages of a sequence] or None: k and v are [num_pages, heads_kv, PAGE_SIZE, HEAD_DIM]
    stride_q, stride_k, stride_v, stride_o, stride_table,  # (batch, head, row, 1), elements; of a sequence, entries
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, row_blocks, scale_log2, window_left, num_pages,
    fresh_keys,  # at each sequence's end, which the kernel before may write; None: all keys, lengths and pages too
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, BATCH: gl.constexpr, PAGE_SIZE: gl.constexpr, SIDE: gl.constexpr, E5M2: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES % 2 == 0, "with an odd number of stages a group would miss every other phase of a slot")
    k_ring = allocate_blocks(k_desc, BLOCK_N, WIDTH // 2, STAGES)
    v_ring = allocate_blocks(v_desc, BLOCK_N, WIDTH // 2, STAGES)
    let_next_kernel_start()
    if fresh_keys is None and (seqlens_k is not None or starts is not None):  # where the pieces depend on memory
        wait_for_kernel_before()
    keys = (seqlen_k, seqlens_k, starts, window_left, seqlen_q)
    pages = (BlockTable, stride_table, num_pages)
    items = heads_kv * row_blocks
    work = piece(batch, items, keys, BLOCK_N, BATCH)
    handed = allocate_hand_over(WIDTH, N)
    args = (Q, Out, LSE, Parts, Tickets, DescaleK, DescaleV, stride_q, stride_o, heads_q // heads_kv, scale_log2)
    shared = (k_ring, v_ring, work, batch, items, row_blocks, keys, pages)
    gl.warp_specialize([
        (consumer, (shared, args, handed, PAGE_SIZE, HEAD_DIM, N, ROWS, SIDE, E5M2, STAGES, 0)),
        (consumer, (shared, args, handed, PAGE_SIZE, HEAD_DIM, N, ROWS, SIDE, E5M2, STAGES, 1)),
        (producer, (shared, k_desc, v_desc, (K, V, stride_k, stride_v), fresh_keys, BLOCK_N, PAGE_SIZE, HEAD_DIM, SIDE,
                    STAGES)),
    ], [4, 1], [232, 40])  # fmt: skip


def heads_side_by_side(problem: AttentionProblem) -> int:
    """v9: 2 where heads of 64 columns lie beside each other: TMA takes as long for a row of 64 bytes as for one of 128.

    They go through the products together, as one head of 128 columns whose queries have zeros in the other's half.
    """
    p = problem
    adjacent = p.heads_kv % 2 == 0 and p.k.stride(1) == p.v.stride(1) == p.head_dim == 64
    return 2 if adjacent and 2 * p.group * p.seqlen_q <= MOST_ROWS[128] else 1


def size_of_rows(problem: AttentionProblem) -> tuple[int, int]:
    """Rows that share what lies side by side, and the columns of that, padded."""
    side = heads_side_by_side(problem)
    return side * problem.group * problem.seqlen_q, max(64, side * block_d(problem))


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Blocks of 16 KB of K, fewer keys where many rows take the registers; 128 KB of K and V in the ring.

    An even number of stages: each group of warps finds its blocks in slots of its own. v11: half of that where a piece
    has few blocks, 9 to 10 % less at 17 MB and 4 % more at 67. (Why is not shown: registers have room for one program
    on an SM.) More where it has many: 1 to 2 % less at 134 MB, 1 % more at 67.
    """
    rows_of_head, width = size_of_rows(problem)
    rows = min(MOST_ROWS[width], max(8, 1 << (rows_of_head - 1).bit_length()))
    block_n, ring = 16384 // width if rows <= 16 else 64, 4
    if problem.fresh_keys is not None and problem.seqlens_k is None:  # what a piece has is not known otherwise
        heads = problem.heads_kv // heads_side_by_side(problem)
        blocks = blocks_of_a_piece(problem, heads, cdiv(rows_of_head, rows), block_n) * block_n * width / 16384
        ring = 2 if blocks <= 6 else 6 if blocks > 24 and rows * width <= 2048 else 4  # more does not fit
    return tuned_tiles("decoding v11", problem) or Tiles(rows, block_n, 4, ring * 16384 // (block_n * width))


def declines(q, k, v, *, descale_k=None, descale_v=None, **arguments):
    """What this version does not serve of a call's arguments: one line, or None."""
    if q.dtype.itemsize != 2 or k.dtype.itemsize != 1 or v.dtype != k.dtype:
        return f"takes caches of float8, not {k.dtype}"
    if any(getattr(x, "ndim", 0) == 3 for x in (descale_k, descale_v)):
        return "takes descales of heads, not of blocks of keys"
    return why_no_pieces(q, k, v, step=16, **arguments)


def call_flash_decoding_v11(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None, window=None,
    starts=None, block_table=None, check_table=False, descale_k=None, descale_v=None, fresh_keys=None,
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D]: see decoding.flash_decoding."""
    p = problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries, window=window, starts=starts, block_table=block_table,
        check_table=check_table, descale_k=descale_k, descale_v=descale_v, fp8_caches=True,
        fresh_keys=fresh_keys,
    )  # fmt: skip
    beyond = dict(
        num_splits=num_splits, seqlens_k=seqlens_k, starts=starts, block_table=block_table, descale_k=descale_k,
        descale_v=descale_v,
    )  # fmt: skip
    refuse(problem, declines(p.q, p.k, p.v, **beyond), "decoding.flash_decoding")
    n, block_n, num_warps, stages = tiles or tiles_for(problem)
    side, (rows, width) = heads_side_by_side(p), size_of_rows(p)
    heads_kv, row_blocks, programs = p.heads_kv // side, cdiv(rows, n), pieces_for(p)
    k_pairs, v_pairs = in_pairs(p.k, side), in_pairs(p.v, side)
    box = (block_n, width // 2) if p.block_table is None else (min(block_n, p.page_size), min(width // 2, PANEL))
    table_stride = None if p.block_table is None else p.block_table.stride(0)
    held = rows_of_parts(rows, n)
    parts = torch.empty(2 * programs * held * (width + 1), dtype=torch.float32, device=p.q.device)
    launch(
        split_kernel, (programs,), p.q.device,
        p.q, descriptor(k_pairs, *box), descriptor(v_pairs, *box), p.k, p.v, p.out, p.lse,
        parts, tickets(p.batch * heads_kv * row_blocks, p.q.device), p.descale_k, p.descale_v,
        p.seqlens_k, p.starts, p.block_table, p.q.stride(), p.k.stride(), p.v.stride(), p.out.stride(), table_stride,
        p.batch, p.heads_q, heads_kv, p.seqlen_q, p.seqlen_k, row_blocks, p.scale * LOG2_E.value, p.window_left,
        p.k.shape[0], p.fresh_keys,
        HEAD_DIM=p.head_dim, WIDTH=width, N=n, ROWS=held, BLOCK_N=block_n, STAGES=stages, PAGE_SIZE=p.page_size,
        SIDE=side, E5M2=p.k.dtype == torch.float8_e5m2, BATCH=lengths_for(p), num_warps=num_warps, launch_pdl=True,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=11, title="FP8, old keys do not wait",
    idea="v10's early loads for v9's FP8 caches.",
    parent=9, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_decoding_v11, kernels=(split_kernel,), tiles=tiles_for, declines=declines, most_queries=16,
    fp8=True, half=False,
    takes=("window", "starts", "block_table", "check_table", "descale_k", "descale_v", "fresh_keys"),
)  # fmt: skip
