"""Measure how fast a latent cache moves from a prefill to a decode process on loopback, beside other carriers.

One run measures, for each length, one after another in each repetition so that a busy machine hurts all alike:

    agent, keys        the transfer agents over TCP with keys, as between machines: gather, seal, send, open, scatter
    agent, two hosts   the same without keys: gather, checksum, send, check, scatter
    agent, one host    the same through shared memory, ZMQ for control only
    ... unchecked      each of them with checksums of no cost (never offered outside this file)
    raw TCP            one socket moving the same bytes between two buffers
    TLS 1.3            the same, encrypted
    ZMQ, ZMQ CURVE     chunks as agents sent them before there were data channels, without and with keys
    cp through shm     the same bytes copied into shared memory by one process, then out of it by another
    memcpy             one copy of the same bytes in one process
    mooncake, NIXL     the engines' own TCP write between registered, contiguous buffers, where they are installed
                       (`make bench-engines`); their processes stand still while others are measured

The best of the repetitions counts; the medians stand beside it. Rows are V3-shaped (512 + 64 values, bfloat16), layers
are as many of 61 as fit in --memory-gib a process, pages are scattered in runs of 64 tokens. Writes a table, and JSON
to --out.
"""

import argparse
import contextlib
import io
import json
import mmap
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import encrypted
import engines
import numpy as np
import torch
from machine import cpu_seconds, machine, memory_bytes
from pacing import pace, pace_channels
from transfer_report import print_report, report

from sglang_tpla.config import Settings
from sglang_tpla.launch.supervisor import end_with_parent
from sglang_tpla.transfer import keys, messages
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory import copy
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.network.security import KEYS_VARIABLE
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState

LATENT, ROPE, LAYERS, PAGE = 512, 64, 61, 64
ROW_BYTES = 2 * (LATENT + ROPE)
PIECE = 4 << 20
LINE_BYTES = 64  # of a processor's caches
SETTINGS = Settings(role="prefill", peer_timeout_s=60.0)
ENGINES = Path(__file__).parent / "out" / "engines"  # where `make bench-engines` installs them


def random_bytes(size: int) -> np.ndarray:
    """Return random uint8 bytes (zeros could be cheaper to move), aligned to a cache line, as torch aligns a pool."""
    block = np.random.default_rng(0).integers(0, 256, PIECE, dtype=np.uint8)
    memory = np.empty(size + LINE_BYTES, dtype=np.uint8)
    aligned = memory[-memory.ctypes.data % LINE_BYTES :][:size]
    for start in range(0, size, PIECE):
        aligned[start : start + PIECE] = block[: size - start]
    return aligned


def make_pool(tokens: int, layers: int) -> CachePool:
    """Return a pool of random rows. As for all contestants, numpy allocates the memory: numpy asks for huge pages."""
    rows = [torch.from_numpy(random_bytes(tokens * ROW_BYTES)) for _ in range(layers)]
    return CachePool([row.view(torch.bfloat16).view(tokens, -1) for row in rows], LATENT, ROPE, PAGE)


class NoChecksum:
    """A checksum that accepts any payload."""

    pointer = None  # C then computes no checksum

    def __init__(self, *_: object) -> None:
        pass

    def update(self, data: object) -> None:
        """Do nothing."""

    def digest(self) -> bytes:
        """Return the same digest for all payloads."""
        return bytes(8)


CHECKSUMS = messages.checksum, messages.running_checksum, copy.Checksum


def switch_checksums(on: bool) -> None:
    """Let this process's agents compute checksums, or not."""
    off = (lambda data: bytes(8)), NoChecksum, NoChecksum
    messages.checksum, messages.running_checksum, copy.Checksum = CHECKSUMS if on else off


# The functions below run in children. Each serves commands from a pipe, and answers with (seconds, cpu_seconds) or a
# value.


def use_keys(folder: str | None) -> None:
    """Let this process's agents use the keys in a folder, or no keys."""
    os.environ.pop(KEYS_VARIABLE, None)
    if folder is not None:
        os.environ[KEYS_VARIABLE] = folder


def prefill_child(pipe: Connection, tokens: int, layers: int, gigabits_s: float, keys_folder: str | None) -> None:
    """Run a prefill agent with random rows."""
    torch.set_num_threads(1)
    use_keys(keys_folder)
    pace_channels(gigabits_s)
    pool = make_pool(tokens, layers)
    metadata = MetadataRows([np.zeros((8, 64), dtype=np.uint8)])
    agent = PrefillAgent(pool, metadata, model_hash="bench", settings=SETTINGS, bind_host="127.0.0.1", rank=0)
    pipe.send(agent.address)
    while (command := pipe.recv()) is not None:
        room, pages, checked = command
        switch_checksums(checked)
        agent.open_room(room)
        while agent.poll(room) != RoomState.WAITING:
            time.sleep(0.001)
        before, start = cpu_seconds(), time.perf_counter()
        agent.send(room, pages, last=True, metadata_row=0)
        while not agent.poll(room).ended:
            time.sleep(0.001)
        seconds = time.perf_counter() - start
        assert agent.poll(room) == RoomState.SUCCESS, agent.failure(room)
        pipe.send((seconds, cpu_seconds() - before))
        agent.close_room(room)
    agent.close()


def decode_child(
    pipe: Connection, tokens: int, layers: int, port: int, host_id: str | None, keys_folder: str | None
) -> None:
    """Run a decode agent with an empty pool."""
    torch.set_num_threads(1)
    use_keys(keys_folder)
    pool = make_pool(tokens, layers)
    metadata = MetadataRows([np.zeros((8, 64), dtype=np.uint8)])
    agent = DecodeAgent(pool, metadata, None, model_hash="bench", settings=SETTINGS, rank=0, size=1, host_id=host_id)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        room, pages, checked = command
        switch_checksums(checked)
        agent.open_room(room, [("127.0.0.1", port, False)])
        while agent.poll(room) == RoomState.BOOTSTRAPPING:
            time.sleep(0.001)
        before = cpu_seconds()
        agent.request(room, pages, metadata_row=0, expected_ranks=1)
        while not agent.poll(room).ended:
            time.sleep(0.001)
        assert agent.poll(room) == RoomState.SUCCESS, agent.failure(room)
        pipe.send(cpu_seconds() - before)
        agent.close_room(room)
    agent.close()


def socket_child(pipe: Connection, size: int, tls: bool) -> None:
    """Run the receiving end of the raw socket, or of TLS."""
    target = random_bytes(size)
    server = socket.create_server(("127.0.0.1", 0))
    pipe.send(server.getsockname()[1])
    stream, _ = server.accept()
    if tls:
        stream = encrypted.tls_server().wrap_socket(stream, server_side=True)
    with server, stream:
        while (want := pipe.recv()) is not None:
            before, view, got = cpu_seconds(), memoryview(target), 0
            while got < want:
                got += stream.recv_into(view[got : min(want, got + PIECE)])
            stream.sendall(b"k")
            pipe.send(cpu_seconds() - before)


def zmq_child(pipe: Connection, size: int, with_keys: bool) -> None:
    """Run the receiving end of ZMQ."""
    target = random_bytes(size)
    pipe.send("ready")
    encrypted.zmq_child(pipe, target, with_keys)


def copy_child(pipe: Connection, descriptor_path: str, size: int) -> None:
    """Copy from shared memory into the child's own memory."""
    target = random_bytes(size)
    with open(descriptor_path, "rb") as file:
        shared = np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), dtype=np.uint8)
    int(shared[:: mmap.PAGESIZE].sum())  # map every page now, not during the measurement
    pipe.send("ready")
    while (want := pipe.recv()) is not None:
        before = cpu_seconds()
        np.copyto(target[:want], shared[:want])
        pipe.send(cpu_seconds() - before)


def run_child(target: Callable[..., None], *args: Any) -> None:
    """Run ``target`` in a child that ends with its parent, however the parent ends."""
    end_with_parent()
    target(*args)


class Child:
    """A process and the pipe to it."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=run_child, args=(target, other, *args), daemon=True)
        self.process.start()
        other.close()
        self.first = self.pipe.recv()

    def end(self) -> None:
        """Tell the child to stop, and wait for its end."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


Measure = Callable[[int], tuple[float, float]]


class Bench:
    """All contestants, set up once for the largest size; each measures (wall seconds, CPU seconds) of a length."""

    def __init__(self, tokens: int, layers: int, gigabits_s: float, stack: contextlib.ExitStack) -> None:
        self.layers, self.size = layers, tokens * layers * ROW_BYTES
        self.stack, self.room, self.gigabits_s = stack, 0, gigabits_s
        self.pages = np.random.default_rng(1).permutation(tokens // PAGE).astype(np.int32)
        self.measures: dict[str, Measure] = {}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with contextlib.redirect_stdout(io.StringIO()):
            keys.main([folder])
        sealing = self.child(prefill_child, tokens, layers, gigabits_s, folder)
        plain = self.child(prefill_child, tokens, layers, gigabits_s, None)
        for name, prefill, host_id, kept in (
            ("keys", sealing, "far", folder),
            ("two hosts", plain, "far", None),
            ("one host", plain, None, None),
        ):
            decode = self.child(decode_child, tokens, layers, prefill.first[1], host_id, kept)
            for checked in (True, False) if kept is None else (True,):
                whole = f"agent, {name}" + ("" if checked else ", unchecked")
                self.measures[whole] = lambda count, prefill=prefill, decode=decode, checked=checked: self.agent(
                    prefill, decode, count, checked
                )
        source = random_bytes(self.size)
        self.measures["raw TCP"] = self.raw_tcp(source)
        self.measures["TLS 1.3"] = self.raw_tcp(source, tls=True)
        self.measures["ZMQ"] = self.zmq(source, with_keys=False)
        self.measures["ZMQ CURVE"] = self.zmq(source, with_keys=True)
        self.measures["cp through shm"] = self.shared_copy(source)
        target = random_bytes(self.size)
        self.measures["memcpy"] = lambda count: self.timed(
            lambda: np.copyto(target[: self.bytes(count)], source[: self.bytes(count)])
        )
        self.missing: dict[str, str] = {}
        for name in engines.ENGINES:
            try:
                self.measures[name] = engines.engine(name, self.child, self.size, self.bytes, stack)
            except engines.NotHere as error:
                self.missing[name] = str(error)

    def child(self, target: Callable[..., None], *args: Any) -> Child:
        """Start a child that ends with the run."""
        item = Child(target, *args)
        self.stack.callback(item.end)
        return item

    def bytes(self, tokens: int) -> int:
        """Return the payload's bytes for a number of tokens."""
        return tokens * self.layers * ROW_BYTES

    @staticmethod
    def timed(work: Callable[[], object]) -> tuple[float, float]:
        """Return the wall and CPU seconds of ``work``."""
        before, start = cpu_seconds(), time.perf_counter()
        work()
        return time.perf_counter() - start, cpu_seconds() - before

    def agent(self, prefill: Child, decode: Child, tokens: int, checked: bool) -> tuple[float, float]:
        """Move one room, and return its wall and CPU seconds."""
        self.room += 1
        count = tokens // PAGE
        prefill.pipe.send((self.room, self.pages[:count], checked))
        decode.pipe.send((self.room, self.pages[::-1][:count].copy(), checked))
        seconds, cpu = prefill.pipe.recv()
        return seconds, cpu + decode.pipe.recv()

    def raw_tcp(self, source: np.ndarray, tls: bool = False) -> Measure:
        """Return the measurement of one connection with large pieces, and one byte back at the end."""
        child = self.child(socket_child, self.size, tls)
        stream = socket.create_connection(("127.0.0.1", child.first))
        pace(stream, self.gigabits_s)
        stream = self.stack.enter_context(encrypted.tls_client().wrap_socket(stream) if tls else stream)
        view = memoryview(source)

        def send(size: int) -> None:
            for start in range(0, size, PIECE):
                stream.sendall(view[start : min(size, start + PIECE)])
            assert stream.recv(1) == b"k"

        return lambda tokens: self.sent(child, send, tokens)

    def sent(self, child: Child, send: Callable[[int], object], tokens: int) -> tuple[float, float]:
        """Return the wall and CPU seconds of sending to a child, which answers with its own CPU seconds."""
        child.pipe.send(self.bytes(tokens))
        seconds, cpu = self.timed(lambda: send(self.bytes(tokens)))
        return seconds, cpu + child.pipe.recv()

    def zmq(self, source: np.ndarray, with_keys: bool) -> Measure:
        """Return the measurement of chunks over ZMQ, as agents sent them before."""
        child = self.child(zmq_child, self.size, with_keys)
        where, send = encrypted.zmq_sender(source, with_keys)
        child.pipe.send(where)
        return lambda tokens: self.sent(child, send, tokens)

    def shared_copy(self, source: np.ndarray) -> Measure:
        """Return the measurement of a copy into an anonymous shared file, and out of it in another process."""
        file = os.memfd_create("bench")
        self.stack.callback(os.close, file)
        os.ftruncate(file, self.size)
        shared = np.frombuffer(mmap.mmap(file, self.size), dtype=np.uint8)
        shared[:: mmap.PAGESIZE] = 1
        child = self.child(copy_child, f"/proc/{os.getpid()}/fd/{file}", self.size)

        def measure(tokens: int) -> tuple[float, float]:
            size = self.bytes(tokens)
            elsewhere = 0.0

            def both() -> None:
                nonlocal elsewhere
                np.copyto(shared[:size], source[:size])
                child.pipe.send(size)
                elsewhere = child.pipe.recv()

            seconds, cpu = self.timed(both)
            return seconds, cpu + elsewhere

        return measure


def measure(
    tokens: Sequence[int], layers: int, repeat: int, without: Sequence[str], gigabits_s: float
) -> list[dict[str, Any]]:
    """Measure all contestants at some lengths with one number of layers; the rows also say which failed, and why."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        bench = Bench(max(tokens), layers, gigabits_s, stack)
        for count in tokens:
            taken: dict[str, list[tuple[float, float]]] = {}
            for _ in range(repeat + 1):
                for name, once in bench.measures.items():
                    if name not in without:
                        taken.setdefault(name, []).append(once(count))
            gigabytes = bench.bytes(count) / 1e9
            for name, (_, *kept) in taken.items():  # the first is a warm-up
                seconds, cpu = min(kept)
                median = statistics.median(wall for wall, _ in kept)
                rows.append(
                    {
                        "contestant": name,
                        "tokens": count,
                        "layers": layers,
                        "bytes": bench.bytes(count),
                        "seconds": seconds,
                        "median_seconds": median,
                        "goodput_gb_s": gigabytes / seconds,
                        "median_goodput_gb_s": gigabytes / median,
                        "cpu_s_per_gb": cpu / gigabytes,
                    }
                )
                print(
                    f"{count:>6} tokens  {name:<27} {seconds * 1000:9.2f} ms {gigabytes / seconds:7.2f} GB/s "
                    f"(median {gigabytes / median:5.2f}) {cpu / gigabytes:6.2f} CPU s/GB",
                    flush=True,
                )
        rows += [{"contestant": name, "missing": why} for name, why in bench.missing.items()]
    return rows


def main() -> None:
    """Measure all contestants, print the results, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--without", nargs="+", default=[], help="contestants to leave out")
    parser.add_argument(
        "--link-gbit-s",
        type=float,
        default=0.0,
        help="gigabits a second; the data channel and the raw socket are paced",
    )
    parser.add_argument("--memory-gib", type=float, default=1.1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "transfer.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(ENGINES))
    by_layers: dict[int, list[int]] = {}
    for count in sorted(args.tokens):
        layers = max(1, min(LAYERS, memory_bytes(args.memory_gib) // (count * ROW_BYTES)))
        by_layers.setdefault(layers, []).append(count)
        if layers < LAYERS:
            print(f"{layers} of {LAYERS} layers at {count} tokens: memory is limited (--memory-gib)")
    measured = [
        row
        for layers, lengths in by_layers.items()
        for row in measure(lengths, layers, args.repeat, args.without, args.link_gbit_s)
    ]
    result = {
        **report(measured, args.tokens),
        "layers": {str(count): layers for layers, lengths in by_layers.items() for count in lengths},
        "layers_of_model": LAYERS,
        "row_bytes": ROW_BYTES,
        "repetitions": args.repeat,
        "link_gigabits_s": args.link_gbit_s or None,
        "machine": machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_report(result)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
