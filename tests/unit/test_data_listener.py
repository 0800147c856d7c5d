"""The port of data channels on a machine that has no descriptor left for another connection."""

import errno
import os
import socket

import pytest

from sglang_tpla.transfer.network.data_listener import DataListener
from sglang_tpla.transfer.network.event_loop import IoLoop


def test_a_listener_without_room_rests_until_the_next_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stays in the system's queue, so a loop that polled would find the port ready all the time."""
    io = IoLoop("listener")
    listener = DataListener(io, "127.0.0.1", 0, 5.0, False, pytest.fail, pytest.fail, pytest.fail)
    try:
        with socket.create_connection(("127.0.0.1", listener.announced_port)):

            def ready() -> bool:
                return bool(io._poller.poll(0))

            def accept() -> None:
                io._streams[io._poller.poll(1000)[0][0]][1]()

            with monkeypatch.context() as patch:
                patch.setattr(socket.socket, "accept", full)
                accept()
                assert not ready()
                listener.expire(io.now())
                assert ready()
                accept()
                assert not ready()
            listener.expire(io.now())
            accept()
            assert len(listener._pending) == 1
    finally:
        io.free()


def full(self: socket.socket) -> tuple[socket.socket, object]:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
