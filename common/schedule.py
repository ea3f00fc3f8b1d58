"""Which row block of which head a program takes, in which order; and into how many parts the keys are cut."""

import functools

import triton
import triton.language as tl

from common.hardware import detect_gpu
from common.launch import cdiv
from common.problem import AttentionProblem


@triton.jit
def row_block_and_head(row_blocks, heads_together, window_right):
    """Row block and batch * heads_q + head of this program, on a one-dimensional grid of row_blocks x all heads.

    heads_together heads advance side by side, so that their K and V stay in the L2. Under a causal mask the last rows
    come first: they see the most keys, and what starts last should be short.
    """
    heads = tl.num_programs(0) // row_blocks
    first_head = tl.program_id(0) // (row_blocks * heads_together) * heads_together
    item = tl.program_id(0) - first_head * row_blocks
    heads_together = tl.minimum(heads_together, heads - first_head)
    row_block = item // heads_together
    if window_right is not None:
        row_block = row_blocks - 1 - row_block
    return row_block, first_head + item % heads_together


def heads_in_l2(problem: AttentionProblem) -> int:
    """How many query heads' keys and values fill half the L2; 1 without a mask, where all rows cost the same."""
    if problem.window_right is None:
        return 1
    one_head = 2 * problem.seqlen_k * problem.head_dim * problem.dtype.itemsize
    return problem.group * max(1, detect_gpu(problem.q.device).l2_bytes // 2 // max(1, one_head))


SPLIT_COST = 0.5  # of starting a split and merging it, in blocks of keys


@functools.lru_cache(maxsize=1024)
def splits_of_whole_waves(programs: int, slots: int, blocks: int) -> int:
    """Into how many parts the `blocks` of keys of each of `programs` programs are cut where `slots` run at a time.

    The number with the least (waves * blocks of a part): one wave that is nearly full, or several; at least 1.
    """

    def duration(splits):
        waves = cdiv(programs * splits, slots)
        return waves * (blocks / splits + SPLIT_COST)

    return min(range(1, max(1, min(blocks, slots)) + 1), key=duration)
