"""FlashAttention v10: the maximum can wait, in FP8.

Idea: v9's softmax on v8's loop. FP8 products take half the time, so what the softmax does without is worth twice.
Changed: v8's softmax, and the packing of P, are common/lazy_softmax.py's. P is times 32 where it was times 256: e4m3
  ends at 448, and what lies between is how far scores may rise above the maximum that is known. Three groups and 64
  keys a block at D=128, above 1024 rows.
Expect: in an exploration v9 made v7 11 % faster at D=128, S=8k, full, and 17 % at D=64: half as much again here.
Limits: v8's, and head_dim at most 128: beyond, scores, P and the output do not fit the registers together. P below
  2^-14 of a row's maximum vanishes, where v8 keeps it to 2^-17.
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
    declines_fp8_on_hopper,
    descriptor,
    even_odd_descriptor,
    for_tma,
    masked,
    refuse_on_hopper,
    release,
    skip,
    tma_store,
    wait_full,
)
from common.launch import Tiles, block_d, launch
from common.lazy_softmax import columns_of, lazy_softmax, operand, p_shift, rescaled
from common.lineage import Requires, Version
from common.persistent import MW, first_scores, own_blocks, producer, right_and_guard, scale_of, tile_of
from common.problem import AttentionProblem
from common.quantize import quantize_problem
from common.tile_table import MAX_HEADS, tile_table


@gluon.jit
def in_key_order(qk, LAYOUT: gl.constexpr):
    """[rows, even keys and then odd ones] to [rows, keys] as PV's operand has them: all stay in their registers."""
    ROWS: gl.constexpr = qk.shape[0]
    KEYS: gl.constexpr = qk.shape[1]
    qk = qk.reshape([ROWS, 2, KEYS // 2]).permute((0, 2, 1)).reshape([ROWS, KEYS])
    return gl.convert_layout(qk, LAYOUT, assert_trivial=True)


@gluon.jit
def step(
    i_k, i_v, more, q, p, acc, m_i, l_i, zero, mask, offs_m, start_n, k_ring, v_ring, sizes, scale_log2,
    FIRST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """QK^T of block i_k, PV of block i_v, the softmax of block i_k. Without `more` there is no i_k: only PV counts.

    FIRST: block i_k is the first of the next tile, PV the last of this one.
    """
    BN: gl.constexpr = zero.shape[1]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    wait_full(k_ring, i_k, STAGES, more)
    k = k_ring[0].index(i_k % STAGES).reshape([BN, HEAD_DIM])
    v = v_ring[0].index(i_v % STAGES).reshape([HEAD_DIM, BN])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 4)
    qk_pending = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    wait_full(v_ring, i_v, STAGES)
    acc_pending = warpgroup_mma(operand(p, P_LAYOUT, v.dtype), v.permute((1, 0)), acc, is_async=True)
    qk = warpgroup_mma_wait(1, deps=[qk_pending])
    release(k_ring, i_k, STAGES, more)
    qk = in_key_order(qk, P_LAYOUT)
    if mask:
        qk = masked(qk, offs_m, start_n, sizes)
    p_new, sums, m_i, alpha = lazy_softmax(qk, m_i, scale_log2, v.dtype, FIRST)  # v10
    # The next V is needed next anyway. Its wait ends the basic block: ptxas would else hoist the wait for PV above the
    # softmax, and nothing would overlap.
    wait_full(v_ring, i_v + 1, STAGES, more)
    acc, p, p_new = warpgroup_mma_wait(0, deps=[acc_pending, p, p_new])
    release(v_ring, i_v, STAGES)
    p_new = p_new ^ (sizes[1] >> 31)  # zero, as in v9
    if FIRST:
        return p_new, acc, m_i, sums
    return p_new, rescaled(acc, alpha), m_i, l_i * alpha + sums


@gluon.jit
def consumer(g: gl.constexpr, args, sizes, GUARD: gl.constexpr, GROUPS: gl.constexpr):
    """Rows g * 64 .. of every tile: softmax(Q K^T) V for one warpgroup, from the last block of keys to the first."""
    o_desc, LSE, o_bufs, rings, table, heads_q, group, scale_log2, descales = args
    q_ring, k_ring, v_ring = rings
    Q_SLOTS: gl.constexpr = q_ring[0].shape[0]
    STAGES: gl.constexpr = k_ring[0].shape[0]
    HEAD_DIM: gl.constexpr = v_ring[0].shape[3]
    BN: gl.constexpr = v_ring[0].shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4)
    tiles = gl.load(table + gl.program_id(0) * 2)
    rows = g * MW + gl.arange(0, MW, layout=gl.SliceLayout(1, P_LAYOUT))
    zero = gl.zeros([MW, BN], gl.float32, S_LAYOUT)
    m_none = gl.full([MW, 4], -float("inf"), gl.float32, columns_of(in_key_order(zero, P_LAYOUT), 4)[0].type.layout)

    # the first tile's first block has no tile before it to hide under
    head, start_m, lo, tile_hi = tile_of(table, 0, GROUPS * MW)
    scale = scale_of(head, group, descales, scale_log2)
    hi, whole = own_blocks(start_m + g * MW, lo, tile_hi, sizes, BN)
    i = tile_hi - hi  # number of the block of keys whose softmax is done last
    qk = first_scores(rings, g, i, zero, HEAD_DIM)
    qk = masked(in_key_order(qk, P_LAYOUT), start_m + rows, (hi - 1) * BN, sizes)
    p, l_i, m_i, _alpha = lazy_softmax(qk, m_none, scale, v_ring[0].dtype, True)
    for t in range(tiles):
        q = q_ring[0].index((t * GROUPS + g) % Q_SLOTS).reshape([MW, HEAD_DIM])
        acc = gl.zeros([MW, HEAD_DIM], gl.float32, O_LAYOUT)
        # One loop, with a branch around the mask. Of two, a masked one first, ptxas (CUDA 12.8) has the second use what
        # the first computed of Q's address, and that is never computed where the first has no turn.
        for j in range(hi - 2, lo - 1, -1):
            mask = j >= whole if GUARD else False
            p, acc, m_i, l_i = step(
                i + 1, i, True, q, p, acc, m_i, l_i, zero, mask, start_m + rows, j * BN, k_ring, v_ring, sizes, scale,
                False, STAGES,
            )  # fmt: skip
            i += 1
        # the next tile's first block, under this tile's last PV; after the last tile it is a step without a block
        release(q_ring, t * GROUPS + g, Q_SLOTS)
        more = t + 1 < tiles
        next_head, next_m, next_lo, next_tile_hi = tile_of(table, t + 1, GROUPS * MW)
        next_scale = scale_of(next_head, group, descales, scale_log2)
        next_hi, next_whole = own_blocks(next_m + g * MW, next_lo, next_tile_hi, sizes, BN)
        first = i + 1 + gl.where(more, next_tile_hi - next_hi, 0)
        wait_full(q_ring, (t + 1) * GROUPS + g, Q_SLOTS, more)
        skip(k_ring, i + 1, first, STAGES)
        q = q_ring[0].index(((t + 1) * GROUPS + g) % Q_SLOTS).reshape([MW, HEAD_DIM])
        mask = True if GUARD else next_hi > next_whole  # with GUARD nearly each first block needs it
        p, acc, next_m_i, next_l_i = step(
            first, i, more, q, p, acc, m_none, l_i, zero, mask, next_m + rows, (next_hi - 1) * BN,
            k_ring, v_ring, sizes, next_scale, True, STAGES,
        )  # fmt: skip
        skip(v_ring, i + 1, first, STAGES)
        i = first
        l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, P_LAYOUT))
        factor = gl.load(descales[2] + head // group) / l_row
        acc = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT)), 1)
        tma.store_wait(0)  # of the tile before: long done
        o_bufs.index(g).reshape([MW, HEAD_DIM]).store(acc.to(o_desc.dtype))
        fence_async_shared()
        tma_store(o_desc, [head // heads_q, head % heads_q, start_m + g * MW, 0], o_bufs.index(g))
        if LSE is not None:
            m_row = gl.convert_layout(gl.max(m_i, 1), l_row.type.layout)
            lse = (m_row + gl.log2(l_row) - p_shift(v_ring[0].dtype)) * 0.6931471805599453
            lse_ptrs = LSE + head.to(gl.int64) * sizes[0] + start_m + rows
            gl.store(lse_ptrs, lse, mask=start_m + rows < sizes[0])
        head, start_m, lo, hi, whole = next_head, next_m, next_lo, next_hi, next_whole
        scale, m_i, l_i = next_scale, next_m_i, next_l_i
    tma.store_wait(0)


@gluon.jit
def flash_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, LSE,  # 8 bits: [batch, heads, rows, HEAD_DIM], [.., 2, keys / 2, HEAD_DIM],
    # [.., HEAD_DIM, keys]; 16 bits: like Q; float32 [batch, heads_q, seqlen_q] or None
    descale_q, descale_k, descale_v,  # float32 [batch, heads_q], [batch, heads_kv] twice
    table,  # int32: common/tile_table.py
    heads_q, group, seqlen_q, seqlen_k, scale_log2, window_left, window_right,
    GUARD: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_ring = allocate_ring(q_desc, 2 * GROUPS, 1)
    rings = (q_ring, allocate_ring(k_desc, STAGES, GROUPS), allocate_ring(v_desc, STAGES, GROUPS))
    o_bufs = gl.allocate_shared_memory(o_desc.dtype, [GROUPS] + o_desc.block_type.shape, o_desc.layout)
    sizes = (seqlen_q, seqlen_k, window_left, window_right)
    args = (o_desc, LSE, o_bufs, rings, table, heads_q, group, scale_log2, (descale_q, descale_k, descale_v))
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
    """Three groups, with 64 keys at head_dim 128; two where rows are few, to fill the SMs evenly."""
    if problem.seqlen_q <= 1024:
        return Tiles(128, 128, 4, 3)
    return Tiles(192, 64 if block_d(problem) > 64 else 128, 4, 3)


def declines(q, k, v, **kwargs):
    """What v8 declines, and wide heads."""
    batch, heads = (1, q.shape[1]) if q.ndim == 3 else q.shape[:2]
    return _beyond(batch * heads, q.shape[-1], kwargs.get("use_fp8")) or declines_fp8_on_hopper(q, k, v, **kwargs)


def _beyond(heads, head_dim, use_fp8):
    if not use_fp8:
        return "takes FP8 alone"
    if head_dim > 128:
        return f"takes head_dim up to 128, not {head_dim}"
    return None if heads <= MAX_HEADS else f"takes up to {MAX_HEADS} heads over all sequences, not {heads}"


def call_flash_attention_v10(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None, use_fp8=False, fp8_dtype="e4m3", descale_q=None, descale_k=None, descale_v=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out, use_fp8=use_fp8, fp8_dtype=fp8_dtype,
        descales=(descale_q, descale_k, descale_v),
    )  # fmt: skip
    refuse_on_hopper(problem, _beyond(problem.batch * problem.heads_q, problem.head_dim, use_fp8), fp8=True)
    turn_negative_scale(problem)
    quantize_problem(problem, fp8_dtype)
    p, (BLOCK_M, BLOCK_N, num_warps, stages) = problem, tiles or tiles_for(problem)
    width, groups = max(64, block_d(p)), BLOCK_M // 64
    q, k, v = for_tma(p.q), for_tma(p.k, even_rows=True), for_tma(p.v.transpose(2, 3))
    right, guard = right_and_guard(p, BLOCK_N)
    table, programs = tile_table(p, BLOCK_M, BLOCK_N)
    launch(
        flash_attention_kernel, (programs,), p.q.device,
        descriptor(q, 64, width), even_odd_descriptor(k, BLOCK_N, width), descriptor(v, width, BLOCK_N),
        descriptor(p.out, 64, width), p.lse, *p.descales, table, p.heads_q, p.group, p.seqlen_q, p.seqlen_k,
        scale_log2(p), p.window_left, right, GUARD=guard, GROUPS=groups, HEAD_DIM=width, BLOCK_N=BLOCK_N,
        STAGES=stages, num_warps=num_warps, maxnreg=168 if groups == 2 else 128,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="prefill", number=10, title="the maximum can wait, in FP8",
    idea="v9's softmax on v8's FP8 loop.",
    parent=8, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_attention_v10, kernels=(flash_attention_kernel,), tiles=tiles_for, fp8=True, half=False,
    declines=declines,
)  # fmt: skip
