"""Launching again without Triton's dispatcher: the kernel that Triton would take, with what Triton would give it."""

import itertools
import types
import weakref

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from common import dispatch
from common.hopper import descriptor
from common.launch import launch
from common.plan import Plan
from common.replay import Recipe

GPU = torch.device("cuda", 0)


def three_arguments(X, n, stride, BLOCK: "tl.constexpr", EVEN: "tl.constexpr" = False):  # noqa: F821
    pass


def at(address: int, dtype=torch.float16) -> torch.Tensor:
    """A tensor whose address is so many bytes past a multiple of 16."""
    whole = torch.zeros(64, dtype=torch.uint8)
    first = -whole.data_ptr() % 16 + address
    return whole[first : first + 32].view(dtype)


def triton_key(kernel: JITFunction, args, options) -> str:
    """What Triton 3.6 to 3.9 look a compiled kernel up by."""
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _bound, specialization, rest = binder(*args, **options)
    return compute_cache_key({}, specialization, rest)


def rows(heads, width, block=16, dtype=torch.float16):
    return descriptor(torch.zeros(1, heads, 32, width, dtype=dtype), block, 64)


TENSORS = [at(0), at(0), at(2), at(8), at(0, torch.bfloat16), at(0, torch.int32), at(8, torch.int64), at(0)[:0]]
DESCRIPTORS = [rows(1, 64), rows(2, 64), rows(1, 64, 32), rows(1, 64, dtype=torch.bfloat16), rows(1, 128)]
NUMBERS = [0, 1, 2, 3, 16, 17, 32, -16, 2**31 - 1, 2**31, 2**40, 2**63, True, False, 0.0, 1.0, 16.0, None]
TUPLES = [(1, 16), (1, 17), (16, 1), (1, 16, 1), (2**32, 1), (None, 1), (1.0, 16), (True, 16), ((1, 16), 1)]
OPTIONS = [
    {"BLOCK": 16}, {"BLOCK": 16, "num_warps": 8}, {"BLOCK": 16, "num_warps": 4}, {"BLOCK": 16, "num_stages": 8},
    {"BLOCK": 16, "EVEN": True}, {"BLOCK": 16, "EVEN": 1}, {"BLOCK": 1}, {"BLOCK": True}, {"BLOCK": 1.0},
    {"BLOCK": "16"}, {"BLOCK": None}, {"BLOCK": (1, 2)}, {"BLOCK": 16, "maxnreg": 8},
]  # fmt: skip


@pytest.mark.parametrize("unspecialised", [[], ["n"]])
def test_one_key_only_where_triton_has_one(unspecialised):
    """A launch that Triton compiles another kernel for is never mistaken for one that was prepared."""
    kernel = JITFunction(three_arguments, do_not_specialize=unspecialised)
    calls = [((x, 5, (1, 2)), {"BLOCK": 16}) for x in [*TENSORS, *DESCRIPTORS, *NUMBERS]]
    calls += [((at(0), n, (1, 2)), {"BLOCK": 16}) for n in [*NUMBERS, *TENSORS]]
    calls += [((at(0), 5, stride), {"BLOCK": 16}) for stride in [*TUPLES, *NUMBERS]]
    calls += [((at(0), 5, (1, 2)), options) for options in OPTIONS]
    calls += [((at(0), 5), {"stride": (1, 2), "BLOCK": 16}), ((None, at(0), at(0)), {"BLOCK": 16})]
    calls += [((at(0), None, at(0)), {"BLOCK": 16})]
    keys = []
    for args, options in calls:
        ours, _ = dispatch.known_by(kernel, GPU, args, options)
        assert ours is not None and hash(ours) is not None
        keys.append((ours, triton_key(kernel, args, options)))
    for (a, triton_a), (b, triton_b) in itertools.combinations(keys, 2):
        assert a != b or triton_a == triton_b
    assert keys[0][0] == keys[1][0], "equal but for an address: nothing would ever be found"
    assert len({triton for _, triton in keys}) > 40


def test_kernels_and_devices_have_their_own():
    one, other = JITFunction(three_arguments), JITFunction(three_arguments)
    call = ((at(0), 5, (1, 2)), {"BLOCK": 16})
    devices = (GPU, torch.device("cuda", 1))
    keys = {dispatch.known_by(kernel, device, *call)[0] for kernel in (one, other) for device in devices}
    assert len(keys) == 4


@pytest.mark.parametrize("x", [torch.nn.Parameter(at(0)), object(), [1, 2], torch.float16, (1, torch.float16), 1j])
def test_no_key_for_what_is_not_known(x):
    """Then the launch goes through Triton, which knows or refuses it."""
    assert dispatch.known_by(JITFunction(three_arguments), GPU, (x, 5, (1, 2)), {"BLOCK": 16})[0] is None


class Fake:
    """A kernel that Triton has compiled, for a GPU that is not here: what reaches the C function is kept in `seen`."""

    def __init__(self, monkeypatch, tma: bool = False, scratch: int = 0):
        self.seen, self.compilations, self.encoded = [], 0, 0
        self.kernel = JITFunction(three_arguments)
        self.kernel.run = self.run
        signature = {"X": "tensordesc<fp16[1,1,16,64],L>" if tma else "*fp16", "n": "i32", "stride": ("i32", "i32")}
        signature |= {"BLOCK": "constexpr", "EVEN": "constexpr"}
        block = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [1, 1, 16, 64], "fp4_padded": False}
        metas = [block] if tma else []
        launcher = object.__new__(nvidia.CudaLauncher)
        launcher.__dict__ |= dict(
            num_ctas=1, launch=nvidia.wrap_handle_tensordesc(self.in_c, signature, metas), gsan_enabled=False,
            global_scratch_size=scratch, global_scratch_align=16, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False, arg_annotations="annotations", kernel_signature=b"",
        )  # fmt: skip
        self.compiled = object.__new__(CompiledKernel)
        self.compiled.__dict__ |= dict(
            _run=launcher, module=None, function=0xF, packed_metadata=(4, 1, 512),
            src=types.SimpleNamespace(signature=signature), metadata=types.SimpleNamespace(tensordesc_meta=metas),
        )  # fmt: skip
        utils = types.SimpleNamespace(fill_tma_descriptor=self.encode, fill_tma_descriptor_tiled=self.encode)
        active = types.SimpleNamespace(get_current_stream=lambda device: 70 + (device or 0), utils=utils)
        monkeypatch.setattr(triton.runtime.driver, "_active", active)
        monkeypatch.setattr(dispatch, "_prepared", {})

    def in_c(self, *args):
        self.seen.append(args)

    def encode(self, address, *what):
        self.encoded += 1
        return ("map", address, repr(what))

    def run(self, *args, grid, warmup, **options):
        """As JITFunction.run ends."""
        self.compilations += 1
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | options
        bound = [given.get(name, False) for name in self.kernel.arg_names]
        x, y, z = (*grid, 1, 1)[:3]
        if not warmup:
            metadata = self.compiled.packed_metadata
            self.compiled.run(x, y, z, 70, self.compiled.function, metadata, None, None, None, *bound)
        return self.compiled

    def launch(self, X, n=5, grid=(3, 2), **options):
        options = {"BLOCK": 16, "EVEN": True, "num_warps": 4} | options
        dispatch.run(self.kernel, grid, GPU, (X, n, (1, 2)), options)


def addresses(x):
    """x with addresses for tensors, as the C function takes either."""
    if isinstance(x, tuple | list):
        return tuple(map(addresses, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("tma, scratch", [(False, 0), (True, 0), (False, 8)], ids=["pointers", "TMA", "scratch"])
def test_the_same_reaches_the_launcher(monkeypatch, tma, scratch):
    """By Triton first, by the table then: the same arguments in the same order."""
    fake = Fake(monkeypatch, tma, scratch)
    triton.set_allocator(lambda size, alignment, stream: size)
    X = rows(1, 64) if tma else at(0)
    monkeypatch.setattr(torch, "empty", lambda size, **_: size)
    for _ in range(3):
        fake.launch(X)
    assert fake.compilations == 1 and len(fake.seen) == 3 and (48 in fake.seen[2]) == bool(scratch)
    assert addresses(fake.seen[0]) == addresses(fake.seen[1]) == addresses(fake.seen[2])
    assert 0xF in fake.seen[0] and 70 in fake.seen[0]


def test_addresses_are_those_of_the_call(monkeypatch):
    fake = Fake(monkeypatch)
    tensors = [at(0), at(0), at(16)]
    for x in tensors:
        fake.launch(x)
    assert fake.compilations == 1
    for x, seen in zip(tensors, fake.seen, strict=True):
        assert str(x.data_ptr()) in str(addresses(seen))


def test_other_arguments_go_through_triton(monkeypatch):
    fake = Fake(monkeypatch)
    fake.launch(at(0))
    for count, change in enumerate([dict(X=at(2)), dict(n=6), dict(n=True), dict(BLOCK=32), dict(num_warps=8)], 2):
        for _ in range(2):
            fake.launch(**({"X": at(0)} | change))
        assert fake.compilations == count
    fake.launch(at(0), grid=(9,))
    assert fake.compilations == count and 9 in fake.seen[-1]


def test_descriptors_are_encoded_once_for_an_address(monkeypatch):
    fake = Fake(monkeypatch, tma=True)
    x, y = torch.zeros(2, 1, 1, 32, 64, dtype=torch.float16)
    for _ in range(3):
        fake.launch(descriptor(x, 16, 64))
    assert fake.encoded == 2  # by Triton, by the table
    fake.launch(descriptor(y, 16, 64))
    assert fake.encoded == 3 and str(y.data_ptr()) in str(fake.seen[-1])
    fake.launch(descriptor(x, 16, 64))
    assert fake.encoded == 3 and fake.compilations == 1 and str(x.data_ptr()) in str(fake.seen[-1])


def test_hooks_see_every_launch(monkeypatch):
    """A profiler that begins later too."""
    fake = Fake(monkeypatch)
    fake.launch(at(0))
    fake.launch(at(0))
    assert fake.compilations == 1
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
        fake.launch(at(0))
        assert fake.compilations == 2
    with monkeypatch.context() as patch:
        patch.setattr(knobs.compilation, "instrumentation_mode", "consan")
        fake.launch(at(0))
        assert fake.compilations == 3
    fake.kernel.pre_run_hooks.append(print)
    fake.launch(at(0))
    assert fake.compilations == 4
    fake.kernel.pre_run_hooks.clear()
    fake.launch(at(0))
    assert fake.compilations == 4


@pytest.mark.parametrize("broken", ["another launcher", "another kernel", "another call", "no stream"])
def test_what_is_not_known_goes_through_triton(monkeypatch, broken):
    """Nothing but time is lost where Triton has changed."""
    fake = Fake(monkeypatch)
    if broken == "another launcher":
        launcher = fake.compiled._run
        fake.compiled._run = lambda *args: launcher(*args)
    elif broken == "another kernel":
        fake.compiled = types.SimpleNamespace(run=fake.compiled._run, function=0xF, packed_metadata=(4, 1, 512))
    elif broken == "another call":
        monkeypatch.setattr(nvidia.CudaLauncher, "__call__", lambda self, x, *rest: self.launch(*rest, x))
    else:
        del triton.runtime.driver._active.get_current_stream
    x = at(0)
    for _ in range(3):
        fake.launch(x)
    assert len(fake.seen) == 3 and addresses(fake.seen[0]) == addresses(fake.seen[1]) == addresses(fake.seen[2])
    assert fake.compilations == (1 if broken == "another call" else 3)


def test_the_tables_are_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST", 4)
    fake = Fake(monkeypatch, tma=True)
    for n in range(100, 110):
        fake.launch(rows(1, 64), n)
        assert len(dispatch._prepared) <= 4
    x = torch.zeros(10, 1, 1, 32, 64, dtype=torch.float16)
    for part in x:
        fake.launch(descriptor(part, 16, 64), 7)
    [prepared] = [found for found in dispatch._prepared.values() if found.encoded]
    assert fake.compilations == 11 and len(prepared.encoded) <= 4


def test_nothing_of_the_callers_is_kept(monkeypatch):
    for tma in (False, True):
        fake = Fake(monkeypatch, tma)
        x = torch.zeros(1, 1, 32, 64, dtype=torch.float16)
        gone = weakref.ref(x)
        for _ in range(3):
            fake.launch(descriptor(x, 16, 64) if tma else x)
        fake.seen.clear()
        del x
        assert gone() is None


# ---- calls that repeat, and plans


def three_launches(fake, tma):
    """A call of the kernel's, with a result and with scratch memory."""

    def call(q, k, v, *, lengths, out=None):
        out = torch.empty_like(q) if out is None else out
        scratch = torch.empty(8, dtype=torch.float32)
        for grid, *args in ((3, 2), k, v, scratch), ((5,), q, lengths, (1, 2)), ((2, 3, 4), q, out, scratch):
            args[0] = descriptor(args[0], 16, 64) if tma else args[0]
            launch(fake.kernel, grid, q.device, *args, BLOCK=16, EVEN=True, num_warps=4)
        return out

    return call


def some_tensors() -> dict:
    q, k, v = torch.zeros(3, 1, 1, 32, 64, dtype=torch.float16).unbind()
    return {"q": q, "k": k, "v": v, "lengths": torch.zeros(2, dtype=torch.int32)}


def launched(fake, tensors: dict) -> list:
    """Which of the tensors each launch since the last time had, by name."""

    def flat(x):
        return [z for y in x for z in flat(y)] if isinstance(x, tuple | list) else [x]

    by_address = {torch.Tensor.data_ptr(x): name for name, x in tensors.items()}
    found = [[by_address[x] for x in flat(args) if isinstance(x, int) and x in by_address] for args in fake.seen]
    assert all(args[3] == 70 for args in fake.seen)
    assert [args[:3] for args in fake.seen] == [(3, 2, 1), (5, 1, 1), (2, 3, 4)] * (len(found) // 3)
    fake.seen.clear()
    return found


EACH = [["k", "v"], ["q", "lengths"], ["q", "out"]]  # scratch memory aside
with_and_without_tma = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])


@with_and_without_tma
def test_a_recipe_launches_on_the_tensors_of_the_call(monkeypatch, tma):
    """A descriptor is encoded once for an address."""
    fake, first, second = Fake(monkeypatch, tma), some_tensors(), some_tensors()
    *positional, lengths = first.values()
    recipe = Recipe(three_launches(fake, tma), tuple(positional), {"lengths": lengths})
    fake.seen.clear()
    for again in False, True:
        encoded = fake.encoded
        for tensors in second, first:
            out = recipe([*tensors.values()])
            assert launched(fake, tensors | {"out": out}) == EACH
        assert fake.encoded == encoded or not again


def test_a_recipe_gives_each_launch_memory_of_its_own(monkeypatch):
    """What Triton's launcher would ask its allocator for, which stays the caller's."""
    fake, tensors, asked = Fake(monkeypatch, scratch=8), some_tensors(), []
    triton.set_allocator(lambda size, alignment, stream: asked.append(size) or size)
    *positional, lengths = tensors.values()
    recipe = Recipe(three_launches(fake, False), tuple(positional), {"lengths": lengths})
    fake.seen.clear()
    out = recipe([*tensors.values()])
    memory = [next(x for x in args if isinstance(x, torch.Tensor)) for args in fake.seen]
    assert [x.nbytes for x in memory] == [8 * 6, 8 * 5, 8 * 24] and len({x.data_ptr() for x in memory}) == 3
    assert launched(fake, tensors | {"out": out}) == EACH
    asked.clear()
    for _ in range(2):
        fake.launch(at(0), n=77)  # by Triton, which asks
        monkeypatch.setattr(torch, "empty", lambda size, **_: size)
    assert asked == [48]


@with_and_without_tma
@pytest.mark.parametrize("given", [False, True], ids=["own outputs", "given outputs"])
def test_a_plan_launches_on_the_tensors_of_the_call(monkeypatch, tma, given):
    """Whichever of them are those of the call before, which are not looked at again."""
    fake, tensors, outputs = Fake(monkeypatch, tma), some_tensors(), []
    plan = Plan(three_launches(fake, tma), tensors, {})
    [scratch] = plan._own.values()
    fake.seen.clear()
    for change in tuple(tensors), ("q",), ("k",), ("v",), ("lengths",), ("q", "v"), ("k", "lengths"), ():
        others, out = some_tensors(), {"out": torch.empty_like(tensors["q"])} if given else {}
        old = {f"old {name}": tensors[name] for name in change}
        tensors |= {name: others[name] for name in change}
        outputs.append(plan(**tensors, **out))
        assert launched(fake, old | tensors | {"out": outputs[-1]}) == EACH
        with monkeypatch.context() as patch:
            patch.setattr(Plan, "_meet", lambda *args: pytest.fail("was checked before"))
            again = plan(**tensors, **out)
        assert launched(fake, old | tensors | {"out": again}) == EACH
        assert (again is outputs[-1]) == given
    assert len({x.data_ptr() for x in outputs}) == len(outputs)
    plan(**tensors)
    assert launched(fake, {"scratch": scratch}) == [["scratch"], [], ["scratch"]]


def test_a_tensor_that_has_moved(monkeypatch):
    """The same object, with other memory."""
    fake, tensors = Fake(monkeypatch, tma=True), some_tensors()
    plan, tensors["out"] = Plan(three_launches(fake, tma=True), tensors, {}), torch.empty_like(tensors["q"])
    plan(**tensors)
    fake.seen.clear()
    for x in tensors.values():
        old = x.data
        x.data = torch.zeros_like(x)
        plan(**tensors)
        assert launched(fake, tensors | {"old": old}) == EACH


def test_a_refused_call_leaves_nothing_behind(monkeypatch):
    """Nor the tensors that were right."""
    fake, tensors = Fake(monkeypatch), some_tensors()
    plan = Plan(three_launches(fake, tma=False), tensors, {})
    plan(**tensors)
    fake.seen.clear()
    tensors["q"] = some_tensors()["q"]
    with pytest.raises(ValueError, match="lengths: this plan is for dtype"):
        plan(**tensors | {"lengths": tensors["lengths"].long()})
    out = plan(**tensors)
    assert launched(fake, tensors | {"out": out}) == EACH


@pytest.mark.parametrize("when", range(6))
def test_threads_share_a_plan(monkeypatch, when):
    """Each launches on its own tensors, wherever the other comes between: at an address, or at the stream."""
    fake, mine, theirs = Fake(monkeypatch, tma=True), some_tensors(), some_tensors()
    occasions = []

    def occasion():
        occasions.append(...)
        if len(occasions) == when + 1:
            out = plan(**theirs)
            assert launched(fake, theirs | {"out": out}) == EACH

    class Interrupting(torch.Tensor):
        def data_ptr(self):
            occasion()
            return super().data_ptr()

    def stream(device):
        occasion()
        return 70

    triton.runtime.driver._active.get_current_stream = stream
    plan = Plan(three_launches(fake, tma=True), mine, {})
    fake.seen.clear()
    mine["k"] = mine["k"].as_subclass(Interrupting)
    for _ in range(2):
        mine["v"] = some_tensors()["v"]
        out = plan(**mine)
        assert launched(fake, mine | {"out": out}) == EACH
    assert len(occasions) > when


@with_and_without_tma
def test_a_plan_keeps_nothing_of_the_callers(monkeypatch, tma):
    fake, tensors = Fake(monkeypatch, tma), some_tensors()
    plan = Plan(three_launches(fake, tma), tensors, {})
    plan(**tensors)
    tensors["out"] = torch.empty_like(tensors["q"])
    plan(**tensors)
    fake.seen.clear()
    gone = [weakref.ref(x) for x in tensors.values()]
    tensors.clear()
    assert all(x() is None for x in gone)
