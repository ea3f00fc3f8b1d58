"""What the Gluon kernels for Hopper share: names that moved between Triton 3.6 and 3.9, TMA descriptors, ring buffers.

A ring is (buffers, full, empty): shared memory for STAGES blocks and two barriers for each. The producer waits for
empty, the TMA unit completes full, the consumers arrive at empty when they have read the block. Block number i of the
whole kernel lies in slot i % STAGES, and the barriers' phase there is (i // STAGES) & 1.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from common.hardware import detect_gpu
from common.problem import AttentionProblem

# renamed in Triton 3.8; the old names are gone in 3.9
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

GLUON_DTYPE = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv,
    torch.float8_e5m2: gl.float8e5,
}  # fmt: skip


@gluon.jit
def allocate_ring(desc, SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Shared memory and barriers for SLOTS blocks of `desc`; ARRIVALS consumers must have read one to empty a slot."""
    bufs = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ARRIVALS)
    return bufs, full, empty


@gluon.jit
def fill(ring, desc, coordinates, i, SLOTS: gl.constexpr):
    """Producer: start loading block number i of the ring, once its slot is empty."""
    bufs, full, empty = ring
    slot = i % SLOTS
    mbarrier.wait(empty.index(slot), ((i // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, coordinates, full.index(slot), bufs.index(slot))


@gluon.jit
def wait_full(ring, i, SLOTS: gl.constexpr, pred=True):
    """Consumer: wait until block number i has landed."""
    mbarrier.wait(ring[1].index(i % SLOTS), (i // SLOTS) & 1, pred=pred)


@gluon.jit
def release(ring, i, SLOTS: gl.constexpr, pred=True):
    """Consumer: block number i has been read."""
    mbarrier.arrive(ring[2].index(i % SLOTS), count=1, pred=pred)


@gluon.jit
def skip(ring, first, last, SLOTS: gl.constexpr):
    """Consumer: blocks first..last (last excluded) are for other groups; let them pass."""
    for i in range(first, last):
        wait_full(ring, i, SLOTS)
        release(ring, i, SLOTS)


@gluon.jit
def let_next_kernel_start():
    """The kernel launched after this one may start, if it says that it waits (launch_pdl=True), once all programs of
    this one have come here: PTX griddepcontrol.launch_dependents.
    """
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_kernel_before():
    """Until the kernel launched before this one has ended, and all that it wrote is to be seen: griddepcontrol.wait."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def bring_to_l2(X, stride, off_b, off_h, start_n, seqlen_k, BLOCK_N: gl.constexpr, ROW: gl.constexpr):
    """Rows start_n.. of X [batch, heads, seqlen_k, ROW numbers] start for the L2. Should others still write them, that
    does no harm: the L2 is where all meet, and nobody reads them yet.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    LINE: gl.constexpr = 128 // (X.dtype.element_ty.primitive_bitwidth // 8)
    offs_n = gl.minimum(start_n + gl.arange(0, BLOCK_N, layout=LAYOUT), seqlen_k - 1)
    first = X + off_b.to(gl.int64) * stride[0] + off_h.to(gl.int64) * stride[1]
    for c in gl.static_range(0, ROW, LINE):
        rows = first + offs_n.to(gl.int64) * stride[2] + c
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [rows], gl.int32, is_pure=False, pack=1
        )


# sizes below is (seqlen_q, seqlen_k, window_left, window_right), with None for no bound: common/masking.py


@gluon.jit
def key_blocks(start_m, sizes, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys that ROWS rows from start_m see: first, one past the last, one past those that need no mask."""
    seqlen_q, seqlen_k, window_left, window_right = sizes
    lo = start_m * 0
    hi = lo + gl.cdiv(seqlen_k, BLOCK_N)
    whole = lo + seqlen_k // BLOCK_N
    if window_right is not None:
        last_row = gl.minimum(start_m + ROWS, seqlen_q) - 1
        hi = gl.minimum(hi, (last_row + seqlen_k - seqlen_q + window_right) // BLOCK_N + 1)
        whole = gl.minimum(whole, (start_m + seqlen_k - seqlen_q + window_right + 1) // BLOCK_N)
    if window_left is not None:
        lo = gl.maximum(start_m + seqlen_k - seqlen_q - window_left, 0) // BLOCK_N
        whole = lo * 0  # a left bound cuts every block
    return lo, gl.maximum(hi, lo + 1), whole


@gluon.jit
def masked(qk, offs_m, start_n, sizes):
    """qk [rows, keys] with -inf where a row does not see a key."""
    seqlen_q, seqlen_k, window_left, window_right = sizes
    offs_n = gl.expand_dims(start_n + gl.arange(0, qk.shape[1], layout=gl.SliceLayout(0, qk.type.layout)), 0)
    own_key = gl.expand_dims(offs_m + (seqlen_k - seqlen_q), 1)
    last_key = own_key * 0 + (seqlen_k - 1)
    if window_right is not None:
        last_key = gl.minimum(own_key + window_right, last_key)
    visible = offs_n <= last_key
    if window_left is not None:
        visible = visible & (offs_n >= own_key - window_left)
    return gl.where(visible, qk, -float("inf"))


@gluon.jit
def zero_rows(block, lo, hi):
    """Leave rows lo..hi (hi excluded) of a 16-bit block in shared memory as they are; zeros before and after."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    offs = gl.expand_dims(gl.arange(0, block.shape[0], layout=gl.SliceLayout(1, LAYOUT)), 1)
    values = block.load(LAYOUT)
    block.store(gl.where((offs >= lo) & (offs < hi), values, gl.zeros_like(values)))


def descriptor(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """A TMA descriptor of x [B, H, S, D] for blocks of `rows` rows of one head, D padded to `width` with zeros.

    Loads past S or D give 0 and stores past them write nothing. Alignment as why_no_tma says.
    """
    return _descriptor(x, (1, 1, rows, width))


def even_odd_descriptor(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """The like for x [B, H, S, D], S even, as [B, H, 2, S / 2, D]: a block's even rows come before its odd ones."""
    return _descriptor(x, (1, 1, 2, rows // 2, width))


def _descriptor(x: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    found = object.__new__(TensorDescriptor)  # whose checks, made once, take as long as all else
    found.__dict__ = _fields(x.shape, x.stride(), x.dtype, block) | {"base": x}
    return found


@functools.lru_cache(maxsize=1024)
def _fields(shape: torch.Size, strides: tuple, dtype: torch.dtype, block: tuple) -> dict:
    """What descriptors of tensors like that have in common."""
    shape, strides = [*shape], [*(step if size > 1 else 16 for step, size in zip(strides, shape, strict=True))]
    strides[-1] = 1
    if len(block) == 5:
        shape[2:3], strides[2:3] = [2, shape[2] // 2], [strides[2], 2 * strides[2]]
    layout = gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPE[dtype])
    found = TensorDescriptor(torch.empty(0, dtype=dtype, device="meta"), shape, strides, list(block), layout)
    return vars(found) | {"like": object()}  # what common/dispatch.py knows them by


def for_tma(x: torch.Tensor, even_rows: bool = False) -> torch.Tensor:
    """x [B, H, S, D] itself where TMA can address it, else a copy; even_rows: with a row of anything after an odd S."""
    batch, heads, rows, width = x.shape
    odd = even_rows and rows % 2
    if why_no_tma(x) is None and not odd:
        return x
    copy = torch.empty(batch, heads, rows + odd, -(-width // 16) * 16, dtype=x.dtype, device=x.device)[..., :width]
    copy[:, :, :rows].copy_(x)
    return copy


def why_no_tma(*tensors: torch.Tensor) -> str | None:
    """One line on why TMA cannot address one of these [B, H, S, D] tensors; None where it can address all."""
    for x in tensors:
        if reason := _why_no_tma(x.shape, x.stride(), x.itemsize, x.data_ptr() % 16 == 0):
            return reason
    return None


@functools.lru_cache(maxsize=1024)
def _why_no_tma(shape: torch.Size, strides: tuple, itemsize: int, aligned: bool) -> str | None:
    if 0 in shape:
        return f"has no TMA descriptor for an empty tensor, {list(shape)}"
    steps = [stride * itemsize for stride, size in zip(strides[:-1], shape, strict=False) if size > 1]
    if not aligned or strides[-1] != 1 or any(step % 16 or step == 0 for step in steps):
        return f"needs tensors that start and step in multiples of 16 bytes (TMA), not strides {list(strides)}"
    return None


def declines_on_hopper(
    q, k, v, *, is_causal=False, window=None, seqlens_q=None, seqlens_k=None, out=None, use_fp8=False, **_
):  # fmt: skip
    """What the 16-bit Gluon versions do not serve of a call's arguments: one line, or None."""
    if use_fp8 or q.dtype.itemsize != 2:
        return "takes 16-bit tensors"
    rows = 0 if q.ndim == 3 else -2
    bounded = is_causal or window is not None
    return _declines(q.shape[-1], bounded, q.shape[rows], k.shape[rows], seqlens_q, seqlens_k) or why_no_tma(
        *(x.transpose(0, 1) if q.ndim == 3 else x for x in (q, k, v, out) if x is not None)
    )


def declines_fp8_on_hopper(
    q, k, v, *, is_causal=False, window=None, seqlens_q=None, seqlens_k=None, out=None, **_
):  # fmt: skip
    """The like for FP8, whose inputs may lie anyhow: for_tma copies them if it must."""
    rows = 0 if q.ndim == 3 else -2
    bounded = is_causal or window is not None
    if 0 in k.shape:
        return f"has no TMA descriptor for an empty tensor, {list(k.shape)}"
    if out is None:  # as AttentionProblem will make it
        out = torch.empty_like(q, dtype=torch.bfloat16, device="meta")
    return _declines(q.shape[-1], bounded, q.shape[rows], k.shape[rows], seqlens_q, seqlens_k) or why_no_tma(
        out.transpose(0, 1) if q.ndim == 3 else out
    )


def refuse_on_hopper(problem: AttentionProblem, beyond: str | None = None, fp8: bool = False):
    """ValueError where the Gluon versions do not serve a problem (`beyond`: a version's own reason), or off Hopper."""
    p = problem
    bounded = p.window_left is not None or p.window_right is not None
    reason = beyond or (None if fp8 or p.dtype.itemsize == 2 else "takes 16-bit tensors")
    reason = reason or _declines(p.head_dim, bounded, p.seqlen_q, p.seqlen_k, p.seqlens_q, p.seqlens_k)
    reason = reason or why_no_tma(*(() if fp8 else (p.q, p.k, p.v)), p.out)
    refuse(problem, reason, "prefill.flash_attention")


def refuse(problem: AttentionProblem, reason: str | None, entry: str):
    """ValueError, pointing to the function that would choose a version, where there is a reason, or off Hopper."""
    gpu = detect_gpu(problem.q.device)
    if gpu.capability != (9, 0):
        reason = f"needs compute capability 9.0, this is {gpu.name}"
    if reason:
        raise ValueError(f"this version {reason}; {entry} takes the newest that serves the call")


def _declines(head_dim, bounded, seqlen_q, seqlen_k, seqlens_q, seqlens_k) -> str | None:
    if head_dim % 8:
        return f"takes head_dim in multiples of 8, not {head_dim}: TMA stores rows in pieces of 16 bytes"
    if seqlens_q is not None or seqlens_k is not None:
        return "takes no seqlens_q or seqlens_k: past a length TMA would load what is there, NaN too"
    if bounded and seqlen_q > seqlen_k:
        return "takes causal and window only where every row sees a key: not more queries than keys"
    return None
