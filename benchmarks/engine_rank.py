"""One decode step of one rank of T inside SGLang, stock MLA beside TPLA with g = 2: CUDA graphs on, no collectives.

    python benchmarks/engine_rank.py --out FILE [--ranks 2 4 8] [--layers 4] [--loads 1x32768 16x8192 16x32768 64x8192]

Each row is a process of its own that is rank 0 of T: SGLang's model runner, its weight sharding, cache pool, attention
backend and CUDA graphs as a server has them, our hooks included. Only the process groups are PyTorch's "fake" ones (a
hook of this file): a collective returns at once and its result is the rank's own part, so what it computes has no
meaning, and what all-reduces cost is not in the times; both columns have the same ones.

The model is DeepSeek-V3 with a few dense layers (7,168 wide, 128 heads, feed-forward 18,432, as V3's first three) and
random weights in bfloat16. A load is B requests of S cached tokens in random pages.

- step_us: one step on the GPU, median over replays of its graph
- host_ms: from the call of SGLang's forward to the end of the step, planning included, median
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import v3_shaped
from alone import alone

from sglang_tpla.config import Settings

REPLAYS, STEPS = 30, 20
DENSE_V3 = {"heads": 128, "hidden": 7168, "query_latent": 1536, "intermediate": 18432}
SMALL = {"heads": 16, "hidden": 256, "query_latent": 128, "intermediate": 512}  # to try this file on a CPU
GPU = torch.cuda.is_available()


def leave_collectives_out() -> None:
    """From now on every process group is a fake one, of any size, in this process alone."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    initialize, new_group = dist.init_process_group, dist.new_group

    def fake_world(*_: Any, world_size: int, rank: int, **__: Any) -> None:
        initialize(backend="fake", store=FakeStore(), world_size=world_size, rank=rank)

    def fake_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return new_group(ranks, backend="fake")

    dist.init_process_group, dist.new_group = fake_world, fake_group
    dist.monitored_barrier = lambda *_, **__: None
    # What SGLang captures into graphs goes around PyTorch's groups.
    from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator

    for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        setattr(PyNcclCommunicator, name, lambda *_, **__: None)


def model_runner(job: dict[str, Any]) -> Any:
    """SGLang's model runner of rank 0 of T, its graphs captured."""
    leave_collectives_out()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark.one_batch import load_model
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.server_args import PortArgs, ServerArgs, set_global_server_args_for_scheduler

    flags: dict[str, Any] = {"attention_backend": job["attention"], "random_seed": 0}
    if job["groups"]:
        flags |= {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "tpla"}
    if not GPU:
        flags |= {"device": "cpu"}
    arguments = ServerArgs(
        model_path=job["model"],
        load_format="dummy",
        tp_size=job["ranks"],
        dtype="bfloat16",
        max_total_tokens=job["tokens"],
        max_running_requests=max(batch for batch, _ in job["loads"]),
        context_length=max(context for _, context in job["loads"]) + 64,
        disable_custom_all_reduce=True,
        enforce_disable_flashinfer_allreduce_fusion=True,
        disable_prefill_cuda_graph=True,
        cuda_graph_bs_decode=sorted({batch for batch, _ in job["loads"]}),
        grammar_backend="none",
        sampling_backend="pytorch",
        skip_server_warmup=True,
        **flags,
    )
    set_global_server_args_for_scheduler(arguments)
    _set_envs_and_config(arguments)
    runner, _ = load_model(arguments, PortArgs.init_new(arguments), gpu_id=0, tp_rank=0)
    return runner.torch_runner


def decode_batch(runner: Any, batch: int, context: int) -> Any:
    """A batch of requests whose last token is at ``context``, in random slots."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    device = runner.device
    # Under decode context parallelism row r of a rank is one of slots r * dcp to r * dcp + dcp - 1, successive tokens.
    dcp, each = runner.server_args.dcp_size, -(-context // runner.server_args.dcp_size)
    own = torch.randperm(runner.max_total_num_tokens - 1, device=device)[: batch * each] + 1
    slots = own.view(batch, each, 1) * dcp + torch.arange(dcp, device=device)
    rows = slots.view(batch, each * dcp)[:, :context].to(torch.int32)
    runner.req_to_token_pool.req_to_token[:batch, :context] = rows
    lengths = torch.full((batch,), context, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=batch,
        input_ids=torch.randint(100, v3_shaped.VOCABULARY, (batch,), device=device),
        req_pool_indices=torch.arange(batch, device=device),
        seq_lens=lengths.to(device),
        out_cache_loc=rows[:, -1].to(torch.int64),
        seq_lens_sum=batch * context,
        seq_lens_cpu=lengths,
        orig_seq_lens=lengths.to(device, torch.int32),
        positions=lengths.to(device) - 1,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        num_token_non_padded_cpu=batch,
    )


@torch.no_grad()
def time_step(runner: Any, batch: int, context: int) -> dict[str, Any]:
    """One load: the graph alone, and the whole forward."""
    replayed: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    row: dict[str, Any] = {"batch": batch, "context": context}
    forward_batch = decode_batch(runner, batch, context)
    torch.cuda.CUDAGraph.replay = noted
    host = []
    for _ in range(STEPS if GPU else 2):
        start = time.perf_counter()
        runner.forward(forward_batch)
        if GPU:
            torch.cuda.synchronize()
        host.append(time.perf_counter() - start)
    torch.cuda.CUDAGraph.replay = replay
    row["host_ms"] = 1e3 * statistics.median(host[len(host) // 4 :])
    if GPU:
        (graph,) = set(replayed)  # one step is one graph
        samples = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(1e3 * begin.elapsed_time(end))
        row |= {"step_us": statistics.median(samples), "step_us_spread": [min(samples), max(samples)]}
    return row


def child(job: dict[str, Any]) -> None:
    """Start, wait for this GPU's turn, time every load; one line of JSON each."""
    runner = model_runner(job)
    print("ready", flush=True)
    sys.stdin.readline()
    for batch, context in job["loads"]:
        print(json.dumps(time_step(runner, batch, context)), flush=True)


def environment(job: dict[str, Any], gpu: int) -> dict[str, str]:
    """Of a child: its GPU, its role, and nothing that could reach another rank."""
    found = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": str(gpu) if GPU else "",
        "SGLANG_NCCL_SO_PATH": "collectives-are-left-out",
        "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
        "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
    }
    if not GPU:
        found |= {"SGLANG_PLATFORM": "sglang_tpla_cpu", "SGLANG_CPU_OMP_THREADS_BIND": "|".join("0" * job["ranks"])}
    if job["groups"]:
        return found | Settings("decode", job["groups"], job["artifact"]).to_environment()
    return found | {"SGLANG_PLUGINS": "none"}


class Rank:
    """A child, and what it said."""

    def __init__(self, job: dict[str, Any], gpu: int, log: Path) -> None:
        self.job, self.gpu, self.log = job, gpu, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", json.dumps(job)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(job, gpu),
            )  # fmt: skip

    def lines(self) -> list[str]:
        """The child's lines until it is ready or ends."""
        assert self.process.stdout is not None
        found = []
        for line in self.process.stdout:
            found.append(line.strip())
            if found[-1] == "ready":
                break
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Let it measure, and wait for its end; what it could not measure is missing."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.close()
        found = [json.loads(line) for line in self.lines() if line.startswith("{")]
        if self.process.wait(60):
            print(f"T = {self.job['ranks']}, g = {self.job['groups']} ended early: {self.log.read_text()[-2000:]}")
        return [{key: self.job[key] for key in ("ranks", "groups", "attention")} | row for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--loads", nargs="+", default=["1x32768", "16x8192", "16x32768", "64x8192"])
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    loads = [tuple(map(int, load.split("x"))) for load in args.loads]
    rows: list[dict[str, Any]] = []
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "layers": args.layers,
        "model": DENSE_V3 if GPU else SMALL,
        "rows": rows,
    }
    with TemporaryDirectory() as scratch:
        model, artifact = Path(scratch) / "model", Path(scratch) / "artifact.safetensors"
        context = 2 * max(context for _, context in loads)
        shape = v3_shaped.Shape(args.layers, context, **(DENSE_V3 if GPU else SMALL))
        v3_shaped.write_checkpoint(model, shape, only_identity=True)
        v3_shaped.write_artifact(artifact, model, 2)
        stock = "flashinfer" if GPU else "torch_native"
        common = {
            "model": str(model), "artifact": str(artifact), "loads": loads,
            "tokens": max(batch * context for batch, context in loads) + 256,
        }  # fmt: skip
        jobs = [
            common | {"ranks": ranks, "groups": groups, "attention": attention}
            for ranks in args.ranks
            for groups, attention in ((0, stock), (2, "tpla" if GPU else stock))
        ]
        # All start at once (imports, compilation), then one at a time measures on each GPU: a pair on the same one.
        gpus = max(1, torch.cuda.device_count())
        children = [
            Rank(job, number // 2 % gpus, args.out.parent / f"rank-{job['ranks']}-{job['groups']}.log")
            for number, job in enumerate(jobs)
        ]
        try:
            for one in children:
                one.lines()
            with alone():
                for one in children:
                    rows += one.rows()
                    args.out.write_text(json.dumps(result, indent=1))
        finally:
            for one in children:
                one.process.kill()
    if GPU:
        print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Stock beside TPLA."""
    print(f"{'T':>2} {'load':>10} {'MLA':>10} {'TPLA, g=2':>10} {'speed-up':>9}")
    by_case: dict[tuple[int, int, int], dict[int, float]] = {}
    for row in rows:
        by_case.setdefault((row["ranks"], row["batch"], row["context"]), {})[row["groups"]] = row["step_us"]
    for (ranks, batch, context), times in by_case.items():
        if len(times) == 2:
            load, (stock, ours) = f"{batch}x{context}", (times[0], times[2])
            print(f"{ranks:>2} {load:>10} {stock:>7.0f} us {ours:>7.0f} us {stock / ours:>9.2f}")


if __name__ == "__main__":
    main()
