"""Access to an agent: CURVE keys and an allow-list, and the cases in which plain TCP will do.

On loopback plain TCP is allowed. On any other address agents need keys (``SGLANG_TPLA_KEYS``, a folder made by ``python
-m sglang_tpla.transfer.keys``) or a declaration that nobody else can reach the port (``SGLANG_TPLA_INSECURE=1``). With
keys, everything is encrypted, decode authenticates prefill, and prefill serves only the decode keys listed in
``allowed``; other peers are refused before a single frame is read, and counted.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.utils.z85

from sglang_tpla.config import ENV_PREFIX, ConfigError, check_variables
from sglang_tpla.transfer.room import TransferError

KEYS_VARIABLE = ENV_PREFIX + "KEYS"
INSECURE_VARIABLE = ENV_PREFIX + "INSECURE"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"
REMEDY = (
    f"make keys with `python -m sglang_tpla.transfer.keys FOLDER` and start with --tpla-keys FOLDER ({KEYS_VARIABLE}), "
    f"or say --tpla-insecure 1 ({INSECURE_VARIABLE}) if nobody else can reach this network"
)


def is_loopback(host: str) -> bool:
    """Return whether an address never leaves this machine."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@dataclass(frozen=True)
class Security:
    """Keys of one agent; without keys, plain TCP.

    Args:
        secret: this agent's secret key (40 characters, z85), or None for plain TCP.
        public: the public key that goes with it.
        server: the prefill side's public key, which decode checks.
        allowed: decode keys that prefill serves.
        insecure: whether to allow plain TCP on any address.
    """

    secret: bytes | None = None
    public: bytes = b""
    server: bytes = b""
    allowed: frozenset[bytes] = frozenset()
    insecure: bool = False

    @classmethod
    def from_environment(cls, role: str, environ: Mapping[str, str] = os.environ) -> Security:
        """Read the keys of a ``prefill`` or ``decode`` agent from the folder that the environment names.

        Raises:
            TransferError: a key file is missing, readable by others, or not a key; `INSECURE_VARIABLE` is neither 0 nor
                1; or nothing reads a variable with our prefix, which may be a misspelt request for keys.
        """
        try:
            check_variables(environ, "environment")
        except ConfigError as error:
            raise TransferError(str(error)) from error
        word = environ.get(INSECURE_VARIABLE, "0")
        if word not in ("0", "1"):
            raise TransferError(f"{INSECURE_VARIABLE} must be 0 or 1; got {word!r}")
        insecure = word == "1"
        folder = environ.get(KEYS_VARIABLE)
        if not folder:
            return cls(insecure=insecure)
        base = Path(folder)
        secret = _read_key(base / f"{role}.secret", private=True)
        server = _read_key(base / "prefill.public") if role == "decode" else b""
        allowed = frozenset(_read_allowed(base / "allowed")) if role == "prefill" else frozenset()
        return cls(secret, zmq.curve_public(secret), server, allowed, insecure)

    def check(self, host: str, what: str) -> None:
        """Refuse plain TCP beyond loopback.

        Raises:
            TransferError: there are no keys, ``host`` is not loopback, and the agent is not declared insecure.
        """
        if self.secret is None and not self.insecure and not is_loopback(host):
            raise TransferError(f"{what} {host} without keys would let anyone read and write caches; {REMEDY}")

    def apply_server(self, socket: zmq.Socket) -> None:
        """Make a prefill socket demand an allowed key."""
        if self.secret is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, b"sglang-tpla")

    def apply_client(self, socket: zmq.Socket) -> None:
        """Make a decode socket present its key and demand the prefill side's."""
        if self.secret is not None:
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
            socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)

    def answer(self, request: list[bytes]) -> tuple[list[bytes], bool]:
        """Return the reply to a request of ZMQ's authentication protocol (ZAP 1.0), and whether it lets the peer in."""
        version, number, mechanism = request[0], request[1], request[5] if len(request) > 5 else b""
        key = zmq.utils.z85.encode(request[6]) if mechanism == b"CURVE" and len(request) == 7 else b""
        known = key in self.allowed
        status = [b"200", b"OK"] if known else [b"400", b"key not in the allow-list"]
        return [version, number, *status, key if known else b"", b""], known


def _read_key(path: Path, private: bool = False) -> bytes:
    try:
        if private and path.stat().st_mode & 0o077:
            raise TransferError(f"{path} can be read by others; run `chmod 600 {path}`")
        key = path.read_text().split()[0].encode()
    except (OSError, IndexError, UnicodeDecodeError) as error:
        raise TransferError(
            f"expected a key in {path}: {error}; make one with `python -m sglang_tpla.transfer.keys {path.parent}`"
        ) from error
    return _checked(key, path)


def _read_allowed(path: Path) -> list[bytes]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TransferError(
            f"expected the decode keys to serve in {path}: {error}; list one public key a line"
        ) from error
    return [_checked(line.split()[0].encode(), path) for line in lines if line.strip() and line[0] != "#"]


def _checked(key: bytes, path: Path) -> bytes:
    try:
        if len(key) == 40 and len(zmq.utils.z85.decode(key)) == 32:
            return key
    except (ValueError, KeyError):
        pass
    raise TransferError(f"{path} holds no key: expected 40 characters (z85), got {len(key)}; make it anew")
