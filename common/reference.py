"""What a kernel's output is measured against: a float64 oracle, and eager PyTorch, the baseline that writes S x S."""

import math

import torch

SCORES_AT_ONCE = 2**27  # of the oracle in memory: 1 GiB of float64


def visible_mask(rows, seqlen_k, len_q, len_k, is_causal, window, device) -> torch.Tensor:
    """Boolean [len(rows), seqlen_k]: which keys each of `rows` (int64 [n]) sees. Bottom-right aligned."""
    left, right = window or (None, None)
    right = 0 if is_causal else right
    keys = torch.arange(seqlen_k, device=device)
    distance = keys[None, :] - (rows[:, None] + len_k - len_q)
    mask = (keys < len_k)[None, :] & (rows < len_q)[:, None]
    if right is not None:
        mask = mask & (distance <= right)
    if left is not None:
        mask = mask & (distance >= -left)
    return mask


def _chunks(count: int, size: int, device) -> list[torch.Tensor]:
    """The numbers below count, in order, `size` at a time, one at least."""
    return list(torch.arange(count, device=device).split(max(1, size))) if count else []


def attention_oracle(
    q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False
):  # fmt: skip
    """Attention in float64: q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], any float dtype and device.

    Returns out float64 [B, Hq, Sq, D], and with return_lse also lse float64 [B, Hq, Sq] (natural logarithm). Rows that
    see no key give 0 and -inf. Written plainly and in chunks of heads and rows, so that it can be trusted and fits.
    """
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    out = torch.zeros(batch, heads_q, seqlen_q, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads_q, seqlen_q), -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        len_q = seqlen_q if seqlens_q is None else int(seqlens_q[b])
        len_k = seqlen_k if seqlens_k is None else int(seqlens_k[b])
        if len_k == 0:
            continue
        for h in _chunks(heads_q, SCORES_AT_ONCE // (len_k * max(len_q, head_dim)), q.device):
            keys, values = (x[b, h // (heads_q // heads_kv), :len_k].double() for x in (k, v))  # [heads, len_k, D]
            for rows in _chunks(len_q, SCORES_AT_ONCE // (len_k * len(h)), q.device):
                mask = visible_mask(rows, len_k, len_q, len_k, is_causal, window, q.device)
                scores = (q[b, h][:, rows].double() @ keys.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
                found = torch.logsumexp(scores, dim=-1)
                weights = torch.exp(scores - found.masked_fill(~mask.any(-1), 0.0)[..., None])
                out[b, h[:, None], rows], lse[b, h[:, None], rows] = weights @ values, found
    return (out, lse) if return_lse else out


def eager_attention(q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None):
    """Attention as plain PyTorch in the inputs' dtype: writes the scores and the weights, [B, Hq, Sq, Sk] each.

    The baseline for memory, and the yardstick for error: a kernel may be at most twice as wrong as this.
    """
    batch, heads_q, seqlen_q, head_dim = q.shape
    seqlen_k, group = k.shape[2], heads_q // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(head_dim) if scale is None else scale)
    if is_causal or window or seqlens_q is not None or seqlens_k is not None:
        rows = torch.arange(seqlen_q, device=q.device)
        masks = [
            visible_mask(
                rows, seqlen_k, seqlen_q if seqlens_q is None else seqlens_q[b],
                seqlen_k if seqlens_k is None else seqlens_k[b], is_causal, window, q.device,
            )
            for b in (range(batch) if seqlens_q is not None or seqlens_k is not None else (0,))
        ]  # fmt: skip
        mask = torch.stack(masks)[:, None]
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights @ v
