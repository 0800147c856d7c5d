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
from sglang_tpla.transfer.network.data_channel import ChannelError, Inbox, Spares, set_up
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.workers import Agent

DATA_TURN_BYTES = 64 << 20  # read from one data channel before others have a turn
MAX_CHANNELS_LOST = 3  # one after the other, before a connection goes on without


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
    def _in_use(self, connection: Connection) -> bool:
        """Whether a room that is not complete waits for this connection, or something is kept for its neighbours."""

    @abstractmethod
    def _take(self, connection: Connection, message: frames.Message, payload: memoryview | None) -> None:
        """One message of a connection."""

    @abstractmethod
    def _broken(self, connection: Connection) -> None:
        """Connect anew; rooms go on where they were."""

    def _dial_data(self, connection: Connection, came: zmq.Frame, data: frames.DataChannel) -> None:
        """Begin to connect a data channel to where a frame came from; without one, chunks come over ZMQ."""
        if self._security.secret is not None or not self._settings.data_channel:
            return
        host = str(came.get("Peer-Address"))
        self._end_data(connection)
        stream = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        set_up(stream, self._settings.peer_timeout_s)
        limit = self._chunk_bytes
        announce = partial(self._announced, connection)
        inbox = connection.inbox = Inbox(stream, data.cookie, limit, self._spares, announce)
        error = stream.connect_ex((host, data.port))
        self._io.add_stream(stream, lambda: self._receive_data(connection, inbox))
        if error not in (0, errno.EINPROGRESS):
            self._lose_data(connection, ChannelError(os.strerror(error)))
            return
        self._io.watch(stream, writable=True)

    def _receive_data(self, connection: Connection, inbox: Inbox) -> None:
        try:
            if not inbox.greeted:
                if inbox.greet():
                    self._io.watch(inbox.stream, writable=False)
                return
            for chunk, payload, checksum in inbox.receive(DATA_TURN_BYTES):
                connection.channels_lost = 0
                sealed = msgspec.structs.replace(chunk, checksum=checksum)
                if isinstance(payload, PoolLanding):
                    connection.last_seen = time.monotonic()
                    payload.chunk = sealed
                    self._landed(payload)
                elif isinstance(payload, memoryview):
                    self._take(connection, sealed, payload)
                if connection.inbox is not inbox:
                    return
        except frames.FrameError as error:
            self._drop("malformed_dropped", f"malformed chunk from {connection.name}: {error}")
            self._lose_data(connection, error)
        except OSError as error:
            self._lose_data(connection, error)

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

    def _lose_data(self, connection: Connection, error: Exception) -> None:
        """Connect anew: chunks may have been lost with the channel, and without one all go over ZMQ. Go on without
        where none can be opened, or where none lasts until a chunk has come on it.
        """
        inbox = connection.inbox
        stood = inbox is not None and inbox.greeted
        begun = inbox is not None and inbox.received_bytes > 0
        connection.channels_lost += 1
        self._end_data(connection)
        text = "decode rank %d: no data channel to the %s: %s"
        self._log.warning(text, self._rank, connection.name, error)
        if (stood and connection.channels_lost < MAX_CHANNELS_LOST) or (begun and self._in_use(connection)):
            self._broken(connection)

    def _end_data(self, connection: Connection) -> None:
        inbox, connection.inbox = connection.inbox, None
        if inbox is not None:
            self._io.remove_stream(inbox.stream)
            inbox.close()
            if isinstance(inbox.landing, PoolLanding):
                self._abandon(inbox.landing)
