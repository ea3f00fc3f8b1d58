"""Combining attention over parts of the keys, by the log-sum-exp of each part.

out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i): exact, in any order and grouping (Flash-Decoding,
Dao et al. 2023; ring attention uses the same). A part that saw no key has lse = -inf and weight 0.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def merge_step(acc, m_i, l_i, out, lse):
    """Take one more part (out [BLOCK_D], its lse) into the running (acc, m_i, l_i), where acc is not normalised."""
    m_new = tl.maximum(m_i, lse)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # both sides empty: exp(-inf), not exp(-inf + inf)
    alpha = tl.exp(m_i - m_safe)
    weight = tl.exp(lse - m_safe)
    part = tl.where(lse == float("-inf"), 0.0, out)  # an empty part's output is never read: 0 * NaN is NaN
    return acc * alpha + weight * part, m_new, l_i * alpha + weight


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts along the first dimension.

    outs [parts, ..., D], any float dtype, each part normalised by itself; lses [parts, ...], natural logarithm, -inf
    where a part saw no key. Returns out [..., D] in outs' dtype (0 where no part saw a key) and lse [...] float32.
    Raises ValueError where the shapes do not belong together.
    """
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"lses: must have shape {list(outs.shape[:-1])} (outs without its last), it has {list(lses.shape)}")
    if outs.shape[0] == 0:
        raise ValueError("outs: has no parts to merge (its first dimension is 0)")
    lses = lses.float()
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
    parts = outs.float().masked_fill(weights == 0, 0.0)
    return (weights * parts).sum(0).to(outs.dtype), lse
