"""The stock transfer engines' TCP writes, for comparison: mooncake and NIXL, if they are installed.

Each engine gets the easiest task: two registered, contiguous buffers, in a process each. Their threads spin while they
wait, so both processes are stopped (SIGSTOP) while others are measured.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from machine import cpu_seconds

PIECE = 4 << 20
Measure = Callable[[int], tuple[float, float]]


class NotHere(Exception):
    """The engine is not installed, or does not start on this machine; the text says which of the two."""


def _tell_cpu(pipe: Connection) -> None:
    """Serve the pipe of a target: answer each message with the CPU seconds so far."""
    while pipe.recv() is not None:
        pipe.send(cpu_seconds())


def _write_all(pipe: Connection, write: Callable[[int], None]) -> None:
    """Serve the pipe of a source: write as many bytes as asked, and answer with seconds and CPU seconds."""
    while (size := pipe.recv()) is not None:
        before, start = cpu_seconds(), time.perf_counter()
        write(size)
        pipe.send((time.perf_counter() - start, cpu_seconds() - before))


@contextlib.contextmanager
def _or_not_here(pipe: Connection) -> Iterator[None]:
    """Send `NotHere` in place of the child's first message if its engine cannot be used."""
    try:
        yield
    except ImportError as error:
        pipe.send(NotHere(str(error)))
        raise SystemExit(0) from error


def mooncake_target(pipe: Connection, size: int) -> None:
    """Run the process into which mooncake writes."""
    with _or_not_here(pipe):
        from mooncake.engine import TransferEngine
    target, engine = np.ones(size, dtype=np.uint8), TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        pipe.send(NotHere("its TCP transport does not start"))
        return
    engine.register_memory(target.ctypes.data, size)
    pipe.send((engine.get_rpc_port(), target.ctypes.data))
    _tell_cpu(pipe)


def mooncake_source(pipe: Connection, size: int, said: tuple[int, int]) -> None:
    """Run the process that writes with mooncake's transfer engine over TCP."""
    from mooncake.engine import TransferEngine

    (port, target), source, engine = said, np.ones(size, dtype=np.uint8), TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        pipe.send(NotHere("its TCP transport does not start a second time"))
        return
    engine.register_memory(source.ctypes.data, size)
    pipe.send("ready")

    def write(want: int) -> None:
        starts = range(0, want, PIECE)
        status = engine.batch_transfer_sync_write(
            f"127.0.0.1:{port}",
            [source.ctypes.data + offset for offset in starts],
            [target + offset for offset in starts],
            [min(PIECE, want - offset) for offset in starts],
        )
        if status != 0:
            raise RuntimeError(f"mooncake failed with status {status}")

    _write_all(pipe, write)


def _nixl_agent(name: str) -> Any:
    # Use TCP; if there is a GPU, NIXL does not start without a transport that copies to it.
    os.environ["UCX_TLS"] = "tcp,cuda_copy" if torch.cuda.is_available() else "tcp"
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def nixl_target(pipe: Connection, size: int) -> None:
    """Run the process into which NIXL writes."""
    with _or_not_here(pipe):
        agent = _nixl_agent("target")
    target = np.ones(size, dtype=np.uint8)
    agent.register_memory([(target.ctypes.data, size, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), target.ctypes.data))
    _tell_cpu(pipe)


def nixl_source(pipe: Connection, size: int, said: tuple[bytes, int]) -> None:
    """Run the process that writes with NIXL and UCX over TCP."""
    (metadata, target), source, agent = said, np.ones(size, dtype=np.uint8), _nixl_agent("source")
    agent.register_memory([(source.ctypes.data, size, 0, "")], "DRAM")
    name = agent.add_remote_agent(metadata)
    pipe.send("ready")

    def write(want: int) -> None:
        local = agent.get_xfer_descs([(source.ctypes.data, want, 0)], "DRAM")
        remote = agent.get_xfer_descs([(target, want, 0)], "DRAM")
        handle = agent.initialize_xfer("WRITE", local, remote, name)
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = agent.check_xfer_state(handle)
        if state == "ERR":
            raise RuntimeError("NIXL failed")
        agent.release_xfer_handle(handle)

    _write_all(pipe, write)


ENGINES = {"mooncake": (mooncake_target, mooncake_source), "NIXL": (nixl_target, nixl_source)}


def engine(
    name: str, child: Callable[..., Any], size: int, count: Callable[[int], int], stack: contextlib.ExitStack
) -> Measure:
    """Start one of `ENGINES`, and return the function that measures it.

    Args:
        child: starts a process: ``child(function, *arguments)`` with ``first``, ``pipe`` and ``process``.
        size: bytes of each buffer.
        count: returns the bytes of a number of tokens.
        stack: at its end the processes continue, so that they can end.

    Raises:
        NotHere: the engine is not installed, or does not start.
    """
    at_target, at_source = ENGINES[name]
    target = child(at_target, size)
    if isinstance(target.first, NotHere):
        raise target.first
    source = child(at_source, size, target.first)
    pair = target, source

    def let_run(signal_number: int) -> None:
        for one in pair:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process.pid, signal_number)

    def measure(tokens: int) -> tuple[float, float]:
        let_run(signal.SIGCONT)
        try:
            target.pipe.send("cpu")
            before = target.pipe.recv()
            source.pipe.send(count(tokens))
            seconds, cpu = source.pipe.recv()
            target.pipe.send("cpu")
            return seconds, cpu + target.pipe.recv() - before
        finally:
            let_run(signal.SIGSTOP)

    let_run(signal.SIGSTOP)
    stack.callback(let_run, signal.SIGCONT)
    if isinstance(source.first, NotHere):
        raise source.first
    return measure
