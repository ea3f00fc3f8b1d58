"""How the tests run: compiled on the GPU where there is one, else in Triton's interpreter on the CPU.

The choice is made before triton is imported, because one process cannot do both. tests/compile_only compiles for GPUs
that are not here and is left out of an interpreting run; `pytest tests/compile_only` runs it by itself.
"""

import os
import pathlib

import hypothesis
import pytest

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # read when numpy and torch are imported, below; more threads only fight

COMPILE_ONLY = pathlib.Path(__file__).parent / "compile_only"
LEFT_OUT = "compiles, and this process interprets kernels; run `pytest tests/compile_only` by itself"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _only_compiles(config) -> bool:
    """Whether every path of the command line lies in tests/compile_only."""
    paths = [config.invocation_params.dir / argument.split("::")[0] for argument in config.args]
    return bool(paths) and all(path.resolve().is_relative_to(COMPILE_ONLY) for path in paths)


def pytest_configure(config):
    import torch

    if not _only_compiles(config) and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if _interpreting():
        from bench.interpreter import install

        install()
        # numpy's remarks on log(0) and 0 / 0, which kernels select away afterwards
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    hypothesis.settings.register_profile(
        "lineage",
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

    grids = []

    def record(kernel, grid):
        return lambda *args, **options: grids.append(grid(options) if callable(grid) else grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    return grids


@pytest.fixture
def in_place(monkeypatch):
    """The interpreter does not copy all memory onto itself after a kernel, which takes minutes where it is huge."""
    if _interpreting():
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
