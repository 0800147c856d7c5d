"""The bootstrap server over real HTTP: permission to register, the counts, and ranks that outlive the server."""

import contextlib
import inspect
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from sglang_tpla.config import SERVER_VARIABLE
from sglang_tpla.transfer import keys
from sglang_tpla.transfer.network.bootstrap import (
    CHALLENGE_HEADER,
    SIGNATURE_HEADER,
    Registrar,
    RegistrationRefused,
    sign,
    signing_key,
    submit,
)
from sglang_tpla.transfer.network.security import KEYS_VARIABLE, Security
from sglang_tpla.transfer.room import TransferError
from tests.ports import free_ports
from tests.wire import rig

PLACE = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 0, "target_pp_rank": 0}
WHOLE = dict.fromkeys(PLACE, -1)
THIS = "this server"


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, THIS)


def payload(rank: int = 0, size: int = 1, port: int = 7000) -> dict[str, Any]:
    return {
        "attn_tp_size": size, "attn_tp_rank": rank, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1,
        "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0,
        "rank_ip": "127.0.0.1", "rank_port": port, "page_size": 1, "kv_cache_dtype": "auto",
        "load_balance_method": "follow_bootstrap_room", "enable_dsa_cache_layer_split": False,
        "prefill_http_port": 30000, "server": THIS,
    }  # fmt: skip


pytestmark = pytest.mark.usefixtures("imported")


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@contextlib.contextmanager
def serving(port: int) -> Iterator[str]:
    """A bootstrap server with the environment's keys."""
    from sglang_tpla.host.disaggregation.bootstrap_server import TplaKVBootstrapServer

    server, url = TplaKVBootstrapServer("127.0.0.1", port), f"http://127.0.0.1:{port}"
    try:
        rig.wait(lambda: answers(url), "the bootstrap server")
        yield url
    finally:
        server.close()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url + "/health").status_code == 200
    return False


def secret() -> bytes | None:
    return Security.from_environment("prefill").secret


def counts(url: str) -> dict[str, int]:
    return {k: v for k, v in httpx.get(url + "/registrations").json().items() if v and k != "signed"}


def test_with_keys_only_signed_registrations_are_taken(key_folder: Path, port: int, tmp_path: Path) -> None:
    keys.main([str(tmp_path / "others")])
    stranger = Security.from_environment("prefill", {KEYS_VARIABLE: str(tmp_path / "others")}).secret
    with serving(port) as url:
        plain = httpx.put(url + "/route", json=payload(port=6666))
        assert plain.status_code == 401 and "unsigned; register with the prefill.secret" in plain.text
        with pytest.raises(RegistrationRefused, match="refused a registration: bad_signature"):
            submit(url, "PUT", "/route", payload(port=6667), stranger)
        assert httpx.get(url + "/route", params=WHOLE).status_code == 503  # nobody has registered

        body = b'{"bootstrap_room": 5, "dp_rank": 1}'
        challenge = httpx.get(url + "/challenge").text
        key = signing_key(secret() or b"")
        signed = {
            CHALLENGE_HEADER: challenge,
            SIGNATURE_HEADER: sign(key, "POST", "/register_dp_rank", body, challenge),
        }
        first, again = (httpx.post(url + "/register_dp_rank", content=body, headers=signed) for _ in range(2))
        assert (first.status_code, again.status_code) == (200, 401) and "replayed" in again.text

        submit(url, "PUT", "/route", payload(), secret())
        assert httpx.get(url + "/route", params=PLACE).json() == {"rank_ip": "127.0.0.1", "rank_port": 7000}
        assert counts(url) == {"accepted": 2, "unsigned": 1, "bad_signature": 1, "replayed": 1}
        assert httpx.get(url + "/registrations").json()["signed"] is True


def test_a_registration_captured_elsewhere_is_refused(key_folder: Path, port: int) -> None:
    """Another server with the same keys refuses the registration, and so does the same server after its restart."""
    body = b"{}"
    with serving(port) as url:
        challenge = httpx.get(url + "/challenge").text
    signature = sign(signing_key(secret() or b""), "PUT", "/route", body, challenge)
    with serving(port) as url:
        headers = {CHALLENGE_HEADER: challenge, SIGNATURE_HEADER: signature}
        answer = httpx.put(url + "/route", content=body, headers=headers)
        assert (answer.status_code, counts(url)) == (401, {"foreign_challenge": 1})


def test_without_keys_on_loopback_as_stock(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_tpla.host.disaggregation.bootstrap_server import TplaKVBootstrapServer

    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with serving(port) as url:
        assert httpx.put(url + "/route", json=payload()).status_code == 200
        assert httpx.get(url + "/route", params=WHOLE).json()["attn_tp_size"] == 1
        broken = httpx.put(url + "/route", json={"attn_tp_size": 1})
        assert broken.status_code == 400 and "KeyError('attn_tp_rank')" in broken.text
        assert counts(url) == {"accepted": 1, "malformed": 1}
    with pytest.raises(TransferError, match=r"taking registrations on 0\.0\.0\.0 without keys"):
        TplaKVBootstrapServer("0.0.0.0", port)


def test_a_layout_is_readable_by_every_release(port: int) -> None:
    """SGLang 0.5.17's decode server ends a look-up over a field that it does not know, such as 0.5.23's policy."""
    with serving(port) as url:
        submit(url, "PUT", "/route", payload() | {"decode_allocation_policy": "early", "kv_layout": None}, None)
        assert httpx.get(url + "/route", params=WHOLE).json() == {
            "attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 1, "kv_cache_dtype": "auto",
            "follow_bootstrap_room": True, "prefill_http_port": 30000,
        }  # fmt: skip


def test_a_layout_is_known_no_sooner_than_its_ranks(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang opens a request with any layout that it finds, on a thread other than the look-up's."""
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager
    from sglang_tpla.host.disaggregation.prefill_lookup import Unanswered

    class Layouts(dict[str, Any]):
        def __setitem__(self, server: str, info: Any) -> None:
            assert manager.rank_addresses[server] == {(0, 0, 0, 0): {"rank_ip": "127.0.0.1", "rank_port": 7000}}
            super().__setitem__(server, info)

    def resolve(info: Any) -> None:
        info.target_cp_ranks, info.target_tp_ranks, info.target_pp_ranks = [0], [0], [0]

    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    manager = TplaKVManager.__new__(TplaKVManager)
    manager.kv_args, manager.kv_cache_dtype_str, manager.dcp_size = SimpleNamespace(page_size=1), "auto", 1
    manager.attn_tp_size, manager.unanswered = 1, Unanswered()
    manager.rank_addresses, manager.prefill_info_table = {}, Layouts()
    manager.connection_lock = threading.Lock()
    monkeypatch.setattr(manager, "_resolve_rank_mapping", resolve)
    with serving(port) as url:
        submit(url, "PUT", "/route", payload(), None)
        server = url.removeprefix("http://")
        assert manager._look_up(server) and manager.prefill_info_table[server].attn_tp_size == 1


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("GET", "/route", {"params": PLACE | {"prefill_dp_rank": "x"}}),
        ("GET", "/route", {"params": PLACE | {"target_tp_rank": "9" * 5000}}),
        ("POST", "/query_dp_ranks", {"json": {"bootstrap_rooms": ["a"]}}),
        ("POST", "/query_dp_ranks", {"json": {"bootstrap_rooms": None}}),
        ("POST", "/query_dp_ranks", {"json": {}}),
        ("POST", "/query_dp_ranks", {"json": []}),
        ("POST", "/query_dp_ranks", {"content": b"[" * 100_000}),
        ("POST", "/register_dp_rank", {"json": {"bootstrap_room": {}, "dp_rank": 1}}),
        ("POST", "/register_dp_rank", {"content": b"\xff"}),
        ("PUT", "/route", {"json": [1]}),
        ("PUT", "/route", {"content": b"[" * 100_000}),
    ],
)
def test_what_is_malformed_is_the_clients_error(
    method: str, path: str, sent: dict[str, Any], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with serving(port) as url:
        submit(url, "PUT", "/route", payload(), None)
        answer = httpx.request(method, url + path, **sent)
        assert (answer.status_code, answer.text[:10]) == (400, "malformed ")
        assert httpx.get(url + "/route", params=WHOLE).status_code == 200


def test_a_rank_that_registers_twice_is_one_rank(port: int) -> None:
    with serving(port) as url:
        for _ in range(2):
            submit(url, "PUT", "/route", payload(rank=0, size=2), None)
        assert httpx.get(url + "/route", params=WHOLE).status_code == 503
        submit(url, "PUT", "/route", payload(rank=1, size=2), None)
        assert httpx.get(url + "/route", params=WHOLE).status_code == 200


def test_ranks_outlive_the_bootstrap_server(key_folder: Path, port: int) -> None:
    ranks = [
        Registrar(f"http://127.0.0.1:{port}", payload(rank, 2, 7000 + rank), PLACE | {"target_tp_rank": rank},
                  secret(), period_s=0.05)
        for rank in range(2)
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        with serving(port) as url:
            for rank in ranks:
                rank.start(patience_s=5)
                stack.callback(rank.close)
            assert httpx.get(url + "/route", params=WHOLE).status_code == 200
        with serving(port) as url:  # a server without registrations
            rig.wait(lambda: httpx.get(url + "/route", params=WHOLE).status_code == 200, "both ranks")
            found = httpx.get(url + "/route", params=PLACE | {"target_tp_rank": 1}).json()
            assert found == {"rank_ip": "127.0.0.1", "rank_port": 7001}
    assert all(rank.renewed for rank in ranks)


def test_a_rank_whose_place_is_taken_says_so(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with serving(port) as url:
        rank = Registrar(url, payload(port=7000), PLACE, None, period_s=0.02)
        with contextlib.closing(rank):
            rank.start(patience_s=5)
            submit(url, "PUT", "/route", payload(port=7001), None)
            said = "names 127.0.0.1:7001 where this rank listens on 127.0.0.1:7000"
            rig.wait(lambda: said in caplog.text, "the warning")
        assert rank.renewed == 0


def test_nobody_there(port: int) -> None:
    with pytest.raises(TransferError, match=f"127.0.0.1:{port} cannot be asked: .*; given up after 0.3 s"):
        Registrar(f"http://127.0.0.1:{port}", payload(), PLACE, None).start(patience_s=0.3)


def test_payload_is_that_of_the_host() -> None:
    """The payload, copied from SGLang here, agrees key by key; older releases get later releases' keys too."""
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    from sglang_tpla.host.disaggregation.bootstrap_server import registration

    stock, ours = (
        set(re.findall(r'^\s+"(\w+)": ', inspect.getsource(function), re.MULTILINE))
        for function in (CommonKVManager.register_to_bootstrap, registration)
    )
    later = {"enable_kv_cache_sharding", "decode_allocation_policy", "kv_layout", "dsv41_spec_layout"}
    assert stock - {"decode_allocation_policy"} <= ours - set(PLACE)
    assert ours - set(PLACE) - later - {"server"} == set(payload()) - {"server"} == stock - later


def test_ranks_of_another_server_are_not_taken(port: int) -> None:
    """If two servers had one port, decode would find the second one's ranks in place of the first one's."""
    with serving(port) as url:
        submit(url, "PUT", "/route", payload(), None)
        for other in ({"server": "another"}, {"server": None}):
            with pytest.raises(RegistrationRefused, match="bootstrap server of another prefill server; give each"):
                submit(url, "PUT", "/route", payload(port=7001) | other, None)
        assert httpx.get(url + "/route", params=PLACE).json()["rank_port"] == 7000


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"attn_tp_rank": 2}, "attn_tp_rank must lie in 0...1"), ({"attn_tp_size": 4}, "attn_tp_size is 2")],
)
def test_a_rank_that_does_not_fit_the_others(port: int, changes: dict[str, int], said: str) -> None:
    with serving(port) as url:
        submit(url, "PUT", "/route", payload(size=2), None)
        with pytest.raises(RegistrationRefused, match=said):
            submit(url, "PUT", "/route", payload(size=2) | changes, None)


def test_a_port_that_is_taken_ends_the_server(port: int) -> None:
    from sglang_tpla.host.disaggregation.bootstrap_server import TplaKVBootstrapServer

    with serving(port), pytest.raises(SystemExit, match=rf"cannot listen on 127.0.0.1:{port}.*of a machine its own"):
        TplaKVBootstrapServer("127.0.0.1", port)


@pytest.mark.parametrize("groups", ["replicas", "attention groups"])
def test_every_rank_has_a_place_of_its_own(groups: str) -> None:
    """SGLang gives attention groups a number under both names, and replicas under one."""
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager

    places = []
    for group in range(2):
        for rank in range(3):
            manager = TplaKVManager.__new__(TplaKVManager)
            manager.attn_tp_size, manager.attn_tp_rank = 3, rank
            manager.attn_cp_size, manager.attn_cp_rank = 1, 0
            replicas = groups == "replicas"
            manager.system_dp_size, manager.attn_dp_size = (2, 1) if replicas else (1, 2)
            manager.system_dp_rank, manager.attn_dp_rank = group, 0 if replicas else group
            assert manager.data_parallel_group == group
            places.append(manager._place)
    assert places == list(range(6))
