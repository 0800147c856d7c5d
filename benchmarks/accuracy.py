"""The accuracy tables of docs/accuracy.md: the same as `make accuracy`.

    python benchmarks/accuracy.py [--tiny PATH] [--seed N] [--corpus PATH ...]

Takes the options of `python -m sglang_tpla.evaluate.tables`; a GPU makes it minutes instead of an hour.
"""

from __future__ import annotations

import sys

from sglang_tpla.evaluate.tables import main

if __name__ == "__main__":
    sys.exit(main())
