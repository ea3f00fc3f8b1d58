"""What the Gluon kernels for Hopper share: names that moved between Triton 3.6 and 3.9, TMA descriptors, ring buffers.

A ring is (buffers, full, empty): shared memory for STAGES blocks and two barriers for each. The producer waits for
empty, the TMA unit completes full, the consumers arrive at empty when they have read the block. Block number i of the
whole kernel lies in slot i % STAGES, and the barriers' phase there is (i // STAGES) & 1.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# renamed in Triton 3.8; the old names are gone in 3.9
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

GLUON_DTYPE = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def allocate_ring(desc, SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Shared memory and barriers for SLOTS blocks of `desc`; ARRIVALS consumers must have read a block to empty its slot."""
    bufs = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ARRIVALS)
    return bufs, full, empty


@gluon.jit
def fill(ring, desc, coordinates, i, SLOTS: gl.constexpr):
    """Producer: start loading block number i of the ring, once its slot is empty."""
    bufs, full, empty = ring
    slot = i % SLOTS
    mbarrier.wait(empty.index(slot), ((i // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, coordinates, full.index(slot), bufs.index(slot))


@gluon.jit
def wait_full(ring, i, SLOTS: gl.constexpr):
    """Consumer: wait until block number i has landed."""
    mbarrier.wait(ring[1].index(i % SLOTS), (i // SLOTS) & 1)


@gluon.jit
def release(ring, i, SLOTS: gl.constexpr):
    """Consumer: block number i has been read."""
    mbarrier.arrive(ring[2].index(i % SLOTS), count=1)


@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], GLUON_DTYPE[dtype])


def descriptor(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """A TMA descriptor of x [B, H, S, D] for blocks of `rows` rows of one head, D padded to `width` with zeros.

    Loads past S or D give 0 and stores past them write nothing. Alignment as why_no_tma says.
    """
    return TensorDescriptor(x, x.shape, x.stride(), [1, 1, rows, width], _layout(rows, width, x.dtype))


def why_no_tma(*tensors: torch.Tensor) -> str | None:
    """One line on why TMA cannot address one of these [B, H, S, D] tensors; None where it can address all."""
    for x in tensors:
        if x.numel() == 0:
            return f"has no TMA descriptor for an empty tensor, {list(x.shape)}"
        if x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in x.stride()[:-1]) or x.stride(-1) != 1:
            return f"needs tensors that start and step in multiples of 16 bytes for TMA, here strides {list(x.stride())}"
    return None
