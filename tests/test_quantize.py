"""FP8 inputs: values and scales against PyTorch's own casts, the layout of V, and calls on tensors quantised before."""

import math

import pytest
import torch
from attention_checks import Case, all_versions, assert_close, call, guarded_memory, round_fp8, tensor_bytes

from common.problem import FP8, AttentionProblem
from common.quantize import quantize_fp8, quantize_problem

formats = pytest.mark.parametrize("fp8_dtype", ["e4m3", "e5m2"])
fp8_versions = all_versions("prefill", fp8=True)
CASE = Case(2, 4, 2, 37, 75, 59, causal=True)


def magnitude(y):
    """Float8 numbers without their signs, counted from zero."""
    return y.view(torch.uint8).int() & 0x7F


def quantized(q, k, v, fp8_dtype):
    with guarded_memory():
        return quantize_fp8(q, k, v, fp8_dtype)


@formats
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced", "last-strided", "one-head"])
def test_values_and_scales(fp8_dtype, dtype, layout, device):
    """One scale a head, the largest value of a head at the format's largest, the rest rounded to nearest, those of V
    here and there to the next number.
    """
    case = Case(2, 4, 2, 37, 75, 59, layout=layout)
    q, k, v = case.tensors(dtype, device)
    found = quantized(q, k, v, fp8_dtype)
    for x, y, descale in zip((q, k, v), found[:3], found[3:], strict=True):
        assert y.dtype == FP8[fp8_dtype] and y.shape == x.shape
        assert descale.dtype == torch.float32 and descale.shape == x.shape[:2]
        nearest = round_fp8(x, fp8_dtype)
        if x is v:
            steps = (magnitude(y) - magnitude((nearest / descale[..., None, None]).to(y.dtype))).abs()
            assert steps.max() == 1 and steps.float().mean() < 0.1
        else:
            torch.testing.assert_close(y.float() * descale[..., None, None], nearest, rtol=1e-6, atol=0)
        assert (y.float().abs().amax((2, 3)) == torch.finfo(y.dtype).max).all()


@pytest.mark.parametrize("seqlen_k", [1, 15, 16, 75])
def test_keys_of_v_are_contiguous(seqlen_k, device):
    """Hopper's FP8 products read V so, 16 bytes at a time: rows of V^T start on 16 bytes."""
    found = quantized(*Case(2, 2, 2, 5, seqlen_k, 33).tensors("bf16", device), "e4m3")
    assert found.v.stride(2) == 1 and found.v.data_ptr() % 16 == 0
    assert all(stride % 16 == 0 for stride in (found.v.stride(0), found.v.stride(1), found.v.stride(3)))
    assert found.q.stride(3) == found.k.stride(3) == 1


@formats
@pytest.mark.parametrize("kind", ["normal", "offset", "outliers"])
def test_errors_of_v_cancel(fp8_dtype, kind, device):
    """Over 128 keys they sum to less than those of the nearest numbers do, and in no column to more. The numbers
    themselves are hardly less exact, small ones in a column with a large one too.
    """
    q, k, v = Case(2, 2, 2, 5, 520, 136).tensors("bf16", device)
    v = v + 5.0 if kind == "offset" else v
    if kind == "outliers":
        v[:, :, 7::128] *= 999
    found = quantized(q, k, v, fp8_dtype)
    descale = found.descale_v[..., None, None]
    here, nearest = (y / descale - v.float() / descale for y in (found.v.float() * descale, round_fp8(v, fp8_dtype)))
    sums, before = (torch.stack([some.sum(2) for some in error.split(128, 2)], 2) for error in (here, nearest))
    assert (sums.abs() <= 1.001 * before.abs() + 0.01).all()
    assert sums[:, :, :4].norm() < {"normal": 0.5, "offset": 0.67, "outliers": 1.0}[kind] * before[:, :, :4].norm()
    assert here.norm() < 1.02 * nearest.norm()
    small = v.abs() < v.abs().amax() / 100
    if small.any():
        assert here[small].norm() < 1.05 * nearest[small].norm()


@formats
def test_what_float8_holds_stays(fp8_dtype, device):
    """All numbers of the format, in columns whose other numbers pull at them."""
    dtype = FP8[fp8_dtype]
    held = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    held = held[held.isfinite()]
    v = torch.randn(1, 1, 2 * len(held), 32, generator=torch.Generator().manual_seed(0))
    v[0, 0, ::2] = held[:, None]
    v = v.half().to(device) if fp8_dtype == "e4m3" else v.bfloat16().to(device)
    found = quantized(v, v, v, fp8_dtype)
    assert found.descale_v.item() == 1.0
    assert torch.equal(found.v.float()[:, :, ::2], v.float()[:, :, ::2])
    assert not torch.equal(found.v.float(), found.k.float())


def test_unused_keys_have_no_say(device):
    """What lies past seqlens_k, NaN too, changes no bit of V before it."""
    q, k, v = Case(2, 2, 2, 5, 300, 32).tensors("bf16", device)
    lengths = torch.tensor([300, 200], dtype=torch.int32, device=device)
    found = []
    for junk in (0.0, 0.3, math.nan):
        v[1, :, 200:] = junk
        problem = AttentionProblem.prefill(q, k, v, seqlens_k=lengths, use_fp8=True)
        quantize_problem(problem, "e4m3")
        found.append(problem.v)
    for v8 in found[1:]:
        assert torch.equal(tensor_bytes(v8[1, :, :200]), tensor_bytes(found[0][1, :, :200]))
        assert torch.equal(tensor_bytes(v8[0]), tensor_bytes(found[0][0]))


@formats
def test_heads_of_zeros_infinities_and_nan(fp8_dtype, device):
    """0 / 0, a scale of infinity or NaN: such a head keeps a scale of its own and spoils no other."""
    q, k, v = Case(1, 4, 4, 20, 20, 32).tensors("bf16", device)
    k[:, 0], k[:, 1, 3, 3], k[:, 2, 3, 3] = 0.0, math.inf, math.nan
    found = quantized(q, k, v, fp8_dtype)
    assert torch.isfinite(found.descale_k).all() and (found.descale_k > 0).all()
    assert (found.k[:, 0].float() == 0).all()
    assert found.k[0, 1, 3, 3].float() == torch.finfo(FP8[fp8_dtype]).max  # clamped
    assert found.k[0, 2, 3, 3].isnan() and found.k.isnan().sum() == 1
    alone = quantized(q[:, 3:], k[:, 3:], v[:, 3:], fp8_dtype)
    assert torch.equal(tensor_bytes(alone.k), tensor_bytes(found.k[:, 3:]))


def test_a_head_of_next_to_nothing(device):
    """A scale of infinity makes NaN of its zeros."""
    q, k, v = Case(1, 1, 1, 20, 20, 32).tensors("bf16", device)
    k *= 1e-37
    k[:, :, 0] = 0.0
    assert torch.isfinite(quantized(q, k, v, "e4m3").k.float()).all()


@pytest.mark.parametrize("size", [1e-4, 3e4])
def test_scales_take_any_magnitude(size, device):
    """Values that float8 alone could not hold, as the scales are for."""
    q, k, v = (x * size for x in CASE.tensors("fp32", device))
    found = quantized(*(x.to(torch.bfloat16) for x in (q, k, v)), "e4m3")
    for x, y, descale in zip((q, k, v), found[:3], found[3:], strict=True):
        assert ((y.float() * descale[..., None, None] - x).norm() / x.norm()).item() < 0.035


@pytest.mark.parametrize("sizes", [(2, 2, 1, 5, 0), (2, 2, 1, 0, 5), (0, 0, 0, 5, 5)], ids=str)
def test_zero_size(sizes, device):
    found = quantized(*Case(*sizes, 16, layout="bhsd").tensors("bf16", device), "e4m3")
    assert all(torch.isfinite(descale).all() and (descale > 0).all() for descale in found[3:])


@fp8_versions
@formats
def test_quantised_before_or_inside(version, fp8_dtype, device):
    """A call on 16-bit tensors, and one on the float8 tensors they become, give the same bits."""
    q, k, v = CASE.tensors("bf16", device)
    inside = call(version, q, k, v, fp8_dtype, is_causal=True, return_lse=True)
    *tensors, descale_q, descale_k, descale_v = quantized(q, k, v, fp8_dtype)
    descales = {"descale_q": descale_q, "descale_k": descale_k, "descale_v": descale_v}
    before = call(version, *tensors, fp8_dtype, is_causal=True, return_lse=True, **descales)
    assert before[0].dtype == torch.bfloat16
    assert torch.equal(before[0], inside[0]) and torch.equal(before[1], inside[1])


@fp8_versions
def test_any_layout_of_float8_values(version, device):
    """V as everybody stores it, [.., keys, D] contiguous, is laid out anew."""
    q, k, v, *descales = quantized(*CASE.tensors("bf16", device), "e4m3")
    descales = dict(zip(("descale_q", "descale_k", "descale_v"), descales, strict=True))
    wanted = call(version, q, k, v, "e4m3", **descales)
    assert torch.equal(call(version, q, k, v.contiguous(), "e4m3", **descales), wanted)
    laid_out = AttentionProblem.prefill(q, k, v.contiguous(), use_fp8=True)
    quantize_problem(laid_out, "e4m3")
    assert laid_out.v.stride(2) == 1 and torch.equal(tensor_bytes(laid_out.v), tensor_bytes(v))
    bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(call(version, *bshd, "e4m3", **descales), wanted)


@fp8_versions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_forms_of_descale_and_out(version, dtype, device):
    """A number, one element, one a head, one a head and sequence; the output in the 16-bit type of `out`."""
    case = Case(2, 2, 2, 20, 33, 32)
    q, k, v = (x.to(torch.float8_e4m3fn) for x in case.tensors("fp32", device))
    by_head = torch.tensor([0.5, 2.0], device=device)
    given = torch.full(q.shape, math.nan, dtype=dtype, device=device)
    number = torch.tensor(2.0, device=device)
    call(version, q, k, v, "e4m3", descale_q=0.5, descale_k=number, descale_v=by_head, out=given)
    wanted = [q.float() * 0.5, k.float() * 2.0, v.float() * by_head[None, :, None, None]]
    assert_close(given, *(x.to(dtype) for x in wanted), "e4m3", limit=0.03)  # the rounding of p alone
    per_sequence = torch.tensor([[1.0, 2.0], [3.0, 0.25]], device=device)
    out = call(version, q, k, v, "e4m3", descale_q=per_sequence, descale_v=per_sequence)
    wanted = [q.float() * per_sequence[..., None, None], k.float(), v.float() * per_sequence[..., None, None]]
    assert_close(out, *(x.to(torch.bfloat16) for x in wanted), "e4m3", limit=0.03)


@fp8_versions
def test_unused_keys_do_not_set_the_scale(version, device):
    """Large finite values past seqlens_k, as memory that was never written holds them, must not flush the rest to 0."""
    q, k, v = Case(1, 1, 1, 20, 40, 32).tensors("e4m3", device)
    clean = (q, k.clone(), v.clone())
    k[:, :, 30:], v[:, :, 30:] = 3e4, 3e4
    lengths = torch.tensor([30], dtype=torch.int32, device=device)
    assert_close(call(version, q, k, v, "e4m3", seqlens_k=lengths), *clean, "e4m3", seqlens_k=lengths)
