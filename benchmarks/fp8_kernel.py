"""Decode attention over FP8 rows beside this package's kernel over bfloat16 rows, on one GPU.

    python benchmarks/fp8_kernel.py [--out FILE] [--sweep]

The cases of decode_kernel.py: one attention layer of one decode step, random data, the same width, heads and tokens for
both; FP8 rows with two scales (r = 64). Times are medians over replays of a CUDA graph of calls, both taken in turns.
``--sweep`` times every tiling of a list instead of the one that `tiling_for` takes, each checked against float32.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.decode_kernel import ROPE_DIM, ROWS, SCALE, capture
from sglang_tpla.attention.fp8.decode import Fp8Decode, Tiling, tiling_for
from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeShape, PageTable
from sglang_tpla.attention.reference import latent_attention, read_fp8
from sglang_tpla.cache_rows.fp8 import pack_rows

SHARED = 64
CALLS, ROUNDS = 10, 15


class Inputs:
    """Random queries and rows of one case, the rows in both formats, and the float32 answer of two requests."""

    def __init__(self, width: int, heads: int, batch: int, tokens: int) -> None:
        device = torch.device("cuda:0")
        self.batch, self.tokens = batch, tokens
        self.plain = DecodeShape(width, heads, ROPE_DIM)
        self.fp8 = DecodeShape(width, heads, ROPE_DIM, fp8_shared=min(SHARED, width))
        self.rows = torch.randn(batch * tokens, width + ROPE_DIM, device=device).bfloat16()
        parts = [pack_rows(part[:, :width], part[:, width:], min(SHARED, width)) for part in self.rows.split(1 << 16)]
        self.fp8_rows = torch.cat(parts)
        order = torch.randperm(batch * tokens, device=device).to(torch.int32)
        starts = torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens
        self.table = PageTable.from_csr(starts, order)
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        self.q_latent = torch.randn(batch, heads, width, device=device).bfloat16()
        self.q_rope = torch.randn(batch, heads, ROPE_DIM, device=device).bfloat16()
        self.some = torch.tensor(sorted({0, batch - 1}), device=device)

    def step(self, kernel: Fp8Decode | HopperDecode) -> tuple[object, float]:
        """A call of the kernel, and its relative error against float32 over the rows it reads."""
        fp8 = kernel.shape.fp8_shared is not None
        rows = self.fp8_rows if fp8 else self.rows
        kernel.plan(self.table, self.lengths)
        out = torch.full_like(self.q_latent, float("nan"))
        kernel.run(self.q_latent, self.q_rope, rows, out)
        part = PageTable(self.table.indices, self.table.starts[self.some].contiguous())
        read = (lambda found: read_fp8(found, kernel.shape)) if fp8 else None
        some = self.some
        right = latent_attention(
            self.q_latent[some], self.q_rope[some], rows, part, self.lengths[some], scale=SCALE, read=read
        )
        error = ((out[some].float() - right).norm() / right.norm()).item()
        return (lambda: kernel.run(self.q_latent, self.q_rope, rows, out)), error


def tilings(shape: DecodeShape) -> list[Tiling]:
    """The tilings of a sweep."""
    most = max(16, min(64, 1 << (shape.heads - 1).bit_length()))
    rows = sorted({most, max(16, most // 2)})
    found = [
        Tiling(r, n, warps, stages)
        for r, n, warps, stages in itertools.product(rows, (64, 128), (4, 8), (2, 3))
        if not (r == 64 and warps == 4 and shape.latent_dim > 256)
    ]
    best = tiling_for(shape)
    return [
        *found,
        *(replace(best, programs=programs) for programs in (1, 4)),
        replace(best, compute="bfloat16"),
        replace(best, stages=4),
        replace(best, tokens=32),
    ]


def compile_one(job: tuple[DecodeShape, Tiling]) -> str:
    """Run one tiling once on few tokens, so that Triton's cache has it."""
    shape, tiling = job
    try:
        device = torch.device("cuda:0")
        kernel = Fp8Decode(shape, SCALE, 2, device, tiling)
        table = PageTable.from_csr(
            torch.tensor([0, 64, 128], dtype=torch.int32, device=device),
            torch.arange(128, dtype=torch.int32, device=device),
        )
        kernel.plan(table, torch.full((2,), 64, dtype=torch.int32, device=device))
        kernel.run(
            torch.zeros(2, shape.heads, shape.latent_dim, dtype=shape.dtype, device=device),
            torch.zeros(2, shape.heads, shape.rope_dim, dtype=shape.dtype, device=device),
            torch.zeros(128, shape.cache_dim, dtype=torch.uint8, device=device),
        )
        torch.cuda.synchronize()
    except Exception as error:  # a tiling that does not fit the card is a result of the sweep
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def time_in_turns(steps: list[object]) -> list[float]:
    """Medians in milliseconds."""
    timers = [capture(step, CALLS) for step in steps]
    samples: list[list[float]] = [[] for _ in timers]
    for _ in range(ROUNDS):
        for timer, into in zip(timers, samples, strict=True):
            into.append(timer())
    return [statistics.median(sample) for sample in samples]


def measure(sweep: bool, out: Path | None) -> None:
    """Print and write the table."""
    result: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "shared": SHARED}
    rows: list[dict[str, object]] = []
    result["rows"] = rows
    broken: dict[tuple[DecodeShape, Tiling], str] = {}
    if sweep:
        shapes = {DecodeShape(row.latent_dim, row.heads, ROPE_DIM, fp8_shared=SHARED) for row in ROWS}
        jobs = [(shape, tiling) for shape in sorted(shapes, key=str) for tiling in tilings(shape)]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(15, mp_context=context) as pool:
            broken = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    print(result["gpu"])
    print(f"{'case':28s} {'bf16 ms':>8s} {'FP8 ms':>8s} {'x':>5s} {'of':>5s} {'GB/s':>6s} {'error':>8s}")
    swept = set()
    for row in ROWS:
        inputs = Inputs(row.latent_dim, row.heads, row.batch, row.tokens)
        device = torch.device("cuda:0")
        plain, _ = inputs.step(HopperDecode(inputs.plain, SCALE, row.batch, device))
        for tiling in tilings(inputs.fp8) if sweep and inputs.fp8 not in swept else [tiling_for(inputs.fp8)]:
            if broken.get((inputs.fp8, tiling)):
                rows.append({**asdict(row), "tiling": asdict(tiling), "broken": broken[(inputs.fp8, tiling)]})
                continue
            step, error = inputs.step(Fp8Decode(inputs.fp8, SCALE, row.batch, device, tiling))
            plain_ms, fp8_ms = time_in_turns([plain, step])
            size = row.batch * row.tokens * inputs.fp8.cache_dim
            bound = 2 * inputs.plain.cache_dim / inputs.fp8.cache_dim
            found = {
                **asdict(row), "tiling": asdict(tiling), "plain_ms": plain_ms, "fp8_ms": fp8_ms, "bytes_bound": bound,
                "speedup": plain_ms / fp8_ms, "gb_s": size / fp8_ms / 1e6, "error": error,
            }  # fmt: skip
            rows.append(found)
            name = f"w {row.latent_dim}, {row.heads} h, {row.batch} x {row.tokens}"
            print(
                f"{name:28s} {plain_ms:8.4f} {fp8_ms:8.4f} {plain_ms / fp8_ms:5.2f} {bound:5.2f} "
                f"{found['gb_s']:6.0f} {error:8.1e} {tiling if sweep else ''}",
                flush=True,
            )
        swept.add(inputs.fp8)
        if out is not None:
            out.write_text(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    measure(arguments.sweep, arguments.out)


if __name__ == "__main__":
    main()
