"""Sealed data channels: AES-256-GCM over each chunk, under a key that came in an encrypted Welcome (PROTOCOL.md).

Both ends count the chunks of their channel, and the nonces with them. A chunk that was changed, left out, repeated,
moved, or sealed for another channel does not open. The header opens before anybody acts on it. The payload is opened
where it lies, step by step while it is in a core's caches: rows that have not been proved yet lie in pages of a room
that cannot succeed before they are. Everything here runs on the I/O thread of the channel's agent.
"""

import secrets
import socket

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext, Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from sglang_tpla.transfer.memory.copy import MAX_PIECES, UNCHECKED, SocketCopy
from sglang_tpla.transfer.memory.iovec import Cursor, IoVec, one_piece
from sglang_tpla.transfer.messages import CHANNEL_KEY_BYTES, FrameError

TAG_BYTES = 16
STEP_BYTES = 512 << 10  # sealed before it is sent, opened after it came: it stays in a core's own cache
# of at most 64 MiB: 2^38 blocks, where the bound on telling AES from random is 2^-53
CHUNKS_PER_KEY = 1 << 16
NEXT_KEY = b"tpla data channel: next key"


def new_key() -> bytes:
    """Return a key for one data channel, which was never used before."""
    return secrets.token_bytes(CHANNEL_KEY_BYTES)


class Seal:
    """One end of a sealed channel: its key, and the number of the chunk that is under way.

    Args:
        key: from `new_key`, known to the two ends of this channel alone.
        chunks_per_key: after so many the key is replaced by one derived from it, which cannot be turned back.
    """

    def __init__(self, key: bytes, chunks_per_key: int = CHUNKS_PER_KEY) -> None:
        self._key, self._chunks_per_key = key, chunks_per_key
        self._aes, self._headers = AES(key), AESGCM(key)
        self._chunk = -1

    def seal_header(self, sizes: bytes, header: bytes) -> bytes:
        """Begin the next chunk. Return its header, sealed with the two sizes before it."""
        self._advance()
        return self._headers.encrypt(self._nonce(0), header, sizes)

    def open_header(self, sizes: bytes, sealed: memoryview) -> bytes:
        """Begin the next chunk. Return its header.

        Raises:
            FrameError: it was not sealed as this chunk of this channel.
        """
        self._advance()
        try:
            return self._headers.decrypt(self._nonce(0), sealed, sizes)
        except InvalidTag:
            raise FrameError(
                f"the header of chunk {self._chunk} of a sealed channel does not open: it has another key, or bytes "
                "were changed, repeated, moved or left out on the way"
            ) from None

    def seal_payload(self, header: bytes) -> AEADEncryptionContext:
        """Return what seals the payload after the header that was sealed last."""
        context = Cipher(self._aes, GCM(self._nonce(1))).encryptor()
        context.authenticate_additional_data(header)
        return context

    def open_payload(self, header: bytes) -> AEADDecryptionContext:
        """Return what opens the payload after the header that was opened last."""
        context = Cipher(self._aes, GCM(self._nonce(1))).decryptor()
        context.authenticate_additional_data(header)
        return context

    def _advance(self) -> None:
        self._chunk += 1
        if self._chunk and self._chunk % self._chunks_per_key == 0:
            self._key = HKDFExpand(SHA256(), CHANNEL_KEY_BYTES, NEXT_KEY).derive(self._key)
            self._aes, self._headers = AES(self._key), AESGCM(self._key)

    def _nonce(self, which: int) -> bytes:
        return (2 * self._chunk + which).to_bytes(12, "big")


class SealedOutgoing:
    """A payload on its way from its pieces, sealed, into a socket.

    Args:
        scratch: uint8 ``[STEP_BYTES]``, this payload's until all of it has gone.
    """

    def __init__(self, pieces: IoVec, context: AEADEncryptionContext, scratch: np.ndarray) -> None:
        self.left_bytes = pieces.size_bytes
        self._cursor, self._context, self._scratch = Cursor(pieces), context, scratch
        self._step: SocketCopy | None = None  # sealed, and not yet sent

    def send(self, stream: socket.socket) -> int:
        """Send what a socket takes now of one step. Return the bytes.

        Raises:
            BlockingIOError: it takes nothing.
            OSError: the connection is gone.
        """
        if self._step is None or not self._step.left_bytes:
            self._step = SocketCopy(one_piece(self._scratch[: self._seal()]), UNCHECKED)
        sent = self._step.send(stream)
        self.left_bytes -= sent
        return sent

    def _seal(self) -> int:
        """Seal the next step. Return its bytes."""
        size = 0
        for view in self._cursor.ahead(STEP_BYTES, MAX_PIECES):
            self._context.update_into(view, self._scratch.data[size : size + view.nbytes])
            size += view.nbytes
        self._cursor.advance(size)
        return size

    def digest(self) -> bytes:
        """Return the tag, once all has gone."""
        self._context.finalize()
        return self._context.tag


class SealedIntake:
    """A payload on its way from a socket, opened, to its pieces. Its context must prove it before it counts."""

    def __init__(self, pieces: IoVec, context: AEADDecryptionContext) -> None:
        self._intake, self._cursor, self._context = SocketCopy(pieces, UNCHECKED), Cursor(pieces), context

    def receive(self, stream: socket.socket, limit_bytes: int = STEP_BYTES) -> int:
        """Take what is there, as `SocketCopy.receive` does, and open it."""
        size = left = self._intake.receive(stream, min(limit_bytes, STEP_BYTES))
        while left:
            for view in self._cursor.ahead(left, MAX_PIECES):
                self._context.update_into(view, view)
                self._cursor.advance(view.nbytes)
                left -= view.nbytes
        return size


def is_proved(context: AEADDecryptionContext, tag: bytes) -> bool:
    """Return whether all that a context opened is what was sealed. It can be asked once."""
    try:
        context.finalize_with_tag(tag)
    except InvalidTag:
        return False
    return True
