"""Sealed data channels: AES-256-GCM over each chunk, under a key that came in an encrypted Welcome (PROTOCOL.md).

Both ends count the chunks of their channel and derive the nonces from the count. A chunk that was changed, left out,
repeated, moved, or sealed for another channel does not open. The header is verified before anything acts on it. The
payload is decrypted in place, step by step, while it is in a core's caches: unverified rows may thus lie in a room's
pages, but the room cannot succeed before they are verified. Everything here runs on the I/O thread of the agent.
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
STEP_BYTES = 512 << 10  # small enough to stay in a core's own cache between the cipher and the socket
# so many chunks of at most 64 MiB are 2^38 blocks, where the bound on telling AES from random is 2^-53
CHUNKS_PER_KEY = 1 << 16
NEXT_KEY = b"tpla data channel: next key"


def new_key() -> bytes:
    """Return a new random key for one data channel."""
    return secrets.token_bytes(CHANNEL_KEY_BYTES)


class Seal:
    """One end of a sealed channel: its key, and the number of the current chunk.

    Args:
        key: from `new_key`, known only to the two ends of this channel.
        chunks_per_key: the number of chunks after which a one-way function derives the next key from this one.
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
        """Begin the next chunk. Return its header, decrypted and verified.

        Raises:
            FrameError: the header was not sealed as this chunk of this channel.
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
        """Return the cipher for the payload that follows the header that was sealed last."""
        context = Cipher(self._aes, GCM(self._nonce(1))).encryptor()
        context.authenticate_additional_data(header)
        return context

    def open_payload(self, header: bytes) -> AEADDecryptionContext:
        """Return the cipher for the payload that follows the header that was opened last."""
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
    """A payload that is sealed step by step and sent into a socket.

    Args:
        scratch: uint8 ``[STEP_BYTES]``, in use until all of the payload has been sent.
    """

    def __init__(self, pieces: IoVec, context: AEADEncryptionContext, scratch: np.ndarray) -> None:
        self.left_bytes = pieces.size_bytes
        self._cursor, self._context, self._scratch = Cursor(pieces), context, scratch
        self._step: SocketCopy | None = None  # sealed, and not yet sent

    def send(self, stream: socket.socket) -> int:
        """Send as much of one step as a socket takes now. Return how many bytes.

        Raises:
            BlockingIOError: the socket takes nothing now.
            OSError: the connection is gone.
        """
        if self._step is None or not self._step.left_bytes:
            self._step = SocketCopy(one_piece(self._scratch[: self._seal()]), UNCHECKED)
        sent = self._step.send(stream)
        self.left_bytes -= sent
        return sent

    def _seal(self) -> int:
        """Seal the next step into the scratch memory. Return its size in bytes."""
        size = 0
        for view in self._cursor.ahead(STEP_BYTES, MAX_PIECES):
            self._context.update_into(view, self._scratch.data[size : size + view.nbytes])
            size += view.nbytes
        self._cursor.advance(size)
        return size

    def digest(self) -> bytes:
        """Return the tag, once all of the payload has been sent. Call this once."""
        self._context.finalize()
        return self._context.tag


class SealedIntake:
    """A payload that is received into its pieces and decrypted there. It counts only once `is_proved` says so."""

    def __init__(self, pieces: IoVec, context: AEADDecryptionContext) -> None:
        self._intake, self._cursor, self._context = SocketCopy(pieces, UNCHECKED), Cursor(pieces), context

    def receive(self, stream: socket.socket, limit_bytes: int = STEP_BYTES) -> int:
        """Take the bytes that a socket has, as `SocketCopy.receive` does, and decrypt them."""
        size = left = self._intake.receive(stream, min(limit_bytes, STEP_BYTES))
        while left:
            for view in self._cursor.ahead(left, MAX_PIECES):
                self._context.update_into(view, view)
                self._cursor.advance(view.nbytes)
                left -= view.nbytes
        return size


def is_proved(context: AEADDecryptionContext, tag: bytes) -> bool:
    """Return whether the tag proves all that a context has decrypted. A context can be asked once."""
    try:
        context.finalize_with_tag(tag)
    except InvalidTag:
        return False
    return True
