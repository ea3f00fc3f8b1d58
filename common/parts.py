"""Parts of an item that several programs share, in Gluon: all store theirs, and the last to come merges them.

Parts are float32 O^T [2 * programs, WIDTH, N], each normalised by itself, then LSE [2 * programs, N], base 2: two a
program, as common/equal_pieces.py numbers them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def store_part(Parts, part, out, lse):
    """Part number `part`: out [WIDTH, N], lse [N]."""
    WIDTH: gl.constexpr = out.shape[0]
    N: gl.constexpr = out.shape[1]
    offs_r = gl.arange(0, N, layout=gl.SliceLayout(0, out.type.layout))
    tile = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(1, out.type.layout)), 1) * N
    gl.store(Parts + (part * (WIDTH * N) + tile + gl.expand_dims(offs_r, 0)), out)
    gl.store(Parts + (gl.num_programs(0) * (2 * WIDTH * N) + part * N + offs_r), lse)


@gluon.jit
def is_last(Ticket, count):
    """Draw one of `count` tickets: whether all other programs have drawn theirs, and stored their parts before."""
    barrier()  # every warp has stored its share before the ticket is drawn, which publishes them all
    last = gl.atomic_add(Ticket, 1, sem="acq_rel") == count - 1
    if last:
        gl.store(Ticket, 0)  # for the next call
    return last


@gluon.jit
def merge_parts(Parts, first, last, slot, WIDTH: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """O^T [WIDTH, N] and LSE [N] of an item, from the parts of programs first..last; `slot` is that of the first's."""
    AT_ONCE: gl.constexpr = min(16, max(1, 19200 // (WIDTH * N) - 2))  # loads under way together, in 150 registers
    offs_r = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    tile = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(1, LAYOUT)), 1) * N + gl.expand_dims(offs_r, 0)
    PartLSE = Parts + gl.num_programs(0) * (2 * WIDTH * N)
    m_i = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    l_i = gl.zeros([N], gl.float32, gl.SliceLayout(0, LAYOUT))
    acc = gl.zeros([WIDTH, N], gl.float32, LAYOUT)
    for start in range(first, last + 1, AT_ONCE):
        lses, outs, m_new = (), (), m_i
        for j in gl.static_range(AT_ONCE):
            program = gl.minimum(start + j, last)
            part = gl.where(program == first, slot, 2 * program)
            lse = gl.load(PartLSE + (part * N + offs_r))
            lses += (lse + gl.where(start + j <= last, 0.0, -float("inf")),)
            outs += (gl.load(Parts + (part * (WIDTH * N) + tile)),)
        for j in gl.static_range(AT_ONCE):
            m_new = gl.maximum(m_new, lses[j])
        m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)  # no part has a key so far
        alpha = gl.exp2(m_i - m_safe)
        acc, l_i, m_i = acc * gl.expand_dims(alpha, 0), l_i * alpha, m_new
        for j in gl.static_range(AT_ONCE):
            weight = gl.exp2(lses[j] - m_safe)
            l_i += weight
            acc += outs[j] * gl.expand_dims(weight, 0)
    return acc * gl.expand_dims(gl.where(l_i == 0.0, 0.0, 1.0 / l_i), 0), m_i + gl.log2(l_i)
