"""One rank of ``headline.py``, which times a step's CUDA graph in SGLang's model runner under each load."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import v3_shaped

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests" / "gpu"))
from decode_case import random_sketched

from sglang_tpla.cache_rows.sketched import SketchedRows

GPU = torch.cuda.is_available()


def leave_collectives_out() -> None:
    """Make every later process group of this process a fake one, of any size."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    initialize, new_group = dist.init_process_group, dist.new_group

    def fake_world(*_: Any, world_size: int, rank: int, **__: Any) -> None:
        initialize(backend="fake", store=FakeStore(), world_size=world_size, rank=rank)

    def fake_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return new_group(ranks, backend="fake")

    dist.init_process_group, dist.new_group = fake_world, fake_group
    dist.monitored_barrier = lambda *_, **__: None
    # The collectives that SGLang captures into graphs bypass PyTorch's groups.
    from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator

    for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        setattr(PyNcclCommunicator, name, lambda *_, **__: None)


def sketched_rows(groups: int) -> SketchedRows:
    """Return rows with 64 columns on every rank and 4 bits of the others; one group has 8 bits of all columns."""
    return SketchedRows.of(v3_shaped.LATENT, groups, 64 if groups > 1 else v3_shaped.LATENT, v3_shaped.ROPE)


def fill_cache(runner: Any, sketched: SketchedRows | None) -> None:
    """Fill every layer with random rows, repeating some thousands of them: over zeros a GPU would draw less power."""
    generator = torch.Generator(runner.device).manual_seed(0)
    for cache in runner.token_to_kv_pool.kv_buffer:  # [slots, 1, columns]
        slots, count = cache[:, 0], min(65536 if GPU else 64, len(cache))
        if sketched:
            rows = random_sketched(sketched, count, generator)
        else:
            rows = torch.randn(count, slots.shape[1], generator=generator, device=runner.device)
            rows = rows.to(torch.float8_e4m3fn if slots.element_size() == 1 else slots.dtype).view(slots.dtype)
        for part in slots.split(count):
            part.copy_(rows[: len(part)])


def decode_batch(runner: Any, batch: int, context: int) -> Any:
    """Return a batch of requests whose last token is at ``context``, in random slots."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    device = runner.device
    # Under decode context parallelism, row r of a rank is one of slots r * dcp to r * dcp + dcp - 1: successive tokens.
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
    """Time one load: replays of the step's graph on all ranks at once, or the whole forward on a CPU."""
    forward_batch = decode_batch(runner, batch, context)
    replayed: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = noted
    host = []
    for _ in range(12 if GPU else 2):
        start = time.perf_counter()
        runner.forward(forward_batch)
        if GPU:
            torch.cuda.synchronize()
        host.append(1e3 * (time.perf_counter() - start))
    torch.cuda.CUDAGraph.replay = replay
    row: dict[str, Any] = {"batch": batch, "context": context, "host_ms": statistics.median(host[len(host) // 4 :])}
    if not GPU:
        return row | {"step_ms": row["host_ms"]}
    (graph,) = set(replayed)  # a step must be one graph
    torch.distributed.barrier()
    torch.cuda.synchronize()
    events = []
    for _ in range(25):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in events][5:]
    return row | {"step_ms": statistics.median(times), "step_ms_range": [min(times), max(times)]}


def child(job: dict[str, Any], rank: int) -> None:
    """Run one rank: make SGLang's model runner, then time every load; rank 0 prints a line of JSON for each."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if job["alone"]:
        leave_collectives_out()
    from sglang.benchmark.one_batch import load_model
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.server_args import PortArgs, ServerArgs, set_global_server_args_for_scheduler

    print("ready", flush=True)
    sys.stdin.readline()
    flags: dict[str, Any] = dict(job["flags"])
    if job["groups"]:
        flags |= {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "tpla"}
    if GPU:
        torch.cuda.set_device(rank)
    else:
        flags |= {"device": "cpu"}
    arguments = ServerArgs(
        model_path=job["model"],
        load_format="dummy",
        tp_size=job["ranks"],
        dtype="bfloat16",
        attention_backend=job["attention"],
        random_seed=0,
        max_total_tokens=job["tokens"],
        max_running_requests=max(batch for batch, _ in job["loads"]),
        context_length=max(context for _, context in job["loads"]) + 64,
        mem_fraction_static=0.97,
        disable_custom_all_reduce=job["alone"],
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
    ports = PortArgs.init_new(arguments)
    ports.nccl_port = job["port"]
    runner, _ = load_model(arguments, ports, gpu_id=rank if GPU else 0, tp_rank=rank)
    fill_cache(runner.torch_runner, sketched_rows(job["groups"]) if job["rows"] else None)
    for batch, context in job["loads"]:
        row = time_step(runner.torch_runner, batch, context)
        if rank == 0:
            print(json.dumps(row), flush=True)
