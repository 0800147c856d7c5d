"""Measure how fast a latent cache moves between GPU processes of one host, without servers.

The processes have agents, pools, and a scheduler that polls as SGLang's does.

    python benchmarks/transfer_gpu.py --out FILE [--tokens 1024 8192] [--chunk-mib 16] [--threads 2] [--unchecked]

One process holds a prefill pool (61 layers of 512 + 64 values in bfloat16), one for each rank a decode pool; each has a
GPU of its own where there are several. The main thread of each looks at its room as SGLang's scheduler does, through
the nap of ``host/disaggregation/kv_manager.py``, or (``spin``) without it. Pages are single tokens in random order.

- place: through shared memory (this host), or over TCP on loopback, as between hosts (other host)
- checked: with checksums; with --unchecked also without, in turns (never offered outside this file)
- seconds: from the last rows handed over (all at once) to the confirmation of every rank; median after one warm-up
- ceilings: one copy of the same bytes from the GPU to pinned memory, the other way, and one checksum of them, alone
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import header
from transfer import LATENT, LAYERS, ROPE, SETTINGS, Child, switch_checksums

from sglang_tpla.transfer import workers as agents
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.copy import check_pieces
from sglang_tpla.transfer.memory.iovec import one_piece
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState

NAP_S = 0.001  # the nap that SGLang's scheduler takes with our agent


def make_pool(tokens: int, width: int, device: str) -> CachePool:
    """Return a pool of random rows."""
    layers = [torch.randn(tokens, width + ROPE, device=device).to(torch.bfloat16) for _ in range(LAYERS)]
    return CachePool(layers, LATENT, ROPE, 1)


def look(agent: PrefillAgent | DecodeAgent, room: int, past: RoomState, nap: bool) -> None:
    """Poll as a scheduler does, some tens of microseconds a pass, until a room is beyond a state."""
    while not past < agent.poll(room) and not agent.poll(room).ended:
        for _ in range(400):
            pass
        if nap:
            time.sleep(NAP_S)


def set_up(threads: int, switch_s: float, device: str) -> None:
    """Set this process up as a server's process."""
    sys.setswitchinterval(switch_s)
    torch.set_num_threads(1)
    agents.WORKERS["cuda"] = agents.CHECKERS["cuda"] = threads
    if device != "cpu":
        torch.cuda.set_device(device)


def prefill_child(pipe: Connection, job: dict[str, Any]) -> None:
    """Run a prefill agent that reads a number of tokens from the pipe, and sends as many."""
    set_up(job["threads"], job["switch_s"], job["source"])
    pool = make_pool(job["tokens"], LATENT, job["source"])
    agent = PrefillAgent(
        pool,
        MetadataRows([np.zeros((8, 64), dtype=np.uint8)]),
        model_hash="bench",
        settings=replace(SETTINGS, chunk_bytes=job["chunk_bytes"]),
        bind_host="127.0.0.1",
        rank=0,
    )
    pages = np.random.default_rng(1).permutation(job["tokens"]).astype(np.int32)
    pipe.send(agent.address)
    while (command := pipe.recv()) is not None:
        room, tokens, checked = command
        switch_checksums(checked)
        agent.open_room(room)
        look(agent, room, RoomState.BOOTSTRAPPING, True)
        start = time.perf_counter()
        agent.send(room, pages[:tokens], last=True, metadata_row=0)
        look(agent, room, RoomState.TRANSFERRING, job["nap"])
        seconds = time.perf_counter() - start
        assert agent.poll(room) == RoomState.SUCCESS, agent.failure(room)
        pipe.send((seconds, agent.metric(room).wire_bytes))
        agent.close_room(room)
    agent.close()


def decode_child(pipe: Connection, job: dict[str, Any], rank: int, address: tuple[str, int]) -> None:
    """Run a decode agent that reads a number of tokens from the pipe, and fetches as many."""
    ranks = job["ranks"]
    device = job["targets"][rank]
    set_up(job["threads"], job["switch_s"], device)
    width = LATENT // ranks
    columns = torch.eye(LATENT)[:, rank * width : (rank + 1) * width].contiguous()
    agent = DecodeAgent(
        make_pool(job["tokens"], width, device),
        MetadataRows([np.zeros((8, 64), dtype=np.uint8)]),
        Projection([columns] * LAYERS, [0] * LAYERS) if ranks > 1 else None,
        model_hash="bench",
        settings=replace(SETTINGS, chunk_bytes=job["chunk_bytes"]),
        rank=rank,
        size=ranks,
        host_id=None if job["place"] == "this host" else "other",
    )
    pages = np.random.default_rng(2).permutation(job["tokens"]).astype(np.int32)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        room, tokens, checked = command
        switch_checksums(checked)
        agent.open_room(room, [(*address, False)])
        look(agent, room, RoomState.BOOTSTRAPPING, True)
        agent.request(room, pages[:tokens], metadata_row=0, expected_ranks=ranks)
        look(agent, room, RoomState.TRANSFERRING, job["nap"])
        assert agent.poll(room) == RoomState.SUCCESS, agent.failure(room)
        pipe.send(None)
        agent.close_room(room)
    agent.close()


def measure(job: dict[str, Any], lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measure one setting at every length."""
    rows = []
    with contextlib.ExitStack() as stack:
        prefill = Child(prefill_child, job)
        stack.callback(prefill.end)
        decodes = [Child(decode_child, job, rank, prefill.first) for rank in range(job["ranks"])]
        for decode in decodes:
            stack.callback(decode.end)
        room = 0
        for tokens in lengths:
            found: dict[bool, list[tuple[float, int]]] = {checked: [] for checked in job["checked"]}
            for _ in range(repeats + 1):
                for checked, samples in found.items():
                    room += 1
                    for child in (*decodes, prefill):
                        child.pipe.send((room, tokens, checked))
                    samples.append(prefill.pipe.recv())
                    for decode in decodes:
                        decode.pipe.recv()
            for checked, samples in found.items():
                seconds = [one for one, _ in samples[1:]]
                size = samples[-1][1]
                middle = statistics.median(seconds)
                setting = {key: job[key] for key in ("place", "ranks", "chunk_bytes", "threads", "nap", "switch_s")}
                rows.append(
                    setting
                    | {"checked": checked, "tokens": tokens, "bytes": size, "seconds": middle}
                    | {"all_seconds": seconds, "gigabytes_per_second": size / middle / 1e9}
                )
                print(
                    f"{job['place']:<10} ranks {job['ranks']} chunk {job['chunk_bytes'] >> 20:>3} MiB threads "
                    f"{job['threads']} {'nap ' if job['nap'] else 'spin'} {'' if checked else 'un'}checked "
                    f"{tokens:>6} tokens {1e3 * middle:>7.1f} ms {size / middle / 1e9:>6.2f} GB/s "
                    f"(best {size / min(seconds) / 1e9:.2f})",
                    flush=True,
                )
    return rows


def ceilings(size: int) -> dict[str, float]:
    """Return the GB/s of each part alone."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True).random_()
    device = torch.empty(size, dtype=torch.uint8, device="cuda")

    def rate(work: Callable[[], object]) -> float:
        samples = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        return size / statistics.median(samples[1:]) / 1e9

    return {
        "to_device": rate(lambda: device.copy_(host, non_blocking=True)),
        "to_host": rate(lambda: host.copy_(device, non_blocking=True)),
        "checksum_one_thread": rate(lambda: check_pieces(one_piece(host.numpy()))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[16])
    parser.add_argument("--threads", type=int, nargs="+", default=[agents.WORKERS["cuda"]])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--switch-us", type=float, default=200.0)
    parser.add_argument("--place", nargs="+", default=["this host"], choices=["this host", "other host"])
    parser.add_argument("--unchecked", action="store_true", help="also without checksums, in turns")
    parser.add_argument("--spin", action="store_true", help="poll without naps")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    rows: list[dict[str, Any]] = []
    result = {
        **header(torch.cuda.get_device_name() if gpus else "cpu"),
        "gpus": gpus,
        "gigabytes_per_second_alone": ceilings(256 << 20) if gpus else {},
        "rows": rows,
    }
    print(result["gigabytes_per_second_alone"], flush=True)
    for place, ranks, chunk, threads in itertools.product(args.place, args.ranks, args.chunk_mib, args.threads):
        job = {
            "tokens": max(args.tokens), "place": place, "ranks": ranks, "chunk_bytes": chunk << 20, "threads": threads,
            "switch_s": args.switch_us * 1e-6, "nap": not args.spin, "source": devices[-1],
            "targets": [devices[rank % len(devices)] for rank in range(ranks)],
            "checked": [True, False] if args.unchecked else [True],
        }  # fmt: skip
        rows += measure(job, args.tokens, args.repeats)
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
