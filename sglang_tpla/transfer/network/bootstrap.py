"""Registration of prefill ranks at the bootstrap server: signed if there are keys, and renewed if it is lost.

Decode servers learn from the bootstrap server (SGLang's, HTTP) where prefill ranks listen. With keys, that server takes
a registration only with an HMAC by the prefill side's secret over method, path, body and a challenge that the same
server gave out a moment ago and accepts once. So a registration is refused if it is unsigned, forged, replayed, or was
captured at another bootstrap server. Machines need no common clock, and the server stores nothing for strangers.

    GET  /challenge            -> text, valid for CHALLENGE_S seconds, once
    PUT  /route                with the headers CHALLENGE_HEADER and SIGNATURE_HEADER
    POST /register_dp_rank     the same
"""

import hashlib
import hmac
import json
import logging
import secrets
import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import zmq.utils.z85

from sglang_tpla.transfer.room import TransferError

CHALLENGE_PATH = "/challenge"
CHALLENGE_HEADER = "X-Sglang-Tpla-Challenge"
SIGNATURE_HEADER = "X-Sglang-Tpla-Signature"
CHALLENGE_S = 30.0
ASK_S = 5.0
KEEP_UP_S = 5.0
START_S = 120.0
MAX_BODY_BYTES = 64 << 10
REASONS = ("unsigned", "bad_signature", "foreign_challenge", "expired", "replayed", "malformed")

logger = logging.getLogger(__name__)


class RegistrationRefused(TransferError):
    """The bootstrap server rejects this registration, and would reject it again."""


def signing_key(secret: bytes) -> bytes:
    """Derive the key of registrations (32 bytes) from the prefill side's CURVE secret (z85)."""
    return hashlib.blake2b(zmq.utils.z85.decode(secret), digest_size=32, person=b"tpla-bootstrap").digest()


def sign(key: bytes, method: str, path: str, body: bytes, challenge: str) -> str:
    """Return the HMAC-SHA256 over a registration and its challenge, in hexadecimal."""
    said = "\n".join((method, path, challenge, hashlib.sha256(body).hexdigest()))
    # the challenge comes from a header, which may hold bytes that are not text
    return hmac.new(key, said.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


class Gate:
    """Checks registrations at a bootstrap server. Not thread-safe: one event loop uses it.

    Args:
        secret: the prefill side's CURVE secret; None accepts unsigned registrations, for loopback.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, secret: bytes | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = None if secret is None else signing_key(secret)
        self._clock = clock
        self._own = secrets.token_bytes(32)  # tells this server's challenges from all others'
        self._used: OrderedDict[str, float] = OrderedDict()
        self.counts: Counter[str] = Counter(dict.fromkeys(("accepted", *REASONS), 0))

    @property
    def closed(self) -> bool:
        """Whether registrations must be signed."""
        return self._key is not None

    def challenge(self) -> str:
        """Return a new challenge, without storing anything about it."""
        content = secrets.token_bytes(16) + struct.pack(">d", self._clock())
        return (content + self._mark(content)).hex()

    def wrong(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> str | None:
        """Return which of REASONS refuses a registration, or None if it is good. A good one uses its challenge up."""
        try:
            if len(body) > MAX_BODY_BYTES or not isinstance(json.loads(body), dict):
                return "malformed"
        except (ValueError, RecursionError):
            return "malformed"
        if self._key is None:
            return None
        challenge, signature = headers.get(CHALLENGE_HEADER, ""), headers.get(SIGNATURE_HEADER, "")
        if not challenge or not signature:
            return "unsigned"
        given = signature.encode("utf-8", "replace")
        if not hmac.compare_digest(sign(self._key, method, path, body, challenge).encode(), given):
            return "bad_signature"
        issued = self._issued(challenge)
        now = self._clock()
        if issued is None:
            return "foreign_challenge"
        if now - issued > CHALLENGE_S:
            return "expired"
        while self._used and now - next(iter(self._used.values())) > CHALLENGE_S:
            self._used.popitem(last=False)
        if challenge in self._used:
            return "replayed"
        self._used[challenge] = now
        return None

    def _issued(self, challenge: str) -> float | None:
        """Return when this server gave a challenge out, or None if it did not."""
        try:
            data = bytes.fromhex(challenge)
        except ValueError:
            return None
        content, mark = data[:24], data[24:]
        if challenge != data.hex() or not hmac.compare_digest(self._mark(content), mark):
            return None
        return float(struct.unpack(">d", content[16:])[0])

    def _mark(self, content: bytes) -> bytes:
        return hmac.new(self._own, content, hashlib.sha256).digest()


def submit(base_url: str, method: str, path: str, payload: Mapping[str, Any], secret: bytes | None) -> None:
    """Send one registration, signed if there is a secret.

    Raises:
        RegistrationRefused: the server answered with a status of 4xx.
        TransferError: the server cannot be reached, or has a fault.
    """
    body = json.dumps(payload).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with httpx.Client(base_url=base_url, timeout=ASK_S, trust_env=False) as client:
            if secret is not None:
                challenge = client.get(CHALLENGE_PATH).raise_for_status().text
                signature = sign(signing_key(secret), method, path, body, challenge)
                headers |= {CHALLENGE_HEADER: challenge, SIGNATURE_HEADER: signature}
            response = client.request(method, path, content=body, headers=headers)
    except httpx.HTTPError as error:
        raise TransferError(f"the bootstrap server at {base_url} cannot be asked: {error!r}") from error
    if 400 <= response.status_code < 500:
        raise RegistrationRefused(f"the bootstrap server at {base_url} refused a registration: {response.text[:500]}")
    if response.status_code != 200:
        raise TransferError(
            f"the bootstrap server at {base_url} answered {response.status_code}: {response.text[:500]}"
        )


class Registrar:
    """Registers one prefill rank and keeps it registered, because a restarted bootstrap server has forgotten it.

    Args:
        base_url: the address of the bootstrap server.
        payload: the body of ``PUT /route``.
        place: the query of ``GET /route`` under which decode servers find this rank.
        secret: the prefill side's CURVE secret, or None.
        period_s: seconds between two checks.
    """

    def __init__(
        self,
        base_url: str,
        payload: Mapping[str, Any],
        place: Mapping[str, int],
        secret: bytes | None,
        period_s: float = KEEP_UP_S,
    ) -> None:
        self._base_url, self._payload, self._place, self._secret = base_url, payload, place, secret
        self._period_s = period_s
        self._stop = threading.Event()
        self.renewed = 0
        self._thread = threading.Thread(target=self._keep_up, name="tpla-bootstrap", daemon=True)

    def start(self, patience_s: float = START_S) -> None:
        """Register, waiting for the server to come up, then keep the registration alive in a thread.

        Raises:
            TransferError: the registration was refused, or the server did not come up in time.
        """
        end = time.monotonic() + patience_s
        while True:
            try:
                self._register()
                break
            except RegistrationRefused:
                raise
            except TransferError as error:
                if time.monotonic() > end:
                    raise TransferError(f"{error}; given up after {patience_s:g} s") from error
                time.sleep(0.2)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def submit(self, method: str, path: str, payload: Mapping[str, Any]) -> None:
        submit(self._base_url, method, path, payload, self._secret)

    def _register(self) -> None:
        self.submit("PUT", "/route", self._payload)

    def _keep_up(self) -> None:
        said = ""
        while not self._stop.wait(self._period_s):
            wrong = ""
            try:
                self._look()
            except Exception as error:  # the server may answer anything, and this rank keeps on checking
                wrong = f"registration of this prefill rank: {error!r}"
            if wrong and wrong != said:
                logger.warning("%s", wrong)
            said = wrong

    def _look(self) -> None:
        """Look this rank up as a decode server would, and register anew if the server does not know it."""
        with httpx.Client(base_url=self._base_url, timeout=ASK_S, trust_env=False) as client:
            response = client.get("/route", params=dict(self._place))
        if response.status_code in (404, 503):
            self._register()
            self.renewed += 1
            logger.warning("the bootstrap server at %s had forgotten this rank: registered anew", self._base_url)
            return
        found = response.raise_for_status().json()
        ours = (str(self._payload["rank_ip"]), int(self._payload["rank_port"]))
        if (there := (str(found["rank_ip"]), int(found["rank_port"]))) != ours:
            raise TransferError(
                f"the bootstrap server at {self._base_url} names {there[0]}:{there[1]} where this rank listens on "
                f"{ours[0]}:{ours[1]}; let each prefill server have a bootstrap port of its own"
            )
