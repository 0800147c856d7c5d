"""The control socket: limits, timeouts and addresses of the ZMQ connection that carries messages.

ZMQ's own heartbeats stay off. In libzmq 4.3.5 their timer ends the process (``Assertion failed: !_io_error``) if a
socket closes at the moment that its peer hangs up. The agents have heartbeats of their own (Ping), and TCP keep-alive
detects a silent network.
"""

import zmq

from sglang_tpla.config import Settings
from sglang_tpla.transfer.network.data_channel import KEEPALIVES, keepalive_s

QUEUE_FRAMES = 16384  # high-water mark of a socket, in messages; credits bound the bytes
SOCKET_BUFFER_BYTES = 4 << 20  # the system may give less
MAX_PARTS = 3


def configure(socket: zmq.Socket, settings: Settings, max_message_bytes: int) -> None:
    """Set the limits of a ZMQ socket, and the time after which it gives up a silent network."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
    socket.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
    socket.setsockopt(zmq.SNDBUF, SOCKET_BUFFER_BYTES)
    socket.setsockopt(zmq.RCVBUF, SOCKET_BUFFER_BYTES)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVES)
    for option in (zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL):
        socket.setsockopt(option, keepalive_s(settings.peer_timeout_s))
    socket.setsockopt(zmq.TCP_MAXRT, max(1, int(settings.peer_timeout_s * 1000)))


def receive_parts(socket: zmq.Socket) -> list[zmq.Frame] | None:
    """Return the frames of one message, at most MAX_PARTS + 1 of them; the last shows that there were too many. Return
    None if there is no message.
    """
    try:
        parts = [socket.recv(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None
    while parts[-1].more if len(parts) <= MAX_PARTS else socket.getsockopt(zmq.RCVMORE):
        part = socket.recv(zmq.NOBLOCK, copy=False)
        if len(parts) <= MAX_PARTS:
            parts.append(part)
    return parts


def endpoint(host: str, port: int | str) -> str:
    """Return the ZMQ address of a host (name, IPv4 or IPv6) and port."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
