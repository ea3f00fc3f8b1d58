"""What the compiler makes of a version, for a GPU that need not be here: registers, spills, shared memory, opcodes.

A version is compiled through its real launch function: tensors on device "meta", the GPU pretended, and every launch
recorded and compiled in place of run. No driver is touched. Results are cached on disk by what went into them.

    python -m bench.machine_code prefill --arch sm_90 --dtype fp16 --head-dim 128
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from tabulate import tabulate

from bench.disassembly import KINDS, Code, Loop, Place, innermost, loops_of, main_loops, read_amd, read_nvidia

if TYPE_CHECKING:  # importing them loads torch, which a cached answer can do without
    from common.hardware import GPU
    from common.lineage import Version

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("ttir", "ttgir", "llir", "ptx", "sass")  # AMD has "amdgcn" for the last two
SCORES = {"prefill": 128 * 128, "decoding": 128}  # that normalised counts are for
TMA = "global loads (TMA)"
UNIT = {"prefill": "a 128 x 128 tile of scores", "decoding": "128 keys of one head"}
CACHED_FILES = 4000  # about 200 MB


class CompileError(RuntimeError):
    """A version does not compile for this GPU and shape; one line says why."""


class Case(NamedTuple):
    """One version, one GPU and one shape. tiles None is the version's own choice; dtypes e4m3 and e5m2 are FP8."""

    family: str
    version: str
    arch: str
    dtype: str
    head_dim: int
    causal: bool
    seqlen: int
    heads_q: int
    heads_kv: int
    batch: int
    tiles: tuple[int, int, int, int] | None

    def label(self) -> str:
        """ "fp16 D=128 full, sm_90" """
        mask = "" if self.family == "decoding" else " causal" if self.causal else " full"
        return f"{self.dtype} D={self.head_dim}{mask}, {self.arch}"


@dataclass(frozen=True)
class Compiled:
    """One kernel of a version, compiled.

    own: the version lists it among its kernels (quantisation, say, is not). constants: the launch's constexprs
    (BLOCK_M, ...). shared, stack and size are bytes, registers a thread's; spilled counts registers, on AMD alone.
    text: the stages of compilation, {"ttir": ..., "ptx": ...}; files in it are relative to the repository. cubin: the
    machine code in base 64, empty on AMD, where text has "amdgcn".
    """

    family: str
    kernel: str
    own: bool
    arch: str
    constants: dict
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    spilled: int
    size: int
    text: dict[str, str] = field(repr=False)
    cubin: str = field(repr=False)

    def stage(self, name: str) -> str:
        """The text of a stage of STAGES; empty where the kernel has none, as one in Gluon has no ttir."""
        if "amdgcn" in self.text and name in ("ptx", "sass"):
            name = "amdgcn"
        return self.sass if name == "sass" else self.text.get(name, "")

    @functools.cached_property
    def sass(self) -> str:
        return disassembled(base64.b64decode(self.cubin))

    @functools.cached_property
    def code(self) -> Code:
        return read_nvidia(self.sass) if self.cubin else read_amd(self.text["amdgcn"])

    @functools.cached_property
    def loops(self) -> list[Loop]:
        return loops_of(self.code)

    @functools.cached_property
    def main_loops(self) -> list[Loop]:
        return main_loops(self.loops)

    @property
    def warp_specialized(self) -> bool:
        """Groups of warps have code, and loops, of their own: one to load, others to compute."""
        return "ttg.warp_specialize" in self.text["ttgir"]


# ---- what was compiled, in numbers


def facts(compiled: Compiled) -> dict[str, int]:
    """Registers a thread, spills (STL and LDL; on AMD registers), warps; bytes of stack, shared memory and code."""
    spills = compiled.spilled
    if compiled.cubin and compiled.stack:  # a stack may be there without spills, spills not without a stack
        spills = sum(i.kind == "spills" for i in compiled.code.instructions)
    return {
        "registers": compiled.registers, "spills": spills, "stack": compiled.stack, "shared": compiled.shared,
        "shared_limit": gpu_of(compiled.arch).shared_memory, "warps": compiled.warps, "code_bytes": compiled.size,
    }  # fmt: skip


def loops(compiled: Compiled) -> list[Loop]:
    """The main loops: innermost, with tensor-core instructions (or exponentials, where there are none of those)."""
    return compiled.main_loops


def scores_an_iteration(compiled: Compiled, loop: Loop) -> float | None:
    """How many scores, of the tile or of a warp group's part of it, the program works out in one turn of the loop; None
    for a kernel that works out none (it has no BLOCK_N).

    Warp-specialised: what the tensor cores do in a turn, by the 2 * BLOCK_D multiply-adds that a score takes, for all
    warps as if each did the same. Otherwise the tile: work that warps do twice then shows as more instructions.
    """
    constants = compiled.constants
    if "BLOCK_N" not in constants:
        return None
    if compiled.warp_specialized:
        width = constants.get("BLOCK_D") or constants["HEAD_DIM"]
        return compiled.warps * multiply_adds_a_warp(loop) / (2 * width) or None
    return constants["BLOCK_M"] * constants["BLOCK_N"]


def multiply_adds_a_warp(loop: Loop) -> int:
    """Multiply-adds of one warp's tensor-core instructions in a turn: HMMA.16816, QMMA.16832, HGMMA.64x128x16, ..."""
    total = 0
    for opcode, count in loop.opcodes.items():
        if shape := re.match(r"\w?GMMA\.(\d+)x(\d+)x(\d+)", opcode):  # four warps together
            total += count * int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
        elif shape := re.match(r"\w?MMA\.(16)(8)(\d+)", opcode):
            total += count * int(shape[1]) * int(shape[2]) * int(shape[3])
    return total


def loop_counts(compiled: Compiled, loop: Loop) -> dict[str, float]:
    """Instructions of each kind, summed over the warps, that the loop spends on UNIT of work: a 128 x 128 tile of Q K^T
    in prefill, so that different tiles compare. A turn of the loop where the kernel works out no scores.

    Where another group of warps loads, by TMA, one thread does, once a tile of the block.
    """
    scores = scores_an_iteration(compiled, loop)
    factor = SCORES[compiled.family] * compiled.warps / scores if scores else 1
    counts = {kind: loop.counts[kind] * factor for kind in loop.counts}
    if scores and compiled.warp_specialized and TMA not in counts:
        tile = compiled.constants["BLOCK_M"] * compiled.constants["BLOCK_N"]
        loading = innermost(compiled.loops, TMA)
        counts[TMA] = sum(other.counts[TMA] for other in loading) * SCORES[compiled.family] / tile
    return {kind: counts[kind] for kind in KINDS if counts.get(kind)}


def leanest_loop(compiled: Compiled) -> Loop | None:
    """The main loop that most blocks pass through: of several (without and with a mask) the one with fewest
    instructions for the same work. None where there is no loop.
    """
    return min(compiled.main_loops, key=lambda loop: sum(loop_counts(compiled, loop).values()), default=None)


def summary(compiled: Compiled) -> dict:
    """All of it for programs and tables: kernel, tiles, facts, and the counts of the leanest main loop."""
    loop = leanest_loop(compiled)
    tiles = {name: value for name, value in compiled.constants.items() if name.startswith("BLOCK_")}
    return {
        "kernel": compiled.kernel, "arch": compiled.arch, "tiles": tiles, "stages": compiled.stages, **facts(compiled),
        "main_loops": len(compiled.main_loops), "loop_instructions": loop.size if loop else 0,
        "per_turn": {kind: loop.counts[kind] for kind in KINDS if loop.counts[kind]} if loop else {},
        "per_unit": loop_counts(compiled, loop) if loop else {},
    }  # fmt: skip


# ---- which source line an instruction comes from


def source_lines(compiled: Compiled, file: str) -> list[tuple[int, ...]]:
    """For each instruction the lines of `file` (relative to the repository) that it was derived from; often one, none
    for what no line asked for. Machine code names the innermost line alone, in a helper perhaps: then the lines that
    call the helper there, from the call sites that the earlier stages have.
    """
    callers: dict[Place, set[int]] = {}
    for stage in ("ttir", "ttgir"):
        _add_callers(callers, compiled.text.get(stage, ""), file)
    found = []
    for instruction in compiled.code.instructions:
        inside = [place.line for place in instruction.places if place.file == file]
        helpers = {line for place in instruction.places for line in callers.get(place, ())}
        found.append(tuple(inside) or tuple(sorted(helpers)))
    return found


def _add_callers(callers: dict[Place, set[int]], text: str, file: str) -> None:
    """Add to {place outside `file`: the lines in it that call, directly or not, what is there}, from MLIR's text."""
    table = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    for location in table.values():
        for chain in _chains(location, table):
            inside = [place.line for place in chain if place.file == file]
            for place in chain:
                if place.file != file and inside:
                    callers.setdefault(place, set()).add(inside[0])


def _chains(location: str, table: dict[str, str]) -> list[list[Place]]:
    """The call chains of an MLIR location, innermost first: "file":1:2, callsite(a at b), fused[a, b], "name"(a)."""
    if match := re.fullmatch(r'"([^"]+)":(\d+):\d+', location):
        return [[Place(match[1], int(match[2]))]]
    if match := re.fullmatch(r"callsite\((#loc\d*) at (#loc\d*)\)", location):
        inner, outer = (_chains(table[name], table) for name in match.groups())
        return [a + b for a in inner or [[]] for b in outer or [[]]]
    names = re.findall(r"#loc\d*", location)
    return [chain for name in names if table.get(name, location) != location for chain in _chains(table[name], table)]


# ---- compiling


def case_for(version: Version, gpu: GPU | str, **shape) -> Case:
    """The Case of a version on a GPU (or its architecture's name), with defaults for what `shape` leaves out."""
    arch = gpu if isinstance(gpu, str) else gpu.arch
    gpu_of(arch)
    defaults = {"dtype": "fp16", "causal": False, "heads_q": 16, "tiles": None}
    defaults |= {
        "prefill": {"batch": 2, "head_dim": 128, "seqlen": 8192},
        "decoding": {"batch": 1, "head_dim": 64, "seqlen": 65536},
    }[version.family]
    if unknown := shape.keys() - set(Case._fields):
        raise TypeError(f"{', '.join(sorted(unknown))}: no part of a case; there are {', '.join(Case._fields[3:])}")
    chosen = defaults | shape
    chosen.setdefault("heads_kv", chosen["heads_q"])
    if chosen["tiles"] is not None:
        chosen["tiles"] = tuple(chosen["tiles"])
    return Case(family=version.family, version=version.name, arch=arch, **chosen)


def compile_version(version: Version, gpu: GPU | str, **shape) -> list[Compiled]:
    """Compile every kernel that one call of `version` launches on `gpu`, of common.hardware.KNOWN, in order of launch.

    shape: dtype ("fp16", ..., "e4m3"), head_dim, causal, seqlen, heads_q, heads_kv, batch, tiles. CompileError says in
    one line why not; ValueError names a GPU that is not known.
    """
    result = compile_cases([case_for(version, gpu, **shape)])[0]
    if isinstance(result, CompileError):
        raise result
    return result


def compile_cases(cases: Iterable[Case]) -> list[list[Compiled] | CompileError]:
    """For each case its kernels, from the cache where they are there, or the error.

    A process that interprets cannot compile: there, another process does it.
    """
    cases = list(cases)
    paths = [_cache_path(case) for case in cases]
    missing = [(case, path) for case, path in zip(cases, paths, strict=True) if not path.exists()]
    if missing:
        from common.hardware import interpreting

        (_compile_elsewhere if interpreting() else _compile_here)(missing)
    return [_load(path) for path in paths]


def _compile_here(missing: list[tuple[Case, pathlib.Path]], forks: bool = False) -> None:
    """Put each case's result where it is looked for. forks: this process has one thread, and can do it in a copy."""
    for case, path in missing:
        if not (case.tiles and _is_gluon(case)):
            _compile_to(case, path)
        elif forks:
            _compile_in_a_fork(case, path)
        else:
            _compile_elsewhere([(case, path)])


def _compile_to(case: Case, path: pathlib.Path) -> None:
    try:
        _store(path, _compile(case))
    except CompileError as error:
        _store(path, error)


def _compile_in_a_fork(case: Case, path: pathlib.Path) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _compile_to(case, path)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if not path.exists():
        _store(path, _ended(case, os.waitstatus_to_exitcode(status)))


def _ended(case: Case, status: int) -> CompileError:
    return CompileError(f"{case.version}, {case.label()}: the compiler ended with exit status {status}")


def _is_gluon(case: Case) -> bool:
    """Gluon kernels state their layouts: tiles that those do not fit may end the process that compiles them."""
    version, _ = _found(case)
    return any(kernel.is_gluon() for kernel in version.kernels if hasattr(kernel, "is_gluon"))


def _compile_elsewhere(missing: list[tuple[Case, pathlib.Path]]) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.machine_code", "--work"]
    work = json.dumps([(case, str(path)) for case, path in missing])
    child = subprocess.run(command, cwd=ROOT, env=env, input=work, capture_output=True, text=True)
    for case, path in missing:
        if not path.exists():
            if len(missing) > 1:  # which of them it was is not known, so nothing can be remembered
                raise CompileError(f"the compiler ended with status {child.returncode}: {child.stderr.strip()[-500:]}")
            _store(path, _ended(case, child.returncode))


def why_not(case: Case) -> str | None:
    """One line on why the version does not run on this GPU or does not serve this call; None where it does."""
    from common.hardware import pretend

    version, gpu = _found(case)
    if reason := version.why_not(gpu, case.dtype):
        return f"{version.name} on {case.arch}: {reason}"
    with pretend(gpu):
        reason = version.declines(*_tensors(case), **_options(case))
    return reason and f"{version.name}, {case.label()}: {reason}"


def own_tiles(case: Case) -> tuple[int, int, int, int] | None:
    """The tiles that the version chooses for the case; None where it does not run."""
    from common.hardware import pretend
    from common.problem import FP8, AttentionProblem

    version, gpu = _found(case)
    if why_not(case):
        return None
    q, k, v = _tensors(case)
    with pretend(gpu):
        if case.family == "decoding":
            problem = AttentionProblem.decoding(q, k, v, fp8_caches=True)
        else:
            q, k, v = (x.to(FP8[case.dtype]) if case.dtype in FP8 else x for x in (q, k, v))
            problem = AttentionProblem.prefill(q, k, v, **_options(case))
        return tuple(version.tiles(problem))


def _found(case: Case) -> tuple[Version, GPU]:
    from common.lineage import find_version

    return find_version(case.family, case.version), gpu_of(case.arch)


def _tensors(case: Case) -> tuple:
    """q, k, v on device "meta", [B, H, S, D] views of [B, S, H, D]; for FP8 16 bits, which the call quantises, but for
    the caches of decoding, which are float8.
    """
    import torch

    from common.problem import FP8

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(case.dtype, torch.float16)

    def tensor(seqlen, heads, dtype=dtype):
        return torch.empty(case.batch, seqlen, heads, case.head_dim, dtype=dtype, device="meta").transpose(1, 2)

    decoding = case.family == "decoding"
    of_cache = FP8.get(case.dtype, dtype) if decoding else dtype
    k, v = (tensor(case.seqlen, case.heads_kv, of_cache) for _ in range(2))
    return tensor(1 if decoding else case.seqlen, case.heads_q), k, v


def _options(case: Case) -> dict:
    if case.family == "decoding":
        return {}
    causal = {"is_causal": case.causal}
    return causal | ({"use_fp8": True, "fp8_dtype": case.dtype} if case.dtype in ("e4m3", "e5m2") else {})


def _compile(case: Case) -> list[Compiled]:
    from common.hardware import pretend, target_of
    from common.launch import Tiles

    version, gpu = _found(case)
    if reason := why_not(case):  # first: a Gluon kernel for another GPU would end the process
        raise CompileError(reason)
    options = _options(case) | ({"tiles": Tiles(*case.tiles)} if case.tiles else {})
    names = {kernel.fn.__name__ for kernel in version.kernels}
    with pretend(gpu), warnings.catch_warnings(), recorded_launches(target_of(gpu)) as launches:
        warnings.simplefilter("ignore")  # that block pointers are deprecated, for one
        try:
            version.call(*_tensors(case), **options)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the compiler's errors have no common class
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {said[-1] if said else ''}"
            raise CompileError(f"{version.name}, {case.label()}: {reason}") from error
    distinct = {compiled.hash: (kernel, constants, compiled) for kernel, constants, compiled in launches}
    kernels = [_examined(case, kernel, kernel in names, *rest) for kernel, *rest in distinct.values()]
    rows, columns, *_ = case.tiles or own_tiles(case)
    tile = {"BLOCK_M": rows, "BLOCK_N": columns}  # a kernel may have them in constants of other names
    main = version.kernels[0].fn.__name__
    return [replace(k, constants=tile | k.constants) if k.kernel == main else k for k in kernels]


@contextlib.contextmanager
def recorded_launches(target):
    """Inside, every kernel[grid](...) is compiled for `target`, not run: a list of (kernel, constexprs, compiled)."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        constants, compiled = _compile_like_launch(self, target, args, kwargs)
        launches.append((self.fn.__name__, constants, compiled))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _compile_like_launch(kernel, target, args: tuple, kwargs: dict):
    """(constexprs, compiled kernel): the first half of JITFunction.run in triton 3.6 to 3.9, without a device."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    with triton.knobs.compilation.scope():
        # triton's cache knows the same kernel from another file or line, whose source lines would be the wrong ones
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options.__dict__)
    constants = {param.name: bound[param.name] for param in kernel.params if param.is_constexpr}
    return {name: value for name, value in constants.items() if isinstance(value, int | float | str)}, compiled


def _examined(case: Case, kernel: str, own: bool, constants: dict, compiled) -> Compiled:
    text = {stage: compiled.asm[stage] for stage in ("ttir", "ttgir", "llir", "ptx", "amdgcn") if stage in compiled.asm}
    cubin = compiled.asm.get("cubin", b"")
    resources = _resources(cubin) if cubin else _amd_resources(text["amdgcn"])
    metadata = compiled.metadata
    return Compiled(
        family=case.family, kernel=kernel, own=own, arch=case.arch, constants=constants, warps=metadata.num_warps,
        stages=constants.get("STAGES", metadata.num_stages), shared=metadata.shared,
        size=len(cubin or compiled.asm["hsaco"]), cubin=base64.b64encode(cubin).decode(),
        text={stage: _relative(listing) for stage, listing in text.items()}, **resources,
    )  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    usage = _run_on(cubin, "cuobjdump", "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "spilled": 0}


def disassembled(cubin: bytes) -> str:
    """SASS with source lines. Takes half a second, so it is kept, and only made when it is needed."""
    path = cache_folder() / "sass" / f"{digest(cubin)}.gz"
    if not path.exists():
        _keep(path, _relative(_run_on(cubin, "nvdisasm", "-c", "-gi")))
    return gzip.decompress(path.read_bytes()).decode()


def _run_on(cubin: bytes, tool: str, *flags: str) -> str:
    """The output of a tool that comes with triton, for this cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([getattr(knobs.nvidia, tool).path, *flags, file.name], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{tool}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def _amd_resources(text: str) -> dict:
    def value(name):
        return int((re.search(rf"\.{name}:\s+(\d+)", text) or [0, 0])[1])

    stack, spilled = value("private_segment_fixed_size"), value("vgpr_spill_count")
    return {"registers": value("vgpr_count"), "stack": stack, "spilled": spilled}


def _relative(listing: str) -> str:
    """Without the folders that this machine has things in."""
    return re.sub(r'"/[^"]*/((?:prefill|decoding|common|triton)(?:/[^"]*)?)"', r'"\1"', listing)


def gpu_of(arch: str) -> GPU:
    """The GPU of common.hardware.KNOWN that stands for an architecture; ValueError names those that exist."""
    from common.hardware import KNOWN

    if arch not in KNOWN:
        raise ValueError(f"architecture {arch!r} is not known; there are {', '.join(KNOWN)}")
    return KNOWN[arch]


# ---- the cache: what a case compiles to, by everything that goes into it


def cache_folder() -> pathlib.Path:
    """The user's cache folder for this project; a temporary one where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return _writable(pathlib.Path(home) / "attention-lineage")


@functools.cache
def _writable(folder: pathlib.Path) -> pathlib.Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return pathlib.Path(tempfile.mkdtemp(prefix="attention-lineage-"))


def digest(*parts) -> str:
    """24 hex digits of files (their content) and of other values."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.read_bytes() if isinstance(part, pathlib.Path) else repr(part).encode())
        whole.update(b"\0")
    return whole.hexdigest()[:24]


def kernel_sources(family: str) -> list[pathlib.Path]:
    """The files that decide what a family compiles to: comments too, because they move line numbers."""
    return sorted([*(ROOT / "common").glob("*.py"), *(ROOT / family).glob("*.py")])


def _cache_path(case: Case) -> pathlib.Path:
    sources = [path for path in kernel_sources(case.family) if path.parent.name == "common" or _is_of(case, path)]
    tuned = [path for path in [cache_folder() / "tiles.json"] if path.exists()]  # versions choose tiles by it
    triton_version = importlib.metadata.version("triton")
    key = digest(case, triton_version, pathlib.Path(__file__), *sources, *tuned)
    return cache_folder() / "machine_code" / f"{key}.json.gz"


def _is_of(case: Case, path: pathlib.Path) -> bool:
    return path.stem.endswith(f"_{case.version}")


def _store(path: pathlib.Path, result: list[Compiled] | CompileError) -> None:
    error = isinstance(result, CompileError)
    plain = {"error": str(result)} if error else {"kernels": [asdict(compiled) for compiled in result]}
    _keep(path, json.dumps(plain))


def _keep(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all; the oldest ones of a folder make room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(gzip.compress(text.encode(), 5))
    temporary.replace(path)
    files = list(path.parent.glob("*.gz"))
    for old in sorted(files, key=_written)[: max(0, len(files) - CACHED_FILES)]:
        old.unlink(missing_ok=True)


def _written(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process made room
        return 0.0


def _load(path: pathlib.Path) -> list[Compiled] | CompileError:
    plain = json.loads(gzip.decompress(path.read_bytes()))
    return CompileError(plain["error"]) if "error" in plain else [Compiled(**fields) for fields in plain["kernels"]]


# ---- tables


class Row(NamedTuple):
    """One line of a table: what it says, the number of each column (None where it has none) and how that is shown."""

    what: str
    values: list[float | None]
    shown: list[str]


def side_by_side(summaries: list[dict], unit: str) -> list[Row]:
    """Summaries as the rows of a table, a column each: facts first, then the main loop's instructions for `unit`.

    The one place that turns summaries into rows: the terminal, the page and the benchmarks show these.
    """

    def tile(s):
        return "x".join(str(s["tiles"][name]) for name in ("BLOCK_M", "BLOCK_N") if name in s["tiles"]) or "-"

    def shared(s):
        over = " (over the limit)" if s["shared"] > s["shared_limit"] else ""
        return f"{s['shared'] / 1024:.0f} KB{over}"

    def plain(what, name):
        return Row(what, [s[name] for s in summaries], [number(s[name]) for s in summaries])

    nothing = [None] * len(summaries)
    rows = [
        Row("tile", nothing, [tile(s) for s in summaries]),
        plain("warps", "warps"),
        plain("pipeline stages", "stages"),
        plain("registers a thread", "registers"),
        plain("spills (loads and stores)", "spills"),
        Row("shared memory", [s["shared"] for s in summaries], [shared(s) for s in summaries]),
        plain("instructions in the main loop", "loop_instructions"),
        Row(f"instructions for {unit}:", nothing, [""] * len(summaries)),
    ]
    kinds = [kind for kind in KINDS if any(kind in s["per_unit"] for s in summaries)]
    counts = {f"  {kind}": [s["per_unit"].get(kind, 0) for s in summaries] for kind in kinds}
    counts["  all"] = [sum(s["per_unit"].values()) for s in summaries]
    return rows + [Row(what, values, [number(value) for value in values]) for what, values in counts.items()]


def number(value: float) -> str:
    """1234, 87.5"""
    return str(round(float(value), 1)).removesuffix(".0")


def machine_code_table(family: str, gpu: GPU | str, fmt: str = "simple", **shape) -> str:
    """What the compiler made of every version of a family for one GPU and shape, a column a version, as text."""
    from common.lineage import versions_of

    versions = versions_of(family)
    cases = [case_for(version, gpu, **shape) for version in versions]
    columns, notes = {}, []
    for version, result in zip(versions, compile_cases(cases), strict=True):
        if isinstance(result, CompileError):
            notes.append(str(result))
        else:
            columns[version.name] = summary(next(compiled for compiled in result if compiled.own))
    title = f"Machine code of {family}, {cases[0].label()} (triton {importlib.metadata.version('triton')})"
    if not columns:
        return "\n".join([title, *notes])
    rows = [[row.what, *row.shown] for row in side_by_side(list(columns.values()), UNIT[family])]
    align = ["left", *["right"] * len(columns)]
    style = {"tablefmt": fmt, "colalign": align, "disable_numparse": True, "preserve_whitespace": True}
    table = tabulate(rows, ["", *columns], **style)
    return "\n".join([title, "", table, *notes])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", default="prefill", choices=tuple(SCORES))
    parser.add_argument("--arch", default="sm_90", help="sm_80 ... sm_120 or gfx942 (default: sm_90)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32", "e4m3", "e5m2"))
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # cases to compile, on standard input
    args = parser.parse_args(argv)
    if args.work:
        work = [(Case(*case), pathlib.Path(path)) for case, path in json.load(sys.stdin)]
        _compile_here(work, forks=True)
        return 0
    shape = {"head_dim": args.head_dim} if args.head_dim else {}
    try:
        print(machine_code_table(args.family, args.arch, dtype=args.dtype, causal=args.causal, **shape))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
