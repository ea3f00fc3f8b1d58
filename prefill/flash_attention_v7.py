"""FlashAttention v7: persistent, tiles that overlap.

Idea: one program an SM that goes from tile to tile without a break: the next tile's first QK^T is issued with this
  tile's last PV, and this tile's output is stored under the next tile's products.
Changed: a loop over tiles around v6's; a table says which program does which tiles, longest first to whoever is free
  first (common/tile_table.py); the producer and what reads the table are common/persistent.py; two buffers for Q, and
  the output has its own; three warpgroups at head_dim 64; a row sum is put together once a tile.
Expect: v6 pays about one block of keys for beginning and ending a tile, so 20 % at S = 512 (4 blocks), 10 % at 1k, 2
  % at 8k; causal more, as its tiles are half as long and the last wave is uneven: 25 % at 512, 8 % at 8k.
Limits: v6's, and head_dim at most 128: beyond, a second query buffer does not fit. First call of a shape makes the
  table.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from common.exponent import scale_log2, turn_negative_scale
from common.hopper import (
    allocate_ring,
    declines_on_hopper,
    descriptor,
    masked,
    refuse_on_hopper,
    release,
    skip,
    tma_store,
    wait_full,
)
from common.launch import Tiles, block_d, launch
from common.lineage import Requires, Version
from common.persistent import MW, first_scores, own_blocks, producer, right_and_guard, tile_of
from common.problem import AttentionProblem
from common.tile_table import MAX_HEADS, tile_table


@gluon.jit
def part_sums(p):
    """What each of the four threads of a row holds, summed: [rows, 4]. The shuffles can wait until the tile ends."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def online_softmax(qk, m_i, l_i, scale_log2, GUARD: gl.constexpr):
    """p of one block, and what it does to the running maximum and sum; GUARD where a row may have seen nothing yet."""
    m_new = gl.maximum(m_i, gl.max(qk, 1))
    m_scaled = m_new * scale_log2
    if GUARD:
        m_scaled = gl.where(m_new == -float("inf"), 0.0, m_scaled)
    alpha = gl.exp2(m_i * scale_log2 - m_scaled)
    p = gl.exp2(qk * scale_log2 - gl.expand_dims(m_scaled, 1))
    l_i = l_i * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout)), 1)
    return p, alpha, m_new, l_i + part_sums(p)


@gluon.jit
def step(
    i_k, i_v, more, q, p16, acc, m_i, l_i, alpha, zero, mask, offs_m, start_n, k_ring, v_ring, sizes, scale_log2,
    GUARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """QK^T of block i_k, PV of block i_v, the softmax of block i_k. Without `more` there is no i_k: only PV counts."""
    BN: gl.constexpr = zero.shape[1]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    wait_full(k_ring, i_k, STAGES, more)
    k = k_ring[0].index(i_k % STAGES).reshape([BN, HEAD_DIM])
    v = v_ring[0].index(i_v % STAGES).reshape([BN, HEAD_DIM])
    qk_pending = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])  # waits for nothing: keeps the rescaling below the issue of QK^T
    wait_full(v_ring, i_v, STAGES)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout)), 1)
    acc_pending = warpgroup_mma(p16, v, acc, is_async=True)
    qk = warpgroup_mma_wait(1, deps=[qk_pending])
    release(k_ring, i_k, STAGES, more)
    if mask:
        qk = masked(qk, offs_m, start_n, sizes)
    p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, scale_log2, GUARD)
    # The next V is needed next anyway. Its wait ends the basic block: ptxas would else hoist the wait for PV above the
    # softmax, and nothing would overlap.
    wait_full(v_ring, i_v + 1, STAGES, more)
    acc, p16, p = warpgroup_mma_wait(0, deps=[acc_pending, p16, p])
    release(v_ring, i_v, STAGES)
    return gl.convert_layout(p.to(p16.dtype), p16.type.layout), acc, m_i, l_i, alpha


@gluon.jit
def consumer(g: gl.constexpr, args, sizes, GUARD: gl.constexpr, GROUPS: gl.constexpr):
    """Rows g * 64 .. of every tile: softmax(Q K^T) V for one warpgroup, from the last block of keys to the first."""
    o_desc, LSE, o_bufs, rings, table, heads_q, scale_log2 = args
    q_ring, k_ring, v_ring = rings
    Q_SLOTS: gl.constexpr = q_ring[0].shape[0]
    STAGES: gl.constexpr = k_ring[0].shape[0]
    BN: gl.constexpr = v_ring[0].shape[3]
    HEAD_DIM: gl.constexpr = v_ring[0].shape[4]
    dtype: gl.constexpr = o_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    tiles = gl.load(table + gl.program_id(0) * 2)
    rows = g * MW + gl.arange(0, MW, layout=gl.SliceLayout(1, S_LAYOUT))
    zero = gl.zeros([MW, BN], gl.float32, S_LAYOUT)
    m_none = gl.full([MW], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    l_none = part_sums(zero)

    # the first tile's first block has no tile before it to hide under
    head, start_m, lo, tile_hi = tile_of(table, 0, GROUPS * MW)
    hi, whole = own_blocks(start_m + g * MW, lo, tile_hi, sizes, BN)
    i = tile_hi - hi  # number of the block of keys whose softmax is done last
    qk = first_scores(rings, g, i, zero, HEAD_DIM)
    qk = masked(qk, start_m + rows, (hi - 1) * BN, sizes)
    p, alpha, m_i, l_i = online_softmax(qk, m_none, l_none, scale_log2, GUARD)
    p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    for t in range(tiles):
        q = q_ring[0].index((t * GROUPS + g) % Q_SLOTS).reshape([MW, HEAD_DIM])
        acc = gl.zeros([MW, HEAD_DIM], gl.float32, O_LAYOUT)
        if GUARD:
            for j in range(hi - 2, whole - 1, -1):
                p16, acc, m_i, l_i, alpha = step(
                    i + 1, i, True, q, p16, acc, m_i, l_i, alpha, zero, True, start_m + rows, j * BN, k_ring, v_ring,
                    sizes, scale_log2, True, STAGES,
                )  # fmt: skip
                i += 1
            hi = gl.minimum(hi, whole + 1)
        for _j in range(hi - 2, lo - 1, -1):
            p16, acc, m_i, l_i, alpha = step(
                i + 1, i, True, q, p16, acc, m_i, l_i, alpha, zero, False, rows, 0, k_ring, v_ring, sizes, scale_log2,
                GUARD, STAGES,
            )  # fmt: skip
            i += 1
        # v7: the next tile's first block, under this tile's last PV; after the last tile it is a step without a block
        more = t + 1 < tiles
        next_head, next_m, next_lo, next_tile_hi = tile_of(table, t + 1, GROUPS * MW)
        next_hi, next_whole = own_blocks(next_m + g * MW, next_lo, next_tile_hi, sizes, BN)
        first = i + 1 + gl.where(more, next_tile_hi - next_hi, 0)
        wait_full(q_ring, (t + 1) * GROUPS + g, Q_SLOTS, more)
        skip(k_ring, i + 1, first, STAGES)
        q = q_ring[0].index(((t + 1) * GROUPS + g) % Q_SLOTS).reshape([MW, HEAD_DIM])
        mask = True if GUARD else next_hi > next_whole  # with GUARD nearly each first block needs it
        p16, acc, next_m_i, next_l_i, alpha = step(
            first, i, more, q, p16, acc, m_none, l_none, alpha, zero, mask, next_m + rows,
            (next_hi - 1) * BN, k_ring, v_ring, sizes, scale_log2, GUARD, STAGES,
        )  # fmt: skip
        skip(v_ring, i + 1, first, STAGES)
        i = first
        l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S_LAYOUT))
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l_row, gl.SliceLayout(1, O_LAYOUT)), 1)
        tma.store_wait(0)  # of the tile before: long done
        o_bufs.index(g).reshape([MW, HEAD_DIM]).store(acc.to(dtype))
        fence_async_shared()
        tma_store(o_desc, [head // heads_q, head % heads_q, start_m + g * MW, 0], o_bufs.index(g))
        release(q_ring, t * GROUPS + g, Q_SLOTS)
        if LSE is not None:
            lse = (m_i * scale_log2 + gl.log2(l_row)) * 0.6931471805599453
            lse_ptrs = LSE + head.to(gl.int64) * sizes[0] + start_m + rows
            gl.store(lse_ptrs, lse, mask=start_m + rows < sizes[0])
        head, start_m, lo, hi, whole = next_head, next_m, next_lo, next_hi, next_whole
        m_i, l_i = next_m_i, next_l_i
    tma.store_wait(0)


@gluon.jit
def flash_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, LSE,  # [batch, heads, rows, HEAD_DIM]; float32 [batch, heads_q, seqlen_q] or None
    table,  # int32: common/tile_table.py
    heads_q, group, seqlen_q, seqlen_k, scale_log2, window_left, window_right,
    GUARD: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_ring = allocate_ring(q_desc, 2 * GROUPS, 1)
    rings = (q_ring, allocate_ring(k_desc, STAGES, GROUPS), allocate_ring(v_desc, STAGES, GROUPS))
    o_bufs = gl.allocate_shared_memory(o_desc.dtype, [GROUPS] + o_desc.block_type.shape, o_desc.layout)
    sizes = (seqlen_q, seqlen_k, window_left, window_right)
    args = (o_desc, LSE, o_bufs, rings, table, heads_q, scale_log2)
    descs = (q_desc, k_desc, v_desc)
    if GROUPS == 2:
        gl.warp_specialize([
            (consumer, (0, args, sizes, GUARD, 2)), (consumer, (1, args, sizes, GUARD, 2)),
            (producer, (descs, rings, table, heads_q, group, 2)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (0, args, sizes, GUARD, 3)), (consumer, (1, args, sizes, GUARD, 3)),
            (consumer, (2, args, sizes, GUARD, 3)), (producer, (descs, rings, table, heads_q, group, 3)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def tiles_for(problem: AttentionProblem) -> Tiles:
    """Three groups at head_dim 64, where their registers suffice; two where rows are few, to fill the SMs evenly."""
    if block_d(problem) > 64:
        return Tiles(128, 128, 4, 2)
    return Tiles(192, 128, 4, 2) if problem.seqlen_q > 1024 else Tiles(128, 128, 4, 3)


def declines(q, k, v, **kwargs):
    """What v6 declines, wide heads, and more tiles than the table can name."""
    batch, heads = (1, q.shape[1]) if q.ndim == 3 else q.shape[:2]
    return _beyond(batch * heads, q.shape[-1]) or declines_on_hopper(q, k, v, **kwargs)


def _beyond(heads, head_dim):
    if head_dim > 128:
        return f"takes head_dim up to 128, not {head_dim}"
    return None if heads <= MAX_HEADS else f"takes up to {MAX_HEADS} heads over all sequences, not {heads}"


def call_flash_attention_v7(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out,
    )  # fmt: skip
    refuse_on_hopper(problem, _beyond(problem.batch * problem.heads_q, problem.head_dim))
    turn_negative_scale(problem)
    p, (BLOCK_M, BLOCK_N, num_warps, stages) = problem, tiles or tiles_for(problem)
    width, groups = max(64, block_d(p)), BLOCK_M // 64
    right, guard = right_and_guard(p, BLOCK_N)
    table, programs = tile_table(p, BLOCK_M, BLOCK_N)
    launch(
        flash_attention_kernel, (programs,), p.q.device,
        descriptor(p.q, 64, width), descriptor(p.k, BLOCK_N, width), descriptor(p.v, BLOCK_N, width),
        descriptor(p.out, 64, width), p.lse, table, p.heads_q, p.group, p.seqlen_q, p.seqlen_k, scale_log2(p),
        p.window_left, right, GUARD=guard, GROUPS=groups, HEAD_DIM=width, BLOCK_N=BLOCK_N, STAGES=stages,
        num_warps=num_warps, maxnreg=168 if groups == 2 else 128,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="prefill", number=7, title="persistent, overlapping tiles",
    idea="One program an SM goes from tile to tile, longest first; a tile's end runs under the next one's beginning.",
    parent=6, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_attention_v7, kernels=(flash_attention_kernel,), tiles=tiles_for, declines=declines,
)  # fmt: skip
