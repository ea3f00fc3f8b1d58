"""What is timed: a Case is one shape with its dtype and mask; a preset is a list of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DTYPES = ("fp16", "bf16", "fp32", "e4m3", "e5m2")
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "e4m3": 1, "e5m2": 1}
FP8 = ("e4m3", "e5m2")
LAYOUTS = ("bshd", "bhsd")
TOKENS = 16384  # tokens in a batch, and width of a layer, of the papers' sweeps
HIDDEN = 2048
PAGE_SIZES = tuple(2**i for i in range(9))


@dataclass(frozen=True)
class Case:
    """One problem. lengths are the true key lengths of a padded batch, or None; window is (left, right), inclusive,
    None for no bound; layout, the order in memory, is "bshd" or "bhsd"; page_size: keys of a page, for caches in pages;
    preset is its origin. In decoding an 8-bit dtype is that of the caches: queries and output have 16 bits.
    """

    family: str
    dtype: str
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    lengths: tuple[int, ...] | None = None
    layout: str = "bshd"
    preset: str | None = None
    page_size: int | None = None

    def visible_keys(self, len_k: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of the seqlen_q rows the first key that it sees, and the one past the last. Bottom-right aligned."""
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        own_key = np.arange(self.seqlen_q) + len_k - self.seqlen_q
        first = np.zeros_like(own_key) if left is None else np.clip(own_key - left, 0, len_k)
        past = np.full_like(own_key, len_k) if right is None else np.clip(own_key + right + 1, 0, len_k)
        return first, np.maximum(first, past)

    def _total(self, count) -> int:
        """The sum of count(first, past) over the sequences of the batch."""
        lengths = self.lengths or (self.seqlen_k,) * self.batch
        counted = {length: count(*self.visible_keys(length)) for length in set(lengths)}
        return sum(counted[length] for length in lengths)

    def flops(self) -> int:
        """Two products of 2 * head_dim operations for each pair of a row and a key that it sees, counted exactly.

        (FlashAttention's convention halves Sq * Sk for causal; exact is S * (S + 1) / 2, 0.2 % more at S = 512.)
        """
        return 4 * self.heads_q * self.head_dim * self._total(_pairs)

    def bytes(self) -> int:
        """Q, the output (16 bits for 8-bit inputs), each key and value that some row sees: once, at the KV heads."""
        size = ITEMSIZE[self.dtype]
        size_q = max(size, 2) if self.family == "decoding" else size
        rows = self.batch * self.heads_q * self.seqlen_q
        keys = self.heads_kv * self._total(_reach)
        return self.head_dim * (rows * (size_q + max(size, 2)) + 2 * keys * size)

    @property
    def plain(self) -> bool:
        """Whether any library's attention takes it: no window, lengths or pages, in decoding one query a sequence."""
        one = self.family == "prefill" or self.seqlen_q == 1
        return one and not (self.window or self.lengths or self.page_size)

    def label(self) -> str:
        """Short name for people: "fp16 B=2 H=16 S=8k D=128 full"."""
        heads = str(self.heads_q) if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"
        mask = "" if self.family == "decoding" else (" causal" if self.causal else " full")
        if self.family == "decoding":
            mask += f" Sq={self.seqlen_q}" if self.seqlen_q > 1 else ""
        mask += (" ragged" if self.lengths else "") + (f" page {self.page_size}" if self.page_size else "")
        return f"{self.dtype} B={self.batch} H={heads} S={short(self.seqlen_k)} D={self.head_dim}{mask}"


def _pairs(first: np.ndarray, past: np.ndarray) -> int:
    return int((past - first).sum())


def _reach(first: np.ndarray, past: np.ndarray) -> int:
    """How many keys some row sees. Neighbouring rows' ranges touch, so the union is one range."""
    sees = past > first
    return int(past[sees].max() - first[sees].min()) if sees.any() else 0


def short(number: int) -> str:
    """16384 -> "16k", 1000 -> "1000"."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def ragged_lengths(batch: int, longest: int) -> tuple[int, ...]:
    """Lengths from 1 to `longest`, each longer than the one before by the same factor, in a fixed random order.

    So most sequences are short and a few hold most keys: of 64 up to 64k the longest alone holds a sixth of them.
    """
    if batch == 1:
        return (longest,)
    lengths = [round(longest ** (i / (batch - 1))) for i in range(batch)]
    return tuple(int(lengths[i]) for i in np.random.default_rng(0).permutation(batch))


def parse_size(text: str) -> int:
    """ "512" -> 512, "16k" -> 16384, "1m" -> 1048576. ValueError for anything else or less than 1."""
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"{text!r} is not a size: write 512, 16k or 1m")
    return int(digits) * factor


# ---- presets: rows of axes; batch and heads that are left out follow from TOKENS and HIDDEN


def _grid(**axes) -> list[dict]:
    """The cross product of axes, the last one running fastest."""
    rows = [{}]
    for axis, values in axes.items():
        rows = [row | {axis: value} for row in rows for value in values]
    return rows


def _decoding_rows(dtypes, *shapes, **more) -> list[dict]:
    names = ("batch", "heads_q", "heads_kv", "seqlen_k", "head_dim")
    return [{"dtype": dtype} | dict(zip(names, shape, strict=True)) | more for dtype in dtypes for shape in shapes]


# (batch, heads_q, heads_kv, seqlen_k, head_dim); keys and values of 34 to 1074 MB in 16 bits
DECODING_SHAPES = (
    (1, 16, 16, 8192, 64), (1, 16, 16, 65536, 64), (1, 32, 8, 8192, 128), (1, 32, 8, 65536, 128),
    (1, 32, 8, 131072, 128), (16, 32, 8, 8192, 128), (64, 32, 8, 4096, 128), (128, 32, 8, 2048, 128),
    (8, 64, 8, 32768, 128),
)  # fmt: skip
_LARGE = tuple(shape for shape in DECODING_SHAPES if shape[0] * shape[2] * shape[3] * shape[4] >= 2**26)  # 268 MB
_STEPS = (16, 32, 8, 8192, 128)
_PAPER_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
PRESETS = {
    "prefill": {
        "paper": _grid(
            dtype=("fp16", "bf16", "e4m3"), head_dim=(64, 128, 256), causal=(False, True), seqlen_k=_PAPER_SEQLENS
        ),
        "seed": [
            *_grid(
                dtype=("fp16", "e4m3", "e5m2"), batch=(1,), heads_q=(16,), head_dim=(16,), causal=(False, True),
                seqlen_k=(8192,),
            ),
            *_grid(dtype=("fp16",), batch=(1,), heads_q=(8,), head_dim=(16,), causal=(False,), seqlen_k=(1024,)),
            *_grid(
                dtype=("fp16",), batch=(2,), heads_q=(4,), head_dim=(64, 128), causal=(False, True),
                seqlen_k=(512, 1024, 2048, 4096, 8192),
            ),
        ],
        "quick": _grid(dtype=("fp16", "e4m3"), head_dim=(128,), causal=(False, True), seqlen_k=(2048, 8192)),
    },
    "decoding": {
        "paper": [
            *_decoding_rows(("fp16",), (1, 32, 8, 1024, 128), *DECODING_SHAPES),  # 1k: nothing but the launch
            *_decoding_rows(("bf16",), *DECODING_SHAPES),
            *_decoding_rows(("e4m3",), *_LARGE),
            *_decoding_rows(("e5m2",), _STEPS),
            *_decoding_rows(("fp16",), (1, 32, 8, 65536, 128), _STEPS, (64, 32, 8, 4096, 128), page_size=16),
            *_decoding_rows(("e4m3",), _STEPS, page_size=16),
            *_decoding_rows(("fp16", "e4m3"), (64, 32, 8, 65536, 128), ragged=True),
            *_decoding_rows(("fp16",), _STEPS, seqlen_q=4),
        ],
        "seed": _decoding_rows(("fp32", "fp16"), (1, 16, 16, 8192, 64), (1, 16, 16, 65536, 64)),
        "quick": [
            *_decoding_rows(("fp16",), (1, 16, 16, 65536, 64), (1, 32, 8, 8192, 128), _STEPS),
            *_decoding_rows(("e4m3",), _STEPS),
            *_decoding_rows(("fp16",), _STEPS, page_size=16),
        ],
    },
}  # fmt: skip


def cases_for(family: str, preset: str, layout: str = "bshd", **axes) -> list[Case]:
    """The cases of a preset; each axis given (seqlen_k, head_dim, heads_q, heads_kv, batch, dtype, causal; in decoding
    page_size, seqlen_q, ragged: sequences of values) takes the place of the preset's own. heads_q without heads_kv
    means as many KV heads; ragged means ragged_lengths up to seqlen_k.

    Raises ValueError, naming what exists, for an unknown preset or dtype and for shapes that no kernel takes.
    """
    if preset not in PRESETS[family]:
        raise ValueError(f"--preset {preset} does not exist; there are {', '.join(PRESETS[family])}")
    rows = PRESETS[family][preset]
    if axes.get("heads_q") and not axes.get("heads_kv"):
        rows = [{name: value for name, value in row.items() if name != "heads_kv"} for row in rows]
    for axis, values in axes.items():
        if values:
            rows = [row | {axis: value} for row in rows for value in values]
    return list(dict.fromkeys(_case(family, preset, layout, row) for row in rows))


def _case(family: str, preset: str, layout: str, row: dict) -> Case:
    seqlen, head_dim, dtype = row["seqlen_k"], row["head_dim"], row["dtype"]
    heads_q = row.get("heads_q") or max(1, HIDDEN // head_dim)
    heads_kv = row.get("heads_kv") or heads_q
    batch = row.get("batch") or max(1, TOKENS // seqlen)
    if dtype not in DTYPES:
        raise ValueError(f"--dtypes {dtype} does not exist; there are {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"--layout {layout} does not exist; there are {', '.join(LAYOUTS)}")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"--head-dims {head_dim}: head dimensions reach from 1 to 256")
    if heads_q % heads_kv:
        raise ValueError(f"--heads {heads_q} is not a multiple of --heads-kv {heads_kv}")
    if family == "prefill":
        for flag, name in (("--page-size", "page_size"), ("--queries", "seqlen_q"), ("--ragged", "ragged")):
            if row.get(name):
                raise ValueError(f"{flag} belongs to decoding: prefill reads no cache")
    if row.get("page_size") and row["page_size"] not in PAGE_SIZES:
        raise ValueError(f"--page-size {row['page_size']}: pages hold a power of two, from 1 to {PAGE_SIZES[-1]} keys")
    if family == "prefill":
        causal = bool(row.get("causal"))
        return Case(
            family, dtype, batch, heads_q, heads_kv, seqlen, seqlen, head_dim, causal, layout=layout, preset=preset
        )
    seqlen_q = row.get("seqlen_q") or 1  # a single query sees every key; of several each sees keys up to its own
    lengths = ragged_lengths(batch, seqlen) if row.get("ragged") else None
    return Case(
        family, dtype, batch, heads_q, heads_kv, seqlen_q, seqlen, head_dim, causal=seqlen_q > 1, lengths=lengths,
        layout=layout, preset=preset, page_size=row.get("page_size"),
    )  # fmt: skip
