"""Rows of queries and outputs in Gluon, and parts of an item: several programs have some, the last to come merges them.

Rows of a KV head go head by head, all queries of each. Parts are float32 O [2 * programs, ROWS, WIDTH], each normalised
by itself, then LSE [2 * programs, ROWS], base 2: two a program, as common/equal_pieces.py numbers them. ROWS is a power
of two that holds the rows there are, fewer than the N that a product takes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from common.exponent import LN_2

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


def rows_of_parts(rows: int, n: int) -> int:
    """ROWS, of tiles of n rows where there are so many rows in all."""
    return min(n, 1 << (rows - 1).bit_length())


@gluon.constexpr_function
def rows_layout(rows, columns, warps):
    """Four numbers of a row in a thread. Of many wide rows a warp has four: each has an address of its own."""
    if rows > 16 and columns >= 128:
        return gl.BlockedLayout([1, 16], [4, 8], [warps, 1], [1, 0])
    lanes = min(32, columns // 4)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def row_offsets(
    stride, off_b, first_head, start_m, rows, seqlen_q, HEAD_DIM: gl.constexpr, N: gl.constexpr, COLUMNS: gl.constexpr,
    STEP: gl.constexpr = 1, SIDE: gl.constexpr = 1,
):  # fmt: skip
    """Offsets in elements of rows start_m.. and of every STEP-th column, [N, COLUMNS]; mask.

    SIDE: KV heads that lie side by side in a row of HEAD_DIM columns each; a row of queries has those of its own head.
    """
    LAYOUT: gl.constexpr = rows_layout(N, COLUMNS, gl.num_warps())
    offs_m = start_m + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = STEP * gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    offsets = off_b.to(gl.int64) * stride[0] + (first_head + offs_m // seqlen_q).to(gl.int64) * stride[1]
    offsets += (offs_m % seqlen_q).to(gl.int64) * stride[2]
    mask = gl.expand_dims(offs_m < rows, 1)
    if SIDE > 1:
        offs_d = offs_d - gl.expand_dims(offs_m // (rows // SIDE) * HEAD_DIM, 1)
        mask = mask & (offs_d >= 0)
    return gl.expand_dims(offsets, 1) + offs_d, mask & (offs_d < HEAD_DIM)


@gluon.jit
def store_rows(
    Out, LSE, out, lse, stride, off_b, heads_kv, kv_head, start_m, rows, seqlen_q, HEAD_DIM: gl.constexpr,
    SIDE: gl.constexpr = 1,
):  # fmt: skip
    """Write out [n, WIDTH] and lse [n], base 2, as rows start_m.. of a KV head; LSE may be None."""
    N: gl.constexpr = out.shape[0]
    WIDTH: gl.constexpr = out.shape[1]
    first_head = kv_head * (rows // seqlen_q)
    offsets, mask = row_offsets(stride, off_b, first_head, start_m, rows, seqlen_q, HEAD_DIM, N, WIDTH, 1, SIDE)
    gl.store(Out + offsets, gl.convert_layout(out.to(Out.dtype.element_ty), offsets.type.layout), mask=mask)
    if LSE is not None:
        offs_r = start_m + gl.arange(0, N, layout=lse.type.layout)
        first = (off_b * heads_kv + kv_head).to(gl.int64) * rows
        gl.store(LSE + first + offs_r, lse * LN_2, mask=offs_r < rows)


@gluon.jit
def store_part(Parts, part, out, lse, ROWS: gl.constexpr):
    """Part number `part`: the first ROWS of out [WIDTH, N] and lse [N]."""
    WIDTH: gl.constexpr = out.shape[0]
    N: gl.constexpr = out.shape[1]
    LAYOUT: gl.constexpr = out.type.layout
    row = gl.expand_dims(gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    offs_d = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(1, LAYOUT)), 1)
    gl.store(Parts + (part * (ROWS * WIDTH) + row * WIDTH + offs_d), out, mask=(row < ROWS) & (offs_d >= 0))
    offs_r = gl.arange(0, N, layout=lse.type.layout)
    gl.store(Parts + (gl.num_programs(0) * (2 * ROWS * WIDTH) + part * ROWS + offs_r), lse, mask=offs_r < ROWS)


@gluon.jit
def is_last(Ticket, count):
    """Draw one of `count` tickets: whether all other programs have drawn theirs, and stored their parts before."""
    barrier()  # every warp has stored its share before the ticket is drawn, which publishes them all
    last = gl.atomic_add(Ticket, 1, sem="acq_rel") == count - 1
    if last:
        gl.store(Ticket, 0)  # for the next call
    return last


@gluon.jit
def merge_parts(Parts, first, last, slot, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """O [ROWS, WIDTH] and LSE [ROWS] of an item, from the parts of programs first..last; `slot`: of the first's."""
    LAYOUT: gl.constexpr = rows_layout(ROWS, WIDTH, gl.num_warps())
    AT_ONCE: gl.constexpr = 16 if WIDTH * ROWS <= 1024 else max(1, 10240 // (WIDTH * ROWS))  # loads under way together
    offs_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    tile = gl.expand_dims(offs_r, 1) * WIDTH
    tile += gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT)), 0)
    PartLSE = Parts + gl.num_programs(0) * (2 * ROWS * WIDTH)
    m_i = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    for start in range(first, last + 1, AT_ONCE):
        lses, outs, m_new = (), (), m_i
        for j in gl.static_range(AT_ONCE):  # addresses that differ by constants: nothing to compute between the loads
            here = start + j <= last
            part = 2 * start
            if j == 0:
                part = gl.where(start == first, slot, part)
            at_lse, at = PartLSE + (part * ROWS + offs_r), Parts + (part * (ROWS * WIDTH) + tile)
            lses += (gl.load(at_lse + 2 * j * ROWS, mask=here & (offs_r >= 0), other=-float("inf")),)
            outs += (gl.load(at + 2 * j * (ROWS * WIDTH), mask=here & (tile >= 0), other=0.0),)
        for j in gl.static_range(AT_ONCE):
            m_new = gl.maximum(m_new, lses[j])
        m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)  # no part has a key so far
        alpha = gl.exp2(m_i - m_safe)
        acc, l_i, m_i = acc * gl.expand_dims(alpha, 1), l_i * alpha, m_new
        for j in gl.static_range(AT_ONCE):
            weight = gl.exp2(lses[j] - m_safe)
            l_i += weight
            acc += outs[j] * gl.expand_dims(weight, 1)
    return acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, 1.0 / l_i), 1), m_i + gl.log2(l_i)
