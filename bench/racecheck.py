"""compute-sanitizer's racecheck over tests of the versions in Gluon, and what of its reports is about them.

    python -m bench.racecheck [arguments of pytest]

racecheck does not follow barriers of some of a program's warps. A kernel that has nothing but warp_specialize is clean;
with a barrier in its first partition, or before it, the number by which Triton tells a partition what to do is reported
as a race between the threads that write it and those that read it, though a barrier of all warps stands between. So is
what one group of warps hands over to another, where one thread says for all that it is there, behind a barrier of its
group. Reports of these two kinds are counted (tests/compile_only looks at the barriers); any other is a race, and so is
what pytest finds wrong.
"""

from __future__ import annotations

import collections
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHOSEN = "(v8 or v9 or v10 or v11) and not fp32 and (test_shapes and (D128 or D64-64) or test_values and fp16)"
FILES = ("tests/test_contract_decoding.py", "tests/test_contract_fp8_caches.py", "tests/test_contract_prefill.py")
ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\S+):(\d+)")


class Access(NamedTuple):
    kind: str  # Read or Write
    kernel: str
    file: str  # its name alone
    line: int


def reports(log: str) -> list[tuple[Access, ...]]:
    """The accesses of each report in what racecheck printed."""
    found = []
    for line in log.splitlines():
        if "Race reported between" in line:
            found.append([])
        if found and (access := ACCESS.search(line)):
            kind, kernel, file, number = access.groups()
            found[-1].append(Access(kind, kernel, pathlib.Path(file).name, int(number)))
    return [tuple(accesses) for accesses in found]


def is_hand_over(access: Access) -> bool:
    """Whether it is at a line that begins a kernel of ours, has warp_specialize (or an `if` of it), or belongs to
    common/two_groups.py.
    """
    for folder in ("prefill", "decoding"):
        path = ROOT / folder / access.file
        if path.exists():
            line, after = [*path.read_text().splitlines(), ""][access.line - 1 : access.line + 1]
            return line.startswith(f"def {access.kernel}(") or "gl.warp_specialize(" in line + after
    return access.file == "two_groups.py"


def races(log: str) -> collections.Counter[tuple[Access, ...]]:
    """The reports that are not of hand-overs, and how often each came."""
    return collections.Counter(accesses for accesses in reports(log) if not all(map(is_hand_over, accesses)))


def compute_sanitizer() -> str | None:
    """Its path: the CUDA toolkit's folder is seldom on the shell's."""
    found = pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next(map(str, found), None)


def main(argv: list[str]) -> int:
    tool = compute_sanitizer()
    if tool is None:
        print("compute-sanitizer is not here; it comes with the CUDA toolkit")
        return 2
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", *(argv or [*FILES, "-k", CHOSEN])]
    command, lines = [tool, "--tool", "racecheck", "--print-limit", "10000", *pytest], []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="")
            lines.append(line)
    log = "".join(lines)
    found, ours = len(reports(log)), races(log)
    print(f"{found - ours.total()} reports of hand-overs between groups of warps, {len(ours)} other races")
    for accesses, count in ours.most_common():
        print(f"{count} times:", *(f"{x.kind} in {x.kernel}, {x.file}:{x.line}" for x in accesses), sep="\n  ")
    failed = not re.search(r"^\d+ passed", log, re.M) or re.search(r"\d+ (failed|errors?)\b.* in ", log)
    return int(bool(failed or ours))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
