"""The process that touches the GPU, and the handle by which the script drives it: one JSON object a line each way.

The script itself holds no GPU. So a kernel that hangs, crashes or ruins the CUDA context costs its own numbers and a
restart, never the run; and libraries that cannot share a process (two CUDA runtimes) run in one each, while the script
walks through all of them round by round.

    python -m bench.worker [cuda|cpu]     reads {"do": ..., ...} from stdin, answers {"ok": ...} or {"failed": reason}
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import torch

from bench import gate, providers, roofline, tuning
from bench.cases import Case
from bench.inputs import Inputs, make_inputs
from bench.providers import Bound, Entrant, NotHere
from bench.results import ROOT
from bench.timing import BUDGET_MS, CALLS_IN_GRAPH, CudaClock, HostClock
from common.hardware import GPU, INTERPRETER, detect_gpu
from common.lineage import find_version

COMPILE_THREADS = 8
FAMILY_TIMINGS = {"prefill": ("events",), "decoding": ("graph", "eager")}
CALLS_ALONE = 40


def timings_of(family: str, entrant: Entrant) -> tuple[str, ...]:
    """How an entrant is timed. Other ways to call a version launch the same kernel: only the launch is new."""
    return ("eager",) if entrant.variant in (providers.PLAIN, providers.PLAN) else FAMILY_TIMINGS[family]


# ---- inside the process


class Call:
    """One call of a bound provider, into `out` or into memory of its own; remembers what it returned last."""

    def __init__(self, bound: Bound, out: torch.Tensor | None):
        self.bound, self.out, self.last = bound, out, None

    def __call__(self) -> torch.Tensor:
        self.last = self.bound.run(self.out)
        return self.last


class Entry:
    """One entrant on the current case: its first call, its gate, and its samples."""

    def __init__(self, bench: Bench, entrant: Entrant):
        self.bench, self.clock = bench, bench.clock
        bounds = [providers.bind(entrant, inputs) for inputs in bench.copies]
        self.bound = bounds[0]
        self.calls = [Call(bound, bound.out) for bound in bounds]
        self.user_calls = [Call(bound, None) for bound in bounds]  # a user lets the call allocate its output
        self.limit = gate.error_limit(bench.case, bench.expected, self.bound.eight_bit_output)
        self.walk = None

    def first_call(self) -> dict:
        """Runs it on poisoned memory and checks the answer. What comes back goes into the record."""
        if self.bound.out is None:
            q = self.bench.inputs.q
            gate.poison_free_memory(q.numel() * q.element_size(), q.device)
        else:
            gate.poison(self.bound.out)
        with self.bound.context():
            out, milliseconds = self.clock.once(self.calls[0])
        error, verdict = self._check(out)
        found = {
            "gate": verdict,
            "error": error,
            "error_limit": self.limit,
            "config": self.bound.config,
            "first_call_ms": milliseconds,
        }
        if self.bench.expected.unquantised is not None and error is not None:
            found["error_unquantised"] = self.bench.expected.error_unquantised(self.bound.finish(out))
        return found

    def prepare(self, timing: str) -> dict:
        """Makes ready to sample, and says how long one sample takes, in ms; of eager calls also one alone."""
        more = {}
        with self.bound.context():
            if timing == "graph":
                self.walk = self.clock.capture(self.calls)
                for result in self.walk.results:
                    gate.poison(result)
                calls, milliseconds = self.walk.calls, self.clock.replays(self.walk, 1)[0]
                reason = self._first_wrong(self.walk.results)
            elif timing == "eager":
                calls, milliseconds = max(len(self.calls), CALLS_IN_GRAPH), self.clock.eager(self.user_calls, 1)[0]
                count = max(5, min(CALLS_ALONE, int(BUDGET_MS / milliseconds)))
                more = {"latency_ms": statistics.median(self.clock.alone(self.user_calls, count))}
                reason = self._first_wrong([call.last for call in self.user_calls if call.last is not None])
            else:
                calls, milliseconds, reason = 1, self.clock.events(self.calls[0], 1)[0], "pass"
        return {"sample_ms": calls * milliseconds, "gate": reason} | more

    def peak_memory_mb(self) -> float:
        """Memory that a call takes beyond its inputs, output included."""
        with self.bound.context():
            return self.clock.peak_memory_mb(lambda: self.bound.run(None)) + self.bound.resident_mb

    def samples(self, timing: str, count: int) -> list[float]:
        with self.bound.context():
            if timing == "graph":
                return self.clock.replays(self.walk, count)
            if timing == "eager":
                return self.clock.eager(self.user_calls, count)
            return self.clock.events(self.calls[0], count)

    def final_check(self, timing: str) -> dict:
        """The gate again, on what the timed calls left behind."""
        if timing == "graph":
            return {"gate": self._first_wrong(self.walk.results)}
        calls = self.user_calls if timing == "eager" else self.calls
        return {"gate": self._first_wrong([call.last for call in calls if call.last is not None])}

    def _first_wrong(self, outs: list[torch.Tensor]) -> str:
        verdicts = (self._check(out)[1] for out in outs)
        return next((verdict for verdict in verdicts if verdict != "pass"), "pass")

    def _check(self, out: torch.Tensor) -> tuple[float | None, str]:
        return gate.check(self.bound.finish(out), self.bench.case, self.bench.expected, self.limit)


class Bench:
    """All entrants on one case at a time, on one device."""

    def __init__(self, clock: CudaClock | HostClock):
        self.clock = clock
        self.case: Case | None = None
        self.inputs: Inputs | None = None
        self.entries: dict[Entrant, Entry] = {}

    def take(self, case: Case, seed: int) -> None:
        """Makes the inputs of a case and its expected answer, unless they are there."""
        if case == self.case:
            return
        self.drop()
        self.inputs = make_inputs(case, self.clock.device, seed)
        self.expected = gate.expect(self.inputs, seed)
        copies = self.clock.copies_to_outrun_l2(case.bytes()) if case.family == "decoding" else 1
        self.copies = [self.inputs, *(self.inputs.copy() for _ in range(copies - 1))]
        self.case = case

    def drop(self) -> None:
        """Frees what the last case held."""
        self.case = self.inputs = self.expected = self.copies = None
        self.entries.clear()
        gc.collect()
        if self.clock.device.type == "cuda":
            torch.cuda.empty_cache()

    def enter(self, case: Case, entrant: Entrant, seed: int) -> dict:
        """First call, gate and peak memory of an entrant."""
        self.take(case, seed)
        entry = Entry(self, entrant)
        result = entry.first_call()
        if result["gate"] == "pass":
            result["peak_mem_mb"] = entry.peak_memory_mb()
            self.entries[entrant] = entry
        return result


class Server:
    """Answers requests. Every method named do_X answers {"do": X}."""

    def __init__(self, clock: CudaClock | HostClock, gpu: GPU):
        self.bench, self.gpu = Bench(clock), gpu

    def answer(self, request: dict) -> dict:
        """{"ok": result}, {"absent": reason} or {"failed": reason}; "broken": the process is of no more use."""
        request = dict(request)
        try:
            return {"ok": getattr(self, "do_" + request.pop("do"))(**request)}
        except NotHere as reason:
            return {"absent": str(reason)}
        except Exception as error:
            reply = {"failed": explain(error)}
            error.__traceback__ = None  # it holds the tensors of the frames that failed
        gc.collect()
        try:
            self.bench.clock.synchronize()
            if self.bench.clock.device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception:  # an error that stays in the CUDA context
            reply["broken"] = True
        return reply

    def do_hello(self) -> dict:
        """The GPU's fields and its slug."""
        return dataclasses.asdict(self.gpu) | {"slug": self.gpu.slug}

    def do_load(self, module: str) -> None:
        """Imports a module: a library that may refuse to, or a test's own providers."""
        importlib.import_module(module)

    def do_why_not(self, family: str, names: list[str], dtypes: list[str]) -> dict:
        """{version: {dtype: why it cannot run here, or null}}"""
        versions = [find_version(family, name) for name in names]
        return {version.name: {dtype: version.why_not(self.gpu, dtype) for dtype in dtypes} for version in versions}

    def do_ceilings(self, family: str, dtypes: list[str]) -> dict:
        if self.bench.clock.device.type != "cuda":
            return {"ceilings": [], "said": []}
        said = []
        found = roofline.measure(self.bench.clock, dtypes, family, said.append)
        return {"ceilings": [dataclasses.asdict(ceiling) for ceiling in found], "said": said}

    def do_compile(self, pairs: list, seed: int) -> list[float | None]:
        """Calls each (case, entrant) once, in threads, so that kernels compile side by side: milliseconds of each.

        None for those that fail: they fail again, and say why, when they are measured.
        """
        tensors: dict[Case, Inputs] = {}  # a causal case shares the tensors of the full one
        tasks = []
        for case, entrant in ((case_from(case), Entrant(**entrant)) for case, entrant in pairs):
            full = dataclasses.replace(case, causal=False)
            if full not in tensors:
                tensors[full] = make_inputs(full, self.bench.clock.device, seed)
            tasks.append((entrant, dataclasses.replace(tensors[full], case=case)))
        self.bench.clock.synchronize()
        with concurrent.futures.ThreadPoolExecutor(min(COMPILE_THREADS, os.cpu_count() or 1)) as pool:
            milliseconds = list(pool.map(_call_once, tasks))
        self.bench.clock.synchronize()
        return milliseconds

    def do_tune(self, case: dict, name: str, seed: int) -> dict:
        self.bench.take(case_from(case), seed)
        return tuning.tune(find_version(case["family"], name), self.bench.inputs, self.bench.expected, self.bench.clock)

    def do_enter(self, case: dict, entrant: dict, seed: int) -> dict:
        return self.bench.enter(case_from(case), Entrant(**entrant), seed)

    def do_prepare(self, entrant: dict, timing: str) -> dict:
        return self._entry(entrant).prepare(timing)

    def do_samples(self, entrant: dict, timing: str, count: int) -> list[float]:
        return self._entry(entrant).samples(timing, count)

    def do_final_check(self, entrant: dict, timing: str) -> dict:
        return self._entry(entrant).final_check(timing)

    def do_drop(self) -> None:
        self.bench.drop()

    def _entry(self, entrant: dict) -> Entry:
        return self.bench.entries[Entrant(**entrant)]


def _call_once(task: tuple[Entrant, Inputs]) -> float | None:
    entrant, inputs = task
    torch.set_grad_enabled(False)  # a setting of each thread
    start = time.perf_counter()
    try:
        providers.bind(entrant, inputs)()
    except Exception:
        return None
    return 1e3 * (time.perf_counter() - start)


def case_from(fields: dict) -> Case:
    """A Case that went through JSON."""
    fields = dict(fields)
    for name in ("window", "lengths"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Case(**fields)


def explain(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def serve(device: str) -> None:
    """Read requests from stdin, answer on what stdout was; everything that libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the script's to handle
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    if device == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
        gpu = detect_gpu(here)
        server = Server(CudaClock(here, gpu.l2_bytes), gpu)
    else:
        server = Server(HostClock(), INTERPRETER)
    for line in sys.stdin:
        reply = server.answer(json.loads(line))
        answers.write(json.dumps(reply) + "\n")
        if reply.get("broken"):
            return


# ---- in the script


class WorkerLost(Exception):
    """The process died or did not answer in time; the message says which."""


class Failed(Exception):
    """The request failed inside the process, which lives on."""


class Worker:
    """A process of its own that answers requests. It starts with the first one, and again after it was lost."""

    def __init__(self, device: str = "cuda", load: tuple[str, ...] = ()):
        self.device, self.load = device, load
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process without waiting for it."""
        if self._process is not None:
            return
        self._log = tempfile.TemporaryFile()  # lives as long as the process
        command = [sys.executable, "-m", "bench.worker", self.device]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **streams)
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        self._loaded = False

    def ask(self, do: str, timeout: float = 60.0, **request) -> Any:
        """The answer to a request, within `timeout` seconds.

        Raises NotHere and Failed with the process's reason; WorkerLost where it is gone (the next request starts one).
        """
        self.start()
        if not self._loaded:
            self._loaded = True
            for module in self.load:
                self.ask("load", timeout=120.0, module=module)
        reply = self._exchange({"do": do} | request, timeout)
        if "ok" in reply:
            return reply["ok"]
        if "absent" in reply:
            raise NotHere(reply["absent"])
        if reply.get("broken"):
            self.stop()
            raise WorkerLost(reply["failed"])
        raise Failed(reply["failed"])

    def _exchange(self, request: dict, timeout: float) -> dict:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            raise WorkerLost(f"no answer within {timeout:.0f} s") from None
        except OSError:
            line = None
        if line is None:
            reason = self._last_words()
            self.stop()
            raise WorkerLost(reason)
        return json.loads(line)

    def _last_words(self) -> str:
        """How the process ended, and the last line that it wrote."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "?"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with status {code}" + (f": {lines[-1][:160]}" if lines else "")

    def stop(self) -> None:
        """Ends the process, if it is there."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.stdin.close()
            process.wait(timeout=3)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # one that the driver holds ends when the driver lets it
                process.wait(timeout=10)


def _pump(stream, answers: queue.Queue) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


if __name__ == "__main__":
    serve(sys.argv[1] if len(sys.argv) > 1 else "cuda")
