"""Flash decoding v10: the parts of a head meet in shared memory.

Idea: the programs that share a KV head are a cluster. In the end each sends every other the columns of its part that
  the other shall merge, straight into that SM's shared memory, and merges its own.
Changed: no parts in global memory, no tickets, no last program that does the rest; a program has keys of one head, and
  not a piece of a line of all heads. The loader has four warps, since all warps of a program must join its cluster.
Expect: v8 takes 1.8 to 2.5 us to store parts, draw tickets and merge; 0.5 us of that remain: 11.1 to 9.8 us at 34 MB
  (D=64), 11.4 to 9.7 (D=128), 98 % of the read ceiling at 268 MB.
Limits: v8's, and 2, 4, 8 or 16 programs for each row tile of each KV head, as many for all; lengths of one sequence
  only.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from common.cluster import (
    LARGEST,
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
from common.launch import Tiles, block_d, cdiv, launch, tuned_tiles
from common.lineage import Requires, Version
from common.paged_ring import PANEL, allocate_blocks, fill_from_pages, numbers_of_pages, pages_are_missing
from common.parts import row_offsets, rows_of_parts
from common.problem import AttentionProblem


@gluon.jit
def share_of(batch, items, keys, BLOCK_N: gl.constexpr, CLUSTER: gl.constexpr):
    """v10: (sequence, item in it, first and last block of this program): of an item's keys each has an equal share."""
    item = gl.program_id(0) // CLUSTER
    rank = gl.program_id(0) % CLUSTER
    off_b = item // items
    _, _, lo, hi = keys_in_reach(off_b, batch, keys, BLOCK_N)
    return off_b, item - off_b * items, lo + (hi - lo) * rank // CLUSTER, lo + (hi - lo) * (rank + 1) // CLUSTER


@gluon.jit
def producer(
    k_desc, v_desc, caches, k_ring, v_ring, share, row_blocks, len_k, keys, pages, BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    b, item, begin, end = share
    table, stride_table, num_pages = pages
    here()  # v10
    if table is None and keys[1] is None and keys[2] is None:  # where nothing has to be read for it
        if begin < end:
            K, V, stride_k, stride_v = caches
            bring_to_l2(K, stride_k, b, item // row_blocks, begin * BLOCK_N, keys[0], BLOCK_N, HEAD_DIM)
            bring_to_l2(V, stride_v, b, item // row_blocks, begin * BLOCK_N, keys[0], BLOCK_N, HEAD_DIM)
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
    args, window, k_ring, v_ring, share, items, row_blocks, first, len_k, keys, pages, PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    Q, Out, LSE, stride_q, stride_o, group, scale_log2 = args
    b, item, begin, end = share
    table, stride_table, num_pages = pages
    seqlen_q = keys[4]
    rows = group * seqlen_q
    BLOCK_N: gl.constexpr = k_ring[0].shape[3]
    WIDTH: gl.constexpr = k_ring[0].shape[4]
    dtype: gl.constexpr = Q.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])  # of S^T and O^T
    q_smem = gl.allocate_shared_memory(dtype, [N, WIDTH], gl.NVMMASharedLayout.get_default_for([N, WIDTH], dtype))
    p_smem = gl.allocate_shared_memory(dtype, [N, BLOCK_N], gl.NVMMASharedLayout.get_default_for([N, BLOCK_N], dtype))
    offs_r = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    here()  # v10
    wait_for_kernel_before()
    first_head, start_m = item // row_blocks * group, item % row_blocks * N
    offsets, mask = row_offsets(stride_q, b, first_head, start_m, rows, seqlen_q, HEAD_DIM, N, WIDTH)
    q_smem.store(gl.load(Q + offsets, mask=mask, other=0.0))
    fence_async_shared()
    missing = begin < 0
    if table is not None:  # said aloud, where nobody could refuse it; looked at while the first block comes
        row = table + b.to(gl.int64) * stride_table
        lo, hi = gl.maximum(begin * BLOCK_N, first), gl.minimum(end * BLOCK_N, len_k)
        missing = pages_are_missing(row, lo, hi, num_pages, PAGE_SIZE)
    last_key = gl.expand_dims((start_m + offs_r) % seqlen_q + (len_k - seqlen_q), 0)  # causal; [1, N]
    m_i = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    l_i = gl.zeros([BLOCK_N, N], gl.float32, LAYOUT)
    acc = gl.zeros([WIDTH, N], gl.float32, LAYOUT)
    for j in range(begin, end):
        acc, m_i, l_i = step(
            j - begin, j * BLOCK_N, q_smem, p_smem, acc, m_i, l_i, first, len_k, last_key, k_ring, v_ring, scale_log2,
            keys, STAGES,
        )  # fmt: skip
    l_i = gl.sum(l_i, 0) * gl.where(missing, float("nan"), 1.0)
    out = acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, 1.0 / l_i), 0)
    lse = m_i + gl.log2(l_i)  # -inf for a row without keys
    wait_for_others()  # v10
    hand_out(window, out, lse, gl.arange(0, WIDTH, layout=gl.SliceLayout(1, LAYOUT)), ROWS, CLUSTER)
    merged, merged_lse = merge_slices(window, ROWS, WIDTH, CLUSTER)
    place = (stride_o, b, items // row_blocks, item // row_blocks, start_m, rows, seqlen_q)
    store_slice(Out, LSE, merged, merged_lse, *place, HEAD_DIM, CLUSTER)


@gluon.jit(do_not_specialize=["batch", "seqlen_k"])
def split_kernel(
    Q, k_desc, v_desc,  # [batch, heads_q, seqlen_q, HEAD_DIM], [batch, heads_kv, seqlen_k, HEAD_DIM] twice
    K, V,  # what the descriptors describe
    Out, LSE,  # like Q; float32 [batch, heads_q, seqlen_q] or None
    seqlens_k, starts,  # int32 [batch] or None
    BlockTable,  # int32 [batch, pages of a sequence] or None: k and v are [num_pages, heads_kv, PAGE_SIZE, HEAD_DIM]
    stride_q, stride_k, stride_v, stride_o, stride_table,  # (batch, head, row, 1), elements; of a sequence, entries
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, row_blocks, scale_log2, window_left, num_pages,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    window = open_window(ROWS, WIDTH)  # v10
    k_ring = allocate_blocks(k_desc, BLOCK_N, WIDTH, STAGES)
    v_ring = allocate_blocks(v_desc, BLOCK_N, WIDTH, STAGES)
    let_next_kernel_start()
    if seqlens_k is not None or starts is not None:  # where the shares depend on memory
        wait_for_kernel_before()
    keys = (seqlen_k, seqlens_k, starts, window_left, seqlen_q)
    pages = (BlockTable, stride_table, num_pages)
    items = heads_kv * row_blocks
    share = share_of(batch, items, keys, BLOCK_N, CLUSTER)
    first, len_k, _, _ = keys_in_reach(share[0], batch, keys, BLOCK_N)
    args = (Q, Out, LSE, stride_q, stride_o, heads_q // heads_kv, scale_log2)
    gl.warp_specialize([
        (consumer, (args, window, k_ring, v_ring, share, items, row_blocks, first, len_k, keys, pages, PAGE_SIZE,
                    HEAD_DIM, N, ROWS, STAGES, CLUSTER)),
        (producer, (k_desc, v_desc, (K, V, stride_k, stride_v), k_ring, v_ring, share, row_blocks, len_k, keys, pages,
                    BLOCK_N, PAGE_SIZE, HEAD_DIM, STAGES)),
    ], [4], [56])  # fmt: skip


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Blocks of 128 keys where registers allow, two under way beside the two that are being read.

    More on the way is slower: with 192 KB instead of 128 the rows of one sequence take 1 % longer.
    """
    rows, width = rows_of_a_tile(problem.group * problem.seqlen_q, problem.head_dim), max(64, block_d(problem))
    block_n = 128 if rows <= 16 and width <= 128 else 64
    return tuned_tiles("decoding v10", problem) or Tiles(rows, block_n, 4, 256 // block_n if width <= 128 else 2)


def rows_of_a_tile(rows: int, head_dim: int) -> int:
    """Of the rows that share a KV head as many as a window takes."""
    width = max(64, 1 << (head_dim - 1).bit_length())
    return min(LARGEST // (8 * width), max(8, 1 << (rows - 1).bit_length()))


def declines(q, k, v, **arguments):
    """What this version does not serve of a call's arguments: one line, or None."""
    if q.dtype.itemsize != 2 or k.dtype.itemsize != 2:
        return f"takes q, k and v of 16 bits, not {k.dtype}"
    if reason := why_no_pieces(q, k, v, **arguments):
        return reason
    if q.shape[0] > 1 and any(arguments.get(name) is not None for name in ("seqlens_k", "starts")):
        return "takes seqlens_k and starts of one sequence alone: of several, each has as many programs"
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    n = rows_of_a_tile(rows, q.shape[3])
    return why_no_cluster(q.device, q.shape[0] * k.shape[1] * cdiv(rows, n))


def call_flash_decoding_v10(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, tiles=None, window=None,
    starts=None, block_table=None, check_table=False,
):  # fmt: skip
    """Attention of up to 16 queries a sequence, q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D]: see decoding.flash_decoding."""
    p = problem = AttentionProblem.decoding(
        q, k, v, scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out,
        most_queries=VERSION.most_queries, window=window, starts=starts, block_table=block_table,
        check_table=check_table,
    )  # fmt: skip
    beyond = dict(num_splits=num_splits, seqlens_k=seqlens_k, starts=starts, block_table=block_table)
    refuse(problem, declines(p.q, p.k, p.v, **beyond), "decoding.flash_decoding")
    n, block_n, num_warps, stages = tiles or tiles_for(problem)
    width, items = max(64, block_d(p)), p.batch * p.heads_kv * cdiv(p.group * p.seqlen_q, n)
    held = rows_of_parts(p.group * p.seqlen_q, n)
    refuse(problem, why_no_cluster(p.q.device, items, held, width), "decoding.flash_decoding")  # whatever `tiles` are
    box = (block_n, width) if p.block_table is None else (min(block_n, p.page_size), PANEL)
    table_stride = None if p.block_table is None else p.block_table.stride(0)
    launch(
        split_kernel, (items,), p.q.device,  # v10: of clusters
        p.q, descriptor(p.k, *box), descriptor(p.v, *box), p.k, p.v, p.out, p.lse, p.seqlens_k, p.starts,
        p.block_table, p.q.stride(), p.k.stride(), p.v.stride(), p.out.stride(), table_stride, p.batch, p.heads_q,
        p.heads_kv, p.seqlen_q, p.seqlen_k, items // (p.batch * p.heads_kv), p.scale * LOG2_E.value, p.window_left,
        p.k.shape[0],
        HEAD_DIM=p.head_dim, WIDTH=width, N=n, ROWS=held, BLOCK_N=block_n,
        STAGES=stages, PAGE_SIZE=p.page_size, CLUSTER=cluster_for(p.q.device, items), num_warps=num_warps,
        launch_pdl=True,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="decoding", number=10, title="parts meet in shared memory",
    idea="The programs of a KV head are a cluster: each merges its columns of all parts, sent to its shared memory.",
    parent=8, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_decoding_v10, kernels=(split_kernel,), tiles=tiles_for, declines=declines, most_queries=16,
    takes=("window", "starts", "block_table", "check_table"),
)  # fmt: skip
