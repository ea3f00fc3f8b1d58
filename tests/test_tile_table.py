"""The schedule of the persistent kernels: every tile once, the load level, neighbours in the L2 side by side."""

import pytest
import torch

from common import tile_table
from common.hardware import KNOWN, pretend
from common.problem import AttentionProblem


def schedule(monkeypatch, seqlen, head_dim, block_m, block_n, heads=None, **options) -> list[list[tuple]]:
    """What each program does: (row block, head, first block of keys, one past the last), in order."""
    batch, heads = (16384 // seqlen, 2048 // head_dim) if heads is None else (1, heads)
    q = torch.empty(batch, seqlen, heads, head_dim, dtype=torch.float16, device="meta").transpose(1, 2)
    tables, tensor = [], torch.tensor
    tile_table._table.cache_clear()
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: tables.append(tensor(*args, **kwargs)) or tables[-1])
    with pretend(KNOWN["sm_90"]):
        _, programs = tile_table.tile_table(AttentionProblem.prefill(q, q, q, **options), block_m, block_n)
    [table] = tables
    counts = table[0, :, 0].tolist()
    found = [table[1 : 1 + count, i].tolist() for i, count in enumerate(counts)]
    assert len(found) == programs == min(132, batch * heads * -(-seqlen // block_m))
    return [[(code & 0xFFFF, code >> 16, blocks & 0xFFFF, blocks >> 16) for code, blocks in tiles] for tiles in found]


def length(tile) -> float:
    return tile[3] - tile[2] + tile_table.TILE_COST


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (300, 0)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("seqlen, heads", [(1000, 3), (4096, 40), (130, 1)])
def test_every_tile_once(seqlen, heads, options, monkeypatch):
    tiles = sum(schedule(monkeypatch, seqlen, 64, 128, 128, heads, **options), [])
    assert sorted(tile[:2] for tile in tiles) == [(m, h) for m in range(-(-seqlen // 128)) for h in range(heads)]
    assert all(lo < hi for _, _, lo, hi in tiles)


@pytest.mark.parametrize("block_m, block_n, head_dim", [(192, 128, 64), (128, 128, 128), (128, 64, 256)])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
def test_the_load_is_level(seqlen, block_m, block_n, head_dim, monkeypatch):
    """A program that has more than the others is waited for: 16 % more where the L2 alone decides the order."""
    loads = [
        sum(map(length, tiles)) for tiles in schedule(monkeypatch, seqlen, head_dim, block_m, block_n, is_causal=True)
    ]
    assert max(loads) <= 1.06 * sum(loads) / len(loads)


def test_short_tiles_come_last(monkeypatch):
    for tiles in schedule(monkeypatch, 8192, 128, 128, 128, is_causal=True):
        lengths = [hi - lo for _, _, lo, hi in tiles]
        short = [value <= tile_table.SHORT * 64 for value in lengths]
        assert short == sorted(short)
