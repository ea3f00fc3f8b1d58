"""FlashAttention v6: Gluon, a producer warp and two consumer warpgroups.

Idea: hand the warps different jobs. One warp keeps TMA loads in flight; two warpgroups of 64 rows each start the next
  block's QK^T before this block's PV and work out the softmax while the tensor cores run (FlashAttention-3, Shah
  2024).
Changed: a new start, in Gluon: what the compiler did in v5 is written out. Barriers, layouts and waits are ours.
Expect: v5 leaves the tensor cores idle while a group does its softmax, so about 520 of a possible 650 TFLOP/s; with
  both products asynchronous the softmax hides under them: 600 at D=128 full.
Limits: Hopper only; 16-bit, full blocks of the TMA unit (16-byte steps), scale > 0, no lengths, no empty rows.
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
    fill,
    key_blocks,
    masked,
    refuse_on_hopper,
    release,
    skip,
    tma_store,
    wait_full,
)
from common.launch import Tiles, block_d, cdiv, launch
from common.lineage import Requires, Version
from common.problem import AttentionProblem
from common.schedule import heads_in_l2


@gluon.jit
def tile_of(n_m, n_g, heads_q, heads_kv, BLOCK_M: gl.constexpr):
    """Batch, head, KV head and first row of this program: the last rows first, n_g heads side by side."""
    pid = gl.program_id(0)
    first = pid // (n_m * n_g) * n_g
    n_g = gl.minimum(n_g, gl.num_programs(0) // n_m - first)
    r = pid - first * n_m
    off_bh = first + r % n_g
    off_h = off_bh % heads_q
    return off_bh // heads_q, off_h, off_h // (heads_q // heads_kv), (n_m - 1 - r // n_g) * BLOCK_M


@gluon.jit
def producer(descs, q_ring, k_ring, v_ring, tile, sizes, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):
    q_desc, k_desc, v_desc = descs
    off_b, off_h, off_hk, start_m = tile
    lo, hi, _ = key_blocks(start_m, sizes, BM, BN)
    for g in gl.static_range(2):
        fill(q_ring, q_desc, [off_b, off_h, start_m + g * (BM // 2), 0], g, 2)
    fill(k_ring, k_desc, [off_b, off_hk, (hi - 1) * BN, 0], 0, STAGES)
    for j in range(1, hi - lo):
        fill(k_ring, k_desc, [off_b, off_hk, (hi - 1 - j) * BN, 0], j, STAGES)
        fill(v_ring, v_desc, [off_b, off_hk, (hi - j) * BN, 0], j - 1, STAGES)
    fill(v_ring, v_desc, [off_b, off_hk, lo * BN, 0], hi - lo - 1, STAGES)


@gluon.jit
def online_softmax(qk, m_i, l_i, scale_log2, GUARD: gl.constexpr):
    """p of one block, and what it does to the running maximum and sum; GUARD where a row may have seen nothing yet."""
    m_new = gl.maximum(m_i, gl.max(qk, 1))
    m_scaled = m_new * scale_log2
    if GUARD:
        m_scaled = gl.where(m_new == -float("inf"), 0.0, m_scaled)
    alpha = gl.exp2(m_i * scale_log2 - m_scaled)
    p = gl.exp2(qk * scale_log2 - gl.expand_dims(m_scaled, 1))
    return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)


@gluon.jit
def step(
    j, q, p16, acc, m_i, l_i, alpha, zero, offs_m, start_n, k_ring, v_ring, sizes, scale_log2, MASK: gl.constexpr,
    GUARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """QK^T of block j, PV of block j - 1, the softmax of block j."""
    BN: gl.constexpr = zero.shape[1]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    wait_full(k_ring, j, STAGES)
    k = k_ring[0].index(j % STAGES).reshape([BN, HEAD_DIM])
    v = v_ring[0].index((j - 1) % STAGES).reshape([BN, HEAD_DIM])
    qk_pending = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])  # waits for nothing: keeps the rescaling below the issue of QK^T
    wait_full(v_ring, j - 1, STAGES)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout)), 1)
    acc_pending = warpgroup_mma(p16, v, acc, is_async=True)
    qk = warpgroup_mma_wait(1, deps=[qk_pending])
    release(k_ring, j, STAGES)
    if MASK:
        qk = masked(qk, offs_m, start_n, sizes)
    p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, scale_log2, GUARD)
    # V of this block is needed next anyway. Its wait ends the basic block: ptxas would else hoist the wait for PV above
    # the softmax, and nothing would overlap.
    wait_full(v_ring, j, STAGES)
    acc, p16, p = warpgroup_mma_wait(0, deps=[acc_pending, p16, p])
    release(v_ring, j - 1, STAGES)
    return gl.convert_layout(p.to(p16.dtype), p16.type.layout), acc, m_i, l_i, alpha


@gluon.jit
def consumer(
    g: gl.constexpr, args, sizes, MASK: gl.constexpr, GUARD: gl.constexpr, HEAD_DIM: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows g * 64 .. of the tile: softmax(Q K^T) V for one warpgroup, from the last block of keys to the first."""
    o_desc, LSE, q_ring, k_ring, v_ring, tile, heads_q, scale_log2 = args
    MW: gl.constexpr = BM // 2
    dtype: gl.constexpr = o_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    off_b, off_h, _, start_m = tile
    lo, tile_hi, _ = key_blocks(start_m, sizes, BM, BN)
    start_m += g * MW
    _, hi, whole = key_blocks(start_m, sizes, MW, BN)  # this group's own: it may not see the tile's last blocks
    hi = gl.minimum(gl.maximum(hi, lo + 1), tile_hi)
    whole = gl.maximum(whole, lo)
    offs_m = start_m + gl.arange(0, MW, layout=gl.SliceLayout(1, S_LAYOUT))
    q = q_ring[0].index(g).reshape([MW, HEAD_DIM])
    zero = gl.zeros([MW, BN], gl.float32, S_LAYOUT)
    m_i = gl.full([MW], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    l_i = gl.zeros([MW], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([MW, HEAD_DIM], gl.float32, O_LAYOUT)

    wait_full(q_ring, g, 2)
    j = tile_hi - hi
    skip(k_ring, 0, j, STAGES)
    skip(v_ring, 0, j, STAGES)
    wait_full(k_ring, j, STAGES)
    k = k_ring[0].index(j % STAGES).reshape([BN, HEAD_DIM])
    qk = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    qk = warpgroup_mma_wait(0, deps=[qk])
    release(k_ring, j, STAGES)
    if MASK:
        qk = masked(qk, offs_m, (hi - 1) * BN, sizes)
    p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, scale_log2, GUARD)
    p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    if MASK and GUARD:
        for j in range(tile_hi - hi + 1, tile_hi - whole):
            p16, acc, m_i, l_i, alpha = step(
                j, q, p16, acc, m_i, l_i, alpha, zero, offs_m, (tile_hi - 1 - j) * BN, k_ring, v_ring, sizes,
                scale_log2, True, True, STAGES,
            )  # fmt: skip
        hi = gl.minimum(hi, whole + 1)
    for j in range(tile_hi - hi + 1, tile_hi - lo):
        # v6: QK^T of block j and PV of block j - 1 are in flight together; the softmax of block j runs under PV
        p16, acc, m_i, l_i, alpha = step(
            j, q, p16, acc, m_i, l_i, alpha, zero, offs_m, 0, k_ring, v_ring, sizes, scale_log2, False, GUARD, STAGES
        )

    last = tile_hi - lo - 1
    wait_full(v_ring, last, STAGES)
    v = v_ring[0].index(last % STAGES).reshape([BN, HEAD_DIM])
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT)), 1)
    acc = warpgroup_mma(p16, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, O_LAYOUT)), 1)
    q.store(acc.to(dtype))  # the query's shared memory carries the output
    fence_async_shared()
    tma_store(o_desc, [off_b, off_h, start_m, 0], q_ring[0].index(g))
    if LSE is not None:
        lse = (m_i * scale_log2 + gl.log2(l_i)) * 0.6931471805599453
        gl.store(LSE + (off_b * heads_q + off_h).to(gl.int64) * sizes[0] + offs_m, lse, mask=offs_m < sizes[0])
    tma.store_wait(0)


@gluon.jit
def flash_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, LSE,  # [batch, heads, rows, HEAD_DIM]; float32 [batch, heads_q, seqlen_q] or None
    heads_q, heads_kv, seqlen_q, seqlen_k, scale_log2, window_left, window_right, n_m, n_g,
    MASK: gl.constexpr, GUARD: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_ring = allocate_ring(q_desc, 2, 1)
    k_ring = allocate_ring(k_desc, STAGES, 2)
    v_ring = allocate_ring(v_desc, STAGES, 2)
    tile = tile_of(n_m, n_g, heads_q, heads_kv, BLOCK_M)
    sizes = (seqlen_q, seqlen_k, window_left, window_right)
    args = (o_desc, LSE, q_ring, k_ring, v_ring, tile, heads_q, scale_log2)
    gl.warp_specialize([
        (consumer, (0, args, sizes, MASK, GUARD, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
        (consumer, (1, args, sizes, MASK, GUARD, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
        (producer, ((q_desc, k_desc, v_desc), q_ring, k_ring, v_ring, tile, sizes, BLOCK_M, BLOCK_N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip  # 12 warps of 168 registers: two groups take 240 and leave the producer 24


def tiles_for(problem: AttentionProblem) -> Tiles:
    """128 rows, 64 a warpgroup; as many keys as fit beside them twice."""
    return Tiles(128, 64 if problem.head_dim > 128 else 128, 4, 2)


def call_flash_attention_v6(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False, out=None,
    tiles=None,
):  # fmt: skip
    """Attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D] (or [S, H, D] each), as prefill.flash_attention says."""
    problem = AttentionProblem.prefill(
        q, k, v, is_causal=is_causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        return_lse=return_lse, out=out,
    )  # fmt: skip
    refuse_on_hopper(problem)
    turn_negative_scale(problem)
    p, (BLOCK_M, BLOCK_N, num_warps, stages) = problem, tiles or tiles_for(problem)
    width, n_m = max(64, block_d(p)), cdiv(p.seqlen_q, BLOCK_M)
    bounded = p.window_left is not None or p.window_right is not None
    # where the diagonal meets the corners of blocks, a group's first block holds a key for each of its rows
    aligned = p.window_left is None and (not bounded or (p.seqlen_k - p.seqlen_q + p.window_right) % BLOCK_N == 0)
    launch(
        flash_attention_kernel, (n_m * p.batch * p.heads_q,), p.q.device,
        descriptor(p.q, BLOCK_M // 2, width), descriptor(p.k, BLOCK_N, width), descriptor(p.v, BLOCK_N, width),
        descriptor(p.out, BLOCK_M // 2, width), p.lse, p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, scale_log2(p),
        p.window_left, p.window_right, n_m, heads_in_l2(p), MASK=bounded or p.seqlen_k % BLOCK_N != 0,
        GUARD=not aligned, HEAD_DIM=width, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, STAGES=stages, num_warps=num_warps,
        maxnreg=168,
    )  # fmt: skip
    return problem.result()


VERSION = Version(
    family="prefill", number=6, title="Gluon, warp specialization by hand",
    idea="A producer warp and two consumer warpgroups; asynchronous WGMMA with the softmax under it.",
    parent=5, requires=Requires(capability=(9, 0), exactly=True, amd=False, interpreter=False),
    call=call_flash_attention_v6, kernels=(flash_attention_kernel,), tiles=tiles_for, declines=declines_on_hopper,
)  # fmt: skip
