"""How the tests run: compiled on the GPU where there is one, else in Triton's interpreter on the CPU.

The choice is made before triton is imported, because one process cannot do both. tests/compile_only compiles for GPUs
that are not here and is left out of an interpreting run; `pytest tests/compile_only` runs it by itself.
"""

import functools
import os
import pathlib

import hypothesis
import pytest

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # read when numpy and torch are imported, below; more threads only fight

LARGE = 2**30  # bytes
COMPILE_ONLY = pathlib.Path(__file__).parent / "compile_only"
LEFT_OUT = "compiles, and this process interprets kernels; run `pytest tests/compile_only` by itself"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _only_compiles(config) -> bool:
    """Whether every path of the command line lies in tests/compile_only."""
    paths = [config.invocation_params.dir / argument.split("::")[0] for argument in config.args]
    return bool(paths) and all(path.resolve().is_relative_to(COMPILE_ONLY) for path in paths)


def _hurry_the_interpreter():
    """Half of an interpreted test's time goes into what Triton does over and over.

    It puts the interpreter's functions into triton.language before a kernel runs, and again at each function that the
    kernel calls; and it makes the same table of types whenever it looks one up.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    of_numbers = functools.cache(numpy_type)

    @functools.cache
    def languages(fn):
        return [x for x in fn.__globals__.values() if x is tl or x is tl.core]

    def patch_once(fn):
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = lambda x: (numpy_type if x.scalar.is_ptr() else of_numbers)(x.scalar)


def pytest_configure(config):
    import torch

    if not _only_compiles(config) and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if _interpreting():
        from bench.interpreter import install

        install()
        _hurry_the_interpreter()
        # numpy's remarks on log(0) and 0 / 0, which kernels select away afterwards, and on triton's own use of it
        for warning in ("RuntimeWarning", "DeprecationWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{warning}:triton.runtime.interpreter")
    phases = set(hypothesis.Phase) - {hypothesis.Phase.shrink}  # minutes: interpreted, or each shape compiled anew
    hypothesis.settings.register_profile(
        "lineage",
        phases=phases,
        max_examples=6 if _interpreting() else 10,
        deadline=None,
        derandomize=True,  # the same examples everywhere: a red test is red for the next person too
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("lineage")


def pytest_ignore_collect(collection_path, config):
    if _interpreting() and collection_path.is_relative_to(COMPILE_ONLY) and not _only_compiles(config):
        return True


def pytest_collection_modifyitems(items):
    """Compile tests that an interpreting run was asked for by name, as file::test."""
    if _interpreting():
        for item in items:
            if item.path.is_relative_to(COMPILE_ONLY):
                item.add_marker(pytest.mark.skip(reason=LEFT_OUT))


def pytest_terminal_summary(terminalreporter, config):
    ignored = [pathlib.Path(path).resolve() for path in config.option.ignore or ()]
    if _interpreting() and COMPILE_ONLY.exists() and COMPILE_ONLY not in ignored:
        terminalreporter.write_line(f"tests/compile_only left out: it {LEFT_OUT}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A version that declines every case that hypothesis draws is skipped."""
    try:
        return (yield)
    except hypothesis.errors.Unsatisfiable:
        pytest.skip("declines every case that was drawn")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Memory that a large test took goes back: processes beside this one have tests that want as much."""
    result = yield
    import torch

    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > LARGE:
        torch.cuda.empty_cache()
    return result


@pytest.fixture(scope="session")
def device():
    """Where kernels run: "cuda", or "cpu" in the interpreter."""
    import torch

    return torch.device("cpu") if _interpreting() else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session", autouse=True)
def no_tuned_tiles(tmp_path_factory):
    """Tests see the tiles that the versions bring, not those that were tuned on this machine."""
    from common import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_tuned_file", lambda: tmp_path_factory.getbasetemp() / "tiles.json")
        launch._tuned.cache_clear()
        yield


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """The grids of the kernels that were launched; nothing runs."""
    from triton.runtime.jit import KernelInterface

    from common import dispatch, replay

    grids = []

    def record(kernel, grid):
        return lambda *args, **options: grids.append(grid(options) if callable(grid) else grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    monkeypatch.setattr(dispatch, "_prepared", {})
    monkeypatch.setattr(replay, "_least_device", 2**30)
    return grids


@pytest.fixture
def own_memory_alone(monkeypatch):
    """Interpreted kernels fail if an address that they read or write lies in none of the tensors that they were given.

    A read past the end that a mask drops afterwards changes no number, and faults only where the memory ends.
    """
    if not _interpreting():
        pytest.skip("needs the interpreter; on a GPU compute-sanitizer tells")
    import numpy
    import torch
    from triton.runtime import interpreter

    shipped, prepare, extents = interpreter._interpreter, interpreter.GridExecutor._init_args_hst, []

    def note_tensors(executor, arguments, options):
        given = [getattr(x, "base", x) for x in (*arguments, *options.values())]  # the base of a descriptor
        tensors = [x for x in given if isinstance(x, torch.Tensor) and x.numel()]
        reach = [1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        extents[:] = [(x.data_ptr(), x.data_ptr() + n * x.itemsize) for x, n in zip(tensors, reach, strict=True)]
        return prepare(executor, arguments, options)

    def check(pointers, mask, itemsize):
        used = numpy.asarray(pointers)[numpy.asarray(mask, dtype=bool)].astype(numpy.int64)
        inside = numpy.zeros(used.shape, dtype=bool)
        for start, end in extents:
            inside |= (used >= start) & (used + itemsize <= end)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses lie in no tensor of the kernel"

    class Checked:
        def __getattr__(self, name):
            return getattr(shipped, name)

        def load(self, pointers, mask, other, dtype):
            check(pointers, mask, numpy.dtype(dtype).itemsize)
            return shipped.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            check(pointers, mask, value.itemsize)
            return shipped.store(pointers, value, mask)

    monkeypatch.setattr(interpreter, "_interpreter", Checked())
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", note_tensors)


@pytest.fixture
def in_place(monkeypatch):
    """The interpreter does not copy all memory onto itself after a kernel, which takes minutes where it is huge."""
    if _interpreting():
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
