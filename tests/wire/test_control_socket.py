"""The control socket's limits, and that no peer ends the process by hanging up."""

import errno
import os
import subprocess
import sys
import threading
from typing import Any
from unittest.mock import Mock

import pytest
import zmq

from sglang_tpla.transfer.network.control_socket import configure
from sglang_tpla.transfer.network.event_loop import IoLoop
from tests.wire import rig
from tests.wire.rig import settings

ROUNDS = 8  # with ZMQ's heartbeats, three out of four rounds end the process

# A router closes while its peer, which has not read, sends a message and resets the connection.
CLOSING = f"""
import socket, struct, threading, zmq
from sglang_tpla.transfer.network.control_socket import configure
from tests.wire.rig import settings

def named(name, value):
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value

GREETING = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + b"NULL".ljust(20, b"\\0") + bytes(32)  # ZMTP 3.0
READY = b"\\x05READY" + named(b"Socket-Type", b"DEALER") + named(b"Identity", b"peer")

def message(body):
    return b"\\x00" + bytes([len(body)]) + body

for _ in range({ROUNDS}):
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    configure(router, settings(), 1 << 20)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", port))
    peer.sendall(GREETING)
    answered = 0
    while answered < len(GREETING):
        answered += len(peer.recv(len(GREETING) - answered))
    peer.sendall(b"\\x04" + bytes([len(READY)]) + READY + message(b"hello"))
    assert router.recv_multipart() == [b"peer", b"hello"]
    for _ in range(400):
        router.send_multipart([b"peer", bytes(60_000)])
    end = threading.Thread(target=context.destroy, kwargs={{"linger": 100}})
    end.start()
    peer.sendall(message(b"late"))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    end.join()
"""


def test_a_peer_that_hangs_up_while_a_socket_closes_ends_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", CLOSING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("timeout_s", "idle_s", "most_ms"), [(30.0, 10, 30_000), (2.0, 1, 2_000), (0.2, 1, 200)])
def test_a_silent_network_is_borne_as_long_as_a_silent_peer(timeout_s: float, idle_s: int, most_ms: int) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        configure(dealer, settings(peer_timeout_s=timeout_s), 1 << 20)
        assert [dealer.getsockopt(option) for option in (zmq.TCP_KEEPALIVE, zmq.TCP_KEEPALIVE_CNT)] == [1, 3]
        assert dealer.getsockopt(zmq.TCP_KEEPALIVE_IDLE) == dealer.getsockopt(zmq.TCP_KEEPALIVE_INTVL) == idle_s
        assert dealer.getsockopt(zmq.TCP_MAXRT) == most_ms
        assert dealer.getsockopt(zmq.HEARTBEAT_IVL) == 0


def test_segments_are_unmapped_while_the_scheduler_connects_to_another_rank() -> None:
    decode = rig.decode_rank()
    connections = decode.agent.connections

    class Segments(dict[str, memoryview]):
        def values(self) -> Any:
            thread.start()
            thread.join(0.1)  # it may have to wait for this one
            return super().values()

    with rig.serving(decode):
        thread = threading.Thread(target=decode.agent.connect, args=("127.0.0.1", 2))
        decode.agent.connect("127.0.0.1", 1)
        connections.table["127.0.0.1", 1].segments = Segments()
        connections._forget_maps()
        thread.join()
        assert list(connections.table) == [("127.0.0.1", 1), ("127.0.0.1", 2)]


@pytest.mark.parametrize(
    ("owner", "name", "error", "reason"),
    [
        (zmq.Context, "socket", zmq.ZMQError(errno.EMFILE), "cannot be connected to: Too many open files"),
        (
            IoLoop,
            "tcp_socket",
            OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
            "can be had: [Errno 24] Too many open",
        ),
    ],
    ids=["control", "data"],
)
def test_no_socket_to_be_had_fails_a_request_with_the_reason_and_not_the_next_one(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception, reason: str
) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Mock(side_effect=error))
            decode.agent.open_room(1, [prefill.peer])
            rig.fail(1, reason, decode)
        rig.transfer(prefill, decode, room=2)
    assert decode.agent.stats().internal_errors == 0
