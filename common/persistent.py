"""What the persistent kernels for Hopper share (prefill v7 to v10): tiles from the table, and the warp that loads.

A program has 2 or 3 groups, warpgroups of 64 rows each, and a warp that loads for them, the producer. All go through
the same tiles and count blocks of keys over all tiles: block number i lies in slot i % STAGES (common/hopper.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from common.exponent import SMALLEST
from common.hopper import fill, key_blocks, release, skip, wait_full
from common.problem import AttentionProblem

MW = gl.constexpr(64)  # rows of a group
LEAST_SCALE = gl.constexpr(SMALLEST.value)


@gluon.jit
def tile_of(table, t, BM: gl.constexpr):
    """Tile t of this program: head of all sequences, first row, first block of keys and one past the last."""
    entry = table + ((t + 1) * gl.num_programs(0) + gl.program_id(0)) * 2
    code = gl.load(entry)
    blocks = gl.load(entry + 1)
    return code >> 16, (code & 0xFFFF) * BM, blocks & 0xFFFF, blocks >> 16


@gluon.jit
def own_blocks(start_m, lo, tile_hi, sizes, BN: gl.constexpr):
    """One past the last of the tile's blocks that a group's own rows see, and one past those that need no mask."""
    _lo, hi, whole = key_blocks(start_m, sizes, MW, BN)
    return gl.minimum(gl.maximum(hi, lo + 1), tile_hi), gl.maximum(whole, lo)


@gluon.jit
def producer(descs, rings, table, heads_q, group, GROUPS: gl.constexpr):
    """Every tile's queries, a group at a time, and its keys and values, from the last block to the first."""
    q_desc, k_desc, v_desc = descs
    q_ring, k_ring, v_ring = rings
    i = 0  # number of the block of keys, over all tiles
    for t in range(gl.load(table + gl.program_id(0) * 2)):
        head, start_m, lo, hi = tile_of(table, t, GROUPS * MW)
        off_b, off_h, off_hk = head // heads_q, head % heads_q, head % heads_q // group
        for g in gl.static_range(GROUPS):
            fill(q_ring, q_desc, [off_b, off_h, start_m + g * MW, 0], t * GROUPS + g, q_ring[0].shape[0])
            if g == 0:
                fill_k(k_ring, k_desc, off_b, off_hk, hi - 1, i)
        for j in range(hi - 2, lo - 1, -1):
            fill_k(k_ring, k_desc, off_b, off_hk, j, i + 1)
            fill_v(v_ring, v_desc, off_b, off_hk, j + 1, i)
            i += 1
        fill_v(v_ring, v_desc, off_b, off_hk, lo, i)
        i += 1


@gluon.jit
def fill_k(ring, desc, off_b, off_h, j, i):
    """Block j of a head's keys as block number i: [BLOCK_N, HEAD_DIM]; of 8 bits, [2, BLOCK_N / 2, HEAD_DIM]."""
    if desc.dtype.primitive_bitwidth == 8:
        fill(ring, desc, [off_b, off_h, 0, j * desc.block_type.shape[3], 0], i, ring[0].shape[0])
    else:
        fill(ring, desc, [off_b, off_h, j * desc.block_type.shape[2], 0], i, ring[0].shape[0])


@gluon.jit
def fill_v(ring, desc, off_b, off_h, j, i):
    """Block j of a head's values as block number i: [BLOCK_N, HEAD_DIM]; of 8 bits, [HEAD_DIM, BLOCK_N]."""
    if desc.dtype.primitive_bitwidth == 8:
        fill(ring, desc, [off_b, off_h, 0, j * desc.block_type.shape[3]], i, ring[0].shape[0])
    else:
        fill(ring, desc, [off_b, off_h, j * desc.block_type.shape[2], 0], i, ring[0].shape[0])


@gluon.jit
def first_scores(rings, g: gl.constexpr, i, zero, HEAD_DIM: gl.constexpr):
    """QK^T [64, BLOCK_N] of group g's very first block, number i, which has no tile before it to hide under."""
    q_ring, k_ring, v_ring = rings
    STAGES: gl.constexpr = k_ring[0].shape[0]
    wait_full(q_ring, g, q_ring[0].shape[0])
    skip(k_ring, 0, i, STAGES)
    skip(v_ring, 0, i, STAGES)
    wait_full(k_ring, i, STAGES)
    q = q_ring[0].index(g).reshape([MW, HEAD_DIM])
    k = k_ring[0].index(i % STAGES).reshape([zero.shape[1], HEAD_DIM])
    qk = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    qk = warpgroup_mma_wait(0, deps=[qk])
    release(k_ring, i, STAGES)
    return qk


@gluon.jit
def scale_of(head, group, descales, scale_log2):
    """What turns a head's products of 8-bit numbers into exponents of 2."""
    return gl.maximum(scale_log2 * gl.load(descales[0] + head) * gl.load(descales[1] + head // group), LEAST_SCALE)


def right_and_guard(problem: AttentionProblem, block_n: int) -> tuple[int, bool]:
    """The right bound of the mask, and whether a block may hold keys for some of a group's rows and none for others.

    No mask is a window to the right that reaches everything: one kernel for both, which ptxas fits into its registers.
    """
    p = problem
    right = p.seqlen_q + p.seqlen_k if p.window_right is None else p.window_right
    aligned = p.window_right is None or (p.seqlen_k - p.seqlen_q + right) % block_n == 0
    return right, p.window_left is not None or not aligned
