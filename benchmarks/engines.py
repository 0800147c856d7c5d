"""The stock transfer engines' TCP writes, for comparison: mooncake and NIXL, where they are installed.

Each gets the easiest task there is: two registered, contiguous buffers.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

PIECE = 4 << 20
Measure = Callable[[int], tuple[float, float]]


class NotHere(Exception):
    """The engine is not installed, or does not start on this machine; the text says which."""


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def mooncake_child(pipe: Connection, size: int) -> None:
    """The target of mooncake's writes."""
    from mooncake.engine import TransferEngine

    target = np.ones(size, dtype=np.uint8)
    engine = TransferEngine()
    engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    engine.register_memory(target.ctypes.data, size)
    pipe.send((engine.get_rpc_port(), target.ctypes.data))
    while pipe.recv() is not None:
        pipe.send(_cpu_seconds())


def mooncake(
    child: Callable[..., Any], source: np.ndarray, size: int, count: Callable[[int], int]
) -> Measure:
    """Mooncake's transfer engine over TCP."""
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise NotHere(str(error)) from error
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise NotHere("its TCP transport does not start")
    engine.register_memory(source.ctypes.data, size)
    other = child(mooncake_child, size)
    port, target = other.first

    def measure(tokens: int) -> tuple[float, float]:
        want = count(tokens)
        starts = range(0, want, PIECE)
        other.pipe.send("cpu")
        before, start = _cpu_seconds() + other.pipe.recv(), time.perf_counter()
        status = engine.batch_transfer_sync_write(
            f"127.0.0.1:{port}",
            [source.ctypes.data + offset for offset in starts],
            [target + offset for offset in starts],
            [min(PIECE, want - offset) for offset in starts],
        )
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"mooncake failed with status {status}")
        other.pipe.send("cpu")
        return seconds, _cpu_seconds() + other.pipe.recv() - before

    return measure


def nixl_transports() -> str:
    """TCP; beside a GPU NIXL does not start without a transport that copies to it."""
    return "tcp,cuda_copy" if torch.cuda.is_available() else "tcp"


def nixl_child(pipe: Connection, size: int) -> None:
    """The target of NIXL's writes."""
    os.environ["UCX_TLS"] = nixl_transports()
    from nixl._api import nixl_agent, nixl_agent_config

    target = np.ones(size, dtype=np.uint8)
    agent = nixl_agent("target", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(target.ctypes.data, size, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), target.ctypes.data))
    while pipe.recv() is not None:
        pipe.send(_cpu_seconds())


def nixl(child: Callable[..., Any], source: np.ndarray, size: int, count: Callable[[int], int]) -> Measure:
    """NIXL with UCX over TCP."""
    os.environ["UCX_TLS"] = nixl_transports()
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise NotHere(str(error)) from error
    agent = nixl_agent("source", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(source.ctypes.data, size, 0, "")], "DRAM")
    other = child(nixl_child, size)
    metadata, target = other.first
    name = agent.add_remote_agent(metadata)

    def measure(tokens: int) -> tuple[float, float]:
        want = count(tokens)
        other.pipe.send("cpu")
        before, start = _cpu_seconds() + other.pipe.recv(), time.perf_counter()
        local = agent.get_xfer_descs([(source.ctypes.data, want, 0)], "DRAM")
        remote = agent.get_xfer_descs([(target, want, 0)], "DRAM")
        handle = agent.initialize_xfer("WRITE", local, remote, name)
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - start
        if state == "ERR":
            raise RuntimeError("NIXL failed")
        agent.release_xfer_handle(handle)
        other.pipe.send("cpu")
        return seconds, _cpu_seconds() + other.pipe.recv() - before

    return measure
