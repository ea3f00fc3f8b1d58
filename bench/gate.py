"""The gate: no time is shown for a kernel that is wrong, at the shape that was timed.

Error is the relative L2 distance to attention in float64 on the unquantised inputs (of FP8 caches, on what they hold).
All heads of all sequences are compared, on a sample of rows where there are many, so that the check takes milliseconds;
all output must be finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.cases import FP8, Case
from bench.inputs import Inputs
from common.reference import visible_mask

ROWS = 128  # rows compared: one out of each of 128 equal stretches, and the first and the last
FP8_LIMIT = {"e4m3": 0.06, "e5m2": 0.13}  # for N(0, 1) inputs
TIMES_ROUNDING = 1.2  # of q, k and v alone, where that is more: narrow heads over many keys. The rest is P's rounding
EIGHT_BIT_OUTPUT_LIMIT = 0.075
TIMES_PYTORCH = 2.0
FP32_FLOOR = 1e-6  # eager float32 is at times right to 2e-7, less than the error of the GPU's exp2 instruction


@dataclass(eq=False)
class Expected:
    """What a provider must return on the sampled rows: values float64 [B, Hq, len(rows), D]; pytorch_error is that of
    eager PyTorch on the same rows in the case's own precision (16 bits for 8-bit cases), rounding_error what 8-bit
    inputs cost where all else is exact. unquantised, for FP8 caches: the values before these were rounded.
    """

    rows: torch.Tensor
    values: torch.Tensor
    pytorch_error: float
    rounding_error: float = 0.0
    unquantised: torch.Tensor | None = None

    def error(self, out: torch.Tensor) -> float:
        """Relative L2 error of out [B, Hq, Sq, D]."""
        return relative_error(out[:, :, self.rows], self.values)

    def error_unquantised(self, out: torch.Tensor) -> float | None:
        """The same against the values before FP8 caches were rounded; None where they were not."""
        return None if self.unquantised is None else relative_error(out[:, :, self.rows], self.unquantised)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """|actual - wanted| / |wanted|, in float64; the absolute error where wanted is zero."""
    norm = wanted.double().norm().item()
    return (actual.double() - wanted.double()).norm().item() / (norm or 1.0)


def sample_rows(seqlen: int, seed: int) -> torch.Tensor:
    """Sorted indices: all rows up to ROWS of them; else one at random out of each stretch, and the first and last."""
    if seqlen <= ROWS:
        return torch.arange(seqlen)
    bounds = torch.linspace(0, seqlen, ROWS + 1, dtype=torch.float64).long()
    random = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = bounds[:-1] + (random * bounds.diff()).long()
    return torch.cat([inside, torch.tensor([0, seqlen - 1])]).unique()


def attend_rows(inputs: Inputs, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Attention of the given rows only, computed in `dtype` as eager PyTorch would: [B, Hq, len(rows), D]."""
    case, scale = inputs.case, 1.0 / math.sqrt(inputs.case.head_dim)
    rows = rows.to(inputs.q.device)
    group = case.heads_q // case.heads_kv
    out = []
    for b in range(case.batch):  # one sequence at a time, so that float64 copies of a large cache fit
        len_k = case.seqlen_k if case.lengths is None else case.lengths[b]
        keys, values = (x[b, :, :len_k].to(dtype) for x in (inputs.k, inputs.v))
        queries = inputs.q[b][:, rows].to(dtype).reshape(case.heads_kv, group * len(rows), case.head_dim)
        scores = (queries @ keys.mT * scale).unflatten(1, (group, len(rows)))
        if case.causal or case.window:
            mask = visible_mask(rows, len_k, case.seqlen_q, len_k, case.causal, case.window, rows.device)
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0).flatten(1, 2)  # a row that sees no key gives 0
        out.append((weights @ values).reshape(case.heads_q, len(rows), case.head_dim))
    return torch.stack(out)


def expect(inputs: Inputs, seed: int = 0) -> Expected:
    """The float64 answer on a sample of rows, and PyTorch's own error there.

    An FP8 cache was rounded by whoever wrote it: what a decoding step owes is the answer for the numbers that it holds.
    """
    rows = sample_rows(inputs.case.seqlen_q, seed).to(inputs.q.device)
    values = attend_rows(inputs, rows, torch.float64)
    rounding_error = 0.0
    if inputs.case.dtype in FP8 and inputs.case.family == "decoding":
        held = inputs.rounded()
        unquantised, values = values, attend_rows(held, rows, torch.float64)
        pytorch_error = relative_error(attend_rows(held, rows, inputs.q.dtype), values)
        return Expected(rows, values, pytorch_error, relative_error(values, unquantised), unquantised)
    if inputs.case.dtype in FP8:
        rounding_error = relative_error(attend_rows(inputs.rounded(), rows, torch.float64), values)
    return Expected(rows, values, relative_error(attend_rows(inputs, rows, inputs.q.dtype), values), rounding_error)


def error_limit(case: Case, expected: Expected, eight_bit_output: bool = False) -> float:
    """The largest error that passes: twice PyTorch's own in 16 and 32 bits, and over FP8 caches; for 8-bit inputs and
    outputs of prefill fixed, or a fifth more than what rounding the inputs costs.
    """
    if case.dtype in FP8 and case.family == "prefill":
        fixed = max(FP8_LIMIT[case.dtype], EIGHT_BIT_OUTPUT_LIMIT if eight_bit_output else 0.0)
        return max(fixed, TIMES_ROUNDING * expected.rounding_error)
    return max(TIMES_PYTORCH * expected.pytorch_error, FP32_FLOOR if case.dtype == "fp32" else 0.0)


def check(out: torch.Tensor, case: Case, expected: Expected, limit: float) -> tuple[float | None, str]:
    """(error, "pass" or the reason against). The error is None where it says nothing: wrong shape, NaN or infinity."""
    shape = (case.batch, case.heads_q, case.seqlen_q, case.head_dim)
    if tuple(out.shape) != shape:
        return None, f"the output has shape {list(out.shape)}, not {list(shape)}"
    bad = out.numel() - int(torch.isfinite(out).sum())
    if bad:
        return None, f"{100 * bad / out.numel():.3g} % of the output is unwritten, NaN or infinite"
    error = expected.error(out)
    if not error <= limit:
        return error, f"error {error:.2g} is above the limit {limit:.2g}"
    return error, "pass"


def too_fast(case: Case, milliseconds: float, peak_tflops: float | None, peak_gbps: float | None) -> str | None:
    """Why this time cannot be true, or None: faster than the hardware's peak rate of the dtype, or of its memory."""
    tflops, gbps = case.flops() / milliseconds / 1e9, case.bytes() / milliseconds / 1e6
    if peak_tflops and tflops > peak_tflops:
        return f"{tflops:.0f} TFLOP/s is above the hardware's {peak_tflops:g}: less work was done, or timed"
    if peak_gbps and gbps > peak_gbps:
        return f"{gbps:.0f} GB/s is above the hardware's {peak_gbps:g}: not all was read, or it came from the cache"
    return None


def poison(tensor: torch.Tensor) -> None:
    """Fill with all-ones bytes, which are NaN in every float format here."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.view(integer).fill_(255 if integer is torch.uint8 else -1)


def poison_free_memory(size: int, device: torch.device) -> None:
    """Leave blocks of `size` bytes full of NaN for the provider to get its output from.

    The cache is emptied first: it might hold another provider's output, right and of just this size.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    blocks = [torch.empty(max(size, 1), dtype=torch.uint8, device=device) for _ in range(3)]
    for block in blocks:
        block.fill_(255)
