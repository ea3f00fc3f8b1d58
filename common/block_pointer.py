"""Block pointers on every Triton: native up to 3.8, which 3.9 removed; from there a tuple of our own.

A block pointer is a 2-D tensor in memory (base, shape, strides) and the offsets of one block in it. Loads past the
shape give 0. Our own is (base, shape, strides, offsets): block shapes are given at the load, because a constexpr
inside a tuple argument does not survive 3.9's front end, and a plain tuple is what its compiler keeps inside the
loop.
"""

import triton
import triton.language as tl

from common.lineage import triton_version

NATIVE = tl.constexpr(triton_version() < (3, 9))


@triton.jit
def make_block(base, shape, strides, offsets, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, ORDER: tl.constexpr):
    """A block [BLOCK_0, BLOCK_1] at `offsets`; ORDER lists the dimensions, the contiguous one first."""
    if NATIVE:
        block = tl.make_block_ptr(base, shape, strides, offsets, (BLOCK_0, BLOCK_1), ORDER)
    else:
        block = (base, shape, strides, offsets)
    return block


@triton.jit
def load_block(block, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr):
    """The block's values [BLOCK_0, BLOCK_1], 0 outside the tensor."""
    if NATIVE:
        values = tl.load(block, boundary_check=(0, 1), padding_option="zero")
    else:
        base, shape, strides, offsets = block
        offs_0 = offsets[0] + tl.arange(0, BLOCK_0)
        offs_1 = offsets[1] + tl.arange(0, BLOCK_1)
        mask = (offs_0 < shape[0])[:, None] & (offs_1 < shape[1])[None, :]
        offsets_0 = offs_0.to(tl.int64)[:, None] * strides[0]
        offsets_1 = offs_1.to(tl.int64)[None, :] * strides[1]
        values = tl.load(base + offsets_0 + offsets_1, mask=mask, other=0.0)
    return values


@triton.jit
def advance(block, step_0, step_1):
    """The block moved by so many rows and columns."""
    if NATIVE:
        moved = tl.advance(block, (step_0, step_1))
    else:
        base, shape, strides, offsets = block
        moved = (base, shape, strides, (offsets[0] + step_0, offsets[1] + step_1))
    return moved
