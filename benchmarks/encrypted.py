"""Other encrypted carriers of a cache: TLS 1.3, and ZMQ with CURVE, which carried chunks before.

TLS moves bytes between two buffers, like the raw socket. ZMQ carries chunks as agents with keys did: each chunk is
copied and checked into a slot, sent from there without a copy, received, checked and copied to its place, with as many
in flight as a room may have. Without keys the path is the same, but without CURVE.
"""

import datetime
import ssl
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import zmq
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from machine import cpu_seconds

from sglang_tpla.transfer.decode.credits import WINDOW_CHUNKS
from sglang_tpla.transfer.memory.copy import copy_pieces
from sglang_tpla.transfer.memory.iovec import one_piece

CHUNK_BYTES = 16 << 20


def certificate(folder: Path) -> Path:
    """Write a key and its self-signed certificate for one day into one file, and return the path."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, SHA256())
    )
    path = folder / "tls.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + made.public_bytes(Encoding.PEM))
    return path


def tls_server() -> ssl.SSLContext:
    """Return the receiving end's context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:
        context.load_cert_chain(certificate(Path(folder)))
    return context


def tls_client() -> ssl.SSLContext:
    """Return the sending end's context, without a check of the certificate: a check only costs time at the start."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def zmq_child(pipe: Connection, target: np.ndarray, encrypted: bool) -> None:
    """Run the receiving end of ZMQ."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    port, server_key = pipe.recv()
    if encrypted:
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = server_key
    dealer.connect(f"tcp://127.0.0.1:{port}")
    while (want := pipe.recv()) is not None:
        before, got = cpu_seconds(), 0
        dealer.send(b"begin")
        while got < want:
            header, payload = dealer.recv_multipart(copy=False)
            data = np.frombuffer(payload.buffer, dtype=np.uint8)
            digest = copy_pieces(one_piece(data), one_piece(target[got : got + data.size]))
            assert digest == header.bytes
            got += data.size
            dealer.send(b"ack")
        pipe.send(cpu_seconds() - before)
    context.destroy(linger=0)


def zmq_sender(source: np.ndarray, encrypted: bool) -> tuple[tuple[int, bytes], Callable[[int], None]]:
    """Return the sending end of ZMQ: its port and key, and a function that sends so many bytes."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    public, secret = zmq.curve_keypair()
    if encrypted:
        router.curve_server, router.curve_secretkey = True, secret
    port = router.bind_to_random_port("tcp://127.0.0.1")
    slots = [np.empty(CHUNK_BYTES, dtype=np.uint8) for _ in range(WINDOW_CHUNKS)]
    trackers: list[zmq.MessageTracker | None] = [None] * WINDOW_CHUNKS

    def send(size: int) -> None:
        identity, _ = router.recv_multipart()
        under_way = 0
        for number, start in enumerate(range(0, size, CHUNK_BYTES)):
            if under_way == WINDOW_CHUNKS:
                router.recv_multipart()
                under_way -= 1
            place = number % WINDOW_CHUNKS
            while (tracker := trackers[place]) is not None and not tracker.done:
                time.sleep(0.0005)
            data = source[start : min(size, start + CHUNK_BYTES)]
            slot = slots[place][: data.size]
            digest = copy_pieces(one_piece(data), one_piece(slot))
            trackers[place] = router.send_multipart([identity, digest, slot], copy=False, track=True)
            under_way += 1
        for _ in range(under_way):
            router.recv_multipart()

    return (port, public), send
