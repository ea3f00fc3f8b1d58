"""Ceilings, measured in the same run as the kernels: matrix products, a copy, and a kernel that only reads.

Decoding reads; its ceiling is the read-only kernel, timed as decoding is, in a CUDA graph over rotated buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bench.timing import CudaClock

MATMUL = 8192
COPY_BYTES = 4 << 30
READ_MB = (34, 134, 268, 537, 1074, 4295)
SAMPLES = 10
READ_BLOCK, READ_LOADS = 4096, 4  # int32 values of a load, 16 a thread; 64 KB a program, so that 34 MB fill all SMs


@dataclass(frozen=True)
class Ceiling:
    """One measured ceiling. name "matmul", "copy" or "read"; one of flops and bytes says what a sample did, neither for
    "launch": a kernel that does nothing worth mentioning, alone, from the host's start until the GPU is done.
    """

    name: str
    dtype: str
    timing: str
    samples: tuple[float, ...]
    flops: int = 0
    bytes: int = 0


@triton.jit
def read_kernel(X, Out, LOADS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums LOADS blocks of int32 and writes one number, so that the reads cannot be dropped."""
    start = tl.program_id(0).to(tl.int64) * (LOADS * BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(LOADS):
        total += tl.load(X + start + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(Out + tl.program_id(0), tl.sum(total))


def read_all(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Read every int32 of x once; its size must be a multiple of READ_BLOCK * READ_LOADS."""
    programs = x.numel() // (READ_BLOCK * READ_LOADS)
    read_kernel[(programs,)](x, out, LOADS=READ_LOADS, BLOCK=READ_BLOCK, num_warps=8)
    return out


def read_size(megabytes: int) -> int:
    """Bytes nearest to so many MB that read_all takes."""
    step = 4 * READ_BLOCK * READ_LOADS
    return max(1, round(megabytes * 1e6 / step)) * step


def _matmul(dtype: torch.dtype, size: int, device) -> Callable:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return functools.partial(torch.mm, a, b, out=out)


def _fp8_matmul(size: int, device) -> Callable:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return functools.partial(
        torch._scaled_mm, a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _products(dtypes) -> dict[str, tuple[Callable, int]]:
    """For each dtype with a ceiling of its own: a function of the device that gives the call, and the matrix size."""
    builders = {
        "fp16": (functools.partial(_matmul, torch.float16, MATMUL), MATMUL),
        "bf16": (functools.partial(_matmul, torch.bfloat16, MATMUL), MATMUL),
        "fp32": (functools.partial(_matmul, torch.float32, MATMUL // 2), MATMUL // 2),
        "e4m3": (functools.partial(_fp8_matmul, MATMUL), MATMUL),
    }
    wanted = {"e4m3" if dtype == "e5m2" else dtype for dtype in dtypes}  # cuBLAS has no product of two e5m2 matrices
    return {dtype: builder for dtype, builder in builders.items() if dtype in wanted}


def measure(clock: CudaClock, dtypes, family: str, say: Callable[[str], None] = lambda line: None) -> list[Ceiling]:
    """All ceilings that the family is compared with. One that fails is named through `say` and left out."""
    tasks = [
        (f"{dtype} matmul", functools.partial(_measure_product, clock, dtype, *how))
        for dtype, how in _products(dtypes).items()
    ]
    tasks.append(("copy", functools.partial(_measure_copy, clock)))
    sizes = READ_MB if family == "decoding" else READ_MB[-1:]
    tasks += [(f"read of {size} MB", functools.partial(_measure_read, clock, size)) for size in sizes]
    if family == "decoding":
        tasks.append(("launch", functools.partial(_measure_launch, clock)))
    ceilings = []
    for name, task in tasks:
        try:
            ceilings.append(task())
        except Exception as error:  # an old GPU has no FP8 product, a small one no 4 GiB
            say(f"no ceiling from {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        torch.cuda.empty_cache()
    return ceilings


def _measure_product(clock: CudaClock, dtype: str, build: Callable, size: int) -> Ceiling:
    return Ceiling("matmul", dtype, "events", tuple(clock.events(build(clock.device), SAMPLES)), flops=2 * size**3)


def _measure_copy(clock: CudaClock) -> Ceiling:
    size = min(COPY_BYTES, int(0.2 * torch.cuda.mem_get_info(clock.device)[0]))
    source = torch.empty(size // 4, dtype=torch.int32, device=clock.device).fill_(1)
    target = torch.empty_like(source)
    samples = clock.events(functools.partial(target.copy_, source), SAMPLES)
    return Ceiling("copy", "fp16", "events", tuple(samples), bytes=8 * source.numel())


def _measure_read(clock: CudaClock, megabytes: int) -> Ceiling:
    size = read_size(megabytes)
    copies = clock.copies_to_outrun_l2(size)
    sources = [torch.empty(size // 4, dtype=torch.int32, device=clock.device).fill_(1) for _ in range(copies)]
    out = torch.empty(size // (4 * READ_BLOCK * READ_LOADS), dtype=torch.int32, device=clock.device)
    walk = clock.capture([functools.partial(read_all, source, out) for source in sources])
    if int(walk.results[0][-1]) != READ_BLOCK * READ_LOADS:
        raise RuntimeError("the read kernel returned a wrong sum")
    return Ceiling("read", "fp16", "graph", tuple(clock.replays(walk, SAMPLES)), bytes=size)


def _measure_launch(clock: CudaClock) -> Ceiling:
    """PyTorch's fill of one number: what is left of an eager call where the kernel and its checks take no time."""
    one = torch.empty(1, device=clock.device)
    return Ceiling("launch", "fp32", "eager", tuple(clock.alone([one.zero_], 10 * SAMPLES)))
