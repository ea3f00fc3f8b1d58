"""Decoding's Gluon versions on emulated memory: right on every schedule that is tried, wrong with any piece left out.

The like of test_gluon_protocol.py, which is prefill's, and of the contract that a GPU is needed for otherwise. What the
emulator cannot see is whether programs that run side by side read each other's parts in time: H200 tests do.
"""

import ast
import dataclasses
import functools
import math
import pathlib
from unittest import mock

import pytest
import torch
from attention_checks import Case, assert_lse_close, guarded_memory, tensor_bytes
from gluon_emulator import Emulator
from gluon_mutants import HOPPER, NEEDED, mutants

import common.equal_pieces
import common.paged_ring
import common.pairs
import common.parts
from common import tickets
from common.hardware import KNOWN, pretend
from common.lineage import versions_of
from common.reference import attention_oracle

CPU = torch.device("cpu")
VERSIONS = [
    version
    for version in versions_of("decoding")
    if any(hasattr(kernel, "is_gluon") and kernel.is_gluon() for kernel in version.kernels)
]
NEWEST = [next(v for v in VERSIONS[::-1] if v.half is half) for half in (True, False)]  # 16 bits, float8
SMS = (44, 1, 8, 16)  # 40 programs, most of them with less than an item or nothing; one with all; some
SEEDS = range(len(SMS))
ROW_ERROR = {"fp16": 2e-3, "bf16": 1.6e-2}  # relative, of the worst row
CACHES = {"fp16": torch.float8_e4m3fn, "bf16": torch.float8_e5m2}  # of versions for float8, by the queries' dtype
DESCALES = 0.25, 3.0  # of k and v, times 1, 2, 3, ... head by head


@dataclasses.dataclass(frozen=True)
class Step:
    """A decoding step: a case, and what a cache has beside its lengths."""

    case: Case
    starts: tuple | None = None
    window: tuple | None = None
    page: int | None = None

    def first_and_end(self) -> list[tuple[int, int]]:
        """Of each sequence the keys that some query sees."""
        case = self.case
        found = []
        for b in range(case.batch):
            end = case.seqlen_k if case.lengths_k is None else case.lengths_k[b]
            first = 0 if self.starts is None else min(self.starts[b], end)
            if self.window is not None:
                first = max(first, end - case.seqlen_q - self.window[0])
            found.append((min(first, end), end))
        return found


STEPS = {
    "whole-items": Step(Case(4, 8, 4, 1, 300, 64)),  # 16 items: dealt out one by one to 1, 8 and 16 programs
    "40-items": Step(Case(5, 8, 8, 1, 60, 64)),  # as many as programs
    "gqa-odd-D128": Step(Case(3, 6, 2, 1, 515, 128)),
    "mqa-D80": Step(Case(2, 5, 1, 1, 333, 80)),
    "D256": Step(Case(2, 4, 2, 1, 190, 256)),
    "D8": Step(Case(1, 3, 3, 1, 129, 8)),
    "heads-side-by-side": Step(Case(2, 8, 4, 2, 300, 64, lengths_k=(300, 131), layout="bshd")),
    "one-key": Step(Case(2, 2, 1, 1, 1, 64)),
    "one-sequence-many-programs": Step(Case(1, 8, 1, 1, 4000, 64)),
    "128-rows": Step(Case(1, 128, 1, 1, 300, 64)),
    "128-rows-D128": Step(Case(1, 8, 1, 16, 200, 128, lengths_k=(170,))),
    "80-rows-D256": Step(Case(2, 5, 1, 16, 140, 256, lengths_k=(140, 9))),
    "2-queries": Step(Case(2, 4, 2, 2, 257, 64)),
    "16-queries": Step(Case(2, 2, 2, 16, 150, 64, lengths_k=(150, 5))),  # rows that stand before the first key
    "lengths-with-0": Step(Case(5, 4, 2, 1, 260, 64, lengths_k=(260, 0, 1, 128, 129))),
    "no-keys-used": Step(Case(3, 2, 1, 1, 70, 64, lengths_k=(0, 0, 0))),
    "ragged-D128": Step(Case(4, 4, 2, 3, 400, 128, lengths_k=(17, 400, 0, 399))),
    "starts": Step(Case(4, 2, 1, 1, 300, 64), starts=(0, 299, 300, 130)),
    "starts-and-lengths": Step(Case(4, 4, 2, 2, 300, 80, lengths_k=(300, 250, 33, 0)), starts=(10, 129, 33, 0)),
    "window": Step(Case(2, 4, 2, 3, 400, 64), window=(70, 0)),
    "window-of-none": Step(Case(2, 2, 1, 1, 130, 64), window=(0, 0)),
    "window-lengths": Step(Case(3, 2, 1, 4, 400, 128, lengths_k=(400, 131, 2)), window=(128, 0)),
    "everything": Step(Case(3, 6, 2, 5, 400, 64, lengths_k=(400, 290, 3)), starts=(380, 20, 1), window=(150, 0)),
    "negative-scale": Step(Case(1, 2, 2, 1, 200, 64, scale=-0.7)),
    "whole-blocks": Step(Case(1, 2, 1, 1, 256, 64)),
    "pages-of-8": Step(Case(2, 4, 4, 1, 200, 80, lengths_k=(150, 0)), starts=(20, 0), page=8),
    "pages-of-16": Step(Case(3, 8, 2, 2, 304, 128, lengths_k=(304, 77, 16)), page=16),
    "pages-of-64": Step(Case(2, 2, 1, 1, 320, 64), window=(100, 0), page=64),
    "pages-of-128-D256": Step(Case(2, 2, 2, 1, 256, 256, lengths_k=(256, 129)), page=128),
    "pages-of-256": Step(Case(2, 4, 2, 1, 512, 128, lengths_k=(400, 512)), page=256),
}  # fmt: skip


@functools.cache
def tensors(name: str, dtype: str, fp8: bool = False):
    """q, k, v with NaN wherever no query looks, the oracle's output and LSE, and descales of float8 caches."""
    step = STEPS[name]
    q, k, v = step.case.tensors(dtype, CPU)
    descales = {}
    if fp8:
        heads = torch.arange(1.0, 1 + step.case.batch * step.case.heads_kv).view(step.case.batch, step.case.heads_kv)
        descales = {f"descale_{x}": factor * heads for x, factor in zip("kv", DESCALES, strict=True)}
        caches = [x.to(CACHES[dtype]) for x in (k, v)]
        k, v = (x.double() * y[..., None, None] for x, y in zip(caches, descales.values(), strict=True))
    outs, lses = [], []
    for b, (first, end) in enumerate(step.first_and_end()):
        own = [x[b : b + 1, :, first:end] for x in (k, v)]
        if first == end:
            outs.append(torch.zeros(q[:1].shape, dtype=torch.float64))
            lses.append(torch.full(q[:1, ..., 0].shape, -math.inf, dtype=torch.float64))
        else:
            options = dict(is_causal=True, window=step.window, scale=step.case.scale, return_lse=True)
            out, lse = attention_oracle(q[b : b + 1], *own, **options)
            outs.append(out), lses.append(lse)
        for x in caches if fp8 else (k, v):
            x[b, :, :first] = x[b, :, end:] = math.nan
    return q, *(caches if fp8 else (k, v)), torch.cat(outs), torch.cat(lses), descales


def in_pages(step: Step, k, v):
    """k and v in pages of a larger cache, NaN elsewhere, and their table, whose other entries are no pages."""
    batch, heads, keys, width = k.shape
    each = keys // step.page
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(batch * each + 3, generator=generator)[: batch * each].view(batch, each).int()
    caches = []
    for x in (k, v):
        cache = torch.full((batch * each + 3, step.page, heads, width), math.nan, dtype=x.dtype)
        cache[table.long()] = x.transpose(1, 2).reshape(batch, each, step.page, heads, width)
        caches.append(cache.transpose(1, 2))
    for row, (first, end) in zip(table, step.first_and_end(), strict=True):
        row[: first // step.page] = 10**6
        row[-(-end // step.page) :] = -7
    return *caches, table


def as_it_was(cache: torch.Tensor, lengths, fresh: int, table: torch.Tensor | None) -> torch.Tensor:
    """A cache before the newest keys of each sequence were written: NaN in their place."""
    was = cache.new_empty(0).set_(cache.untyped_storage().clone())
    was = was.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    nan = torch.full(cache.shape[-1:], math.nan).to(cache.dtype)
    for b, length in enumerate(lengths):
        for n in range(max(0, length - fresh), length):
            page, row = (b, n) if table is None else (table[b, n // cache.shape[2]].item(), n % cache.shape[2])
            was[page, :, row] = nan
    return was


def run(version, name: str, dtype: str, seed: int, edit=lambda path, source: source):
    """One step on one schedule, compared with the oracle. An AssertionError, ProtocolErrors too, where it fails.

    Told on odd seeds that its own keys alone are fresh, where a version takes that.
    """
    step, (q, k, v, wanted, wanted_lse, descales) = STEPS[name], tensors(name, dtype, not version.half)
    options = step.case.options(CPU) | ({} if step.window is None else {"window": step.window}) | descales
    if step.starts is not None:
        options["starts"] = torch.tensor(step.starts, dtype=torch.int32)
    if step.page is not None:
        k, v, options["block_table"] = in_pages(step, k, v)
    older = {}
    if "fresh_keys" in version.takes and seed % 2:
        fresh = options["fresh_keys"] = step.case.seqlen_q
        lengths, table = step.case.lengths_k or [step.case.seqlen_k] * step.case.batch, options.get("block_table")
        older = {x.data_ptr(): as_it_was(x, lengths, fresh, table) for x in (k, v)}
        told = (options.get(name) for name in ("seqlens_k", "starts", "block_table"))
        older |= {x.data_ptr(): x for x in told if x is not None}
    emulator = Emulator(seed, edit, older)
    gpu = dataclasses.replace(KNOWN["sm_90"], sm_count=SMS[seed])
    counters = {}
    with (
        mock.patch("common.problem.interpreting", lambda: True),
        mock.patch.object(tickets, "_of_stream", counters),
        pretend(gpu),
        guarded_memory(),
    ):
        if step.page is not None and "block_table" not in version.takes:
            pytest.skip(f"{version.name} takes no pages")
        if not version.half and step.case.head_dim % 16:
            pytest.skip(f"{version.name} takes head_dim in multiples of 16")
        assert version.why_not_call(q, k, v, **options) is None
        out, lse = emulator.load(version.path).VERSION.call(q, k, v, return_lse=True, **options)
        if seed == 0:
            alone = emulator.load(version.path).VERSION.call(q, k, v, **options)  # with the counters that are left
            assert torch.equal(tensor_bytes(alone), tensor_bytes(out))
    assert emulator.launches, "no Gluon kernel was launched"
    assert not any(counter.any() for counter in counters.values()), "a counter is not back at zero"
    assert torch.isfinite(out).all() and not out[wanted_lse == -math.inf].any()
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-9)
    worst = error[wanted_lse > -math.inf].max().item() if (wanted_lse > -math.inf).any() else 0.0
    assert worst <= ROW_ERROR[dtype], f"relative error of a row {worst:.3g}"
    assert_lse_close(lse, wanted_lse, dtype)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("name", STEPS)
def test_right_on_every_schedule(version, name):
    """Pieces that are dealt twice or not at all, parts that are lost, deadlocks, races on the rings, wrong masks.

    Older versions, which the newest have nearly all of, take one schedule of a step, each another.
    """
    for seed in SEEDS if version in NEWEST else [(version.number + list(STEPS).index(name)) % len(SEEDS)]:
        run(version, name, ("fp16", "bf16")[seed % 2], seed)


@pytest.mark.parametrize("version", [v for v in VERSIONS if "block_table" in v.takes], ids=lambda version: version.name)
@pytest.mark.parametrize("entry", [-1, 10**6])
def test_a_page_that_is_missing(version, entry):
    """It makes its own sequence NaN, by the programs that meet it, and no other one."""
    step, (q, k, v, wanted, _, descales) = STEPS["pages-of-16"], tensors("pages-of-16", "fp16", not version.half)
    k, v, table = in_pages(step, k, v)
    table[1, 2] = entry
    options = step.case.options(CPU) | {"block_table": table} | descales
    for sms in SMS:
        gpu = dataclasses.replace(KNOWN["sm_90"], sm_count=sms)
        with (
            mock.patch("common.problem.interpreting", lambda: True),
            mock.patch("common.problem.AttentionProblem._check_pages", lambda self: None),
            mock.patch.object(tickets, "_of_stream", {}),
            pretend(gpu),
        ):
            out = Emulator().load(version.path).VERSION.call(q, k, v, **options)
        assert out[1].isnan().all()
        assert torch.allclose(out[[0, 2]].double(), wanted[[0, 2]], atol=5e-3, rtol=2e-3)


def test_the_next_blocks_come_to_the_l2_when_the_ring_is_full():
    """v10, where it is told of fresh keys and programs share heads: the two blocks after those of the ring, once."""
    [version] = (version for version in VERSIONS if version.name == "v10")
    heads, keys, width, programs, block_n, stages = 3, 7200, 64, 8, 128, 3
    q, k, v = (torch.randn(1, n, heads, width, dtype=torch.float16).transpose(1, 2) for n in (1, keys, keys))
    emulator = Emulator(older={x.data_ptr(): as_it_was(x, [keys], 1, None) for x in (k, v)})
    gpu = dataclasses.replace(KNOWN["sm_90"], sm_count=programs)
    with (
        mock.patch("common.problem.interpreting", lambda: True), mock.patch.object(tickets, "_of_stream", {}),
        pretend(gpu),
    ):  # fmt: skip
        out = emulator.load(version.path).VERSION.call(q, k, v, fresh_keys=1)
    assert torch.allclose(out.double(), attention_oracle(q, k, v), atol=5e-3, rtol=2e-3)
    blocks, wanted, found = -(-keys // block_n), set(), []
    each, more = divmod(heads * blocks, programs)
    for program in range(programs):
        start, end = (each * p + min(p, more) for p in (program, program + 1))
        for block in range(start + stages, min(start + stages + 2, end, start // blocks * blocks + blocks)):
            rows = range(block % blocks * block_n, min(block % blocks * block_n + block_n, keys))
            wanted |= {(program, x.data_ptr(), block // blocks, row) for x in (k, v) for row in rows}
    for program, x, elements in emulator.prefetched:
        found += [(program, x.data_ptr(), i // width % heads, i // width // heads) for i in elements.tolist()]
    assert set(found) == wanted


# ---- kernels with a piece missing

PIECES, PARTS, PAGES = (
    pathlib.Path(module.__file__) for module in (common.equal_pieces, common.parts, common.paged_ring)
)
MUTANT_RUNS = [  # the quick ones first: the first that fails is the last
    ("whole-blocks", 1), ("starts", 1), ("lengths-with-0", 1), ("everything", 2), ("ragged-D128", 1),
    ("one-sequence-many-programs", 3), ("gqa-odd-D128", 2), ("ragged-D128", 0),
]  # fmt: skip
_NEXT = "\n        mbarrier.init(empty.index(i), count=1)"
REWRITES = {
    "a ticket too few": ("== count - 1", "== count - 2"),
    "the counter is not put back": ("gl.store(Ticket, 0)", "pass"),
    "the first's part is taken from the wrong place": ("< begin, 1, 0)", "<= begin, 1, 0)"),
    "the first's part is always its first": ("gl.where(program == first, slot, 2 * program)", "2 * program"),
    "the last sharer is one too far": ("_owner(end - 1, total)", "_owner(end, total)"),
    "items that end with a piece begin no sequence": ("base = start", "base = base"),
    "the next sequence is never begun": ("off_b += 1", "off_b += 0"),
    "every part goes to the first place": ("part = gl.program_id(0) * 2 + 1", "part = gl.program_id(0) * 2"),
    "pages: full waits for two arrivals": (f"count=1){_NEXT}", f"count=2){_NEXT}"),
    "pages: empty waits for two arrivals": (_NEXT, _NEXT.replace("1", "2")),
    "all pages in one place": (".slice(j * ROWS, ROWS, dim=2)", ".slice(0, ROWS, dim=2)"),
    "half the bytes of pages": ("nbytes * (BLOCK_N // ROWS)", "nbytes * (BLOCK_N // ROWS // 2)"),
    "a fresh key that ends a block is not waited for": ("len_k - fresh_keys:", "len_k - fresh_keys + 1:"),
    "parts weigh the same": ("weight = gl.exp2(lses[j] - m_safe)", "weight = gl.exp2(lses[j] - lses[j])"),
}
# What a version could do without, and why it is there.
HARMLESS = {
    ("v6", "skip: without wait_full(ring, i, SLOTS)"): "one group of warps computes, and skips nothing",
    ("v6", "skip: without release(ring, i, SLOTS)"): "one group of warps computes, and skips nothing",
    ("v6", "full and empty swapped"): "both take one arrival, so that it is their names that are swapped",
}


def _all_mutants() -> list:
    """Of each version's file, and of each shared file and function in the first version that has it."""
    needed, seen, found = (*NEEDED, "zero_rows", "store_part"), set(), []
    for version in VERSIONS:
        shared = (HOPPER, PIECES, PARTS, *([PAGES] if "block_table" in version.takes else []))
        functions = {ast.unparse(x): x.name for x in ast.parse(version.path.read_text()).body if hasattr(x, "name")}
        repeated = tuple(f"{name}: " for text, name in functions.items() if text in seen)
        for path in (version.path, *(path for path in shared if path not in seen)):
            changes = mutants(path, needed, REWRITES).items()
            found += [(version, path, *change) for change in changes if not change[0].startswith(repeated)]
        seen.update(shared, functions)
    return [pytest.param(*change, id=f"{change[0].name}-{change[2]}") for change in found]


@pytest.mark.parametrize("version, path, name, changed", _all_mutants())
def test_every_change_is_noticed(version, path, name, changed):
    """Each wait, release, count, phase, part and ticket: without it some schedule must fail, and say so."""

    def edit(file, source):
        return changed if file == path else source

    try:
        for step, seed in MUTANT_RUNS + ([("pages-of-16", 1)] if "block_table" in version.takes else []):
            run(version, step, "fp16", seed, edit)
    except AssertionError:
        assert (version.name, name) not in HARMLESS, "is noticed now: take it off the list of what is harmless"
    else:
        assert (version.name, name) in HARMLESS, f"nothing noticed that {version.name} ran with this change: {name}"


# ---- common/equal_pieces.py by itself

KERNEL = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from common.equal_pieces import end_of_keys, item_at, next_sequence, piece, sharers


@gluon.jit
def deal(Dealt, Owner, Parts, seqlens_k, starts, batch, items, seqlen_k, seqlen_q, window_left, most,
         BLOCK_N: gl.constexpr, BATCH: gl.constexpr):
    keys = (seqlen_k, seqlens_k, starts, window_left, seqlen_q)
    start, end, total, off_b, base = piece(batch, items, keys, BLOCK_N, BATCH)
    part = 2 * gl.program_id(0)
    while start < end:
        b, item, begin, last, finish = item_at(start, off_b, base, total, batch, items, keys, BLOCK_N)
        stop = gl.minimum(finish, end)
        for j in range(start, end_of_keys(start, stop, last, keys)):
            at = (b * items + item) * most + j - begin
            gl.store(Dealt + at, gl.load(Dealt + at) + 1)
        for j in range(start, stop):
            gl.store(Owner + ((b * items + item) * most + j - begin), gl.program_id(0) + 1)
        if stop - start < finish - begin:
            first, last, slot = sharers(begin, finish, total)
            at = (gl.program_id(0) * 2 + part % 2) * 5
            gl.store(Parts + at, b * items + item)
            gl.store(Parts + at + 1, first)
            gl.store(Parts + at + 2, last)
            gl.store(Parts + at + 3, slot)
            gl.store(Parts + at + 4, part)
        part = 2 * gl.program_id(0) + 1
        start = stop
        off_b, base = next_sequence(start, off_b, base, finish, item, items, keys)


@gluon.jit
def bounds(Bounds, batch, items, seqlen_k, BLOCK_N: gl.constexpr):
    start, end, total, _, _ = piece(batch, items, (seqlen_k, None, None, None, 1), BLOCK_N, 128)
    gl.store(Bounds + gl.program_id(0) * 4, start)
    gl.store(Bounds + gl.program_id(0) * 4 + 1, end)
    first, last, _ = sharers(start, end, total)
    gl.store(Bounds + gl.program_id(0) * 4 + 2, first)
    gl.store(Bounds + gl.program_id(0) * 4 + 3, last)
"""


@pytest.fixture(scope="module")
def dealers(tmp_path_factory):
    path = tmp_path_factory.mktemp("dealers") / "dealers.py"
    path.write_text(KERNEL)
    return Emulator().load(path)


# batch, items of a sequence, keys, queries, lengths, starts, window
DEALS = {
    "equal": (4, 4, 300, 1, None, None, None),
    "as-many-as-programs": (4, 2, 64, 1, None, None, None),
    "twice-as-many": (4, 4, 500, 1, None, None, None),
    "one": (1, 1, 2000, 1, None, None, None),
    "few-blocks": (1, 1, 100, 1, None, None, None),
    "ragged": (5, 3, 900, 1, (900, 0, 1, 64, 65), None, None),
    "all-empty": (3, 2, 900, 1, (0, 0, 0), None, None),
    "starts": (4, 2, 640, 2, (640, 640, 100, 0), (639, 0, 100, 0), None),
    "window": (2, 3, 1000, 4, None, None, 200),
    "ragged-window": (3, 2, 1000, 4, (1000, 70, 640), (0, 66, 10), 130),
}


@pytest.mark.parametrize("programs", [1, 3, 8, 16, 128])
@pytest.mark.parametrize("deal", DEALS)
def test_every_block_is_dealt_once(dealers, deal, programs):
    """In pieces that differ by a block at most, with one more for each item where lengths differ; who shares an item
    agrees with who has a part of it, and where.
    """
    batch, items, seqlen_k, seqlen_q, lengths, starts, window = DEALS[deal]
    more = int(lengths is not None or starts is not None)
    most = -(-seqlen_k // 64) + 1 + more
    dealt, owner = (torch.zeros(batch * items, most, dtype=torch.int32) for _ in range(2))
    parts = torch.full((2 * programs, 5), -1, dtype=torch.int32)
    of = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (lengths, starts)]
    dealers.deal[(programs,)](dealt, owner, parts, *of, batch, items, seqlen_k, seqlen_q, window, most, 64, 128)
    for b in range(batch):
        end = seqlen_k if lengths is None else lengths[b]
        first = 0 if starts is None else min(starts[b], end)
        first = first if window is None else max(first, end - seqlen_q - window)
        count = max(-(-end // 64) - first // 64, 1)
        of_sequence = dealt[b * items : (b + 1) * items]
        assert of_sequence[:, :count].eq(1).all() and not of_sequence[:, count:].any()
    assert (owner > 0).sum() == dealt.sum() + more * batch * items
    sizes = torch.bincount(owner[owner > 0] - 1, minlength=programs)
    assert sizes.max() - sizes.min() <= 1
    shared = 0
    for item in range(batch * items):
        owners = (owner[item][owner[item] > 0] - 1).tolist()
        assert owners == sorted(owners)
        mine = parts[parts[:, 0] == item].tolist()
        assert len(mine) == (len(set(owners)) if len(set(owners)) > 1 else 0)
        shared += bool(mine)
        for _, first, last, slot, part in mine:
            assert (first, last) == (owners[0], owners[-1])
            assert part == (slot if part // 2 == first else part // 2 * 2)
    assert programs > 1 or shared == 0


def test_as_many_blocks_as_a_batch_can_have(dealers):
    """2^30 blocks, times 128 programs: beyond 32 bits, which the emulator refuses."""
    bounds = torch.zeros(128, 4, dtype=torch.int32)
    dealers.bounds[(128,)](bounds, 7, 9, 2**30 - 1, 64)
    starts, ends, first, last = bounds.unbind(1)
    assert starts[0] == 0 and ends[-1] == 7 * 9 * 2**24 and torch.equal(starts[1:], ends[:-1])
    assert torch.equal(first, torch.arange(128).int()) and torch.equal(last, first)
