"""What the tests of the diff and of the page share: records that were made up, and the machine code, compiled once."""

import fcntl
import itertools

import synthetic

from bench import machine_code, results, version_diff
from common.lineage import FAMILIES, find_version, versions_of


def made_up_records(folder):
    """results/nvidia-h200 under `folder`, for every version that there is, with today's hashes."""
    for family in FAMILIES:
        versions = {f"v{index}": version for index, version in enumerate(versions_of(family), 1)}
        records = synthetic.records(family, versions=len(versions))
        for record in records:
            if record["role"] == "version":
                version = versions[record["version"]]
                record |= {"version": version.name, "source_hash": version.source_hash}
            record.pop("stale", None)
        results.append(folder / "nvidia-h200", family, records)
        results.save_env(folder / "nvidia-h200", family, synthetic.RUN, synthetic.environment()[synthetic.RUN])


def pairs_of(family: str) -> list[tuple[str, str]]:
    """Any two versions, the older one first."""
    return list(itertools.combinations([version.name for version in versions_of(family)], 2))


def with_tiles_of(patch):
    """Of older versions' tiles a version is compiled with its parent's and v1's alone: all take minutes."""
    alone = version_diff.Gatherer.alone

    def some(old, new):
        parent = find_version(new.family, new.version).parent
        return alone(old, new) if old.version in ("v1", f"v{parent}") else None

    patch.setattr(version_diff.Gatherer, "alone", staticmethod(some))


def compile_everything():
    """The machine code that pairs and page show; two test processes have a family each and wait for each other's."""
    for wait in (fcntl.LOCK_NB, 0):
        for family in FAMILIES:
            with open(machine_code.cache_folder() / f"tests-{family}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | wait)
                except BlockingIOError:
                    continue
                first = versions_of(family)[0].name
                requests = [version_diff.Request(family, *pair) for pair in [(first, first), *pairs_of(family)]]
                version_diff.Gatherer(family).prepare(requests)
