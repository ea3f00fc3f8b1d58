"""FlashAttention v9: the maximum can wait.

Idea: the running maximum keeps exp2 in range, no more, and the one of the blocks before does as well. The sum of a
  block, needed anyway, tells if it did: only a warp where it did not looks for the new one and does the block again.
  So most blocks have no comparisons, no shuffles, and nothing to rescale (FlashAttention-4 leaves out the rescaling).
Changed: common/lazy_softmax.py is the softmax: PTX, with the branch in it. Maximum and alpha are each thread's own,
  [rows, 4]. Three groups (D=64) wait for PV first: 160 registers. Output in pieces of 64 columns: head_dim to 256.
Expect: 132 of a block's 460 instructions go, and the wait for the maximum ahead of the first exponential. Leaving out
  the maximum alone, wrongly, made v7 8 % faster, leaving out the rescaling 4 %: 10 % together at 8k, D=64 more.
Limits: v6's. Scores that rise by more than 2^15 from one block to the next are worked out twice.
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
from common.lazy_softmax import columns_of, lazy_softmax, operand, rescaled
from common.lineage import Requires, Version
from common.persistent import MW, first_scores, own_blocks, producer, right_and_guard, tile_of
from common.problem import AttentionProblem
from common.tile_table import MAX_HEADS, tile_table


@gluon.jit
def quarters(acc):
    """acc [rows, HEAD_DIM] as tensors [rows, 64]: their columns, in order."""
    if acc.shape[1] == 64:
        return (acc,)
    else:
        a, b = gl.split(acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute((0, 2, 1)))
        return quarters(a) + quarters(b)


@gluon.jit
def step(
    i_k, i_v, more, q, p, acc, m_i, l_i, zero, mask, offs_m, start_n, k_ring, v_ring, sizes, scale_log2,
    FIRST: gl.constexpr, OVERLAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """QK^T of block i_k, PV of block i_v, the softmax of block i_k. Without `more` there is no i_k: only PV counts.

    FIRST: block i_k is the first of the next tile, PV the last of this one.
    """
    BN: gl.constexpr = zero.shape[1]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    wait_full(k_ring, i_k, STAGES, more)
    k = k_ring[0].index(i_k % STAGES).reshape([BN, HEAD_DIM])
    v = v_ring[0].index(i_v % STAGES).reshape([BN, HEAD_DIM])
    p16 = operand(p, gl.DotOperandLayout(0, acc.type.layout, 2), v.dtype)
    qk_pending = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    wait_full(v_ring, i_v, STAGES)
    acc_pending = warpgroup_mma(p16, v, acc, is_async=True)
    qk = warpgroup_mma_wait(1, deps=[qk_pending])
    release(k_ring, i_k, STAGES, more)
    if not OVERLAP:
        acc, p16, qk = warpgroup_mma_wait(0, deps=[acc_pending, p16, qk])
        release(v_ring, i_v, STAGES)
    if mask:
        qk = masked(qk, offs_m, start_n, sizes)
    p, sums, m_i, alpha = lazy_softmax(qk, m_i, scale_log2, v.dtype, FIRST)  # v9
    if OVERLAP:
        # The next V is needed next anyway. Its wait ends the basic block: ptxas would else hoist the wait for PV above
        # the softmax, and nothing would overlap.
        wait_full(v_ring, i_v + 1, STAGES, more)
        acc, p16, p = warpgroup_mma_wait(0, deps=[acc_pending, p16, p])
        release(v_ring, i_v, STAGES)
        # Zero, which ptxas does not know: p has to be moved here, into the registers that PV has read until now. Left
        # to choose, ptxas writes p into them right away and makes every product wait for the one before it.
        p = p ^ (sizes[1] >> 31)
    if FIRST:
        return p, acc, m_i, sums
    return p, rescaled(acc, alpha), m_i, l_i * alpha + sums


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
    O_SLOTS: gl.constexpr = min(2, HEAD_DIM // 64)
    OVERLAP: gl.constexpr = GROUPS == 2  # a group's own products and softmax
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    tiles = gl.load(table + gl.program_id(0) * 2)
    rows = g * MW + gl.arange(0, MW, layout=gl.SliceLayout(1, S_LAYOUT))
    zero = gl.zeros([MW, BN], gl.float32, S_LAYOUT)
    m_none = gl.full([MW, 4], -float("inf"), gl.float32, columns_of(zero, 2)[0].type.layout)

    # the first tile's first block has no tile before it to hide under
    _head, start_m, lo, tile_hi = tile_of(table, 0, GROUPS * MW)
    hi, whole = own_blocks(start_m + g * MW, lo, tile_hi, sizes, BN)
    i = tile_hi - hi  # number of the block of keys whose softmax is done last
    qk = first_scores(rings, g, i, zero, HEAD_DIM)
    qk = masked(qk, start_m + rows, (hi - 1) * BN, sizes)
    p, l_i, m_i, _alpha = lazy_softmax(qk, m_none, scale_log2, dtype, True)
    for t in range(tiles):
        q = q_ring[0].index((t * GROUPS + g) % Q_SLOTS).reshape([MW, HEAD_DIM])
        acc = gl.zeros([MW, HEAD_DIM], gl.float32, O_LAYOUT)
        # One loop, with a branch around the mask. Of two, a masked one first, ptxas (CUDA 12.8) has the second use what
        # the first computed of Q's address, and that is never computed where the first has no turn.
        for j in range(hi - 2, lo - 1, -1):
            mask = j >= whole if GUARD else False
            p, acc, m_i, l_i = step(
                i + 1, i, True, q, p, acc, m_i, l_i, zero, mask, start_m + rows, j * BN, k_ring, v_ring, sizes,
                scale_log2, False, OVERLAP, STAGES,
            )  # fmt: skip
            i += 1
        # the next tile's first block, under this tile's last PV; after the last tile it is a step without a block
        release(q_ring, t * GROUPS + g, Q_SLOTS)
        more = t + 1 < tiles
        _head, next_m, next_lo, tile_hi = tile_of(table, t + 1, GROUPS * MW)
        next_hi, next_whole = own_blocks(next_m + g * MW, next_lo, tile_hi, sizes, BN)
        first = i + 1 + gl.where(more, tile_hi - next_hi, 0)
        wait_full(q_ring, (t + 1) * GROUPS + g, Q_SLOTS, more)
        skip(k_ring, i + 1, first, STAGES)
        q = q_ring[0].index(((t + 1) * GROUPS + g) % Q_SLOTS).reshape([MW, HEAD_DIM])
        # with GUARD nearly each first block needs the mask; at head_dim 256 the branch would spill inside the loop
        mask = next_hi > next_whole if HEAD_DIM < 256 and not GUARD else True
        p, acc, next_m_i, next_l_i = step(
            first, i, more, q, p, acc, m_none, l_i, zero, mask, next_m + rows, (next_hi - 1) * BN,
            k_ring, v_ring, sizes, scale_log2, True, OVERLAP and HEAD_DIM < 256, STAGES,
        )  # fmt: skip
        skip(v_ring, i + 1, first, STAGES)
        i = first
        l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S_LAYOUT))
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l_row, gl.SliceLayout(1, O_LAYOUT)), 1)
        head, start_m, _lo, _hi = tile_of(table, t, GROUPS * MW)
        parts = quarters(acc)
        for c in gl.static_range(HEAD_DIM // 64):
            o_buf = o_bufs.index(g * O_SLOTS + c % O_SLOTS)
            tma.store_wait(O_SLOTS - 1)  # the store that read this buffer
            o_buf.reshape([MW, 64]).store(parts[c].to(dtype))
            fence_async_shared()
            tma_store(o_desc, [head // heads_q, head % heads_q, start_m + g * MW, c * 64], o_buf)
        if LSE is not None:
            lse = (gl.convert_layout(gl.max(m_i, 1), l_row.type.layout) + gl.log2(l_row)) * 0.6931471805599453
            lse_ptrs = LSE + head.to(gl.int64) * sizes[0] + start_m + rows
            gl.store(lse_ptrs, lse, mask=start_m + rows < sizes[0])
        start_m, lo, hi, whole, m_i, l_i = next_m, next_lo, next_hi, next_whole, next_m_i, next_l_i
    tma.store_wait(0)


@gluon.jit
def flash_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, LSE,  # [batch, heads, rows, HEAD_DIM]; float32 [batch, heads_q, seqlen_q] or None
    table,  # int32: common/tile_table.py
    heads_q, group, seqlen_q, seqlen_k, scale_log2, window_left, window_right,
    GUARD: gl.constexpr, GROUPS: gl.constexpr, Q_SLOTS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    O_SLOTS: gl.constexpr = min(2, HEAD_DIM // 64)
    q_ring = allocate_ring(q_desc, Q_SLOTS, 1)
    rings = (q_ring, allocate_ring(k_desc, STAGES, GROUPS), allocate_ring(v_desc, STAGES, GROUPS))
    o_bufs = gl.allocate_shared_memory(o_desc.dtype, [O_SLOTS * GROUPS] + o_desc.block_type.shape, o_desc.layout)
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
    """Three groups at head_dim 64, where their registers suffice; 64 keys there where a tile has few blocks of 128."""
    if block_d(problem) > 64:
        return Tiles(128, 128 if block_d(problem) == 128 else 64, 4, 2)
    return Tiles(192, 128 if problem.seqlen_q > 2048 else 64, 4, 4)


def declines(q, k, v, **kwargs):
    """What v6 declines, and more tiles than the table can name."""
    batch, heads = (1, q.shape[1]) if q.ndim == 3 else q.shape[:2]
    return _beyond(batch * heads) or declines_on_hopper(q, k, v, **kwargs)


def _beyond(heads):
    return None if heads <= MAX_HEADS else f"takes up to {MAX_HEADS} heads over all sequences, not {heads}"


def call_flash_attention_v9(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out,
    )  # fmt: skip
    refuse_on_hopper(problem, _beyond(problem.batch * problem.heads_q))
    turn_negative_scale(problem)
    p, (BLOCK_M, BLOCK_N, num_warps, stages) = problem, tiles or tiles_for(problem)
    width, groups = max(64, block_d(p)), BLOCK_M // 64
    right, guard = right_and_guard(p, BLOCK_N)
    fits = width * (2 * BLOCK_M + 2 * BLOCK_N * stages) + 128 * BLOCK_M <= 113 * 1024  # Q twice; in 16-bit numbers
    table, programs = tile_table(p, BLOCK_M, BLOCK_N)
    launch(
        flash_attention_kernel, (programs,), p.q.device,
        descriptor(p.q, 64, width), descriptor(p.k, BLOCK_N, width), descriptor(p.v, BLOCK_N, width),
        descriptor(p.out, 64, 64), p.lse, table, p.heads_q, p.group, p.seqlen_q, p.seqlen_k, scale_log2(p),
        p.window_left, right, GUARD=guard, GROUPS=groups,
        Q_SLOTS=groups * (2 if fits else 1), HEAD_DIM=width, BLOCK_N=BLOCK_N, STAGES=stages, num_warps=num_warps,
        maxnreg=168 if groups == 2 else 128,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="prefill", number=9, title="the maximum can wait",
    idea="A block is worked out with the maximum of those before it; a warp whose sums grow too large does it again.",
    parent=7, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_attention_v9, kernels=(flash_attention_kernel,), tiles=tiles_for, declines=declines,
)  # fmt: skip
