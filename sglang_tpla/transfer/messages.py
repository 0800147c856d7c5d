"""The wire format: one header frame, and for some messages one payload frame (PROTOCOL.md is the specification).

A header is ``b"TPLA"``, the framing version, a digest of the rest, and one msgpack array: a message tag, then the
message's fields in order. The digest keeps a flipped bit in, say, ``first_token`` from writing good rows to a wrong
place. Decoding is strict: a wrong digest, unknown tags, missing or extra fields, wrong types and values out of range
are all `FrameError`, and nothing larger than ``MAX_HEADER_BYTES`` is decoded.
"""

from typing import Annotated, Any, TypeAlias

import msgspec
import xxhash
from msgspec import Meta

from sglang_tpla.errors import SglangTplaError

FRAMING_VERSION = 2
PROTOCOL_VERSIONS = (5, 5)  # lowest and highest protocol version this release speaks
PREFIX = b"TPLA" + bytes([FRAMING_VERSION])
HEAD_BYTES = len(PREFIX) + 8  # prefix and digest
MAX_HEADER_BYTES = 64 << 10
CHANNEL_TOKEN_BYTES = 16
CHANNEL_KEY_BYTES = 32  # AES-256
CHECKSUM_BYTES = 8
MAX_LAYERS = 1024
MAX_PROJECTION_BYTES = 64 << 20  # one layer's matrix: 4096 x 4096 float32
MAX_METADATA_BYTES = 16 << 20
MAX_COLOCATED = 256
MAX_OFFSETS = 4096
OPENED, DAMAGED = b"", b"damaged"  # the result of a sealed chunk's tag, in place of a checksum
MAX_ROOMS = 4096  # in one Expected
MAX_BITMAP_BYTES = 16 << 10  # of a Resume
MAX_SEQUENCES = 8 * MAX_BITMAP_BYTES  # chunks of one part of a room

Buffer: TypeAlias = bytes | bytearray | memoryview
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Small = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[tuple[Small, ...], Meta(min_length=1, max_length=MAX_LAYERS)]
Name = Annotated[str, Meta(max_length=256)]
Sentence = Annotated[str, Meta(max_length=2048)]
Bitmap = Annotated[bytes, Meta(max_length=MAX_BITMAP_BYTES)]
Digest = Annotated[bytes, Meta(min_length=CHECKSUM_BYTES, max_length=CHECKSUM_BYTES)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Key = Annotated[bytes, Meta(min_length=CHANNEL_KEY_BYTES, max_length=CHANNEL_KEY_BYTES)]
ChannelToken = Annotated[bytes, Meta(min_length=CHANNEL_TOKEN_BYTES, max_length=CHANNEL_TOKEN_BYTES)]


class FrameError(SglangTplaError, ValueError):
    """A frame that is not of this protocol; the text names the error."""


class FramingVersionError(FrameError):
    """A sound frame of another framing version."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: a msgpack array ``[tag, field, ...]``."""


class _RoomMessage(_Message, frozen=True):
    """Base of messages about one generation of a room."""

    room: Count
    generation: Count


class _ChunkMessage(_RoomMessage, frozen=True):
    """Base of messages about one chunk of a room."""

    part: Small
    sequence: Small


class CacheLayout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The layout of a decode rank's cache, which a prefill rank checks before it serves the decode rank."""

    first_layer: Small
    latent_dim: Positive
    rope_dim: Small
    dtype: Name
    page_size: Positive
    widths: Layers
    shared: Layers
    metadata_bytes: Annotated[tuple[Small, ...], Meta(max_length=64)]


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Anonymous shared memory of an agent, which a process of the same host and user can map."""

    agent: Name
    pid: Positive
    descriptor: Small
    size_bytes: Count
    token: Digest


class DataChannel(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The offer of a data channel: its port, the token that binds it to this connection, and the key that seals chunks.
    There is no key if this connection is not encrypted.
    """

    port: Port
    token: ChannelToken
    key: Key | None


class Hello(_Message, frozen=True, tag=1):
    """decode -> prefill, first message of a connection."""

    versions: tuple[Small, Small]
    agent: Name
    model_hash: Name
    rank: Small
    size: Positive
    host: Name
    max_chunk_bytes: Positive
    layout: CacheLayout
    projection: Name
    common: Name
    segment: Segment | None


class Welcome(_Message, frozen=True, tag=2):
    """prefill -> decode: the rank is registered, or with ``need_projection`` will be after its projection has come.

    ``age_ms`` is the agent's age; ``context_tokens`` and ``pool_tokens`` are the longest prompts that fit; 0: not said.
    """

    version: Small
    agent: Name
    host: Name
    first_layer: Small
    layers: Positive
    need_projection: bool
    segment: Segment | None
    data: DataChannel
    age_ms: Count
    context_tokens: Small
    pool_tokens: Small


class Refused(_Message, frozen=True, tag=3):
    """prefill -> decode: this rank will not be served. The message keeps its form in every framing version."""

    reason: Sentence


class ProjectionLayer(_Message, frozen=True, tag=4):
    """decode -> prefill, payload float32 ``[d, w]``: one layer of the projection, in order."""

    projection: Name
    index: Small
    checksum: Digest


class Ping(_Message, frozen=True, tag=5):
    """Either way, to show a sign of life; answered with Pong."""

    number: Count


class Pong(_Message, frozen=True, tag=6):
    number: Count


class Unregistered(_Message, frozen=True, tag=7):
    """prefill -> decode: register again. The peer is not known here, or messages or chunks were lost."""


class Request(_RoomMessage, frozen=True, tag=8):
    """decode -> prefill: pages are ready for the ``share_index``-th of ``share_count`` shares (`chunks.share_of`)."""

    expected_ranks: Positive
    prefix_tokens: Small
    num_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)]
    dummy: bool
    share_index: Small
    share_count: Positive


class Want(_RoomMessage, frozen=True, tag=9):
    """prefill -> decode: the total chunk bytes of this room that are ready or sent so far."""

    total_bytes: Count


class Credit(_RoomMessage, frozen=True, tag=10):
    """decode -> prefill: the total chunk bytes of this room that may be sent so far."""

    total_bytes: Count


class Chunk(_ChunkMessage, frozen=True, tag=11):
    """prefill -> decode, payload: rows of some layers and tokens, layer by layer, token by token.

    With ``relay`` the receiver also keeps the payload in its segment for its colocated ranks, and answers `Stored`.
    """

    relay: bool
    first_layer: Small
    layers: Positive
    first_token: Small
    tokens: Positive
    checksum: Digest


class Ack(_ChunkMessage, frozen=True, tag=12):
    """decode -> prefill: this chunk is in the pool."""


class Nack(_ChunkMessage, frozen=True, tag=13):
    """decode -> prefill: this chunk came damaged; send it again."""


class Finish(_RoomMessage, frozen=True, tag=14):
    """prefill -> decode, payload metadata row: this rank's ``chunks`` chunks of ``tokens`` tokens are all there are."""

    chunks: Small
    tokens: Small
    checksum: Digest


class Done(_RoomMessage, frozen=True, tag=15):
    """decode -> prefill: every chunk and the metadata row are written."""


class Abort(_RoomMessage, frozen=True, tag=16):
    """Either way: this generation of the room is over."""

    reason: Sentence


class Registered(_Message, frozen=True, tag=17):
    """prefill -> decode: the projection has come whole; rooms may be asked for."""

    projection: Name


class Goodbye(_Message, frozen=True, tag=18):
    """Either way: this agent closes; its rooms are over."""

    reason: Sentence


class Colocated(_Message, frozen=True, tag=19):
    """prefill -> decode: the whole list of the other registered ranks of your host; answered with Mapped."""

    number: Count
    segments: Annotated[tuple[Segment, ...], Meta(max_length=MAX_COLOCATED)]


class Mapped(_Message, frozen=True, tag=20):
    """decode -> prefill: the whole list of the agents whose segments this rank can read."""

    number: Count
    agents: Annotated[tuple[Name, ...], Meta(max_length=MAX_COLOCATED + 1)]


class Share(_ChunkMessage, frozen=True, tag=21):
    """prefill -> decode: a chunk whose payload lies in a segment that this rank has mapped."""

    first_layer: Small
    layers: Positive
    first_token: Small
    tokens: Positive
    checksum: Digest
    agent: Name
    offset: Count
    size_bytes: Positive


class Stored(_ChunkMessage, frozen=True, tag=22):
    """decode -> prefill: this chunk is in the pool, and at ``offset`` of this rank's segment until released."""

    offset: Count


class Release(_Message, frozen=True, tag=23):
    """prefill -> decode: nobody reads these places of the segment any more."""

    offsets: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_OFFSETS)]


class Resume(_RoomMessage, frozen=True, tag=24):
    """decode -> prefill, after a Request that repeats the first one: go on with this room on a new connection.

    ``applied`` has a bitmap for each part: bit ``s % 8`` of byte ``s // 8`` is set for chunks in the pool.
    Both sides count chunk bytes from ``credit_bytes`` on.
    """

    credit_bytes: Count
    applied: Annotated[tuple[tuple[Small, Bitmap], ...], Meta(max_length=3)]


class Expected(_Message, frozen=True, tag=25):
    """decode -> prefill: this rank knows these rooms, and will ask for them when it has pages."""

    rooms: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_ROOMS)]


class Capacity(_Message, frozen=True, tag=26):
    """decode -> prefill, after Welcome: the longest prompts that fit in this rank's context and pool; 0: not said."""

    context_tokens: Small
    pool_tokens: Small


Message: TypeAlias = (
    Hello | Welcome | Refused | ProjectionLayer | Ping | Pong | Unregistered | Request | Want | Credit | Chunk |
    Ack | Nack | Finish | Done | Abort | Registered | Goodbye | Colocated | Mapped | Share | Stored | Release |
    Resume | Expected | Capacity
)  # fmt: skip
WITH_PAYLOAD = (ProjectionLayer, Chunk, Finish)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def checksum(data: Buffer) -> bytes:
    """Return the xxh3 (64 bits, big-endian) of a payload."""
    return xxhash.xxh3_64_digest(data)


def running_checksum() -> xxhash.xxh3_64:
    """Return a `checksum` over pieces: call ``update(piece)`` in order, then ``digest()``."""
    return xxhash.xxh3_64()


def sentence(text: str) -> str:
    """Cut ``text`` to the length of a `Sentence`, and escape lone surrogates, which a client's text may hold."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 2048 else text[:2045] + "..."


def encode(message: Message) -> bytes:
    """Return the header frame of a message."""
    return seal(_encoder.encode(message))


def seal(body: bytes, version: int = FRAMING_VERSION) -> bytes:
    """Return the header frame around an encoded array."""
    return PREFIX[:4] + bytes([version]) + xxhash.xxh3_64_digest(body, seed=version) + body


def decode(header: Buffer, has_payload: bool) -> Message:
    """Return the message in a header frame.

    Raises:
        FramingVersionError: the header has another framing version and is no `Refused`.
        FrameError: the header is not of this protocol, damaged or malformed, or has a payload that it must not have, or
            lacks one that it must have.
    """
    view = memoryview(header)
    if view.nbytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header has at most {MAX_HEADER_BYTES} bytes; got {view.nbytes}")
    if view.nbytes <= HEAD_BYTES or bytes(view[:4]) != PREFIX[:4]:
        raise FrameError(
            f"a header starts with {PREFIX[:4]!r} and has over {HEAD_BYTES} bytes; got {bytes(view[:8])!r}"
        )
    version, body = view[4], view[HEAD_BYTES:]
    if xxhash.xxh3_64_digest(body, seed=version) != view[len(PREFIX) : HEAD_BYTES]:
        raise FrameError("a header came damaged: its digest does not match")
    other = FramingVersionError(
        f"framing version is {FRAMING_VERSION}; got {version}: run the same release on both sides"
    )
    try:
        message: Message = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        if version != FRAMING_VERSION:
            raise other from error
        raise FrameError(f"malformed header: {error}") from error
    if version != FRAMING_VERSION and not isinstance(message, Refused):
        raise other
    if has_payload != isinstance(message, WITH_PAYLOAD):
        raise FrameError(f"{type(message).__name__} comes {'with' if not has_payload else 'without'} a payload frame")
    return message
