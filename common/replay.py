"""Calls that repeat: what a call launches depends on its tensors' kinds, not on contents, and so is found out once.

Kind: shape, strides, dtype, device, and the address as far as 16 divides it. A recipe is what one call launched, with
its tensors left open: those that it was given, and those that it made without looking at any (output, scratch memory,
tickets). Repeating it takes new tensors for all of them, so that streams and graphs see what they would see of a call.
A call that computes with torch what it launches with (copies of tensors that kernels cannot address, quantisation) has
no recipe and is made as it is, each time; and so is every call where launches do not go by common/dispatch.py.
"""

import contextlib
import functools
import marshal
import threading
import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from common import dispatch

MOST = 4096  # kinds of calls that are remembered
EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")

STREAM = 3  # its position among a launch's arguments, after the grid

_recipes: dict[tuple, "Recipe | bool"] = {}  # True: seen once; False: has no recipe
_least_device = 0 if torch.version.hip is None else 2**30  # of the devices whose calls are remembered


class NoRecipe(ValueError):
    """A call that cannot be repeated without making it; says why."""


class _Thread(threading.local):
    recording: "Recording | None" = None


_thread = _Thread()


def recording() -> "Recording | None":
    """The recording that this thread's launches go to instead of the GPU, if there is one."""
    return _thread.recording


def forget():
    """No call is remembered any longer: something else decides now what is launched."""
    _recipes.clear()


def remembered(function: Callable) -> Callable:
    """`function` of tensors and options, whose calls on an NVIDIA GPU repeat what an earlier call of the kind launched.

    The first call of a kind is made as it is, the second writes the recipe, from the third on it is used.
    """

    @functools.wraps(function)
    def call(*args, **options):
        key, tensors = (None, ()) if _thread.recording is not None else known_by(function, args, options)
        found = None if key is None else _recipes.get(key)
        if found is True:
            try:
                found = Recipe(function, args, options, dispatched=_least_device >= 0)
            except Exception:  # NoRecipe, or Triton or PyTorch have changed: the call itself says what is wrong
                found = False
            _recipes[key] = found
        if found:
            return found(tensors)
        result = function(*args, **options)
        if key is not None and found is None:
            if len(_recipes) >= MOST:
                _recipes.clear()
            _recipes[key] = True
        return result

    return call


def known_by(function, args: tuple, options: dict) -> tuple[tuple | None, list]:
    """What a call is remembered by, None if it is not; and its tensors."""
    values, tensors, key = [*args, *options.values()], [], [function]
    for i, x in enumerate(values):
        if type(x) is torch.Tensor:
            device = x.get_device()  # -1: CPU
            if device < _least_device or x.requires_grad:
                return None, ()
            key += (x.shape, x.stride(), x.dtype, device, x.data_ptr() % 16)
            tensors.append(x)
            values[i] = ...
        elif type(x) not in dispatch.EXACT:
            return None, ()
    if not tensors or dispatch.is_watched():
        return None, ()
    try:
        key.append(marshal.dumps((len(args), *options, *values), 2))
    except ValueError:
        return None, ()
    return tuple(key), tensors


class Recording(TorchDispatchMode):
    """Takes the launches of a call instead of the GPU, and notes which tensors the call makes."""

    def __init__(self):
        super().__init__()
        self.launches = []  # (kernel, grid, args, options)
        self.checks = []  # (function, name, tensor, most): of contents, made at each call
        self.once = []  # functions that check contents, but not at each call
        self.made = []  # (tensor, function that makes one like it)
        self.counts = {}  # of tickets, by their number in made

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first use imports torch._dynamo, 2 s

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in EMPTY and isinstance(result, torch.Tensor):
            self.made.append((result, _maker(result)))
        elif func._schema.is_mutable or not _is_view(result, args):
            raise NoRecipe(f"computes with {name}")
        return result

    def tickets(self, count: int, device: torch.device, make: Callable) -> torch.Tensor:
        """A stand-in for tickets; make(count, device) gives those of a call."""
        found = torch.empty(count, dtype=torch.int32, device=device)
        self.counts[len(self.made) - 1] = count
        self.made[-1] = (found, functools.partial(make, count, device))
        return found


def on(device: torch.device):
    """Inside, `device` is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _maker(like: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that makes tensors like one, whose device is then the current one.

    Without PyTorch's dispatcher, as code that it compiled allocates: in half the time.
    """
    shape, strides = tuple(like.shape), like.stride()
    try:
        quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{like.device.type}")
        make = functools.partial(quick, shape, strides, like.dtype)
        with on(like.device):
            found = make()
        if (found.shape, found.stride(), found.dtype, found.device) == (shape, strides, like.dtype, like.device):
            return make
    except Exception:  # of whatever kind: PyTorch has changed, and its public function works
        pass
    return functools.partial(torch.empty_strided, shape, strides, dtype=like.dtype, device=like.device)


def _is_view(result, args) -> bool:
    if not isinstance(result, torch.Tensor):
        return False
    memory = result.untyped_storage().data_ptr()
    return any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == memory for x in args)


@contextlib.contextmanager
def _recorded():
    taken = Recording()
    _thread.recording = taken
    try:
        with taken:
            yield taken
    finally:
        _thread.recording = None


class Recipe:
    """What a call launches, called with tensors like its own, in their order; gives what the call would give.

    dispatched: launches go by common/dispatch.py, or NoRecipe is raised. Otherwise those that cannot go through Triton.
    """

    def __init__(self, function: Callable, args: tuple, options: dict, dispatched: bool = False):
        self.given = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        with _recorded() as taken:
            result = function(*args, **options)
        if dispatched and taken.once:
            raise NoRecipe("looks at contents")
        for check in taken.once:
            check()
        for check, name, x, most in taken.checks:
            check(name, x, most)
        self.sources = [*self.given, *(x for x, _ in taken.made)]
        self.device = self.given[0].device
        self.index, self.current_device, self.stream_of = None, lambda: None, lambda index: None
        if self.device.type == "cuda":
            self.index = self.device.index
            self.current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # the quicker one
        self.kept = []  # tensors of the program's own, and compiled kernels
        self.make, self.counts = [make for _, make in taken.made], taken.counts
        self.launches = [self._launch(*launch, dispatched) for launch in taken.launches]
        self.checks = [(check, name, self._source(x), most) for check, name, x, most in taken.checks]
        results = result if isinstance(result, tuple) else (result,)
        self.results = [self._result(x) for x in results]
        self.single = not isinstance(result, tuple)
        del self.given, self.sources  # the caller's

    def _source(self, x: torch.Tensor) -> int | None:
        """Which tensor x is, or has the address of; None for one that the call neither was given nor made."""
        found = [i for i, source in enumerate(self.sources) if source is x]
        found = found or [i for i, source in enumerate(self.sources) if 0 != source.data_ptr() == x.data_ptr()]
        if len(found) > 1:
            raise NoRecipe("was given one address twice")
        if found:
            return found[0]
        memory = x.untyped_storage().data_ptr()
        if any(source.untyped_storage().data_ptr() == memory for source in self.sources):
            raise NoRecipe("launches with a part of a tensor")
        return None

    def _result(self, x: torch.Tensor) -> tuple[int, tuple | None]:
        source = self._source(x)
        if source is None:
            raise NoRecipe("returns a tensor that it did not make")
        like = self.sources[source]
        same = x.shape == like.shape and x.stride() == like.stride()
        return source, None if same else (x.shape, x.stride())

    def _launch(self, kernel, grid: tuple, args: tuple, options: dict, dispatched: bool) -> "Launch":
        prepared = None
        if isinstance(kernel, JITFunction):
            with on(self.device):
                compiled = kernel.run(*args, grid=grid, warmup=True, **options)
                prepared = dispatch.prepare(kernel, compiled, len(args), options)
        if prepared is not None and prepared.in_c:
            return self._dispatched(prepared, grid, prepared.order([*args, *options.values()]))
        if dispatched:
            raise NoRecipe("launches what common/dispatch.py does not")
        return self._through_triton(kernel, grid, args, options)

    def _dispatched(self, prepared: dispatch.Prepared, grid, values) -> "Launch":
        arguments, places, encoders = [*(*grid, 1, 1)[:3], None, *prepared.constant], [], dict(prepared.descriptors)
        if prepared.scratch is not None:
            memory = prepared.memory(grid, self.device)
            places.append((STREAM + 1 + prepared.scratch, len(self.sources), lambda x: x))
            self.sources.append(memory)
            self.make.append(_maker(memory))
        for i, x in enumerate(values):
            if isinstance(x, torch.Tensor):
                source = self._source(x)
                if source is not None:
                    places.append((len(arguments), source, torch.Tensor.data_ptr))
                else:
                    self.kept.append(x)
                arguments.append(x.data_ptr())
            elif i in encoders:
                if (source := self._source(x.base)) is None:
                    raise NoRecipe("describes a tensor that it did not make")
                places.append((len(arguments), source, _Maps(x, encoders[i])))
                arguments += encoders[i](x)
            else:
                arguments.append(x)
        self.stream_of = prepared.stream_of
        self.kept.append(prepared)
        return Launch(prepared.call, arguments, places)

    def _through_triton(self, kernel, grid, args, options) -> "Launch":
        values = [*args, *options.values()]
        if any(isinstance(x, TensorDescriptor) for x in values):
            raise NoRecipe("describes tensors for TMA")
        # references, since plans keep arguments and no tensor
        arguments, places, dtypes = [*(*grid, 1, 1)[:3], None, *values], [], {}
        for i, x in enumerate(arguments):
            if isinstance(x, torch.Tensor) and (source := self._source(x)) is not None:
                places.append((i, source, weakref.ref))
                dtypes[i], arguments[i] = x.dtype, None
        axes, first, names = len(grid), STREAM + 1 + len(args), tuple(options)

        def call(*arguments):
            given = list(arguments)
            for i, dtype in dtypes.items():
                given[i] = given[i]().view(dtype)
            kernel[arguments[:axes]](*given[STREAM + 1 : first], **dict(zip(names, given[first:], strict=True)))

        return Launch(call, arguments, places)

    def __call__(self, tensors: list):
        if self.current_device() != self.index:
            with on(self.device):
                return self(tensors)
        for check, name, source, most in self.checks:
            check(name, tensors[source], most)
        tensors = [*tensors, *(make() for make in self.make)]
        stream = self.stream_of(self.index)
        for launch in self.launches:
            launch.run(tensors, stream)
        return self.result(tensors)

    def result(self, tensors: list | dict):
        """What the call returns, of its tensors by number: those that it was given, those that it made."""
        results = ((tensors[source], view) for source, view in self.results)
        found = tuple(x if view is None else x.as_strided(*view) for x, view in results)
        return found[0] if self.single else found


class Launch:
    """call(x, y, z, stream, ...), but for the tensors: places are (position, number of the tensor, function that makes
    the argument of it).
    """

    __slots__ = ("arguments", "call", "places")

    def __init__(self, call: Callable, arguments: list, places: list):
        self.call, self.arguments, self.places = call, arguments, places

    def run(self, tensors: list, stream: int | None):
        arguments = self.arguments.copy()  # another thread may be here too
        arguments[STREAM] = stream
        for i, source, argument in self.places:
            arguments[i] = argument(tensors[source])
        self.call(*arguments)


class _Maps:
    """The encoded descriptors of tensors like one, by their addresses."""

    def __init__(self, descriptor: TensorDescriptor, encode: Callable):
        self.fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
        self.encode, self.encoded = encode, {}

    def __call__(self, x: torch.Tensor):
        address = x.data_ptr()
        found = self.encoded.get(address)
        if found is None:
            if len(self.encoded) >= dispatch.MOST:
                self.encoded.clear()
            descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__ = self.fields | {"base": x}
            found = self.encoded[address] = self.encode(descriptor)[0]
        return found
