"""Peers that speak the protocol by hand, to send what no agent would."""

from __future__ import annotations

import time

import zmq

from sglang_tpla.transfer import messages as frames
from tests.wire import rig


class FakeDecode:
    """A bare DEALER socket to a prefill agent."""

    def __init__(self, port: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def send(self, *parts: bytes) -> None:
        """Frames as they are."""
        self.socket.send_multipart(parts)

    def say(self, message: frames.Message, payload: bytes | None = None) -> None:
        """A message."""
        self.send(frames.encode(message), *([] if payload is None else [payload]))

    def read(self, timeout_s: float = 10.0) -> tuple[frames.Message, bytes | None]:
        """The next message."""
        assert self.socket.poll(int(timeout_s * 1000)), "no answer"
        parts = self.socket.recv_multipart()
        return frames.decode(parts[0], len(parts) > 1), parts[1] if len(parts) > 1 else None

    def expect(self, kind: type, timeout_s: float = 10.0) -> tuple[frames.Message, bytes | None]:
        """The next message of a kind."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            message, payload = self.read(timeout_s)
            if isinstance(message, kind):
                return message, payload
        raise AssertionError(f"no {kind.__name__}")

    def register(self, **changes: object) -> None:
        """Say Hello as a raw-latent rank and read the welcome."""
        self.say(hello(**changes))
        self.expect(frames.Welcome)

    def close(self) -> None:
        """Free the socket."""
        self.socket.close()
        self.context.term()


class FakePrefill:
    """A bare ROUTER socket that welcomes one decode agent."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.identity = b""

    @property
    def peer(self) -> tuple[str, int, bool]:
        """As a sending peer of ``open_room``."""
        return ("127.0.0.1", self.port, False)

    def send(self, *parts: bytes) -> None:
        """Frames as they are."""
        self.socket.send_multipart((self.identity, *parts))

    def say(self, message: frames.Message, payload: bytes | None = None) -> None:
        """A message."""
        self.send(frames.encode(message), *([] if payload is None else [payload]))

    def expect(self, kind: type, timeout_s: float = 10.0) -> frames.Message:
        """The next message of a kind; pings are answered on the way."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self.socket.poll(int(timeout_s * 1000)), f"no {kind.__name__}"
            self.identity, header, *payload = self.socket.recv_multipart()
            message = frames.decode(header, bool(payload))
            if isinstance(message, kind):
                return message
            if isinstance(message, frames.Ping):
                self.say(frames.Pong(message.number))
        raise AssertionError(f"no {kind.__name__}")

    def welcome(self) -> None:
        """Read Hello and accept it."""
        self.expect(frames.Hello)
        self.say(welcome())

    def close(self) -> None:
        """Free the socket."""
        self.socket.close()
        self.context.term()


def welcome(data: frames.DataChannel | None = None, **changes: object) -> frames.Welcome:
    """What a prefill rank that has lived for an hour and takes any prompt answers."""
    fields = {
        "version": frames.PROTOCOL_VERSIONS[1],
        "agent": "fake",
        "host": "elsewhere",
        "first_layer": 0,
        "layers": rig.LAYERS,
        "need_projection": False,
        "arena": None,
        "data": data,
        "age_ms": 3_600_000,
        "context_tokens": 0,
        "pool_tokens": 0,
    }
    return frames.Welcome(**{**fields, **changes})


def hello(**changes: object) -> frames.Hello:
    """What a raw-latent decode rank of the rig says first."""
    layout = frames.CacheLayout(
        first_layer=0,
        latent_dim=rig.LATENT,
        rope_dim=rig.ROPE,
        dtype="bfloat16",
        page_size=rig.PAGE,
        widths=(rig.LATENT,) * rig.LAYERS,
        shared=(rig.LATENT,) * rig.LAYERS,
        metadata_bytes=rig.ITEM_BYTES,
    )
    fields = {
        "versions": frames.PROTOCOL_VERSIONS,
        "agent": "fake",
        "model_hash": "model",
        "rank": 0,
        "size": 1,
        "host": "",
        "max_chunk_bytes": 8192,
        "layout": layout,
        "projection": "",
        "common": "",
        "arena": None,
    }
    return frames.Hello(**{**fields, **changes})
