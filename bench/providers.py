"""Who is timed: every version of the lineage, and the peers that this machine has.

A provider binds to the inputs of a case and gives a Bound, something to call. Peers differ in layout, in how they spell
causal and in what they can do; all of that is here, so that gate and clock see one thing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import FP8, Case
from bench.inputs import Inputs
from common.hardware import detect_gpu
from common.lineage import Version, find_version, parent_of, versions_of
from common.problem import format_of
from common.reference import eager_attention

OWN, PARENT = "own tiles", "parent tiles"
PLAIN = "plain call"  # own tiles, called through flash_decoding, which chooses the version
PLAN = "plan"  # own tiles, called through a plan object, which did all that can be done once


class NotHere(Exception):
    """This provider does not do this case; the message says why. Not a failure: there is nothing to measure."""


@dataclass(frozen=True)
class Entrant:
    """Who is measured: role "version" or "peer", name "v2" or "fa3", variant OWN, PARENT, PLAIN or PLAN (peers:
    OWN); process is the name of the process that it runs in.
    """

    role: str
    name: str
    variant: str = OWN
    process: str = "main"

    @property
    def key(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant != OWN else self.name


@dataclass(eq=False)
class Bound:
    """A provider tied to inputs. run(out) makes one call, into `out` where it is given, and returns what it wrote;
    finish turns that into values [B, H, S, D]; context is entered around calls.
    """

    run: Callable[[torch.Tensor | None], torch.Tensor]
    out: torch.Tensor | None = None
    config: dict | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    context: Callable = contextlib.nullcontext
    eight_bit_output: bool = False
    resident_mb: float = 0.0  # memory that it holds between calls, its output among it

    def __call__(self) -> torch.Tensor:
        return self.run(self.out)


# ---- versions


def bind_version(version: Version, variant: str, inputs: Inputs) -> Bound:
    """A version with its own tiles or its parent's. The output is allocated once, outside the call."""
    tensors, options = inputs.version_arguments()
    if "fresh_keys" in version.takes:  # as in a step of generation; the kernel ahead in a walk writes no key at all
        options["fresh_keys"] = inputs.case.seqlen_q
    if reason := version.why_not_call(*tensors, **options):
        raise NotHere(reason)
    if variant == PLAIN:
        return _plain(version, tensors, options)
    if variant == PLAN:
        return _plan(version, tensors, options)
    problem = inputs.problem()
    problem.fresh_keys = options.get("fresh_keys")
    tiles = _tiles(version, variant, inputs.case, problem)
    if variant == PARENT:
        options["tiles"] = tiles
    call = functools.partial(version.call, *tensors, **options)
    return Bound(lambda out: call(out=out), torch.empty_like(problem.out), _config(version, tiles, problem))


def why_not_case(version: Version, case: Case) -> str | None:
    """Why a version does not take a case, as far as that can be told without its tensors; None where it can."""
    if not (version.fp8 if case.dtype in FP8 else version.half):
        return "has no FP8 path" if case.dtype in FP8 else "takes FP8 alone"
    if case.family == "prefill":
        return None
    if case.seqlen_q > version.most_queries:
        return f"takes {version.most_queries} queries of a sequence at most"
    return version.lacks(block_table=case.page_size, window=case.window)


def _plain(version: Version, tensors: tuple, options: dict) -> Bound:
    """A decoding step as the package has it: the version is chosen in each call."""
    from decoding import flash_decoding

    later = [v for v in versions_of("decoding") if v.number > version.number]
    here = [v for v in later if v.why_not(detect_gpu(), format_of(tensors[1])) is None]
    if any(v.why_not_call(*tensors, **options) is None for v in here):
        raise NotHere("is not the version that flash_decoding chooses")
    return Bound(lambda out: flash_decoding(*tensors, **options))


def _plan(version: Version, tensors: tuple, options: dict) -> Bound:
    """A decoding step as it is repeated: planned once for the shapes, the output allocated by each call."""
    from decoding import plan_decoding

    try:
        plan = plan_decoding(*tensors, **options, version=version.name)
    except ValueError as reason:
        raise NotHere(f"has no plan: {reason}") from None
    by_name = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    return Bound(lambda out: plan(*tensors, **by_name))


def _config(version: Version, tiles, problem) -> dict:
    """What the record says of a launch: the tiles, and in decoding the splits that the version chooses with them."""
    splits_for = getattr(sys.modules[version.call.__module__], "splits_for", None)
    return tiles._asdict() | ({"num_splits": splits_for(problem, tiles.BLOCK_N)} if splits_for else {})


def _tiles(version: Version, variant: str, case: Case, problem):
    if variant == OWN:
        return version.tiles(problem)
    parent = parent_of(version)
    if parent is None:
        raise NotHere("the first version has no parent")
    if case.dtype in FP8 and not parent.fp8:
        raise NotHere(f"its parent {parent.name} has no FP8 path to compare with")
    return parent.tiles(problem)


# ---- peers: each takes Inputs and gives a Bound


def _eager(inputs: Inputs) -> Bound:
    case = inputs.case
    masks = {"is_causal": case.causal, "window": case.window, "seqlens_k": inputs.seqlens_k}
    return Bound(lambda out: eager_attention(inputs.q, inputs.k, inputs.v, **masks))


def _sdpa(backend: str) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        options = {"is_causal": inputs.case.causal, "enable_gqa": inputs.case.heads_q != inputs.case.heads_kv}
        call = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, inputs.q, inputs.k, inputs.v, **options
        )
        return Bound(lambda out: call(), context=lambda: sdpa_kernel(getattr(SDPBackend, backend)))

    return bind


def _flex(inputs: Inputs) -> Bound:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # every shape is a compilation of its own, and the compiler keeps few of them
    case, block_mask = inputs.case, None
    if case.causal:
        offset = case.seqlen_k - case.seqlen_q
        block_mask = create_block_mask(
            lambda b, h, row, key: row + offset >= key, None, None, case.seqlen_q, case.seqlen_k, device=inputs.q.device
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": block_mask, "enable_gqa": case.heads_q != case.heads_kv}
    return Bound(lambda out: compiled(inputs.q, inputs.k, inputs.v, **options))


def _flash_attn(module: str) -> Callable[[Inputs], Bound]:
    """FlashAttention's own Python functions, [B, S, H, D]: flash_attn (2) and flash_attn_interface (3) share them."""

    def bind(inputs: Inputs) -> Bound:
        library, case = importlib.import_module(module), inputs.case
        if case.family == "decoding":
            (k, v), options = inputs.cache
            tensors, lengths = [x.transpose(1, 2) for x in (inputs.q, k, v)], inputs.seqlens_k
            if case.page_size:
                options = {"page_table": options["block_table"]}
                if lengths is None:  # a table's row may hold more keys than the sequence
                    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=k.device)
            call = functools.partial(
                library.flash_attn_with_kvcache, *tensors, cache_seqlens=lengths, causal=case.causal, **options
            )
        else:
            tensors = [x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
            call = functools.partial(library.flash_attn_func, *tensors, causal=case.causal)
        return Bound(lambda out: _first(call()).transpose(1, 2))

    return bind


def _first(result):
    """The output alone, where a library also returns the LSE."""
    return result[0] if isinstance(result, tuple) else result


def _flashinfer(inputs: Inputs) -> Bound:
    import flashinfer

    case = inputs.case
    q, k, v = (x[0].transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))  # [S, H, D]
    if case.family == "prefill":
        call = functools.partial(flashinfer.single_prefill_with_kv_cache, q, k, v, causal=case.causal)
        return Bound(lambda out: call().transpose(0, 1)[None])
    tensor_cores = case.heads_q > case.heads_kv
    call = functools.partial(flashinfer.single_decode_with_kv_cache, q[0], k, v, use_tensor_cores=tensor_cores)
    return Bound(lambda out: call()[None, :, None])


def _cudnn_fp8(inputs: Inputs) -> Bound:
    """Its output is e4m3: scaled to fill the format by the largest value, which a first call with scale 1 reports."""
    from cudnn_fp8 import CudnnFP8Fwd

    tensors = [x.transpose(1, 2).to(torch.float8_e4m3fn) for x in (inputs.q, inputs.k, inputs.v)]
    first = CudnnFP8Fwd(*tensors, inputs.case.causal)
    first.run()
    largest = float(first.amax[1])
    scale = 448.0 / largest if 0.0 < largest < float("inf") else 1.0
    call = CudnnFP8Fwd(*tensors, inputs.case.causal, scale_o=scale)
    held = sum(x.numel() * x.element_size() for x in (call.out, call.stats, call.ws)) / 1e6
    return Bound(
        lambda out: call.run(), out=call.out, finish=lambda out: out.transpose(1, 2).float() / scale,
        eight_bit_output=True, resident_mb=held,
    )  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A library's attention. modules: what must be importable. process: providers that load another CUDA runtime get a
    process of their own. one_sequence: batch 1 only; grouped: takes fewer KV heads than query heads; top_left: aligns
    causal at the top left, so that it agrees with us only where Sq = Sk. masks: windows and lengths, in both families;
    lengths, pages: in decoding.
    """

    name: str
    label: str
    bind: Callable[[Inputs], Bound]
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    families: tuple[str, ...] = ("prefill", "decoding")
    modules: tuple[str, ...] = ()
    process: str = "main"
    one_sequence: bool = False
    grouped: bool = True
    top_left: bool = False
    masks: bool = False
    lengths: bool = False
    pages: bool = False
    slow_start: float = 0.0  # seconds of compilation at each new shape

    def absent(self) -> str | None:
        """Why it is not on this machine, or None. Imports nothing."""
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return None

    def why_not(self, case: Case) -> str | None:
        """Why it does not do this case, or None."""
        if case.family not in self.families:
            return f"not used for {case.family}"
        if case.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}"
        if self.one_sequence and case.batch > 1:
            return "takes one sequence"
        if not self.grouped and case.heads_q != case.heads_kv:
            return "takes as many KV heads as query heads"
        if self.top_left and case.causal and case.seqlen_q != case.seqlen_k:
            return "aligns causal at the top left"
        if case.window and not self.masks:
            return "takes no window here"
        if case.lengths and not (self.masks or self.lengths and case.family == "decoding"):
            return "takes no lengths here"
        if case.page_size and not self.pages:
            return "takes no pages here"
        if self.one_sequence and case.family == "decoding" and case.seqlen_q > 1:
            return "takes one query here"
        return None


_ALL = ("fp16", "bf16", "fp32")
PEERS = (
    Peer(
        "fa3", "FlashAttention-3", _flash_attn("flash_attn_interface"), modules=("flash_attn_interface",),
        process="fa3", lengths=True, pages=True,
    ),
    Peer("cudnn", "SDPA, cuDNN", _sdpa("CUDNN_ATTENTION"), top_left=True),
    Peer(
        "cudnn_fp8", "cuDNN frontend, 8-bit output", _cudnn_fp8, dtypes=("e4m3",), families=("prefill",),
        modules=("cudnn", "cudnn_fp8"), process="cudnn", grouped=False, top_left=True,
    ),
    Peer("fa2", "SDPA, FlashAttention-2", _sdpa("FLASH_ATTENTION"), top_left=True),
    Peer(
        "flash_attn", "FlashAttention-2, flash_attn", _flash_attn("flash_attn"), modules=("flash_attn",), lengths=True,
    ),
    Peer("flashinfer", "FlashInfer", _flashinfer, modules=("flashinfer",), one_sequence=True),
    Peer("flex", "FlexAttention, compiled", _flex, families=("prefill",), slow_start=6.0),
    Peer(
        "efficient", "SDPA, memory-efficient", _sdpa("EFFICIENT_ATTENTION"), dtypes=_ALL, grouped=False, top_left=True,
    ),
    Peer("eager", "eager PyTorch", _eager, dtypes=_ALL, masks=True),
)  # fmt: skip


def find_peer(name: str) -> Peer:
    """The peer called `name`. ValueError names those that exist."""
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise ValueError(f"--peers {name} does not exist; there are {', '.join(peer.name for peer in PEERS)}, none, all")


def bind(entrant: Entrant, inputs: Inputs) -> Bound:
    """Tie an entrant to inputs. NotHere where it does not do the case; whatever the library raises where it fails."""
    if entrant.role == "version":
        return bind_version(find_version(inputs.case.family, entrant.name), entrant.variant, inputs)
    peer = find_peer(entrant.name)
    reason = peer.why_not(inputs.case)
    if reason:
        raise NotHere(reason)
    return peer.bind(inputs)


def source_hash(family: str, entrant: Entrant) -> str | None:
    """What identifies the code that was measured; None for peers."""
    return find_version(family, entrant.name).source_hash if entrant.role == "version" else None
