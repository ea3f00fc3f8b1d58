"""Instruction counts of kernels small enough to count by hand."""

import pytest
import small_kernels
import torch

from bench import machine_code
from bench.disassembly import main_loops
from common.hardware import KNOWN, target_of

FLOATS = torch.empty(1 << 16, device="meta")


def compiled(kernel, arch, *args, **options):
    """The machine_code.Compiled of one launch with a single program."""
    with machine_code.recorded_launches(target_of(KNOWN[arch])) as launches:
        kernel[(1,)](*args, **options, enable_fp_fusion=True)
    case = machine_code.Case("prefill", "v0", arch, "fp16", 64, False, 1, 1, 1, 1, None)
    [(name, constants, result)] = launches
    return machine_code._examined(case, name, True, constants, result)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_elementwise(arch):
    """128 floats in one warp: a thread has four, which is one 16-byte load, four exponentials and four max.
    ptxas may unroll: so much for each load.
    """
    kernel = compiled(small_kernels.elementwise_kernel, arch, FLOATS, FLOATS, 7, BLOCK=128, num_warps=1)
    assert kernel.loops
    for loop in kernel.loops:
        loads = loop.has("LDG.E.128")
        assert loads == loop.counts["global loads"] > 0
        assert loop.counts["exponentials"] == loop.counts["max and min"] == 4 * loads
        absent = (
            "tensor core",
            "reciprocals and divisions",
            "adds",
            "multiplies",
            "shuffles",
            "shared loads",
            "spills",
        )
        assert not any(loop.counts[kind] for kind in absent)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("in_loop", [True, False])
def test_reciprocals_are_found_in_the_loop_that_has_them(arch, in_loop):
    """Four floats a thread: four reciprocals in the loop or, four again, behind it."""
    kernel = compiled(
        small_kernels.reciprocal_kernel, arch, FLOATS, FLOATS, 7, DIVIDE_IN_LOOP=in_loop, BLOCK=128, num_warps=1
    )
    for loop in kernel.loops:
        assert loop.counts["reciprocals and divisions"] == (4 * loop.counts["global loads"] if in_loop else 0)
    everywhere = sum(i.opcode.startswith("MUFU.RCP") for i in kernel.code.instructions)
    assert everywhere == (sum(loop.has("MUFU.RCP") for loop in kernel.loops) if in_loop else 4)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_row_max(arch):
    """The maximum of 128 values in a warp: 3 max in a thread, 5 shuffles with a max each, 1 with the one so far."""
    kernel = compiled(small_kernels.row_max_kernel, arch, FLOATS, FLOATS, 7, BLOCK=128, num_warps=1)
    for loop in kernel.loops:
        loads = loop.counts["global loads"]
        assert loop.counts["shuffles"] == 5 * loads
        assert loop.counts["max and min"] == 9 * loads


# 64 x 64 x 64 multiply-adds in four warps. HMMA.16816 does 2048 a warp: 262144 / 2048 / 4 = 32; QMMA.16832 twice that.
# HGMMA.64x64x16 does a fourth of them for all four warps together: 4; QGMMA.64x64x32: 2. UTCHMMA likewise, of one warp.
PRODUCTS = [
    ("sm_80", "fp16", "HMMA.16816", 32), ("sm_89", "fp16", "HMMA.16816", 32), ("sm_120", "fp16", "HMMA.16816", 32),
    ("sm_90", "fp16", "HGMMA.64x64x16", 4), ("sm_100", "fp16", "UTCHMMA", 4),
    ("sm_89", "e4m3", "QMMA.16832", 16), ("sm_120", "e4m3", "QMMA.16832", 16), ("sm_90", "e4m3", "QGMMA.64x64x32", 2),
    ("sm_100", "e4m3", "UTCQMMA", 2),
]  # fmt: skip


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("arch, dtype, opcode, count", PRODUCTS)
def test_product(arch, dtype, opcode, count, stages):
    """A tile of 64 x 64 halves is 8 KB: 128 threads bring it in 4 loads of 16 bytes each, and there are two tiles; FP8,
    half of that. Pipelined, the loads are asynchronous.
    """
    dtype = {"fp16": torch.float16, "e4m3": torch.float8_e4m3fn}[dtype]
    a, out = torch.empty(1 << 16, dtype=dtype, device="meta"), FLOATS.half()
    kernel = compiled(small_kernels.dot_kernel, arch, a, a, out, 7, BLOCK=64, STAGES=stages, num_warps=4)
    [loop] = main_loops(kernel.loops)
    assert loop.counts["tensor core"] == loop.has(opcode) == count
    if not opcode.startswith("UTC"):  # its opcode does not say the shape
        assert machine_code.multiply_adds_a_warp(loop) == 64**3 // 4
    loads = 4 * dtype.itemsize
    asynchronous = loop.counts["global loads (cp.async)"]
    assert (asynchronous, loop.counts["global loads"]) == ((loads, 0) if stages == 3 else (0, loads))
    assert loop.counts["exponentials"] == loop.counts["spills"] == 0


def test_product_on_amd():
    """v_mfma_f32_32x32x8: 8192 multiply-adds; 64 x 64 x 64 over four warps are 8, twice if a turn is two steps."""
    half = FLOATS.half()
    kernel = compiled(small_kernels.dot_kernel, "gfx942", half, half, half, 7, BLOCK=64, STAGES=1, num_warps=4)
    [loop] = main_loops(kernel.loops)
    turns = loop.counts["global loads"] / 4  # 8 KB a tile, 256 threads, 16 bytes a load, two tiles
    assert turns in (1, 2)
    assert loop.counts["tensor core"] == loop.has("v_mfma_f32_32x32x8") == 8 * turns


def test_nothing_is_run():
    """Recording ends with the block, and gives the launch back."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    with pytest.raises(ZeroDivisionError), machine_code.recorded_launches(target_of(KNOWN["sm_90"])):
        assert JITFunction.run is not run
        raise ZeroDivisionError
    assert JITFunction.run is run
