"""The tensors of a case: N(0, 1), seeded, in the layout asked for; their float8 copies; copies that outrun the L2."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from bench.cases import FP8, Case
from common.problem import AttentionProblem
from common.quantize import Quantized, quantize_fp8

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(eq=False)
class Inputs:
    """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] as views of the case's layout; seqlens_k int32 [B] or None.

    For an 8-bit case they are the unquantised bfloat16 tensors that the error is measured on.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seqlens_k: torch.Tensor | None = None

    @functools.cached_property
    def quantized(self) -> Quantized:
        """Float8 q, k, v and their descales: what a version with use_fp8 is timed on."""
        return quantize_fp8(self.q, self.k, self.v, self.case.dtype)

    def rounded(self) -> Inputs:
        """The float8 copies as the numbers that they stand for, float32."""
        q, k, v, *descales = self.quantized
        values = (x.float() * scale[..., None, None] for x, scale in zip((q, k, v), descales, strict=True))
        return Inputs(self.case, *values, self.seqlens_k)

    def copy(self) -> Inputs:
        """Equal tensors at other addresses."""
        return Inputs(self.case, self.q.clone(), self.k.clone(), self.v.clone(), self.seqlens_k)

    def version_arguments(self) -> tuple[tuple, dict]:
        """Positional and keyword arguments of version.call for this case."""
        case = self.case
        options = {} if self.seqlens_k is None else {"seqlens_k": self.seqlens_k}
        if case.family == "prefill":
            options |= {"is_causal": case.causal, "window": case.window}
        if case.dtype not in FP8:
            return (self.q, self.k, self.v), options
        q, k, v, descale_q, descale_k, descale_v = self.quantized
        options |= {"use_fp8": True, "fp8_dtype": case.dtype}
        return (q, k, v), options | {"descale_q": descale_q, "descale_k": descale_k, "descale_v": descale_v}

    def problem(self) -> AttentionProblem:
        """What a version chooses its tiles by."""
        tensors, options = self.version_arguments()
        if self.case.family == "decoding":
            return AttentionProblem.decoding(*tensors, **options)
        if "use_fp8" in options:
            options["descales"] = tuple(options.pop(f"descale_{x}") for x in "qkv")
        return AttentionProblem.prefill(*tensors, **options)


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    """Inputs of a case on a device; the same seed gives the same values on the same kind of device."""
    random = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPE.get(case.dtype, torch.bfloat16)

    def normal(heads: int, seqlen: int) -> torch.Tensor:
        shape = (case.batch, seqlen, heads) if case.layout == "bshd" else (case.batch, heads, seqlen)
        x = torch.randn(*shape, case.head_dim, dtype=dtype, device=device, generator=random)
        return x.transpose(1, 2) if case.layout == "bshd" else x

    q = normal(case.heads_q, case.seqlen_q)
    k, v = (normal(case.heads_kv, case.seqlen_k) for _ in range(2))
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Inputs(case, q, k, v, lengths)
