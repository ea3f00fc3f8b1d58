"""Decoding: attention of one query a sequence, or a few, over a long KV cache."""

from common.hardware import detect_gpu
from common.lineage import find_version, versions_of


def flash_decoding(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, version=None
):  # fmt: skip
    """softmax(scale * q k^T) v for the last positions of each sequence, by the newest version that can run here.

    q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], any strides; fp16, bf16 or fp32; D from 1 to 256; Hq a multiple of
      Hkv. Sq from 1 to 16 (v1: 1): query i stands at position len_k - Sq + i and sees the keys up to its own.
    seqlens_k: int32 [B], the keys that count of each sequence; later ones are never read.
    num_splits: how many parts the keys are cut into; None leaves it to the version. The result does not depend on it
      beyond rounding.
    return_lse: also the log-sum-exp, natural logarithm, float32 [B, Hq, Sq]; no keys give 0 and -inf.
    out: preallocated output. version: "v1", say, instead of the newest.
    Raises ValueError or TypeError naming the argument, before anything is launched; NoGPU where there is no GPU.
    """
    arguments = dict(scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out)
    if version is not None:
        return find_version("decoding", version).call(q, k, v, **arguments)
    gpu = detect_gpu()
    chosen = next(v for v in reversed(versions_of("decoding")) if v.why_not(gpu) is None)
    return chosen.call(q, k, v, **arguments)
