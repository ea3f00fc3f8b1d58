"""Which program of a persistent kernel works on which tiles: a table made on the host, once for each shape."""

import functools
import heapq
import itertools

import torch

from common.hardware import detect_gpu
from common.launch import cdiv
from common.problem import AttentionProblem
from common.schedule import heads_in_l2

TILE_COST = 1.0  # of beginning and ending a tile, in blocks of keys
SHORT = 1 / 3  # of the longest tile: what is shorter is kept for the end, to level what each program has to do
MAX_HEADS = 2**15 - 1  # an int32 of the table holds row block and head


def tile_table(problem: AttentionProblem, block_m: int, block_n: int) -> tuple[torch.Tensor, int]:
    """Tiles of every program, longest first to whoever is free first, and the number of programs, one an SM.

    The table is int32 [1 + most tiles of a program + 1, programs, 2]: row 0 says how many tiles a program has; row t +
    1 holds its tile t as (row block | batch * heads_q + head << 16, first block of keys | one past the last << 16); the
    rows after its last tile repeat that one. Heads that fit the L2 together are done side by side, as many as the
    programs begin with at most, so that keys which nobody has read yet are wanted bit by bit. Their short tiles come
    last, of all heads: the last heads' long tiles would else end at very different times (a causal mask at head_dim 256
    and 8k keys: the busiest program had 16 % more than the mean, and has 1 % now).
    """
    p = problem
    key = (p.batch * p.heads_q, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right, block_m, block_n, heads_in_l2(p))
    return _table(*key, detect_gpu(p.q.device).sm_count, p.q.device)


@functools.lru_cache(maxsize=256)
def _table(heads, seqlen_q, seqlen_k, left, right, block_m, block_n, together, programs, device):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first call of a shape makes its table: call once before capturing a CUDA graph")
    first_row = torch.arange(0, seqlen_q, block_m)
    last_row = torch.clamp(first_row + block_m, max=seqlen_q) - 1
    lo, hi = torch.zeros_like(first_row), torch.full_like(first_row, cdiv(seqlen_k, block_n))
    if right is not None:
        hi = torch.minimum(hi, (last_row + seqlen_k - seqlen_q + right) // block_n + 1)
    if left is not None:
        lo = torch.clamp(first_row + seqlen_k - seqlen_q - left, min=0) // block_n
    lo, hi = lo.tolist(), hi.tolist()
    longest_first = sorted(range(len(lo)), key=lambda m: lo[m] - hi[m])
    short = SHORT * max((last - first for first, last in zip(lo, hi, strict=True)), default=0)
    long_ones = [m for m in longest_first if hi[m] - lo[m] > short]
    programs = min(programs, len(lo) * heads)
    work = [[] for _ in range(programs)]
    free = [(0.0, i) for i in range(programs)]
    together = max(1, min(together, programs // len(lo)))
    side_by_side = [range(first, min(first + together, heads)) for first in range(0, heads, together)]
    rounds = [(long_ones, group) for group in side_by_side] + [(longest_first[len(long_ones) :], range(heads))]
    for rows_of_tiles, group in rounds:
        for m, head in itertools.product(rows_of_tiles, group):
            busy, i = free[0]
            work[i].append((m | head << 16, lo[m] | hi[m] << 16))
            heapq.heapreplace(free, (busy + hi[m] - lo[m] + TILE_COST, i))
    most = max(map(len, work))
    rows = [[(len(tiles), 0) for tiles in work]]
    rows += [[tiles[min(t, len(tiles) - 1)] for tiles in work] for t in range(most + 1)]
    table = torch.tensor(rows, dtype=torch.int32)
    return (torch.empty_like(table, device=device) if device.type == "meta" else table.to(device)), programs
