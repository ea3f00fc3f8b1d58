"""Combining attention over parts of the keys, by the log-sum-exp of each part.

out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i): exact, in any order and grouping (Flash-Decoding,
Dao et al. 2023; ring attention uses the same). A part that saw no key has lse = -inf and weight 0.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def merge_step(acc, m_i, l_i, outs, lses):
    """Take some more parts (outs [PARTS, BLOCK_D], lses [PARTS]) into the running acc [BLOCK_D], m_i and l_i.

    acc is not normalised: acc / l_i is the output so far, m_i + log(l_i) its log-sum-exp.
    """
    m_new = tl.maximum(m_i, tl.max(lses, 0))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # all parts empty: exp(-inf), not exp(-inf + inf)
    alpha = tl.exp(m_i - m_safe)
    weights = tl.exp(lses - m_safe)
    acc = acc * alpha + tl.sum(weights[:, None] * outs, 0)
    return acc, m_new, l_i * alpha + tl.sum(weights, 0)


@triton.jit
def merge_parts(
    Outs, LSEs, offs_m, rows, num_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LSES: tl.constexpr = 64,
):  # fmt: skip
    """Output [ROWS, BLOCK_D] and LSE [ROWS] of rows offs_m: all parts, Outs float32 [num_parts, rows, HEAD_DIM], LSEs
    [num_parts, rows], in an order that depends on num_parts and PARTS alone.

    The largest LSE comes first, LSES parts at a time; then PARTS running sums need neither rescaling nor each other.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, LSES)[:, None]
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, num_parts, LSES):
        mask = (start + offs_s < num_parts) & (offs_m < rows)[None, :]
        lses_ptrs = LSEs + (start + offs_s).to(tl.int64) * rows + offs_m[None, :]
        m_i = tl.maximum(m_i, tl.max(tl.load(lses_ptrs, mask=mask, other=float("-inf")), 0))
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)  # no part has a key: exp(-inf), not exp(-inf + inf)

    part = tl.arange(0, PARTS)[:, None] * rows + offs_m[None, :]  # [PARTS, ROWS]
    outs_offsets = part[:, :, None] * HEAD_DIM + offs_d[None, None, :]  # [PARTS, ROWS, BLOCK_D]
    l_i = tl.zeros([PARTS, ROWS], tl.float32)
    acc = tl.zeros([PARTS, ROWS, BLOCK_D], tl.float32)
    for start in tl.range(0, num_parts, PARTS, num_stages=3):
        mask = (start + tl.arange(0, PARTS) < num_parts)[:, None] & (offs_m < rows)[None, :]
        mask_d = mask[:, :, None] & (offs_d < HEAD_DIM)[None, None, :]
        weights = tl.exp(tl.load(LSEs + part, mask=mask, other=float("-inf")) - m_safe[None, :])
        acc += weights[:, :, None] * tl.load(Outs + outs_offsets, mask=mask_d, other=0.0)
        l_i += weights
        Outs += PARTS * rows * HEAD_DIM
        LSEs += PARTS * rows
    l_sum = tl.sum(l_i, 0)
    return tl.where(l_sum == 0.0, 0.0, 1.0 / l_sum)[:, None] * tl.sum(acc, 0), m_i + tl.log(l_sum)


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts along the first dimension.

    outs [parts, ..., D], any float dtype, each part normalised by itself; lses [parts, ...], natural logarithm, -inf
    where a part saw no key. Returns out [..., D] in outs' dtype (0 where no part saw a key) and lse [...] float32.
    Raises ValueError where the shapes do not belong together.
    """
    if outs.shape[:-1] != lses.shape:
        shape = list(outs.shape[:-1])
        raise ValueError(f"lses: must have shape {shape} (outs without its last dimension), it has {list(lses.shape)}")
    if outs.shape[0] == 0:
        raise ValueError("outs: has no parts to merge (its first dimension is 0)")
    lses = lses.float()
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
    parts = outs.float().masked_fill(weights == 0, 0.0)
    return (weights * parts).sum(0).to(outs.dtype), lse
