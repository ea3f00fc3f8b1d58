"""Prefill: attention of many queries at once. `flash_attention` runs the newest version that serves the call."""

from common.hardware import detect_gpu
from common.lineage import find_version, versions_of
from common.replay import remembered


@remembered
def flash_attention(
    q, k, v, causal=False, *, scale=None, window=None, seq_lens=None, seqlens_q=None, seqlens_k=None,
    return_lse=False, out=None, version=None, **fp8,
):  # fmt: skip
    """softmax(scale * q k^T + mask) v, by the newest version that serves this call on this GPU.

    q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], any strides, or [S, H, D] each, one sequence; float16, bfloat16, float32;
      D from 1 to 256; Hq a multiple of Hkv (query head i reads KV head i // (Hq / Hkv)). Returns out like q.
    causal: row i sees keys up to i + len_k - len_q (bottom-right aligned), where len_q and len_k are the true lengths:
      seqlens_q and seqlens_k (int32 [B]) where given, else Sq and Sk. seqlens_k alone therefore moves the diagonal;
      seq_lens sets both at once.
    window: (left, right), inclusive: how many keys before and after its own position a row sees; None is no bound.
    scale: default 1/sqrt(D); may be zero or negative.
    return_lse: also return the log-sum-exp of every row, natural logarithm, fp32 [B, Hq, Sq]. A row that sees no key,
      or lies at or past its seqlens_q, gives 0, and -inf.
    out: preallocated output. version: "v2", say, instead of the newest.
    use_fp8=True, fp8_dtype="e4m3" or "e5m2": quantise 16-bit tensors, a scale a head; or float8 tensors with descale_q,
      descale_k, descale_v (a number, [H] or [B, H]); the output is 16-bit.
    Raises ValueError or TypeError naming the argument, before anything is launched; NoGPU where there is no GPU.
    """
    if seq_lens is not None:
        if seqlens_q is not None or seqlens_k is not None:
            raise ValueError("seq_lens: sets seqlens_q and seqlens_k, one of which is given too; give one or the other")
        seqlens_q = seqlens_k = seq_lens
    arguments = dict(
        is_causal=causal, scale=scale, window=window, seqlens_q=seqlens_q, seqlens_k=seqlens_k, return_lse=return_lse,
        out=out, **fp8,
    )  # fmt: skip
    if version is not None:
        chosen = find_version("prefill", version)
        if fp8.get("use_fp8") and not chosen.fp8:
            having = ", ".join(v.name for v in versions_of("prefill") if v.fp8)
            raise ValueError(f"use_fp8: {chosen.name} has no FP8 path; {having} have")
        return chosen.call(q, k, v, **arguments)
    gpu, dtype = detect_gpu(), fp8.get("fp8_dtype", "e4m3") if fp8.get("use_fp8") else "fp16"
    reasons = []
    for candidate in reversed(versions_of("prefill")):
        reason = candidate.why_not(gpu, dtype) or candidate.declines(q, k, v, **arguments)
        if reason is None:
            return candidate.call(q, k, v, **arguments)
        reasons.append(f"{candidate.name} {reason}")
    raise ValueError(f"no version of prefill serves this call on {gpu.name}: {'; '.join(reasons)}")
