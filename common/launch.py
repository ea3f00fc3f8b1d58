"""The one place that kernels start from: tiles per GPU, padded head dimensions, the device guard, the launch itself."""

import functools
import json
import os
import pathlib
from typing import NamedTuple

import torch
from triton.runtime.jit import JITFunction

from common import dispatch, replay
from common.hardware import detect_gpu
from common.problem import AttentionProblem


class Tiles(NamedTuple):
    """How one program is cut: rows and keys of its blocks, warps, and stages of the software pipeline.

    In decoding BLOCK_M counts the query heads that one program serves.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def block_d(problem: AttentionProblem) -> int:
    """head_dim padded to a power of two that the tensor cores take: at least 16, 32 for float8."""
    width = 1 << (problem.head_dim - 1).bit_length()  # triton.next_power_of_2 takes 3 us
    return max(32 if problem.fp8 else 16, width)


# Plain Triton's tiles, [shared memory class][bytes of an element][padded head_dim up to]. 163 KB and more: A100, H100,
# B200; 99 KB: the other NVIDIA GPUs; 64 KB: AMD. Each compiles without spills (tests/compile_only); the sm_90 ones were
# measured (docs/method.md).
_PLAIN_TILES = {
    "sm_90": {
        2: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 128, 8, 3), 256: Tiles(128, 64, 8, 2)},
        1: {64: Tiles(64, 128, 4, 3), 128: Tiles(128, 128, 8, 3), 256: Tiles(64, 64, 8, 3)},
        4: {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 2)},
    },
    "large": {
        2: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
        1: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 3)},
        4: {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    },
    "small": {
        2: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 2)},
        1: {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 3)},
        4: {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 2)},
    },
}


# Where a version does best with other tiles: version -> architecture -> the like.
_OWN_TILES = {
    "v4": {"sm_90": {1: {128: Tiles(64, 128, 4, 3)}}},
    "v5": {
        "sm_90": {
            2: {64: Tiles(64, 128, 4, 2), 128: Tiles(128, 128, 4, 2), 256: Tiles(128, 64, 8, 2)},
            1: {64: Tiles(64, 128, 4, 3), 128: Tiles(64, 128, 4, 2)},
        }
    },
}


def plain_tiles(problem: AttentionProblem, version: str | None = None) -> Tiles:
    """The tiles that plain Triton kernels, or this version's, take on the current GPU for this head_dim and dtype."""
    gpu = detect_gpu(problem.q.device)
    return _plain_tiles(gpu.arch, gpu.shared_memory, version, problem.dtype.itemsize, block_d(problem))


@functools.cache
def _plain_tiles(arch: str, shared_memory: int, version: str | None, itemsize: int, width: int) -> Tiles:
    tables = _PLAIN_TILES.get(arch) or _PLAIN_TILES["large" if shared_memory >= 160 * 1024 else "small"]
    own = _OWN_TILES.get(version, {}).get(arch, {}).get(itemsize, {})
    width = max(width, 64)
    return own.get(width) or tables[itemsize][width]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def launch(kernel, grid: tuple, device: torch.device, *args, **options):
    """Run kernel[grid](*args, **options) on `device` and its current stream; an empty grid launches nothing.

    enable_fp_fusion is spelled out because Triton 3.10 turns its default off.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"] = True
    if (recording := replay.recording()) is not None:
        recording.launches.append((kernel, grid, args, options))
        return
    if device.type != "cuda" or not isinstance(kernel, JITFunction):  # interpreted, or compiled and not run
        kernel[grid](*args, **options)
    elif device.index == torch.cuda.current_device():
        dispatch.run(kernel, grid, device, args, options)
    else:
        with torch.cuda.device(device):
            dispatch.run(kernel, grid, device, args, options)


def launch_attention(kernel, grid: tuple, problem: AttentionProblem, tiles: Tiles, **extra):
    """Launch a prefill kernel: the arguments that every version takes, in the order that every version takes them."""
    p = problem
    q, k, v, out = p.q, p.k, p.v, p.out
    BLOCK_M, BLOCK_N, num_warps, num_stages = tiles
    launch(
        kernel, grid, q.device,
        q, k, v, out, p.lse, p.seqlens_q, p.seqlens_k, q.stride(), k.stride(), v.stride(), out.stride(),
        p.heads_q, p.heads_kv, p.seqlen_q, p.seqlen_k, p.scale, p.window_left, p.window_right,
        HEAD_DIM=p.head_dim, BLOCK_D=block_d(p), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps,
        num_stages=num_stages, **extra,
    )  # fmt: skip


# ---- tiles that `--tune` found on this machine


def _tuned_file() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "attention-lineage" / "tiles.json"


@functools.cache
def _tuned() -> dict:
    try:
        return json.loads(_tuned_file().read_text())
    except (OSError, ValueError):
        return {}


def tuning_key(version: str, problem: AttentionProblem) -> str:
    """What tuned tiles are remembered under: version, GPU, dtype, padded head_dim, masked or not."""
    dtype = str(problem.k.dtype).removeprefix("torch.")
    mask = "full" if problem.window_left is None and problem.window_right is None else "masked"
    return f"{version}|{detect_gpu().slug}|{dtype}|{block_d(problem)}|{mask}"


def tuned_tiles(version: str, problem: AttentionProblem) -> Tiles | None:
    """The tiles that remember_tiles stored for this version and kind of problem on this GPU, or None."""
    if not _tuned():
        return None
    found = _tuned().get(tuning_key(version, problem))
    return Tiles(*found) if found else None


def remember_tiles(version: str, problem: AttentionProblem, tiles: Tiles):
    """Store tiles for later calls, of this and later processes, under the user's cache folder."""
    path = _tuned_file()
    _tuned()[tuning_key(version, problem)] = list(tiles)
    replay.forget()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(_tuned(), indent=1, sort_keys=True))
    temporary.replace(path)
