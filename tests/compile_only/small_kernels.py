"""Kernels small enough to count their instructions by hand; test_opcodes.py has the counts."""

import triton
import triton.language as tl


@triton.jit
def elementwise_kernel(X, Out, steps, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for step in range(0, steps):
        x = tl.load(X + step * BLOCK + offs)
        acc = tl.maximum(acc, tl.exp2(x))
    tl.store(Out + offs, acc)


@triton.jit
def reciprocal_kernel(X, Out, steps, DIVIDE_IN_LOOP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, steps):
        x = tl.load(X + step * BLOCK + offs)
        total += x
        acc += tl.exp2(x) / total if DIVIDE_IN_LOOP else tl.exp2(x)
    tl.store(Out + offs, acc if DIVIDE_IN_LOOP else acc / total)


@triton.jit
def row_max_kernel(X, Out, steps, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    highest = float("-inf")
    for step in range(0, steps):
        x = tl.load(X + step * BLOCK + offs)
        highest = tl.maximum(highest, tl.max(tl.exp2(x), 0))
    tl.store(Out, highest)


@triton.jit
def dot_kernel(A, B, Out, steps, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    columns = offs[:, None] + offs[None, :] * BLOCK  # keys contiguous, as FP8 products want their second operand
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        a = tl.load(A + step * BLOCK * BLOCK + tile)
        b = tl.load(B + step * BLOCK * BLOCK + columns)
        acc = tl.dot(a, b, acc)
    tl.store(Out + tile, acc.to(Out.dtype.element_ty))
