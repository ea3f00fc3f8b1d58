"""Which GPU is here, and what it can do at best. Nothing in this module touches the driver at import time."""

import contextlib
import functools
import re
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget


class NoGPU(RuntimeError):
    """There is no GPU that PyTorch can see."""


@dataclass(frozen=True)
class GPU:
    """One GPU model. Peaks are the vendor's dense ones: TFLOP/s by dtype name, GB/s of memory; empty if unknown."""

    name: str
    backend: str  # "cuda", "hip" or "interpreter"
    arch: str  # "sm_90" for NVIDIA, "gfx942" for AMD
    capability: tuple[int, int]
    sm_count: int
    shared_memory: int  # bytes that one block may use
    l2_bytes: int = 0
    tflops: dict[str, float] = field(default_factory=dict, hash=False)
    gbps: float | None = None

    @property
    def slug(self) -> str:
        """Folder name of this GPU's results: "NVIDIA H200" -> "nvidia-h200"."""
        return "-".join(self.name.lower().replace("/", " ").split())


def _peaks(half: float, fp8: float | None, fp32: float) -> dict[str, float]:
    return {"fp16": half, "bf16": half, "fp32": fp32} | ({"e4m3": fp8, "e5m2": fp8} if fp8 else {})


KB = 1024
# Data sheets' dense rates. "tensor clock is not queryable", so they cannot be read off the device.
KNOWN = {
    "sm_80": GPU("NVIDIA A100", "cuda", "sm_80", (8, 0), 108, 163 * KB, 40 << 20, _peaks(312, None, 19.5), 2039),
    "sm_86": GPU("NVIDIA A10", "cuda", "sm_86", (8, 6), 72, 99 * KB, 6 << 20, _peaks(125, None, 31.2), 600),
    "sm_89": GPU("NVIDIA L40S", "cuda", "sm_89", (8, 9), 142, 99 * KB, 96 << 20, _peaks(362, 733, 91.6), 864),
    "sm_90": GPU("NVIDIA H200", "cuda", "sm_90", (9, 0), 132, 227 * KB, 60 << 20, _peaks(989, 1979, 67), 4800),
    "sm_100": GPU("NVIDIA B200", "cuda", "sm_100", (10, 0), 148, 227 * KB, 126 << 20, _peaks(2250, 4500, 75), 8000),
    "sm_120": GPU(
        "NVIDIA RTX 5090", "cuda", "sm_120", (12, 0), 170, 99 * KB, 96 << 20, _peaks(209.5, 419, 104.8), 1792
    ),
    "gfx942": GPU("AMD MI300X", "hip", "gfx942", (9, 4), 304, 64 * KB, 256 << 20, _peaks(1307, 2615, 163), 5300),
}
# Boards that share an architecture with one above but not its rates.
_BOARDS = {
    "H100 80GB HBM3": (_peaks(989, 1979, 67), 3350),
    "H100 PCIe": (_peaks(756, 1513, 51), 2000),
    "H100 NVL": (_peaks(835, 1671, 60), 3900),
    "GH200": (_peaks(989, 1979, 67), 4000),
    "L4": (_peaks(121, 242, 30.3), 300),
    "RTX 4090": (_peaks(165.2, 330.3, 82.6), 1008),
    "RTX 3090": (_peaks(71, None, 35.6), 936),
    "A100-SXM4-40GB": (_peaks(312, None, 19.5), 1555),
}
INTERPRETER = GPU("Triton interpreter", "interpreter", "interpreter", (9, 0), 4, 227 * KB)

_pretended: GPU | None = None


def interpreting() -> bool:
    """Whether Triton runs kernels in its CPU interpreter (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret  # faster than os.environ


def pretending() -> bool:
    """Whether kernels are being compiled for a GPU that is not here."""
    return _pretended is not None


@contextlib.contextmanager
def pretend(gpu: GPU):
    """Inside, versions choose their tiles for `gpu` and take tensors on device "meta": to compile without running."""
    global _pretended
    before, _pretended = _pretended, gpu
    try:
        yield gpu
    finally:
        _pretended = before


def detect_gpu(device: torch.device | int | None = None) -> GPU:
    """The GPU that `device` (default: the current one) is; the INTERPRETER under TRITON_INTERPRET=1.

    Raises NoGPU where PyTorch sees none.
    """
    if _pretended is not None:
        return _pretended
    if interpreting():
        return INTERPRETER
    index = device.index if isinstance(device, torch.device) else device
    if index is None:
        if not torch.cuda.is_available():
            raise NoGPU("no GPU: torch.cuda.is_available() is False")
        index = torch.cuda.current_device()
    return _detect(index)


@functools.cache
def _detect(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    capability = (found.major, found.minor)
    if torch.version.hip:
        backend, arch = "hip", found.gcnArchName.split(":")[0]
    else:
        backend, arch = "cuda", "sm_{}{}".format(*capability)
    relative = KNOWN.get(arch)
    same = relative is not None and relative.name.split()[-1] in found.name
    tflops, gbps = (relative.tflops, relative.gbps) if same else ({}, None)
    for board, peaks in _BOARDS.items():
        if re.search(rf"\b{board}\b", found.name):
            tflops, gbps = peaks
    return GPU(
        name=found.name,
        backend=backend,
        arch=arch,
        capability=capability,
        sm_count=found.multi_processor_count,
        shared_memory=getattr(found, "shared_memory_per_block_optin", 0) or (relative or INTERPRETER).shared_memory,
        l2_bytes=getattr(found, "L2_cache_size", 0),
        tflops=tflops,
        gbps=gbps,
    )


def target_of(gpu: GPU) -> GPUTarget:
    """Triton's name for this GPU, for triton.compile."""
    if gpu.backend == "hip":
        return GPUTarget("hip", gpu.arch, 64)
    return GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], 32)


def describe(gpu: GPU) -> str:
    """One line for people."""
    rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in gpu.tflops.items()) or "unknown"
    bandwidth = f"{gpu.gbps:g} GB/s" if gpu.gbps else "bandwidth unknown"
    facts = f"{gpu.arch}, {gpu.sm_count} SMs, {gpu.shared_memory // KB} KB shared"
    return f"{gpu.name} ({facts}); peak TFLOP/s {rates}; {bandwidth}"


if __name__ == "__main__":
    try:
        print(describe(detect_gpu()))
    except NoGPU as reason:
        print(f"{reason}; kernels run in Triton's interpreter (TRITON_INTERPRET=1), recorded results can be replayed")
