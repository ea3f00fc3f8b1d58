"""exp by way of exp2, the exponential that GPUs have: exp(x) = 2^(x log2 e), where the factor joins the scale.

A kernel that does so takes the maximum of unscaled scores, and therefore wants a scale above zero.
"""

import torch
import triton.language as tl

from common.problem import AttentionProblem

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # stands in for a scale of 0, whose product with -inf is NaN


def turn_negative_scale(problem: AttentionProblem):
    """Give the problem a scale that is not negative, and the same scores: q changes its sign, which is exact."""
    if problem.scale < 0:
        q, problem.scale = problem.q, -problem.scale
        problem.q = -q if q.dtype.itemsize > 1 else (q.view(torch.uint8) ^ 0x80).view(q.dtype)


def scale_log2(problem: AttentionProblem) -> float:
    """The problem's scale for exp2, above zero: its own times log2(e), the smallest normal float32 for 0."""
    return max(problem.scale * LOG2_E.value, SMALLEST.value)
