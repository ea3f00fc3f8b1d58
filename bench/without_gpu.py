"""What the benchmark scripts do where there is no GPU: check, compile, and show what was recorded.

python -m bench.without_gpu prefill v1 v2      the check alone; the script runs it with TRITON_INTERPRET=1, which must
                                               be set before Triton is imported and forbids compiling in that process
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import torch

from bench import gate, results
from bench.cases import FP8, Case
from bench.inputs import make_inputs
from bench.providers import OWN, Entrant, NotHere, bind, why_not_case
from common.hardware import INTERPRETER, KNOWN, interpreting
from common.lineage import Version, find_version, triton_version, versions_of

CHECK_SECONDS = 170


def run(family: str, args, earlier: list[results.Record] | None) -> int:
    """The script without a GPU. Exit status 1 where a version is wrong in the interpreter, else 0."""
    print(
        "No GPU here. The versions are checked in Triton's interpreter; a time that it takes is nobody's speed.",
        flush=True,
    )
    names = args.versions or [version.name for version in versions_of(family)]
    wrong = _check_elsewhere(family, names)
    folder = args.out if args.out and results.records_path(args.out, family).exists() else None
    folder = folder or next((f for f in results.folders() if results.records_path(f, family).exists()), None)
    _print_machine_code(family, folder)
    if folder is None:
        print(f"no recorded results of {family} to show: results/ has none")
        return wrong
    _show_recorded(family, folder, args, earlier)
    return wrong


def _check_elsewhere(family: str, names: list[str]) -> int:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # more only fight over arrays this small
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.without_gpu", family, *names],
            cwd=results.ROOT, env=os.environ | threads | {"TRITON_INTERPRET": "1"}, timeout=CHECK_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"the check did not end within {CHECK_SECONDS} s; the versions above it are right")
        return 1
    return int(done.returncode != 0)


def _print_machine_code(family: str, folder) -> None:
    """What the compiler makes of the versions for the GPU that the recorded results come from (else for sm_90)."""
    if interpreting():
        print("no machine code: TRITON_INTERPRET is set, and a process that interprets cannot compile")
        return
    gpu = next((gpu for gpu in KNOWN.values() if folder is not None and gpu.slug == folder.name), KNOWN["sm_90"])
    try:
        from bench.machine_code import machine_code_table

        print(f"\nWhat the compiler makes of them for {gpu.name} ({gpu.arch}):")
        print(machine_code_table(family, gpu))
    except Exception as reason:  # the compiler or its tools may be missing on this machine; the rest is worth showing
        print(f"no machine code: {type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}")


def _show_recorded(family: str, folder, args, earlier) -> None:
    """Table and charts of what was recorded. Charts go to build/, or --out: looking must not change the checkout."""
    from bench.runner import recorded_on, show

    records = results.newest(results.load(folder, family))
    print(f"\n{recorded_on(family, folder)}")
    show(family, folder, records, earlier, args.out or results.ROOT / "build" / "charts" / folder.name)


# ---- inside the process that interprets


def small_cases(family: str, version: Version) -> list[Case]:
    """Shapes that take the interpreter seconds, odd in length and head dimension, with grouped heads and a mask; in
    decoding also lengths, several queries, and pages, where the version has them.
    """
    dtypes = ("fp32", "fp16", "bf16") + (FP8 if version.fp8 else ())
    if family == "prefill":
        shapes = ((1, 4, 2, 130, 130, 64, False), (1, 2, 1, 65, 129, 80, True))
        return [Case(family, dtype, *shape) for dtype in dtypes for shape in shapes]
    shapes = ((2, 4, 2, 1, 517, 64, False), (1, 2, 2, 1, 130, 80, False))
    cases = [Case(family, dtype, *shape) for dtype in dtypes for shape in shapes]
    for dtype in ("fp16", *FP8[:1]):
        ragged = Case(family, dtype, 3, 4, 2, 1, 150, 64, lengths=(0, 150, 33))
        several = replace(ragged, lengths=None, batch=1, seqlen_q=3, causal=True)
        cases += [ragged, replace(ragged, page_size=16), several]
    return [case for case in cases if why_not_case(version, case) is None]


def check_version(version: Version) -> tuple[bool, list[str]]:
    """(all right, a line for each dtype, pages apart): the version against float64 attention, limits as on the GPU."""
    if reason := version.why_not(INTERPRETER):
        return True, [f"  {version.label}: not checked: {reason}"]
    lines, right = {}, True
    for case in small_cases(version.family, version):
        inputs, kind = make_inputs(case, "cpu"), case.dtype + (" in pages" if case.page_size else "")
        expected = gate.expect(inputs)
        limit = gate.error_limit(case, expected)
        try:
            bound = bind(Entrant("version", version.name, OWN), inputs)
            gate.poison(bound.out)
            error, verdict = gate.check(bound(), case, expected, limit)
        except NotHere as reason:  # declined, which is no fault
            lines.setdefault(kind, []).append(f"not checked: {reason}")
            continue
        except Exception as failure:
            error, verdict = None, f"{type(failure).__name__}: {failure}".splitlines()[0]
        right &= verdict == "pass"
        found = "-" if error is None else f"relative error {error:.1e} (limit {limit:.1e})"
        lines.setdefault(kind, []).append(found)
        if verdict != "pass":
            lines[kind].append(f"WRONG at {case.label()}: {verdict}")
    return right, [f"  {version.label}, {kind}: {', '.join(dict.fromkeys(parts))}" for kind, parts in lines.items()]


def check(family: str, names: list[str]) -> int:
    """Print what check_version says of each version; the exit status is 1 where one is wrong."""
    from bench import interpreter

    if triton_version() < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        print(f"  not checked: the interpreter of triton 3.6 needs numpy older than 2.4, this is {np.__version__}")
        return 0
    warnings.filterwarnings("ignore", message=".*make_block_ptr|.*advance")  # deprecated in 3.7, and the point of v3
    warnings.filterwarnings("ignore", message=".*encountered in (divide|log)")  # of a sequence without keys
    interpreter.install()
    torch.set_grad_enabled(False)
    start, status = time.perf_counter(), 0
    for name in names:
        right, lines = check_version(find_version(family, name))
        status |= not right
        print("\n".join(lines), flush=True)
    print(f"  checked in {time.perf_counter() - start:.0f} s")
    return int(status)


if __name__ == "__main__":
    sys.exit(check(sys.argv[1], sys.argv[2:]))
