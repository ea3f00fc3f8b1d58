"""Counters that the programs of a kernel draw tickets from: the kernel finds them at zero and leaves them at zero."""

import torch
import triton

from common import replay

GRAPHS = 2**18  # counters that captured graphs may take on a device, a MiB

_of_stream: dict[tuple[int | None, int], torch.Tensor] = {}
_for_graphs: dict[int, torch.Tensor] = {}  # those that no graph has taken yet


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """Int32 zeros, `count` at least, for kernels that are launched on `device` and its current stream next.

    The kernels of a stream run one after the other and share its counters. A graph that is being captured may run
    beside any stream later: it gets counters that nobody has, for good. Those are set aside at a device's first call
    outside of a capture; where there are none, the graph itself begins with a memset.
    """
    if (recording := replay.recording()) is not None:
        return recording.tickets(count, device, tickets)
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    if device.type != "cuda":
        return _stream_counters(count, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _graph_counters(count, device)
    return _stream_counters(count, device, triton.runtime.driver.active.get_current_stream(device.index))


def _stream_counters(count: int, device: torch.device, stream: int) -> torch.Tensor:
    found = _of_stream.get((device.index, stream))
    if found is None or found.numel() < count:
        found = torch.zeros(max(1024, 1 << count.bit_length()), dtype=torch.int32, device=device)
        _of_stream[device.index, stream] = found
        if device.type == "cuda" and device.index not in _for_graphs:
            _for_graphs[device.index] = torch.zeros(GRAPHS, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # graphs run on streams that do not wait for this one
    return found


def _graph_counters(count: int, device: torch.device) -> torch.Tensor:
    free = _for_graphs.get(device.index)
    if free is None or free.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _for_graphs[device.index] = free[count:]
    return free[:count]
