"""What the soak asks: prompts of all lengths with the answers of a quiet day, and threads that send them."""

import collections
import concurrent.futures
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.prompts import source
from tests.e2e.traffic import Answer, Pair

# Greedy tokens depend on the batch where two are as good as equal: prompts on whose way that happens are left out.
CLEAR = 0.02  # in log-probability, between the best token and the next
# characters; the first one: one token; the last ones, with the 512 that SGLang keeps free, fit into a decode pool
LENGTHS = (1, 12, 40, 90, 200, 400, 900, 1800, 3500, 5000, 7000, 9_000)
FAMILIES, SIBLINGS = 3, 3  # prompts that share a long beginning
TOKENS = (1, 4, 9, 16, 32)
GRACE_S = 20.0  # what a fault began may fail as long after its end


@dataclass(frozen=True)
class Case:
    """A prompt, how many tokens are asked for, and each decode server's answer."""

    prompt: Any
    tokens: int
    expected: dict[str, Answer]


def prompts(seed: int) -> list[tuple[Any, int]]:
    """Candidates: prompt and number of tokens."""
    chooser = random.Random(seed)
    texts: list[Any] = [[17], [250]]
    texts += [source(seed * 100 + n, characters) for n, characters in enumerate(LENGTHS[1:] * 2)]
    for family in range(FAMILIES):
        beginning = source(seed * 100 + 60 + family, 2500)
        texts += [f"{beginning}\n# {family}.{n}\n{source(n, 300)}" for n in range(SIBLINGS)]
    return [(text, chooser.choice(TOKENS)) for text in texts]


def quiet_answers(routes: Sequence[Pair], seed: int, say: Callable[[str], None]) -> list[Case]:
    """Every candidate asked alone, of each decode server; those whose way is clear on all of them."""
    found, unclear = [], 0
    for prompt, tokens in prompts(seed):
        expected, clear = {}, True
        for route in routes:
            answer, gaps = _with_gaps(route, prompt, tokens)
            expected[route.decode.name] = answer
            clear = clear and min(gaps) > CLEAR
        if clear:
            found.append(Case(prompt, tokens, expected))
        else:
            unclear += 1
    say(f"{len(found)} prompts, {unclear} left out where two tokens are as good as equal")
    return found


def _with_gaps(route: Pair, prompt: Any, tokens: int) -> tuple[Answer, list[float]]:
    """The answer, and how much better each token is than the next best."""
    tops: list[Any] = []
    answer = route.ask(prompt, tokens, top_logprobs_num=2, keep=tops.append)
    assert not answer.failure, answer.failure
    (meta,) = tops
    return answer, [top[0][0] - top[1][0] for top in meta["output_top_logprobs"]]


@dataclass
class Tally:
    """What came of the requests; filled by all threads."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    tokens_checked: int = 0
    problems: list[str] = field(default_factory=list)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, tokens: int = 0) -> None:
        """One more."""
        with self.guard:
            self.counts[what] += 1
            self.tokens_checked += tokens

    def problem(self, text: str) -> None:
        """Something that must not be."""
        with self.guard:
            self.problems.append(text)
        print("PROBLEM", text[:1000], flush=True)


class Faults:
    """When there were faults."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._since: float | None = None

    def begin(self) -> None:
        """A fault begins."""
        self._since = time.monotonic()

    def end(self) -> None:
        """It has been healed."""
        assert self._since is not None
        self.add(self._since, time.monotonic())
        self._since = None

    def add(self, start: float, end: float) -> None:
        """One that was noticed afterwards. Any thread."""
        self._spans.append((start, end))

    def met(self, start: float, end: float) -> bool:
        """Whether a request that lived from ``start`` to ``end`` may have met one."""
        since = self._since
        open_span = [(since, end)] if since is not None else []
        return any(start < last + GRACE_S and first < end for first, last in [*self._spans, *open_span])


class Watch:
    """Notices when the whole machine stands still, which is a fault of nobody here."""

    STILL_S = 3.0

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._stop = threading.Event()
        self.times = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.2):
            now = time.monotonic()
            if now - last > self.STILL_S:
                self._faults.add(last, now)
                self.times += 1
            last = now


class Workers:
    """Threads that send requests without rest, and pause when they are told to."""

    def __init__(
        self, count: int, seed: int, routes: Sequence[Pair], cases: Sequence[Case], faults: Faults, tally: Tally
    ) -> None:
        self._routes, self._cases, self._faults, self._tally = routes, cases, faults, tally
        self._run = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Semaphore(0)
        self._count = count
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed} {n}"),), daemon=True) for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        """Go on."""
        self._run.set()

    def pause(self) -> None:
        """Return when no request is under way."""
        self._run.clear()
        for _ in range(self._count):
            assert self._idle.acquire(timeout=300), "a request hangs"

    def stop(self) -> None:
        """End the threads; they must be paused."""
        self._stop.set()
        self._run.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, chooser: random.Random) -> None:
        while True:
            if not self._run.is_set():
                self._idle.release()
                self._run.wait()
            if self._stop.is_set():
                return
            try:
                self._one(chooser)
            except Exception as error:
                self._tally.problem(f"{type(error).__name__}: {error}"[:2000])

    def _one(self, chooser: random.Random) -> None:
        """One request of some kind, checked."""
        route, case = chooser.choice(self._routes), chooser.choice(self._cases)
        kind = chooser.choices(("plain", "stream", "batch", "leave"), (40, 25, 15, 20))[0]
        start = time.monotonic()
        if kind == "leave":
            route.leave(case.prompt, 400, chooser.choice((0.02, 0.1, 0.3, 1.0)))
            self._tally.count("left by their client")
            return
        if kind == "batch":
            same = [other for other in self._cases if other.tokens == case.tokens and type(other.prompt) is str]
            cases = chooser.sample(same, min(3, len(same)))
            answers = route.ask_batch([other.prompt for other in cases], case.tokens)
        else:
            cases = [case]
            answers = [route.ask(case.prompt, case.tokens, stream=kind == "stream")]
        for one, answer in zip(cases, answers, strict=True):
            self._judge(route, one, answer, start, kind)

    def _judge(self, route: Pair, case: Case, answer: Answer, start: float, kind: str) -> None:
        expected = case.expected[route.decode.name]
        where = f"{kind} by {route.prefill.name} and {route.decode.name}, prompt of {len(case.prompt)}"
        if answer.failure:
            allowed = self._faults.met(start, time.monotonic())
            self._tally.count("failed with a reason, under a fault" if allowed else "failed without a fault")
            if not allowed:
                self._tally.problem(f"failed without a fault: {where}: {answer.failure[:600]}")
            with self._tally.guard:
                self._tally.reasons[_gist(answer.failure)] += 1
        elif answer.same_text(expected):
            self._tally.count("right", len(answer.tokens))
        else:
            self._tally.count("WRONG")
            self._tally.problem(f"WRONG: {where}: {answer} where {expected} was due")


def _gist(failure: str) -> str:
    """A reason without its numbers."""
    words = failure.split('"message": "')[-1].split("): ", 1)[-1]
    return "".join("#" if c.isdigit() else c for c in words)[:90]


def storm(route: Pair, cases: Sequence[Case], count: int) -> None:
    """Many requests at once, all of them given up within moments."""
    longest = sorted(cases, key=lambda case: len(case.prompt))[-count:]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(route.leave, case.prompt, 400, 0.05 + 0.1 * n) for n, case in enumerate(longest)]
        for call in calls:
            call.result()
