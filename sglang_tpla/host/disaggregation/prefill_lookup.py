"""Look up the addresses of prefill ranks on separate threads.

SGLang's decode scheduler asks bootstrap servers (`try_ensure_parallel_info`, `_get_bootstrap_info_from_server` in
``sglang/srt/disaggregation/common/conn.py``) between two decode steps, and waits up to five seconds for each answer. So
a machine that lost its power would delay requests that name other prefill servers for over a minute.
"""

import concurrent.futures
import dataclasses
import itertools
import logging
import math
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests

from sglang_tpla.transfer.room import TransferError, remember

WAIT_S = 0.05  # the scheduler waits this long once for an answer, which usually comes at once
ASK_S = 5.0
MAX_RANKS = 4096
NOBODY = "nobody listens there"
REFUSED_TWICE_S = 5.0  # SGLang asks once a second
FORGOTTEN_S = 10.0  # an answer that no request asks for in this time is dropped: its requests have left
PLACE = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")

logger = logging.getLogger(__name__)
Place = tuple[int, int, int, int]  # data-parallel, context, tensor and pipeline rank


@dataclasses.dataclass
class Question:
    """A question to a bootstrap server, and when its answer was last asked for."""

    answer: concurrent.futures.Future[bool]
    wanted_at_s: float


class Lookups:
    """Questions under way, one for each bootstrap server.

    Args:
        ask: the question, which may block; returns True when all is known, False to be asked again later, or raises.
        wait_s: how long `known` waits for an answer to a question that it has just asked.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self, ask: Callable[[str], bool], wait_s: float = WAIT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask, self._wait_s, self._clock = ask, wait_s, clock
        self._asked: dict[str, Question] = {}

    def known(self, address: str) -> bool:
        """Return the result of ``ask`` for a bootstrap server, or False before there is one; one thread calls this."""
        now = self._clock()
        self._forget(now)
        question, wait_s = self._asked.get(address), 0.0
        if question is None:
            wait_s = self._wait_s  # once a question, so that many silent addresses do not hold up every step
            question = Question(concurrent.futures.Future(), now)
            asked = address, question.answer
            # raises where there are too many threads; the question then counts as not asked
            threading.Thread(target=self._run, args=asked, name="tpla-prefill-lookup", daemon=True).start()
            self._asked[address] = question
        question.wanted_at_s = now
        if not concurrent.futures.wait([question.answer], wait_s).done:
            return False
        del self._asked[address]
        return question.answer.result()

    def _forget(self, now: float) -> None:
        """Forget the answers whose requests have left, because a later request would get an outdated answer."""
        for address, question in list(self._asked.items()):
            if now - question.wanted_at_s > FORGOTTEN_S and question.answer.done():
                del self._asked[address]

    def under_way(self, address: str) -> bool:
        """Return whether a question waits for its answer, or an answer for its asker."""
        return address in self._asked

    def _run(self, address: str, answer: concurrent.futures.Future[bool]) -> None:
        try:
            answer.set_result(self._ask(address))
        except Exception as error:
            answer.set_exception(error)


class Unanswered:
    """The bootstrap servers that were not found at the last try, with the reasons.

    Args:
        clock: a monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def note(self, address: str, why: str) -> None:
        """Note why a bootstrap server did not answer; the reason is empty where it did.

        Raises:
            TransferError: nobody listened there at the previous try either. A prefill server's HTTP port opens after
                its bootstrap port, so no prefill server has the other half of a request that still waits.
        """
        before, then = self._found.get(address, ("", 0.0))
        now = self._clock()
        remember(self._found, address, (why, now))
        if why == before == NOBODY and now - then < REFUSED_TWICE_S:
            raise TransferError(self.reason(address))

    def reason(self, address: str) -> str:
        """Return the reason for the client; empty where none was noted."""
        why, _ = self._found.get(address, ("", 0.0))
        return why and f"no answer from the bootstrap server at {address}: {why}"


def require_resolvable(address: str) -> None:
    """Look up a bootstrap server's name.

    Raises:
        TransferError: an unknown name; another try would only delay the client's answer.
    """
    parts = urlsplit(f"http://{address}")
    try:
        socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TransferError(f"its name {parts.hostname!r} cannot be resolved: {reason}") from error


def why_unanswered(address: str) -> str:
    """Ask a bootstrap server for its layout, and return the failure in words for the client that waits."""
    query = dict.fromkeys(PLACE, -1)
    try:
        response = requests.get(f"http://{address}/route", params=query, timeout=ASK_S)
    except requests.RequestException as error:
        return NOBODY if was_refused(error) else type(error).__name__
    return f"status {response.status_code}: {response.text[:200]}"


def was_refused(error: BaseException | None) -> bool:
    """Return whether an error comes from a refused connection; a machine without a listener refuses at once."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


def rank_addresses(address: str, info: Any) -> dict[Place, dict[str, Any]]:
    """Return the addresses of the prefill ranks that a decode rank may need, from ``GET /route``.

    The result is empty, with a line in the log, where the bootstrap server does not answer.

    Args:
        address: the bootstrap server's.
        info: SGLang's ``PrefillServerInfo`` with a resolved rank mapping.

    Raises:
        TransferError: an answer that cannot be right.
    """
    ranks = (range(info.dp_size), info.target_cp_ranks, info.target_tp_ranks, info.target_pp_ranks)
    if math.prod(len(numbers) for numbers in ranks) > MAX_RANKS:
        raise TransferError(f"the bootstrap server at {address} names more than {MAX_RANKS} prefill ranks")
    found = {}
    try:
        with requests.Session() as session:
            for place in itertools.product(*ranks):
                query = dict(zip(PLACE, place, strict=True))
                response = session.get(f"http://{address}/route", params=query, timeout=ASK_S)
                response.raise_for_status()
                found[place] = _checked(address, response.json())
    except requests.RequestException as error:
        logger.error("the bootstrap server at %s does not say where its ranks are: %s", address, error)
        return {}
    return found


def _checked(address: str, said: Any) -> dict[str, Any]:
    try:
        host, port = said["rank_ip"], int(said["rank_port"])
        if isinstance(host, str) and host and 0 < port < 65536:
            return {**said, "rank_ip": _numeric(host), "rank_port": port}
    except (KeyError, TypeError, ValueError):
        pass
    except OSError as error:
        raise TransferError(
            f"the bootstrap server at {address} names a prefill rank whose name cannot be resolved: {host!r}: {error}"
        ) from error
    raise TransferError(
        f"the bootstrap server at {address} must name rank_ip and rank_port (1 to 65535); got {str(said)[:200]}"
    )


def _numeric(host: str) -> str:
    """Return the address of a host, IPv4 if it has one.

    ZMQ would look for an IPv4 address alone, on the thread that serves all of an agent's connections.

    Raises:
        OSError: there is none.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda entry: entry[0] is not socket.AF_INET)[4][0])
