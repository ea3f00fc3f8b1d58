"""Which keys a row sees: the range of KV blocks worth visiting, and the scores inside a block that count.

Row i of a sequence with len_q rows and len_k keys stands at key i + len_k - len_q (bottom-right alignment). It sees
window_left keys before that one and window_right after; None is no bound, and causal is window_right = 0.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_lengths(seqlens_q, seqlens_k, off_b, seqlen_q, seqlen_k):
    """Rows and keys of sequence off_b: its true lengths where given, clamped so that none reaches foreign memory."""
    len_q = seqlen_q
    len_k = seqlen_k
    if seqlens_q is not None:
        len_q = tl.minimum(tl.maximum(tl.load(seqlens_q + off_b), 0), seqlen_q)
    if seqlens_k is not None:
        len_k = tl.minimum(tl.maximum(tl.load(seqlens_k + off_b), 0), seqlen_k)
    return len_q, len_k


@triton.jit
def visible_range(
    start_m, len_q, len_k, window_left, window_right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Keys lo..hi (hi excluded) that the rows start_m.. of a block of BLOCK_M can see; lo is a multiple of BLOCK_N."""
    lo = start_m * 0
    hi = start_m * 0 + len_k
    if window_right is not None:
        last_row = tl.minimum(start_m + BLOCK_M, len_q) - 1
        hi = tl.minimum(hi, last_row + len_k - len_q + window_right + 1)
    if window_left is not None:
        lo = tl.maximum(start_m + len_k - len_q - window_left, 0) // BLOCK_N * BLOCK_N
    return lo, tl.where(start_m < len_q, hi, 0)


@triton.jit
def unmasked_range(start_m, len_q, len_k, window_left, window_right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys lo..hi (hi excluded): blocks of BLOCK_N keys that start there are seen whole by all rows."""
    lo = start_m * 0
    hi = start_m * 0 + len_k
    if window_right is not None:
        hi = tl.maximum(tl.minimum(hi, start_m + len_k - len_q + window_right + 1), 0)
    if window_left is not None:
        last_row = tl.minimum(start_m + BLOCK_M, len_q) - 1
        lo = last_row + len_k - len_q - window_left
    return lo, hi // BLOCK_N * BLOCK_N


@triton.jit
def visible_scores(offs_m, offs_n, len_q, len_k, window_left, window_right):
    """Mask [BLOCK_M, BLOCK_N] of the scores that count, for rows offs_m and keys offs_n.

    A row's bounds are found once for each row: inside the block one comparison a score is left, two with a left window.
    """
    own_key = offs_m + len_k - len_q  # [BLOCK_M]
    if window_right is None:
        mask = (offs_n < len_k)[None, :]
    else:
        last_key = tl.minimum(own_key + window_right, len_k - 1)
        mask = offs_n[None, :] <= last_key[:, None]  # [BLOCK_M, BLOCK_N]
    if window_left is not None:
        mask = mask & (offs_n[None, :] >= (own_key - window_left)[:, None])
    return mask
