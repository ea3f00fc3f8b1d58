"""What is refused is refused before any launch, by an error that names the argument, what it was and what would do."""

import math
import re

import pytest
import torch
from attention_checks import Case, all_versions, needs_gpu, table

import common
import decoding
import prefill
from common.hardware import KNOWN, pretend
from common.lineage import find_version, versions_of
from common.problem import AttentionProblem
from common.quantize import quantize_fp8

every_version = all_versions("prefill", "decoding", runs=False)
PREFILL = Case(2, 4, 2, 5, 7, 16, layout="bhsd")
DECODING = Case(2, 4, 2, 1, 7, 16, layout="bhsd")


def ints(*values, dtype=torch.int32):
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


def change(name, function):
    """Replace one of q, k, v by function(of it)."""
    return lambda arguments: arguments | {name: function(arguments[name])}


def add(**options):
    """Further arguments; those that are functions are called with the device."""
    return lambda arguments: arguments | {
        name: value(arguments["q"].device) if callable(value) else value for name, value in options.items()
    }


# name: (what is wrong, the error, its message), of both families
BOTH = {
    "q-no-tensor": (change("q", torch.Tensor.tolist), TypeError, "q: must be a torch.Tensor, it is list"),
    "v-no-tensor": (change("v", lambda v: None), TypeError, "v: must be a torch.Tensor, it is NoneType"),
    "q-rank-2": (change("q", lambda q: q[0, 0]), ValueError, r"q: must be \[B, H, S, D\].*, it has shape \[\d, 16\]"),
    "q-rank-5": (change("q", lambda q: q[None]), ValueError, r"q: must be \[B, H, S, D\]"),
    "k-dtype": (change("k", torch.Tensor.float), TypeError, "k: is torch.float32 and q is torch.float16; .* one dtype"),
    "v-dtype": (change("v", torch.Tensor.bfloat16), TypeError, "v: is torch.bfloat16 and q is torch.float16"),
    "v-shape": (change("v", lambda v: v[:, :, 1:]), ValueError, r"v: has shape \[2, 2, 6, 16\] and k has \[2, 2, 7"),
    "v-head-dim": (change("v", lambda v: v[..., 1:]), ValueError, r"v: has shape \[2, 2, 7, 15\] and k has"),
    "k-batch": (
        lambda a: a | {"k": a["k"][:1], "v": a["v"][:1]}, ValueError, "k: has batch 1 and q has 2; they must be equal"
    ),
    "k-head-dim": (
        lambda a: a | {"k": a["k"][..., 1:], "v": a["v"][..., 1:]}, ValueError, "k: has head_dim 15 and q has 16"
    ),
    "heads-no-multiple": (
        change("q", lambda q: q[:, :3]), ValueError, "q: has 3 heads, which must be a multiple of k's 2"
    ),
    "fewer-query-heads": (change("q", lambda q: q[:, :1]), ValueError, "q: has 1 heads, .* multiple of k's 2"),
    "no-kv-heads": (lambda a: a | {"k": a["k"][:, :0], "v": a["v"][:, :0]}, ValueError, "q: has 4 heads, .* of k's 0"),
    "head-dim-257": (
        lambda a: {n: torch.cat([x] * 17, -1)[..., :257] for n, x in a.items()}, ValueError,
        "q: head_dim must be 1 to 256, it is 257",
    ),
    "head-dim-0": (
        lambda a: {n: x[..., :0] for n, x in a.items()}, ValueError, "q: head_dim must be 1 to 256, it is 0"
    ),
    "float64": (
        lambda a: {n: x.double() for n, x in a.items()}, TypeError,
        "q: must be float16, bfloat16 or float32, it is torch.float64",
    ),
    "integers": (lambda a: {n: x.int() for n, x in a.items()}, TypeError, "q: must be float16, .* it is torch.int32"),
    "float8-unasked": (
        lambda a: {n: x.to(torch.float8_e4m3fn) for n, x in a.items()}, TypeError,
        "q: must be float16, bfloat16 or float32, it is torch.float8_e4m3fn; float8 tensors need use_fp8=True",
    ),
    "requires-grad": (
        change("v", lambda v: v.clone().requires_grad_()), ValueError,
        r"q, k, v: one requires grad, and there is no backward; detach\(\) it or use torch.no_grad\(\)",
    ),
    "meta": (lambda a: {n: x.to("meta") for n, x in a.items()}, ValueError, "q: is on meta; kernels need a GPU tensor"),
    "k-elsewhere": (change("k", lambda k: k.to("meta")), ValueError, r"k: is on meta and q is on \w+.* one device"),
    "scale-nan": (add(scale=math.nan), ValueError, "scale: must be a finite float32 number, it is nan"),
    "scale-inf": (add(scale=-math.inf), ValueError, "scale: must be a finite float32 number, it is -inf"),
    "scale-large": (add(scale=1e39), ValueError, r"scale: must be a finite float32 number, it is 1e\+39"),
    "scale-text": (add(scale="0.1"), ValueError, "scale: must be a finite float32 number, it is '0.1'"),
    "scale-bool": (add(scale=True), ValueError, "scale: must be a finite float32 number, it is True"),
    "seqlens-list": (add(seqlens_k=[5, 7]), TypeError, r"seqlens_k: must be an int32 tensor \[2\], it is list"),
    "seqlens-int64": (
        add(seqlens_k=ints(5, 7, dtype=torch.int64)), TypeError, "seqlens_k: must be int32, it is torch.int64"
    ),
    "seqlens-float": (
        add(seqlens_k=ints(5, 7, dtype=torch.float32)), TypeError, "seqlens_k: must be int32, it is torch.float32"
    ),
    "seqlens-count": (add(seqlens_k=ints(5, 7, 7)), ValueError, r"seqlens_k: must have shape \[2\] .*, it has \[3\]"),
    "seqlens-rank": (add(seqlens_k=ints([5], [7])), ValueError, r"seqlens_k: must have shape \[2\] .* has \[2, 1\]"),
    "seqlens-long": (add(seqlens_k=ints(5, 8)), ValueError, r"seqlens_k: lengths must lie in 0\.\.7, they .* 5 to 8"),
    "seqlens-negative": (add(seqlens_k=ints(-1, 7)), ValueError, r"seqlens_k: lengths must lie in 0\.\.7, .* -1 to 7"),
    "seqlens-elsewhere": (add(seqlens_k=ints(5, 7)("meta")), ValueError, "seqlens_k: is on meta and q is on"),
    "return-lse": (add(return_lse=1), TypeError, "return_lse: must be True or False, it is 1"),
    "out-no-tensor": (add(out="here"), TypeError, "out: must be a torch.Tensor, it is str"),
    "out-shape": (
        lambda a: a | {"out": a["k"]}, ValueError, r"out: must be \[2, 4, \d, 16\] on .*, it is \[2, 2, 7, 16\] on"
    ),
    "out-dtype": (
        lambda a: a | {"out": a["q"].float()}, TypeError, "out: must be torch.float16, it is torch.float32"
    ),
    "out-strides": (
        lambda a: a | {"out": a["q"].repeat_interleave(2, -1)[..., ::2]}, ValueError,
        "out: its last dimension must be contiguous, its strides are",
    ),
    "out-expanded": (
        lambda a: a | {"out": a["q"][:1].clone().expand_as(a["q"])}, ValueError,
        "out: its elements must not share memory, its strides are",
    ),
    "out-elsewhere": (lambda a: a | {"out": a["q"].to("meta")}, ValueError, r"out: must be .* it is .* on meta"),
}  # fmt: skip
PREFILL_ONLY = {
    "mixed-ranks": (change("k", lambda k: k[0]), ValueError, "k: has 3 dimensions and q has 4; .* the same"),
    "causal-text": (add(is_causal="yes"), TypeError, "is_causal: must be True or False, it is 'yes'"),
    "window-number": (add(window=3), TypeError, r"window: must be a pair \(left, right\), it is 3"),
    "window-triple": (add(window=(1, 2, 3)), TypeError, r"window: must be a pair \(left, right\), it is \(1, 2, 3\)"),
    "window-negative": (
        add(window=(-1, 0)), ValueError, r"window: sides are counts of keys, or None for no bound; it is \(-1, 0\)"
    ),
    "window-float": (add(window=(1.5, None)), ValueError, r"window: sides are counts .* it is \(1.5, None\)"),
    "seqlens-q-long": (
        add(seqlens_q=ints(5, 6)), ValueError, r"seqlens_q: lengths must lie in 0\.\.5, they reach from 5 to 6"
    ),
    "seqlens-q-list": (add(seqlens_q=(5, 5)), TypeError, r"seqlens_q: must be an int32 tensor \[2\], it is tuple"),
}  # fmt: skip
DECODING_ONLY = {
    "two-queries": (
        change("q", lambda q: torch.cat([q, q], 2)), ValueError,
        r"q: decoding takes one query a sequence, \[B, Hq, 1, D\], not 2; use prefill",
    ),
    "rank-3": (
        lambda a: {n: x[0] for n, x in a.items()}, ValueError, r"q: must be \[B, H, S, D\], it has shape \[4, 1, 16\]"
    ),
    "no-splits": (add(num_splits=0), ValueError, "num_splits: must be 1 to 65535, or None for a default, it is 0"),
    "many-splits": (add(num_splits=65536), ValueError, "num_splits: must be 1 to 65535, .* it is 65536"),
    "splits-float": (add(num_splits=2.0), ValueError, "num_splits: must be 1 to 65535, .* it is 2.0"),
}  # fmt: skip

NEW = {name: lambda device: torch.zeros(2, 2, 1, 16, dtype=torch.float16, device=device) for name in ("k_new", "v_new")}


def pages(*entries, **options):
    """k and v as 2 pages of 4 keys, with a block table; further arguments like add's."""
    options = {"block_table": ints(*entries)} | options
    return lambda a: add(**options)(a | {n: a[n][:, :, :4] for n in "kv"})


def append(**options):
    return lambda a: add(**(NEW | options))(a)


# of caches: what v4 takes, and those before it do not
CACHES = {
    "window-number": (add(window=3), TypeError, r"window: must be a pair \(left, right\), it is 3"),
    "window-negative": (add(window=(-1, 0)), ValueError, r"window: sides are counts of keys, .* it is \(-1, 0\)"),
    "starts-list": (add(starts=[0, 0]), TypeError, r"starts: must be an int32 tensor \[2\], it is list"),
    "starts-int64": (add(starts=ints(0, 0, dtype=torch.int64)), TypeError, "starts: must be int32, it is torch.int64"),
    "starts-count": (add(starts=ints(0, 0, 0)), ValueError, r"starts: must have shape \[2\]"),
    "starts-far": (add(starts=ints(0, 8)), ValueError, r"starts: first keys must lie in 0\.\.7, they .* 0 to 8"),
    "starts-negative": (add(starts=ints(-2, 7)), ValueError, r"starts: first keys must lie in 0\.\.7, .* -2 to 7"),
    "table-list": (
        pages([0], [1], block_table=[[0], [1]]), TypeError, r"block_table: must be an int32 tensor \[2, .* it is list"
    ),
    "table-int64": (
        pages([0], [1], block_table=ints([0], [1], dtype=torch.int64)), TypeError,
        "block_table: must be int32, it is torch.int64",
    ),
    "table-rank": (pages(0, 1), ValueError, r"block_table: must be an int32 tensor \[2, pages .* has shape \[2\]"),
    "table-batch": (pages([0, 1]), ValueError, r"block_table: must be an int32 tensor \[2, .* has shape \[1, 2\]"),
    "table-elsewhere": (
        pages([0], [1], block_table=ints([0], [1])("meta")), ValueError, "block_table: is on meta and q is on"
    ),
    "page-size": (add(block_table=ints([0], [1])), ValueError, "k: with a block_table .* power of two .*256, it is 7"),
    "table-past": (
        pages([0, 1], [1, 2], check_table=True), ValueError,
        r"block_table: pages in use must lie in 0\.\.1, the one at \[1, 1\] is 2",
    ),
    "table-negative": (
        pages([0, -1], [1, 0], seqlens_k=ints(5, 8), check_table=True), ValueError,
        r"block_table: pages in use must lie in 0\.\.1, the one at \[0, 1\] is -1",
    ),
    "table-lengths": (
        pages([0], [1], seqlens_k=ints(4, 5)), ValueError, r"seqlens_k: lengths must lie in 0\.\.4, they .* 4 to 5"
    ),
    "deterministic-one": (add(deterministic=1), TypeError, "deterministic: must be True or False, it is 1"),
    "deterministic-splits": (
        add(deterministic=True, num_splits=3), ValueError, "num_splits: deterministic=True sets .*; leave out 3"
    ),
    "check-table": (pages([0], [1], check_table=1), TypeError, "check_table: must be True or False, it is 1"),
    "k-new-alone": (add(k_new=NEW["k_new"]), TypeError, "v_new: must be a torch.Tensor, .* it is NoneType"),
    "v-new-alone": (add(v_new=NEW["v_new"]), TypeError, "k_new: must be a torch.Tensor, .* it is NoneType"),
    "new-dtype": (
        append(k_new=lambda device: torch.zeros(2, 2, 1, 16, device=device)), TypeError,
        "k_new: is torch.float32 and k is torch.float16",
    ),
    "new-shape": (
        append(v_new=lambda device: torch.zeros(2, 2, 2, 16, dtype=torch.float16, device=device)), ValueError,
        r"v_new: must have shape \[2, 2, 1, 16\], it has \[2, 2, 2, 16\]",
    ),
    "new-elsewhere": (append(k_new=NEW["k_new"]("meta")), ValueError, "k_new: is on meta and k is on"),
    "new-grad": (
        append(v_new=lambda device: NEW["v_new"](device).requires_grad_()), ValueError, "v_new: requires grad"
    ),
    "cache-strided": (
        lambda a: append()(a | {"v": a["v"].repeat_interleave(2, -1)[..., ::2]}), ValueError,
        "v: to be written its last dimension must be contiguous",
    ),
    "cache-expanded": (
        lambda a: append()(a | {"k": a["k"][:1].expand(2, -1, -1, -1)}), ValueError,
        "k: to be written its elements must not share memory",
    ),
}  # fmt: skip


def arguments_of(case, device, dtype="fp16") -> dict:
    return dict(zip("qkv", case.tensors(dtype, device), strict=True))


@table("wrong, error, message", BOTH | PREFILL_ONLY)
def test_prefill_refuses(wrong, error, message, device):
    with pytest.raises(error, match=message):
        AttentionProblem.prefill(**wrong(arguments_of(PREFILL, device)))


@table("wrong, error, message", BOTH | DECODING_ONLY)
def test_decoding_refuses(wrong, error, message, device):
    with pytest.raises(error, match=message):
        AttentionProblem.decoding(**wrong(arguments_of(DECODING, device)))


@table("wrong, error, message", CACHES)
def test_caches_refuse(wrong, error, message, device, launches):
    """The entry point and v4 refuse before they launch, and the message is about the argument."""
    arguments = wrong(arguments_of(DECODING, device))
    for call in (AttentionProblem.decoding, find_version("decoding", "v4").call, decoding.flash_decoding):
        with pytest.raises(error, match=message):
            call(**arguments)
    assert not launches


@pytest.mark.parametrize("fresh_keys", [-1, True, 2**31, 1.0])
def test_fresh_keys_that_are_no_count(fresh_keys, launches):
    """Also where the version that is chosen waits for all keys."""
    for gpu, version in (("sm_90", "v10"), ("sm_80", "v10")):
        with pretend(KNOWN[gpu]):
            for call in (decoding.flash_decoding, find_version("decoding", version).call):
                with pytest.raises(ValueError, match=f"fresh_keys: must be a count of keys, .* it is {fresh_keys}"):
                    call(**add(fresh_keys=fresh_keys)(arguments_of(DECODING, "meta")))
    assert not launches


GOOD_TABLES = {
    "unused": pages([0, -1], [1, 99], seqlens_k=ints(4, 0), check_table=True),
    "before-window": pages([7, 0], [-1, 1], seqlens_k=ints(8, 6), window=(1, 0), check_table=True),
    "before-starts": pages([7, 0], [-1, -1], starts=ints(4, 8), check_table=True),
    "no-entries": pages([], [], check_table=True),
}


@table("good", GOOD_TABLES)
def test_entries_that_nobody_follows_are_not_refused(good, device):
    AttentionProblem.decoding(**good(arguments_of(DECODING, device)))


AT_THE_DOOR = ("k-dtype", "heads-no-multiple", "requires-grad", "scale-nan", "seqlens-long", "out-dtype")


@every_version
@table("wrong, error, message", {name: BOTH[name] for name in AT_THE_DOOR})
def test_every_version_refuses_before_it_launches(version, wrong, error, message, device, launches):
    """A version that looks at its tensors before, or past, the one place that checks them."""
    case = PREFILL if version.family == "prefill" else DECODING
    with pytest.raises(error, match=message):
        version.call(**wrong(arguments_of(case, device)))
    assert not launches


def test_gradients_that_nobody_asked_for(device):
    """Under no_grad tensors that require grad are fine: nothing is recorded."""
    arguments = {name: x.clone().requires_grad_() for name, x in arguments_of(PREFILL, device).items()}
    with torch.no_grad():
        AttentionProblem.prefill(**arguments)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    """The message says how the CPU would do."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="q: is on cpu; kernels need a GPU tensor .*for the CPU, TRITON_INTERPRET=1"):
        AttentionProblem.prefill(**arguments_of(PREFILL, "cpu"))


@needs_gpu
@every_version
def test_cpu_tensors_on_a_gpu_machine(version):
    case = PREFILL if version.family == "prefill" else DECODING
    with pytest.raises(ValueError, match="q: is on cpu; kernels need a GPU tensor"):
        version.call(**arguments_of(case, torch.device("cpu")))


# ---- FP8


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "gfx942"])
def test_fp8_needs_a_gpu_that_has_it(arch):
    q = torch.empty(1, 1, 5, 16, dtype=torch.float16, device="meta")
    reason = re.escape(f"use_fp8: needs an NVIDIA GPU of compute capability 8.9, this is {KNOWN[arch].name} ({arch})")
    with pretend(KNOWN[arch]), pytest.raises(ValueError, match=reason):
        AttentionProblem.prefill(q, q, q, use_fp8=True)


FP8 = {
    "format": (add(use_fp8=True, fp8_dtype="fp8"), ValueError, "fp8_dtype: must be 'e4m3' or 'e5m2', it is 'fp8'"),
    "float32": (
        lambda a: {n: x.float() for n, x in a.items()} | {"use_fp8": True}, TypeError,
        "q: with use_fp8 must be float16, bfloat16 or torch.float8_e4m3fn, it is torch.float32",
    ),
    "other-format": (
        lambda a: {n: x.to(torch.float8_e5m2) for n, x in a.items()} | {"use_fp8": True}, TypeError,
        "q: with use_fp8 must be float16, bfloat16 or torch.float8_e4m3fn, it is torch.float8_e5m2",
    ),
    "descale-of-16-bit": (
        add(use_fp8=True, descales=(0.5, None, None)), ValueError,
        "descale_q, descale_k, descale_v: belong to float8 tensors; 16-bit ones get their own",
    ),
    "descale-unasked": (add(descales=(None, 0.5, None)), ValueError, "descale_q, descale_k, descale_v: belong"),
}  # fmt: skip
DESCALES = {
    "list": (([1.0], None, None), TypeError, "descale_q: must be a number or a tensor, it is list"),
    "shape": (
        (None, lambda device: torch.ones(3, device=device), None), ValueError,
        r"descale_k: must have one element, or shape \[2\] or \[2, 2\], it has \[3\]",
    ),
    "heads-of-q": (
        (None, None, lambda device: torch.ones(2, 4, device=device)), ValueError,
        r"descale_v: must have one element, or shape \[2\] or \[2, 2\], it has \[2, 4\]",
    ),
    "elsewhere": (
        (lambda device: torch.ones(4, device="meta"), None, None), ValueError,
        "descale_q: is on meta and q on .* one device",
    ),
}  # fmt: skip


@table("wrong, error, message", FP8)
def test_fp8_refuses(wrong, error, message, device):
    with pytest.raises(error, match=message):
        AttentionProblem.prefill(**wrong(arguments_of(PREFILL, device)))


@table("descales, error, message", DESCALES)
def test_descales_that_do_not_fit(descales, error, message, device):
    tensors = {name: x.to(torch.float8_e4m3fn) for name, x in arguments_of(PREFILL, device).items()}
    descales = tuple(d(device) if callable(d) else d for d in descales)
    with pytest.raises(error, match=message):
        AttentionProblem.prefill(**tensors, use_fp8=True, descales=descales)


def test_quantize_refuses_like_a_call(device):
    with pytest.raises(ValueError, match="q: has 3 heads, which must be a multiple of k's 2"):
        quantize_fp8(**BOTH["heads-no-multiple"][0](arguments_of(PREFILL, device)))


# ---- the two entry points


def test_unknown_versions_and_families(device):
    names = ", ".join(version.name for version in versions_of("prefill"))
    with pytest.raises(ValueError, match=f"version 'v99' of prefill does not exist; there are {names}"):
        prefill.flash_attention(**arguments_of(PREFILL, device), version="v99")
    with pytest.raises(ValueError, match="version 'newest' of decoding does not exist; there are v1"):
        decoding.flash_decoding(**arguments_of(DECODING, device), version="newest")
    with pytest.raises(ValueError, match="family 'training' does not exist; there are prefill, decoding"):
        versions_of("training")


def test_fp8_of_a_version_without_it(device):
    having = ", ".join(version.name for version in versions_of("prefill") if version.fp8)
    with pytest.raises(ValueError, match=f"use_fp8: v2 has no FP8 path; {having} have"):
        prefill.flash_attention(**arguments_of(PREFILL, device), version="v2", use_fp8=True)


def test_lengths_given_twice(device):
    with pytest.raises(ValueError, match="seq_lens: sets seqlens_q and seqlens_k, one of which is given too"):
        lengths = ints(5, 5)(device)
        prefill.flash_attention(**arguments_of(PREFILL, device), seq_lens=lengths, seqlens_k=lengths)


@pytest.mark.parametrize("entry", [prefill.flash_attention, decoding.flash_decoding], ids=["prefill", "decoding"])
def test_entry_points_refuse_like_versions(entry, device):
    """The wrong argument is what the message is about, not that no version was found."""
    case = PREFILL if entry is prefill.flash_attention else DECODING
    for name in AT_THE_DOOR:
        wrong, error, message = BOTH[name]
        with pytest.raises(error, match=message):
            entry(**wrong(arguments_of(case, device)))


NOT_FOR_HOPPER = {
    "fp32": (lambda a: {n: x.float() for n, x in a.items()}, "takes q, k and v of 16 bits, not torch.float32"),
    "D7": (lambda a: {n: x[..., :7] for n, x in a.items()}, "takes head_dim in multiples of 8, not 7: TMA wants"),
    "splits": (add(num_splits=2), "takes no num_splits"),
    "strides": (change("v", lambda v: v[:, :1].expand(v.shape)), r"needs tensors that .* \(TMA\), not strides"),
    "odd-rows": (
        lambda a: {n: torch.empty(*x.shape[:3], 20, dtype=x.dtype, device=x.device)[..., :16] for n, x in a.items()},
        r"needs tensors that .* \(TMA\), not strides \[280, 140, 20, 1\]",
    ),
    "no-keys": (
        lambda a: a | {"k": a["k"][:, :, :0], "v": a["v"][:, :, :0]},
        r"has no TMA descriptor for an empty tensor, \[2, 2, 0, 16\]",
    ),
    "lengths": (
        lambda a: {n: x[:1].expand(5000, -1, -1, -1).contiguous() for n, x in a.items()}
        | {"starts": torch.empty(5000, dtype=torch.int32, device="meta")},
        "takes seqlens_k and starts of up to 4096 sequences, not 5000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["v6", "v7", "v8", "v10"])
@table("wrong, message", NOT_FOR_HOPPER)
def test_a_version_for_hopper_refuses(wrong, message, name, launches):
    """Called itself, it says which argument it does not take, and who does; the entry point takes another version."""
    arguments, version = wrong(arguments_of(DECODING, "meta")), find_version("decoding", name)
    with pretend(KNOWN["sm_90"]):
        with pytest.raises(ValueError, match=f"^this version {message}.*; decoding.flash_decoding takes the newest"):
            version.call(**arguments)
        assert not launches
        decoding.flash_decoding(**arguments)
    with pretend(KNOWN["sm_100"]), pytest.raises(ValueError, match="needs compute capability 9.0, this is NVIDIA B200"):
        version.call(**arguments_of(DECODING, "meta"))


def as_float8(arguments):
    return arguments | {name: arguments[name].to(torch.float8_e4m3fn) for name in "kv"}


def descales_of(*shape):
    return add(**dict.fromkeys(("descale_k", "descale_v"), lambda device: torch.empty(shape, device=device)))


NOT_IN_PAIRS = {  # of a call with float8 caches, or with others
    "16-bits": (lambda a: a | {n: a[n].half() for n in "kv"}, "takes caches of float8, not torch.float16"),
    "fp32": (lambda a: {n: x.float() for n, x in a.items()}, "takes caches of float8, not torch.float32"),
    "D8": (lambda a: {n: x[..., :8] for n, x in a.items()}, "takes head_dim in multiples of 16, not 8: TMA wants"),
    "blocks": (descales_of(2, 2, 1), "takes descales of heads, not of blocks of keys"),
    "splits": NOT_FOR_HOPPER["splits"],
    "strides": NOT_FOR_HOPPER["strides"],
    "odd-rows": NOT_FOR_HOPPER["odd-rows"],
    "no-keys": NOT_FOR_HOPPER["no-keys"],
    "lengths": NOT_FOR_HOPPER["lengths"],
}


@pytest.mark.parametrize("name", ["v9", "v11"])
@table("wrong, message", NOT_IN_PAIRS)
def test_a_version_for_float8_caches_alone_refuses(wrong, message, name, launches):
    """The like: one that takes 16 bits gets what this one does not."""
    arguments, version = wrong(as_float8(arguments_of(DECODING, "meta"))), find_version("decoding", name)
    with pretend(KNOWN["sm_90"]):
        with pytest.raises(ValueError, match=f"^this version {message}.*; decoding.flash_decoding takes the newest"):
            version.call(**arguments)
        assert not launches
        decoding.flash_decoding(**arguments)
        assert launches
        version.call(**descales_of(2, 2)(as_float8(arguments_of(DECODING, "meta"))))


def test_float8_caches_alone_is_said_of_the_version(launches):
    """Asked for by name with 16 bits: who takes them."""
    with pretend(KNOWN["sm_90"]), pytest.raises(
        ValueError, match="^version: v9 takes float8 caches alone; v1 does$"
    ):  # fmt: skip
        decoding.flash_decoding(**arguments_of(DECODING, "meta"), version="v9")
    assert not launches


def test_what_nobody_serves_is_said_of_the_argument(launches):
    """17 queries with pages, where the newest version has no pages: not that an argument is unexpected."""
    arguments = pages([0, 1], [2, 3])(arguments_of(DECODING, "meta"))
    arguments["q"] = arguments["q"].expand(-1, -1, 17, -1)
    with pretend(KNOWN["sm_90"]), pytest.raises(ValueError, match="q: decoding takes 1 to 16 queries a sequence"):
        decoding.flash_decoding(**arguments)
    assert not launches


def test_no_gpu_is_said(monkeypatch, device):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((common.hardware.NoGPU, ValueError), match="no GPU|needs? a GPU tensor"):
        prefill.flash_attention(**arguments_of(PREFILL, "cpu"))
    with pytest.raises((common.hardware.NoGPU, ValueError), match="no GPU|needs? a GPU tensor"):
        decoding.flash_decoding(**arguments_of(DECODING, "cpu"))


def test_find_version_takes_what_people_type():
    assert {find_version("prefill", name).number for name in ("v2", "2", 2)} == {2}
