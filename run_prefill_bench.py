#!/usr/bin/env python3
"""TFLOP/s of every prefill version, beside the peers. `run_prefill_bench.py --help` says how."""

import sys

from bench.runner import main

if __name__ == "__main__":
    sys.exit(main("prefill"))
