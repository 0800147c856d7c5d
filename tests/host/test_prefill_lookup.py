"""A bootstrap server that does not answer delays nobody, because the scheduler does not wait for the answer."""

import concurrent.futures
import socket
import threading
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from urllib.parse import parse_qs, urlparse

import pytest

from sglang_tpla.host.disaggregation.prefill_lookup import (
    Lookups,
    Unanswered,
    rank_addresses,
    require_resolvable,
    why_unanswered,
)
from sglang_tpla.transfer.room import TransferError
from tests.stub_server import answering


def test_an_answer_that_comes_at_once_is_given_at_once() -> None:
    assert Lookups(lambda address: True, wait_s=10).known("here")


def test_other_servers_are_asked_while_one_does_not_answer() -> None:
    silent, asked = threading.Event(), list[str]()

    def ask(address: str) -> bool:
        asked.append(address)
        return address == "well" or silent.wait(60)

    lookups = Lookups(ask, wait_s=0.001)
    assert not lookups.known("lost") and lookups.under_way("lost")
    while not lookups.known("well"):
        pass
    assert not lookups.known("lost")  # asked once, and not again before an answer
    assert asked.count("lost") == 1
    silent.set()
    while not lookups.known("lost"):
        pass
    assert not lookups.under_way("lost") and asked.count("lost") == 1


def test_a_step_waits_once_for_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a few dead addresses would slow down every other request's steps for as long as clients name them."""
    waited, wait = list[float](), concurrent.futures.wait

    def waiting(answers: list[concurrent.futures.Future[bool]], timeout: float) -> object:
        waited.append(timeout)
        return wait(answers, timeout)

    monkeypatch.setattr(concurrent.futures, "wait", waiting)
    silent = threading.Event()
    lookups = Lookups(lambda address: silent.wait(60), wait_s=0.001)
    assert not any(lookups.known("lost") for _ in range(3))
    silent.set()
    assert waited == [0.001, 0, 0]


def test_what_was_wrong_is_told_once_and_then_asked_anew() -> None:
    answers = iter([RuntimeError("page size 1 does not fit 64"), True])

    def ask(address: str) -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lookups = Lookups(ask, wait_s=10)
    with pytest.raises(RuntimeError, match="does not fit"):
        lookups.known("here")
    assert lookups.known("here")


def test_an_answer_that_nobody_waited_for_is_not_the_next_requests() -> None:
    """A client leaves while its server's name is looked up; an hour later that server exists."""
    answers, answered, now = iter([TransferError("unknown name"), True]), threading.Event(), [0.0]

    def ask(address: str) -> bool:
        answered.wait(60)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lookups = Lookups(ask, wait_s=0.001, clock=lambda: now[0])
    assert not lookups.known("here")
    answered.set()
    concurrent.futures.wait([lookups._asked["here"].answer])
    now[0] = 3600
    lookups._wait_s = 10
    assert lookups.known("here")
    assert not lookups.under_way("here")


def test_a_server_is_asked_again_after_there_was_no_thread_to_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = Lookups(lambda address: True, wait_s=10)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            lookups.known("here")
    assert lookups.known("here")


def test_answers_that_nobody_waits_for_do_not_pile_up() -> None:
    silent, now = threading.Event(), [0.0]
    lookups = Lookups(lambda address: silent.wait(60), wait_s=0, clock=lambda: now[0])
    for number in range(20):
        lookups.known(f"server-{number}")
    now[0] = 3600
    assert not lookups.known("another") and len(lookups._asked) == 21  # these may still be under way
    silent.set()
    concurrent.futures.wait([question.answer for question in lookups._asked.values()])
    now[0] = 7200
    lookups.known("one more")
    assert list(lookups._asked) in ([], ["one more"])


@pytest.fixture
def address() -> Iterator[str]:
    """A bootstrap server with a right address for tensor-parallel rank 0, none for 1, a name for 4, else nonsense."""

    def route(path: str, body: bytes) -> tuple[int, bytes]:
        place = {name: int(value[0]) for name, value in parse_qs(urlparse(path).query).items()}
        port = 100 + place["prefill_dp_rank"]
        named = b'{"rank_ip": "prefill-host", "rank_port": 7}'
        said = [b'{"rank_ip": "127.0.0.1", "rank_port": "%d"}' % port, b"", b'{"rank_port": 7}', b"[]", named, b"[]"]
        answer = said[place["target_tp_rank"]]
        return 200 if answer else 404, answer

    with answering(route) as address:
        yield address


def info(*target_tp_ranks: int, dp_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        dp_size=dp_size, target_cp_ranks=[0], target_tp_ranks=list(target_tp_ranks), target_pp_ranks=[0]
    )


def test_every_rank_that_may_be_needed_is_looked_up(address: str) -> None:
    found = rank_addresses(address, info(0, dp_size=2))
    assert {place: entry["rank_port"] for place, entry in found.items()} == {
        (0, 0, 0, 0): 100, (1, 0, 0, 0): 101,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [(["::1"], "::1"), (["::1", "10.0.0.5"], "10.0.0.5"), ([], None)],
    ids=["6", "both", "none"],
)
def test_a_rank_is_reached_by_its_address(
    address: str, addresses: list[str], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZMQ would look a name up on the thread that serves all connections, and would not find an IPv6 address."""
    look_up = socket.getaddrinfo

    def known(host: str, *rest: Any, **options: Any) -> list[Any]:
        if host != "prefill-host":
            return look_up(host, *rest, **options)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET6 if ":" in found else socket.AF_INET, 1, 6, "", (found, 0)) for found in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", known)
    if chosen is None:
        with pytest.raises(TransferError, match="names a prefill rank whose name cannot be resolved: 'prefill-host'"):
            rank_addresses(address, info(4))
        return
    assert [entry["rank_ip"] for entry in rank_addresses(address, info(4)).values()] == [chosen]


def test_a_rank_that_has_not_registered_is_asked_for_later(address: str) -> None:
    assert rank_addresses(address, info(0, 1)) == {}


def test_nobody_there_is_asked_later() -> None:
    assert rank_addresses("127.0.0.1:1", info(0)) == {}


@pytest.mark.parametrize("rank", [2, 3])
def test_nonsense_is_refused(address: str, rank: int) -> None:
    with pytest.raises(TransferError, match="must name rank_ip and rank_port"):
        rank_addresses(address, info(rank))


def test_more_ranks_than_there_can_be_are_refused_without_a_question() -> None:
    with pytest.raises(TransferError, match="more than 4096"):
        rank_addresses("127.0.0.1:1", info(0, dp_size=10**9))


@pytest.mark.parametrize("known", ["127.0.0.1:8998", "[::1]:8998", "LOCALHOST:8998", "localhost:1"])
def test_names_that_stand_for_an_address(known: str) -> None:
    require_resolvable(known)


@pytest.mark.parametrize("unknown", ["no-such-host.invalid:8998", "a..b:1"])
def test_a_name_that_nobody_knows_fails_at_once(unknown: str) -> None:
    with pytest.raises(TransferError, match=r"its name .* cannot be resolved"):
        require_resolvable(unknown)


def test_why_a_bootstrap_server_was_not_found(address: str) -> None:
    assert why_unanswered("127.0.0.1:1") == "nobody listens there"
    assert why_unanswered(address) == "status 200: []"  # an empty list is not a layout


def test_where_nobody_listens_is_asked_twice() -> None:
    """A prefill server that is gone has lost its half of a request; later requests fail at the first refusal."""
    times = iter([100.0, 100.5, 101.0, 104.0, 150.0, 151.0, 152.0])
    unanswered = Unanswered(lambda: next(times))
    assert unanswered.reason("gone:1") == ""
    unanswered.note("gone:1", "nobody listens there")
    unanswered.note("other:1", "nobody listens there")
    reason = "no answer from the bootstrap server at gone:1: nobody listens there"
    assert unanswered.reason("gone:1") == reason
    for _ in range(2):
        with pytest.raises(TransferError, match=reason):
            unanswered.note("gone:1", "nobody listens there")
    unanswered.note("gone:1", "nobody listens there")  # long after
    unanswered.note("gone:1", "ReadTimeout")  # somebody listens, and may answer yet
    unanswered.note("gone:1", "nobody listens there")


def test_a_request_hears_of_the_last_try_alone(imported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was found, or whose answer was refused, no longer counts as one that did not answer."""
    from sglang_tpla.host.disaggregation import kv_manager

    class Asked:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def __call__(self, aside: Any, address: str) -> bool:
            if isinstance(self.answer, Exception):
                raise self.answer
            aside.prefill_info_table[address] = self.answer
            return self.answer is not None

    def look_up(answer: Any) -> bool:
        monkeypatch.setattr(kv_manager.CommonKVManager, "try_ensure_parallel_info", Asked(answer))
        return manager._look_up("prefill:1")

    monkeypatch.setattr(kv_manager, "require_resolvable", lambda address: None)
    monkeypatch.setattr(kv_manager, "why_unanswered", lambda address: "nobody listens there")
    monkeypatch.setattr(kv_manager, "rank_addresses", lambda address, info: info)
    manager = kv_manager.TplaKVManager.__new__(kv_manager.TplaKVManager)
    manager.unanswered, manager.rank_addresses, manager.prefill_info_table = Unanswered(lambda: 0.0), {}, {}
    manager.connection_lock = threading.Lock()
    nobody = "no answer from the bootstrap server at prefill:1: nobody listens there"
    assert not look_up(None) and manager.unanswered.reason("prefill:1") == nobody
    assert look_up({"a": "rank"}) and manager.unanswered.reason("prefill:1") == ""
    assert not look_up(None) and manager.unanswered.reason("prefill:1") == nobody  # refused once since it was found
    with pytest.raises(ValueError, match="another page size"):
        look_up(ValueError("another page size"))
    assert manager.unanswered.reason("prefill:1") == ""
    assert not look_up({}) and manager.unanswered.reason("prefill:1").endswith("does not say where its ranks are")
    assert not look_up(None)
    with pytest.raises(TransferError, match=nobody):
        look_up(None)
    assert manager.unanswered.reason("prefill:1") == nobody


@pytest.mark.parametrize("host", ["prefill1", "prefill_1", "PREFILL_1.example", "[fe80::1_2]", "[::1]", "a_b_c"])
def test_a_lost_rank_is_looked_up_anew_whatever_its_servers_name(imported: None, host: str) -> None:
    """SGLang joins a name and ranks with underscores, and the lookup must not split such a string."""
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager

    lost, kept = {"rank_ip": "10.0.0.5", "rank_port": 4000}, {"rank_ip": "10.0.0.6", "rank_port": "4000"}
    server, other = f"{host}:8998", f"{host}:899"
    manager = TplaKVManager.__new__(TplaKVManager)
    manager.connection_lock = threading.Lock()
    manager.connection_pool = {f"{server}_0_0_False": [lost], f"{other}_0_0_0": [kept]}
    manager.prefill_info_table = {server: object(), other: object()}
    manager.rank_addresses = {server: {(0, 0, 0, 0): kept, (0, 0, 1, 0): lost}, other: {(0, 0, 0, 0): kept}}
    manager._lost_peers = deque([("10.0.0.5", 4000), ("10.0.0.9", 1)])
    manager.forget_lost_peers()
    assert list(manager.connection_pool) == [f"{other}_0_0_0"]
    assert list(manager.prefill_info_table) == list(manager.rank_addresses) == [other]


def test_ranks_are_forgotten_while_another_server_is_found(imported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up's thread adds a server while the scheduler goes through those that it knows."""
    from sglang_tpla.host.disaggregation import kv_manager

    class Ranks(dict[Any, Any]):
        def values(self) -> Any:
            finding.start()
            finding.join(0.1)  # it may have to wait for this thread
            return super().values()

    def ask(aside: Any, address: str) -> bool:
        aside.prefill_info_table[address] = "layout"
        return True

    monkeypatch.setattr(kv_manager.CommonKVManager, "try_ensure_parallel_info", ask)
    monkeypatch.setattr(kv_manager, "require_resolvable", lambda address: None)
    monkeypatch.setattr(kv_manager, "rank_addresses", lambda address, info: {(0, 0, 0, 0): {}})
    manager = kv_manager.TplaKVManager.__new__(kv_manager.TplaKVManager)
    manager.connection_lock, manager.connection_pool, manager.unanswered = threading.Lock(), {}, Unanswered()
    finding = threading.Thread(target=manager._look_up, args=("found:1",))
    lost = {(0, 0, 0, 0): {"rank_ip": "10.0.0.5", "rank_port": 4000}}
    manager.rank_addresses, manager.prefill_info_table = {"lost:1": Ranks(lost)}, {"lost:1": "layout"}
    manager._lost_peers = deque([("10.0.0.5", 4000)])
    manager.forget_lost_peers()
    finding.join()
    assert list(manager.rank_addresses) == list(manager.prefill_info_table) == ["found:1"]
