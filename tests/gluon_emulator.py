"""Runs Gluon kernels for Hopper on the CPU: their own source, on emulated memory, as badly timed as the hardware may.

Triton's interpreter does not take Gluon. Here a version's file is executed with other modules in the place of gluon,
gl, tma, mbarrier and warpgroup_mma, so that its own `call` launches its own kernel on CPU tensors:

    emulator = Emulator(seed=3)
    out = emulator.load(path_of_version).VERSION.call(q, k, v)     # ProtocolError where the hardware would go wrong

Programs run one after the other, in an order that the seed picks. Inside one, every partition of gl.warp_specialize is
a thread, exactly one of them runs at a time, and a generator with the seed picks who is next at each operation on
shared state: the same seed gives the same run. TMA copies are picked in the same way, so they land late and out of
order; a product reads its operands at the wait that covers it; memory that nobody has written, or that a copy is
writing, holds NaN. A kernel launched before the one ahead of it has ended (launch_pdl) must wait for that one, in each
partition, before it touches global memory, and in each program before it ends. Emulator(older={address: tensor}) names
memory that may be read before, and what is in it until then.

What must be ordered is checked as an order, not as what happened to come first in this run. Each partition knows the
set of accesses that are finished as far as it can tell: its own, those its waits cover, and those that others knew of
when they arrived at a barrier that it waited for. Two accesses to the same shared memory, one of them a write, must not
meet unless the later partition knows of the earlier access. So a release that comes before the wait for the product
that reads the slot is found even if the product was done in time.

Not modelled: layouts and registers (the compiler checks them), clusters, the time that anything takes.
"""

import builtins
import collections
import functools
import importlib.util
import inspect
import itertools
import linecache
import math
import operator
import pathlib
import random
import re
import sys
import threading
import types

import ptx
import torch
from triton.experimental.gluon import language as real_gl

SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper
MAX_TX = 2**20 - 1  # PTX mbarrier: the largest count of bytes that can be outstanding
TORCH = {
    real_gl.float16: torch.float16, real_gl.bfloat16: torch.bfloat16, real_gl.float32: torch.float32,
    real_gl.float8e4nv: torch.float8_e4m3fn, real_gl.float8e5: torch.float8_e5m2, real_gl.int1: torch.bool,
    real_gl.int8: torch.int8, real_gl.int16: torch.int16, real_gl.int32: torch.int32, real_gl.int64: torch.int64,
    real_gl.uint8: torch.uint8,
}  # fmt: skip
GLUON = {ours: theirs for theirs, ours in TORCH.items()}
LIMIT = {bits: 2 ** (bits - 1) for bits in (8, 16, 32, 64)}  # of signed integers


class ProtocolError(AssertionError):
    """The kernel does what the hardware leaves undefined, or waits forever."""

    def __init__(self, message):
        where = _here()
        super().__init__(f"{message}\n  at {_lines(where)}" if where else message)


class _Stopped(BaseException):
    """Ends the other partitions after one has failed."""


# ---- registers


class Int(int):
    """A scalar of the kernel: division truncates as in C, and what does not fit in its bits is an error."""

    def __new__(cls, value, bits=32):
        if not -LIMIT[bits] <= value < LIMIT[bits]:
            raise ProtocolError(f"{value} does not fit in int{bits}")
        self = int.__new__(cls, value)
        self.bits = bits
        return self

    @property
    def dtype(self):
        return real_gl.int64 if self.bits == 64 else real_gl.int32

    def to(self, dtype):
        return Int(self, dtype.primitive_bitwidth) if dtype.is_int() else float(self)

    def __neg__(self):
        return Int(-int(self), self.bits)


def _quotient(a, b):
    if b == 0:
        raise ProtocolError(f"{a} divided by 0")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a, b):
    return int(a) - int(b) * _quotient(a, b)


def _int_operator(function):
    def method(self, other):
        if not isinstance(other, int):
            return NotImplemented
        return Int(function(self, other), max(self.bits, getattr(other, "bits", 32)))

    return method


def _tensor_operator(function, reflected):
    def method(self, other):
        if not isinstance(other, int | float | Value):
            return NotImplemented
        pair = (_raw(other), self.data) if reflected else (self.data, _raw(other))
        return Value(function(*pair))

    return method


class Value:
    """A tensor in registers. One that a product is still writing cannot be read.

    PTX wgmma.mma_async: accessing the registers before the wgmma.wait_group that covers it is undefined.
    """

    def __init__(self, data, product=None):
        self._data, self.product = data, product

    @property
    def data(self) -> torch.Tensor:
        if self._data is None:
            if not self.product.done:
                raise ProtocolError(f"reads the result of a product that may not be finished: {self.product}")
            self._data = self.product.result
        return self._data

    @property
    def shape(self):
        return list(self.product.shape if self._data is None else self._data.shape)

    @property
    def dtype(self):
        return real_gl.float32 if self._data is None else GLUON[self._data.dtype]

    @property
    def type(self):
        return types.SimpleNamespace(shape=self.shape, element_ty=self.dtype, layout=Layout())

    def to(self, dtype, bitcast=False):
        return Value(self.data.view(TORCH[dtype]) if bitcast else self.data.to(TORCH[dtype]))

    def reshape(self, *shape):
        return Value(self.data.reshape(*shape))

    def permute(self, *order):
        return Value(self.data.permute(*order))

    def __neg__(self):
        return Value(-self.data)

    def __invert__(self):
        return Value(~self.data)

    def __bool__(self):
        raise TypeError("a tensor has no truth value")

    __hash__ = None


def _truncated(a, b):
    return torch.div(a, b, rounding_mode="trunc")


for _name, _on_tensor in (
    ("add", operator.add), ("sub", operator.sub), ("mul", operator.mul), ("floordiv", _truncated), ("mod", torch.fmod),
    ("truediv", operator.truediv), ("and", operator.and_), ("or", operator.or_), ("xor", operator.xor),
    ("lshift", operator.lshift), ("rshift", operator.rshift),
):  # fmt: skip
    for _reflected in (False, True):
        _method = f"__{'r' * _reflected}{_name}__"
        setattr(Value, _method, _tensor_operator(_on_tensor, _reflected))
        if _name not in ("floordiv", "mod", "truediv"):
            setattr(Int, _method, _int_operator(getattr(int, _method)))
for _name, _function in (("floordiv", _quotient), ("mod", _remainder)):
    setattr(Int, f"__{_name}__", _int_operator(_function))
    setattr(Int, f"__r{_name}__", _int_operator(lambda a, b, function=_function: function(b, a)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _tensor_operator(getattr(operator, _name), False))


def _raw(x):
    """What torch computes with: the tensor, or a plain number."""
    x = x.value if isinstance(x, real_gl.constexpr) else x
    return x.data if isinstance(x, Value) else int(x) if isinstance(x, Int) else x


def _wrap(x: torch.Tensor):
    """A tensor, or the scalar that a tensor without dimensions is."""
    return Value(x) if x.ndim else _scalar(x.item(), x.dtype.itemsize * 8)


def _scalar(x, bits=32):
    return Int(x, max(bits, 32)) if isinstance(x, int) and not isinstance(x, bool) else x


class Layout:
    """Stands for any layout: they say where elements lie, not what they are."""

    def __init__(self, *args, **kwargs):
        pass

    @staticmethod
    def get_default_for(*args, **kwargs):
        return Layout()


class BarrierLayout(Layout):
    pass


# ---- global memory


class Pointer:
    """Elements of a tensor argument. Only those of the tensor may be touched, not what lies between or around them."""

    def __init__(self, base: torch.Tensor, offset=0, owned=None):
        self.base, self.offset, self.owned = base, offset, owned
        if owned is None:
            self.owned = torch.zeros(base.untyped_storage().nbytes() // base.itemsize, dtype=torch.bool)
            self.owned.as_strided(base.shape, base.stride(), base.storage_offset()).fill_(True)
            self.offset = Int(base.storage_offset(), 64)

    @property
    def flat(self):
        size = self.base.untyped_storage().nbytes() // self.base.itemsize
        return self.base.as_strided((size,), (1,), 0)

    @property
    def shape(self):
        return self.offset.shape

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=GLUON[self.base.dtype])

    def __add__(self, other):
        return Pointer(self.base, self.offset + other, self.owned)

    __radd__ = __add__

    def elements(self, mask):
        """Indices [n] into flat, and the mask of all addresses; whatever the mask lets through must be the tensor's."""
        index = torch.as_tensor(_raw(self.offset), dtype=torch.int64)
        mask = torch.as_tensor(True if mask is None else _raw(mask)).expand(index.shape)
        index = index[mask]
        if ((index < 0) | (index >= len(self.owned))).any() or not self.owned[index].all():
            raise ProtocolError(f"an address outside the tensor {list(self.base.shape)}")
        return index, mask


class Descriptor:
    """The host's TMA descriptor, with the rules of cuTensorMapEncodeTiled."""

    def __init__(self, base, shape, strides, block_shape, layout=None, padding="zero", **_):
        size = base.itemsize
        assert base.data_ptr() % 16 == 0 and strides[-1] == 1 and all(s * size % 16 == 0 for s in strides[:-1]), strides
        assert all(n > 0 for n in shape) and len(shape) == len(strides) == len(block_shape) <= 5
        assert all(n & (n - 1) == 0 for n in block_shape) and block_shape[-1] * size >= 16, block_shape
        self.base, self.shape, self.layout, self.padding = base, list(shape), layout, padding
        self.block_shape, self.strides = list(block_shape), list(strides)
        self.dtype = GLUON[base.dtype]
        self.block_type = types.SimpleNamespace(
            shape=self.block_shape, element_ty=self.dtype, nbytes=math.prod(block_shape) * size
        )

    @classmethod
    def from_tensor(cls, tensor, block_shape, layout, padding="zero", **_):
        return cls(tensor, tensor.shape, tensor.stride(), block_shape, layout, padding)

    @property
    def nbytes_per_cta(self):
        return self.block_type.nbytes

    def overlap(self, coordinates):
        """Where the block and the tensor meet: slices of the block, slices of the tensor."""
        inside, outside = [], []
        for start, length, size in zip(map(int, coordinates), self.block_shape, self.shape, strict=True):
            low, high = max(start, 0), max(start, 0, min(start + length, size))
            inside.append(slice(low - start, high - start))
            outside.append(slice(low, high))
        return tuple(inside), tuple(outside)

    def view(self):
        return self.base.as_strided(self.shape, self.strides)

    def read(self, coordinates, memory: torch.Tensor | None = None) -> torch.Tensor:
        """A block, of other memory that lies like the tensor's own; 0 (or NaN) past the ends, in every dimension."""
        inside, outside = self.overlap(coordinates)
        block = torch.zeros(self.block_shape, dtype=self.base.dtype)
        if self.padding == "nan":
            _poison(block)
        view = self.view()
        if memory is not None:
            same = torch.empty(0, dtype=self.base.dtype).set_(memory.untyped_storage())
            view = same.as_strided(self.shape, self.strides, self.base.storage_offset())
        block[inside] = view[outside]
        return block

    def write(self, coordinates, block):
        """Store a block; nothing is written past the ends of the tensor."""
        inside, outside = self.overlap(coordinates)
        self.view()[outside] = block[inside]


def _poison(x: torch.Tensor):
    """0xFF bytes: NaN in every float format."""
    x.reshape(-1).view(torch.uint8).fill_(255)


# ---- shared memory


def _is_box(data: torch.Tensor) -> bool:
    """Whether TMA can write it in one go: whole rows, or 128 bytes of each, eight rows and their like from a border."""
    if data.is_contiguous():
        return True
    rows, width = data.shape[-2:]
    step, origin = data.stride(-2), data.storage_offset()
    panels = width * data.itemsize == 128 and origin % step % width == 0 and rows % 8 == origin // step % 8 == 0
    return data.stride(-1) == 1 and all(n == 1 for n in data.shape[:-2]) and panels


class Access:
    """One read or write of `data`, a view of an allocation. `fenced`: visible to the asynchronous units."""

    def __init__(self, what, where, data, writes, fenced):
        self.what, self.where, self.data = what, where, data
        self.writes, self.fenced = writes, fenced
        self.start = data.storage_offset()
        self.end = self.start + 1 + sum((n - 1) * step for n, step in zip(data.shape, data.stride(), strict=True))
        self.solid = self.end - self.start == data.numel()

    def covers(self, other):
        return self.solid and self.start <= other.start and other.end <= self.end

    def meets(self, other):
        """Whether both touch some element; boxes of a block may lie between each other."""
        if self.end <= other.start or other.end <= self.start:
            return False
        return self.solid and other.solid or not self.elements().isdisjoint(other.elements())

    @functools.cached_property
    def _elements(self):
        index = torch.arange(self.start, self.end).as_strided(self.data.shape, self.data.stride())
        return frozenset(index.flatten().tolist())

    def elements(self):
        return self._elements

    def __str__(self):
        return f"{self.what} at {_lines(self.where)}"


class Buffer:
    """A view of shared memory. `history`: the accesses to the allocation that a later one can still conflict with."""

    def __init__(self, program, data, name, history=None):
        self.program, self.data, self.name = program, data, name
        self.history = [] if history is None else history

    def _view(self, data, name=None):
        return Buffer(self.program, data, name or self.name, self.history)

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def dtype(self):
        return GLUON[self.data.dtype]

    @property
    def type(self):
        return types.SimpleNamespace(shape=self.shape, element_ty=self.dtype, layout=Layout())

    layout = property(lambda self: Layout())

    def index(self, i):
        if not 0 <= i < self.shape[0]:
            raise ProtocolError(f"slot {i} of {self.name}, which has {self.shape[0]}")
        return self._view(self.data[int(i)], f"{self.name}[{int(i)}]")

    def slice(self, start, length, dim=0):
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise ProtocolError(f"{start}..{start + length} of {self.name}, which has {self.shape[dim]}")
        return self._view(self.data.narrow(dim, int(start), int(length)))

    def permute(self, order):
        return self._view(self.data.permute(*order))

    def reshape(self, shape):
        return self._view(self.data.view(*shape))

    def touch(self, what, writes, asynchronous) -> Access:
        """Note an access by the running partition, or by a unit that it started; every conflict must be ordered."""
        me = self.program.running
        new = Access(f"{what} {self.name}", _here(), self.data, writes, fenced=asynchronous or not writes)
        for old in self.history:
            if not (writes or old.writes) or not new.meets(old):
                continue
            if old not in me.seen:
                raise ProtocolError(f"{what} {self.name}: no wait orders it after {old}")
            if asynchronous and not old.fenced:
                raise ProtocolError(f"{what} {self.name}: fence_async_shared is missing after {old}")
        if writes:  # what this one covers, it is ordered after: whoever knows of this one knows of those
            self.history[:] = [old for old in self.history if not new.covers(old)]
        self.history.append(new)
        return new

    def load(self, layout=None):
        self.program.pause()
        self.program.running.seen.add(self.touch("reading", writes=False, asynchronous=False))
        return Value(self.data.clone())

    def store(self, value):
        """A write by the partition itself (PTX: the generic proxy), which TMA and wgmma see only after a fence."""
        if value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"{value.shape} {value.dtype} stored to {self.name}, {self.shape} {self.dtype}")
        self.program.pause()
        access = self.touch("writing", writes=True, asynchronous=False)
        self.data.copy_(value.data)
        self.program.running.seen.add(access)


class Barrier:
    """An mbarrier object of PTX: a phase ends when all arrivals and all expected bytes are in."""

    def __init__(self, program, name):
        self.program, self.name = program, name
        self.count, self.missing, self.tx, self.phase = None, 0, 0, 0
        self.arrived, self.seen = set(), set()  # known to those that arrived in this phase; in all phases that ended

    def usable(self):
        if self.count is None:
            raise ProtocolError(f"{self.name} is not initialised")

    def init(self, count):
        if not 1 <= count < 2**20:
            raise ProtocolError(f"{self.name} initialised with a count of {count}")
        self.count = self.missing = count
        self.program.barriers.append(self)

    def arrive(self, count, seen):
        self.usable()
        if count > self.missing:
            raise ProtocolError(f"{self.name}: {count} arrivals where {self.missing} of {self.count} are missing")
        self.missing -= count
        self.arrived |= seen
        self.turn()

    def bytes(self, n):
        """Expected (positive) or landed (negative)."""
        self.usable()
        self.tx += n
        if abs(self.tx) > MAX_TX:
            raise ProtocolError(f"{self.name}: {self.tx} bytes outstanding")
        self.turn()

    def turn(self):
        if self.missing == 0 and self.tx == 0:
            self.phase += 1
            self.missing = self.count
            self.seen |= self.arrived
            self.arrived = set()

    def passed(self, parity):
        """PTX try_wait.parity: the phase of that parity, the current one or the one before, is complete."""
        return self.phase & 1 != parity

    def __str__(self):
        return f"{self.name} (phase {self.phase}, {self.missing} of {self.count} arrivals and {self.tx} bytes missing)"


class Barriers(list):
    """The barriers of one allocation."""

    def index(self, i):
        if not 0 <= i < len(self):
            raise ProtocolError(f"barrier {i} of {len(self)}")
        return self[int(i)]


class Product:
    """One warpgroup_mma, computed as late as it may be: its operands in shared memory are read at the wait."""

    def __init__(self, a, b, acc, use_acc):
        self.where, self.done, self.result = _here(), False, None
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.shape = [a.shape[0], b.shape[1]]
        for name, x in (("first", a), ("second", b)):
            k_major = isinstance(x, Value) or x.data.stride()[name == "first"] == 1
            if x.dtype.primitive_bitwidth == 8 and not k_major:
                raise ProtocolError(f"the {name} operand of an 8-bit product must be contiguous along the summed axis")
        if a.shape[1] != b.shape[0] or acc.shape != self.shape or a.dtype != b.dtype:
            raise TypeError(f"product of {a.shape} {a.dtype} and {b.shape} {b.dtype} onto {acc.shape}")
        if isinstance(a, Value):
            self.a = Value(a.data)  # must be readable now
        self.reads = [
            x.touch("a product reading", writes=False, asynchronous=True) for x in (a, b) if isinstance(x, Buffer)
        ]

    def complete(self):
        result = self.a.data.float() @ self.b.data.float()
        self.result = result + self.acc.data if self.use_acc else result
        self.a = self.b = self.acc = None
        self.done = True

    def __str__(self):
        return f"warpgroup_mma at {_lines(self.where)}"


class Accumulator(Value):
    """What an asynchronous product returns: to be read as warpgroup_mma_wait gives it back, and not itself."""

    def __init__(self, product):
        super().__init__(None, product)

    @property
    def data(self):
        if not self.product.done:
            raise ProtocolError(f"reads an accumulator that was not waited for: {self.product}")
        return self.product.result


# ---- one program: its threads, and who is next


class Partition:
    """A thread of the emulation: the program itself, or one partition of gl.warp_specialize."""

    def __init__(self, program, function, args, name, warps, seen=()):
        self.program, self.function, self.args, self.name, self.warps = program, function, args, name, warps
        self.seen = set(seen)  # accesses that are finished as far as this partition can know
        self.alone = not program.early or (program.running is not None and program.running.alone)
        self.products = collections.deque()  # in flight, oldest first
        self.stores = collections.deque()
        self.ready, self.awaited, self.finished, self.result = None, None, False, None
        self.weight = program.random.choice((0.1, 1.0, 10.0))
        self.turn = threading.Lock()
        self.turn.acquire()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        self.turn.acquire()
        try:
            self.program.check()
            self.result = self.function(*self.args)
            self._end()
            self.finished = True
            self.program.hand_over()
        except _Stopped:
            pass
        except BaseException as error:
            self.program.fail(error)

    def _end(self):
        """What a partition started, it must have waited for: its registers and shared memory are gone afterwards."""
        if self.products:
            raise ProtocolError(f"{self.name} ends with a product in flight: {self.products[0]}")
        if self.stores:
            raise ProtocolError(f"{self.name} ends before tma.store_wait covers {self.stores[0].read}")

    def state(self):
        stack = _stack(sys._current_frames().get(self.thread.ident))
        return f"  {self.name}: {_lines(stack)}: waits for {self.awaited or 'its turn'}"


class Load:
    """A TMA load in flight."""

    def __init__(self, program, block, barrier, dst):
        self.block, self.barrier, self.dst = block, barrier, dst
        self.write = dst.touch("a TMA load writing", writes=True, asynchronous=True)
        self.weight = program.random.choice(program.haste)
        _poison(dst.data)

    def fire(self):
        self.dst.data.copy_(self.block)
        self.barrier.arrived.add(self.write)
        self.barrier.bytes(-self.block.numel() * self.block.element_size())


class Store:
    """A TMA store that has not yet read its shared memory."""

    def __init__(self, program, desc, coordinates, src):
        self.desc, self.coordinates, self.src = desc, coordinates, src
        self.read = src.touch("a TMA store reading", writes=False, asynchronous=True)
        self.weight = program.random.choice(program.haste)

    def fire(self):
        self.desc.write(self.coordinates, self.src.data)


class Program:
    """One program of the grid."""

    def __init__(self, index, grid, warps, seed, early, older):
        self.index, self.grid, self.warps, self.early, self.older = index, grid, warps, early, older
        self.random = random.Random(f"{seed} {index}")
        self.haste = self.random.choice(((0.02,), (0.02, 1.0), (0.1, 1.0, 10.0), (20.0,)))  # of the TMA unit
        self.partitions, self.flights, self.barriers, self.loads = [], [], [], []
        self.shared_bytes, self.running, self.failure = 0, None, None
        self.over = threading.Event()

    def run(self, function, args):
        main = Partition(self, function, args, function.__name__, self.warps)
        self.partitions.append(main)
        self.hand_over()
        self.over.wait()
        for partition in self.partitions:
            partition.thread.join()
        if self.failure:
            raise self.failure
        if not any(partition.alone for partition in self.partitions):
            raise ProtocolError("the program may end before the kernel ahead of it: nobody waits for that")
        for load in self.loads:
            if load.write not in main.seen:
                raise ProtocolError(f"the program may end before {load.write} has landed: nobody waits for it")
        for barrier in self.barriers:
            if barrier.missing != barrier.count or barrier.tx:
                raise ProtocolError(f"the program ends in the middle of a phase of {barrier}")

    # ---- the scheduler

    def pause(self, ready=None, awaited=None):
        """Let the seed say who goes on; back when `ready`, and it is this partition's turn."""
        me = self.running
        me.ready, me.awaited = ready, awaited
        if self.hand_over() is not me:
            me.turn.acquire()
            self.check()
        me.ready = me.awaited = None

    def hand_over(self):
        """Give the turn to a partition that can go on, after as many TMA copies as chance wants."""
        while True:
            runnable = [p for p in self.partitions if not p.finished and (p.ready is None or p.ready())]
            if not runnable and not self.flights:
                break
            chosen = self.pick(runnable + self.flights)
            if isinstance(chosen, Partition):
                before, self.running = self.running, chosen
                if chosen is not before:
                    chosen.turn.release()
                return chosen
            self.land(chosen)
        waiting = [p for p in self.partitions if not p.finished]
        if waiting:
            raise ProtocolError("deadlock\n" + "\n".join(p.state() for p in waiting))
        self.over.set()

    def pick(self, choices):
        return self.random.choices(choices, [choice.weight for choice in choices])[0]

    def land(self, flight):
        if flight in self.flights:
            self.flights.remove(flight)
            flight.fire()

    def check(self):
        if self.failure:
            raise _Stopped

    def fail(self, error):
        self.failure = error
        for partition in self.partitions:
            if partition is not self.running and not partition.finished and partition.turn.locked():
                partition.turn.release()
        self.over.set()

    # ---- what kernels call

    def touch_memory(self, base: torch.Tensor | None = None) -> torch.Tensor | None:
        """PTX griddepcontrol.wait: only after it is what earlier kernels write complete, and what they read free. What
        is in `base`, which is read, where that is older.
        """
        if self.running is None or self.running.alone:
            return None
        if base is None or base.data_ptr() not in self.older:
            raise ProtocolError("touches memory that the kernel ahead of this one may still be using")
        return self.older[base.data_ptr()]

    def allocate_shared_memory(self, dtype, shape, layout, value=None):
        name = _name()
        if isinstance(layout, BarrierLayout):
            if len(shape) == 1:
                return Barrier(self, name)
            return Barriers(Barrier(self, f"{name}[{i}]") for i in range(shape[0]))
        data = torch.zeros([int(n) for n in shape], dtype=TORCH[dtype])
        _poison(data)
        self.shared_bytes += data.numel() * data.itemsize
        if self.shared_bytes > SHARED_MEMORY:
            raise ProtocolError(f"{self.shared_bytes} bytes of shared memory, a block may use {SHARED_MEMORY}")
        buffer = Buffer(self, data, name)
        if value is not None:
            buffer.store(value)
        return buffer

    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs=None):
        me = self.running
        warps = [self.warps, *worker_num_warps]
        parts = [
            Partition(self, function, args, f"{function.__name__} {i}", n, me.seen)
            for i, ((function, args), n) in enumerate(zip(functions_and_args, warps, strict=True))
        ]
        self.partitions += parts
        self.pause(lambda: all(part.finished for part in parts), "its partitions")
        for part in parts:
            me.seen |= part.seen
        return parts[0].result

    def fence_async_shared(self, cluster=False):
        """PTX fence.proxy.async: earlier writes by partitions become visible to TMA and wgmma."""
        for access in self.running.seen:
            access.fenced = True

    def wait(self, barrier, phase, pred=True, deps=()):
        if pred:
            barrier.usable()
            self.pause(lambda: barrier.passed(phase), barrier)
            self.running.seen |= barrier.seen

    def arrive(self, barrier, *, count=1, pred=True, **_):
        self.pause()
        if pred:
            barrier.arrive(count, self.running.seen)

    def expect(self, barrier, bytes, pred=True, **_):
        """PTX mbarrier.arrive.expect_tx: announces bytes, and is one arrival."""
        self.pause()
        if pred:
            barrier.usable()
            barrier.tx += bytes
            barrier.arrive(1, self.running.seen)

    def tma_load(self, desc, coordinates, barrier, dst, pred=True, **_):
        self.pause()
        memory = self.touch_memory(desc.base)
        if pred:
            barrier.usable()
            if dst.shape != desc.block_shape or dst.dtype != desc.dtype or not _is_box(dst.data):
                raise ProtocolError(f"a block {desc.block_shape} {desc.dtype} loaded to {dst.shape} {dst.dtype}")
            load = Load(self, desc.read(coordinates, memory), barrier, dst)
            self.loads.append(load)
            self.flights.append(load)

    def tma_store(self, desc, coordinates, src, **_):
        self.pause()
        self.touch_memory()
        if src.shape != desc.block_shape or src.dtype != desc.dtype or not src.data.is_contiguous():
            raise TypeError(f"{src.shape} {src.dtype} stored as a block {desc.block_shape} {desc.dtype}")
        store = Store(self, desc, list(coordinates), src)
        self.running.stores.append(store)
        self.flights.append(store)

    def store_wait(self, pendings, read_only=True):
        """PTX cp.async.bulk.wait_group.read: all but the latest `pendings` stores of this partition have read."""
        self.pause()
        me = self.running
        while len(me.stores) > pendings:
            store = me.stores.popleft()
            self.land(store)
            me.seen.add(store.read)

    def warpgroup_mma(self, a, b, acc, *, use_acc=True, is_async=False, **_):
        me = self.running
        if me.warps % 4:
            raise ProtocolError(f"a product in a partition of {me.warps} warps: wgmma takes groups of four")
        self.pause()
        product = Product(a, b, acc, use_acc)
        me.products.append(product)
        if is_async:
            return Accumulator(product)
        return self.warpgroup_mma_wait(0, [Accumulator(product)])

    def warpgroup_mma_wait(self, num_outstanding=0, deps=None):
        """PTX wgmma.wait_group: all but the latest `num_outstanding` products of this partition are finished."""
        if deps is None:
            raise ValueError("warpgroup_mma_wait deps must be given")
        self.pause()
        me = self.running
        while len(me.products) > num_outstanding:
            product = me.products.popleft()
            product.complete()
            me.seen.update(product.reads)
        values = [Value(None, dep.product) if isinstance(dep, Accumulator) else dep for dep in deps]
        return values[0] if len(values) == 1 else tuple(values)


# ---- the language


def _reduction(function):
    return lambda x, axis=None, keep_dims=False: _wrap(function(x.data, () if axis is None else axis, keep_dims))


def _elementwise(on_tensor, on_float):
    return lambda x: Value(on_tensor(x.data)) if isinstance(x, Value) else on_float(x)


def _of_two(on_tensors, on_scalars):
    def function(a, b):
        if not isinstance(a, Value) and not isinstance(b, Value):
            return _scalar(on_scalars(a, b), max(getattr(a, "bits", 32), getattr(b, "bits", 32)))
        like = next(x.data for x in (a, b) if isinstance(x, Value))
        return Value(on_tensors(*(torch.as_tensor(_raw(x), dtype=None if isinstance(x, Value) else like.dtype)
                                  for x in (a, b))))  # fmt: skip

    return function


def _where(condition, a, b):
    if not isinstance(condition, Value):
        return _scalar(a, getattr(a, "bits", 32)) if condition else _scalar(b, getattr(b, "bits", 32))
    return Value(torch.where(condition.data, _raw(a), _raw(b)))


def _max(x, axes, keep_dims):
    """Like the hardware's maximum, which prefers a number to NaN."""
    x = torch.where(x.isnan(), -math.inf, x) if x.is_floating_point() else x
    return torch.amax(x, axes, keep_dims)


def _min(x, axes, keep_dims):
    x = torch.where(x.isnan(), math.inf, x) if x.is_floating_point() else x
    return torch.amin(x, axes, keep_dims)


def _sum(x, axes, keep_dims):
    return torch.sum(x, axes, keep_dims, dtype=torch.int32 if x.dtype == torch.bool else x.dtype)


def _load(pointer, mask=None, other=None, **_):
    index, mask = pointer.elements(mask)
    if other is None:
        result = torch.zeros(mask.shape, dtype=pointer.base.dtype)
        _poison(result)
    else:
        result = torch.full(mask.shape, _raw(other), dtype=pointer.base.dtype)
    result[mask] = pointer.flat[index]
    return _wrap(result)


def _store(pointer, value, mask=None, **_):
    index, mask = pointer.elements(mask)
    value = torch.as_tensor(_raw(value)).expand(mask.shape)
    pointer.flat[index] = value[mask].to(pointer.base.dtype)


def _atomic_add(pointer, value, mask=None, sem=None, scope=None):
    before = _load(pointer, mask)
    _store(pointer, before + value, mask)
    return before


def _scan(x, axis, combine):
    """An inclusive scan along an axis, in steps of 1, 2, 4, ...: `combine` is associative."""
    data, step = x.data, 1
    while step < data.shape[axis]:
        before, here = (data.narrow(axis, start, data.shape[axis] - step) for start in (0, step))
        data = torch.cat((data.narrow(axis, 0, step), combine(Value(before), Value(here)).data), axis)
        step *= 2
    return Value(data)


def _inline_asm(asm, constraints, args, dtype, is_pure, pack):
    """PTX: tests/ptx.py's, and what packs numbers of few bits into an int32 or takes it for them again."""
    tensors = [_raw(x) for x in args]
    rounding = re.search(r"cvt\.rn\.satfinite\.(e\dm\d)x2\.f32 \w+, \$2, \$1;.*\$4, \$3; mov", asm, re.DOTALL)
    if rounding and (dtype, pack, len(args)) == (real_gl.int32, 1, 4):
        to = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[rounding[1]]
        largest = torch.finfo(to).max
        return Value(torch.stack([x.clamp(-largest, largest).to(to) for x in tensors], -1).view(torch.int32)[..., 0])
    if asm == "mov.b32 $0, $1;" and (dtype, pack, tensors[0].dtype) == (real_gl.int8, 4, torch.int32):
        return Value(tensors[0][..., ::4].contiguous().view(torch.int8))
    if asm == "mov.b32 $0, $1;" and (dtype, pack, tensors[0].dtype) == (real_gl.int16, 2, torch.int32):
        return Value(tensors[0][..., ::2].contiguous().view(torch.int16))
    if pack == 2 and len(args) == 1 and tensors[0].dtype == torch.int16:
        return tuple(Value(x) for x in ptx.on_pairs(asm, tensors[0], [TORCH[each] for each in dtype]))
    if pack == 2 and tensors[0].shape[1:] == (4,):
        return tuple(Value(x) for x in ptx.elementwise(asm, torch.broadcast_tensors(*tensors), len(dtype)))
    raise AttributeError(f"tests/gluon_emulator.py does not know this yet: {asm}")


def _static_assert(condition, message=""):
    assert condition, message


def _full(shape, value, dtype, layout=None):
    return Value(torch.full([int(n) for n in shape], value, dtype=TORCH[dtype]))


class Language(types.SimpleNamespace):
    """gl, without what needs to know the running program."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("Layout"):
            return Layout
        found = getattr(real_gl, name)
        if isinstance(found, real_gl.dtype):
            return found
        raise AttributeError(f"tests/gluon_emulator.py does not know gl.{name} yet")


def _language() -> Language:
    return Language(
        constexpr=_constexpr, static_range=range, static_assert=_static_assert, device_assert=_static_assert,
        assume=_static_assert, multiple_of=lambda x, n: x, max_contiguous=lambda x, n: x, load=_load, store=_store,
        arange=lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
        full=_full, zeros=lambda shape, dtype, layout=None: _full(shape, 0, dtype),
        zeros_like=lambda x: Value(torch.zeros_like(x.data)), atomic_add=_atomic_add, associative_scan=_scan,
        where=_where, minimum=_of_two(torch.fmin, min), maximum=_of_two(torch.fmax, max),
        max=_reduction(_max), min=_reduction(_min), sum=_reduction(_sum),
        exp2=_elementwise(torch.exp2, lambda x: 2.0**x), exp=_elementwise(torch.exp, math.exp),
        log2=_elementwise(torch.log2, math.log2), log=_elementwise(torch.log, math.log),
        abs=_elementwise(torch.abs, abs), fma=lambda a, b, c: a * b + c,
        cdiv=lambda a, b: (a + (b - 1)) // b, expand_dims=lambda x, axis: Value(x.data.unsqueeze(axis)),
        convert_layout=lambda x, layout, assert_trivial=False: Value(x.data), set_auto_layout=lambda x, layout: x,
        reshape=lambda x, *shape: x.reshape(*shape), permute=lambda x, *order: x.permute(*order),
        broadcast=lambda a, b: tuple(map(Value, torch.broadcast_tensors(a.data, b.data))),
        join=lambda a, b: Value(torch.stack((a.data, b.data), -1)),
        split=lambda x: tuple(map(Value, x.data.unbind(-1))), cast=lambda x, dtype: x.to(dtype),
        to_tensor=lambda x: x, inline_asm_elementwise=_inline_asm, shared_memory_descriptor=Buffer,
    )  # fmt: skip


def _constexpr(x):
    return x


# ---- where in the kernel


_files: set[str] = set()  # as the code objects of emulated modules name them


def _stack(frame) -> tuple:
    """(file, line, function) of the kernel's frames, innermost first."""
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename in _files:
            found.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return tuple(found)


def _here() -> tuple:
    return _stack(sys._getframe(1))


def _lines(stack) -> str:
    parts = []
    for file, line, function in stack[:2]:
        text = linecache.getline(file, line).strip()
        parts.append(f"{pathlib.Path(file).name}:{line} {function} `{text}`")
    return " in ".join(parts) or "outside of the kernel"


def _name() -> str:
    """What the source calls that which is being allocated: k_ring.full."""
    names = []
    for file, line, _ in reversed(_here()):
        left, equals, _ = linecache.getline(file, line).partition("=")
        names += [left.strip()] if equals and left.strip().isidentifier() else []
    return ".".join(names) or "shared memory"


# ---- loading and launching


class Kernel:
    """What gluon.jit makes: a function for other kernels, and [grid] for the host."""

    def __init__(self, emulator, fn):
        self.emulator, self.fn = emulator, fn
        self.__name__, self.signature = fn.__name__, inspect.signature(fn)
        self.constexprs = {n for n, kind in fn.__annotations__.items() if kind is _constexpr or kind == "gl.constexpr"}

    def __call__(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, num_warps=4, launch_pdl=False, **options):
        bound = self.signature.bind(*args, **{n: x for n, x in options.items() if n in self.signature.parameters})
        bound.apply_defaults()
        grid = tuple(grid(bound.arguments) if callable(grid) else grid) + (1,) * (3 - len(grid))
        values = [x if n in self.constexprs else _argument(x) for n, x in bound.arguments.items()]
        self.emulator.launches.append((self.__name__, grid))
        programs = list(itertools.product(*map(range, reversed(grid))))
        random.Random(f"{self.emulator.seed} order").shuffle(programs)
        for index in programs:
            self.emulator.run_program(self.fn, values, index[::-1], grid, num_warps, launch_pdl)

    def is_gluon(self):
        return True


def _argument(x):
    """A launch argument as the kernel sees it."""
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if isinstance(x, tuple | list):
        return tuple(map(_argument, x))
    if isinstance(x, float):
        return torch.tensor(x, dtype=torch.float32).item()
    if isinstance(x, int) and not isinstance(x, bool):
        return Int(x, 32 if -(2**31) <= x < 2**31 else 64)
    return x


class Emulator:
    """Loads version files and runs their kernels.

    seed: of the schedule. edit(path, source) -> source: to change what is loaded, for tests of the tests.
    launches: (kernel name, grid) of everything that ran. prefetched: (program, tensor, elements), what came to the L2.
    """

    def __init__(self, seed: int = 0, edit=lambda path, source: source, older: dict[int, torch.Tensor] | None = None):
        self.seed, self.edit, self.older = seed, edit, older or {}
        self.launches, self.prefetched, self.program, self._loaded = [], [], None, {}
        gl = _language()
        gl.program_id = lambda axis: Int(self.program.index[axis])
        gl.num_programs = lambda axis: Int(self.program.grid[axis])
        gl.barrier = lambda **_: self.program.pause()  # of a partition, which is one thread here
        gl.num_warps = lambda: self.program.running.warps
        gl.inline_asm_elementwise = self._inline_asm
        for name in ("load", "store", "atomic_add"):
            setattr(gl, name, self._of_memory(getattr(gl, name), reads=name == "load"))
        gl.allocate_shared_memory = self._of_program("allocate_shared_memory")
        gl.warp_specialize = self._of_program("warp_specialize")
        names = types.SimpleNamespace
        mbarrier = names(
            MBarrierLayout=BarrierLayout, init=lambda barrier, count: barrier.init(count),
            allocate_mbarrier=lambda: self.program.allocate_shared_memory(real_gl.int64, [1], BarrierLayout()),
            invalidate=lambda barrier: None, **{n: self._of_program(n) for n in ("wait", "arrive", "expect")},
        )  # fmt: skip
        load, store = self._of_program("tma_load"), self._of_program("tma_store")
        tma = names(
            async_load=load, async_copy_global_to_shared=load, async_store=store, async_copy_shared_to_global=store,
            store_wait=self._of_program("store_wait"),
        )  # fmt: skip
        products = {n: self._of_program(n) for n in ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait")}
        hopper = names(mbarrier=mbarrier, tma=tma, warpgroup_mma_init=lambda value: value, **products)
        gluon = names(jit=self._jit, language=gl, constexpr_function=functools.cache)  # by the compiler, once
        self._modules = {
            "triton.experimental": names(gluon=gluon),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language": gl,
            "triton.experimental.gluon.language.nvidia": names(hopper=hopper),
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
            "triton.experimental.gluon.nvidia": names(hopper=names(TensorDescriptor=Descriptor)),
            "triton.experimental.gluon.nvidia.hopper": names(TensorDescriptor=Descriptor),
        }

    def _of_program(self, name):
        return lambda *args, **kwargs: getattr(self.program, name)(*args, **kwargs)

    def _of_memory(self, function, reads):
        def checked(pointer, *args, **kwargs):
            memory = self.program.touch_memory(pointer.base if reads else None)
            if memory is not None and memory.data_ptr() != pointer.base.data_ptr():
                raise ProtocolError("loads what the kernel ahead of this one may still write")
            return function(pointer, *args, **kwargs)

        return checked

    def _inline_asm(self, asm, *args, **kwargs):
        asm = asm.value if isinstance(asm, real_gl.constexpr) else asm
        if asm.startswith("griddepcontrol.wait;"):
            self.program.running.alone = True
        elif asm.startswith("prefetch.global.L2 "):
            rows, _ = args[1][0].elements(None)  # addresses of the tensor's, and nothing is read
            self.prefetched.append((self.program.index[0], args[1][0].base, rows))
        elif not asm.startswith("griddepcontrol.launch_dependents;"):
            return _inline_asm(asm, *args, **kwargs)

    def _jit(self, function=None, **_):
        return functools.partial(Kernel, self) if function is None else Kernel(self, function)

    def load(self, path: pathlib.Path | str) -> types.ModuleType:
        """The module of a file, executed with the emulated Gluon; modules of ours that use Gluon are loaded alike."""
        path = pathlib.Path(path)
        if path in self._loaded:
            return self._loaded[path]
        original = path.read_text()
        source, name = self.edit(path, original), str(path)
        if source != original:
            name += f" (changed {hash(source) & 0xFFFFFFFF:08x})"
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        _files.add(name)
        module = self._loaded[path] = types.ModuleType(path.stem)
        module.__file__ = str(path)
        module.__builtins__ = {**vars(builtins), "__import__": self._import, "range": self._range}
        exec(_compiled(source, name), vars(module))
        return module

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        if name in self._modules and fromlist:
            return self._modules[name]
        if name.startswith("triton.experimental"):
            raise ImportError(f"tests/gluon_emulator.py has no {name}")
        if name.startswith(("common.", "prefill.", "decoding.")):
            path = pathlib.Path(importlib.util.find_spec(name).origin)
            if "triton.experimental.gluon" in path.read_text():
                return self.load(path)
        return builtins.__import__(name, globals, locals, fromlist, level)

    def _range(self, *args):
        """range, which in a kernel counts with the kernel's scalars."""
        return range(*args) if self.program is None else map(Int, range(*args))

    def run_program(self, function, args, index, grid, warps, early=False):
        self.program = Program(index, grid, warps, self.seed, early, self.older)
        try:
            self.program.run(function, args)
        except ProtocolError as error:
            error.args = (f"seed {self.seed}, program {index}: {error}",)
            raise
        finally:
            self.program = None


@functools.lru_cache(64)
def _compiled(source, name):
    return compile(source, name, "exec")
