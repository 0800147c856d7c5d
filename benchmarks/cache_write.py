"""Time the writing of new tokens' rows in a decode step: sketched rows beside plain ones, on one GPU.

    python benchmarks/cache_write.py [--out FILE]

Norm, projection to the slice, rotation of the key and of 64 heads' queries, rounding and the paged write, as a layer of
DeepSeek V3 does them. Times are medians over replays of a CUDA graph of calls, all rows in turns. The bar is 1.3 times
plain rows of 256 columns.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests" / "gpu"))
from write_case import random_write

from benchmarks.decode_kernel import capture, environment
from sglang_tpla.attention.cache_write.write import write
from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.sketched import SketchedRows

D, ROPE, HEADS, BAR = 512, 64, 64, 1.3
TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 128)
CALLS, ROUNDS = 20, 15
SKETCHED = {f"g = {g}": GroupRows(SketchedRows.of(D, g, 64, ROPE), 0) for g in (1, 2, 4, 8)}
PLAIN = {"plain, 256": 256, "plain, 512": None}


def measure(tokens: int) -> dict[str, Any]:
    """Return the microseconds of one write of each kind of rows."""
    timers, kept = [], []
    for name in (*PLAIN, *SKETCHED):
        sketched = SKETCHED.get(name)
        width = PLAIN[name] if sketched is None else sketched.columns
        case = random_write(tokens, D, width, ROPE, True, torch.bfloat16, 3, "cuda", HEADS)
        if sketched is None:
            new = case.write(1e-6, "pairs")
        else:
            cache = torch.zeros(len(case.cache), 1, sketched.row_items, dtype=torch.uint8, device="cuda")
            new = case.write(1e-6, "pairs", cache=cache, sketched=sketched)
        timers.append(capture(lambda new=new: write(new), CALLS))  # type: ignore[misc]
        kept.append(new)  # a graph does not keep its inputs alive
    samples = [[timer() for timer in timers] for _ in range(ROUNDS)]
    us = [1000 * statistics.median(times) for times in zip(*samples, strict=True)]
    return {"tokens": tokens, "us": dict(zip((*PLAIN, *SKETCHED), us, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "cache_write.json")
    args = parser.parse_args()
    rows = []
    for tokens in TOKENS:
        row = measure(tokens)
        rows.append(row)
        bar = BAR * row["us"]["plain, 256"]
        times = ", ".join(f"{name} {us:.2f}{' MISSED' if us > bar else ''}" for name, us in row["us"].items())
        print(f"{tokens:>4} tokens, us: {times}; bar {bar:.2f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": environment(), "bar": BAR, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
