"""Counters that the programs of a kernel draw tickets from: the kernel finds them at zero and leaves them at zero."""

import torch
import triton

from common import replay

GRAPHS = 2**18  # counters that captured graphs may take on a device, a MiB

_of_stream: dict[tuple[int | None, int], torch.Tensor] = {}
_for_graphs: dict[int, torch.Tensor] = {}  # those that no graph has taken yet
_taken: list[torch.Tensor] = []  # what is left of memory that graphs have counters in, kept for them


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """Int32 zeros, `count` at least, for kernels that are launched on `device` and its current stream next.

    The kernels of a stream run one after the other and share its counters. A graph that is being captured may run
    beside any stream later: it gets counters that nobody has, for good. Those are set aside by a device's first call
    outside of a capture, and again by one that finds half of them gone; where none are left, the graph makes its own by
    a memset before each kernel, which takes 1 us, and as much again of a kernel that begins under the one before it.
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
    if device.type == "cuda":
        free = _for_graphs.get(device.index)
        if free is None or free.numel() < GRAPHS // 2:
            _set_aside(free, device)
    return found


def _set_aside(free: torch.Tensor | None, device: torch.device):
    """New counters for graphs; `free` are those that are left of the last ones."""
    if free is not None:
        _taken.append(free)
    _for_graphs[device.index] = torch.zeros(GRAPHS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # graphs run on streams that do not wait for this one


def _graph_counters(count: int, device: torch.device) -> torch.Tensor:
    free = _for_graphs.get(device.index)
    if free is None or free.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _for_graphs[device.index] = free[count:]
    return free[:count]
