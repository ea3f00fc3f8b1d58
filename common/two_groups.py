"""Two warpgroups that take turns at the blocks of an item, in Gluon: in the end the second hands over to the first.

What is handed over is a ring of one slot (common/hopper.py): item number h of the program fills it the h-th time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from common.hopper import release, wait_full


@gluon.jit
def allocate_hand_over(WIDTH: gl.constexpr, N: gl.constexpr):
    """Shared memory for acc [WIDTH, N] and the softmax's m_i and l_i [N]."""
    acc = gl.allocate_shared_memory(gl.float32, [WIDTH, N], gl.NVMMASharedLayout(0, 32, 2))
    sums = gl.allocate_shared_memory(gl.float32, [2, N], gl.NVMMASharedLayout(0, 32, 1))
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    return (acc, sums), full, empty


@gluon.jit
def hand_over(ring, h, acc, m_i, l_i):
    """The second group, at the end of item h."""
    bufs, full, empty = ring
    acc_smem, sums = bufs
    mbarrier.wait(empty.index(0), (h & 1) ^ 1)
    acc_smem.store(acc)
    sums.index(0).store(m_i)
    sums.index(1).store(l_i)
    mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def take_over(ring, h, acc, m_i, l_i):
    """The first group: acc [WIDTH, N], m_i (base 2) and l_i [N] of both."""
    acc_smem, sums = ring[0]
    LAYOUT: gl.constexpr = acc.type.layout
    wait_full(ring, h, 1)
    acc_1 = acc_smem.load(LAYOUT)
    m_1 = sums.index(0).load(gl.SliceLayout(0, LAYOUT))
    l_1 = sums.index(1).load(gl.SliceLayout(0, LAYOUT))
    release(ring, h, 1)
    m = gl.maximum(m_i, m_1)
    m_safe = gl.where(m == -float("inf"), 0.0, m)  # neither has met a key that the row sees
    alpha, beta = gl.exp2(m_i - m_safe), gl.exp2(m_1 - m_safe)
    acc = acc * gl.expand_dims(alpha, 0) + acc_1 * gl.expand_dims(beta, 0)
    return acc, m, l_i * alpha + l_1 * beta
