#!/usr/bin/env python3
"""GB/s of every decoding version, beside the peers. `run_decoding_bench.py --help` says how."""

import sys

from bench.runner import main

if __name__ == "__main__":
    sys.exit(main("decoding"))
