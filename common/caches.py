"""KV caches as they are in use: keys that begin late, pages anywhere, new keys written in place."""

import triton
import triton.language as tl


@triton.jit
def first_visible_key(starts, off_b, len_k, seqlen_q, window_left):
    """The first key that some query of sequence off_b sees: no padding, nothing left of the window. At most len_k."""
    first = 0
    if starts is not None:
        first = tl.minimum(tl.maximum(tl.load(starts + off_b), 0), len_k)
    if window_left is not None:
        first = tl.maximum(first, len_k - seqlen_q - window_left)
    return first


@triton.jit
def pages_of(table, offs_n, end, num_pages, PAGE_SIZE: tl.constexpr):
    """Pages of the keys offs_n, by the sequence's row of the table, which is not read for keys from `end` on.

    -1 for those keys, and for entries that are no page of the cache.
    """
    entries = (offs_n.to(tl.uint32) // PAGE_SIZE).to(tl.int32)  # a shift; of a signed number it would be four steps
    pages = tl.load(table + entries, mask=offs_n < end, other=-1)
    return tl.where(pages < num_pages, tl.maximum(pages, -1), -1)


@triton.jit
def pages_are_missing(table, lo, hi, num_pages, PAGE_SIZE: tl.constexpr, ENTRIES: tl.constexpr = 128):
    """Whether some key of lo..hi has no page: looked at apart, since a loop that also counts loads each page twice."""
    missing = tl.zeros([ENTRIES], tl.int32)
    end = tl.where(lo < hi, tl.cdiv(hi, PAGE_SIZE), 0)
    for start in tl.range(lo // PAGE_SIZE, end, ENTRIES, num_stages=1):
        offs = start + tl.arange(0, ENTRIES)
        pages = tl.load(table + offs, mask=offs < end, other=0)
        missing |= ((offs < end) & ((pages < 0) | (pages >= num_pages))).to(tl.int32)
    return tl.max(missing, 0) > 0


@triton.jit
def page_rows(X, stride, pages, offs_n, PAGE_SIZE: tl.constexpr):
    """X, a head's cache or 0, advanced to the keys offs_n, which lie in `pages`; stride (page, head, row, 1)."""
    return X + pages.to(tl.int64) * stride[0] + (offs_n & (PAGE_SIZE - 1)) * stride[2]


@triton.jit
def append_rows(
    X, New, stride, stride_new, table, off_b, off_hk, lo, hi, len_k, seqlen_q, num_pages,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, NEW_ROWS: tl.constexpr,
):  # fmt: skip
    """Write the rows of New that are keys lo..hi of sequence off_b into the cache X; the last one is key len_k - 1."""
    offs_new = tl.arange(0, NEW_ROWS)
    offs_n = offs_new + len_k - seqlen_q
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n >= lo) & (offs_n < hi) & (offs_new < seqlen_q)
    New += off_b.to(tl.int64) * stride_new[0] + off_hk.to(tl.int64) * stride_new[1]
    X += off_hk.to(tl.int64) * stride[1]
    if table is None:
        rows = X + off_b.to(tl.int64) * stride[0] + offs_n.to(tl.int64) * stride[2]
    else:
        pages = pages_of(table, tl.where(mask, offs_n, hi), hi, num_pages, PAGE_SIZE)
        mask = pages >= 0
        rows = page_rows(X, stride, pages, offs_n, PAGE_SIZE)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    new = tl.load(New + offs_new.to(tl.int64)[:, None] * stride_new[2] + offs_d[None, :], mask=mask_d, other=0.0)
    tl.store(rows[:, None] + offs_d[None, :], new, mask=mask_d)
