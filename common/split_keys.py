"""What decoding launches share from v4 on: how rows become tiles and keys become splits, and where the parts lie."""

import torch
import triton
import triton.language as tl

from common.hardware import detect_gpu
from common.launch import block_d, cdiv
from common.problem import AttentionProblem
from common.schedule import splits_of_whole_waves

MOST_ROWS = {2: 64, 4: 16}  # of a tile, by the bytes of an element: float32 products take registers, not tensor cores
MERGE_WIDTH = 512  # rows * BLOCK_D that the merge takes in at a time, and values a warp


@triton.jit
def store_rows(
    Out, LSE, out, lse, offs_m, rows, seqlen_q, stride_o, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write rows offs_m of the KV head whose first row Out and LSE point to; LSE may be None."""
    offs_d = tl.arange(0, BLOCK_D)
    out_rows = Out + (offs_m // seqlen_q).to(tl.int64) * stride_o[1] + (offs_m % seqlen_q).to(tl.int64) * stride_o[2]
    mask = (offs_m < rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(out_rows[:, None] + offs_d[None, :], out.to(Out.dtype.element_ty), mask=mask)
    if LSE is not None:
        tl.store(LSE + offs_m, lse, mask=offs_m < rows)


def has_large_shared_memory(problem: AttentionProblem) -> bool:
    return detect_gpu(problem.q.device).shared_memory >= 160 * 1024


def has_register_limit(problem: AttentionProblem) -> bool:
    """On NVIDIA's GPUs, but for those of sm_100, where the compiler needs none, and spills with one."""
    gpu = detect_gpu(problem.q.device)
    return gpu.backend == "cuda" and gpu.arch != "sm_100"


def rows_of_a_tile(problem: AttentionProblem, least: int) -> int:
    """The rows that share a KV head, or some of them, filled up to what tl.dot takes. A single one is up to `least`."""
    rows = problem.group * problem.seqlen_q
    return least if rows == 1 else min(MOST_ROWS[problem.dtype.itemsize], max(16, 1 << (rows - 1).bit_length()))


def splits_for(problem: AttentionProblem, block_n: int) -> int:
    """As many splits as make whole waves of programs, of which three or two are beside each other on an SM."""
    row_blocks = cdiv(problem.group * problem.seqlen_q, rows_of_a_tile(problem, 1))
    slots = detect_gpu(problem.q.device).sm_count * (3 if has_large_shared_memory(problem) else 2)
    programs = problem.batch * problem.heads_kv * row_blocks
    return splits_of_whole_waves(programs, slots, cdiv(problem.keys_in_reach, block_n))


def parts_of(problem: AttentionProblem, splits: int) -> torch.Tensor | None:
    """Room for what the splits find: float32 [batch * heads_kv, splits, rows, head_dim], then the same without head_dim
    for their log-sum-exps. None for one split, which has the whole.
    """
    if splits == 1:
        return None
    rows = problem.batch * problem.heads_kv * splits * problem.group * problem.seqlen_q
    return torch.empty(rows * (problem.head_dim + 1), dtype=torch.float32, device=problem.q.device)


def merge_tile(problem: AttentionProblem, num_warps: int) -> dict[str, int]:
    """ROWS and PARTS of merge_parts: as many rows as there are, or fit, and as many parts as the warps take of them."""
    width, rows = block_d(problem), problem.group * problem.seqlen_q
    rows = min(MERGE_WIDTH // width, 1 << (rows - 1).bit_length())
    return {"ROWS": rows, "PARTS": MERGE_WIDTH * num_warps // (rows * width)}
