"""Peers that speak the protocol by hand, to send messages that no agent would send."""

import socket
import time

import zmq

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.network.data_channel import PREAMBLE, PREAMBLE_BYTES, SIZES
from tests.wire import rig


def exactly(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = stream.recv(size - len(data))
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return data


TIMEOUT_S = 10
TOKEN = bytes(range(messages.CHANNEL_TOKEN_BYTES))


class FakeDecode:
    """A bare DEALER socket to a prefill agent, and its data channel once it has registered."""

    def __init__(self, port: int, *, reads_little: bool = False) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if reads_little:  # so that unread messages soon fill the other side's queue
            self.socket.setsockopt(zmq.RCVHWM, 1)
            self.socket.setsockopt(zmq.RCVBUF, 4096)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.stream: socket.socket | None = None

    def send(self, *parts: bytes) -> None:
        """Send frames as they are."""
        self.socket.send_multipart(parts)

    def say(self, message: messages.Message, payload: bytes | None = None) -> None:
        self.send(messages.encode(message), *([] if payload is None else [payload]))

    def read(self) -> tuple[messages.Message, bytes | None]:
        """Return the next message, or the next chunk of the data channel."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        if self.stream is not None:
            poller.register(self.stream, zmq.POLLIN)
        ready = dict(poller.poll(TIMEOUT_S * 1000))
        assert ready, "no answer"
        if self.socket not in ready and self.stream is not None:
            if not self.stream.recv(1, socket.MSG_PEEK):  # the channel was closed
                self.stream.close()
                self.stream = None
                return self.read()
            header_bytes, payload_bytes = SIZES.unpack(exactly(self.stream, SIZES.size))
            header, payload = exactly(self.stream, header_bytes), exactly(self.stream, payload_bytes)
            assert exactly(self.stream, messages.CHECKSUM_BYTES) == messages.checksum(payload)
            return messages.decode(header, True), payload
        parts = self.socket.recv_multipart()
        return messages.decode(parts[0], len(parts) > 1), parts[1] if len(parts) > 1 else None

    def expect(self, kind: type) -> tuple[messages.Message, bytes | None]:
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            message, payload = self.read()
            if isinstance(message, kind):
                return message, payload
        raise AssertionError(f"no {kind.__name__}")

    def register(self, **changes: object) -> None:
        """Say Hello as a raw-latent rank, read the welcome, and open the data channel that it offers."""
        self.say(hello(**changes))
        offer = self.expect(messages.Welcome)[0].data
        if self.stream is not None:  # left from an earlier registration
            self.stream.close()
        self.stream = socket.create_connection(("127.0.0.1", offer.port))
        self.stream.settimeout(10)
        self.stream.sendall(PREAMBLE + offer.token)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.socket.close()
        self.context.term()


class FakePrefill:
    """A bare ROUTER socket that welcomes one decode agent, and a port for its data channels.

    Attributes:
        key: the key that it offers with a data channel.
    """

    key: bytes | None = None

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.identity = b""
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(10)
        self.stream: socket.socket | None = None

    @property
    def peer(self) -> tuple[str, int, bool]:
        """The fake as a sending peer of ``open_room``."""
        return ("127.0.0.1", self.port, False)

    def send(self, *parts: bytes) -> None:
        """Send frames as they are."""
        self.socket.send_multipart((self.identity, *parts))

    def say(self, message: messages.Message, payload: bytes | None = None) -> None:
        """Send a message. A chunk goes on the data channel, with the checksum that it names."""
        header = messages.encode(message)
        if isinstance(message, messages.Chunk) and payload is not None:
            self.channel().sendall(SIZES.pack(len(header), len(payload)) + header + payload + message.checksum)
            return
        self.send(header, *([] if payload is None else [payload]))

    def channel(self) -> socket.socket:
        """Return the data channel, once the agent has opened it and sent the token."""
        if self.stream is None:
            self.stream = self.server.accept()[0]
            self.stream.settimeout(10)
            assert exactly(self.stream, PREAMBLE_BYTES) == PREAMBLE + TOKEN
        return self.stream

    def expect(self, kind: type) -> messages.Message:
        """Return the next message of a kind, and answer pings on the way."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            assert self.socket.poll(TIMEOUT_S * 1000), f"no {kind.__name__}"
            self.identity, header, *payload = self.socket.recv_multipart()
            message = messages.decode(header, bool(payload))
            if isinstance(message, kind):
                return message
            if isinstance(message, messages.Ping):
                self.say(messages.Pong(message.number))
        raise AssertionError(f"no {kind.__name__}")

    def welcome(self) -> None:
        """Read Hello and accept it."""
        self.expect(messages.Hello)
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        offer = messages.DataChannel(self.server.getsockname()[1], TOKEN, self.key)
        self.say(welcome(offer))

    def close(self) -> None:
        self.server.close()
        if self.stream is not None:
            self.stream.close()
        self.socket.close()
        self.context.term()


def welcome(data: messages.DataChannel, **changes: object) -> messages.Welcome:
    """Return the Welcome of a prefill rank that is an hour old and accepts any prompt."""
    fields = {
        "version": messages.PROTOCOL_VERSIONS[1],
        "agent": "fake",
        "host": "elsewhere",
        "first_layer": 0,
        "layers": rig.LAYERS,
        "need_projection": False,
        "segment": None,
        "data": data,
        "age_ms": 3_600_000,
        "context_tokens": 0,
        "pool_tokens": 0,
    }
    return messages.Welcome(**{**fields, **changes})


def hello(**changes: object) -> messages.Hello:
    """Return the Hello of a decode rank with the rig's sizes that caches the whole latent."""
    layout = messages.CacheLayout(
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
        "versions": messages.PROTOCOL_VERSIONS,
        "agent": "fake",
        "model_hash": "model",
        "rank": 0,
        "size": 1,
        "host": "",
        "max_chunk_bytes": 8192,
        "layout": layout,
        "projection": "",
        "common": "",
        "segment": None,
    }
    return messages.Hello(**{**fields, **changes})
