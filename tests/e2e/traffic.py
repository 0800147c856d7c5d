"""Requests to a prefill and a decode server as the router sends them: plain, streamed, in batches, and abandoned."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.servers import Server, request_body

PATIENCE_S = 200.0  # longer than any deadline of the servers: a request that waits longer hangs
# SGLang counts up from the room of a batch that names only one, so rooms are far apart. Two attention groups take even
# and odd rooms, so the distance is odd.
_rooms = itertools.count(1001, 1001)
# Each request has its own connection, so that a server's death affects one request. The client is made once, because
# its TLS context is costly.
client = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0), timeout=PATIENCE_S)


@dataclass
class Answer:
    """An answer of a decode server: tokens and their log-probabilities, or the reason why there are none."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    failure: str = ""

    def same_text(self, other: Answer, tolerance: float = 1e-3) -> bool:
        """Return whether tokens are equal, and log-probabilities equal up to the order of sums."""
        return self.tokens == other.tokens and all(
            abs(a - b) <= tolerance for a, b in zip(self.logprobs, other.logprobs, strict=True)
        )


def read(said: dict[str, Any], tokens: int) -> Answer:
    """Read the answer in one result of /generate, or in its last event."""
    meta = said.get("meta_info")
    if meta is None or meta["finish_reason"] is None or meta["finish_reason"]["type"] == "abort":
        return Answer(failure=json.dumps(said)[:2000])
    assert meta["completion_tokens"] == tokens, said
    values = meta["output_token_logprobs"]
    return Answer(tuple(token for _, token, _ in values), tuple(value for value, _, _ in values))


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode server, addressed as the router would address them; every request has its own room.

    Args:
        door: the port of a proxy before prefill's bootstrap server, or of another bootstrap server; 0 is prefill's own.
    """

    prefill: Server
    decode: Server
    door: int = 0

    def place(self, batch: int = 0) -> dict[str, Any]:
        """Return what the router adds to a request, or to a batch of so many prompts."""
        host, port = self.prefill.host, self.door or self.prefill.bootstrap
        return {
            "bootstrap_host": [host] * batch if batch else host,
            "bootstrap_port": [port] * batch if batch else port,
            "bootstrap_room": [next(_rooms) for _ in range(batch)] if batch else next(_rooms),
        }

    def body(self, prompt: Any, tokens: int, **extra: Any) -> dict[str, Any]:
        """Return one request, or a batch of prompts, as the router would send it to both."""
        batch = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 0
        return request_body(prompt, tokens) | self.place(batch) | extra

    def generate(self, prompt: Any, tokens: int, timeout_s: float = 240, **extra: Any) -> tuple[Any, Any]:
        """Return the answers of prefill and decode to one request or batch, and fail on any other status than 200."""
        body = self.body(prompt, tokens, **extra)
        with _both(self) as (pool, servers):
            answers = [*pool.map(lambda server: server.post("/generate", body, timeout_s), servers)]
        for server, answer in zip(servers, answers, strict=True):
            assert answer.status_code == 200, (
                f"{server.name}: {answer.status_code} {answer.text[:400]}\n{server.tail()}"
            )
        return answers[0].json(), answers[1].json()

    def ask(
        self,
        prompt: Any,
        tokens: int,
        stream: bool = False,
        keep: Callable[[dict[str, Any]], None] | None = None,
        **extra: Any,
    ) -> Answer:
        """Send one request to both and read the decode server's answer; ``keep`` is given its ``meta_info``."""
        body = self.body(prompt, tokens, return_logprob=True, **({"stream": True} if stream else {}), **extra)
        send = _last_event if stream else _post
        status, said = self._said(send, body)
        if status != 200:
            return Answer(failure=f"{status} {json.dumps(said)[:2000]}")
        if keep is not None:
            keep(said["meta_info"])
        return read(said, tokens)

    def _said(self, send: Callable[..., tuple[int, Any]], body: dict[str, Any]) -> tuple[int, Any]:
        """Send a body to both, and return the decode server's status and answer."""
        with _both(self) as (pool, servers):
            first, second = (pool.submit(send, server, body) for server in servers)
            try:
                first.result()
            finally:
                answer = second.result()
        return answer

    def ask_batch(self, prompts: Sequence[Any], tokens: int) -> list[Answer]:
        """Ask several prompts in one request."""
        body = self.body(list(prompts), tokens, return_logprob=True)
        status, said = self._said(_post, body)
        if status != 200 or not isinstance(said, list):
            return [Answer(failure=f"{status} {json.dumps(said)[:2000]}")] * len(prompts)
        return [read(one, tokens) for one in said]

    def leave(self, prompt: Any, tokens: int, after_s: float) -> None:
        """Ask, and hang up on both servers after a few tokens, or after ``after_s`` without any."""
        body = self.body(prompt, tokens, stream=True)
        with _both(self) as (pool, servers):
            for call in [pool.submit(_hang_up, server, body, after_s) for server in servers]:
                call.result()

    def abort(self, rid: str, *servers: Server) -> None:
        """End a request by its ``rid`` on the given servers."""
        for server in servers:
            client.post(server.url + "/abort_request", json={"rid": rid}).raise_for_status()


@contextlib.contextmanager
def _both(pair: Pair) -> Iterator[tuple[concurrent.futures.ThreadPoolExecutor, tuple[Server, Server]]]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool, (pair.prefill, pair.decode)


def _post(server: Server, body: dict[str, Any]) -> tuple[int, Any]:
    """Return the status and the text, or 0 and the reason if the server went away; waiting too long is an error."""
    try:
        response = client.post(server.url + "/generate", json=body)
    except httpx.TimeoutException:
        raise
    except httpx.TransportError as error:
        return 0, {"error": repr(error)}
    try:
        return response.status_code, response.json()
    except ValueError:
        return response.status_code, {"error": response.text}


def _last_event(server: Server, body: dict[str, Any]) -> tuple[int, Any]:
    """Return the same as `_post` for a streamed answer, with the content of the last event."""
    last: Any = {"error": "no event"}
    try:
        with client.stream("POST", server.url + "/generate", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line[6:])
            return response.status_code, last
    except httpx.TimeoutException:
        raise
    except httpx.TransportError as error:
        return 0, {"error": repr(error)}


def _hang_up(server: Server, body: dict[str, Any], after_s: float) -> None:
    with (
        contextlib.suppress(httpx.TransportError),
        client.stream("POST", server.url + "/generate", json=body, timeout=httpx.Timeout(20, read=after_s)) as response,
    ):
        for _ in zip(range(6), response.iter_lines(), strict=False):
            pass


class Load:
    """Threads that send requests without pause while a test does something else, and the results of the requests.

    Args:
        routes: used in turn.
        prompts: each with the answers of the routes' decode servers without load, by the server's name.
        tokens: number of tokens of each answer.
    """

    def __init__(
        self, routes: Sequence[Pair], prompts: Sequence[Any], expected: dict[str, list[Answer]], tokens: int
    ) -> None:
        self._routes, self._prompts, self._expected, self._tokens = routes, prompts, expected, tokens
        self._stop = threading.Event()
        self.right: dict[str, int] = dict.fromkeys((route.decode.name for route in routes), 0)
        self.failures: dict[str, list[str]] = {name: [] for name in self.right}
        self._threads = [threading.Thread(target=self._send, args=(route,), daemon=True) for route in routes]
        self._wrong: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S + 30)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"
        assert not self._wrong, self._wrong[:3]

    def _send(self, route: Pair) -> None:
        name = route.decode.name
        for number in itertools.cycle(range(len(self._prompts))):
            if self._stop.is_set():
                return
            try:
                answer = route.ask(self._prompts[number], self._tokens)
            except Exception as error:
                self._wrong.append(repr(error))
                return
            if answer.failure:
                self.failures[name].append(answer.failure)
                self._stop.wait(0.2)
            elif answer.same_text(self._expected[name][number]):
                self.right[name] += 1
            else:
                self._wrong.append(f"{name}, prompt {number}: {answer}")
