"""Samples and what is made of them."""

import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import timing, tuning
from bench.cases import Case
from bench.gate import expect
from bench.inputs import Inputs, make_inputs
from bench.timing import BUDGET_MS, MOST_SAMPLES, HostClock, samples_a_round, summary
from common.launch import Tiles


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60))
def test_the_middle_lies_between_its_quantiles(samples):
    median, p20, p80 = summary(samples)
    assert min(samples) <= p20 <= median <= p80 <= max(samples)
    assert median == statistics.median(samples)


def test_quantiles_of_known_samples():
    samples = list(range(1, 102))
    random.Random(0).shuffle(samples)
    assert summary(samples) == (51, 21, 81)


def test_one_outlier_does_not_move_the_summary():
    assert summary([1.0] * 19 + [1000.0]) == (1.0, 1.0, 1.0)


def test_slow_calls_are_sampled_less():
    assert samples_a_round(0.01) == MOST_SAMPLES
    assert samples_a_round(BUDGET_MS) == 2
    assert samples_a_round(1000.0) == 1
    counts = [samples_a_round(ms / 10) for ms in range(1, 1000)]
    assert counts == sorted(counts, reverse=True)


class FakeVersion:
    """A version whose candidates take the time that `speeds` gives them; the fastest one's answer is wrong."""

    family, name = "prefill", "v7"
    speeds = {
        Tiles(64, 64, 4, 2): 3.0,
        Tiles(128, 64, 4, 2): 2.0,
        Tiles(128, 128, 8, 2): 1.0,
        Tiles(256, 64, 8, 2): None,
    }

    def tiles(self, problem):
        return Tiles(64, 64, 4, 2)

    def call(self, q, k, v, *, out, tiles, **masks):
        self.last = tiles
        if self.speeds[tiles] is None:
            raise RuntimeError("out of resource: shared memory")
        answer = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out.copy_(answer * (1.5 if tiles.BLOCK_N == 128 else 1.0))


def test_tuning_takes_the_fastest_that_runs_and_is_right(monkeypatch):
    version, remembered = FakeVersion(), {}

    class Clock(HostClock):
        def events(self, call, count):
            call()
            return [version.speeds[version.last]] * count

    inputs = make_inputs(Case("prefill", "fp32", 1, 2, 2, 16, 16, 16), "cpu")
    problem = type("Problem", (), {"out": inputs.q})()
    monkeypatch.setattr(Inputs, "problem", lambda self: problem)
    monkeypatch.setattr(tuning, "remember_tiles", lambda name, problem, tiles: remembered.update({name: tiles}))
    found = tuning.tune(version, inputs, expect(inputs), Clock(), list(version.speeds))
    assert remembered == {"v7": Tiles(128, 64, 4, 2)}
    assert found["tiles"] == Tiles(128, 64, 4, 2)._asdict() and (found["tried"], found["failed"]) == (4, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_measures_what_events_measure():
    clock = timing.CudaClock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    out = torch.empty_like(x)
    call = lambda: torch.mm(x, x, out=out)  # noqa: E731
    walk = clock.capture([call, call])
    assert walk.calls >= timing.CALLS_IN_GRAPH
    in_graph, alone = min(clock.replays(walk, 20)), min(clock.events(call, 20))  # others may be using the GPU
    assert 0.5 < in_graph / alone < 2.0
