"""The process that measures: what a crash, a hang, a library's chatter and an exception cost. Needs no GPU."""

import dataclasses
import pathlib

import pytest

from bench.cases import Case
from bench.providers import Entrant, NotHere
from bench.worker import Failed, Server, Worker, WorkerLost, case_from, explain
from common.hardware import INTERPRETER

CASE = Case("prefill", "fp32", 1, 2, 2, 16, 16, 16)


@pytest.fixture(scope="module")
def worker():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
        worker = Worker("cpu", load=("crashing_providers",))
        yield worker
        worker.stop()


def enter(worker, name, timeout=120.0, case=CASE):
    entrant = dataclasses.asdict(Entrant("peer", name))
    return worker.ask("enter", timeout, case=dataclasses.asdict(case), entrant=entrant, seed=0)


def test_what_libraries_print_does_not_reach_the_answers(worker):
    assert enter(worker, "chatters")["gate"] == "pass"


def test_an_exception_costs_one_answer(worker):
    with pytest.raises(Failed, match="^RuntimeError: no kernel for this$"):
        enter(worker, "raises")
    assert enter(worker, "eager")["gate"] == "pass"


def test_out_of_memory_is_said_in_three_words(worker):
    with pytest.raises(Failed, match="^out of memory$"):
        enter(worker, "hungry")


def test_what_a_provider_does_not_do_is_not_a_failure(worker):
    with pytest.raises(NotHere, match="takes fp16, bf16"):
        enter(worker, "fa2")


def test_a_crash_is_told_from_an_answer_and_the_next_request_starts_afresh(worker):
    with pytest.raises(WorkerLost, match="ended with status 7"):
        enter(worker, "dies")
    assert enter(worker, "eager")["gate"] == "pass"
    with pytest.raises(WorkerLost, match="no answer within 1 s"):
        enter(worker, "hangs", timeout=1.0)


def test_a_module_that_does_not_import_is_a_failure():
    worker = Worker("cpu", load=("no_such_module_anywhere",))
    with pytest.raises(Failed, match="ModuleNotFoundError"):
        worker.ask("hello", timeout=120.0)
    worker.stop()


def test_cases_survive_json():
    case = Case("prefill", "bf16", 2, 4, 2, 8, 8, 16, True, (3, None), (8, 5), "bhsd", "seed", 16)
    fields = dataclasses.asdict(case) | {"window": [3, None], "lengths": [8, 5]}
    assert case_from(fields) == case


@pytest.mark.parametrize("error, line", [(ValueError("a\n b"), "ValueError: a"), (KeyError(), "KeyError")])
def test_exceptions_become_one_line(error, line):
    assert explain(error) == line


def test_an_error_that_stays_in_the_context_ends_the_process():
    """After an illegal access every later call fails, synchronising among them: the answer says so."""

    class Ruined:
        device = type("Device", (), {"type": "cpu"})()

        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    reply = Server(Ruined(), INTERPRETER).answer({"do": "load", "module": "no_such_module_anywhere"})
    assert reply["broken"] and reply["failed"].startswith("ModuleNotFoundError")
