"""Inside the decode agent: the data channel of each connection, what comes on it, and what its end means.

Everything here runs on the agent's I/O thread.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from abc import abstractmethod
from functools import partial

import msgspec
import zmq

from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.landing import PoolLanding
from sglang_tpla.transfer.decode.state import Connection, Room
from sglang_tpla.transfer.network.data_channel import ChannelError, ChunkReader, Spares, set_up
from sglang_tpla.transfer.network.sealing import Seal
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.workers import Agent

DATA_TURN_BYTES = 64 << 20  # read from one data channel before others have a turn
DIALS = 3  # that nobody answers, in the time that a prefill rank without a channel is borne


class DecodeChannels(Agent[Room]):
    """Data channels of `DecodeAgent`."""

    _security: Security
    _spares: Spares

    @abstractmethod
    def _place(self, connection: Connection, chunk: frames.Chunk, size_bytes: int) -> PoolLanding | None:
        """The place in the pool of a chunk that begins to come; None for staging."""

    @abstractmethod
    def _landed(self, landing: PoolLanding) -> None:
        """A chunk has come whole."""

    @abstractmethod
    def _abandon(self, landing: PoolLanding) -> None:
        """The rest of a chunk will not come."""

    @abstractmethod
    def _starved(self, connection: Connection) -> list[Room]:
        """Rooms that want rows that have not come over this connection."""

    @abstractmethod
    def _fail_from_io(self, entry: Room, reason: str) -> None:
        """Fail a room."""

    @abstractmethod
    def _give_up(self, connection: Connection, reason: str) -> None:
        """End a connection; its rooms fail."""

    @abstractmethod
    def _take(self, connection: Connection, message: frames.Message, payload: memoryview | None) -> None:
        """One message of a connection."""

    @abstractmethod
    def _receive(self, connection: Connection) -> None:
        """What has come from the prefill rank."""

    @abstractmethod
    def _broken(self, connection: Connection) -> None:
        """Connect anew; rooms go on where they were."""

    def _dial_data(self, connection: Connection, came: zmq.Frame, data: frames.DataChannel) -> None:
        """Begin to connect a data channel to where a frame came from."""
        if self._security.secret is not None and data.key is None:
            self._give_up(
                connection, f"the {connection.name} offers a data channel without a key; rows stay secret"
            )
            return
        host = str(came.get("Peer-Address"))
        self._end_data(connection)
        stream = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        set_up(stream, self._settings.peer_timeout_s)
        seal = None if data.key is None else Seal(data.key)
        announce = partial(self._announced, connection)
        inbox = connection.inbox = ChunkReader(
            stream, data.cookie, self._chunk_bytes, self._spares, announce, seal
        )
        connection.data_port, connection.dialled = data.port, time.monotonic()
        error = stream.connect_ex((host, data.port))
        self._io.add_stream(stream, lambda: self._receive_data(connection, inbox))
        if error not in (0, errno.EINPROGRESS):
            # a Welcome is being read: what comes after it has to wait
            self._io.post(self._lose_data, connection, inbox, ChannelError(os.strerror(error)))
            return
        self._io.watch(stream, writable=True)

    def _receive_data(self, connection: Connection, inbox: ChunkReader) -> None:
        try:
            if not inbox.greeted:
                if inbox.greet():
                    self._io.watch(inbox.stream, writable=False)
                return
            for chunk, payload, checksum in inbox.receive(DATA_TURN_BYTES):
                connection.without_channel = None
                whole = msgspec.structs.replace(chunk, checksum=checksum)
                if isinstance(payload, PoolLanding):
                    connection.last_seen = time.monotonic()
                    payload.chunk = whole
                    self._landed(payload)
                elif isinstance(payload, memoryview):
                    self._take(connection, whole, payload)
                if connection.inbox is not inbox:
                    return
        except frames.FrameError as error:
            self._drop("malformed_dropped", f"malformed chunk from {connection.name}: {error}")
            self._lose_data(connection, inbox, error)
        except OSError as error:
            self._lose_data(connection, inbox, error)

    def _announced(
        self, connection: Connection, header: memoryview, size_bytes: int
    ) -> tuple[frames.Chunk, PoolLanding | None]:
        """What a header on a data channel says, and where its payload lands, if not in staging.

        Raises:
            FrameError: anything but a sound Chunk.
        """
        message = frames.decode(header, True)
        if not isinstance(message, frames.Chunk):
            raise frames.FrameError(f"{type(message).__name__} does not come on a data channel")
        return message, self._place(connection, message, size_bytes)

    def _lose_data(self, connection: Connection, inbox: ChunkReader[frames.Chunk], error: Exception) -> None:
        """A channel ended, or could not be opened."""
        if connection.inbox is inbox:
            self._receive(connection)  # what was said last: a Goodbye, perhaps
        if connection.inbox is not inbox:
            return
        now = time.monotonic()
        stood = inbox.greeted
        self._end_data(connection)
        text = "decode rank %d: no data channel to the %s: %s"
        self._log.warning(text, self._rank, connection.name, error)
        if stood and now - connection.dialled > self._settings.peer_timeout_s:
            connection.without_channel = now  # what was before is another matter
        connection.channel_error = str(error)
        self._seek_channel(connection, stood)

    def _seek_channel(self, connection: Connection, lost: bool = False) -> None:
        """Connect anew where a channel is wanted and there is none, or where chunks may have been lost with one. Where
        for some time none has lasted until a chunk has come on it, the rooms that want one fail.
        """
        if connection.inbox is not None:
            return
        now = time.monotonic()
        if connection.without_channel is None:
            connection.without_channel = now
        starved = self._starved(connection)
        if now - connection.without_channel <= self._settings.peer_timeout_s:
            if lost or starved:
                self._broken(connection)
            return
        if starved:
            connection.without_channel = None  # the next room tries anew
        for entry in starved:
            self._fail_from_io(
                entry,
                f"rows cannot be fetched from the {connection.name}: its data channel, port {connection.data_port}, "
                f"failed for {self._settings.peer_timeout_s:g} s ({connection.channel_error}); let decode servers "
                "reach the transfer port and the one after it",
            )

    def _expire_channel(self, connection: Connection, now: float) -> None:
        """Give a dial up that nobody answers: whoever drops it says nothing."""
        inbox, patience = connection.inbox, self._settings.peer_timeout_s / DIALS
        if inbox is not None and not inbox.greeted and now - connection.dialled > patience:
            self._lose_data(connection, inbox, ChannelError(f"no answer for {patience:g} s"))

    def _end_data(self, connection: Connection) -> None:
        inbox, connection.inbox = connection.inbox, None
        if inbox is not None:
            self._io.remove_stream(inbox.stream)
            inbox.close()
            if isinstance(inbox.landing, PoolLanding):
                self._abandon(inbox.landing)
