"""The oracle and the baseline that everything is measured against are themselves checked, against the plainest code."""

import math

import pytest
import torch
from attention_checks import Case, relative_error, table

from common import reference
from common.reference import attention_oracle, eager_attention, visible_mask

CASES = {
    "full": Case(2, 4, 2, 5, 7, 3),
    "causal": Case(1, 2, 2, 7, 7, 4, causal=True),
    "causal-more-rows": Case(1, 2, 1, 9, 4, 4, causal=True),
    "window": Case(1, 2, 2, 8, 9, 4, window=(2, 1)),
    "window-left-causal": Case(1, 1, 1, 8, 9, 4, window=(2, None), causal=True),
    "lengths": Case(3, 2, 1, 6, 8, 4, lengths_q=(6, 0, 3), lengths_k=(5, 8, 0)),
    "lengths-causal": Case(2, 2, 2, 6, 8, 4, causal=True, lengths_q=(4, 6), lengths_k=(8, 3), scale=-0.5),
}  # fmt: skip


def sees(i: int, j: int, len_q: int, len_k: int, case: Case) -> bool:
    """The contract, word for word: row i stands at key i + len_k - len_q; windows are inclusive."""
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    distance = j - (i + len_k - len_q)
    inside = i < len_q and j < len_k
    return inside and (right is None or distance <= right) and (left is None or -distance <= left)


def one_by_one(q, k, v, case: Case):
    """Attention number by number, in Python floats."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.head_dim)
    for b in range(case.batch):
        len_q = case.seqlen_q if case.lengths_q is None else case.lengths_q[b]
        len_k = case.seqlen_k if case.lengths_k is None else case.lengths_k[b]
        for h in range(case.heads_q):
            g = h // (case.heads_q // case.heads_kv)
            for i in range(case.seqlen_q):
                keys = [j for j in range(case.seqlen_k) if sees(i, j, len_q, len_k, case)]
                weights = [math.exp(scale * (q[b, h, i].double() @ k[b, g, j].double()).item()) for j in keys]
                if keys:
                    lse[b, h, i] = math.log(sum(weights))
                    values = [w / sum(weights) * v[b, g, j].double() for w, j in zip(weights, keys, strict=True)]
                    out[b, h, i] = sum(values)
    return out, lse


@table("case", CASES)
@pytest.mark.parametrize("scores_at_once", [2**27, 1])
def test_oracle(case, scores_at_once, monkeypatch):
    """Masks, alignment, groups of heads, LSE; and chunks of rows, which large cases are cut into, change nothing."""
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", scores_at_once)
    q, k, v = case.tensors("fp32", "cpu")
    out, lse = attention_oracle(q, k, v, return_lse=True, **case.options("cpu"))
    wanted, wanted_lse = one_by_one(q, k, v, case)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)


@table("case", CASES)
def test_eager(case):
    """In float64 the baseline is the oracle; in its own dtype it returns that dtype."""
    q, k, v = (x.double() for x in case.tensors("fp32", "cpu"))
    options = case.options("cpu")
    out = eager_attention(q, k, v, **options)
    assert relative_error(out, attention_oracle(q, k, v, **options)) < 1e-14
    assert eager_attention(*(x.to(torch.bfloat16) for x in (q, k, v)), **options).dtype == torch.bfloat16


def test_agrees_with_sdpa():
    """Where PyTorch has the same conventions: no mask, and causal with as many rows as keys."""
    q, k, v = (x.double() for x in Case(2, 4, 2, 9, 9, 8).tensors("fp32", "cpu"))
    for causal in (False, True):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        assert relative_error(attention_oracle(q, k, v, is_causal=causal), wanted) < 1e-14


def test_bottom_right_alignment():
    """Three rows over five keys: the last row sees all; five rows over three keys: the first two see nothing."""
    rows = torch.arange(5)
    assert visible_mask(rows[:3], 5, 3, 5, True, None, "cpu").int().tolist() == [
        [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]
    ]  # fmt: skip
    assert visible_mask(rows, 3, 5, 3, True, None, "cpu").int().tolist() == [
        [0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]
    ]  # fmt: skip
    assert visible_mask(rows[:3], 3, 3, 3, False, (1, 0), "cpu").int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
