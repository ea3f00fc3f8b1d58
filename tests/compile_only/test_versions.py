"""What every version compiles to, through its real launch function, on GPUs that are not here."""

import functools
import re

import pytest
import torch

from bench.disassembly import main_loops
from bench.machine_code import (
    ROOT,
    CompileError,
    _examined,
    case_for,
    compile_version,
    facts,
    recorded_launches,
    source_lines,
    why_not,
)
from common.hardware import KNOWN, pretend, target_of
from common.lineage import FAMILIES, find_version, triton_version, versions_of
from common.problem import FP8, AttentionProblem

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
FP8_ARCHS = ("sm_89", "sm_90", "sm_100", "sm_120")


# Default tiles that spill, at most so often, and why.
SPILLS = {("prefill", "v9", 256): (32, "a few addresses, once a tile: the output takes 128 of 240 registers")}
if triton_version() >= (3, 9):
    three = "three groups have 160 registers each, and its ptxas wants more; two would do, but nobody has timed them"
    SPILLS |= {("prefill", name, 64): (400, three) for name in ("v7", "v8", "v9", "v10")}
    SPILLS["prefill", "v10", 128] = (16, three)
    branch = "addresses around the branch to a first block's mask, which its ptxas does not keep in registers"
    SPILLS |= {("prefill", "v8", 256): (52, branch), ("prefill", "v9", 128): (24, branch)}
    few = "a few numbers more than 3.6 to 3.8, for which the tiles were chosen"
    SPILLS |= {("prefill", *pair): (16, few) for pair in (("v1", 128), ("v1", 256), ("v3", 256), ("v4", 256))}
if triton_version() < (3, 7):
    SPILLS["decoding", "v3", 64] = (4, "two numbers, in float32 on sm_86")


HEAD_DIMS = (64, 128, 256)
NEWEST = [[v for v in versions_of(family) if not v.requires.exactly and v.half][-1] for family in FAMILIES]


def in_turn(version, arch, dtype, head_dim, causal):
    """Whether a version that newer ones have nearly all of takes this cell too: on sm_90 all, elsewhere, version by
    version, another head dimension on each architecture with each mask; of fp32 those where registers are fewest.
    """
    turn = (version.number + list(KNOWN).index(arch) + causal) % len(HEAD_DIMS)
    of_all = arch == "sm_90" or (dtype == "fp32" and arch == "sm_86")
    return of_all or dtype == "bf16" or head_dim == (128 if dtype == "fp32" else HEAD_DIMS[turn])


def cells():
    """(version, arch, dtype, head_dim, causal): fp16 in full, the others where they differ. Older versions for any GPU
    take them in turn.
    """
    for family, newest in zip(FAMILIES, NEWEST, strict=True):
        masks = (False, True) if family == "prefill" else (False,)
        for version in versions_of(family):
            fp16 = [(arch, "fp16", d, causal) for arch in KNOWN for d in HEAD_DIMS for causal in masks]
            bf16 = [(arch, "bf16", 128, False) for arch in ("sm_80", "sm_90", "gfx942")]
            fp32 = [(arch, "fp32", 128, False) for arch in ("sm_80", "sm_90", "sm_120", "gfx942")]
            fp32 += [("sm_86", "fp32", d, False) for d in (64, 256)]  # the least shared memory
            fp8 = [(arch, "e4m3", d, False) for arch in FP8_ARCHS for d in (64, 128, 256)] + [
                ("sm_90", "e5m2", 128, True)
            ]
            found = fp16 + bf16 + fp32 + fp8
            if version.number < newest.number:
                found = [cell for cell in found if in_turn(version, *cell)]
            for arch, dtype, head_dim, causal in found:
                shape = {"dtype": dtype, "head_dim": head_dim, "causal": causal}
                if why_not(case_for(version, arch, **shape)) is None:
                    yield version, arch, dtype, head_dim, causal


def cell_id(cell):
    version, arch, dtype, head_dim, causal = cell
    return f"{version.family}-{version.name}-{arch}-{dtype}-{head_dim}-{'causal' if causal else 'full'}"


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell_id(cell)) for cell in cells()])
def test_default_tiles(cell):
    """No spills, shared memory within the limit, 64-bit offsets; a turn of a loop is one tile, as counts assume."""
    version, arch, dtype, head_dim, causal = cell
    kernels = compile_version(version, arch, dtype=dtype, head_dim=head_dim, causal=causal)
    assert {kernel.kernel for kernel in kernels if kernel.own} == {kernel.fn.__name__ for kernel in version.kernels}
    for kernel in kernels:
        found = facts(kernel)
        most, _ = SPILLS.get((version.family, version.name, head_dim), (0, ""))
        assert found["spills"] <= most, f"{kernel.kernel} {kernel.constants}: {found}"
        if (version.family, version.name, head_dim) == ("prefill", "v9", 256):
            assert all(loop.has("STL") == loop.has("LDL") == 0 for loop in kernel.main_loops)
        assert found["shared"] <= found["shared_limit"], f"{kernel.kernel} {kernel.constants}: {found}"
    first = next(kernel for kernel in kernels if kernel.own)
    assert narrow_offsets(first.stage("ttir") or first.stage("ttgir"), dtype) == []  # Gluon begins with the latter
    if arch.startswith("sm") and head_dim == 128:  # were a loop unrolled by ptxas, this would be more
        written = first.stage("ptx").count("ex2.approx")  # a few of which nobody uses
        assert 0.97 * written <= sum(i.kind == "exponentials" for i in first.code.instructions) <= written


@pytest.mark.parametrize(
    "name, dtype, head_dim", [("v8", "e4m3", 64), ("v9", "fp16", 64), ("v10", "e4m3", 64), ("v10", "e4m3", 128)]
)
def test_tiles_of_short_sequences(name, dtype, head_dim):
    """Versions that cut few rows otherwise: no spills, and shared memory within the limit."""
    version = find_version("prefill", name)
    shape = {"dtype": dtype, "head_dim": head_dim}
    both = [compile_version(version, "sm_90", seqlen=seqlen, **shape) for seqlen in (8192, 512)]
    long, short = (next(kernel for kernel in kernels if kernel.own) for kernels in both)
    found = facts(short)
    assert found["spills"] <= SPILLS.get(("prefill", name, head_dim), (0, ""))[0], found
    assert found["shared"] <= found["shared_limit"], found
    assert short.constants != long.constants


def compiled_pages(version, arch, dtype, head_dim, page_size, seqlen_q, **more):
    """The kernel of one call, compiled through the version's own launch. page_size None: a contiguous cache. more:
    "append", "window"; of float8 caches "descales", "head" or the keys of a block, and "q", a dtype.
    """
    gpu, element = KNOWN[arch], {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32} | FP8
    element = element[dtype]
    of_q = more.get("q", torch.float16) if dtype in FP8 else element

    def rows(*shape, element=element):
        return torch.empty(*shape, head_dim, dtype=element, device="meta").transpose(1, 2)

    def integers(*shape):
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    q, options = rows(2, seqlen_q, 32, element=of_q), {"seqlens_k": integers(2)}
    cache = rows(8192, page_size, 8) if page_size else rows(2, 65536, 8)
    if page_size:
        options["block_table"] = integers(2, 65536 // page_size)
    if block := more.get("descales"):
        shape = (2, 8) if block == "head" else (cache.shape[0], 8, -(-cache.shape[2] // block))
        options |= {name: torch.empty(shape, device="meta") for name in ("descale_k", "descale_v")}
    if more.get("append"):
        options |= {"k_new": rows(2, seqlen_q, 8), "v_new": rows(2, seqlen_q, 8)}
    if more.get("window"):
        options |= {"starts": integers(2), "window": (4096, 0)}
    with pretend(gpu), recorded_launches(target_of(gpu)) as launches:
        version.call(q, cache, cache, **options)
    case = case_for(version, arch, dtype=dtype, head_dim=head_dim)
    return _examined(case, launches[0][0], True, *launches[0][1:])


PAGED = [
    *[("sm_90", "fp16", d, 16, 1, {}) for d in (64, 128, 256)],
    *[(arch, "fp16", d, 16, 1, {}) for arch, d in (("sm_80", 128), ("sm_120", 256), ("gfx942", 64))],
    *[("sm_90", "bf16", 128, page_size, 1, {}) for page_size in (1, 64, 256)],
    ("sm_90", "fp32", 128, 16, 1, {}), ("sm_90", "fp16", 128, 16, 1, {"append": True}),
    ("sm_90", "fp16", 128, 16, 1, {"window": True}), ("sm_90", "fp16", 128, 16, 4, {"append": True, "window": True}),
]  # fmt: skip
PAGED_VERSIONS = [v for v in versions_of("decoding") if "block_table" in v.takes and not v.requires.exactly]


@pytest.mark.parametrize("version", PAGED_VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("arch, dtype, head_dim, page_size, seqlen_q, more", PAGED)
def test_pages(version, arch, dtype, head_dim, page_size, seqlen_q, more):
    """No spills, 64-bit offsets; on sm_90 K and V are copied blocks ahead: a wait that leaves copies under way."""
    kernel = compiled_pages(version, arch, dtype, head_dim, page_size, seqlen_q, **more)
    found = facts(kernel)
    assert found["spills"] == 0 and found["shared"] <= found["shared_limit"], found
    assert narrow_offsets(kernel.stage("ttir"), dtype) == []
    if arch == "sm_90" and dtype != "fp32":
        loop = kernel.stage("ttgir").split("scf.for", 1)[1]
        assert int(re.search(r"ttg.async_wait .*?num = (\d+)", loop)[1]) >= 2


FP8_CACHES = [
    *[("sm_90", "e4m3", d, page_size, 1, {"descales": "head"}) for d in (64, 128, 256) for page_size in (None, 16)],
    *[(arch, "e4m3", d, 16, 1, {"descales": "head"})
      for arch, d in zip(FP8_ARCHS, (64, 128, 256, 128), strict=False) if arch != "sm_90"],
    *[(arch, "e5m2", 128, page_size, 1, {"descales": "head"})
      for arch, page_size in (("sm_80", 16), ("sm_86", None), ("sm_90", 16), ("gfx942", None))],
    *[("sm_90", "e4m3", 128, page_size, 1, {"descales": 64, "q": torch.bfloat16}) for page_size in (None, 16, 256)],
    ("sm_90", "e4m3", 128, None, 8, {"descales": "head", "append": True}),
    ("sm_90", "e4m3", 128, 16, 4, {"descales": "head", "append": True, "window": True}),
]  # fmt: skip
FP8_VERSIONS = [version for version in versions_of("decoding") if version.fp8 and not version.requires.exactly]


@pytest.mark.parametrize("version", FP8_VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("arch, dtype, head_dim, page_size, seqlen_q, more", FP8_CACHES)
def test_fp8_caches(version, arch, dtype, head_dim, page_size, seqlen_q, more):
    """No spills, 64-bit offsets; float8 numbers leave shared memory two or more at a time, never one by one, and become
    float16 by as many instructions as there must be: two for four numbers, and one that sorts them.
    """
    kernel = compiled_pages(version, arch, dtype, head_dim, page_size, seqlen_q, **more)
    found = facts(kernel)
    assert found["spills"] == 0 and found["shared"] <= found["shared_limit"], found
    assert narrow_offsets(kernel.stage("ttir"), dtype) == []
    if arch == "gfx942":
        return
    (loop,) = kernel.main_loops
    assert [opcode for opcode in loop.opcodes if re.match(r"(LDG|LDS|LDL|LD)\b.*\.[US]8", opcode)] == []
    numbers = 2 * kernel.constants["BLOCK_N"] * max(32, head_dim) // (32 * kernel.warps)  # of K and V, a thread
    if dtype == "e4m3":
        assert loop.has("F2FP.F16.E4M3") == numbers // 2
    assert loop.has("LDSM") >= numbers // 16  # four numbers in each of four registers


# What decoding's Gluon versions are called with beside q, k, v; the rows of a KV head: query heads, KV heads, queries.
MASKS = {
    "plain": (), "lengths": ("seqlens_k",), "starts": ("starts",), "window": ("window",), "lse": ("return_lse",),
    "all": ("seqlens_k", "starts", "window", "return_lse"),
}  # fmt: skip
ROWS = {
    "1-row": (8, 8, 1), "4-rows": (32, 8, 1), "16-rows": (16, 1, 1), "4-queries": (32, 8, 4), "64-rows": (64, 1, 1),
    "80-rows": (5, 1, 16),
}  # fmt: skip
KEYS_AS_ROWS = [
    *[("fp16", 128, "4-rows", mask) for mask in MASKS],
    *[("fp16", d, "1-row", "plain") for d in (64, 80, 256)], *[("bf16", d, "4-rows", "all") for d in (64, 80, 256)],
    *[("fp16", d, "16-rows", "all") for d in (64, 128)], *[("fp16", d, "80-rows", "all") for d in (80, 256)],
    *[("bf16", d, "64-rows", "plain") for d in (64, 128)], ("fp16", 64, "64-rows", "lengths"),
]  # fmt: skip
KEYS_IN_PAGES = [
    *[(page, "fp16", 128, "4-rows", "all") for page in (8, 16, 256)], (16, "bf16", 64, "4-rows", "all"),
    (16, "bf16", 256, "4-rows", "all"), (16, "fp16", 80, "80-rows", "all"), (256, "fp16", 80, "1-row", "plain"),
]  # fmt: skip
LAUNCHED_EARLY = [  # v8
    (None, "fp16", 64, "1-row", "plain"), (None, "fp16", 128, "4-rows", "plain"), (None, "bf16", 80, "4-rows", "all"),
    (None, "fp16", 256, "4-queries", "lengths"), (16, "bf16", 64, "4-queries", "all"),
    (16, "fp16", 128, "4-queries", "window"), (16, "bf16", 256, "1-row", "plain"),
    (64, "fp16", 80, "4-queries", "starts"), (64, "bf16", 128, "4-rows", "all"),
]  # fmt: skip
PAIRS = [  # v9
    *[(None, "e4m3", d, "4-rows", "plain") for d in (64, 80, 128, 256)],
    *[(None, "e5m2", d, "1-row", "all") for d in (64, 128, 256)],
    *[(page, "e4m3", d, "4-queries", "all") for page in (16, 64) for d in (64, 128)],
    (16, "e4m3", 256, "4-queries", "lengths"), (64, "e5m2", 80, "4-queries", "window"),
    (8, "e4m3", 128, "1-row", "lse"), (None, "e4m3", 64, "64-rows", "all"),
    *[(None, "e4m3", d, "80-rows", "all") for d in (64, 128, 256)],
]  # fmt: skip
# Outside of the loop over keys, by the columns: while all rows of an item are read, merged and written.
SPILLS_AN_ITEM = {8: 0, 16: 32 if triton_version() < (3, 7) else 0, 64: 96}
SPILLS_OF = {  # v9: two groups and a loader have 232, 232 and 40 registers, where v8's two have 255 each
    "v9": {8: 0 if triton_version() < (3, 7) else 12, 16: 36, 32: 28, 64: 28},
}
if triton_version() >= (3, 9):  # whose ptxas keeps more of the merge, and of the pages
    SPILLS_OF = {"v8": {16: 24}, "v9": {8: 48, 16: 76, 32: 40, 64: 48}}
# Inside of it, v9, at most so many a turn of 600 to 900 instructions, in a group: with pages, of which the first group
# looks whether they are there, or 64 rows, a number or two of the item's do not fit beside the blocks of K and V.
SPILLS_A_TURN = {
    (16, "e4m3", 64, "4-queries", "all"): 1, (64, "e4m3", 64, "4-queries", "all"): 1,
    (16, "e4m3", 128, "4-queries", "all"): 4, (16, "e4m3", 256, "4-queries", "lengths"): 3,
    (64, "e5m2", 80, "4-queries", "window"): 3, (None, "e4m3", 64, "80-rows", "all"): 1,
    (None, "e4m3", 256, "80-rows", "all"): 3,
}  # fmt: skip
if triton_version() >= (3, 9):
    SPILLS_A_TURN[None, "e4m3", 64, "64-rows", "all"] = 1


@functools.cache
def compiled_step(name, page, dtype, head_dim, rows, mask):
    """The kernel of one call of a Gluon version of decoding; the tiles it chose; whether it may be launched early."""
    version, gpu = find_version("decoding", name), KNOWN["sm_90"]
    (heads_q, heads_kv, seqlen_q), element = ROWS[rows], {"fp16": torch.float16, "bf16": torch.bfloat16} | FP8
    of_q = {"e4m3": torch.float16, "e5m2": torch.bfloat16}.get(dtype, element[dtype])
    integers = torch.empty(2, dtype=torch.int32, device="meta")
    given = {"seqlens_k": integers, "starts": integers, "window": (4096, 0), "return_lse": True}
    q, k = (
        torch.empty(2, seqlen, heads, head_dim, dtype=of, device="meta").transpose(1, 2)
        for seqlen, heads, of in ((seqlen_q, heads_q, of_q), (65536, heads_kv, element[dtype]))
    )
    options = {name: given[name] for name in MASKS[mask]}
    if page is not None:
        k = torch.empty(2 * 65536 // page, page, heads_kv, head_dim, dtype=k.dtype, device="meta").transpose(1, 2)
        options["block_table"] = torch.empty(2, 65536 // page, dtype=torch.int32, device="meta")
    if dtype in FP8 and mask == "all":
        options |= {name: torch.empty(2, heads_kv, device="meta") for name in ("descale_k", "descale_v")}
    told = {"fresh_keys": 1} if "fresh_keys" in version.takes else {}
    with pretend(gpu), recorded_launches(target_of(gpu)) as launches:
        version.call(q, k, k, **options, **told)
        tiles = version.tiles(AttentionProblem.decoding(
            q, k, k, most_queries=16, block_table=options.get("block_table"), fp8_caches=True, **told
        ))  # fmt: skip
    [(kernel, constants, compiled)] = launches
    case = case_for(version, "sm_90", dtype=dtype, head_dim=head_dim)
    return _examined(case, kernel, True, constants, compiled), tiles, compiled.metadata.launch_pdl


@pytest.mark.parametrize(
    "name, page, dtype, head_dim, rows, mask",
    [("v6", None, *cell) for cell in KEYS_AS_ROWS]
    + [("v7", None, *KEYS_AS_ROWS[0]), ("v7", None, *KEYS_AS_ROWS[5])]
    + [("v7", *cell) for cell in KEYS_IN_PAGES]
    + [("v8", *cell) for cell in LAUNCHED_EARLY]
    + [("v10", *LAUNCHED_EARLY[i]) for i in (0, 3, 5, 8)],
)
def test_keys_are_rows(name, page, dtype, head_dim, rows, mask):
    """v6: both products take K and V from where TMA has put them, V transposed, with no more columns than rows need.

    v7: a box for each page and 64 columns, and the loop over keys knows of no pages.
    """
    kernel, (columns, block_n, _, _), _ = compiled_step(name, page, dtype, head_dim, rows, mask)
    found, (loop,) = facts(kernel), kernel.main_loops
    few = {"1-row": 8, "4-rows": 8, "16-rows": 16, "4-queries": 16}
    assert columns == few.get(rows, 16 if head_dim == 256 else 64)
    assert found["shared"] <= found["shared_limit"], found
    assert found["spills"] <= most_spills(name, columns) and loop.has("STL") == loop.has("LDL") == 0, found
    assert narrow_offsets(kernel.stage("ttgir"), dtype) == narrow_rows(kernel.stage("ttgir"), dtype) == []

    code = [kernel.code.instructions[i] for i in loop.body]
    products = [i.text for i in code if i.opcode.startswith("HGMMA")]
    each = block_n * max(64, 1 << (head_dim - 1).bit_length()) // (64 * 16)  # instructions of one product
    assert all(re.match(rf"HGMMA\.64x{columns}x16\.\S+ R\d+, gdesc", text) for text in products), products
    assert (len(products), sum(".tnspA" in text for text in products)) == (2 * each, each)
    if mask in ("plain", "lse"):  # what warps tell each other of the maximum, and nothing of K and V
        assert loop.has("LDS") <= 4 + columns // 4, loop.opcodes
    assert loop.has("LDG") == loop.has("UTMALDG") == 0
    assert boxes_of(kernel) == 2 * max(64, 1 << (head_dim - 1).bit_length()) // 64 * pages_of_a_block(page, block_n)


def most_spills(name: str, columns: int) -> int:
    return (SPILLS_AN_ITEM | SPILLS_OF.get(name, {}))[columns]


def boxes_of(kernel) -> int:
    """Copies by TMA in the program: of K and V, for each page of a block and each 128 bytes of a row."""
    return sum(i.opcode.startswith("UTMALDG.4D") for i in kernel.code.instructions)


def pages_of_a_block(page, block_n: int) -> int:
    return 1 if page is None else max(1, block_n // page)


@pytest.mark.parametrize(
    "name, page, dtype, head_dim, rows, mask",
    [("v9", *cell) for cell in PAIRS] + [("v11", *PAIRS[i]) for i in (2, 3, 8, 13)],
)
def test_pairs_become_float16(name, page, dtype, head_dim, rows, mask):
    """v9: a warp reads K as it lies and V transposed, 16 bits that are two columns, and what the left operands of both
    products have in registers is made of them by as many instructions as there must be: two for four numbers, and one
    that sorts them. Each of the two groups has a loop of its own.
    """
    kernel, (columns, block_n, _, _), _ = compiled_step(name, page, dtype, head_dim, rows, mask)
    found, width, text = facts(kernel), kernel.constants["WIDTH"], kernel.stage("ttgir")
    assert width == (128 if head_dim == 64 and rows in ("1-row", "4-rows", "4-queries") else block_d_of(head_dim))
    assert found["shared"] <= found["shared_limit"] and found["spills"] <= most_spills("v9", columns), found
    of_q = {"e4m3": "fp16", "e5m2": "bf16"}[dtype]
    assert narrow_offsets(text, of_q) == narrow_rows(text, of_q) == []
    assert boxes_of(kernel) == 2 * max(1, width // 128) * pages_of_a_block(page, block_n)

    numbers = block_n * width // 128  # of K, and as many of V, a thread of a group
    assert len(kernel.main_loops) == 2
    for loop in kernel.main_loops:
        code = [kernel.code.instructions[i] for i in loop.body]
        products = [i.text for i in code if i.opcode.startswith("HGMMA")]
        assert len(products) == 2 * block_n * width // (64 * 16)
        assert all(re.match(rf"HGMMA\.64x{columns}x16\.\S+ R\d+, R\d+, gdesc", text) for text in products), products
        assert loop.has("LDSM.16.M88.4") == loop.has("LDSM.16.MT88.4") == numbers // 16  # four numbers a register
        assert [opcode for opcode in loop.opcodes if re.match(r"(LDG|LDS|LDL|LD)\b.*\.[US]8", opcode)] == []
        assert loop.has("F2FP.F16.E4M3") == (numbers if dtype == "e4m3" else 0)  # e5m2 needs the sorting ones alone
        if mask in ("plain", "lse"):  # what warps tell each other of the maximum, and nothing else of K and V
            assert loop.has("LDS") - 2 * (numbers // 16) <= 4 + columns // 4, loop.opcodes
            assert loop.has("PRMT") == numbers // 2
        most = SPILLS_A_TURN.get((page, dtype, head_dim, rows, mask), 0)
        assert loop.has("STL") + loop.has("LDL") <= most and loop.has("LDG") == loop.has("UTMALDG") == 0


def block_d_of(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())


def test_half_the_instructions_of_a_float8_cache():
    """Of each of the four warps that work on 128 keys: v9 fewer than 450, v5 more than twice as many.

    (Triton 3.9 makes 798 of v5's 876, and 406 of v9's 420.)
    """
    v5, v9 = (compiled_step(name, None, "e4m3", 128, "4-rows", "plain")[0] for name in ("v5", "v9"))
    (many,), few = ([x.size * 128 / kernel.constants["BLOCK_N"] for x in kernel.main_loops] for kernel in (v5, v9))
    assert v5.warps == 4 and max(few) < 450 and many > (2 if triton_version() < (3, 9) else 1.95) * max(few)


# Launched while the kernel before it is at work (griddepcontrol.wait is ACQBULK in machine code, .launch_dependents is
# PREEXIT).


def reached_before(code, opcode: str) -> list:
    """The instructions to which there is a way from the beginning that passes none of this opcode."""
    todo, seen = [0], set()
    while todo:
        at = todo.pop()
        if at in seen or at >= len(code.instructions) or code.instructions[at].opcode == opcode:
            continue
        seen.add(at)
        todo += [code.labels[label] for label in code.instructions[at].targets]
        if code.instructions[at].falls_through:
            todo.append(at + 1)
    return [code.instructions[at] for at in sorted(seen)]


@pytest.mark.parametrize(
    "name, page, dtype, head_dim, rows, mask",
    [("v8", *LAUNCHED_EARLY[i]) for i in (0, 2, 3, 5, 8)] + [("v9", *PAIRS[i]) for i in (2, 5, 8)],
)
def test_nothing_is_touched_before_the_kernel_before_has_ended(name, page, dtype, head_dim, rows, mask):
    """v8: whatever warp it is, there is no way to global memory that does not pass a wait, but to lengths: for them the
    first warps have waited, before they started the others. The first block of K and of V comes to the L2 before that,
    where one knows without reading which it is.
    """
    kernel, (_, block_n, _, _), early = compiled_step(name, page, dtype, head_dim, rows, mask)
    assert early
    code, text = kernel.code, kernel.stage("ttgir")
    waits = [i for i in code.instructions if i.opcode == "ACQBULK"]
    assert len(waits) >= 2 and not any(i.predicate for i in waits)  # those that load, and those that compute
    assert sum(i.opcode == "PREEXIT" for i in code.instructions) == 1
    assert {"HGMMA", "UTMALDG", "STG", "ATOMG"} <= {i.opcode.split(".")[0] for i in reached_before(code, "none")}
    before, depends = reached_before(code, "ACQBULK"), {"seqlens_k", "starts"} & set(MASKS[mask])
    touched = [i for i in before if i.kind.startswith("global")]
    lines = -(-head_dim * kernel.constants.get("SIDE", 1) * (1 if dtype in FP8 else 2) // 128)  # of 128 bytes, a row
    prefetches = [sum(i.opcode == "CCTL.E.PF2" for i in some) for some in (before, code.instructions)]
    assert prefetches == [0 if page or depends else 2 * block_n // 32 * lines] * 2
    if not depends:
        assert touched == []
    else:
        assert text.index("griddepcontrol.wait") < text.index("ttg.warp_specialize")
        assert all(i.kind == "global loads" for i in touched)
        assert all(i.places[0].file.endswith("common/equal_pieces.py") for i in touched), touched


@pytest.mark.parametrize(
    "name, page, dtype, head_dim, rows, mask",
    [("v10", *LAUNCHED_EARLY[i]) for i in (0, 2, 3, 5, 8)] + [("v11", *PAIRS[i]) for i in (2, 5, 8)],
)
def test_old_keys_are_loaded_before_the_kernel_before_has_ended(name, page, dtype, head_dim, rows, mask):
    """v10: copies of K and V, and what says where they are; no queries, and nothing is written."""
    kernel, _, early = compiled_step(name, page, dtype, head_dim, rows, mask)
    before = reached_before(kernel.code, "ACQBULK")
    assert early and any(i.opcode.startswith("UTMALDG") for i in before)
    touched = [i for i in before if i.kind.startswith("global")]
    assert all(i.kind == "global loads" or i.opcode.startswith("UTMALDG") for i in touched), touched
    where = {i.places[0].file.rpartition("/")[2] for i in touched if not i.opcode.startswith("UTMALDG")}
    depends = bool({"seqlens_k", "starts"} & set(MASKS[mask]))
    assert where == {*["equal_pieces.py"] * depends, *["paged_ring.py"] * bool(page)}
    constants = kernel.constants  # v10 brings K's and V's next blocks to the L2, by 32 keys and 128 bytes, in a loop
    lines = 2 * constants["BLOCK_N"] // 32 * -(-head_dim // 64) if constants.get("AHEAD") else 0
    assert sum(i.opcode == "CCTL.E.PF2" for i in kernel.code.instructions) == lines
    if name == "v10":
        assert (constants["AHEAD"] > 0) == (mask == "plain" and page is None)


@pytest.mark.parametrize(
    "name, page, dtype, head_dim, rows, mask",
    [("v6", None, *KEYS_AS_ROWS[5]), ("v7", *KEYS_IN_PAGES[1])]
    + [(name, *LAUNCHED_EARLY[2]) for name in ("v8", "v10")]
    + [(name, *PAIRS[5]) for name in ("v9", "v11")],
)
def test_sums_are_read_before_arguments_lie_there(name, page, dtype, head_dim, rows, mask):
    """Where a piece begins is summed up in the shared memory in which the loader then finds its arguments. A warp that
    reads the sum when another has stored them already would go to a place that does not exist: Triton 3.6 lets it.
    """
    kernel, _, _ = compiled_step(name, page, dtype, head_dim, rows, mask)
    read, stored, handed_over = [], [], False
    for i in kernel.code.instructions:
        if i.opcode.startswith("BAR.SYNC"):
            everyone = re.search(r"BAR\.SYNC\S* (\S+?),? ", i.text + " ")[1] != "0x0"  # the loader's warps as well
            if everyone and stored:
                handed_over = True
                assert read == []
                break
            read, stored = [], []
        elif i.opcode.startswith("LDS"):
            read.append(i)
        elif i.opcode.startswith("STS"):
            stored.append(i)
    assert handed_over


@pytest.mark.parametrize("name", ["v9", "v11"])
def test_a_group_of_warps_hands_over_as_one(name):
    """One thread says for its group that all is stored, or read: after a barrier of the group, common/two_groups.py."""
    order = ""
    for i in compiled_step(name, *PAIRS[5])[0].code.instructions:
        here = any(place.file.endswith("two_groups.py") for place in i.places)
        if i.opcode.startswith(("STS", "LDS")) and here:
            order += i.opcode[0]
        elif i.opcode.startswith(("BAR.SYNC", "SYNCS.ARRIVE")):
            order += "ba"["ARRIVE" in i.opcode]
    assert re.search("S[Sb]*ba", order) and re.search("L[Lb]*ba", order)
    assert not re.search("[SL]a", order)


def test_v7_is_launched_when_the_kernel_before_has_ended():
    """What v8 changes is there in v8 alone."""
    kernel, _, early = compiled_step("v7", 16, "fp16", 128, "4-rows", "all")
    assert not early and not {"ACQBULK", "PREEXIT"} & {i.opcode for i in kernel.code.instructions}


ELEMENT = {"fp16": "f16", "bf16": "bf16", "fp32": "f32", "e4m3": "f8E4M3FN", "e5m2": "f8E5M2"}


def narrow_offsets(ttir: str, dtype: str) -> list[str]:
    """Steps by a 32-bit number from the address of a tensor of this dtype: they overflow at 2^31 elements."""
    signature = next(line for line in ttir.splitlines() if "tt.func public" in line)
    pointers = re.findall(r"(%\w+): !tt\.ptr<(\w+)>", signature)
    tensors = {name for name, element in pointers if element == ELEMENT[dtype]}
    tensors |= {name for name, of in re.findall(r"(%\w+) = tt\.bitcast (%\w+)", ttir) if of in tensors}
    steps = re.findall(r"tt\.addptr (%\w+), (.*?) : .*?, (i\d+)", ttir)
    return [f"{name} + {offset}" for name, offset, kind in steps if name in tensors and kind != "i64"]


def narrow_rows(ttgir: str, dtype: str) -> list[str]:
    """The like of a Gluon kernel, where addresses are tensors by then: steps by 32-bit numbers, constants excepted."""
    pattern = rf"tt\.addptr %\w+, (%\w+) : (?:tensor<[\dx]*)?!tt\.ptr<{ELEMENT[dtype]}>.*?, (?:tensor<[\dx]*)?(i\d+)"
    return [offset for offset, kind in re.findall(pattern, ttgir) if kind != "i64" and not offset.startswith("%cst")]


def test_narrow_offsets_are_found():
    signature = "tt.func public @kernel(%Q: !tt.ptr<f16> {tt.divisibility = 16 : i32}, %table: !tt.ptr<i32>)"
    steps = ["%Q_1 = tt.addptr %Q, %a : !tt.ptr<f16>, i64", "%b = tt.addptr %table, %a : !tt.ptr<i32>, i32"]
    assert narrow_offsets("\n".join([signature, *steps]), "fp16") == []
    steps.append("%Q_2 = tt.addptr %Q, %c : !tt.ptr<f16>, i32 loc(#loc7)")
    assert narrow_offsets("\n".join([signature, *steps]), "fp16") == ["%Q + %c"]
    ttir = compile_version(find_version("prefill", "v1"), "sm_90")[0].stage("ttir")
    assert narrow_offsets(re.sub(r"(!tt\.ptr<f16>), i64", r"\1, i32", ttir), "fp16") != []  # so they are in the text
    ttgir = compiled_step("v8", None, "fp16", 128, "4-rows", "plain")[0].stage("ttgir")
    assert narrow_rows(re.sub(r"(!tt\.ptr<f16>.*x)i64", r"\1i32", ttgir), "fp16") != []


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_division_leaves_the_loop(arch, head_dim):
    """v1 normalises in the loop, v2 behind it."""
    for name, inside in (("v1", True), ("v2", False)):
        kernel = compile_version(find_version("prefill", name), arch, head_dim=head_dim)[0]
        assert kernel.main_loops
        for loop in kernel.main_loops:
            assert bool(loop.has("MUFU.RCP")) == inside, f"{name}: {loop.opcodes}"
        assert any(i.opcode.startswith("MUFU.RCP") for i in kernel.code.instructions)


def products(version, kernel, loop) -> set[int]:
    """The lines with tl.dot in the version's file that the loop's tensor-core instructions come from.
    (A few of them have the line of a neighbour.)
    """
    inside = [kernel.code.instructions[i] for i in loop.body]
    lines = {p.line for i in inside if i.kind == "tensor core" for p in i.places if p.file.endswith(version.path.name)}
    return {line for line in lines if "tl.dot(" in version.path.read_text().splitlines()[line - 1]}


@pytest.mark.parametrize("arch", [*NVIDIA, "gfx942"])
def test_block_loads_and_both_products_are_in_the_loop(arch):
    """A block pointer that does not advance has its loads hoisted out of the loop, which the interpreter cannot see."""
    version = find_version("prefill", "v3")
    kernel = compile_version(version, arch)[0]
    assert kernel.main_loops
    for loop in kernel.main_loops:
        assert len(products(version, kernel, loop)) == 2
        loads = sum(count for kind, count in loop.counts.items() if kind.startswith("global loads"))
        threads = kernel.warps * (64 if arch == "gfx942" else 32)
        assert loads == 2 * kernel.constants["BLOCK_N"] * 128 * 2 / (16 * threads)  # K and V, 16 bytes a thread


@pytest.mark.parametrize("arch, dtype", [*((arch, "e4m3") for arch in FP8_ARCHS), ("sm_89", "e5m2"), ("sm_90", "e5m2")])
def test_fp8_products(arch, dtype):
    """Both products of every FP8 version run on the FP8 tensor cores."""
    shape = {"dtype": dtype, "causal": dtype == "e5m2"}  # as in cells()
    for version in versions_of("prefill"):
        if why_not(case_for(version, arch, **shape)):
            continue
        kernel = next(k for k in compile_version(version, arch, **shape) if k.own)
        for loop in kernel.main_loops:
            eight_bits = loop.has("QMMA") + loop.has("QGMMA") + loop.has("UTCQMMA")
            assert loop.counts["tensor core"] == eight_bits > 0
            assert version.name != "v3" or len(products(version, kernel, loop)) == 2
            if arch == "sm_90":
                bytewise = [opcode for opcode in loop.opcodes if re.match(r"(LDG|LDS|LDL|LD)\b.*\.[US]8", opcode)]
                assert bytewise == [] and loop.counts["shared stores"] == 0, f"{version.name}: {loop.opcodes}"


@pytest.mark.parametrize("name, dtype, comparisons", [("v9", "fp16", 1), ("v10", "e4m3", 7)])
def test_a_block_needs_no_maximum(name, dtype, comparisons):
    """Up to the branch there are no shuffles, and no comparisons but of sums; behind it lies the whole softmax."""
    kernel = next(k for k in compile_version(find_version("prefill", name), "sm_90", dtype=dtype) if k.own)
    assert kernel.main_loops
    for loop in kernel.main_loops:
        opcodes = [kernel.code.instructions[i].opcode.split(".")[0] for i in loop.body]
        usual, rare = opcodes[: opcodes.index("VOTE")], opcodes[opcodes.index("VOTE") :]
        assert usual.count("SHFL") == 0 and usual.count("FMNMX") <= comparisons
        assert rare.count("SHFL") == 4 and rare.count("FMNMX") >= kernel.constants["BLOCK_N"] // 2


def test_a_version_that_cannot_run_there_says_why():
    with pytest.raises(CompileError, match="^v1 on sm_90: has no FP8 path$"):
        compile_version(find_version("prefill", "v1"), "sm_90", dtype="e4m3")
    with pytest.raises(CompileError, match="8.9, this is 8.0"):
        compile_version(find_version("prefill", "v3"), "sm_80", dtype="e4m3")
    with pytest.raises(ValueError, match="there are sm_80"):
        compile_version(find_version("prefill", "v3"), "sm_13")


def test_tiles_that_do_not_fit_compile_and_show_it():
    tiles = (128, 128, 8, 5)
    kernel = compile_version(find_version("prefill", "v2"), "sm_90", tiles=tiles)[0]
    assert facts(kernel)["shared"] > facts(kernel)["shared_limit"]
    assert (kernel.constants["BLOCK_M"], kernel.constants["BLOCK_N"], kernel.warps) == tiles[:3]


def test_main_loops_are_innermost():
    kernel = compile_version(find_version("prefill", "v2"), "sm_100")[0]  # has waits that loop inside the loop
    assert len(kernel.loops) > len(kernel.main_loops) > 0
    assert kernel.main_loops == main_loops(kernel.loops)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_source_lines(arch):
    """Exponentials in the loop come from lines with an exp; what tl.max computes, from the line that calls it."""
    version = find_version("prefill", "v2")
    kernel = compile_version(version, arch)[0]
    lines = source_lines(kernel, version.path.relative_to(ROOT).as_posix())
    assert len(lines) == len(kernel.code.instructions) and sum(map(bool, lines)) > 0.98 * len(lines)
    text = version.path.read_text().splitlines()
    inside = {index for loop in kernel.main_loops for index in loop.body}
    kinds = [(kernel.code.instructions[index].kind, {text[line - 1] for line in lines[index]}) for index in inside]
    assert all("exp(" in "".join(found) for kind, found in kinds if kind == "exponentials")
    assert any("tl.max(" in line for kind, found in kinds if kind == "max and min" for line in found)
