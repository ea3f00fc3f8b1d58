"""On a GPU: the current stream and device are respected, and calls can be captured in a CUDA graph."""

import math

import pytest
import torch
from attention_checks import Case, all_versions, assert_close, needs_gpu, skip_unless_served

pytestmark = [needs_gpu]
every_version = all_versions("prefill", "decoding")


def problem(version, device):
    """q, k, v and the options of a call: lengths where the version takes them."""
    case = Case(2, 4, 2, 100 if version.family == "prefill" else 1, 300, 64, lengths_k=(300, 77), layout="bshd")
    q, k, v = case.tensors("fp16", device)
    options = case.options(device)
    if version.declines(q, k, v, **options):
        options = {}
    skip_unless_served(version, q, k, v, **options)
    return q, k, v, options


@every_version
def test_current_stream(version, device):
    """Work that a stream queued before the call is seen by it: q is written on that stream, late."""
    q, k, v, options = problem(version, device)
    late = torch.full_like(q, math.nan)
    version.call(late, k, v, **options)  # compile first
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        out = version.call(late, k, v, **options)
    stream.synchronize()
    assert_close(out, q, k, v, "fp16", **options)


@every_version
def test_cuda_graph(version, device):
    """Captured and replayed on other inputs: no allocation outside the graph's pool, no reading back, no tuning."""
    q, k, v, options = problem(version, device)
    static = [torch.randn_like(x) for x in (q, k, v)]
    static_options = {name: torch.full_like(x, 5) for name, x in options.items()}
    out = torch.full_like(q, math.nan)
    version.call(*static, **static_options, out=out, return_lse=True)  # compile first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = version.call(*static, **static_options, out=out, return_lse=True)
    for x, y in zip((*static, *static_options.values()), (q, k, v, *options.values()), strict=True):
        x.copy_(y)
    out.fill_(math.nan)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert_close(out, q, k, v, "fp16", lse=lse, **options)


@every_version
def test_not_the_current_device(version, device):
    """Tensors on another GPU than the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1 - device.index)
    q, k, v, options = problem(version, other)
    assert_close(version.call(q, k, v, **options), q, k, v, "fp16", **options)
    assert torch.cuda.current_device() == device.index
