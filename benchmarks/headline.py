"""The paper's headline on two, four or eight GPUs: decode throughput and latency, method beside method, in one run.

    python benchmarks/headline.py --out FILE [--ranks 2] [--alone] [--models v3 k2] [--methods ...]
        [--loads throughput latency] [--intermediate 512] [--limit 150] [--until 500]

DeepSeek-V3's and Kimi-K2's attention, 61 layers, experts left out (a dense feed-forward part of ``--intermediate``
values; 18,432 is a dense layer of V3's), random bfloat16 weights and random caches; SGLang's own model runner on T GPUs
of one host, real collectives, CUDA graphs. A load is B requests of S cached tokens in random slots; "throughput" is
32,768 tokens and among others the largest batch that fits, "latency" 1, 4 and 16 requests of 32,768 and 131,072 tokens,
with T > 2 also 64 requests, and 8,192 tokens. The methods:

    mla          plain TP in bfloat16 (FlashInfer)         mla-fp8  the same with SGLang's own FP8 cache
    mla-fp8-triton                                         that cache under SGLang's Triton kernel
    dp           data-parallel attention at its best: each GPU alone holds all heads and its share of the requests, and
                 no collective is in its time              dcpN     decode context parallelism of N (FlashInfer)
    g1-8bit      plain MLA with this package's 8-bit rows  gN, gN-scatter    TPLA, slices of 512 / N in bfloat16
    gN-sketched, gN-sketched-scatter                       TPLA on sketched rows (64 shared columns, 4 bits)

"scatter" sums head outputs before ``o_proj``; otherwise g ranks hold each part of ``o_proj``. The methods run in the
order given, each for every model. A method that fails or does not fit is noted, and the next one runs; the file is
written after each. On a fresh machine the first method takes two minutes, because SGLang's and FlashInfer's kernels are
compiled. Step times are medians over replays of the step's graph on rank 0. Without GPUs the script runs tiny ranks on
the CPU, to try this file.

With ``--alone`` one GPU is rank 0 of T, all process groups are PyTorch's "fake" ones, and a collective returns at once
with the rank's own part. The outputs then have no meaning, and step times leave out the collectives. All ranks of T = 4
and 8 together have only run on a CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import v3_shaped
from alone import alone
from headline_rank import child, sketched_rows
from machine import header

from sglang_tpla.config import Settings

GPU = torch.cuda.is_available()
LAYERS, SHORT, CONTEXT, LONG = 61, 8192, 32768, 131072
HEADS = {"v3": 128, "k2": 64}
RESERVE_BYTES = 6.0e9  # memory of a GPU for CUDA, NCCL, graphs and activations
PORT = 29600
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")  # the last line of a traceback
AHEAD = 6  # number of jobs whose ranks import SGLang while another job measures


@dataclass(frozen=True)
class Method:
    """One way to run the model.

    Args:
        row_bytes: bytes that a cached token takes on a rank and layer.
        groups: g; 0 is stock SGLang. rows: the cache's rows. o_proj: as in `Settings`.
        ranks: ranks of the process group. flags: SGLang's flags besides the common ones.
        kernel: the attention kernel in stock SGLang.
    """

    row_bytes: int
    groups: int = 0
    rows: str | None = None
    o_proj: str = "replicate"
    ranks: int = 2
    flags: dict[str, Any] = field(default_factory=dict)
    kernel: str = "flashinfer"

    def weight_bytes(self, heads: int, intermediate: int) -> float:
        """Return the bytes of one layer's weights on a rank, in bfloat16."""
        share = max(1, self.groups) / self.ranks
        queries, keys, output = 1536 * heads * 192, 512 * heads * 256, heads * 128 * 7168
        rest = 7168 * (1536 + 576) + 3 * 7168 * intermediate / self.ranks
        held = share if self.o_proj == "replicate" else 1 / self.ranks
        return 2 * (queries * share + keys * max(1, self.groups) + output * held + rest)

    def most_requests(self, heads: int, intermediate: int, memory_bytes: float) -> int:
        """Return the most requests of 32,768 tokens that fit on a GPU."""
        left = 0.985 * memory_bytes - RESERVE_BYTES - LAYERS * self.weight_bytes(heads, intermediate)
        return max(0, int(left // (self.row_bytes * LAYERS * CONTEXT)))


def methods_of(ranks: int) -> dict[str, Method]:
    """Return every method that T ranks can run."""
    found = {
        "mla": Method(1152, ranks=ranks),
        "mla-fp8": Method(576, ranks=ranks, flags={"kv_cache_dtype": "fp8_e4m3"}),
        "mla-fp8-triton": Method(576, ranks=ranks, flags={"kv_cache_dtype": "fp8_e4m3"}, kernel="triton"),
        "dp": Method(1152, ranks=1),
        "g1-8bit": Method(sketched_rows(1).row_bytes, 1, "sketched", ranks=ranks),
    }
    for n in (2, 4, 8):
        if n > ranks:
            break
        sketched = sketched_rows(n).row_bytes
        found[f"dcp{n}"] = Method(1152 // n, ranks=ranks, flags={"dcp_size": n})
        for suffix, o_proj in (("", "replicate"), ("-scatter", "scatter")):
            found[f"g{n}{suffix}"] = Method(1024 // n + 128, n, o_proj=o_proj, ranks=ranks)
            found[f"g{n}-sketched{suffix}"] = Method(sketched, n, "sketched", o_proj, ranks)
    return found


def loads_of(method: Method, args: argparse.Namespace, heads: int, memory_bytes: float) -> list[tuple[int, int]]:
    """Return the (requests on a rank, cached tokens of each) that fit, for the given kinds of load."""
    if not GPU:
        return [(1, 64), (2, 64)]
    most = method.most_requests(heads, args.intermediate, memory_bytes)
    parts = args.ranks // method.ranks  # each rank, or group of ranks, has one of so many parts of a load
    found = set()
    if "throughput" in args.loads:
        found |= {(batch // parts, CONTEXT) for batch in (16, 48) if batch // parts < most} | {(most, CONTEXT)}
    if "latency" in args.loads:
        batches, contexts = (
            ((1, 4, 16), (CONTEXT, LONG)) if args.ranks == 2 else ((1, 4, 16, 64), (SHORT, CONTEXT, LONG))
        )
        found |= {(max(1, batch // parts), tokens) for batch in batches for tokens in contexts}
    fits = most * CONTEXT
    return sorted((batch, tokens) for batch, tokens in found if batch and batch * tokens <= fits)


def environment(job: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a job's ranks."""
    found = {
        **os.environ,
        "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
        "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
    }
    if not GPU:
        found |= {
            "CUDA_VISIBLE_DEVICES": "",
            "SGLANG_PLATFORM": "sglang_tpla_cpu",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join("0" * job["ranks"]),
            "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
        }
    if job["alone"]:
        found |= {"SGLANG_NCCL_SO_PATH": "collectives-are-left-out"}
    if not job["groups"]:
        return found | ({"SGLANG_PLUGINS": "none"} if GPU else {})
    settings = Settings("decode", job["groups"], job["artifact"], rows=job["rows"], o_proj=job["o_proj"])
    return found | settings.to_environment()


class Job:
    """The ranks of one method on one model."""

    def __init__(self, job: dict[str, Any], logs: Path) -> None:
        self.job = job
        self.log = logs / f"{job['name']}-0.log"
        self.processes = []
        for rank in range(1 if job["alone"] else job["ranks"]):
            with (logs / f"{job['name']}-{rank}.log").open("w") as errors:
                command = [sys.executable, __file__, "--child", json.dumps(job), "--rank", str(rank)]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env=environment(job),
                )  # fmt: skip
            self.processes.append(process)

    def wait_until_imported(self) -> None:
        """Wait until every rank has imported SGLang, or ended."""
        for process in self.processes:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "ready":
                    break

    def run(self, limit_s: float) -> tuple[list[dict[str, Any]], str | None]:
        """Run the job; return its rows, and the reason if it ended early."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.end()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write("go\n")
                process.stdin.flush()
            except BrokenPipeError:  # the rank has ended: its log says why
                pass
        stdout = self.processes[0].stdout
        assert stdout is not None
        rows = []
        for line in stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print_row(self.job, rows[-1])
        timer.cancel()
        self.end()
        if len(rows) == len(self.job["loads"]):
            return rows, None
        return rows, f"stopped after {limit_s:.0f} s" if late.is_set() else self.last_error()

    def last_error(self) -> str:
        """Return why rank 0 ended, from its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        named = [line.strip() for line in lines if ERROR.match(line.strip())]
        return f"ended early: {(named or lines or ['it said nothing'])[-1][:300]}"

    def end(self) -> None:
        """Kill the processes that still run, and wait until the GPUs have their memory back."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def requests_of(job: dict[str, Any], row: dict[str, Any]) -> int:
    """Return the number of requests that all GPUs together serve in a step."""
    return int(row["batch"]) * int(job["parts"])


def print_row(job: dict[str, Any], row: dict[str, Any]) -> None:
    requests = requests_of(job, row)
    print(
        f"{job['name']:>24}  {requests:>4} x {row['context']:<7} step {row['step_ms']:8.2f} ms  "
        f"{1e3 * requests / row['step_ms']:8.0f} tokens/s",
        flush=True,
    )


def jobs_of(model: str, args: argparse.Namespace, folder: Path, memory_bytes: float) -> list[dict[str, Any]]:
    """Write checkpoint and artifacts, and return a job for each method that fits."""
    heads = HEADS[model] if GPU else 16
    path = folder / model
    sizes = {"hidden": 7168, "query_latent": 1536, "intermediate": args.intermediate} if GPU else v3_shaped.SMALL
    shape = v3_shaped.Shape(LAYERS if GPU else 2, 2 * LONG, **(sizes | {"heads": heads}))
    v3_shaped.write_checkpoint(path, shape, only_identity=True)
    methods, found = methods_of(args.ranks), []
    for name in args.methods:
        method = methods[name]
        loads = loads_of(method, args, heads, memory_bytes)
        if not loads:
            continue
        artifact = folder / f"{model}-g{method.groups}-{method.rows or 'plain'}.safetensors"
        if method.groups > 1 and not artifact.exists():
            write = v3_shaped.write_sketched_artifact if method.rows else v3_shaped.write_artifact
            write(artifact, path, method.groups)
        found.append(
            asdict(method)
            | {
                "name": f"{model}-{name}",
                "model": str(path),
                "artifact": str(artifact) if method.groups > 1 else None,
                "parts": args.ranks // method.ranks,
                "alone": args.alone and method.ranks > 1,
                "attention": "tpla" if method.groups else method.kernel if GPU else "torch_native",
                "loads": loads,
                "tokens": max(batch * context for batch, context in loads) // method.flags.get("dcp_size", 1) + 256,
                "port": PORT + 100 * list(HEADS).index(model) + len(found),
            }
        )
    return found


def run_all(queue: list[dict[str, Any]], report: dict[str, Any], args: argparse.Namespace, began: float) -> None:
    """Run jobs one after another, and write the report after each; the ranks of the next ones import meanwhile."""
    ahead = AHEAD if GPU else 1
    started = [Job(job, args.out.parent) for job in queue[:ahead]]
    try:
        with alone():
            for index, job in enumerate(queue):
                if time.monotonic() - began > args.until:
                    report["failed"][job["name"]] = f"not reached within {args.until:.0f} s"
                    continue
                started += [Job(later, args.out.parent) for later in queue[len(started) : index + ahead]]
                started[index].wait_until_imported()
                start = time.monotonic()
                rows, why = started[index].run(args.limit)
                seconds = round(time.monotonic() - start, 1)
                report["rows"] += [
                    row | {"job": job["name"], "requests": requests_of(job, row), "seconds": seconds} for row in rows
                ]
                if why:
                    report["failed"][job["name"]] = why
                    print(f"{job['name']:>24}  {why}", flush=True)
                print(f"{job['name']:>24}  took {seconds} s", flush=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        for one in started:
            one.end()


def print_best(report: dict[str, Any], model: str) -> None:
    """Compare the largest batches with plain TP's."""
    best: dict[str, float] = {}
    for row in report["rows"]:
        if row["job"].startswith(f"{model}-") and row["context"] == (CONTEXT if GPU else 64):
            rate = 1e3 * row["requests"] / row["step_ms"]
            best[row["job"]] = max(best.get(row["job"], 0.0), rate)
    beside = best.get(f"{model}-mla")
    for name, rate in best.items():
        print(f"{name:>24}  {rate:8.0f} tokens/s" + (f"  {rate / beside:.2f} of plain TP" if beside else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "headline.json")
    parser.add_argument("--models", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2, help="T, GPUs of this host")
    parser.add_argument("--methods", nargs="+", help="by default all that so many ranks can run")
    parser.add_argument("--alone", action="store_true", help="rank 0 of T on one GPU; collectives return at once")
    parser.add_argument("--intermediate", type=int, default=512, help="of the feed-forward part, all ranks together")
    parser.add_argument("--loads", nargs="+", choices=("throughput", "latency"), default=["throughput", "latency"])
    parser.add_argument("--limit", type=float, default=150.0, help="seconds a method may take on a model")
    parser.add_argument("--until", type=float, default=float("inf"), help="no method is begun after so many seconds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child), args.rank)
    methods = methods_of(args.ranks)
    args.methods = args.methods or list(methods)
    if unknown := set(args.methods) - set(methods):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(methods)} on {args.ranks} ranks")
    if GPU and torch.cuda.device_count() < args.ranks and not args.alone:
        found = torch.cuda.device_count()
        parser.error(f"--ranks {args.ranks} needs as many GPUs; this host has {found}: --alone times one rank of them")
    memory_bytes = torch.cuda.get_device_properties(0).total_memory if GPU else 0.0
    began = time.monotonic()
    report: dict[str, Any] = {
        **header(torch.cuda.get_device_name(0) if GPU else "a CPU: to try this file"),
        "ranks": args.ranks,
        "alone": args.alone,
        "intermediate": args.intermediate,
        "methods": {name: asdict(methods[name]) for name in args.methods},
        "rows": [],
        "failed": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        described = {model: jobs_of(model, args, Path(folder), memory_bytes) for model in args.models}
        named = {job["name"]: job for jobs in described.values() for job in jobs}
        names = [f"{model}-{name}" for name in args.methods for model in args.models]
        run_all([named[name] for name in names if name in named], report, args, began)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for model in args.models:
        print_best(report, model)
    return None


if __name__ == "__main__":
    main()
