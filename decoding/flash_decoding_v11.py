"""Flash decoding v11: FP8 caches in clusters.

Idea: v10's end for v9's loop. What a kernel takes for parts and their merge is the same for half the bytes.
Changed: the programs of a KV head are a cluster and have its keys alone; the first group of warps sends its part, after
  it has taken over the second's, and merges its columns.
Expect: as much less as from v8 to v10, 1.3 us of 35.4 at 134 MB, of 63.8 at 268.
Limits: v9's, and those of v10: 2, 4, 8 or 16 programs for each row tile of each KV head, lengths of one sequence only.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from common.cluster import (
    cluster_for,
    hand_out,
    here,
    merge_slices,
    open_window,
    store_slice,
    wait_for_others,
    why_no_cluster,
)
from common.equal_pieces import keys_in_reach, why_no_pieces
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
from common.launch import Tiles, cdiv, launch, tuned_tiles
from common.lineage import Requires, Version
from common.paged_ring import PANEL, allocate_blocks, fill_from_pages, numbers_of_pages, pages_are_missing
from common.pairs import as_float16, columns_of_pairs, in_pairs, order_of_rows, pairs_layout, rows_of_pairs
from common.parts import row_offsets, rows_of_parts
from common.problem import AttentionProblem
from common.two_groups import allocate_hand_over, hand_over, take_over

MOST_ROWS = {64: 64, 128: 32, 256: 16}  # of a tile, by its columns: what the registers hold


@gluon.jit
def share_of(batch, items, keys, BLOCK_N: gl.constexpr, CLUSTER: gl.constexpr):
    """(sequence, item in it, first and last block of this program): of an item's keys each has an equal share."""
    item = gl.program_id(0) // CLUSTER
    rank = gl.program_id(0) % CLUSTER
    off_b = item // items
    _, _, lo, hi = keys_in_reach(off_b, batch, keys, BLOCK_N)
    return off_b, item - off_b * items, lo + (hi - lo) * rank // CLUSTER, lo + (hi - lo) * (rank + 1) // CLUSTER


@gluon.jit
def producer(
    shared, k_desc, v_desc, caches, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    SIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_ring, v_ring, share, items, row_blocks, first, len_k, keys, pages = shared
    b, item, begin, end = share
    table, stride_table, num_pages = pages
    here()
    if table is None and keys[1] is None and keys[2] is None:  # where nothing has to be read for it
        if begin < end:
            K, V, stride_k, stride_v = caches
            start_n = begin * BLOCK_N
            bring_to_l2(K, stride_k, b, item // row_blocks * SIDE, start_n, keys[0], BLOCK_N, SIDE * HEAD_DIM)
            bring_to_l2(V, stride_v, b, item // row_blocks * SIDE, start_n, keys[0], BLOCK_N, SIDE * HEAD_DIM)
    wait_for_kernel_before()
    for j in range(begin, end):
        if table is None:
            fill(k_ring, k_desc, [b, item // row_blocks, j * BLOCK_N, 0], j - begin, STAGES)
            fill(v_ring, v_desc, [b, item // row_blocks, j * BLOCK_N, 0], j - begin, STAGES)
        else:
            row = table + b.to(gl.int64) * stride_table
            found = numbers_of_pages(row, j * BLOCK_N, len_k, num_pages, BLOCK_N, PAGE_SIZE)
            fill_from_pages(k_ring, k_desc, found, item // row_blocks, j * BLOCK_N % PAGE_SIZE, j - begin, STAGES)
            fill_from_pages(v_ring, v_desc, found, item // row_blocks, j * BLOCK_N % PAGE_SIZE, j - begin, STAGES)


@gluon.jit
def step(
    i, start_n, q, p_smem, acc, m_i, l_i, first, len_k, last_key, scales, k_ring, v_ring, keys, E5M2: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Block i of the ring, keys start_n...: S^T = K Q^T, softmax down the columns, O^T += V^T P^T."""
    BLOCK_N: gl.constexpr = l_i.shape[0]
    WIDTH: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = acc.type.layout
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)  # the left operand of a product, in registers
    _, seqlens_k, starts, window_left, _ = keys
    k = k_ring[0].index(i % STAGES).reshape([BLOCK_N, WIDTH // 2])
    v = v_ring[0].index(i % STAGES).reshape([BLOCK_N, WIDTH // 2])
    wait_full(k_ring, i, STAGES)
    k_even, k_odd = columns_of_pairs(k.load(LEFT), E5M2)
    release(k_ring, i, STAGES)
    qk = warpgroup_mma(k_even, q.index(0).permute((1, 0)), gl.zeros_like(l_i), use_acc=False, is_async=True)
    qk = warpgroup_mma(k_odd, q.index(1).permute((1, 0)), qk, is_async=True)  # [keys, rows]
    wait_full(v_ring, i, STAGES)
    if seqlens_k is not None or starts is not None or window_left is not None:
        if (start_n + BLOCK_N > len_k) | (start_n < first):  # what lies there may be NaN, which times 0 is NaN
            for r in gl.static_range(0, BLOCK_N, 16):
                zero_rows(v.slice(r, 16), first - start_n - r, len_k - start_n - r)
            fence_async_shared()
    v16 = rows_of_pairs(v.permute((1, 0)).load(pairs_layout(WIDTH // 2, BLOCK_N)), LEFT, E5M2)
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
    shared, args, window, handed, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    SIDE: gl.constexpr, E5M2: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    k_ring, v_ring, share, items, row_blocks, first, len_k, keys, pages = shared
    Q, Out, LSE, DescaleK, DescaleV, stride_q, stride_o, group, scale_log2 = args
    b, item, begin, end = share
    table, stride_table, num_pages = pages
    seqlen_q = keys[4]
    rows = group * seqlen_q
    BLOCK_N: gl.constexpr = k_ring[0].shape[3]
    WIDTH: gl.constexpr = 2 * k_ring[0].shape[4]
    dtype: gl.constexpr = Q.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])  # of S^T and O^T
    HALF_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, WIDTH // 2], gl.float16)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, BLOCK_N], gl.float16)
    q_smem = gl.allocate_shared_memory(gl.float16, [2, N, WIDTH // 2], HALF_Q)  # even and odd columns
    p_smem = gl.allocate_shared_memory(gl.float16, [N, BLOCK_N], WEIGHTS)
    offs_r = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    here()
    wait_for_kernel_before()
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
    missing = begin < 0
    if table is not None and GROUP == 0:  # said aloud, where nobody could refuse it
        row = table + b.to(gl.int64) * stride_table
        lo, hi = gl.maximum(begin * BLOCK_N, first), gl.minimum(end * BLOCK_N, len_k)
        missing = pages_are_missing(row, lo, hi, num_pages, PAGE_SIZE)
    last_key = gl.expand_dims((start_m + offs_r) % seqlen_q + (len_k - seqlen_q), 0)  # causal; [1, N]
    m_i = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    l_i = gl.zeros([BLOCK_N, N], gl.float32, LAYOUT)
    acc = gl.zeros([WIDTH, N], gl.float32, LAYOUT)
    for j in range(begin + GROUP, end, 2):  # every other block of the ring
        acc, m_i, l_i = step(
            j - begin, j * BLOCK_N, q_smem, p_smem, acc, m_i, l_i, first, len_k, last_key, scales, k_ring, v_ring,
            keys, E5M2, STAGES,
        )  # fmt: skip
    l_i = gl.sum(l_i, 0) * gl.where(missing, float("nan"), 1.0)
    if GROUP == 1:
        hand_over(handed, 0, acc, m_i, l_i)
    else:
        acc, m_i, l_i = take_over(handed, 0, acc, m_i, l_i)
        out = acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, descale_v / l_i), 0)
        lse = m_i + gl.log2(l_i)  # -inf for a row without keys
        wait_for_others()  # v11
        hand_out(window, out, lse, order_of_rows(WIDTH, gl.SliceLayout(1, LAYOUT)), ROWS, CLUSTER)
        merged, merged_lse = merge_slices(window, ROWS, WIDTH, CLUSTER)
        place = (stride_o, b, items // row_blocks, item // row_blocks, start_m, rows, seqlen_q)
        store_slice(Out, LSE, merged, merged_lse, *place, HEAD_DIM, CLUSTER, SIDE)


@gluon.jit(do_not_specialize=["batch", "seqlen_k"])
def split_kernel(
    Q, k_desc, v_desc,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, pairs of HEAD_DIM] twice
    K, V,  # float8 [batch, heads_kv, seqlen_k, HEAD_DIM], what the descriptors describe
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    DescaleK, DescaleV,  # float32 [batch, heads_kv] or None
    seqlens_k, starts,  # int32 [batch] or None
    BlockTable,  # int32 [batch, pages of a sequence] or None: k and v are [num_pages, heads_kv, PAGE_SIZE, HEAD_DIM]
    stride_q, stride_k, stride_v, stride_o, stride_table,  # (batch, head, row, 1), elements; of a sequence, entries
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, row_blocks, scale_log2, window_left, num_pages,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, SIDE: gl.constexpr, E5M2: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES % 2 == 0, "with an odd number of stages a group would miss every other phase of a slot")
    window = open_window(ROWS, WIDTH)  # v11
    k_ring = allocate_blocks(k_desc, BLOCK_N, WIDTH // 2, STAGES)
    v_ring = allocate_blocks(v_desc, BLOCK_N, WIDTH // 2, STAGES)
    let_next_kernel_start()
    if seqlens_k is not None or starts is not None:  # where the shares depend on memory
        wait_for_kernel_before()
    keys = (seqlen_k, seqlens_k, starts, window_left, seqlen_q)
    pages = (BlockTable, stride_table, num_pages)
    items = heads_kv * row_blocks
    share = share_of(batch, items, keys, BLOCK_N, CLUSTER)
    first, len_k, _, _ = keys_in_reach(share[0], batch, keys, BLOCK_N)
    handed = allocate_hand_over(WIDTH, N)
    args = (Q, Out, LSE, DescaleK, DescaleV, stride_q, stride_o, heads_q // heads_kv, scale_log2)
    shared = (k_ring, v_ring, share, items, row_blocks, first, len_k, keys, pages)
    gl.warp_specialize([
        (consumer, (shared, args, window, handed, PAGE_SIZE, HEAD_DIM, N, ROWS, SIDE, E5M2, STAGES, CLUSTER, 0)),
        (consumer, (shared, args, window, handed, PAGE_SIZE, HEAD_DIM, N, ROWS, SIDE, E5M2, STAGES, CLUSTER, 1)),
        (producer, (shared, k_desc, v_desc, (K, V, stride_k, stride_v), BLOCK_N, PAGE_SIZE, HEAD_DIM, SIDE, STAGES)),
    ], [4, 4], [232, 40])  # fmt: skip


def heads_side_by_side(q, k, v) -> int:
    """2 where KV heads of 64 columns lie beside each other and go through the products together, else 1 (v9)."""
    adjacent = k.shape[1] % 2 == 0 and k.stride(1) == v.stride(1) == q.shape[3] == 64
    return 2 if adjacent and 2 * (q.shape[1] // k.shape[1]) * q.shape[2] <= MOST_ROWS[128] else 1


def shape_of_tiles(q, k, v) -> tuple[int, int, int, int]:
    """(rows that share what lies side by side, columns of that, padded; rows of a tile; tiles of one sequence)"""
    side = heads_side_by_side(q, k, v)
    rows, width = side * (q.shape[1] // k.shape[1]) * q.shape[2], max(64, side << (q.shape[3] - 1).bit_length())
    n = min(MOST_ROWS[width], max(8, 1 << (rows - 1).bit_length()))
    return rows, width, n, k.shape[1] // side * cdiv(rows, n)


def tiles_for(problem: AttentionProblem) -> Tiles:
    """v9's: blocks of 16 KB of K, fewer keys where many rows take the registers; 128 KB of K and V in the ring."""
    rows, width, n, _ = shape_of_tiles(problem.q, problem.k, problem.v)
    block_n = 16384 // width if rows <= 16 else 64
    return tuned_tiles("decoding v11", problem) or Tiles(n, block_n, 4, 65536 // (block_n * width))


def declines(q, k, v, *, descale_k=None, descale_v=None, **arguments):
    """What this version does not serve of a call's arguments: one line, or None."""
    if q.dtype.itemsize != 2 or k.dtype.itemsize != 1 or v.dtype != k.dtype:
        return f"takes caches of float8, not {k.dtype}"
    if any(getattr(x, "ndim", 0) == 3 for x in (descale_k, descale_v)):
        return "takes descales of heads, not of blocks of keys"
    if reason := why_no_pieces(q, k, v, step=16, **arguments):
        return reason
    if q.shape[0] > 1 and any(arguments.get(name) is not None for name in ("seqlens_k", "starts")):
        return "takes seqlens_k and starts of one sequence alone: of several, each has as many programs"
    return why_no_cluster(q.device, q.shape[0] * shape_of_tiles(q, k, v)[3])


def call_flash_decoding_v11(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None, window=None,
    starts=None, block_table=None, check_table=False, descale_k=None, descale_v=None,
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D]: see decoding.flash_decoding."""
    p = problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries, window=window, starts=starts, block_table=block_table,
        check_table=check_table, descale_k=descale_k, descale_v=descale_v, fp8_caches=True,
    )  # fmt: skip
    beyond = dict(
        num_splits=num_splits, seqlens_k=seqlens_k, starts=starts, block_table=block_table, descale_k=descale_k,
        descale_v=descale_v,
    )  # fmt: skip
    refuse(problem, declines(p.q, p.k, p.v, **beyond), "decoding.flash_decoding")
    n, block_n, num_warps, stages = tiles or tiles_for(problem)
    side, (rows, width, *_) = heads_side_by_side(p.q, p.k, p.v), shape_of_tiles(p.q, p.k, p.v)
    heads_kv, row_blocks = p.heads_kv // side, cdiv(rows, n)
    items, held = p.batch * heads_kv * row_blocks, rows_of_parts(rows, n)
    refuse(problem, why_no_cluster(p.q.device, items, held, width), "decoding.flash_decoding")  # whatever `tiles` are
    k_pairs, v_pairs = in_pairs(p.k, side), in_pairs(p.v, side)
    box = (block_n, width // 2) if p.block_table is None else (min(block_n, p.page_size), min(width // 2, PANEL))
    table_stride = None if p.block_table is None else p.block_table.stride(0)
    launch(
        split_kernel, (items,), p.q.device,  # of clusters
        p.q, descriptor(k_pairs, *box), descriptor(v_pairs, *box), p.k, p.v, p.out, p.lse, p.descale_k, p.descale_v,
        p.seqlens_k, p.starts, p.block_table, p.q.stride(), p.k.stride(), p.v.stride(), p.out.stride(), table_stride,
        p.batch, p.heads_q, heads_kv, p.seqlen_q, p.seqlen_k, row_blocks, p.scale * LOG2_E.value, p.window_left,
        p.k.shape[0],
        HEAD_DIM=p.head_dim, WIDTH=width, N=n, ROWS=held, BLOCK_N=block_n, STAGES=stages,
        PAGE_SIZE=p.page_size, SIDE=side, E5M2=p.k.dtype == torch.float8_e5m2, CLUSTER=cluster_for(p.q.device, items),
        num_warps=num_warps, launch_pdl=True,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=11, title="FP8 caches in clusters",
    idea="v10's clusters for v9's FP8 caches.",
    parent=9, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_decoding_v11, kernels=(split_kernel,), tiles=tiles_for, declines=declines, most_queries=16,
    fp8=True, half=False, takes=("window", "starts", "block_table", "check_table", "descale_k", "descale_v"),
)  # fmt: skip
