"""Decoding: attention of one query a sequence, or a few, over a long KV cache."""

import inspect

import torch

from common.hardware import detect_gpu
from common.lineage import find_version, versions_of
from common.plan import Plan
from common.problem import checked_fresh_keys, format_of
from common.replay import remembered


@remembered
def flash_decoding(
    q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, block_table=None, window=None,
    starts=None, k_new=None, v_new=None, check_table=False, deterministic=False, descale_k=None,
    descale_v=None, fresh_keys=None, version=None,
):  # fmt: skip
    """softmax(scale * q k^T) v for the last positions of each sequence, by the newest version that serves the call.

    q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], any strides; fp16, bf16 or fp32; D from 1 to 256; Hq a multiple of
      Hkv. Sq from 1 to 16 (v1: 1): query i stands at position len_k - Sq + i and sees the keys up to its own.
    seqlens_k: int32 [B], the keys that count of each sequence, new ones included; later ones are never read.
    num_splits: how many parts the keys are cut into; None leaves it to the version. The result does not depend on it
      beyond rounding.
    return_lse: also the log-sum-exp, natural logarithm, float32 [B, Hq, Sq]; no keys give 0 and -inf.
    out: preallocated output. version: "v1", say, instead of the newest.

    From v4 on:
    block_table: int32 [B, max_pages], for caches in pages: k and v are then [pages, Hkv, page_size, D], any strides
      (stored as [pages, page_size, Hkv, D] it is passed as k.transpose(1, 2)), page_size a power of two from 1 to 256.
      Key n of sequence b is row n % page_size of page block_table[b, n // page_size]. Entries that no query needs, past
      the length, before starts or the window, may be anything and are not followed. An entry in use that is no page is
      refused where the table is on the CPU, or with check_table=True, which reads the table back and so waits for the
      GPU, too long for every step; otherwise it is not followed either, and that sequence's output is NaN.
    window: (left, right): a query sees `left` keys before its own position, None is no bound; right changes nothing,
      as no query sees later keys.
    starts: int32 [B], the first key of each sequence, where caches are padded on the left; seqlens_k counts from 0.
    k_new, v_new: [B, Hkv, Sq, D], the queries' own keys and values: written into k and v at positions len_k - Sq up to
      len_k - 1 (those below 0 are left out), and attended. A page that is written belongs to one sequence alone.
    deterministic: True cuts every sequence into splits of 1024 keys (num_splits is then refused), so that its output is
      bitwise the same alone and in any batch, in caches of any capacity, as long as q's shape but for the batch, dtypes
      and layouts are the same.
    From v5 on:
    k and v may be float8 (e4m3fn or e5m2, both the same) where q is fp16 or bf16; k_new and v_new then are float8 too.
      e4m3 needs an NVIDIA GPU of compute capability 8.9; e5m2 any, also AMD's. NaN or infinity among the keys of one
      head may reach the queries of the one beside it, where heads have 64 columns.
    descale_k, descale_v: float32, what k and v are multiplied by; None is 1. Either [B, Hkv], one number for a head of
      a sequence, or like the cache, [B or pages, Hkv, n], one for each block of keys: of the fewest keys that n blocks
      cover the cache's (or a page's) with, a power of two from 16 on. common.quantize.quantize_cache makes them.
    From v10 on:
    fresh_keys: how many keys at the end of each sequence the kernel launched just before on this stream may write: Sq
      in a step of generation, whose own are appended there; None: any. All other keys, lengths, starts and the table
      must be older: in memory before that kernel began. They are then read while it is still at work, and a promise
      that does not hold gives wrong results. Versions that wait for all of it leave it unused.

    Raises ValueError or TypeError naming the argument, before anything is launched; NoGPU where there is no GPU.
    """
    arguments = dict(scale=scale, seqlens_k=seqlens_k, num_splits=num_splits, return_lse=return_lse, out=out)
    of_caches = dict(
        block_table=block_table, window=window, starts=starts, k_new=k_new, v_new=v_new, descale_k=descale_k,
        descale_v=descale_v, fresh_keys=fresh_keys,
    )  # fmt: skip
    arguments |= {name: value for name, value in of_caches.items() if value is not None}
    if check_table is not False and block_table is not None:
        arguments["check_table"] = check_table
    if deterministic is not False:
        arguments["deterministic"] = deterministic
    if version is not None:
        chosen = find_version("decoding", version)
        if reason := chosen.lacks(k=k, **arguments):
            able = next(found for found in versions_of("decoding") if found.lacks(k=k, **arguments) is None)
            raise ValueError(f"version: {chosen.name} {reason}; {able.name} does")
        return chosen.call(q, k, v, **arguments)
    gpu = detect_gpu()
    newest = versions_of("decoding")[::-1]
    here = [found for found in newest if found.why_not(gpu, format_of(k)) is None]
    here = here or [found for found in newest if found.why_not(gpu) is None]  # which say what float8 needs
    must = {name: value for name, value in arguments.items() if name != "fresh_keys"}
    serving = (found for found in here if found.why_not_call(q, k, v, **must) is None)
    # where nobody serves the call, the newest that has its arguments says which one is wrong
    chosen = next(serving, None) or next((found for found in here if found.lacks(k=k, **must) is None), here[0])
    if "fresh_keys" not in chosen.takes:
        checked_fresh_keys(fresh_keys)
        arguments = must
    return chosen.call(q, k, v, **arguments)


def plan_decoding(q, k, v, **options) -> Plan:
    """A plan for steps that are alike: plan = plan_decoding(q, k, v, ...) once, then plan(q, k, v, ...) for each step.

    Takes what flash_decoding takes. Nothing is launched or written yet; checks, the version, its splits and kernels are
    settled. plan(q, k, v, out=None, and by its name every other tensor that was given here) returns what flash_decoding
    would, in the least time that Python allows.

    A step's tensors are of the kinds of those given here: shape, strides, dtype, device, address modulo 16; otherwise
    ValueError or TypeError, naming the argument. All contents may change, those of seqlens_k, starts and block_table
    too, and are no longer checked: kernels clamp lengths, and answer a page that does not exist with NaN. Each step has
    an output of its own, unless it gives one; where out= was given here, with its strides, each step gives one.

    The plan has scratch memory of its own, so its steps must run one after the other, replayed graphs included: on one
    stream, or on several that wait for each other. Steps that overlap spoil each other's results; make a plan for each
    stream. A graph that captured a step works in that memory: keep the plan as long as the graph.

    Raises what flash_decoding raises; ValueError also for tensors that flash_decoding would copy first, since kernels
    cannot address them (a last dimension that is not contiguous, say); RuntimeError while a graph is captured.
    """
    given = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
    others = {name: x for name, x in options.items() if name not in given}
    return Plan(inspect.unwrap(flash_decoding), {"q": q, "k": k, "v": v} | given, others)
