"""The flags of both benchmark scripts: the same names, the same meaning."""

from __future__ import annotations

import argparse
import pathlib
import sys

from bench import cases
from bench.providers import PEERS

UNIT = {"prefill": "TFLOP/s", "decoding": "GB/s"}


class OneLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line; the status is 2."""

    def error(self, message: str):
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _sizes(text: str) -> list[int]:
    try:
        return [cases.parse_size(word) for word in _words(text)]
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of 1 or more")
    return int(text)


def parser(family: str) -> argparse.ArgumentParser:
    """The parser of run_prefill_bench.py or run_decoding_bench.py."""
    peers = "; ".join(f"{peer.name}: {peer.label}" for peer in PEERS if family in peer.families)
    parser = OneLine(
        prog=f"run_{family}_bench.py",
        allow_abbrev=False,
        epilog=f"Peers: {peers}.",
        description=f"{UNIT[family]} of every {family} version beside the peers. No number without a check: a kernel "
        "that is wrong at the shape that was timed gets no time. Without a GPU the versions are checked in Triton's "
        "interpreter, compiled for the GPU of the recorded results, and those results are shown.",
    )  # fmt: skip
    shapes = parser.add_argument_group(
        "what is computed", "each flag takes the place of the preset's own values; lists are 512,1k,16k"
    )
    shapes.add_argument("--preset", default="quick", choices=list(cases.PRESETS[family]), help="default: quick")
    shapes.add_argument("--seq-lens", type=_sizes, metavar="N,..", help="keys of a sequence; in prefill the rows too")
    shapes.add_argument("--head-dims", type=_sizes, metavar="N,..", help="1 to 256")
    shapes.add_argument(
        "--heads", type=_sizes, metavar="N,..", help=f"query heads; preset paper: {cases.HIDDEN} / head_dim"
    )
    shapes.add_argument("--heads-kv", type=_sizes, metavar="N,..", help="KV heads; with --heads alone: as many")
    shapes.add_argument(
        "--batch", type=_sizes, metavar="N,..", help=f"sequences; preset paper: {cases.TOKENS} tokens in all"
    )
    shapes.add_argument("--dtypes", type=_words, metavar="X,..", help=", ".join(cases.DTYPES))
    shapes.add_argument("--causal", choices=("yes", "no", "both"), help="mask; a decoding step has none")
    shapes.add_argument("--layout", choices=cases.LAYOUTS, default="bshd", help="order in memory; default: bshd")
    shapes.add_argument("--page-size", type=_sizes, metavar="N,..", help="decoding: caches in shuffled pages of N keys")
    shapes.add_argument("--queries", type=_sizes, metavar="N,..", help="decoding: queries of a sequence, 1 to 16")
    shapes.add_argument("--ragged", action="store_true", help="decoding: lengths from 1 to --seq-lens, most short")
    who = parser.add_argument_group("who is measured")
    who.add_argument("--versions", type=_words, metavar="v1,..", help="default: all")
    names = ", ".join(peer.name for peer in PEERS)
    who.add_argument(
        "--peers", type=_words, metavar="X,..", help=f"{names}; none; all; default: those that are installed"
    )
    who.add_argument(
        "--tune", action="store_true", help="first search for each version's best tiles, and remember them"
    )
    how = parser.add_argument_group("how, and where to")
    how.add_argument("--rounds", type=_count, default=5, help="interleaved rounds of samples; default: 5")
    how.add_argument("--out", type=pathlib.Path, metavar="DIR", help="records and charts; default: results/<gpu>")
    how.add_argument(
        "--replay", type=pathlib.Path, metavar="DIR", help="show and draw recorded results again; measures nothing"
    )
    how.add_argument(
        "--compare", metavar="RUN", help="a run_id or a folder: what got faster or slower since, beyond noise"
    )
    return parser


def axes(args: argparse.Namespace) -> dict:
    """The keyword arguments of cases.cases_for that the flags ask for."""
    masks = {"yes": (True,), "no": (False,), "both": (False, True), None: None}
    return {
        "layout": args.layout, "seqlen_k": args.seq_lens, "head_dim": args.head_dims, "heads_q": args.heads,
        "heads_kv": args.heads_kv, "batch": args.batch, "dtype": args.dtypes, "causal": masks[args.causal],
        "page_size": args.page_size, "seqlen_q": args.queries, "ragged": (True,) if args.ragged else None,
    }  # fmt: skip
