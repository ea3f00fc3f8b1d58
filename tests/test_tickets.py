"""Counters that kernels share: zeros, of one stream or one graph alone."""

import pytest
import torch
from attention_checks import needs_gpu

from common import tickets as tickets_module
from common.tickets import tickets


@pytest.fixture(autouse=True)
def nothing_handed_out(monkeypatch):
    monkeypatch.setattr(tickets_module, "_of_stream", {})
    monkeypatch.setattr(tickets_module, "_for_graphs", {})
    monkeypatch.setattr(tickets_module, "_taken", [])


def test_zeros_that_the_next_call_finds_again(device):
    """The same memory for every call of a stream, unless more is needed; what is there is left as it is."""
    first = tickets(5, device)
    assert first.dtype == torch.int32 and first.numel() >= 5 and not first.any()
    first[0] = 7
    assert tickets(3, device).data_ptr() == first.data_ptr() and tickets(3, device)[0] == 7
    more = tickets(first.numel() + 1, device)
    assert more.numel() > first.numel() and not more.any()


def test_compiling_takes_none():
    assert tickets(5, torch.device("meta")).device.type == "meta"
    assert not tickets_module._of_stream


@needs_gpu
def test_streams_do_not_share(device):
    first, side = tickets(5, device), torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert tickets(5, device).data_ptr() != first.data_ptr()
    assert tickets(5, device).data_ptr() == first.data_ptr()


@needs_gpu
@pytest.mark.parametrize("set_aside", [True, False])
def test_graphs_do_not_share(device, set_aside):
    """Two captured calls have counters of their own, zero at the first replay, whether or not a call came before."""
    own = [tickets(5, device)] if set_aside else []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own += [tickets(5, device)[:5], tickets(5, device)[:5]]
    graph.replay()
    torch.cuda.synchronize()
    assert len({x.data_ptr() for x in own}) == len(own) and not any(x.any() for x in own)


def test_counters_of_graphs_stay_when_new_ones_are_set_aside(monkeypatch):
    """Nobody else gets them, and their memory is not given back while graphs may still be replayed."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(tickets_module, "GRAPHS", 64)
    tickets_module._set_aside(None, cpu)
    first = tickets_module._graph_counters(40, cpu)
    first[:] = 7
    left = tickets_module._for_graphs[None]
    tickets_module._set_aside(left, cpu)
    second = tickets_module._graph_counters(40, cpu)
    assert not second.any() and (first == 7).all() and left.numel() == 24
    memory = {x.untyped_storage().data_ptr() for x in (first, second)}
    kept = {x.untyped_storage().data_ptr() for x in (*tickets_module._taken, *tickets_module._for_graphs.values())}
    assert len(memory) == 2 and memory == kept


@needs_gpu
def test_counters_for_graphs_do_not_run_out(device, monkeypatch):
    """A call outside of a capture finds half of them gone, and sees to it."""
    monkeypatch.setattr(tickets_module, "GRAPHS", 64)
    tickets(5, device)
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tickets(40, device)
        tickets(5, device)
        assert tickets_module._for_graphs[device.index].numel() == 64
