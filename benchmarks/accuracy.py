"""The accuracy tables of docs/accuracy.md: `make accuracy` with the document to write into.

    python benchmarks/accuracy.py [--tiny PATH] [--seed N] [--corpus PATH ...]

Takes the options of `python -m sglang_tpla.evaluate.tables`; a GPU makes it minutes instead of an hour.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_tpla.evaluate.tables import main

if __name__ == "__main__":
    document = Path(__file__).resolve().parents[1] / "docs" / "accuracy.md"
    sys.exit(main(["--write", str(document), *sys.argv[1:]]))
