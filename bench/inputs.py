"""The tensors of a case: N(0, 1), seeded, in the layout asked for; float8 copies; pages; copies that outrun the L2."""

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

    For an 8-bit case they are the unquantised tensors, bfloat16 in prefill, float16 in decoding.
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

    @functools.cached_property
    def quantized_cache(self) -> tuple[torch.Tensor, ...]:
        """Float8 k and v [B, Hkv, Sk, D], laid out as the 16-bit ones, and their descales [B, Hkv]."""
        from common.quantize import quantize_cache

        return tuple(quantize_cache(self.k, self.v, fp8_dtype=self.case.dtype))

    @functools.cached_property
    def cache(self) -> tuple[tuple[torch.Tensor, torch.Tensor], dict]:
        """Decoding: ((k, v), options) as a version takes them: float8 where the case says so, in pages likewise."""
        case, tensors, options = self.case, (self.k, self.v), {}
        if case.dtype in FP8:
            *tensors, descale_k, descale_v = self.quantized_cache
            options = {"descale_k": descale_k, "descale_v": descale_v}
        if case.page_size:
            table = shuffled_pages(case, self.q.device)
            tensors = [in_pages(x, table, case.page_size, case.layout) for x in tensors]
            options["block_table"] = table
            if self.seqlens_k is None and case.seqlen_k % case.page_size:  # the last page is not full
                options["seqlens_k"] = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=table.device)
        return tuple(tensors), options

    def rounded(self) -> Inputs:
        """The float8 copies as the numbers that they stand for, float32; in decoding k and v alone."""
        if self.case.family == "decoding":
            *cache, descale_k, descale_v = self.quantized_cache
            k, v = (x.float() * d[..., None, None] for x, d in zip(cache, (descale_k, descale_v), strict=True))
            return Inputs(self.case, self.q, k, v, self.seqlens_k)
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
        if case.family == "decoding":
            cache, more = self.cache
            return (self.q, *cache), options | more
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
            return AttentionProblem.decoding(*tensors, **options, most_queries=self.case.seqlen_q, fp8_caches=True)
        if "use_fp8" in options:
            options["descales"] = tuple(options.pop(f"descale_{x}") for x in "qkv")
        return AttentionProblem.prefill(*tensors, **options)


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    """Inputs of a case on a device; the same seed gives the same values on the same kind of device."""
    random = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPE.get(case.dtype, torch.float16 if case.family == "decoding" else torch.bfloat16)

    def normal(heads: int, seqlen: int) -> torch.Tensor:
        shape = (case.batch, seqlen, heads) if case.layout == "bshd" else (case.batch, heads, seqlen)
        x = torch.randn(*shape, case.head_dim, dtype=dtype, device=device, generator=random)
        return x.transpose(1, 2) if case.layout == "bshd" else x

    q = normal(case.heads_q, case.seqlen_q)
    k, v = (normal(case.heads_kv, case.seqlen_k) for _ in range(2))
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Inputs(case, q, k, v, lengths)


def shuffled_pages(case: Case, device: torch.device | str) -> torch.Tensor:
    """A block table int32 [B, pages of a sequence] whose pages lie anywhere, in a fixed random order."""
    pages = -(-case.seqlen_k // case.page_size)
    order = torch.randperm(case.batch * pages, generator=torch.Generator().manual_seed(0))
    return order.to(torch.int32).view(case.batch, pages).to(device)


def in_pages(x: torch.Tensor, table: torch.Tensor, page_size: int, layout: str = "bshd") -> torch.Tensor:
    """A cache x [B, H, S, D] in pages [pages, H, page_size, D], those of sequence b where table[b] says; a last page
    that is not full ends in zeros. Stored [pages, page_size, H, D], or as the view is for layout "bhsd".
    """
    batch, heads, seqlen, head_dim = x.shape
    raw = x.transpose(1, 2).contiguous().view(torch.uint8)  # float8 cannot be indexed everywhere
    raw = torch.nn.functional.pad(raw, (0, 0, 0, 0, 0, table.shape[1] * page_size - seqlen))
    pages = raw.view(table.numel(), page_size, heads, -1)
    placed = torch.empty_like(pages)
    placed[table.flatten().long()] = pages
    placed = placed.view(x.dtype).transpose(1, 2)
    return placed.contiguous() if layout == "bhsd" else placed
