"""Where kernels start from: tile tables without holes, launches of nothing, tuned tiles that survive and do not mix."""

import json

import pytest
import torch

from common import launch as launch_module
from common.hardware import KNOWN, pretend
from common.launch import Tiles, block_d, cdiv, launch, plain_tiles, remember_tiles, tuned_tiles, tuning_key
from common.problem import AttentionProblem


def problem(head_dim=64, dtype=torch.float16, **options) -> AttentionProblem:
    q = torch.empty(1, 2, 33, head_dim, dtype=dtype, device="meta")
    if dtype.itemsize == 1:
        options |= {"use_fp8": True, "fp8_dtype": "e4m3" if dtype is torch.float8_e4m3fn else "e5m2"}
    return AttentionProblem.prefill(q, q, q, **options)


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_plain_tiles_for_every_gpu_and_width(arch, dtype):
    """A hole in the table; tiles that tensor cores do not take; more shared memory than a block may use."""
    if dtype.itemsize == 1 and KNOWN[arch].capability < (8, 9) or dtype.itemsize == 1 and KNOWN[arch].backend == "hip":
        pytest.skip("no FP8 there")
    with pretend(KNOWN[arch]):
        for head_dim in (1, 16, 59, 64, 80, 111, 128, 129, 256):
            asked = problem(head_dim, dtype)
            tiles = plain_tiles(asked)
            assert tiles.BLOCK_M >= 16 and tiles.BLOCK_N >= (32 if dtype.itemsize == 1 else 16)
            assert all(size & (size - 1) == 0 for size in tiles[:3]) and tiles.num_stages >= 1
            buffers = tiles.BLOCK_M + 2 * tiles.BLOCK_N * max(1, tiles.num_stages - 1)
            assert buffers * block_d(asked) * dtype.itemsize <= KNOWN[arch].shared_memory


@pytest.mark.parametrize("head_dim, width", [(1, 16), (16, 16), (17, 32), (59, 64), (64, 64), (111, 128), (256, 256)])
def test_padded_head_dim(head_dim, width):
    """Products want powers of two, at least 16; of float8 at least 32."""
    with pretend(KNOWN["sm_90"]):
        assert block_d(problem(head_dim)) == width
        assert block_d(problem(head_dim, torch.float8_e5m2)) == max(width, 32)


def test_cdiv():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0)])
def test_an_empty_grid_launches_nothing(grid, launches):
    """CUDA refuses a grid with a 0."""
    launch(None, grid, torch.device("cpu"))
    assert not launches


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    """Where tuned tiles are kept: empty at first."""
    path = tmp_path / "attention-lineage" / "tiles.json"
    monkeypatch.setattr(launch_module, "_tuned_file", lambda: path)
    launch_module._tuned.cache_clear()
    yield path
    launch_module._tuned.cache_clear()


def test_tuned_tiles_are_remembered(tuned_file):
    """By a later process too, for the same kind of problem alone."""
    tiles = Tiles(64, 32, 4, 3)
    with pretend(KNOWN["sm_90"]):
        assert tuned_tiles("v2", problem()) is None
        remember_tiles("v2", problem(), tiles)
        launch_module._tuned.cache_clear()
        assert tuned_tiles("v2", problem()) == tiles and isinstance(tuned_tiles("v2", problem()), Tiles)
        for version, other in (
            ("v3", problem()), ("v2", problem(128)), ("v2", problem(dtype=torch.bfloat16)),
            ("v2", problem(is_causal=True)), ("v2", problem(window=(3, 3))),
        ):  # fmt: skip
            assert tuned_tiles(version, other) is None
    with pretend(KNOWN["sm_80"]):
        assert tuned_tiles("v2", problem()) is None
    assert json.loads(tuned_file.read_text()) and list(tuned_file.parent.iterdir()) == [tuned_file]


@pytest.mark.parametrize("content", ["", "{", "\0"])
def test_a_damaged_file_of_tiles_is_no_obstacle(tuned_file, content):
    tuned_file.parent.mkdir(parents=True)
    tuned_file.write_text(content)
    with pretend(KNOWN["sm_90"]):
        assert tuned_tiles("v2", problem()) is None
        remember_tiles("v2", problem(), Tiles(64, 32, 4, 3))
        assert tuned_tiles("v2", problem()) == Tiles(64, 32, 4, 3)


def test_versions_take_tuned_tiles(tuned_file):
    """What --tune found is what the version runs with."""
    from common.lineage import find_version

    version = find_version("prefill", "v2")
    with pretend(KNOWN["sm_90"]):
        remember_tiles(version.name, problem(), Tiles(64, 16, 4, 3))
        assert version.tiles(problem()) == Tiles(64, 16, 4, 3)
        assert version.tiles(problem(128)) == plain_tiles(problem(128))


def test_tuning_key_is_readable():
    with pretend(KNOWN["sm_90"]):
        assert tuning_key("v2", problem(is_causal=True)) == "v2|nvidia-h200|float16|64|masked"
