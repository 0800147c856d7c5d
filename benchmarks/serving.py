"""Serve plain TP and TPLA over HTTP, behind a prefill server and a router, under ``sglang.benchmark.serving``.

    python benchmarks/serving.py --out FILE [--methods tp g1-8bit g2 g2-sketched] [--rates 0.5 2 inf] [--input 8192]
        [--seconds 96] [--first-step 1024 8192 32768] [--together]

DeepSeek-V3's attention with random bfloat16 weights, experts left out (a dense feed-forward part of 512), as many
layers as are asked for. One host runs a prefill server on the last GPU, one decode server of two ranks at a time
(``--together``: all of them, if they fit on the GPUs side by side) and a router. Requests of random tokens arrive at
each rate in turn for ``--seconds``; end-of-sequence is ignored. For every method and rate: output tokens a second
of all requests together, milliseconds between output tokens (median and 99th percentile, the first excluded), to the
first one (median), and from the end of a prompt's prefill until every decode rank has confirmed its cache. Then, for
each length of a prompt, the time from the end of prefill to the first decode step as `engine_gpu.py` has it, without
the router. The methods:

    tp      plain MLA on every rank, SGLang's own kernel     g2            TPLA, slices of 256 in bfloat16
    g1-8bit plain MLA in this package's 8-bit rows           g2-sketched   TPLA on sketched rows

Without GPUs tiny servers run on the CPU, to try this file.
"""

import argparse
import json
import random
import statistics
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from alone import alone
from engine_gpu import measure
from machine import header
from serving_client import Client
from v3_shaped import SMALL, VOCABULARY, Shape, write_artifact, write_checkpoint, write_sketched_artifact

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.e2e.servers import Server, transfer_lines
from tests.e2e.traffic import Pair
from tests.gpu.engine import DEVICE, Engines

GPU = DEVICE == "cuda"
STOCK_KERNEL = ("--attention-backend", "flashinfer") if GPU else ()
OUR_KERNEL = ("--attention-backend", "tpla") if GPU else ()
CHUNK = 8192  # tokens that prefill computes at a time
# The prefill server's flags besides the common ones; this server decodes nothing.
PROMPTS = ("--chunked-prefill-size", str(CHUNK), *STOCK_KERNEL, "--decode-attention-backend", "flashinfer")
FIGURES = ("output_throughput", "median_tpot_ms", "p99_tpot_ms", "median_ttft_ms", "completed", "duration")


def decode_flags(method: str, artifacts: dict[str, Path], most_requests: int) -> tuple[str, ...]:
    """Return a method's flags of the decode server; all methods have CUDA graphs of the same batches."""
    graphs = ("--cuda-graph-bs-decode", *map(str, graph_batches(most_requests))) if GPU else ()
    if method == "tp":
        return ("--tpla-groups", "1", *STOCK_KERNEL, *graphs)
    if method == "g1-8bit":
        return ("--tpla-groups", "1", "--tpla-rows", "sketched", *OUR_KERNEL, *graphs)
    return ("--tpla-groups", "2", "--tpla-artifact", str(artifacts[method]), *OUR_KERNEL, *graphs)


def graph_batches(most_requests: int) -> list[int]:
    """Return the batch sizes of CUDA graphs, close enough that a batch is padded by no more than a third."""
    found = [1, 2, 3, 4, 6]
    while found[-1] < most_requests:
        found.append(found[-1] + max(2, found[-1] // 12 * 4))
    return found


def requests_at(rate: str, args: argparse.Namespace) -> int:
    """Return how many requests arrive."""
    return args.prompts if rate == "inf" else max(2, min(args.prompts, round(float(rate) * args.seconds)))


def arrivals(
    client: Client, url: str, prefill: Server, model: Path, rate: str, args: argparse.Namespace, out: Path
) -> dict[str, Any]:
    """Return the figures of ``sglang.benchmark.serving`` for one rate, and those of prefill's log of its transfers."""
    flags = [
        "--backend", "sglang", "--base-url", url,
        "--model", str(model), "--tokenizer", str(model), "--dataset-name", "random-ids", "--tokenize-prompt",
        "--random-input-len", str(args.input), "--random-output-len", str(args.output), "--random-range-ratio", "1",
        "--num-prompts", str(requests_at(rate, args)), "--request-rate", rate, "--seed", "1", "--disable-tqdm",
        "--warmup-requests", "0",
    ]  # fmt: skip
    before = len(transfer_lines(prefill))
    found = client.run(flags, out)
    waits = [round(1e3 * line["after_prefill_seconds"]) for line in transfer_lines(prefill)[before:]]
    row = {
        "rate": rate, "requests": requests_at(rate, args), **{name: round(found[name], 3) for name in FIGURES},
        "median_sent_ms": statistics.median(waits), "sent_ms": waits,
    }  # fmt: skip
    if row["completed"] != row["requests"]:
        print(f"only {row['completed']} of {row['requests']} requests were answered: see the servers' logs")
    return row


def warm_up(pair: Pair, args: argparse.Namespace) -> None:
    """Send two requests with prompts that no other request has, so that kernels are compiled."""
    dice = random.Random(args.input)
    for _ in range(2):
        pair.generate([dice.randrange(100, VOCABULARY) for _ in range(args.input)], 8)


def forget_prompts(pair: Pair) -> None:
    """Empty prefill's cache, because the same prompts come at every rate and for every method."""
    deadline = time.monotonic() + 30
    while pair.prefill.post("/flush_cache", {}).status_code != 200:  # refused while a request is not quite over
        if time.monotonic() > deadline:
            raise TimeoutError("the prefill server did not flush its cache within 30 s: a request still holds it")
        time.sleep(0.2)


def first_step(pair: Pair, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure from the end of prefill to the first decode step; return medians, and every run's figure."""
    row = measure(pair, tokens, repeats, CHUNK)
    runs = row.pop("runs")
    return row | {"each_first_step_ms": [round(1e3 * run["first_step_seconds"], 2) for run in runs]}


class Run:
    """All servers, the client, and the file with the figures.

    Args:
        scratch: a folder for the checkpoint, its artifacts and the client's results.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.model = args, scratch, scratch / "model"
        self.result: dict[str, Any] = {
            **header(torch.cuda.get_device_name() if GPU else "a CPU: to try this file"),
            **{name: getattr(args, name) for name in ("layers", "heads", "input", "output", "prompts", "seconds")},
            "rows": [],
            "first_step": [],
            "failed": {},
        }
        sizes = {"hidden": 7168, "query_latent": 1536, "intermediate": 512} if GPU else SMALL
        context = 2 * max(args.input + args.output, *args.first_step, 0)
        shape = Shape(args.layers, context, **(sizes | {"heads": args.heads}))
        write_checkpoint(self.model, shape, only_identity=True)
        self.artifacts = {name: scratch / f"{name}.safetensors" for name in ("g2", "g2-sketched")}
        write_artifact(self.artifacts["g2"], self.model, 2)
        write_sketched_artifact(self.artifacts["g2-sketched"], self.model, 2)
        self.common = ("--load-format", "dummy", "--max-total-tokens", str(args.tokens))
        self.engines = Engines(str(self.model), args.out.parent)
        self.client = Client(args.out.parent / "client.log")

    def keep(self) -> None:
        """Write the figures so far."""
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def start(self, method: str) -> None:
        """Start a method's decode server."""
        flags = decode_flags(method, self.artifacts, self.args.prompts)
        self.engines.decode(method, 2, *self.common, *flags)

    def measure_all(self) -> None:
        """Measure every method; a method that fails is noted, and the next one is measured."""
        self.engines.start_prefill(*self.common, *(PROMPTS if GPU else ()))
        for method in self.args.methods if self.args.together else ():
            self.start(method)
        for method in self.args.methods:
            if not self.args.together:
                self.start(method)
            try:
                self.measure_method(method)
            except Exception as error:
                self.result["failed"][method] = f"{type(error).__name__}: {error}"[:1500]
                traceback.print_exc()
            self.keep()
            self.engines.decodes[method].front.stop()  # the next server takes its place on the GPUs

    def measure_method(self, method: str) -> None:
        """Measure all rates, then all lengths."""
        pair = self.engines.pair(method)
        router = self.engines.start_router(method)
        with alone():
            warm_up(pair, self.args)
            for rate in self.args.rates:
                forget_prompts(pair)
                out = self.scratch / f"{method}-{rate}.json"
                row = arrivals(self.client, router.url, pair.prefill, self.model, rate, self.args, out)
                self.result["rows"].append({"method": method, **row})
                self.keep()
                figures = "  ".join(f"{name} {row[name]}" for name in (*FIGURES, "sent_ms"))
                print(f"{method:>12} at {rate:>4}/s {figures}", flush=True)
            for tokens in self.args.first_step:
                row = first_step(pair, tokens, self.args.repeats)
                self.result["first_step"].append({"method": method, **row})
                self.keep()
                print(
                    f"{method:>12}, {tokens} tokens: first step {row['first_step_ms']:.1f} ms after prefill, "
                    f"{row['bytes'] / 1e6:.0f} MB",
                    flush=True,
                )
        router.stop()

    def stop(self) -> None:
        """End all processes."""
        self.client.stop()
        self.engines.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = ("tp", "g1-8bit", "g2", "g2-sketched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--rates", nargs="+", default=["0.5", "2", "inf"] if GPU else ["inf"], help="requests a second")
    parser.add_argument("--layers", type=int, default=61 if GPU else 2)
    parser.add_argument("--heads", type=int, default=128 if GPU else 16)
    parser.add_argument("--input", type=int, default=8192 if GPU else 64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=256 if GPU else 8, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=48 if GPU else 4, help="requests at rate inf, most at any")
    parser.add_argument(
        "--seconds", type=float, default=96.0 if GPU else 2.0, help="that requests arrive for at a rate"
    )
    parser.add_argument("--first-step", nargs="*", type=int, default=[1024, 8192, 32768] if GPU else [16, 64])
    parser.add_argument("--repeats", type=int, default=5 if GPU else 2, help="of each of those, after a warm-up")
    parser.add_argument("--tokens", type=int, default=450_000 if GPU else 2000, help="tokens that decode's pool holds")
    parser.add_argument("--together", action="store_true", help="start all decode servers at once")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        run = Run(args, Path(scratch))
        try:
            run.measure_all()
        finally:
            run.stop()


if __name__ == "__main__":
    main()
