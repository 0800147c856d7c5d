"""A bootstrap server with keys accepts sound registrations and refuses others with the reason."""

import hashlib
import hmac
import threading
from typing import Any

import httpx
import pytest
import zmq
import zmq.utils.z85

from sglang_tpla.transfer.network import bootstrap
from sglang_tpla.transfer.network.bootstrap import (
    CHALLENGE_HEADER,
    CHALLENGE_S,
    MAX_BODY_BYTES,
    SIGNATURE_HEADER,
    Gate,
    Registrar,
    sign,
    signing_key,
)

SECRET = zmq.curve_keypair()[1]
BODY = b'{"rank_ip": "10.0.0.1"}'


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def headers(gate: Gate, secret: bytes = SECRET, body: bytes = BODY, **changes: str) -> dict[str, str]:
    """Return a registration's headers as a prefill rank would make them, with some changed."""
    challenge = changes.get("challenge", gate.challenge())
    method, path = changes.get("method", "PUT"), changes.get("path", "/route")
    return {CHALLENGE_HEADER: challenge, SIGNATURE_HEADER: sign(signing_key(secret), method, path, body, challenge)}


def test_signature_is_an_hmac_with_a_derived_key() -> None:
    key = hashlib.blake2b(zmq.utils.z85.decode(SECRET), digest_size=32, person=b"tpla-bootstrap").digest()
    text = f"PUT\n/route\nabc\n{hashlib.sha256(BODY).hexdigest()}".encode()
    assert sign(signing_key(SECRET), "PUT", "/route", BODY, "abc") == hmac.digest(key, text, "sha256").hex()


def test_a_signed_registration_is_good_once() -> None:
    gate = Gate(SECRET)
    good = headers(gate)
    assert gate.wrong("PUT", "/route", BODY, good) is None
    assert gate.wrong("PUT", "/route", BODY, good) == "replayed"
    assert gate.wrong("PUT", "/route", BODY, headers(gate)) is None


def test_what_was_not_signed_so_is_refused() -> None:
    gate, other = Gate(SECRET), Gate(SECRET)
    stranger = zmq.curve_keypair()[1]
    cases = {
        "unsigned": [{}, {CHALLENGE_HEADER: gate.challenge()}, {SIGNATURE_HEADER: "00"}],
        "bad_signature": [
            headers(gate, stranger),
            headers(gate, body=b'{"rank_ip": "10.6.6.6"}'),
            headers(gate, method="POST"),
            headers(gate, path="/register_dp_rank"),
            headers(gate) | {SIGNATURE_HEADER: "é" * 64},
            headers(gate) | {CHALLENGE_HEADER: gate.challenge()},
            headers(gate) | {CHALLENGE_HEADER: "\udcff"},  # aiohttp passes a byte that is no text on like this
        ],
        "foreign_challenge": [  # captured at another bootstrap server with the same keys, or before this one started
            headers(other),
            headers(gate, challenge="zz"),
            headers(gate, challenge="00" * 56),
            headers(gate, challenge=gate.challenge().upper()),
            headers(gate, challenge=gate.challenge()[:-2]),
        ],
    }
    for reason, attempts in cases.items():
        for attempt in attempts:
            assert gate.wrong("PUT", "/route", BODY, attempt) == reason, attempt


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 60000, b'{"x": "' + b"x" * MAX_BODY_BYTES + b'"}'])
@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "signed"])  # the key is random, and an id must not be
def test_what_is_no_registration(body: bytes, secret: bytes | None) -> None:
    gate = Gate(secret)
    assert gate.wrong("PUT", "/route", body, headers(gate, body=body)) == "malformed"


def test_challenges_expire_and_are_then_forgotten() -> None:
    clock = Clock()
    gate = Gate(SECRET, clock)
    late = headers(gate)
    for _ in range(100):
        assert gate.wrong("PUT", "/route", BODY, headers(gate)) is None
    clock.now += CHALLENGE_S + 1
    assert gate.wrong("PUT", "/route", BODY, late) == "expired"
    assert gate.wrong("PUT", "/route", BODY, headers(gate)) is None
    assert len(gate._used) == 1  # used challenges do not accumulate


def test_strangers_leave_nothing_behind() -> None:
    gate = Gate(SECRET)
    for _ in range(100):
        gate.challenge()
        gate.wrong("PUT", "/route", BODY, headers(gate, zmq.curve_keypair()[1]))
    assert not gate._used


def test_without_keys_everyone_registers() -> None:
    assert Gate(None).wrong("PUT", "/route", BODY, {}) is None


@pytest.mark.parametrize(
    "answer", [{}, [], "gone", {"rank_ip": "127.0.0.1", "rank_port": None}, {"rank_ip": "127.0.0.1", "rank_port": 8}]
)
def test_a_rank_goes_on_looking_whoever_answers(
    answer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If another service has the bootstrap server's port, the rank logs it once, and registers when it can."""
    looks = iter([answer, answer, {"rank_ip": "127.0.0.1", "rank_port": 7}])
    registrar = Registrar("http://bootstrap", {"rank_ip": "127.0.0.1", "rank_port": 7}, {}, None, period_s=0.001)
    seen = threading.Event()

    def respond(request: httpx.Request) -> httpx.Response:
        found = next(looks, None)
        if found is None:
            seen.set()
            return httpx.Response(503)
        return httpx.Response(200, json=found)

    client = httpx.Client
    monkeypatch.setattr(
        bootstrap.httpx, "Client", lambda **kwargs: client(**kwargs, transport=httpx.MockTransport(respond))
    )
    registrar._thread.start()
    try:
        assert seen.wait(10)
    finally:
        registrar.close()
    assert sum("registration of this prefill rank" in line for line in caplog.messages) >= 1
