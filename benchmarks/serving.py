"""Served, not only stepped: plain TP and TPLA behind prefill and router, under ``sglang.bench_serving``.

    python benchmarks/serving.py --out FILE [--methods tp g1-8bit g2 g2-sketched] [--rates 0.5 2 inf] [--input 8192]

DeepSeek-V3's attention with random bfloat16 weights, experts left out (a dense feed-forward part of 512), as many
layers as are asked for. One prefill server on the last GPU, one decode server of two ranks at a time and a router, on
one host; requests of random tokens arrive at each rate in turn, end-of-sequence is ignored. For every method and rate:
output tokens a second of all requests together, milliseconds between output tokens (median and 99th percentile, the
first excluded) and to the first one (median). The methods:

    tp      plain MLA on every rank, SGLang's own kernel     g2            TPLA, slices of 256 in bfloat16
    g1-8bit plain MLA in this package's 8-bit rows           g2-sketched   TPLA on sketched rows

Without GPUs tiny servers run on the CPU, to try this file.
"""

import argparse
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from alone import alone
from engine_rank import SMALL
from v3_shaped import Shape, write_artifact, write_checkpoint, write_sketched_artifact

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu.engine import DEVICE, OUR_KERNEL, Engines

ROOT = Path(__file__).resolve().parents[1]
GPU = DEVICE == "cuda"
STOCK_KERNEL = ("--attention-backend", "flashinfer") if GPU else ()
FIGURES = ("output_throughput", "median_tpot_ms", "p99_tpot_ms", "median_ttft_ms", "completed", "duration")


def decode_flags(method: str, artifacts: dict[str, Path]) -> tuple[str, ...]:
    """The decode server's flags of a method."""
    if method == "tp":
        return ("--tpla-groups", "1", *STOCK_KERNEL)
    if method == "g1-8bit":
        return ("--tpla-groups", "1", "--tpla-rows", "sketched", *OUR_KERNEL)
    return ("--tpla-groups", "2", "--tpla-artifact", str(artifacts[method]), *OUR_KERNEL)


def arrivals(url: str, model: Path, rate: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What ``sglang.bench_serving`` says of one rate.

    Raises:
        CalledProcessError: it failed; its output is printed.
    """
    command = [
        sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url,
        "--model", str(model), "--tokenizer", str(model), "--dataset-name", "random-ids", "--tokenize-prompt",
        "--random-input-len", str(args.input), "--random-output-len", str(args.output), "--random-range-ratio", "1",
        "--num-prompts", str(args.prompts), "--request-rate", rate, "--seed", "1", "--disable-tqdm",
        "--warmup-requests", "1", "--output-file", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
        done.check_returncode()
    found = json.loads(out.read_text().splitlines()[-1])
    return {"rate": rate, **{name: round(found[name], 3) for name in FIGURES}}


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
    parser.add_argument("--prompts", type=int, default=48 if GPU else 4, help="requests at each rate")
    parser.add_argument("--tokens", type=int, default=450_000 if GPU else 2000, help="tokens that decode's pool holds")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if GPU else "a CPU: to try this file",
        "sglang": version("sglang"),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("layers", "heads", "input", "output", "prompts")},
        "rows": [],
    }
    with TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        sizes = {"hidden": 7168, "query_latent": 1536, "intermediate": 512} if GPU else SMALL
        write_checkpoint(
            model, Shape(args.layers, 2 * args.input, **(sizes | {"heads": args.heads})), only_identity=True
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "examples" / "nano-mla" / name, model)
        artifacts = {name: Path(scratch) / f"{name}.safetensors" for name in ("g2", "g2-sketched")}
        write_artifact(artifacts["g2"], model, 2)
        write_sketched_artifact(artifacts["g2-sketched"], model, 2)
        common = ("--load-format", "dummy", "--max-total-tokens", str(args.tokens))
        engines = Engines(str(model), args.out.parent)
        try:
            engines.start_prefill(*common, *STOCK_KERNEL)
            for method in args.methods:
                engines.decode(method, 2, *common, *decode_flags(method, artifacts))
                pair = engines.pair(method)
                router = engines.start_router(method)
                with alone():
                    for rate in args.rates:
                        row = arrivals(router.url, model, rate, args, Path(scratch) / f"{method}-{rate}.json")
                        result["rows"].append({"method": method, **row})
                        args.out.write_text(json.dumps(result, indent=1) + "\n")
                        print(f"{method:>12} at {rate:>4}/s " + "  ".join(f"{k} {row[k]}" for k in FIGURES), flush=True)
                router.stop()
                pair.decode.stop()  # the next one takes its place on the GPUs
        finally:
            engines.stop()


if __name__ == "__main__":
    main()
