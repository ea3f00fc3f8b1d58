"""The interpreter's repairs, against rounding done the slow way: the nearest of all values of the format."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from bench.interpreter import install
from common.hardware import interpreting

FORMATS = {
    "e4m3": (tl.float8e4nv, torch.float8_e4m3fn, torch.uint8, 8),
    "e5m2": (tl.float8e5, torch.float8_e5m2, torch.uint8, 8),
    "bf16": (tl.bfloat16, torch.bfloat16, torch.int16, 16),
}


@pytest.fixture(autouse=True)
def repaired():
    install()


def all_values(torch_dtype, bits_dtype, width) -> np.ndarray:
    """Every finite number of a format, by its bits, ascending."""
    bits = torch.arange(2**width, dtype=torch.int32).to(torch.int16 if width == 16 else torch.uint8)
    values = bits.view(torch_dtype).double().numpy()
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize(
    "source, name",
    [(tl.float32, "e4m3"), (tl.float32, "e5m2"), (tl.float32, "bf16"), (tl.float16, "e4m3"), (tl.float16, "e5m2")],
)
def test_casts_give_the_nearest_value(source, name):
    target, torch_dtype, bits_dtype, width = FORMATS[name]
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(4000) * np.exp(rng.uniform(-9, 3, 4000))).astype(np.float16)
    numbers = numbers.astype({tl.float32: np.float32, tl.float16: np.float16}[source])
    got = interpreter._convert_float(numbers, source, target, None)
    got = torch.from_numpy(got.astype(np.uint8 if width == 8 else np.int16)).view(torch_dtype).double().numpy()
    values, exact = all_values(torch_dtype, bits_dtype, width), numbers.astype(np.float64)
    after = np.clip(np.searchsorted(values, exact), 1, len(values) - 1)
    nearest = np.minimum(np.abs(values[after] - exact), np.abs(values[after - 1] - exact))
    np.testing.assert_array_equal(np.abs(got - exact), nearest)


def test_the_carry_and_the_tie():
    """1.97 lies nearest to 2.0; 1.0625 halfway between 1.0 and 1.125 goes to the even one; 1000 saturates."""
    numbers = np.array([1.97, 1.0625, 1.1875, 1000.0, -1000.0], np.float32)
    got = torch.from_numpy(interpreter._convert_float(numbers, tl.float32, tl.float8e4nv, None)).view(
        torch.float8_e4m3fn
    )
    assert got.float().tolist() == [2.0, 1.0, 1.25, 448.0, -448.0]


@pytest.mark.parametrize("source, dtype", [(tl.float8e4nv, torch.float8_e4m3fn), (tl.float8e5, torch.float8_e5m2)])
def test_float8_widens_to_what_it_is(source, dtype):
    """All 256 numbers: NaN, infinity and the smallest too."""
    bits = torch.arange(256, dtype=torch.uint8)
    for target, wide in ((tl.float16, torch.float16), (tl.float32, torch.float32), (tl.bfloat16, torch.bfloat16)):
        got = interpreter._convert_float(bits.numpy(), source, target, None).view(f"int{target.primitive_bitwidth}")
        found = torch.from_numpy(got).view(wide).float()
        torch.testing.assert_close(found, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_a_product_of_bfloat16_is_a_product_of_numbers():
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    handles = [interpreter.TensorHandle(x.view(torch.int16).numpy().view(np.uint16), tl.bfloat16) for x in (a, b)]
    zero = interpreter.TensorHandle(np.zeros((16, 16), np.float32), tl.float32)
    got = interpreter.InterpreterBuilder().create_dot(*handles, zero, None, 0).data
    np.testing.assert_allclose(got, (a.double() @ b.double()).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not interpreting(), reason="needs the interpreter")
def test_declining_is_no_fault():
    """A version that does not take a dtype is named with its reason, and the script still succeeds."""
    from bench.without_gpu import check_version
    from common.lineage import find_version

    right, lines = check_version(find_version("prefill", "v5"))
    assert right and any("fp32: not checked: takes no float32" in line for line in lines)
    assert not any("WRONG" in line for line in lines)
