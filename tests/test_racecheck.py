"""What bench/racecheck.py makes of reports: hand-overs that the tool does not follow, and races."""

import pathlib

from bench.racecheck import races, reports

SOURCE = pathlib.Path(__file__).parents[1] / "decoding/flash_decoding_v8.py"


def line_with(text: str) -> int:
    return next(n for n, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line)


def report(*accesses: tuple[str, str, int]) -> str:
    (kind, file, line), *others = accesses
    found = [f"========= Error: Race reported between {kind} access at split_kernel+0x140 in {file}:{line}"]
    for kind, file, line in others:
        found.append(f"=========     and {kind} access at split_kernel+0x23e0 in {file}:{line} [106 hazards]")
    return "\n".join((*found, "=========", ""))


def test_hand_overs_are_no_races():
    start, special = line_with("def split_kernel("), line_with("gl.warp_specialize(")
    partitions = report(("Read", SOURCE.name, start), ("Write", SOURCE.name, start), ("Write", SOURCE.name, special))
    groups = report(("Write", "two_groups.py", 31), ("Read", "two_groups.py", 43))
    assert len(reports(f"..{partitions}.{groups}passed")) == 2 and not races(partitions + groups)


def test_other_places_are_races():
    """A reduction's memory that arguments are stored over, as in decoding v8 before its barrier."""
    start = line_with("def split_kernel(")
    log = report(("Write", SOURCE.name, start), ("Read", SOURCE.name, start), ("Read", "standard.py", 191))
    log += report(("Write", SOURCE.name, line_with("gl.warp_specialize(") + 1), ("Read", SOURCE.name, start))
    assert [len(accesses) for accesses in races(log + log)] == [3, 2] and races(log + log).total() == 4
