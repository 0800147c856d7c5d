"""Keys on real servers: who has none, another one or an old message is refused and counted, and service goes on."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import zmq

from sglang_tpla.transfer import frames
from sglang_tpla.transfer.bootstrap import CHALLENGE_HEADER, SIGNATURE_HEADER, sign, signing_key
from sglang_tpla.transfer.security import Security
from tests.e2e.faulty import counters
from tests.wire.fakes import hello

PLACE = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 0, "target_pp_rank": 0}
TELLING = {"bootstrap_room": 1, "dp_rank": 0}  # a registration that moves nothing


@pytest.fixture
def door(trio: Any) -> Iterator[httpx.Client]:
    """To the bootstrap server."""
    with httpx.Client(base_url=f"http://127.0.0.1:{trio.bootstrap}", timeout=30) as client:
        yield client


def test_unsigned_forged_and_replayed_registrations_are_refused_and_counted(
    trio: Any, door: httpx.Client
) -> None:
    secret = Security.from_environment("prefill", {"SGLANG_TPLA_KEYS": str(trio.keys)}).secret
    assert secret is not None
    _, foreign = zmq.curve_keypair()
    before = door.get("/registrations").json()
    assert before["signed"] and before["accepted"] >= 1
    body = json.dumps(TELLING).encode()

    def register(key: bytes | None) -> tuple[int, dict[str, str]]:
        challenge = door.get("/challenge").text
        headers = {} if key is None else {
            CHALLENGE_HEADER: challenge,
            SIGNATURE_HEADER: sign(signing_key(key), "POST", "/register_dp_rank", body, challenge),
        }  # fmt: skip
        return door.post("/register_dp_rank", content=body, headers=headers).status_code, headers

    assert register(None)[0] == 401
    assert register(foreign)[0] == 401
    status, headers = register(secret)
    assert status == 200
    assert door.post("/register_dp_rank", content=body, headers=headers).status_code == 401
    # the very registration of a rank, with an address of somebody else's
    rank = door.get("/route", params=PLACE).json()
    assert door.put("/route", json=rank | {"rank_ip": "192.0.2.66"}).status_code == 401
    after = door.get("/registrations").json()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {"accepted": 1, "unsigned": 2, "bad_signature": 1, "replayed": 1}
    assert door.get("/route", params=PLACE).json() == rank


@pytest.mark.parametrize("keyed", [False, True], ids=["no key", "a key that is not in the allow-list"])
def test_strangers_at_a_prefill_rank_are_refused_before_they_are_heard(
    trio: Any, door: httpx.Client, keyed: bool
) -> None:
    rank = door.get("/route", params=PLACE).json()
    before = counters(trio.prefill)
    public, secret = zmq.curve_keypair()
    server = (trio.keys / "prefill.public").read_text().strip().encode()
    with contextlib.closing(zmq.Context()) as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        if keyed:
            Security(secret, public, server).apply_client(dealer)
        dealer.connect(f"tcp://{rank['rank_ip']}:{rank['rank_port']}")
        dealer.send(frames.encode(hello()))
        deadline = time.monotonic() + 30
        while counters(trio.prefill)["refused"] == before["refused"]:
            assert time.monotonic() < deadline
        assert not dealer.poll(0)
    after = counters(trio.prefill)
    assert (after["peers"], after["unknown_peer"]) == (before["peers"], before["unknown_peer"])
    assert trio.router.generate("def f():\n", 4)["meta_info"]["completion_tokens"] == 4
