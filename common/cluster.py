"""Clusters in Gluon: programs on SMs beside each other, which write into each other's shared memory.

Triton has clusters for one program on several SMs; these are programs as ever, CLUSTER in a row by their numbers. A
kernel with a constant CLUSTER is launched so (common/dispatch.py). What a program gets from the others lies in its
window: shared memory at the same address in all of them, and an mbarrier behind it that counts the bytes.

Each program has a part of O, all WIDTH columns of it; in the end it has a slice of the columns, of the whole: part by
part and slice by slice, the programs of a cluster change these for those. PTX: st.async, mapa, barrier.cluster.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from common.equal_pieces import programs_on
from common.exponent import LN_2

SIZES = 2, 4, 8, 16  # of clusters, on Hopper
LARGEST = 32 * 1024  # bytes of a window: what a kernel declares, and does not get at its launch, is 48 KB at most


def cluster_for(device: torch.device, items: int) -> int:
    """Programs for each of `items`, so that every SM that common/equal_pieces.py counts has one; 0: no such cluster."""
    each, rest = divmod(programs_on(device), max(1, items))
    return each if rest == 0 and each in SIZES else 0


def why_no_cluster(device: torch.device, items: int, rows: int = 1, width: int = 64) -> str | None:
    """One line on why `items` cannot have a cluster each, and windows for these rows and columns; None if they can."""
    if rows * width * 8 > LARGEST:
        return f"takes tiles of {LARGEST // (8 * width)} rows at most for {width} columns, not {rows}"
    if cluster_for(device, items):
        return None
    programs = programs_on(device)
    return f"gives each tile of a KV head's rows 2, 4, 8 or 16 of {programs} programs, all as many; {items} are here"


@gluon.constexpr_function
def slice_layout(columns, warps):
    """One number in a thread: there are few, and each is merged from as many parts as there are programs."""
    lanes = min(32, columns)
    return gl.BlockedLayout([1, 1], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def _open(size):
    whole = (size // 1024 + 1) * 1024  # with the barrier; what lies behind it is swizzled by its addresses
    return f"""{{
    .shared .align 1024 .b8 window[{whole}];
    .reg .pred first; .reg .b32 thread; .reg .b64 state;
    mov.u32 $0, window;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first mbarrier.init.shared::cta.b64 [window + {size}], 1;
    @first mbarrier.arrive.expect_tx.shared::cta.b64 state, [window + {size}], {size};
    @first fence.mbarrier_init.release.cluster;
    }}"""


@gluon.jit
def open_window(ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Once a kernel, before it has partitions: the address of a window for ROWS * WIDTH pairs of float32."""
    return gl.inline_asm_elementwise(_open(ROWS * WIDTH * 8), "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def here():
    """In each partition, once: its warps are there. All warps of a program must say so."""
    gl.inline_asm_elementwise("barrier.cluster.arrive.relaxed; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_others():
    """Until all programs of the cluster are there, with their windows open."""
    gl.inline_asm_elementwise("barrier.cluster.wait.acquire; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def hand_out(window, out, lse, offs_d, ROWS: gl.constexpr, CLUSTER: gl.constexpr):
    """A part, the first ROWS of out [WIDTH, N] and lse [N], goes out: each program gets its slice of the columns, which
    offs_d [WIDTH] numbers, every number with its row's lse. Nothing waits for it here.
    """
    WIDTH: gl.constexpr = out.shape[0]
    SLICE: gl.constexpr = WIDTH // CLUSTER
    LAYOUT: gl.constexpr = out.type.layout
    row = gl.expand_dims(gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    offs_d = gl.expand_dims(offs_d, 1)
    rank = gl.program_id(0) % CLUSTER
    at = window + 8 * ((rank * ROWS + row) * SLICE + offs_d % SLICE)
    sent = gl.where(row < ROWS, 1, 0)
    gl.inline_asm_elementwise(
        """{
        .reg .pred sent; .reg .b32 at, bar;
        setp.ne.b32 sent, $4, 0;
        mapa.shared::cluster.u32 at, $2, $1;
        mapa.shared::cluster.u32 bar, $3, $1;
        @sent st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [at], {$5, $6}, [bar];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,f,f", [offs_d // SLICE, at, window + ROWS * WIDTH * 8, sent, out, gl.expand_dims(lse, 0)], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_parts(window, SIZE: gl.constexpr):
    """Until all programs of the cluster have sent theirs to this one."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred done;
        WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$1], 0;
        @!done bra WAIT;
        mov.u32 $0, 0;
        }""",
        "=r,r", [window + SIZE], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def merge_slices(window, ROWS: gl.constexpr, WIDTH: gl.constexpr, CLUSTER: gl.constexpr):
    """This program's columns of O, [ROWS, WIDTH // CLUSTER], and LSE, base 2, alike, once all parts are here."""
    SLICE: gl.constexpr = WIDTH // CLUSTER
    LAYOUT: gl.constexpr = slice_layout(SLICE, gl.num_warps())
    wait_for_parts(window, ROWS * WIDTH * 8)
    at = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1) * SLICE
    at = window + 8 * (at + gl.expand_dims(gl.arange(0, SLICE, layout=gl.SliceLayout(0, LAYOUT)), 0))
    m_i = gl.full([ROWS, SLICE], -float("inf"), gl.float32, LAYOUT)
    l_i = gl.zeros([ROWS, SLICE], gl.float32, LAYOUT)
    acc = gl.zeros([ROWS, SLICE], gl.float32, LAYOUT)
    parts = ()
    for j in gl.static_range(CLUSTER):
        part = gl.inline_asm_elementwise(
            "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [at + 8 * ROWS * SLICE * j], (gl.float32, gl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
        parts += (part,)
        m_i = gl.maximum(m_i, part[1])
    m_safe = gl.where(m_i == -float("inf"), 0.0, m_i)  # no part has a key
    for j in gl.static_range(CLUSTER):
        weight = gl.exp2(parts[j][1] - m_safe)
        l_i += weight
        acc += parts[j][0] * weight
    return acc * gl.where(l_i == 0.0, 0.0, 1.0 / l_i), m_i + gl.log2(l_i)


@gluon.jit
def store_slice(
    Out, LSE, out, lse, stride, off_b, heads_kv, kv_head, start_m, rows, seqlen_q, HEAD_DIM: gl.constexpr,
    CLUSTER: gl.constexpr, SIDE: gl.constexpr = 1,
):  # fmt: skip
    """Write what merge_slices gives, as rows start_m.. of a KV head or of SIDE; LSE may be None."""
    SLICE: gl.constexpr = out.shape[1]
    LAYOUT: gl.constexpr = out.type.layout
    offs_m = start_m + gl.expand_dims(gl.arange(0, out.shape[0], layout=gl.SliceLayout(1, LAYOUT)), 1)
    column = gl.program_id(0) % CLUSTER * SLICE
    column += gl.expand_dims(gl.arange(0, SLICE, layout=gl.SliceLayout(0, LAYOUT)), 0)
    offs_d = column - offs_m // (rows // SIDE) * HEAD_DIM  # in the row's own head, of SIDE that lie side by side
    head = kv_head * (rows // seqlen_q) + offs_m // seqlen_q
    offsets = off_b.to(gl.int64) * stride[0] + head.to(gl.int64) * stride[1]
    offsets += (offs_m % seqlen_q).to(gl.int64) * stride[2] + offs_d
    gl.store(Out + offsets, out.to(Out.dtype.element_ty), mask=(offs_m < rows) & (offs_d >= 0) & (offs_d < HEAD_DIM))
    if LSE is not None:
        first = (off_b * heads_kv + kv_head).to(gl.int64) * rows
        gl.store(LSE + first + offs_m + column * 0, lse * LN_2, mask=(offs_m < rows) & (column == 0))
