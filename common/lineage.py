"""The lineage: what a version is, where versions are found, and what runs where."""

import ast
import functools
import hashlib
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from common.hardware import GPU
from common.replay import remembered

FAMILIES = ("prefill", "decoding")
# which older decoding versions do not take
CACHE_ARGUMENTS = (
    "block_table", "window", "starts", "k_new", "v_new", "deterministic", "descale_k", "descale_v", "fresh_keys"
)  # fmt: skip


def triton_version() -> tuple[int, int]:
    """(3, 7) for triton 3.7.1."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Requires:
    """What a version needs. Capabilities are CUDA compute capabilities; exactly=True means that architecture alone."""

    capability: tuple[int, int] = (8, 0)
    exactly: bool = False
    fp8_capability: tuple[int, int] = (8, 9)
    e5m2_capability: tuple[int, int] = (8, 9)
    triton: tuple[int, int] = (3, 6)
    amd: bool = True  # plain Triton also compiles for AMD
    e5m2_amd: bool = False
    interpreter: bool = True


@dataclass(frozen=True)
class Version:
    """One file of the lineage. `call` follows the family's contract; `tiles(problem)` is its own choice of tiles.

    `declines`, of a call's arguments, says why this version does not serve that call, or None. fp8: it has an FP8 path;
    half: it has one for 16-bit tensors. takes: arguments of a decoding call beyond those that all versions take.
    """

    family: str
    number: int
    title: str
    idea: str
    parent: int | None
    requires: Requires
    call: Callable
    kernels: tuple
    tiles: Callable
    fp8: bool = False
    half: bool = True
    declines: Callable = lambda *args, **kwargs: None
    most_queries: int = 1  # of a sequence, in one decoding call
    takes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "call", remembered(self.call))

    @property
    def name(self) -> str:
        return f"v{self.number}"

    @property
    def label(self) -> str:
        return f"v{self.number} {self.title}"

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path(inspect.getsourcefile(inspect.unwrap(self.call)))

    @property
    def header(self) -> dict[str, str]:
        """The paragraphs of the module docstring that start with Idea, Changed, Expect and Limits."""
        text = inspect.getdoc(sys.modules[self.call.__module__]) or ""
        parts = re.split(r"^(Idea|Changed|Expect|Limits)[^:\n]*:", text, flags=re.MULTILINE)
        return {name: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)}

    @functools.cached_property
    def source_hash(self) -> str:
        """12 hex digits over this file and the jit functions its kernels reach, comments and docstrings left out."""
        trees = [_normalised(self.path.read_text())]
        trees += [_normalised(source) for source in _reachable_sources(self.kernels)]
        return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:12]

    def why_not(self, gpu: GPU, dtype: str = "fp16") -> str | None:
        """One line on why this version cannot run on `gpu` with `dtype`; None where it can."""
        need, is_fp8 = self.requires, dtype in ("e4m3", "e5m2")
        if triton_version() < need.triton:
            return f"needs triton {'.'.join(map(str, need.triton))} or later, this is {triton.__version__}"
        if is_fp8 and not self.fp8:
            return "has no FP8 path"
        if not is_fp8 and not self.half:
            return "takes FP8 alone"
        if gpu.backend == "interpreter":
            return None if need.interpreter else "cannot run in Triton's interpreter"
        if gpu.backend == "hip":
            if not need.amd:
                return f"needs an NVIDIA GPU, this is {gpu.name}"
            if not is_fp8 or (dtype == "e5m2" and need.e5m2_amd):
                return None
            return "FP8 needs an NVIDIA GPU (e4m3 of this AMD GPU is another format)"
        of_fp8 = need.e5m2_capability if dtype == "e5m2" else need.fp8_capability
        least = max(need.capability, of_fp8) if is_fp8 else need.capability
        found = "{}.{}".format(*gpu.capability)
        if need.exactly and gpu.capability != need.capability:
            return "needs compute capability {}.{}, this is {}".format(*need.capability, found)
        if gpu.capability < least:
            return "{}needs compute capability {}.{}, this is {}".format("FP8 " if is_fp8 else "", *least, found)
        return None

    def lacks(self, *, k=None, **arguments) -> str | None:
        """Which of a decoding call's arguments this version does not have, as a reason; None where it has all."""
        if self.family != "decoding":
            return None
        if not self.fp8 and isinstance(k, torch.Tensor) and k.dtype.itemsize == 1:
            return "takes no float8 caches"
        if not self.half and isinstance(k, torch.Tensor) and k.dtype.itemsize != 1:
            return "takes float8 caches alone"
        beyond = [name for name in CACHE_ARGUMENTS if arguments.get(name) is not None and name not in self.takes]
        return f"takes no {', '.join(beyond)}" if beyond else None

    def why_not_call(self, q, k, v, **arguments) -> str | None:
        """Why this version does not serve that call; None where it does."""
        if reason := self.lacks(k=k, **arguments):
            return reason
        if self.family == "decoding" and getattr(q, "ndim", 0) == 4 and q.shape[2] > self.most_queries:
            return f"takes {self.most_queries} queries of a sequence at most, not {q.shape[2]}"
        return self.declines(q, k, v, **arguments)


def _normalised(source: str) -> str:
    tree = ast.parse(inspect.cleandoc("\n" + source) if source.startswith((" ", "\t")) else source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _reachable_sources(kernels: tuple) -> list[str]:
    """Sources of the jit functions outside the kernels' own files that the kernels call, directly or not."""
    own = {kernel.fn.__module__ for kernel in kernels}
    seen, todo = {}, list(kernels)
    while todo:
        function = todo.pop().fn
        key = (function.__module__, function.__qualname__)
        if key in seen:
            continue
        seen[key] = inspect.getsource(function)
        names = {node.id for node in ast.walk(ast.parse(inspect.cleandoc(seen[key]))) if isinstance(node, ast.Name)}
        found = (function.__globals__.get(name) for name in sorted(names))
        todo += [f for f in found if hasattr(f, "fn") and f.fn.__module__.split(".")[0] != "triton"]
    return [seen[key] for key in sorted(seen) if key[0] not in own]


@functools.cache
def versions_of(family: str) -> tuple[Version, ...]:
    """All versions of a family ("prefill", "decoding"), oldest first: every file FAMILY/*_vN.py with a VERSION."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} does not exist; there are {', '.join(FAMILIES)}")
    package = importlib.import_module(family)
    names = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if re.search(r"_v\d+$", name)]
    versions = [importlib.import_module(f"{family}.{name}").VERSION for name in names]
    return tuple(sorted(versions, key=lambda version: version.number))


def find_version(family: str, name: str | int) -> Version:
    """The version called "v2" (or "2", or 2). ValueError names the versions that exist."""
    versions = versions_of(family)
    for version in versions:
        if str(name).removeprefix("v") == str(version.number):
            return version
    raise ValueError(f"version {name!r} of {family} does not exist; there are {', '.join(v.name for v in versions)}")


def parent_of(version: Version) -> Version | None:
    """The version that this one changes, or None for the first."""
    return None if version.parent is None else find_version(version.family, version.parent)
