"""Paged latent decode: TPLA's kernel against MLA on FlashInfer fa3, on one GPU.

    python benchmarks/decode_kernel.py [--out FILE] [--page-size 1|64] [--layout random|linear] [--apart]

Each row is one attention layer of one decode step: B requests of S cached tokens, bfloat16, random data.
"MLA" reads 512 + 64 values a token with the heads that a rank has under plain tensor parallelism (H / T);
TPLA reads w + 64 with H * g / T heads. Times are medians over replays of a CUDA graph of calls, MLA and TPLA
taken in turns. The plan, made once a step for all layers, is outside of both. Back to back, TPLA's kernel
starts while its predecessor ends; with ``--apart`` an ordinary small kernel stands before each call, as in an
engine, and its time counts in both.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.attention.flashinfer import FlashInferDecode
from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeAttention, DecodeShape, PageTable
from sglang_tpla.attention.reference import latent_attention

SCALE = 192**-0.5
MLA_DIM, ROPE_DIM = 512, 64
CALLS, ROUNDS = 10, 25  # calls in one CUDA graph, and its replays


@dataclass(frozen=True)
class Row:
    """A case and its bar: TPLA must be at least ``bar`` times as fast as MLA."""

    latent_dim: int
    heads: int
    mla_heads: int
    batch: int
    tokens: int
    bar: float


ROWS = (
    Row(256, 32, 16, 16, 32768, 1.70),
    Row(192, 64, 16, 16, 32768, 2.10),
    Row(128, 64, 16, 16, 32768, 2.70),
    Row(256, 32, 16, 128, 4096, 1.65),
    Row(256, 32, 16, 1, 131072, 1.65),
    Row(256, 16, 8, 16, 32768, 1.70),
    Row(256, 64, 32, 16, 32768, 1.65),
    Row(256, 128, 64, 16, 32768, 1.40),
)


@dataclass(frozen=True)
class Step:
    """A backend, ready to run, the bytes that it reads, and its error."""

    run: Callable[[], torch.Tensor]
    cache_bytes: int
    error: float


def prepare(
    shape: DecodeShape, batch: int, tokens: int, layout: str, make: Callable[[DecodeShape], DecodeAttention]
) -> Step:
    """Return a planned backend on random inputs, with its relative error against float32 on first and last request."""
    device = torch.device("cuda:0")
    pages = batch * tokens // shape.page_size
    cache = torch.randn(pages * shape.page_size, shape.cache_dim, device=device, dtype=torch.float32).to(shape.dtype)
    order = torch.randperm(pages, device=device) if layout == "random" else torch.arange(pages, device=device)
    indptr = torch.arange(batch + 1, device=device, dtype=torch.int32) * (tokens // shape.page_size)
    table = PageTable.from_csr(indptr, order.to(torch.int32), shape.page_size)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    q_latent = torch.randn(batch, shape.heads, shape.latent_dim, device=device).to(shape.dtype)
    q_rope = torch.randn(batch, shape.heads, shape.rope_dim, device=device).to(shape.dtype)
    backend = make(shape)
    backend.plan(table, lengths)
    out = torch.full_like(q_latent, float("nan"))
    backend.run(q_latent, q_rope, cache, out)
    some = torch.tensor(sorted({0, batch - 1}), device=device)
    part = PageTable(table.indices, table.starts[some].contiguous(), shape.page_size)
    right = latent_attention(shape, q_latent[some], q_rope[some], cache, part, lengths[some], SCALE)
    error = ((out[some].float() - right).norm() / right.norm()).item()
    cache_bytes = batch * tokens * shape.cache_dim * cache.element_size()
    return Step(lambda: backend.run(q_latent, q_rope, cache, out), cache_bytes, error)


def capture(run: Callable[[], object], calls: int) -> Callable[[], float]:
    """Return a function that replays ``calls`` captured calls and returns milliseconds a call."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    return measure


def measure_row(row: Row, page_size: int, layout: str, apart: bool) -> dict[str, object]:
    """Time MLA and TPLA in turns, and return the row's figures."""
    device = torch.device("cuda:0")
    mla_shape = DecodeShape(MLA_DIM, row.mla_heads, ROPE_DIM, page_size=page_size)
    shape = DecodeShape(row.latent_dim, row.heads, ROPE_DIM, page_size=page_size)
    mla = prepare(mla_shape, row.batch, row.tokens, layout, lambda s: FlashInferDecode(s, SCALE, device, "fa3"))
    tpla = prepare(shape, row.batch, row.tokens, layout, lambda s: HopperDecode(s, SCALE, row.batch, device))
    between = torch.zeros(row.batch, MLA_DIM + ROPE_DIM, device=device)

    def call(step: Step) -> None:
        if apart:
            between.add_(1)
        step.run()

    timers = [capture(functools.partial(call, step), CALLS) for step in (mla, tpla)]
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for timer, into in zip(timers, samples, strict=True):
            into.append(timer())
    mla_ms, tpla_ms = (statistics.median(sample) for sample in samples)
    return {
        **asdict(row),
        "bytes_bound": mla.cache_bytes / tpla.cache_bytes,
        "mla_ms": mla_ms,
        "tpla_ms": tpla_ms,
        "mla_ms_range": [min(samples[0]), max(samples[0])],
        "tpla_ms_range": [min(samples[1]), max(samples[1])],
        "mla_gb_s": mla.cache_bytes / mla_ms / 1e6,
        "tpla_gb_s": tpla.cache_bytes / tpla_ms / 1e6,
        "mla_error": mla.error,
        "tpla_error": tpla.error,
        "speedup": mla_ms / tpla_ms,
        "met": mla_ms / tpla_ms >= row.bar,
    }


def installed(package: str) -> str:
    """Return the version of a package, or a word that says that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """Return the machine and the versions of the measurement."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown",
        "gpu_driver": driver.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "flashinfer": installed("flashinfer-python"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "decode_kernel.json")
    parser.add_argument("--page-size", type=int, default=1, choices=(1, 64))
    parser.add_argument("--layout", default="random", choices=("random", "linear"), help="order of the pages in memory")
    parser.add_argument("--apart", action="store_true", help="an ordinary kernel before each call")
    args = parser.parse_args()

    rows = []
    print("w    heads (MLA)  B x S          MLA ms   TPLA ms  GB/s   error    bound  speed  bar")
    for row in ROWS:
        torch.manual_seed(row.latent_dim + row.heads)
        result = measure_row(row, args.page_size, args.layout, args.apart)
        rows.append(result)
        print(
            f"{row.latent_dim:<4} {row.heads:>5} ({row.mla_heads:>3})  {row.batch:>3} x {row.tokens:<8} "
            f"{result['mla_ms']:8.4f} {result['tpla_ms']:8.4f}  {result['tpla_gb_s']:5.0f}  "
            f"{result['tpla_error']:.1e}  {result['bytes_bound']:.2f}   {result['speedup']:.2f}   {row.bar:.2f} "
            f"{'met' if result['met'] else 'MISSED'}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"page_size": args.page_size, "layout": args.layout, "apart": args.apart}
    report = {"environment": environment(), **settings, "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
