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
def merge_rows_step(acc, m_i, l_i, outs, lses):
    """merge_step for some rows at a time: outs [PARTS, ROWS, BLOCK_D], lses [PARTS, ROWS] into acc [ROWS, BLOCK_D]."""
    m_new = tl.maximum(m_i, tl.max(lses, 0))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp(m_i - m_safe)
    weights = tl.exp(lses - m_safe[None, :])
    acc = acc * alpha[:, None] + tl.sum(weights[:, :, None] * outs, 0)
    return acc, m_new, l_i * alpha + tl.sum(weights, 0)


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
