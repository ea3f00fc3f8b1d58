"""What is known of GPUs: detection, boards that share an architecture, and pretending to have one."""

import os
import subprocess
import sys
import types

import pytest
import torch
from attention_checks import needs_gpu

from common import hardware
from common.hardware import INTERPRETER, KNOWN, NoGPU, describe, detect_gpu, interpreting, pretend, target_of


def test_detects_what_runs_the_tests(device):
    found = detect_gpu()
    assert found is detect_gpu(), "found once, then remembered"
    if interpreting():
        assert found is INTERPRETER and device.type == "cpu"
    else:
        assert found.name == torch.cuda.get_device_name() and found == detect_gpu(device)
        assert found.sm_count > 0 and found.shared_memory >= 48 * 1024


@needs_gpu
def test_rates_of_the_gpu_here():
    """A GPU of the table shows its rates; H100, H200 and GH200 share sm_90 and not their bandwidth."""
    found = detect_gpu()
    if found.name == KNOWN["sm_90"].name:
        assert found.tflops == KNOWN["sm_90"].tflops and found.gbps == 4800
    assert describe(found).startswith(found.name)


def test_no_gpu_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGPU, match="no GPU"):
        detect_gpu()


@pytest.mark.parametrize(
    "name, capability, tflops, gbps",
    [
        ("NVIDIA H200", (9, 0), 989, 4800),
        ("NVIDIA H100 80GB HBM3", (9, 0), 989, 3350),
        ("NVIDIA H100 PCIe", (9, 0), 756, 2000),
        ("NVIDIA H100 NVL", (9, 0), 835, 3900),
        ("NVIDIA GH200 480GB", (9, 0), 989, 4000),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 312, 1555),
        ("NVIDIA L4", (8, 9), 121, 300),
        ("NVIDIA L40S", (8, 9), 362, 864),
        ("NVIDIA GeForce RTX 4090", (8, 9), 165.2, 1008),
        ("NVIDIA GeForce RTX 5090", (12, 0), 209.5, 1792),
        ("NVIDIA GeForce RTX 4070", (8, 9), None, None),
    ],
)
def test_rates_by_board(name, capability, tflops, gbps, monkeypatch):
    """Boards of one architecture have rates of their own, and a board that nobody entered has none."""
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=100, L2_cache_size=1 << 20,
        shared_memory_per_block_optin=100 * 1024,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = hardware._detect.__wrapped__(0)
    assert found.arch == "sm_{}{}".format(*capability) and found.backend == "cuda"
    assert (found.tflops.get("fp16"), found.gbps) == (tflops, gbps)


def test_pretending_ends():
    """Nested, and after an error."""
    outside = detect_gpu() if interpreting() or torch.cuda.is_available() else None
    with pretend(KNOWN["sm_90"]):
        assert detect_gpu().name == "NVIDIA H200" and hardware.pretending()
        with pytest.raises(KeyError), pretend(KNOWN["sm_80"]):
            assert detect_gpu().arch == "sm_80"
            raise KeyError
        assert detect_gpu().arch == "sm_90"
    assert not hardware.pretending() and detect_gpu() is outside


@pytest.mark.parametrize("arch", KNOWN)
def test_known_gpus(arch):
    """Each has what tiles, targets and rooflines are derived from."""
    gpu = KNOWN[arch]
    assert gpu.arch == arch and gpu.sm_count > 0 and gpu.gbps > 0 and gpu.shared_memory >= 64 * 1024
    assert gpu.tflops["fp16"] == gpu.tflops["bf16"] > gpu.tflops["fp32"] > 0
    assert ("e4m3" in gpu.tflops) == (gpu.backend == "hip" or gpu.capability >= (8, 9))
    target = target_of(gpu)
    if gpu.backend == "cuda":
        assert arch == f"sm_{target.arch}" and (target.backend, target.warp_size) == ("cuda", 32)
    else:
        assert (target.backend, target.arch, target.warp_size) == ("hip", arch, 64)
    assert gpu.name in describe(gpu) and arch in describe(gpu)


def test_slug():
    assert KNOWN["sm_90"].slug == "nvidia-h200"


def test_importing_touches_no_driver():
    """Help, diffs and charts work on a machine whose driver is broken or busy."""
    check = (
        "import common.hardware, common.launch, prefill, decoding, torch; from common.lineage import versions_of;"
        "versions_of('prefill'), versions_of('decoding'); assert not torch.cuda.is_initialized()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)
