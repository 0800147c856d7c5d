"""The data channel of each connection: how it is dialled, read and ended."""

import errno
import os
from functools import partial
from typing import Protocol

import msgspec
import zmq

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.decode.in_place import InPlaceChunk
from sglang_tpla.transfer.decode.receiver import Receiver
from sglang_tpla.transfer.decode.state import Connection
from sglang_tpla.transfer.network.data_channel import BufferPool, ChannelError, ChunkReader, set_up
from sglang_tpla.transfer.network.sealing import Seal
from sglang_tpla.transfer.workers import Workers

DATA_TURN_BYTES = 64 << 20  # the limit on bytes read from one data channel before the others have a turn
DIALS = 3  # the dials that may go unanswered before the rooms that want the channel fail


class Control(Protocol):
    """The calls that a data channel makes to `Connections`."""

    def broken(self, connection: Connection) -> None: ...
    def give_up(self, connection: Connection, reason: str) -> None: ...
    def receive(self, connection: Connection) -> None: ...
    def take(self, connection: Connection, message: messages.Message, payload: memoryview | None) -> None: ...


class DataChannels:
    """The data channels of all connections. Everything runs on the I/O thread.

    Args:
        encrypted: True if a channel that is offered without a key must not be dialled.
        buffers: the source of staging memory.
    """

    def __init__(
        self, workers: Workers, receiver: Receiver, control: Control, encrypted: bool, buffers: BufferPool
    ) -> None:
        self._workers, self._receiver, self._control = workers, receiver, control
        self._io, self._patience_s = workers.io, workers.settings.peer_timeout_s
        self._encrypted, self._buffers = encrypted, buffers

    def dial(self, connection: Connection, came: zmq.Frame, data: messages.DataChannel) -> None:
        """Begin to connect a data channel to the host that a frame came from."""
        if self._encrypted and data.key is None:
            self._control.give_up(
                connection, f"the {connection.name} offers a data channel without a key; rows stay secret"
            )
            return
        host = str(came.get("Peer-Address"))
        self.end(connection)
        try:
            stream = self._io.tcp_socket(host)
            set_up(stream, self._patience_s)
        except OSError as full:  # too many open files
            self._control.give_up(connection, f"no data channel to the {connection.name} can be had: {full}")
            return
        seal = None if data.key is None else Seal(data.key)
        announce = partial(self._announced, connection)
        reader = connection.reader = ChunkReader(
            stream, data.token, self._workers.chunk_bytes, self._buffers, announce, seal
        )
        connection.data_port, connection.dialled = data.port, self._io.now()
        error = stream.connect_ex((host, data.port))
        self._io.add_stream(stream, lambda: self._receive(connection, reader))
        if error not in (0, errno.EINPROGRESS):
            # posted and not called, because the Welcome that offered the channel is still being handled
            self._io.post(self._lose, connection, reader, ChannelError(os.strerror(error)))
            return
        self._io.watch(stream, writable=True)

    def _receive(self, connection: Connection, reader: ChunkReader) -> None:
        try:
            if not reader.greeted:
                if reader.greet():
                    self._io.watch(reader.stream, writable=False)
                return
            for chunk, payload, checksum in reader.receive(DATA_TURN_BYTES):
                connection.without_channel = connection.starved_since = None
                whole = msgspec.structs.replace(chunk, checksum=checksum)
                if isinstance(payload, InPlaceChunk):
                    connection.last_chunk = self._io.now()
                    payload.chunk = whole
                    self._receiver.received(payload)
                elif isinstance(payload, memoryview):
                    self._control.take(connection, whole, payload)
                if connection.reader is not reader:
                    return
        except messages.FrameError as error:
            self._workers.drop("malformed_dropped", f"malformed chunk from {connection.name}: {error}")
            self._lose(connection, reader, error)
        except OSError as error:
            self._lose(connection, reader, error)

    def _announced(
        self, connection: Connection, header: memoryview, size_bytes: int
    ) -> tuple[messages.Chunk, InPlaceChunk | None]:
        """Decode a header from a data channel. Return the chunk and its payload's place in the pool (None: staging).

        Raises:
            FrameError: the header is anything but a sound Chunk.
        """
        message = messages.decode(header, True)
        if not isinstance(message, messages.Chunk):
            raise messages.FrameError(f"{type(message).__name__} does not come on a data channel")
        return message, self._receiver.place(connection, message, size_bytes)

    def _lose(self, connection: Connection, reader: ChunkReader, error: Exception) -> None:
        """Handle the end of a channel, or a channel that could not be opened."""
        if connection.reader is reader:
            self._control.receive(connection)  # a Goodbye may be waiting to be read
        if connection.reader is not reader:
            return
        now = self._io.now()
        stood = reader.greeted
        self.end(connection)
        text = "decode rank %d: no data channel to the %s: %s"
        self._workers.log.warning(text, self._workers.rank, connection.name, error)
        if stood and now - connection.dialled > self._patience_s:
            # the channel was stable for a while, so the failures before it do not count
            connection.without_channel, connection.starved_since = (now, None)
        connection.channel_error = str(error)
        self.seek(connection, stood)

    def seek(self, connection: Connection, lost: bool = False) -> None:
        """Connect again if a channel is wanted and there is none, or if chunks may have been lost with one. Fail the
        rooms that have waited for rows for `peer_timeout_s` without a channel that brought a chunk.
        """
        if connection.reader is not None:
            return
        now = self._io.now()
        if connection.without_channel is None:
            connection.without_channel = now
        starved = self._receiver.starved(connection)
        if not starved:
            if not self._receiver.uses(connection):
                connection.starved_since = None
            if lost and now - connection.without_channel <= self._patience_s:
                self._control.broken(connection)
            return
        if connection.starved_since is None:
            connection.starved_since = now  # the time in which no room wanted the channel does not count
        if now - connection.starved_since <= self._patience_s:
            self._control.broken(connection)
            return
        connection.without_channel = connection.starved_since = None  # the next room tries again
        for room in starved:
            self._receiver.fail(
                room,
                f"rows cannot be fetched from the {connection.name}: its data channel, port {connection.data_port}, "
                f"failed for {self._patience_s:g} s ({connection.channel_error}); let decode "
                "servers reach the transfer port and the one after it",
            )

    def expire(self, connection: Connection, now: float) -> None:
        """Give up a dial that nobody answers, because a firewall that drops packets reports no error."""
        reader, patience = connection.reader, self._patience_s / DIALS
        if reader is not None and not reader.greeted and now - connection.dialled > patience:
            self._lose(connection, reader, ChannelError(f"no answer for {patience:g} s"))

    def end(self, connection: Connection) -> None:
        """Close a connection's channel, if it has one."""
        reader, connection.reader = connection.reader, None
        if reader is not None:
            self._io.remove_stream(reader.stream)
            reader.close()
            if isinstance(reader.in_place, InPlaceChunk):
                self._receiver.abandoned(reader.in_place)
