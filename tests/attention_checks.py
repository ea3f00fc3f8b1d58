"""What the tests of the kernels share: cases, tensors in many layouts amid NaN, calls in guarded memory, limits."""

import contextlib
import math
import mmap
from dataclasses import dataclass, replace
from unittest import mock

import hypothesis
import pytest
import torch

from common.hardware import detect_gpu, interpreting
from common.launch import Tiles
from common.lineage import versions_of
from common.problem import FP8
from common.reference import attention_oracle, eager_attention

TORCH_DTYPE = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.bfloat16, "e5m2": torch.float16
}  # fmt: skip
HALF_AND_FULL = ("fp32", "fp16", "bf16")
FINEST = {"fp32": 5e-6, "fp16": 1e-3}  # between two ways to compute the same, by finest_dtype
FP8_LIMIT = {"e4m3": 0.06, "e5m2": 0.13}  # relative L2, for N(0, 1) inputs
FLOOR = {"fp32": 1e-6, "fp16": 1e-4, "bf16": 1e-3}  # where eager PyTorch happens to be exact
# Absolute, and relative above 1. Float8 products are summed with 14 bits on Hopper.
LSE_LIMIT = {"fp32": 2e-5, "fp16": 2e-5, "bf16": 2e-5, "e4m3": 2e-3, "e5m2": 2e-3}
SERVE_EVERYTHING = {"prefill": 4, "decoding": 1}  # versions up to here may decline nothing

needs_gpu = pytest.mark.skipif(interpreting(), reason="needs a GPU")


def _parameter(version, *dtype, family: bool = False, runs: bool = True):
    """One version, and a dtype if given (else one that it has), with the reason why it cannot run here as a skip."""
    name = "-".join([*[version.family] * family, version.name, *dtype])
    reason = version.why_not(detect_gpu(), *(dtype or (dtype_for(version, "fp16"),))) if runs else None
    return pytest.param(
        version, *dtype, id=name, marks=[pytest.mark.skip(reason=f"{version.name} {reason}")] if reason else []
    )  # fmt: skip


def all_versions(*families: str, fp8: bool = False, runs: bool = True):
    """Parametrises a test over every version that exists, v9 included once there is one.

    fp8: over those with an FP8 path alone. runs=False: the test runs no kernel, so none is skipped.
    """
    found = [version for family in families for version in versions_of(family) if version.fp8 or not fp8]
    parameters = [_parameter(version, family=len(families) > 1, runs=runs) for version in found]
    return pytest.mark.parametrize("version", parameters)


def all_versions_and_dtypes(family: str, *dtypes: str):
    """Parametrises a test over every version and the dtypes that it has a path for."""
    found = [(v, dtype) for v in versions_of(family) for dtype in dtypes if dtype_for(v, dtype) == dtype]
    return pytest.mark.parametrize("version, dtype", [_parameter(*pair) for pair in found])


def dtype_for(version, dtype: str) -> str:
    """The dtype itself, or another where the version has no path for it."""
    if dtype in FP8_LIMIT:
        return dtype if version.fp8 else "fp16"
    return dtype if version.half else "e4m3"


def table(names: str, cases: dict):
    """Parametrises a test over a dict, its keys the ids."""
    return pytest.mark.parametrize(names, list(cases.values()), ids=list(cases))


# ---- cases and tensors


@dataclass(frozen=True)
class Case:
    """One attention call: shapes, mask, memory layout."""

    batch: int = 1
    heads_q: int = 2
    heads_kv: int = 2
    seqlen_q: int = 1
    seqlen_k: int = 33
    head_dim: int = 64
    causal: bool | None = None  # None: the family has no such option
    window: tuple | None = None
    lengths_q: tuple | None = None
    lengths_k: tuple | None = None
    scale: float | None = None
    layout: str | tuple = "padded"  # one for all, or one each for q, k, v

    def options(self, device) -> dict:
        """The keyword arguments of the call, which the oracle and eager PyTorch take too."""
        given = {"is_causal": self.causal, "window": self.window, "scale": self.scale}
        for name, lengths in (("seqlens_q", self.lengths_q), ("seqlens_k", self.lengths_k)):
            given[name] = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
        return {name: value for name, value in given.items() if value is not None}

    def tensors(self, dtype: str, device, seed: int = 0) -> list[torch.Tensor]:
        """q, k, v: N(0, 1), the same values on every device, in the case's layout."""
        random = torch.Generator().manual_seed(seed)
        shapes = [(self.batch, self.heads_q, self.seqlen_q), *[(self.batch, self.heads_kv, self.seqlen_k)] * 2]
        layouts = (self.layout,) * 3 if isinstance(self.layout, str) else self.layout
        values = [torch.randn(*shape, self.head_dim, generator=random) for shape in shapes]
        return [store(x.to(device, TORCH_DTYPE[dtype]), y) for x, y in zip(values, layouts, strict=True)]


def _padded(new, b, h, s, d):
    """Gaps in every dimension, and every row on 16 bytes."""
    return new(b + 1, s + 16, h + 1, 16 * math.ceil(d / 16) + 16)[1:, 8 : 8 + s, 1:, :d].transpose(1, 2)


# Views [B, H, S, D] into memory that new(*sizes) makes.
LAYOUTS = {
    "bhsd": lambda new, b, h, s, d: new(b, h, s, d),
    "bshd": lambda new, b, h, s, d: new(b, s, h, d).transpose(1, 2),
    "padded": _padded,
    "sliced": lambda new, b, h, s, d: new(b + 1, h + 1, s + 3, d + 5)[1:, 1:, 2 : 2 + s, 3 : 3 + d],
    "packed": lambda new, b, h, s, d: new(b, s, h, 3, d)[:, :, :, 1].transpose(1, 2),
    "unaligned": lambda new, b, h, s, d: new(1 + b * h * s * d)[1:].view(b, h, s, d),
    "last-strided": lambda new, b, h, s, d: new(b, h, d, s).transpose(2, 3),
    "one-head": lambda new, b, h, s, d: new(b, 1, s, d).expand(b, h, s, d),
    "one-sequence": lambda new, b, h, s, d: new(1, h, s, d).expand(b, h, s, d),
}


def store(values: torch.Tensor, layout: str) -> torch.Tensor:
    """`values` [B, H, S, D] in a layout; every other element of the memory is NaN. Expanded layouts keep one copy."""

    def new(*sizes):
        return torch.full(sizes, math.nan, dtype=values.dtype, device=values.device)

    view = LAYOUTS[layout](new, *values.shape)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in view.stride())
    view[once].copy_(values[once])
    return view


def huge(shape: tuple, strides: tuple, dtype, device) -> torch.Tensor:
    """A view that spans billions of elements; on the CPU, pages that nobody touches do not exist.

    It starts 2^31 elements into its memory, so that an offset that wraps finds a wrong number and not a fault.
    """
    elements = 2**31 + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if device.type == "cpu":
        NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python knows it from 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags), dtype=dtype)
    elif elements * dtype.itemsize > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {elements * dtype.itemsize >> 30} GiB of GPU memory")
    else:
        memory = torch.empty(elements, dtype=dtype, device=device)
    return memory[2**31 :].as_strided(shape, strides)


# ---- caches of decoding


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def paged(k, v, lengths, page_size, *, shared=0, spare=2, seed=0, unused=-1):
    """k and v [B, H, S, D] in pages [pages, H, page_size, D], stored [pages, page_size, H, D], and their block table.

    Pages lie in a drawn order, `spare` of them in nobody's use; every row that is no key is NaN, table entries past a
    sequence's pages are `unused`. The first `shared` pages of all sequences are those of the first, which they equal.
    """
    batch, heads, seqlen, head_dim = k.shape
    most = -(-seqlen // page_size)
    order = torch.randperm(batch * most + spare, generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = len(order), page_size, heads, head_dim * k.itemsize
    caches = [torch.full(sizes, 255, dtype=torch.uint8).view(k.dtype) for _ in range(2)]  # NaN in every format
    block_table = torch.full((batch, most + 1), unused, dtype=torch.int32)
    for b in range(batch):
        for i in range(-(-lengths[b] // page_size)):
            page = order[(0 if i < shared else b) * most + i]
            block_table[b, i] = page
            keys = slice(i * page_size, min((i + 1) * page_size, lengths[b]))
            for cache, x in zip(caches, (k, v), strict=True):
                cache[page, : keys.stop - keys.start].copy_(x[b, :, keys].transpose(0, 1))
    return *(cache.transpose(1, 2).to(k.device) for cache in caches), block_table.to(k.device)


def oracle_between(q, k, v, first, lengths):
    """Output and LSE of each sequence over its keys first..length, where the rest may be NaN."""
    parts = []
    for b, (start, end) in enumerate(zip(first, lengths, strict=True)):
        here = (x[b : b + 1, :, start:end] for x in (k, v))
        parts.append(attention_oracle(q[b : b + 1], *here, is_causal=True, return_lse=True))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# ---- calls


MARGIN = 2**18  # bytes before and after what a call allocates: more than the widest tile


@contextlib.contextmanager
def guarded_memory():
    """Whatever is allocated inside holds 0xFF bytes, NaN in every float format, and lies between margins of the same.

    An element that is never written shows as NaN; a write beside a tensor shows in a margin, at the end.
    """
    made = []

    def guarded(function):
        def allocate(*args, **kwargs):
            x = function(*args, **kwargs)
            if x.device.type == "meta" or not x.numel():
                return x
            size = (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.itemsize
            memory = torch.full((size + 2 * MARGIN,), 255, dtype=torch.uint8, device=x.device)
            made.append((memory, size))
            inside = memory[MARGIN : MARGIN + size]
            return inside.view(x.dtype).as_strided(x.shape, x.stride())

        return allocate

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, guarded(getattr(owner, name))))
        yield
    for memory, size in made:
        beside = torch.cat([memory[:MARGIN], memory[MARGIN + size :]])
        assert (beside == 255).all(), "memory beside a tensor was written"


def tensor_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bits of x, to compare where NaN must equal NaN."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def storage_bytes(x: torch.Tensor) -> torch.Tensor:
    """A copy of all memory that x is a view into."""
    return torch.tensor([], dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


def leave(reason: str):
    """Skip the test, or hypothesis' example."""
    if hypothesis.currently_in_test_context():
        hypothesis.reject()
    pytest.skip(reason)


def skip_unless_served(version, q, k, v, **arguments):
    """Leave the test, with the version's reason, if it declines this call."""
    reason = version.why_not_call(q, k, v, **arguments)
    if reason:
        excused = version.family == "decoding" and (q.shape[2] > 1 or version.lacks(**arguments))
        may_decline = excused or version.number > SERVE_EVERYTHING[version.family]
        assert may_decline, f"{version.name} must serve every call: {reason}"
        leave(f"{version.name} {reason}")


def call(version, q, k, v, dtype: str = "fp16", **arguments):
    """version.call in guarded memory; q, k and v must come out as they went in. dtype "e4m3", "e5m2": use_fp8."""
    if dtype in FP8_LIMIT:
        arguments |= {"use_fp8": True, "fp8_dtype": dtype}
    skip_unless_served(version, q, k, v, **arguments)
    before = [tensor_bytes(x).clone() for x in (q, k, v)]
    with guarded_memory():
        result = version.call(q, k, v, **arguments)
    for name, x, was in zip("qkv", (q, k, v), before, strict=True):
        assert torch.equal(tensor_bytes(x), was), f"{name} was modified"
    return result


def small_tiles(version, block_m: int = 32, block_n: int = 32) -> Tiles | None:
    """Tiles so small that 70 keys are several blocks; None for kernels written for the tiles that they bring."""
    if not version.requires.interpreter:
        return None
    return Tiles(block_m if version.family == "prefill" else 1, block_n, 4, 2)


def as_cache(version, *tensors) -> list[torch.Tensor]:
    """16-bit keys and values as they are, or as float8 for a version that takes float8 caches alone."""
    return [x if version.half else x.to(FP8["e4m3"]) for x in tensors]


def splits_for(version, number: int) -> int | None:
    """num_splits for a call; None for versions that cut the keys in their own way."""
    q = torch.empty(1, 1, 1, 64, dtype=torch.float16)
    return None if version.declines(q, q, q, num_splits=number) else number


def finest_dtype(version) -> str:
    """fp32, or fp16 for a version that takes 16 bits alone."""
    q = torch.empty(1, 1, 1, 64)
    return "fp16" if version.declines(q, q, q) else "fp32"


# ---- verdicts

FEW = 16  # numbers of an output


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """|actual - wanted| / |wanted| in float64; the absolute error where wanted is 0."""
    norm = wanted.double().norm().item()
    return (actual.double() - wanted.double()).norm().item() / (norm or 1.0)


def error_limit(q, k, v, dtype: str, **options) -> float:
    """Twice eager PyTorch's error at the same precision. FP8: fixed, or 1.5 times what rounding q, k, v alone costs.

    PyTorch's error of a few numbers is luck: there, what rounding the weights and the output may cost at most.
    """
    wanted = attention_oracle(q, k, v, **options)
    if not wanted.any():
        return 0.0
    if dtype in FP8_LIMIT:
        rounded = attention_oracle(*round_inputs(q, k, v, dtype, options), **options)
        return max(FP8_LIMIT[dtype], 1.5 * relative_error(rounded, wanted))
    limit = max(2 * relative_error(eager_attention(q, k, v, **options), wanted), FLOOR[dtype])
    if wanted.numel() < FEW:
        absolute = attention_oracle(q, k, v.abs(), **options)  # sum p |v|
        limit = max(limit, torch.finfo(q.dtype).eps / 2 * (1 + (absolute.norm() / wanted.norm()).item()))
    return limit


def round_fp8(x: torch.Tensor, dtype: str, lengths=None) -> torch.Tensor:
    """x [B, H, S, D] as float8 would hold it, with one scale a head over its first `lengths` rows; in float32."""
    if not x.numel():
        return x
    used = x.float().abs()
    if lengths is not None:
        unused = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
        used = used.masked_fill(unused[:, None, :, None], 0.0)
    largest = torch.finfo(FP8[dtype]).max
    amax = used.amax((2, 3), keepdim=True)
    descale = torch.where(amax > 0, amax / largest, 1.0)
    return (x.float() * (1.0 / descale)).clamp(-largest, largest).to(FP8[dtype]).float() * descale


def round_inputs(q, k, v, dtype: str, options: dict) -> list[torch.Tensor]:
    """q, k and v as a call with these options rounds them."""
    lengths = options.get("seqlens_q"), options.get("seqlens_k"), options.get("seqlens_k")
    return [round_fp8(x, dtype, n) for x, n in zip((q, k, v), lengths, strict=True)]


def assert_close(out, q, k, v, dtype: str, limit: float | None = None, lse=None, **options):
    """out [B, Hq, Sq, D], and lse if given, agree with the oracle on q, k, v."""
    wanted, wanted_lse = attention_oracle(q, k, v, return_lse=True, **options)
    assert out.shape == q.shape and out.device == q.device
    assert out.dtype == q.dtype
    assert torch.isfinite(out).all(), f"{(~torch.isfinite(out)).sum()} of {out.numel()} elements are not finite"
    sees_nothing = wanted_lse == -math.inf
    assert (out[sees_nothing] == 0).all(), "rows that see no key must be 0"
    error = relative_error(out, wanted)
    limit = error_limit(q, k, v, dtype, **options) if limit is None else limit
    assert error <= limit, f"relative error {error:.3g}, the limit is {limit:.3g}"
    if lse is not None:
        if dtype in FP8_LIMIT:  # of rounded q and k it is exact: it sums the weights before they become float8
            rounded = round_inputs(q, k, v, dtype, options)
            _, wanted_lse = attention_oracle(*rounded, return_lse=True, **options)
        assert_lse_close(lse, wanted_lse, dtype)


def assert_lse_close(lse, wanted, dtype: str = "fp16"):
    """lse is float32, -inf exactly where the oracle's is, and near it elsewhere."""
    assert lse.dtype == torch.float32 and lse.shape == wanted.shape
    empty = wanted == -math.inf
    assert torch.equal(lse == -math.inf, empty), "LSE must be -inf for rows that see no key, and for no other"
    error = (lse.double() - wanted).abs() / wanted.abs().clamp(min=1.0)
    worst = error[~empty].max().item() if (~empty).any() else 0.0
    assert worst <= LSE_LIMIT[dtype], f"LSE error {worst:.3g}, the limit is {LSE_LIMIT[dtype]:.3g}"


def check(version, case: Case, dtype: str, device, *, tiles=None, seed: int = 0, limit=None, **more):
    """Run a case and compare output and LSE with the oracle. Returns the output."""
    q, k, v = case.tensors(dtype, device, seed)
    options = case.options(device)
    out, lse = call(version, q, k, v, dtype, return_lse=True, tiles=tiles, **options, **more)
    if version.family == "decoding" and case.seqlen_q > 1:
        options["is_causal"] = True  # it always is
    assert_close(out, q, k, v, dtype, limit, lse, **options)
    return out


def vary(case: Case, **changes) -> Case:
    """The case with some of it changed."""
    return replace(case, **changes)
