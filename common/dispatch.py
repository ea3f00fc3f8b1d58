"""Launching a kernel again without Triton's dispatcher, which takes longer than all else that the host does in a call.

Triton finds the compiled kernel that a launch wants by what it specialises on: dtypes, which addresses and numbers 16
divides, which numbers are 1, constants. Here the first launch goes through Triton and tells which kernel that was; a
later one with the same arguments finds it in a table. The same to the last digit, but for addresses, where 16 divides
both or neither: what Triton makes of a number need not be known. TMA descriptors are encoded once for each address.

Wherever something is not as Triton 3.6 to 3.9 have it, wherever somebody watches launches, and on other GPUs than
NVIDIA's, a launch goes through Triton.
"""

import contextvars
import copy
import inspect
import marshal
import math
import operator
from types import NoneType

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

MOST = 4096  # kernels with arguments that are remembered; addresses of one kernel's descriptors

EXACT = frozenset({int, float, bool, str, tuple, NoneType})  # tuples of these
_prepared: "dict[tuple, Prepared | bool]" = {}  # False: goes through Triton


def run(kernel, grid: tuple, device: torch.device, args: tuple, options: dict):
    """kernel[grid](*args, **options) on `device`, which is the current one, and its current stream."""
    key, values = known_by(kernel, device, args, options)
    found, watched = _prepared.get(key), is_watched() or kernel.pre_run_hooks
    if found and not watched:
        found(grid, device, values)
        return
    compiled = kernel[grid](*args, **options)
    if found is None and key is not None and not watched:
        if len(_prepared) >= MOST:
            _prepared.clear()
        _prepared[key] = prepare(kernel, compiled, len(args), options) or False


def known_by(kernel, device: torch.device, args: tuple, options: dict) -> tuple[tuple | None, list]:
    """What a launch is remembered by, None if it cannot be; and all its arguments, addresses instead of tensors."""
    values = [*args, *options.values()]
    exact = [*values, *options]  # the options' names too
    key = [id(kernel), device, len(args)]
    for i, x in enumerate(values):
        kind = type(x)
        if kind in EXACT:
            continue
        exact[i] = ...
        if kind is torch.Tensor:
            values[i] = address = x.data_ptr()
            key += (x.dtype, address % 16 == 0)
        elif kind is TensorDescriptor and "like" in x.__dict__:
            key.append(x.__dict__["like"])
        else:
            return None, values
    try:
        key.append(marshal.dumps(exact, 2))  # tells 1 from True and 1.0, which a table takes for equal
    except ValueError:
        return None, values
    return tuple(key), values


def is_watched() -> bool:
    """Whether launches must go through Triton, since a profiler or the like wants to see them."""
    try:
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        return bool(enter.calls or leave.calls or knobs.compilation.instrumentation_mode)
    except AttributeError:  # Triton has changed, or a hook is no chain of them
        return True


def prepare(kernel, compiled, positional: int, options: dict) -> "Prepared | None":
    """How to launch `compiled` again, which `kernel` became for that many positional arguments and these options."""
    try:
        return Prepared(kernel, compiled, positional, options)
    except Exception:  # of whatever kind: Triton has changed, and its own way works
        return None


class Prepared:
    """A compiled kernel that is launched with the values of known_by."""

    __slots__ = (
        "call", "compiled", "constant", "descriptors", "encoded", "in_c", "kernel", "order", "scratch", "stream_of"
    )  # fmt: skip

    def __init__(self, kernel, compiled, positional: int, options: dict):
        from triton.backends.nvidia.driver import CudaLauncher

        names = [*kernel.arg_names[:positional], *options]
        usual = isinstance(kernel, JITFunction) and type(compiled) is CompiledKernel and len(kernel.arg_names) > 1
        if not usual or type(compiled.run) is not CudaLauncher or is_watched() or kernel.pre_run_hooks:
            raise NotImplementedError("not a launch that is known here")
        self.kernel, self.compiled = kernel, compiled  # kept: another kernel would get the id
        self.order = operator.itemgetter(*(names.index(name) for name in kernel.arg_names))
        self.stream_of = triton.runtime.driver.active.get_current_stream
        self.encoded = {}
        try:
            self.descriptors = _descriptors(compiled)
            (self.call, self.constant, self.scratch), self.in_c = _call_in_c(compiled, bool(self.descriptors)), True
        except Exception:  # of whatever kind: Triton has changed
            self.descriptors, self.in_c, self.scratch = (), False, None
            self.call, self.constant = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)

    def __call__(self, grid: tuple, device: torch.device, values: list):
        x, y, z = (*grid, 1, 1)[:3]
        constant = self.constant
        if self.scratch is not None:
            constant = [*constant]
            constant[self.scratch] = self.memory(grid, device)
        self.call(x, y, z, self.stream_of(device.index), *constant, *self.arguments(values))

    def memory(self, grid: tuple, device: torch.device) -> torch.Tensor:
        """Scratch memory for one launch, in which a kernel makes descriptors, say."""
        launcher = self.compiled.run
        size = math.prod(grid) * launcher.num_ctas * launcher.global_scratch_size
        return torch.empty(size, dtype=torch.int8, device=device)

    def arguments(self, values: list) -> tuple | list:
        """`values` in the kernel's order; descriptors as what they are encoded as."""
        arguments = self.order(values)
        if not self.descriptors:
            return arguments
        arguments = list(arguments)
        for i, encode in self.descriptors:
            x = arguments[i]
            key = (i, x.base.data_ptr(), x.__dict__["like"])
            found = self.encoded.get(key)
            if found is None:
                if len(self.encoded) >= MOST:
                    self.encoded.clear()
                found = self.encoded[key] = encode(x)
            arguments[i : i + 1] = found
        return arguments


def _descriptors(compiled) -> list:
    """(position, function that encodes one) of the kernel's TMA descriptors, last first."""
    from triton.backends.nvidia import driver

    kinds = enumerate(compiled.src.signature.values())
    found = [i for i, kind in kinds if isinstance(kind, str) and kind.startswith("tensordesc")]
    if not found:
        return []
    more = (None,) * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)  # Triton 3.9 has a third

    def encoder(meta):
        return lambda x: driver.make_tensordesc_arg(x, meta, *more)

    metas = compiled.metadata.tensordesc_meta
    if None in metas:
        raise NotImplementedError("a descriptor that is no TMA descriptor")
    return [(i, encoder(meta)) for i, meta in zip(found, metas, strict=True)][::-1]


def _call_in_c(compiled, has_descriptors: bool):
    """call, constant, scratch: call(x, y, z, stream, *constant, *arguments) is what Triton's launcher does, descriptors
    encoded; constant[scratch] is each launch's own scratch memory. None: it wants none.

    What the C function is given besides is what the launcher itself gives it, when it is called with marks.
    """
    launcher, given, memory, arguments = copy.copy(compiled.run), [], object(), (object(), object())
    marks = [1, 1, 1, object()]  # the launcher computes with the grid

    def launch():
        triton.set_allocator(lambda *_: memory)
        launcher(*marks, compiled.function, compiled.packed_metadata, None, None, None, *arguments)

    in_c, launcher.launch = launcher.launch, lambda *args: given.extend(args)
    contextvars.copy_context().run(launch)  # the allocator outside of it stays
    if has_descriptors:
        in_c = inspect.getclosurevars(in_c).nonlocals["launcher"]
    packed = given[-1] == arguments  # from Triton 3.7 on
    if given[:4] != marks or not (packed or tuple(given[-2:]) == arguments):
        raise NotImplementedError("a launcher that is not known here")
    constant = given[4 : -1 if packed else -2]
    scratch = next((i for i, x in enumerate(constant) if x is memory), None)
    if bool(launcher.global_scratch_size) != (scratch is not None):
        raise NotImplementedError("scratch memory goes another way")
    if scratch is not None:
        constant[scratch] = None
    if not packed:
        return in_c, tuple(constant), scratch
    many = len(constant)
    return lambda x, y, z, stream, *rest: in_c(x, y, z, stream, *rest[:many], rest[many:]), tuple(constant), scratch
