"""Repairs of Triton's CPU interpreter (3.6 to 3.9), which is silently wrong in four places (triton#11584).

As shipped, tl.dot multiplies the raw bits of bfloat16, casts to bfloat16 cut instead of rounding, casts to float8 lose
the carry (1.97 becomes 1.0), and casts from float8 lose NaN, and in e5m2 infinity and numbers below 2^-14. After
install() dots of bfloat16 go through float32 and casts round to nearest even, float8 saturating, as the GPU does.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}  # torch has few unsigned types
_TORCH_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@functools.cache
def install() -> None:
    """Repair the interpreter of this process. Once is enough; more calls change nothing."""
    shipped_convert, shipped_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values, source, target, rounding):
        narrows = target.primitive_bitwidth < source.primitive_bitwidth
        if source in _TORCH and target in _TORCH and narrows and "RTZ" not in str(rounding):
            return _round(values, source, target)
        if source in _LARGEST and target in _TORCH and target not in _LARGEST:
            return _round(values, source, target)  # exact
        return shipped_convert(values, source, target, rounding)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return shipped_dot(self, _widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _round(values: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """The bits of `values` rounded to the nearest `target`, by PyTorch."""
    wide, narrow = source.primitive_bitwidth // 8, target.primitive_bitwidth // 8
    bits = np.ascontiguousarray(values).view(_UNSIGNED[wide]).astype(_SIGNED[wide])
    numbers = torch.from_numpy(bits).view(_TORCH[source]).float()
    if target in _LARGEST:
        numbers = numbers.clamp(-_LARGEST[target], _LARGEST[target])
    rounded = numbers.to(_TORCH[target]).view(_TORCH_BITS[narrow]).numpy()
    return rounded.view(_UNSIGNED[narrow]).reshape(np.shape(values))


def _widen(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """A bfloat16 operand as float32; others as they are."""
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return handle
