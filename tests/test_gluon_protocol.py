"""The Gluon versions on emulated memory: right on every schedule that is tried, and wrong with any piece left out.

tests/gluon_emulator.py says what is emulated. The second half changes the kernels, one wait, release, count or phase at
a time, and wants every change noticed: so the kernels keep no synchronisation that they do not need, and the emulator
finds what it is there to find.
"""

import dataclasses
import pathlib
from unittest import mock

import pytest
import torch
from attention_checks import FP8_LIMIT, Case, assert_close, guarded_memory, skip_unless_served
from gluon_emulator import Descriptor, Emulator, Int, Program, ProtocolError
from gluon_mutants import HOPPER, mutants

import common.persistent
from common.hardware import KNOWN, pretend
from common.lineage import versions_of
from common.problem import AttentionProblem

CPU = torch.device("cpu")
VERSIONS = {
    version.name: version
    for version in versions_of("prefill")
    if any(hasattr(kernel, "is_gluon") and kernel.is_gluon() for kernel in version.kernels)
}

# Of blocks of m rows and n keys, whatever tiles the version takes.
CASES = {
    "full": lambda m, n: Case(1, 2, 2, 2 * m, 4 * n, 64, causal=False),
    "full-ragged-gqa-D128": lambda m, n: Case(1, 4, 2, m + 37, 3 * n - 29, 128, causal=False),
    "full-ragged-D256": lambda m, n: Case(1, 1, 1, m - 8, 2 * n + 1, 256, causal=False),
    "one-row-D80": lambda m, n: Case(2, 2, 1, 1, n + 9, 80, causal=False),
    "one-tile": lambda m, n: Case(1, 1, 1, m, max(m, n), 64, causal=True),
    "causal-mqa": lambda m, n: Case(1, 3, 1, 3 * m, 3 * m, 64, causal=True),
    "causal-more-keys-D128": lambda m, n: Case(1, 2, 2, m + 5, m + 2 * n + 8, 128, causal=True),
    "causal-D256": lambda m, n: Case(1, 2, 1, 2 * m - 3, 2 * m - 3, 256, causal=True),
    "window-D80": lambda m, n: Case(1, 2, 1, m + 70, m + 70, 80, window=(n // 2, 20)),
    "window-more-keys": lambda m, n: Case(1, 1, 1, m, 2 * n + 44, 64, window=(n // 2, n // 2)),
    "window-left-D128": lambda m, n: Case(1, 2, 2, 2 * m + 1, 2 * m + 30, 128, causal=True, window=(n + 3, None)),
    "window-none-right": lambda m, n: Case(1, 1, 1, m + 9, m + 9, 64, window=(0, 0)),
}  # fmt: skip
SEEDS = range(4)
SMS = (1, 3, 132)  # one program with all tiles, three programs, a tile a program
LENGTHS = (256, 16384)  # whose tiles are taken


def run(version, name: str, dtype: str, seed: int, edit=lambda path, source: source):
    """One case on one schedule, compared with the oracle. An AssertionError, ProtocolErrors too, where it fails."""
    emulator = Emulator(seed, edit)
    gpu = dataclasses.replace(KNOWN["sm_90"], sm_count=SMS[seed % len(SMS)])
    with mock.patch("common.problem.interpreting", lambda: True), pretend(gpu):
        tiles = tiles_of(version, CASES[name](128, 128).head_dim, LENGTHS[seed % len(LENGTHS)])
        case = CASES[name](tiles.BLOCK_M, tiles.BLOCK_N)
        q, k, v = case.tensors(dtype, CPU)
        options = case.options(CPU) | ({"use_fp8": True, "fp8_dtype": dtype} if dtype in FP8_LIMIT else {})
        skip_unless_served(version, q, k, v, **options)
        with guarded_memory():
            out, lse = emulator.load(version.path).VERSION.call(q, k, v, return_lse=True, tiles=tiles, **options)
    assert emulator.launches, "no Gluon kernel was launched"
    assert_close(out, q, k, v, dtype, None, lse, **case.options(CPU))


def dtypes_of(version):
    return ("fp16", "bf16") if version.half else ("e4m3", "e5m2")


def tiles_of(version, head_dim: int, seqlen: int):
    """The version's tiles for a sequence as long as this, which the cases are too short to get."""
    q = torch.empty(1, 1, seqlen, head_dim, dtype=torch.float16, device="meta")
    return version.tiles(AttentionProblem.prefill(q, q, q))


@pytest.mark.parametrize(
    "version, dtype", [pytest.param(v, d, id=f"{d}-{v.name}") for v in VERSIONS.values() for d in dtypes_of(v)]
)
@pytest.mark.parametrize("name", CASES)
def test_right_on_every_schedule(version, name, dtype):
    """Deadlocks, races on the rings, results read too early, wrong arithmetic at the edges.

    Older versions, which the newest have nearly all of, and second dtypes take one schedule of a case, each another.
    """
    newest = [next(v for v in [*VERSIONS.values()][::-1] if v.half is half) for half in (True, False)]
    turn = version.number + list(CASES).index(name) + dtypes_of(version).index(dtype)
    for seed in SEEDS if version in newest and dtype == dtypes_of(version)[0] else [turn % len(SEEDS)]:
        run(version, name, dtype, seed)


RISES = {"a little": 3.0, "past float16": 60.0, "past float32": 400.0}  # of the logits from block to block


@pytest.mark.parametrize(
    "version, dtype", [pytest.param(v, d, id=f"{d}-{v.name}") for v in VERSIONS.values() for d in dtypes_of(v)]
)
@pytest.mark.parametrize("rise", RISES)
def test_scores_that_rise(version, dtype, rise):
    """Blocks whose scores lie far above those before them (the last keys come first), for some of a warp's rows."""
    case = Case(1, 1, 1, 64, 512, 64)
    q, k, v = case.tensors(dtype, CPU)
    steps = torch.tensor([0.0, 1.0, 2.0, 4.0])  # which FP8 holds exactly, beside a largest of 4, as it holds 16
    exact = 16.0 if dtype in FP8_LIMIT else 64.0
    q[..., 0] = torch.where(torch.arange(64) % 3 > 0, exact, 0.0)
    k[..., 0] = (-steps.repeat_interleave(128) * RISES[rise] / exact).to(k.dtype)
    options = {"use_fp8": True, "fp8_dtype": dtype} if dtype in FP8_LIMIT else {}
    with mock.patch("common.problem.interpreting", lambda: True), pretend(KNOWN["sm_90"]), guarded_memory():
        out, lse = Emulator().load(version.path).VERSION.call(q, k, v, scale=1.0, return_lse=True, **options)
    # logits of thousands carry float32's rounding into the weights; FP8's own limit allows for its own
    assert_close(out, q, k, v, dtype, {"fp16": 2e-3, "bf16": 1e-2}.get(dtype), lse, scale=1.0)


@pytest.mark.parametrize("version", [pytest.param(v, id=v.name) for v in VERSIONS.values() if v.fp8])
@pytest.mark.parametrize("sink", [0, -1], ids=["last", "first"])  # in the order in which keys come
def test_fp8_beside_a_sink(version, sink):
    """One key takes nearly all the weight: the others' must not underflow when they become e4m3."""
    q, k, v = Case(1, 1, 1, 40, 200, 64).tensors("e4m3", CPU)
    q[..., 0], k[..., 0], k[:, :, sink, 0] = 8.0, 0.0, 8.0  # 8 above the rest
    v[:, :, sink] = 0.0  # so that the output is the others' alone
    with mock.patch("common.problem.interpreting", lambda: True), pretend(KNOWN["sm_90"]), guarded_memory():
        out = Emulator().load(version.path).VERSION.call(q, k, v, use_fp8=True)
    assert_close(out, q, k, v, "e4m3")


# ---- kernels with a piece missing

PERSISTENT = pathlib.Path(common.persistent.__file__)
MUTANT_RUNS = [("causal-mqa", 0), ("full", 0), ("causal-mqa", 1), ("full-ragged-gqa-D128", 3), ("window-D80", 0)]
# What a version could do without, and why it is there.
HARMLESS = {
    ("v6", "step: without wait_full(v_ring, j, STAGES)"): "ends the basic block for ptxas; the next step waits again",
    ("v6", "step: warpgroup_mma_wait(2, deps=[acc])"): "waits for nothing; keeps the rescaling where it is",
    ("v6", "skip: without wait_full(ring, i, SLOTS)"): "a tile has fewer blocks to skip than the ring has slots",
    ("v6", "flash_attention_kernel: allocate_ring(q_desc, 2, 1 + 1)"): "Q is loaded once and never released",
    ("v7", "step: without wait_full(v_ring, i_v + 1, STAGES, more)"): "as in v6",
    ("v7", "step: warpgroup_mma_wait(2, deps=[acc])"): "as in v6",
    ("v8", "step: without wait_full(v_ring, i_v + 1, STAGES, more)"): "as in v6",
    ("v8", "skip: without wait_full(ring, i, SLOTS)"): "as in v6",
    ("v9", "step: without wait_full(v_ring, i_v + 1, STAGES, more)"): "as in v6",
    ("v10", "step: without wait_full(v_ring, i_v + 1, STAGES, more)"): "as in v6",
    ("v10", "skip: without wait_full(ring, i, SLOTS)"): "as in v6",
}


def _all_mutants() -> list:
    parameters = []
    for version in VERSIONS.values():
        shared = [HOPPER, PERSISTENT] if "common.persistent" in version.path.read_text() else [HOPPER]
        for path in (version.path, *shared):
            for name, changed in mutants(path).items():
                parameters.append(pytest.param(version, path, name, changed, id=f"{version.name}-{name}"))
    return parameters


@pytest.mark.parametrize("version, path, name, changed", _all_mutants())
def test_every_change_is_noticed(version, path, name, changed):
    """Each wait, release, count and phase: without it some schedule must fail, and say so."""

    def edit(file, source):
        return changed if file == path else source

    try:
        for case, seed in MUTANT_RUNS:
            run(version, case, dtypes_of(version)[0], seed, edit)
    except AssertionError:
        assert (version.name, name) not in HARMLESS, "is noticed now: take it off the list of what is harmless"
    else:
        assert (version.name, name) in HARMLESS, f"nothing noticed that {version.name} ran with this change: {name}"


# ---- the emulator's own rules, one small kernel each

KERNEL = """
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)
from common.hopper import allocate_ring, descriptor, fill, release, tma_store, wait_full

@gluon.jit
def worker(ring):
    warpgroup_mma(ring[0].index(0), ring[0].index(0), gl.zeros([64, 64], gl.float32, None))

@gluon.jit
def nothing():
    pass

@gluon.jit
def kernel(desc, X, n):
    ring = allocate_ring(desc, 2, 1)
    out = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    value = gl.full([1, 1, 64, 64], 2.0, gl.float16, None)
    zero = gl.zeros([64, 64], gl.float32, None)
    at = [0, 0, 0, 0]
    k = ring[0].index(0).reshape([64, 64])
    {body}

def run():
    x = torch.ones(1, 1, 70, 64, dtype=torch.float16)
    kernel[(1,)](descriptor(x, 64, 64), x, 4096, num_warps=4)
    return x
"""
LOADED = "fill(ring, desc, at, 0, 2); wait_full(ring, 0, 2); "
STORED = "out.store(value); fence_async_shared(); tma_store(desc, at, out); "
MULTIPLIED = LOADED + "p = warpgroup_mma(k, k, zero, is_async=True); "
RULES = {  # what a kernel does, and what the emulator says of it
    LOADED + "release(ring, 0, 2)": None,
    MULTIPLIED + "p = warpgroup_mma_wait(0, [p]); release(ring, 0, 2); p + 1.0": None,
    STORED + "tma.store_wait(0); out.store(value)": None,
    "fill(ring, desc, at, 0, 2); k.load(None)": "no wait orders it after a TMA load writing ring.bufs",
    "fill(ring, desc, at, 0, 2)": "before a TMA load writing .* has landed",
    "wait_full(ring, 1, 2)": r"deadlock\n  kernel: .*waits for ring.full\[1\] \(phase 0, 1 of 1 arrivals",
    "fill(ring, desc, at, 0, 2); fill(ring, desc, at, 2, 2)": r"deadlock\n.*waits for ring.empty\[0\]",
    LOADED + "mbarrier.arrive(ring[2].index(0), count=2)": "2 arrivals where 1 of 1 are missing",
    LOADED + "mbarrier.expect(ring[1].index(1), 64)": "ends in the middle of a phase of ring.full",
    MULTIPLIED + "p + 1.0": "an accumulator that was not waited for",
    MULTIPLIED + "q = warpgroup_mma_wait(1, [p]); q + 1.0": "a product that may not be finished",
    MULTIPLIED: "ends with a product in flight",
    MULTIPLIED + "release(ring, 0, 2); fill(ring, desc, at, 2, 2)": "no wait orders it after a product reading",
    STORED: "before tma.store_wait covers a TMA store",
    STORED + "out.store(value)": "no wait orders it after a TMA store reading",
    STORED + "tma_store(desc, at, out); tma.store_wait(1); out.store(value)": "no wait orders it after a TMA store",
    "out.store(value); tma_store(desc, at, out)": "fence_async_shared is missing",
    "gl.store(X + 70 * 64, 1.0)": "an address outside the tensor",
    "n * n * n": "does not fit in int32",
    "ring[0].index(n)": "slot 4096 of ring.bufs, which has 2",
    "gl.warp_specialize([(nothing, ()), (worker, (ring,))], [1], [24])": "wgmma takes groups of four",
    "gl.allocate_shared_memory(gl.float16, [128, 1024], None)": "a block may use 232448",
}


@pytest.mark.parametrize("body", RULES)
def test_rules_of_the_emulator(body, tmp_path):
    """Each rule that it models is enforced, on every schedule, and a kernel that keeps it passes."""
    path = tmp_path / "rules.py"
    path.write_text(KERNEL.format(body=body))
    for seed in SEEDS:
        if RULES[body] is None:
            Emulator(seed).load(path).run()
        else:
            with pytest.raises(ProtocolError, match=RULES[body]):
                Emulator(seed).load(path).run()


def test_ends_of_a_tensor():
    """TMA loads 0 past the ends of a tensor, before its start too, and stores nothing there."""
    memory = torch.full((10, 16), 7.0, dtype=torch.float16)
    desc = Descriptor(memory[:6, :12], [6, 12], [16, 1], [8, 16])
    block = desc.read([Int(-2), 0])
    assert block[:2].eq(0).all() and block[2:, :12].eq(7).all() and block[:, 12:].eq(0).all()
    desc.write([4, 0], torch.ones(8, 16, dtype=torch.float16))
    assert memory[4:6, :12].eq(1).all() and memory.eq(1).sum() == 24


def test_scalars_divide_as_in_c():
    """Python rounds down, the kernel towards zero."""
    assert Int(-7) // 2 == -3 and Int(-7) % 2 == -1 and 7 // Int(2) == 3
    assert (Int(2**31 - 1).to(Int(0, 64).dtype) + 1) == 2**31


def test_a_seed_is_a_schedule():
    """A failure can be run again: the seed decides all that chance decides."""
    version, pick, picks = next(iter(VERSIONS.values())), Program.pick, []

    def note(program, choices):
        chosen = pick(program, choices)
        picks[-1].append((len(choices), type(chosen).__name__, getattr(chosen, "name", None)))
        return chosen

    with mock.patch.object(Program, "pick", note):
        for seed in (5, 5, 6):
            picks.append([])
            run(version, "causal-mqa", dtypes_of(version)[0], seed)
    assert picks[0] == picks[1] != picks[2]
