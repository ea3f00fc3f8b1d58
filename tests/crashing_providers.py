"""Peers that misbehave, for the process tests: imported inside a worker, where they join the real ones."""

import os
import time

from bench import providers
from bench.providers import Bound, Peer
from common.reference import eager_attention


def _eager(inputs):
    return eager_attention(inputs.q, inputs.k, inputs.v)


def _dies(inputs):
    return Bound(lambda out: os._exit(7))


def _hangs(inputs):
    return Bound(lambda out: time.sleep(600))


def _raises(inputs):
    raise RuntimeError("no kernel for this\nand a long story about it")


def _chatters(inputs):
    def call(out):
        print("library chatter on stdout")
        os.write(1, b"and past Python, too\n")
        return _eager(inputs)

    return Bound(call)


def _finds_no_memory(inputs):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")


for name, bind in {
    "dies": _dies, "hangs": _hangs, "raises": _raises, "chatters": _chatters, "hungry": _finds_no_memory,
}.items():  # fmt: skip
    providers.PEERS += (Peer(name, name, bind, dtypes=("fp32",)),)
