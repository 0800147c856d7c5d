"""The decode kernel of sketched rows against MLA on FlashInfer fa3, on one GPU.

    python benchmarks/sketched_kernel.py [--out FILE] [--page-size 64]

Each row is one attention layer of one decode step, as in ``decode_kernel.py``: MLA with the heads of a rank under plain
tensor parallelism, sketched rows with ``groups`` times as many, both timed in turns. fa3 is also timed alone with as
many heads as the sketched rows have: what MLA costs a rank that keeps them all. Pages lie in random order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests" / "gpu"))
from decode_case import random_case, relative_error

from benchmarks.decode_kernel import MLA_DIM, ROPE_DIM, SCALE, Step, capture, environment, prepare
from sglang_tpla.attention.flashinfer import FlashInferDecode
from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

MLA_HEADS = 16
CALLS, ROUNDS = 10, 15


@dataclass(frozen=True)
class Row:
    """A case: ``MLA_HEADS`` times ``groups`` heads on ``shared`` columns that every rank keeps."""

    groups: int
    shared: int
    batch: int = 16
    tokens: int = 32768


ROWS = (
    Row(1, 512), Row(2, 64), Row(4, 64), Row(8, 64), Row(2, 64, 128, 4096), Row(2, 64, 1, 131072),
    Row(1, 512, 1), Row(2, 64, 1), Row(2, 64, 4), Row(4, 64, 4),
)  # fmt: skip


def mla(heads: int, row: Row, page_size: int) -> Step:
    """Return FlashInfer fa3 on plain MLA's rows."""
    device = torch.device("cuda:0")
    shape = DecodeShape(MLA_DIM, heads, ROPE_DIM, page_size=page_size)
    return prepare(shape, row.batch, row.tokens, "random", lambda s: FlashInferDecode(s, SCALE, device, "fa3"))


def sketched(row: Row, page_size: int) -> Step:
    """Return this package's kernel, with the error on two short requests, whose reference fits in memory."""
    rows = SketchedRows.of(MLA_DIM, row.groups, row.shared, ROPE_DIM)
    shape = DecodeShape.of_sketched(rows, MLA_HEADS * row.groups, page_size=page_size)
    for lengths in ([1000, 5], [row.tokens] * row.batch):
        case = random_case(shape, lengths, seed=7)
        kernel = HopperDecode(shape, SCALE, len(lengths), torch.device("cuda:0"))
        kernel.plan(case.table, case.lengths)
        out = case.q_latent.new_empty(*case.q_latent.shape[:2], shape.latent_dim)
        kernel.run(case.q_latent, case.q_rope, case.kv_cache, out)
        if len(lengths) == 2:
            error = relative_error(out, case.reference())
    return Step(
        lambda: kernel.run(case.q_latent, case.q_rope, case.kv_cache, out),
        row.batch * row.tokens * shape.cache_dim,
        error,
    )


def measure(row: Row, page_size: int) -> dict[str, Any]:
    """Return the median microseconds of fa3 with few and with all heads, and of sketched rows."""
    steps = {
        "mla": mla(MLA_HEADS, row, page_size),
        "mla, all heads": mla(MLA_HEADS * row.groups, row, page_size),
        "sketched": sketched(row, page_size),
    }
    timers = [capture(step.run, CALLS) for step in steps.values()]
    samples = [[1000 * timer() for timer in timers] for _ in range(ROUNDS)]
    us = dict(zip(steps, map(statistics.median, zip(*samples, strict=True)), strict=True))
    spread = dict(zip(steps, ([min(one), max(one)] for one in zip(*samples, strict=True)), strict=True))
    return {
        **asdict(row),
        "heads": MLA_HEADS * row.groups,
        "bytes_bound": steps["mla"].cache_bytes / steps["sketched"].cache_bytes,
        "us": us,
        "us_range": spread,
        "errors": {name: step.error for name, step in steps.items()},
        "speedup": us["mla"] / us["sketched"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "sketched_kernel.json")
    parser.add_argument("--page-size", type=int, default=1, choices=(1, 64))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        result = measure(row, args.page_size)
        rows.append(result)
        times = ", ".join(f"{name} {us:.1f}" for name, us in result["us"].items())
        print(
            f"g {row.groups}, {result['heads']:>3} heads, {row.batch:>3} x {row.tokens:<6}: {times} us; "
            f"{result['speedup']:.2f} times as fast as MLA, {result['bytes_bound']:.2f} by bytes; "
            f"error {result['errors']['sketched']:.1e}",
            flush=True,
        )
        torch.cuda.empty_cache()
        report = {"environment": environment(), "page_size": args.page_size, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
