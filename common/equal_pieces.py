"""Equal pieces: all keys of a batch, cut into one piece a program, whatever the lengths of the sequences.

Keys count in blocks of BLOCK_N. An item is one tile of rows of one KV head of one sequence: items lie one after the
other, sequence by sequence, head by head, each with the blocks of keys that its sequence has, at least one. A program
has the blocks start..end of that line: the rest of one item, some whole items, the beginning of another. What it has
of an item is a part; only the first and the last part of a piece can be less than the whole item.

`keys` below is (seqlen_k, seqlens_k, starts, window_left, seqlen_q): pointers or None, None for no window.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from common.hardware import detect_gpu
from common.hopper import why_no_tma
from common.parts import barrier
from common.problem import AttentionProblem

LEAST_PAGE = 8  # keys: rows that TMA swizzles together
MOST_LENGTHS = 4096  # that all programs look through: more do not fit in their registers


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _begin(program, total):
    """Where a program's piece begins: each has total // programs blocks, the first total % programs one more."""
    programs = gl.num_programs(0)
    return total // programs * program + gl.minimum(program, total % programs)


@gluon.jit
def _owner(block, total):
    """The program whose piece has this block of the line. (A product of two totals would not fit in 32 bits.)"""
    programs = gl.num_programs(0)
    each = total // programs
    longer = total % programs
    in_longer = block // (each + 1)
    if in_longer >= longer:
        in_longer = longer + (block - longer * (each + 1)) // each
    return in_longer


@gluon.jit
def keys_in_reach(off_b, batch, keys, BLOCK_N: gl.constexpr):
    """Of sequence off_b, or of a tensor of sequences: first key that some query sees, length, the same in blocks."""
    seqlen_k, seqlens_k, starts, window_left, seqlen_q = keys
    len_k = off_b * 0 + seqlen_k
    first = off_b * 0
    if seqlens_k is not None:
        len_k = gl.minimum(gl.maximum(gl.load(seqlens_k + off_b, mask=off_b < batch, other=0), 0), seqlen_k)
    if starts is not None:
        first = gl.minimum(gl.maximum(gl.load(starts + off_b, mask=off_b < batch, other=0), 0), len_k)
    if window_left is not None:
        first = gl.maximum(first, len_k - seqlen_q - window_left)
    lo = first // BLOCK_N
    return first, len_k, lo, gl.maximum((len_k + BLOCK_N - 1) // BLOCK_N, lo + 1)


@gluon.jit
def _blocks(lo, hi, keys):
    """Of an item with the keys of blocks lo..hi."""
    size = hi - lo
    if keys[1] is not None or keys[2] is not None:
        size += 1
    return size


@gluon.jit
def piece(batch, items, keys, BLOCK_N: gl.constexpr, BATCH: gl.constexpr):
    """(start, end, total, off_b, base): this program's blocks, all blocks; the sequence that start is in, its begin.

    items: of a sequence. BATCH: `batch` filled up to a power of two, as are the threads that look for the sequence.
    Sequences that are all as long have off_b and base 0: item_at computes where they are.
    """
    off_b = batch * 0
    base = batch * 0
    if keys[1] is None and keys[2] is None:
        _, _, lo, hi = keys_in_reach(off_b, batch, keys, BLOCK_N)
        total = (hi - lo) * items * batch
    else:
        offs_b = gl.arange(0, BATCH, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        _, _, lo, hi = keys_in_reach(offs_b, batch, keys, BLOCK_N)
        ends = gl.associative_scan(gl.where(offs_b < batch, _blocks(lo, hi, keys) * items, 0), 0, _add)
        total = gl.max(ends, 0)
    start = _begin(gl.program_id(0), total)
    end = _begin(gl.program_id(0) + 1, total)
    if keys[1] is not None or keys[2] is not None:
        off_b = gl.sum(gl.where(ends <= start, 1, 0), 0)
        base = gl.max(gl.where(ends <= start, ends, 0), 0)
        barrier()  # warp_specialize hands its arguments over where these sums are read from, and does not wait
    return start, end, total, off_b, base


@gluon.jit
def item_at(start, off_b, base, total, batch, items, keys, BLOCK_N: gl.constexpr):
    """Of the item that block `start` of the line is in: sequence, number in it, begin, end of its keys, its own end.

    Where all programs have whole items alone, and as many, the heads of a sequence are dealt out one by one: programs
    beside each other read the same keys of different heads, which lie beside each other in memory, at the same time.
    """
    _, _, lo, hi = keys_in_reach(off_b, batch, keys, BLOCK_N)
    size = _blocks(lo, hi, keys)
    item = (start - base) // size
    begin = base + item * size
    if keys[1] is None and keys[2] is None:
        if batch * items >= gl.num_programs(0):
            each = batch * items // gl.num_programs(0)
            if each * gl.num_programs(0) == batch * items:
                item = item % each * gl.num_programs(0) + item // each
        if batch > 1:
            off_b = item // items
            item -= off_b * items
    return off_b, item, begin, begin + (hi - lo), begin + size


@gluon.jit
def end_of_keys(start, stop, last, keys):
    """Where the blocks with keys end that a program has of an item, start..stop; the item's end at `last`."""
    if keys[1] is not None or keys[2] is not None:
        stop = gl.maximum(gl.minimum(stop, last), start)
    return stop


@gluon.jit
def next_sequence(start, off_b, base, end_of_item, item, items, keys):
    """off_b and base for the block after those that end at `start`."""
    if keys[1] is not None or keys[2] is not None:
        if (start == end_of_item) & (item == items - 1):
            base = start
            off_b += 1
    return off_b, base


@gluon.jit
def sharers(begin, end, total):
    """(first, last, slot) of the programs that have a part of the item with blocks begin..end of the line.

    Parts are kept two a program: number 2 * program for the first part of a piece, + 1 for its last. slot is that of
    the first sharer; for all others the item is where their piece begins.
    """
    first = _owner(begin, total)
    return first, _owner(end - 1, total), 2 * first + gl.where(_begin(first, total) < begin, 1, 0)


def pieces_for(problem: AttentionProblem) -> int:
    """Programs to deal to: one an SM, a multiple of 8, which heads share evenly.

    On an H200 128 are 1 to 9 % faster than 132 (docs/decoding.md has what was measured).
    """
    return max(1, detect_gpu(problem.q.device).sm_count // 8 * 8)


def blocks_of_a_piece(problem: AttentionProblem, heads: int, row_blocks: int, block_n: int) -> float:
    """In the mean, of KV heads (or groups of them) that have so many tiles of rows each, the lengths at their most."""
    return problem.batch * heads * row_blocks * -(-problem.seqlen_k // block_n) / pieces_for(problem)


def lengths_for(problem: AttentionProblem) -> int:
    """BATCH of piece(): how many lengths every program looks through, a power of two."""
    lengths = 1 if problem.seqlens_k is None and problem.starts is None else problem.batch
    return max(128, 1 << (lengths - 1).bit_length())


def why_no_pieces(q, k, v, *, num_splits=None, seqlens_k=None, starts=None, block_table=None, step=8, **_):
    """What kernels with equal pieces, keys by TMA, do not serve of a call: one line, or None. step: of head_dim."""
    if any(getattr(x, "ndim", 0) != 4 for x in (q, k, v)):
        return "takes q, k and v of four dimensions"
    if num_splits is not None:
        return "takes no num_splits: its pieces are equal"
    if q.shape[-1] % step:
        return f"takes head_dim in multiples of {step}, not {q.shape[-1]}: TMA wants steps of 16 bytes"
    if q.shape[0] > MOST_LENGTHS and (seqlens_k is not None or starts is not None):
        return f"takes seqlens_k and starts of up to {MOST_LENGTHS} sequences, not {q.shape[0]}"
    if block_table is not None and k.shape[2] < LEAST_PAGE:
        return f"takes pages of {LEAST_PAGE} keys and more, not {k.shape[2]}"
    return why_no_tma(k, v)
