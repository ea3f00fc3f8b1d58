"""The arguments of one attention call, checked and normalised. The only place that rejects anything."""

import math
import weakref

import torch

from common import replay
from common.hardware import detect_gpu, interpreting, pretending

HALF = (torch.float16, torch.bfloat16)
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FP8_CAPABILITY = (8, 9)
FLOAT32 = torch.finfo(torch.float32)
MAX_HEAD_DIM = 256
PAGE_SIZES = tuple(2**i for i in range(9))  # keys of a page
MAX_SPLITS = 65535  # of the grid's second axis
LEAST_KEYS_OF_DESCALE = 16
DETERMINISTIC_KEYS = 1024  # of a split, whatever else is in the batch: whole blocks of every version's
MAX_ROW_STRIDE = 2**22  # 512 rows of a block stay inside int32; other offsets are int64
MAX_SEQLEN = 2**30  # positions, and position + block, stay inside int32


def format_of(k) -> str:
    """ "e4m3" or "e5m2" of a float8 cache, "fp16" of anything else: what Version.why_not asks about a decoding call."""
    return next((name for name, dtype in FP8.items() if getattr(k, "dtype", None) == dtype), "fp16")


class AttentionProblem:
    """One attention call, as the kernels want it. Built by `prefill` or `decoding`.

    q [batch, heads_q, seqlen_q, head_dim], k and v [batch, heads_kv, seqlen_k, head_dim], last dimension contiguous;
    out like q; lse float32 [batch, heads_q, seqlen_q] or None. seqlens_q, seqlens_k int32 [batch] or None.
    window_left, window_right: how many keys before and after its own a row sees, None for no bound; causal is
    window_right = 0. Row i sits at key i + len_k - len_q. descales: float32 ([batch, heads_q], [batch, heads_kv] x 2)
    for float8 tensors, else None. Decoding alone: block_table int32 [batch, pages of a sequence], for k and v [pages,
    heads_kv, page_size, head_dim]; seqlen_k is then what a row of it holds. starts int32 [batch]. k_new, v_new [batch,
    heads_kv, seqlen_q, head_dim]. None where not given. num_splits, or None for a number of the version's choice, of
    keys_per_split keys each, or None for equal shares. Float8 caches: descale_k, descale_v float32 [batch, heads_kv] or
    [batch or pages, heads_kv, blocks]; keys_of_descales: the keys of such a block for each of them, 0 where there is
    one number a head, or none. fresh_keys: of each sequence, that the kernel ahead may write; None for all.
    """

    __slots__ = (
        "batch", "block_table", "descale_k", "descale_v", "descales", "fresh_keys", "head_dim", "heads_kv", "heads_q",
        "k", "k_new", "keys_of_descales", "keys_per_split", "lse", "num_splits", "out", "page_size", "q", "rank3",
        "return_lse", "scale", "seqlen_k", "seqlen_q", "seqlens_k", "seqlens_q", "starts", "v", "v_new", "window_left",
        "window_right",
    )  # fmt: skip

    @classmethod
    def prefill(
        cls, q, k, v, *, is_causal=False, scale=None, window=None, seqlens_q=None, seqlens_k=None, return_lse=False,
        out=None, use_fp8=False, fp8_dtype="e4m3", descales=None,
    ):  # fmt: skip
        """Check a prefill call; q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], or [S, H, D] each, one sequence.

        Raises TypeError or ValueError, naming the argument, what it was and what would do.
        """
        self = cls()
        self._take_tensors(q, k, v, use_fp8, fp8_dtype)
        self.scale = _checked_scale(scale, self.head_dim)
        self.window_left, self.window_right = self._checked_window(window, is_causal)
        self.seqlens_q = self._checked_lengths("seqlens_q", seqlens_q, self.seqlen_q)
        self.seqlens_k = self._checked_lengths("seqlens_k", seqlens_k, self.seqlen_k)
        self.descales = self._checked_descales(descales)
        self._take_outputs(out, return_lse)
        return self

    @classmethod
    def decoding(
        cls, q, k, v, *, scale=None, seqlens_k=None, num_splits=None, return_lse=False, out=None, most_queries=1,
        block_table=None, window=None, starts=None, k_new=None, v_new=None, check_table=False,
        deterministic=False, descale_k=None, descale_v=None, fp8_caches=False, fresh_keys=None,
    ):  # fmt: skip
        """Check a decoding step; q [B, Hq, Sq, D], the last positions of their sequences, k and v [B, Hkv, Sk, D].

        num_splits: None is the version's own choice. most_queries: what Sq may be, in this version; fp8_caches: whether
        k and v may be float8. The rest is described in decoding.flash_decoding.

        Raises TypeError or ValueError, naming the argument, what it was and what would do.
        """
        self = cls()
        self._take_tensors(
            q, k, v, use_fp8=False, fp8_dtype=None, ranks=(4,), paged=block_table is not None, fp8_caches=fp8_caches
        )  # fmt: skip
        if not 1 <= self.seqlen_q <= most_queries:
            takes = "one query" if most_queries == 1 else f"1 to {most_queries} queries"
            form = "[B, Hq, 1, D]" if most_queries == 1 else "[B, Hq, Sq, D]"
            raise ValueError(f"q: decoding takes {takes} a sequence, {form}, not {self.seqlen_q}; use prefill")
        self.scale = _checked_scale(scale, self.head_dim)
        self.window_right = self.seqlens_q = self.descales = None  # causal is what decoding is
        self.block_table, self.page_size = self._checked_table(block_table)
        self.window_left = None if window is None else self._checked_window(window, is_causal=True)[0]
        self.seqlens_k = self._checked_lengths("seqlens_k", seqlens_k, self.seqlen_k)
        self.starts = self._checked_lengths("starts", starts, self.seqlen_k)
        self.k_new, self.v_new = self._checked_new(k, v, k_new, v_new)
        self.descale_k, keys_k = self._checked_cache_descale("descale_k", descale_k)
        self.descale_v, keys_v = self._checked_cache_descale("descale_v", descale_v)
        self.keys_of_descales = keys_k, keys_v
        if not isinstance(check_table, bool):
            raise TypeError(f"check_table: must be True or False, it is {check_table!r}")
        if block_table is not None and (check_table or block_table.device.type == "cpu"):
            if (recording := replay.recording()) is not None:
                recording.once.append(self._check_pages)
            else:
                self._check_pages()
        self.fresh_keys = checked_fresh_keys(fresh_keys)
        self.num_splits, self.keys_per_split = self._checked_splits(num_splits, deterministic)
        self._take_outputs(out, return_lse)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What the kernel reads: float8 once quantised."""
        return self.q.dtype

    @property
    def fp8(self) -> bool:
        """Whether k and v are float8; q is too, in prefill, and is not in decoding."""
        return self.k.dtype.itemsize == 1

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads_q // max(self.heads_kv, 1)

    @property
    def keys_in_reach(self) -> int:
        """The most keys that the queries of a sequence see, together."""
        within = None if self.window_left is None else self.window_left + self.seqlen_q
        return self.seqlen_k if within is None else min(self.seqlen_k, within)

    def result(self):
        """What the caller gets: out, or (out, lse); [S, H, D] and [H, S] where the call had three dimensions."""
        out = self.out[0].transpose(0, 1) if self.rank3 else self.out
        if not self.return_lse:
            return out
        return out, (self.lse[0] if self.rank3 else self.lse)

    # ---- checks, in the order of the arguments

    def _take_tensors(self, q, k, v, use_fp8, fp8_dtype, ranks=(3, 4), paged=False, fp8_caches=False):
        tensors = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
        if not tensors or not (
            q.ndim == k.ndim == v.ndim and q.ndim in ranks and q.dtype == k.dtype == v.dtype
            and q.device == k.device == v.device
        ):  # fmt: skip
            self._refuse_tensors(q, k, v, ranks, fp8_caches)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError("q, k, v: one requires grad, and there is no backward; detach() it or use torch.no_grad()")
        self._check_dtype(q.dtype, use_fp8, fp8_dtype)
        _check_device(q.device)
        self.rank3 = q.ndim == 3
        if self.rank3:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        self.batch, self.heads_q, self.seqlen_q, self.head_dim = q.shape
        _, self.heads_kv, self.seqlen_k, _ = k.shape
        self._check_shapes(q, k, v, paged)
        self.q, self.k = addressable(q), addressable(k)
        # float8 values are wanted the other way round, keys contiguous: quantize.py sees to that
        self.v = v if use_fp8 and v.dtype.itemsize == 1 else addressable(v)

    def _refuse_tensors(self, q, k, v, ranks, fp8_caches):
        """Name what is wrong with tensors that are none, or unlike each other, but for caches that may be float8."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name}: must be a torch.Tensor, it is {type(x).__name__}")
            if x.ndim not in ranks:
                forms = "[B, H, S, D]" + (" or [S, H, D]" if 3 in ranks else "")
                raise ValueError(f"{name}: must be {forms}, it has shape {list(x.shape)}")
            if x.ndim != q.ndim:
                raise ValueError(f"{name}: has {x.ndim} dimensions and q has {q.ndim}; all three must have the same")
            if x.dtype != q.dtype:
                self._check_cache_dtype(q, x, name, ("v", v) if name == "k" else ("k", k), fp8_caches)
            if x.device != q.device:
                raise ValueError(f"{name}: is on {x.device} and q is on {q.device}; q, k and v must be on one device")

    def _check_cache_dtype(self, q, x, name, other, fp8_caches):
        """k or v, x, of another dtype than q: float8, like its partner, on a GPU that has it, or a mistake."""
        if x.dtype not in FP8.values() or not fp8_caches:
            hint = ", but for float8 caches in decoding versions that take them" if x.dtype in FP8.values() else ""
            raise TypeError(f"{name}: is {x.dtype} and q is {q.dtype}; q, k and v must have one dtype{hint}")
        if not isinstance(other[1], torch.Tensor) or x.dtype != other[1].dtype:
            got = getattr(other[1], "dtype", type(other[1]).__name__)
            raise TypeError(f"{name}: is {x.dtype} and {other[0]} is {got}; k and v must have one dtype")
        if q.dtype not in HALF:
            raise TypeError(f"q: over float8 caches must be float16 or bfloat16, it is {q.dtype}")
        gpu = detect_gpu()
        if x.dtype == FP8["e4m3"] and (gpu.backend == "hip" or gpu.capability < FP8_CAPABILITY):
            need = "needs an NVIDIA GPU of compute capability 8.9"
            raise ValueError(f"{name}: a cache in e4m3 {need}, this is {gpu.name} ({gpu.arch}); e5m2 would do")

    def _check_dtype(self, dtype, use_fp8, fp8_dtype):
        if not use_fp8:
            if dtype not in HALF and dtype is not torch.float32:
                hint = "; float8 tensors need use_fp8=True, in a version that has it" if dtype.itemsize == 1 else ""
                raise TypeError(f"q: must be float16, bfloat16 or float32, it is {dtype}{hint}")
            return
        if fp8_dtype not in FP8:
            raise ValueError(f"fp8_dtype: must be 'e4m3' or 'e5m2', it is {fp8_dtype!r}")
        if dtype not in HALF and dtype is not FP8[fp8_dtype]:
            raise TypeError(f"q: with use_fp8 must be float16, bfloat16 or {FP8[fp8_dtype]}, it is {dtype}")
        gpu = detect_gpu()
        if gpu.backend == "hip" or gpu.capability < FP8_CAPABILITY:
            raise ValueError(f"use_fp8: needs an NVIDIA GPU of compute capability 8.9, this is {gpu.name} ({gpu.arch})")

    def _check_shapes(self, q, k, v, paged):
        if k.shape != v.shape:
            raise ValueError(f"v: has shape {list(v.shape)} and k has {list(k.shape)}; they must be equal")
        if k.shape[0] != self.batch and not paged:
            raise ValueError(f"k: has batch {k.shape[0]} and q has {self.batch}; they must be equal")
        if k.shape[3] != self.head_dim:
            raise ValueError(f"k: has head_dim {k.shape[3]} and q has {self.head_dim}; they must be equal")
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"q: head_dim must be 1 to {MAX_HEAD_DIM}, it is {self.head_dim}")
        if self.heads_q != self.heads_kv and (self.heads_kv == 0 or self.heads_q % self.heads_kv):
            raise ValueError(f"q: has {self.heads_q} heads, which must be a multiple of k's {self.heads_kv}")
        if max(self.seqlen_q, self.seqlen_k) > MAX_SEQLEN:
            raise ValueError(f"q, k: at most {MAX_SEQLEN} positions, here {self.seqlen_q} and {self.seqlen_k}")

    def _checked_window(self, window, is_causal):
        if not isinstance(is_causal, bool):
            raise TypeError(f"is_causal: must be True or False, it is {is_causal!r}")
        if window is None:
            return None, (0 if is_causal else None)
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise TypeError(f"window: must be a pair (left, right), it is {window!r}")
        for side in window:
            if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 0):
                raise ValueError(f"window: sides are counts of keys, or None for no bound; it is {window!r}")
        reach = self.seqlen_q + self.seqlen_k  # a side this long reaches everything
        left, right = (None if side is None or side >= reach else side for side in window)
        return left, (0 if is_causal else right)

    def _checked_lengths(self, name, lengths, longest):
        if lengths is None:
            return None
        if not isinstance(lengths, torch.Tensor):
            raise TypeError(f"{name}: must be an int32 tensor [{self.batch}], it is {type(lengths).__name__}")
        if lengths.dtype != torch.int32:
            raise TypeError(f"{name}: must be int32, it is {lengths.dtype}")
        if lengths.shape != (self.batch,):
            shape = list(lengths.shape)
            raise ValueError(f"{name}: must have shape [{self.batch}] (one length a sequence), it has {shape}")
        if lengths.device != self.q.device:
            raise ValueError(f"{name}: is on {lengths.device} and q is on {self.q.device}; they must be on one device")
        lengths = lengths.contiguous()
        _check_range(name, lengths, longest)
        return lengths

    def _checked_table(self, table):
        """The block table and the page size; seqlen_k becomes what a sequence's row of the table holds."""
        if table is None:
            return None, None
        form = f"an int32 tensor [{self.batch}, pages of a sequence]"
        if not isinstance(table, torch.Tensor):
            raise TypeError(f"block_table: must be {form}, it is {type(table).__name__}")
        if table.dtype != torch.int32:
            raise TypeError(f"block_table: must be int32, it is {table.dtype}")
        if table.ndim != 2 or table.shape[0] != self.batch:
            raise ValueError(f"block_table: must be {form}, it has shape {list(table.shape)}")
        if table.device != self.q.device:
            raise ValueError(f"block_table: is on {table.device} and q is on {self.q.device}; use one device")
        page_size = self.seqlen_k
        if page_size not in PAGE_SIZES:
            raise ValueError(
                f"k: with a block_table must be [pages, Hkv, page_size, D] with a page_size that is a power of two "
                f"from 1 to {PAGE_SIZES[-1]}, it is {page_size}"
            )
        self.seqlen_k = table.shape[1] * page_size
        if self.seqlen_k > MAX_SEQLEN:
            raise ValueError(f"block_table: at most {MAX_SEQLEN} positions a sequence, here {self.seqlen_k}")
        return (table if table.stride(1) == 1 or table.shape[1] <= 1 else table.contiguous()), page_size

    def _check_pages(self):
        """The entries that a kernel follows lie in the cache. Reads the device, but for a graph that is captured."""
        table, pages = self.block_table, self.k.shape[0]
        if table.device.type == "meta" or table.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        first, end = torch.zeros_like(table[:, 0:1]), torch.full_like(table[:, 0:1], self.seqlen_k)
        if self.seqlens_k is not None:
            end = self.seqlens_k[:, None]
        if self.window_left is not None:
            first = (end - self.seqlen_q - self.window_left).clamp(min=0)
        if self.starts is not None:
            first = torch.maximum(first, self.starts[:, None])
        if self.k_new is not None:
            first = torch.minimum(first, (end - self.seqlen_q).clamp(min=0))
        begins = torch.arange(table.shape[1], device=table.device)[None, :] * self.page_size
        used = (begins < end) & (begins + self.page_size > first) & (first < end)
        wrong = (used & ((table < 0) | (table >= pages))).nonzero()
        if wrong.numel():
            b, i = wrong[0].tolist()
            where, entry = f"[{b}, {i}]", int(table[b, i])
            raise ValueError(f"block_table: pages in use must lie in 0..{pages - 1}, the one at {where} is {entry}")

    def _checked_splits(self, num_splits, deterministic):
        """How many splits, and of how many keys each: for equal bits in every batch that may depend on nothing else."""
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic: must be True or False, it is {deterministic!r}")
        if not deterministic:
            whole = isinstance(num_splits, int) and not isinstance(num_splits, bool)
            if num_splits is not None and not (whole and 1 <= num_splits <= MAX_SPLITS):
                raise ValueError(f"num_splits: must be 1 to {MAX_SPLITS}, or None for a default, it is {num_splits!r}")
            return num_splits, None
        if num_splits is not None:
            raise ValueError(f"num_splits: deterministic=True sets the size of splits; leave out {num_splits!r}")
        if self.keys_in_reach > MAX_SPLITS * DETERMINISTIC_KEYS:
            most = MAX_SPLITS * DETERMINISTIC_KEYS
            raise ValueError(f"deterministic: takes up to {most} keys a sequence, here are {self.keys_in_reach}")
        return max(1, -(-self.keys_in_reach // DETERMINISTIC_KEYS)), DETERMINISTIC_KEYS

    def _checked_new(self, k, v, k_new, v_new):
        """New keys and values, and a cache that can take them: itself, not a copy that is easier to address."""
        if k_new is None and v_new is None:
            return None, None
        shape = (self.batch, self.heads_kv, self.seqlen_q, self.head_dim)
        for name, new, cache, own in (("k", k_new, k, self.k), ("v", v_new, v, self.v)):
            if not isinstance(new, torch.Tensor):
                raise TypeError(f"{name}_new: must be a torch.Tensor, like its partner, it is {type(new).__name__}")
            if new.dtype != cache.dtype:
                raise TypeError(f"{name}_new: is {new.dtype} and {name} is {cache.dtype}; they must have one dtype")
            if new.shape != shape:
                raise ValueError(f"{name}_new: must have shape {list(shape)}, it has {list(new.shape)}")
            if new.device != cache.device:
                raise ValueError(f"{name}_new: is on {new.device} and {name} is on {cache.device}; use one device")
            if torch.is_grad_enabled() and new.requires_grad:
                raise ValueError(f"{name}_new: requires grad, and there is no backward; detach() it")
            if own is not cache:
                raise ValueError(
                    f"{name}: to be written its last dimension must be contiguous, its rows at most {MAX_ROW_STRIDE} "
                    f"elements apart; its strides are {list(cache.stride())}"
                )
            if any(size > 1 and step == 0 for size, step in zip(cache.shape, cache.stride(), strict=True)):
                strides = list(cache.stride())
                raise ValueError(f"{name}: to be written its elements must not share memory, its strides are {strides}")
        return addressable(k_new), addressable(v_new)

    def _checked_cache_descale(self, name, descale):
        """A float8 cache's descale and the keys that one number of it is for, 0 for all of a head's."""
        if descale is None:
            return None, 0
        if not self.fp8:
            raise ValueError(f"{name}: belongs to float8 caches, k and v are {self.k.dtype}")
        if not isinstance(descale, torch.Tensor):
            raise TypeError(f"{name}: must be a float32 tensor, it is {type(descale).__name__}")
        if descale.dtype != torch.float32:
            raise TypeError(f"{name}: must be float32, it is {descale.dtype}")
        if descale.device != self.q.device:
            raise ValueError(f"{name}: is on {descale.device} and q is on {self.q.device}; use one device")
        if descale.shape == (self.batch, self.heads_kv):
            return descale.contiguous(), 0
        places, _, keys, _ = self.k.shape
        if descale.ndim == 3 and descale.shape[:2] == (places, self.heads_kv) and (descale.shape[2] or not keys):
            blocks = descale.shape[2]
            of_block = max(LEAST_KEYS_OF_DESCALE, 1 << (-(-keys // max(blocks, 1)) - 1).bit_length()) if keys else 1
            if -(-keys // of_block) == blocks:
                return descale.contiguous(), of_block
        forms = f"[{self.batch}, {self.heads_kv}] or [{places}, {self.heads_kv}, blocks of {keys} keys]"
        raise ValueError(
            f"{name}: must have shape {forms}, blocks of a power of two from {LEAST_KEYS_OF_DESCALE} on; "
            f"it has {list(descale.shape)}"
        )

    def _checked_descales(self, descales):
        """Float32 [batch, heads] for each of q, k, v; a number or one element serves all heads. Default 1."""
        if not self.fp8:
            if descales is not None and any(d is not None for d in descales):
                raise ValueError("descale_q, descale_k, descale_v: belong to float8 tensors; 16-bit ones get their own")
            return None
        names = ("descale_q", "descale_k", "descale_v")
        heads = (self.heads_q, self.heads_kv, self.heads_kv)
        checked = []
        for name, descale, h in zip(names, descales or (None,) * 3, heads, strict=True):
            if not isinstance(descale, torch.Tensor):
                if not isinstance(descale, int | float | None):
                    raise TypeError(f"{name}: must be a number or a tensor, it is {type(descale).__name__}")
                value = 1.0 if descale is None else float(descale)
                checked.append(torch.full((self.batch, h), value, dtype=torch.float32, device=self.q.device))
                continue
            if descale.device != self.q.device:
                raise ValueError(f"{name}: is on {descale.device} and q on {self.q.device}; they must be on one device")
            if descale.shape != (self.batch, h):
                if descale.numel() != 1 and descale.shape != (h,):
                    shapes = f"one element, or shape [{h}] or [{self.batch}, {h}]"
                    raise ValueError(f"{name}: must have {shapes}, it has {list(descale.shape)}")
                descale = (descale.reshape(1) if descale.numel() == 1 else descale).expand(self.batch, h)
            checked.append((descale if descale.dtype is torch.float32 else descale.float()).contiguous())
        return tuple(checked)

    def _take_outputs(self, out, return_lse):
        if not isinstance(return_lse, bool):
            raise TypeError(f"return_lse: must be True or False, it is {return_lse!r}")
        self.return_lse = return_lse
        dtype = torch.bfloat16 if self.q.dtype.itemsize == 1 else self.q.dtype
        self.out = torch.empty_like(self.q, dtype=dtype) if out is None else self._checked_out(out, dtype)
        shape = (self.batch, self.heads_q, self.seqlen_q)
        self.lse = torch.empty(shape, dtype=torch.float32, device=self.q.device) if return_lse else None

    def _checked_out(self, out, dtype):
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out: must be a torch.Tensor, it is {type(out).__name__}")
        shape = (self.seqlen_q, self.heads_q, self.head_dim) if self.rank3 else tuple(self.q.shape)
        if out.shape != shape or out.device != self.q.device:
            raise ValueError(f"out: must be {list(shape)} on {self.q.device}, it is {list(out.shape)} on {out.device}")
        either = self.q.dtype.itemsize == 1
        if out.dtype != dtype and not (either and out.dtype in HALF):
            raise TypeError(f"out: must be {'float16 or bfloat16' if either else dtype}, it is {out.dtype}")
        if out.stride(-1) != 1 and out.shape[-1] > 1:
            raise ValueError(f"out: its last dimension must be contiguous, its strides are {list(out.stride())}")
        strides = out.stride()
        if 0 in strides and any(size > 1 and step == 0 for size, step in zip(out.shape, strides, strict=True)):
            raise ValueError(f"out: its elements must not share memory, its strides are {list(out.stride())}")
        return out.transpose(0, 1).unsqueeze(0) if self.rank3 else out


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, S, D] itself where its last dimension is contiguous and its rows are not too far apart, else a copy."""
    *_, row, column = x.stride()
    contiguous = column == 1 or x.shape[-1] == 1
    return x if contiguous and row <= MAX_ROW_STRIDE else x.contiguous()


def checked_fresh_keys(fresh_keys):
    """How many keys may be fresh, or None for all."""
    if fresh_keys is not None and (type(fresh_keys) is not int or not 0 <= fresh_keys < 2**31):
        raise ValueError(f"fresh_keys: must be a count of keys, 0 or more, or None for all, it is {fresh_keys!r}")
    return fresh_keys


def _checked_scale(scale, head_dim) -> float:
    """A float32 number, as kernels take it. One too small for it is 0: exp(scale * score) is 1 either way."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= FLOAT32.max:
        raise ValueError(f"scale: must be a finite float32 number, it is {scale!r}")
    return float(scale) if abs(scale) >= FLOAT32.tiny else 0.0


def _check_device(device: torch.device):
    if device.type == "cuda" or (device.type == "cpu" and interpreting()) or (device.type == "meta" and pretending()):
        return
    raise ValueError(
        f"q: is on {device}; kernels need a GPU tensor (or, for the CPU, TRITON_INTERPRET=1 before triton is imported)"
    )


# id of a lengths tensor -> itself, its version, the bound it met
_in_range: dict[int, tuple[weakref.ref, int, int]] = {}


def _check_range(name: str, lengths: torch.Tensor, longest: int):
    """Lengths, or first keys, lie in 0..longest.

    Reads the device once for each tensor and change of it, never in a graph capture.
    """
    if (recording := replay.recording()) is not None:
        recording.checks.append((_check_range, name, lengths, longest))
        return
    if lengths.device.type == "meta" or lengths.numel() == 0:
        return
    version = None if lengths.is_inference() else lengths._version
    known = _in_range.get(id(lengths))
    if version is not None and known is not None and known[0]() is lengths and known[1:] == (version, longest):
        return
    if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # the kernels clamp lengths, so that a bad one cannot reach foreign memory
    least, most = (int(x) for x in lengths.aminmax())
    if least < 0 or most > longest:
        what = "first keys" if name == "starts" else "lengths"
        raise ValueError(f"{name}: {what} must lie in 0..{longest}, they reach from {least} to {most}")
    key = id(lengths)
    _in_range[key] = (weakref.ref(lengths, lambda _: _in_range.pop(key, None)), version, longest)
