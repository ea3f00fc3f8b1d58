"""Float8 caches for WGMMA, in Gluon: pairs of columns in shared memory, float16 in registers.

A pair is read as one 16-bit number, as WGMMA's left operand has them: of K as it lies, of V transposed (ldmatrix can do
that with 16 bits alone). Two pairs are one register; three instructions make four float16 of them (common/float8.py).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from common.float8 import E4M3_PAIRS, E5M2_PAIRS


def in_pairs(x: torch.Tensor, side: int) -> torch.Tensor:
    """Float8 x [B, H, S, D] as 16-bit numbers that nobody computes with, [B, H / side, S, side * D / 2]: views."""
    pairs = x.view(torch.float16)
    return pairs if side == 1 else pairs.unflatten(1, (-1, side)).transpose(2, 3).flatten(3)


@gluon.constexpr_function
def pairs_layout(rows, columns):
    """Of V^T in pairs, [rows, columns] = [WIDTH / 2, keys], in a warpgroup: what rows_of_pairs makes of it is a left
    operand, whose warps have 16 rows each and whose threads have rows r and r + 8.
    """
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    registers = [[0, 1], *([0, 1 << i] for i in range(3, columns.bit_length() - 1))]
    registers += [[1 << i, 0] for i in range(5, rows.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [rows, columns])


@gluon.jit
def columns_of_pairs(pairs, E5M2: gl.constexpr):
    """The even and the odd columns, float16 [rows, pairs] each, of pairs [rows, pairs] of any 16-bit type."""
    PTX: gl.constexpr = E5M2_PAIRS if E5M2 else E4M3_PAIRS
    pairs = pairs.to(gl.int16, bitcast=True)
    return gl.inline_asm_elementwise(PTX, "=&r,=r,r", [pairs], (gl.float16, gl.float16), is_pure=True, pack=2)


@gluon.jit
def as_float16(even, odd):
    """Columns of queries, [rows, columns] each, as float16; and what each row was divided by, a power of two."""
    unit = gl.max(gl.maximum(gl.abs(even), gl.abs(odd)).to(gl.float32), 1).to(gl.int32, bitcast=True) & 0x7F800000
    unit = gl.where(unit == 0, 1.0, unit.to(gl.float32, bitcast=True))
    by = gl.expand_dims(unit, 1)
    return (even.to(gl.float32) / by).to(gl.float16), (odd.to(gl.float32) / by).to(gl.float16), unit


@gluon.jit
def rows_of_pairs(pairs, LAYOUT: gl.constexpr, E5M2: gl.constexpr):
    """V^T, float16 [2 * pairs, keys], of pairs [pairs, keys]: of each 16 rows the 8 even ones come first. in_order()
    puts the rows of a product with it in order.
    """
    even, odd = columns_of_pairs(pairs, E5M2)
    rows: gl.constexpr = pairs.shape[0]
    keys: gl.constexpr = pairs.shape[1]
    both = gl.join(even, odd).reshape([rows // 8, 8, keys, 2]).permute((0, 3, 1, 2)).reshape([2 * rows, keys])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def in_order(x):
    """x [WIDTH, rows] with the rows of rows_of_pairs, as [WIDTH, rows] in order."""
    WIDTH: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return x.reshape([WIDTH // 16, 2, 8, N]).permute((0, 2, 1, 3)).reshape([WIDTH, N])
