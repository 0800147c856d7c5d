"""Time the attention of verifying guesses: query lengths 2 to 4 beside a step of one token, on one GPU.

    python benchmarks/verify_kernel.py [--out FILE]

Each row is one layer's attention for 16 requests of 32,768 tokens, with 32 heads as on a rank of two groups of DeepSeek
V3 on eight GPUs. Times are medians over replays of a CUDA graph of calls, the query lengths taken in turns; the plan,
made once a step for all layers, is outside.
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
from decode_case import SCALE, random_case, relative_error

from benchmarks.decode_kernel import capture, environment
from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import MAX_QUERY_LEN, DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

BATCH, CONTEXT, HEADS, BAR = 16, 32768, 32, 1.25
CALLS, ROUNDS = 10, 15


def shapes(query_len: int) -> dict[str, DecodeShape]:
    """Return the shapes that are measured, by name."""
    return {
        "plain, 256": DecodeShape(256, HEADS, query_len=query_len),
        "plain, 320": DecodeShape(320, HEADS, query_len=query_len),
        "sketched, g = 1": DecodeShape.of_sketched(SketchedRows.of(512, 1, 512, 64), HEADS, query_len),
        "sketched, g = 2": DecodeShape.of_sketched(SketchedRows.of(512, 2, 64, 64), HEADS, query_len),
    }


def measure(name: str) -> dict[str, Any]:
    """Return the microseconds at every query length, and the largest error of the first request."""
    timers, errors, kept = [], [], []
    for query_len in range(1, MAX_QUERY_LEN + 1):
        shape = shapes(query_len)[name]
        few = random_case(shape, [1000, 5], seed=3)
        case = random_case(shape, [CONTEXT] * BATCH, seed=7)
        for one in (few, case):
            kernel = HopperDecode(shape, SCALE, len(one.lengths), torch.device("cuda:0"))
            kernel.plan(one.table, one.lengths)
            out = one.q_latent.new_empty(*one.q_latent.shape[:2], shape.latent_dim)
            kernel.run(one.q_latent, one.q_rope, one.kv_cache, out)
            if one is few:
                errors.append(relative_error(out, one.reference()))

        def run(kernel: HopperDecode = kernel, case: Any = case, out: torch.Tensor = out) -> None:
            kernel.run(case.q_latent, case.q_rope, case.kv_cache, out)

        timers.append(capture(run, CALLS))
        kept.append(run)  # a graph does not keep its inputs alive
    samples = [[timer() for timer in timers] for _ in range(ROUNDS)]
    us = [1000 * statistics.median(times) for times in zip(*samples, strict=True)]
    ratios = [time / us[0] for time in us]
    return {"rows": name, "us": us, "ratios": ratios, "errors": errors, "met": ratios[-1] <= BAR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "verify_kernel.json")
    args = parser.parse_args()
    rows = []
    for name in shapes(1):
        row = measure(name)
        rows.append(row)
        times = (f"{us:.1f} us ({ratio:.2f})" for us, ratio in zip(row["us"], row["ratios"], strict=True))
        verdict = "met" if row["met"] else "MISSED"
        print(f"{name:>16}: {', '.join(times)}; error {max(row['errors']):.1e}; bar {BAR} {verdict}", flush=True)
        torch.cuda.empty_cache()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"batch": BATCH, "context": CONTEXT, "heads": HEADS}
    args.out.write_text(json.dumps({"environment": environment(), **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
