"""The lineage: versions are found by their files, say what they need, and have a hash that follows the code alone."""

import ast
import importlib
import inspect
import re
import sys
import textwrap

import pytest
import torch
from attention_checks import all_versions, table

import prefill
from common import lineage
from common.hardware import INTERPRETER, KNOWN
from common.lineage import FAMILIES, Requires, Version, find_version, parent_of, triton_version, versions_of
from common.problem import AttentionProblem

every_version = all_versions(*FAMILIES, runs=False)


def a_version(number=9, **changes) -> Version:
    fields = dict(
        family="prefill", number=number, title="test", idea="None.", parent=None, requires=Requires(),
        call=a_version, kernels=(), tiles=a_version,
    )  # fmt: skip
    return Version(**fields | changes)


# ---- finding


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_is_found(family):
    """One version a file, its number and family those of the file's name, oldest first, each parent there."""
    found = versions_of(family)
    folder = found[0].path.parent
    assert folder.name == family
    assert {version.path for version in found} == set(folder.glob("*_v*.py"))
    assert [version.number for version in found] == sorted({version.number for version in found})
    for version in found:
        assert version.family == family and version.path.stem.endswith(f"_v{version.number}")
        assert find_version(family, version.name) is version
        assert version.parent is None or parent_of(version).number < version.number
        assert version.kernels and version.label == f"v{version.number} {version.title}"


@pytest.fixture
def new_files(tmp_path, monkeypatch):
    """Writes modules that can be imported, `prefill.*` ones among them, and forgets them afterwards."""
    (tmp_path / "prefill").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(prefill, "__path__", [*prefill.__path__, str(tmp_path / "prefill")])
    known = set(sys.modules)
    versions_of.cache_clear()

    def write(name: str, source: str):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]
    versions_of.cache_clear()


def test_a_new_file_is_a_new_version(new_files):
    """Adding v99 means adding one file."""
    new_files("prefill/flash_attention_v99", """
        from common.lineage import Requires, Version
        VERSION = Version(family="prefill", number=99, title="t", idea="i", parent=3, requires=Requires(),
                          call=print, kernels=(), tiles=print)
    """)  # fmt: skip
    new_files("prefill/notes", "raise RuntimeError('no version, and not imported')")
    assert versions_of("prefill")[-1].number == 99
    assert find_version("prefill", "v99").title == "t" and parent_of(find_version("prefill", 99)).number == 3


# ---- requirements

H200, A100, MI300 = KNOWN["sm_90"], KNOWN["sm_80"], KNOWN["gfx942"]
REASONS = {
    "runs": (Requires(), H200, "fp16", None),
    "old-gpu": (Requires(capability=(9, 0)), KNOWN["sm_86"], "fp16", "needs compute capability 9.0, this is 8.6"),
    "newer-gpu": (Requires(capability=(9, 0)), KNOWN["sm_100"], "fp16", None),
    "hopper-alone": (
        Requires(capability=(9, 0), exactly=True), KNOWN["sm_100"], "fp16", "needs compute capability 9.0, this is 10.0"
    ),
    "amd": (Requires(), MI300, "fp16", None),
    "no-amd": (Requires(amd=False), MI300, "fp16", "needs an NVIDIA GPU, this is AMD MI300X"),
    "fp8": (Requires(), H200, "e4m3", None),
    "fp8-old-gpu": (Requires(), A100, "e5m2", "FP8 needs compute capability 8.9, this is 8.0"),
    "fp8-on-hopper-alone": (Requires(capability=(9, 0)), KNOWN["sm_89"], "e4m3", "FP8 needs compute capability 9.0"),
    "fp8-amd": (Requires(), MI300, "e4m3", "FP8 needs an NVIDIA GPU"),
    "old-triton": (Requires(triton=(99, 1)), H200, "fp16", r"needs triton 99\.1 or later, this is 3\."),
    "interpreted": (Requires(capability=(10, 0)), INTERPRETER, "fp16", None),
    "not-interpreted": (Requires(interpreter=False), INTERPRETER, "fp16", "cannot run in Triton's interpreter"),
}  # fmt: skip


@table("requires, gpu, dtype, reason", REASONS)
def test_why_not(requires, gpu, dtype, reason):
    """What a version needs, what is here, and not that it failed."""
    found = a_version(requires=requires, fp8=True).why_not(gpu, dtype)
    assert found is None if reason is None else re.match(reason, found)


def test_no_fp8_path():
    assert a_version(fp8=False).why_not(H200, "e4m3") == "has no FP8 path"
    assert a_version(fp8=False).why_not(INTERPRETER, "e4m3") == "has no FP8 path"


def test_no_path_for_16_bits():
    """Nor for float32; a decoding call's caches tell."""
    found = a_version(fp8=True, half=False, family="decoding")
    for gpu in (H200, INTERPRETER):
        assert found.why_not(gpu, "fp16") == found.why_not(gpu, "fp32") == "takes FP8 alone"
        assert found.why_not(gpu, "e4m3") is found.why_not(gpu, "e5m2") is None
    q, cache = torch.empty(1, 2, 1, 16, dtype=torch.float16), torch.empty(1, 2, 8, 16, dtype=torch.float8_e5m2)
    assert found.why_not_call(q, q, q) == "takes float8 caches alone"
    assert found.why_not_call(q, cache, cache) is None
    assert a_version(family="decoding").why_not_call(q, cache, cache) == "takes no float8 caches"


def test_triton_version():
    """3.10 is later than 3.9."""
    assert (3, 6) <= triton_version() < (99, 0) and (3, 10) > (3, 9)


# ---- the hash of the source

HELPER = """
    import triton
    import triton.language as tl

    @triton.jit
    def helper(x):
        return x + 1

    @triton.jit
    def stranger(x):
        return x + 2
"""
VERSION = '''
    """A version."""
    import triton
    import triton.language as tl
    from hashed_helper import helper, stranger

    @triton.jit
    def kernel(X):
        """What it does."""
        tl.store(X, helper(tl.load(X)))  # a comment

    def call(q):
        return q
'''


def hash_of(write, version: str = VERSION, helper: str = HELPER) -> str:
    for name in ("hashed_version", "hashed_helper"):
        sys.modules.pop(name, None)
    write("hashed_helper", helper)
    write("hashed_version", version)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode  # files change faster than bytecode's timestamps
    try:
        module = importlib.import_module("hashed_version")
    finally:
        sys.dont_write_bytecode = before
    return a_version(call=module.call, kernels=(module.kernel,)).source_hash


NEUTRAL = {
    "comment": lambda version, helper: (version.replace("# a comment", "# another"), helper),
    "docstring": lambda version, helper: (version.replace("What it does.", "What else."), helper),
    "blank-lines": lambda version, helper: (version.replace("    def call", "\n\n    def call"), helper),
    "helper-comment": lambda version, helper: (version, helper.replace("return x + 1", "return x + 1  # one")),
    "helper-not-used": lambda version, helper: (version, helper.replace("return x + 2", "return x + 3")),
}
DIFFERENT = {
    "kernel": lambda version, helper: (version.replace("tl.load(X)", "tl.load(X + 1)"), helper),
    "call": lambda version, helper: (version.replace("return q", "return q + 0"), helper),
    "helper": lambda version, helper: (version, helper.replace("return x + 1", "return x + 9")),
}


@table("change", NEUTRAL)
def test_hash_ignores_what_is_not_code(change, new_files):
    """A comment must not make recorded numbers stale."""
    assert hash_of(new_files, *change(VERSION, HELPER)) == hash_of(new_files)


@table("change", DIFFERENT)
def test_hash_follows_the_code(change, new_files):
    """Other code, in the file or in what its kernels use from elsewhere, makes them stale."""
    assert hash_of(new_files, *change(VERSION, HELPER)) != hash_of(new_files)


# ---- the files themselves


@every_version
def test_hashes_are_stable(version):
    assert re.fullmatch(r"[0-9a-f]{12}", version.source_hash)
    others = [v for family in FAMILIES for v in versions_of(family) if v is not version]
    assert version.source_hash not in {v.source_hash for v in others}


@every_version
def test_hash_does_not_depend_on_python(version):
    """ast.unparse writes strings inside the braces of an f-string one way before Python 3.12 and another way since."""
    for source in (version.path.read_text(), *lineage._reachable_sources(version.kernels)):
        for node in ast.walk(ast.parse(inspect.cleandoc(source))):
            if isinstance(node, ast.FormattedValue):
                inner = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                assert not inner, f"name what stands in the braces first: {ast.unparse(node)}"


@every_version
def test_header(version):
    """Idea, Changed, Expect and Limits, on twelve lines."""
    assert list(version.header) == ["Idea", "Changed", "Expect", "Limits"] and all(version.header.values())
    docstring = ast.get_docstring(ast.parse(version.path.read_text()), clean=False)
    assert len(docstring.splitlines()) <= 13, "the title, an empty line and twelve lines at most"
    assert version.title and version.idea.endswith(".")


@every_version
def test_imports_common_alone(version):
    """A version stands by itself: to read one, and what it shares, is to have read all that runs."""
    imported = set()
    for node in ast.walk(ast.parse(version.path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {"prefill", "decoding", "bench"}
    assert imported - set(sys.stdlib_module_names) <= {"common", "torch", "triton"}


@every_version
def test_tiles_of_a_problem(version, device):
    """`tiles` is the choice that `call` makes, and depends on nothing but the problem and the GPU."""
    q = torch.zeros(1, 2, 1, 64, dtype=torch.float16, device=device)
    problem = getattr(AttentionProblem, version.family)(q, q, q)
    assert version.tiles(problem) == version.tiles(problem)
    assert all(value > 0 for value in version.tiles(problem))


def test_versions_are_remembered():
    assert lineage.versions_of("prefill") is versions_of("prefill")
