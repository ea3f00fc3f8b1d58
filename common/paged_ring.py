"""Ring buffers of common/hopper.py whose blocks are filled from pages: a TMA box for each page and 64 columns."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from common.hopper import tma_load

PANEL = 64  # columns of 16 bits, 128 bytes: what TMA swizzles together, and a block in shared memory consists of


@gluon.jit
def allocate_blocks(desc, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr):
    """A ring for blocks of BLOCK_N rows, WIDTH wide, whatever the boxes of `desc`; one consumer."""
    bufs = gl.allocate_shared_memory(desc.dtype, [SLOTS, 1, 1, BLOCK_N, WIDTH], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return bufs, full, empty


@gluon.jit
def numbers_of_pages(table, start_n, len_k, num_pages, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Pages of the block of keys at start_n, by the sequence's row of the table.

    num_pages, which TMA reads as zeros, for keys from len_k on and for entries that are no page.
    """
    found = ()
    for r in gl.static_range(0, BLOCK_N, min(BLOCK_N, PAGE_SIZE)):
        page = gl.load(table + (start_n + r) // PAGE_SIZE, mask=start_n + r < len_k, other=-1)
        found += (gl.where((page >= 0) & (page < num_pages), page, num_pages),)
    return found


@gluon.jit
def fill_from_pages(ring, desc, pages, off_h, row, i, SLOTS: gl.constexpr):
    """Producer: start loading block number i of the ring, once its slot is empty; its rows begin at `row` of a page."""
    bufs, full, empty = ring
    BLOCK_N: gl.constexpr = bufs.shape[3]
    WIDTH: gl.constexpr = bufs.shape[4]
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    slot = i % SLOTS
    mbarrier.wait(empty.index(slot), ((i // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes * (BLOCK_N // ROWS) * (WIDTH // COLUMNS))
    for j in gl.static_range(BLOCK_N // ROWS):
        for c in gl.static_range(WIDTH // COLUMNS):
            box = bufs.index(slot).slice(j * ROWS, ROWS, dim=2).slice(c * COLUMNS, COLUMNS, dim=3)
            tma_load(desc, [pages[j], off_h, row, c * COLUMNS], full.index(slot), box)


@gluon.jit
def pages_are_missing(table, lo, hi, num_pages, PAGE_SIZE: gl.constexpr, ENTRIES: gl.constexpr = 256):
    """Whether some key of lo..hi has no page."""
    offs = gl.arange(0, ENTRIES, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    missing = offs * 0
    end = gl.where(lo < hi, (hi + PAGE_SIZE - 1) // PAGE_SIZE, 0)
    for start in range(lo // PAGE_SIZE, end, ENTRIES):
        page = gl.load(table + start + offs, mask=start + offs < end, other=0)
        missing = gl.maximum(missing, gl.where((page < 0) | (page >= num_pages), 1, 0))
    return gl.max(missing, 0) > 0
