"""Block pointers, native or our own: the same blocks as slices of the tensor, and 0 past its end."""

import pytest
import torch
import triton
import triton.language as tl

from common.block_pointer import advance, load_block, make_block


@triton.jit
def copy_kernel(
    X, Y, rows, columns, stride_x, start, step, blocks,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Y[n] = the n-th block [BLOCK_0, BLOCK_1] of X, from `start` on, `step` further each time."""
    block = make_block(X, (rows, columns), (stride_x[0], stride_x[1]), (start[0], start[1]), BLOCK_0, BLOCK_1, ORDER)
    offs_0 = tl.arange(0, BLOCK_0)
    offs_1 = tl.arange(0, BLOCK_1)
    for n in range(0, blocks):
        values = load_block(block, BLOCK_0, BLOCK_1)
        tl.store(Y + n * BLOCK_0 * BLOCK_1 + offs_0[:, None] * BLOCK_1 + offs_1[None, :], values)
        block = advance(block, step[0], step[1])


ROWS, COLUMNS = 45, 59
STORED = {
    "rows-contiguous": lambda memory: memory[:ROWS, :COLUMNS],
    "columns-contiguous": lambda memory: memory.T[:ROWS, :COLUMNS],
    "inside": lambda memory: memory[3 : 3 + ROWS, 5 : 5 + COLUMNS],
}


@pytest.mark.parametrize("start, step", [((0, 0), (16, 0)), ((16, 0), (16, 0)), ((0, 32), (0, 32)), ((5, 3), (7, 11))])
@pytest.mark.parametrize("stored", STORED)
def test_blocks_are_slices(start, step, stored, device):
    """Blocks that do not advance, advance by the wrong stride, or show what lies past the end of the tensor."""
    blocks = 4
    padded = torch.zeros(ROWS + 100, COLUMNS + 140)
    padded[:ROWS, :COLUMNS] = torch.arange(1.0, ROWS * COLUMNS + 1).view(ROWS, COLUMNS)
    x = STORED[stored](torch.full((70, 70), torch.nan, device=device))
    x.copy_(padded[:ROWS, :COLUMNS])
    found = torch.full((blocks, 16, 32), torch.nan, device=device)
    copy_kernel[(1,)](
        x, found, ROWS, COLUMNS, x.stride(), start, step, blocks, BLOCK_0=16, BLOCK_1=32,
        ORDER=(0, 1) if stored == "columns-contiguous" else (1, 0),
    )  # fmt: skip
    for n in range(blocks):
        i, j = start[0] + n * step[0], start[1] + n * step[1]
        assert torch.equal(found[n].cpu(), padded[i : i + 16, j : j + 32])


def test_dtypes(device):
    """What FP8 and 16-bit tensors hold comes out bit for bit; padding is 0 in every format."""
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        x = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
        found = torch.empty(1, 16, 32, dtype=dtype, device=device)
        copy_kernel[(1,)](
            x, found, 10, 20, x.stride(), (0, 0), (16, 0), 1, BLOCK_0=16, BLOCK_1=32, ORDER=(1, 0)
        )  # fmt: skip
        wanted = torch.zeros(16, 32)
        wanted[:10, :20] = x.float().cpu()
        assert torch.equal(found[0].float().cpu(), wanted)
