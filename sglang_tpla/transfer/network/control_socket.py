"""The control socket: limits, heartbeats and addresses of the ZMQ connection that carries messages."""

import zmq

from sglang_tpla.config import Settings

QUEUE_FRAMES = 16384  # high-water mark of a socket, in messages; credits bound the bytes
SOCKET_BUFFER_BYTES = 4 << 20  # the system may give less
MAX_PARTS = 3


def configure(socket: zmq.Socket, settings: Settings, max_message_bytes: int) -> None:
    """Set the limits and heartbeats of a ZMQ socket."""
    timeout_ms = int(settings.peer_timeout_s * 1000)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
    socket.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
    socket.setsockopt(zmq.SNDBUF, SOCKET_BUFFER_BYTES)
    socket.setsockopt(zmq.RCVBUF, SOCKET_BUFFER_BYTES)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(settings.heartbeat_s * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout_ms)


def receive_parts(socket: zmq.Socket) -> list[zmq.Frame] | None:
    """Receive one message without blocking, at most MAX_PARTS frames of it (one more says there was more), or None."""
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
