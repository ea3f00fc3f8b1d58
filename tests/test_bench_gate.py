"""The gate lets right kernels through and no others."""

import math

import pytest
import torch

from bench import gate
from bench.cases import Case
from bench.inputs import make_inputs
from common import quantize
from common.problem import FP8
from common.reference import attention_oracle, eager_attention

CASE = Case("prefill", "fp32", 1, 16, 16, 192, 192, 32, True)


def judged(kernel, case=CASE):
    """The gate's verdict on kernel(inputs, out), which writes into a poisoned output."""
    inputs = make_inputs(case, "cpu")
    expected = gate.expect(inputs)
    out = torch.empty_like(inputs.q)
    gate.poison(out)
    kernel(inputs, out)
    return gate.check(out, case, expected, gate.error_limit(case, expected))


def right(inputs, out):
    out.copy_(eager_attention(inputs.q, inputs.k, inputs.v, is_causal=inputs.case.causal))


def test_a_right_kernel_passes():
    error, verdict = judged(right)
    assert verdict == "pass" and error < 1e-6


def test_a_kernel_that_computes_one_head_of_sixteen_is_red():
    def one_head(inputs, out):
        q, k, v = (x[:, :1] for x in (inputs.q, inputs.k, inputs.v))
        out[:, :1] = eager_attention(q, k, v, is_causal=True)

    error, verdict = judged(one_head)
    assert error is None and "93.8 % of the output is unwritten" in verdict


def test_a_kernel_that_gives_every_head_the_first_ones_answer_is_red():
    def first_for_all(inputs, out):
        right(inputs, out)
        out.copy_(out[:, :1].expand_as(out).clone())

    assert "above the limit" in judged(first_for_all)[1]


def test_a_kernel_that_writes_nothing_is_red():
    assert "100 % of the output is unwritten" in judged(lambda inputs, out: None)[1]


def test_one_nan_is_red():
    def with_nan(inputs, out):
        right(inputs, out)
        out[0, 3, 77, 5] = math.nan  # whether the row is sampled or not

    assert "NaN" in judged(with_nan)[1]


def test_a_kernel_without_the_mask_is_red():
    def full(inputs, out):
        out.copy_(eager_attention(inputs.q, inputs.k, inputs.v))

    assert "above the limit" in judged(full)[1]


def test_a_kernel_that_is_three_times_as_wrong_as_pytorch_is_red():
    case = Case("prefill", "fp16", 1, 2, 2, 64, 64, 32)
    inputs = make_inputs(case, "cpu")
    expected = gate.expect(inputs)

    def noisy(times):
        noise = torch.randn(expected.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        noise *= times * expected.pytorch_error * expected.values.norm() / noise.norm()
        return gate.check(expected.values + noise, case, expected, gate.error_limit(case, expected))[1]

    assert noisy(1.9) == "pass" and "above the limit" in noisy(3.0)


def test_a_wrong_shape_is_red():
    inputs = make_inputs(CASE, "cpu")
    assert "shape" in gate.check(inputs.q.transpose(1, 2), CASE, gate.expect(inputs), 1.0)[1]


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case("prefill", "fp32", 2, 4, 2, 50, 70, 16, True),
        Case("prefill", "fp32", 1, 2, 1, 70, 50, 16, True),  # its first rows see no key
        Case("prefill", "fp32", 1, 2, 2, 300, 300, 16, window=(7, 3)),
        Case("prefill", "fp32", 3, 2, 1, 40, 60, 16, lengths=(0, 60, 17), layout="bhsd"),
        Case("decoding", "fp32", 2, 8, 2, 1, 133, 16),
        Case("decoding", "fp32", 2, 8, 2, 4, 133, 16, True, lengths=(0, 99), page_size=16),
    ],
    ids=lambda case: case.label(),
)
def test_what_is_expected_is_the_oracle_on_the_sampled_rows(case):
    inputs = make_inputs(case, "cpu")
    expected = gate.expect(inputs)
    whole = attention_oracle(
        inputs.q, inputs.k, inputs.v, is_causal=case.causal, window=case.window, seqlens_k=inputs.seqlens_k
    )
    torch.testing.assert_close(expected.values, whole[:, :, expected.rows], rtol=1e-10, atol=1e-12)
    assert 0 < expected.pytorch_error < 1e-5


@pytest.mark.parametrize("seqlen", [1, 128, 129, 1000, 16384])
def test_sampled_rows_lie_in_every_stretch(seqlen):
    rows = gate.sample_rows(seqlen, 0)
    assert rows[0] == 0 and rows[-1] == seqlen - 1 and len(rows) == len(set(rows.tolist()))
    assert rows.diff().max() <= 2 * math.ceil(seqlen / gate.ROWS) if seqlen > 1 else len(rows) == 1


def test_limits_of_eight_bit_cases_are_fixed():
    e4m3, e5m2 = (Case("prefill", dtype, 1, 1, 1, 8, 8, 16) for dtype in ("e4m3", "e5m2"))
    expected = gate.Expected(torch.arange(8), torch.zeros(1, 1, 8, 16), 0.5)
    assert gate.error_limit(e4m3, expected) == 0.06
    assert gate.error_limit(e4m3, expected, eight_bit_output=True) == 0.075
    assert gate.error_limit(e5m2, expected) == gate.error_limit(e5m2, expected, eight_bit_output=True) == 0.13


def test_speeds_above_the_hardware_are_red():
    case = Case("prefill", "fp16", 2, 16, 16, 4096, 4096, 64)
    at_peak = case.flops() / 989e9
    assert gate.too_fast(case, 1.01 * at_peak, 989, 4800) is None
    assert "above the hardware's 989" in gate.too_fast(case, 0.99 * at_peak, 989, 4800)
    assert "above the hardware's 989" in gate.too_fast(case, at_peak / 16, 989, 4800)
    step = Case("decoding", "fp16", 1, 16, 16, 1, 65536, 64)
    assert gate.too_fast(step, 1.01 * step.bytes() / 4800e6, 989, 4800) is None
    assert "GB/s" in gate.too_fast(step, 0.99 * step.bytes() / 4800e6, 989, 4800)
    assert gate.too_fast(step, 1e-9, None, None) is None  # an unknown GPU has no peak


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_poison_is_nan_in_every_format_and_layout(dtype):
    x = torch.zeros(2, 3, 4, 8).to(dtype).transpose(1, 2)
    gate.poison(x)
    assert x.float().isnan().all()


def test_inputs_repeat_with_their_seed_and_follow_the_layout():
    case = Case("prefill", "bf16", 2, 4, 2, 8, 8, 16)
    one, same, other = make_inputs(case, "cpu", 1), make_inputs(case, "cpu", 1), make_inputs(case, "cpu", 2)
    assert torch.equal(one.k, same.k) and not torch.equal(one.k, other.k)
    assert one.q.shape == (2, 4, 8, 16) and one.q.transpose(1, 2).is_contiguous()
    copy = one.copy()
    assert torch.equal(copy.q, one.q) and copy.q.stride() == one.q.stride() and copy.q.data_ptr() != one.q.data_ptr()
    assert 0.9 < one.v.float().std() < 1.1


def test_fp8_is_allowed_a_fifth_more_than_rounding_costs():
    """Narrow heads over many keys: the inputs' own rounding passes the fixed limit, and no more of it than that."""
    case = Case("prefill", "e4m3", 1, 1, 1, 64, 64, 128)

    def limit(rounding_error, **options):
        expected = gate.Expected(torch.arange(1), torch.ones(1), 0.0, rounding_error)
        return gate.error_limit(case, expected, **options)

    assert limit(0.0) == limit(0.05) == 0.06 and limit(0.05, eight_bit_output=True) == 0.075
    assert limit(0.06) == pytest.approx(0.072)


@pytest.mark.parametrize("dtype", ["fp16", "e4m3"])
def test_what_rounding_costs(dtype, device):
    """Of e4m3 with 3 bits of mantissa some per cent; nothing where nothing is rounded."""
    error = gate.expect(make_inputs(Case("prefill", dtype, 1, 2, 2, 96, 96, 64), device)).rounding_error
    assert 0.02 < error < 0.06 if dtype == "e4m3" else error == 0.0


def store(x, dtype):
    """x [B, H, S, D] in eight bits, and its descales [B, H]."""
    descale = x.abs().amax((2, 3)).float() / torch.finfo(dtype).max
    return (x.float() / descale[..., None, None]).to(dtype), descale


@pytest.fixture(params=["e4m3", "e5m2"])
def cached(request, monkeypatch):
    """Inputs of a decoding step over FP8 caches, and these."""
    inputs = make_inputs(Case("decoding", request.param, 2, 4, 2, 1, 300, 64), "cpu")
    (k, descale_k), (v, descale_v) = (store(x, FP8[request.param]) for x in (inputs.k, inputs.v))
    monkeypatch.setattr(quantize, "quantize_cache", lambda *_, **__: (k, v, descale_k, descale_v), raising=False)
    return inputs


def test_fp8_caches_are_judged_by_what_they_hold(cached):
    """The kernel's error and not the rounding's: a hundred times less, and the limit is PyTorch's at 16 bits."""
    case, expected = cached.case, gate.expect(cached)
    limit = gate.error_limit(case, expected)
    assert limit == 2 * expected.pytorch_error < 0.003
    held = cached.rounded()
    out = eager_attention(held.q, held.k.half(), held.v.half())
    error, verdict = gate.check(out, case, expected, limit)
    assert verdict == "pass" and 0.01 < expected.rounding_error < 0.2
    assert expected.error_unquantised(out) == pytest.approx(expected.rounding_error, rel=0.05)
    assert "above the limit" in gate.check(eager_attention(cached.q, cached.k, cached.v), case, expected, limit)[1]


def test_without_its_descales_an_fp8_cache_is_read_wrong(cached):
    expected, (k, v, *_) = gate.expect(cached), cached.quantized_cache
    out = eager_attention(cached.q, k.half(), v.half())
    assert gate.check(out, cached.case, expected, gate.error_limit(cached.case, expected))[1] != "pass"


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", ["fp16", "e4m3"])
def test_pages_hold_the_cache_where_the_table_says(dtype, layout, monkeypatch):
    case = Case("decoding", dtype, 3, 4, 2, 1, 50, 32, layout=layout, page_size=16)
    inputs, eight = make_inputs(case, "cpu"), dtype == "e4m3"
    ones = torch.ones(3, 2)
    monkeypatch.setattr(
        quantize, "quantize_cache",
        lambda k, v, fp8_dtype: (k.to(FP8[fp8_dtype]), v.to(FP8[fp8_dtype]), ones, ones), raising=False,
    )  # fmt: skip
    (k, v), options = inputs.cache
    table = options["block_table"]
    assert table.dtype == torch.int32 and table.shape == (3, 4) and sorted(table.flatten().tolist()) == list(range(12))
    assert table.flatten().tolist() != list(range(12)), "shuffled"
    assert k.shape == v.shape == (12, 2, 16, 32) and k.dtype == (FP8["e4m3"] if eight else torch.float16)
    assert (k if layout == "bhsd" else k.transpose(1, 2)).is_contiguous()
    for b, n in ((0, 0), (1, 17), (2, 49)):
        for whole, pages in ((inputs.k, k), (inputs.v, v)):
            here = pages[int(table[b, n // 16]), :, n % 16]
            assert torch.equal(here.float(), whole[b, :, n].to(pages.dtype).float())
    assert ("descale_k" in options) == eight and inputs.cache[0][0] is k, "made once"
    assert inputs.copy().cache[0][0].data_ptr() != k.data_ptr()
