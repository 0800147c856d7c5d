"""kill -9 of one side under load: survivors stay well, fail the requests in flight, and serve when it is back."""

import concurrent.futures
import contextlib
import time
from pathlib import Path

import torch

from tests.e2e.faulty import PROMPTS, SLOW, TOKENS, Faulty, stopped, until_in_flight
from tests.e2e.prompts import encoded, source
from tests.e2e.servers import counters, until_running, wait_idle
from tests.e2e.traffic import Answer, Load

# Prompts of some 1,500 tokens: many chunks, no common prefix.
LONG = [source(seed=9 + n, characters=5_000) for n in range(2)]
FAIL_WITHIN_S = 100.0


def until_answered(load: Load, requests: int) -> None:
    """Wait until the load has had that many right answers from the plain decode server."""
    deadline = time.monotonic() + 120
    while load.right["single"] < requests:
        assert time.monotonic() < deadline, load.failures
        time.sleep(0.05)


def failed(call: concurrent.futures.Future[Answer]) -> str:
    """Return the reason of a request's failure, which must have happened."""
    answer = call.result(FAIL_WITHIN_S)
    assert answer.failure, answer
    return answer.failure


def test_decode_killed_at_every_stage_under_load(faulty: Faulty) -> None:
    """One request's ranks have not asked yet, another is in mid-chunk, a third decodes; other requests are served.

    Prefill fails the first two (the first after a separate time limit, since nobody ever asks), and none of the other
    decode server's requests.
    """
    route, before = faulty.route, faulty.held()
    lines = len(faulty.prefill.log.read_text(errors="replace").splitlines())
    with (
        concurrent.futures.ThreadPoolExecutor(3) as pool,
        Load([faulty.side], PROMPTS, faulty.expected, TOKENS) as load,
    ):
        calls = [pool.submit(route.ask, PROMPTS[0], 1500, stream=True)]
        until_running(faulty.decode, calls[0])
        with contextlib.ExitStack() as halt:
            with faulty.network("throttle", bytes_per_s=SLOW / 6):  # only until the ranks stop, to spare the load
                arrived = counters(faulty.decode)["chunks"]
                calls.append(pool.submit(route.ask, LONG[0], TOKENS))
                until_in_flight(faulty.decode, calls[-1], arrived)
                halt.enter_context(stopped(*faulty.decode.schedulers()))
            calls.append(pool.submit(route.ask, PROMPTS[2], TOKENS))
            # Prefill takes requests in order, so it has this one when two later requests have been answered.
            until_answered(load, load.right["single"] + 2)
            faulty.decode.kill()
        for call in calls:
            failed(call)
        served = load.right["single"]
        faulty.decode.start().wait()
        assert load.right["single"] > served > 0
    assert not load.failures["single"], load.failures
    said = "\n".join(faulty.prefill.log.read_text(errors="replace").splitlines()[lines:])
    assert "no decode rank has asked for this room" in said and "was lost" in said, said[-3000:]
    faulty.at_rest(before)


def test_prefill_killed_in_mid_chunk_under_load(faulty: Faulty) -> None:
    """Every request of the prefill server fails with a reason; after a restart it serves both decode servers."""
    survivors, before = (faulty.decode, faulty.single), faulty.held()
    pids = [server.process.pid for server in survivors if server.process is not None]
    with Load([faulty.route, faulty.side], PROMPTS, faulty.expected, TOKENS) as load:
        with (
            concurrent.futures.ThreadPoolExecutor(2) as pool,
            faulty.network("throttle", bytes_per_s=SLOW / 6),  # neither transfer ends before the other has begun
        ):
            arrived = [counters(server)["chunks"] for server in survivors]
            calls = [pool.submit(route.ask, LONG[1], TOKENS) for route in (faulty.route, faulty.side)]
            for server, call, chunks in zip(survivors, calls, arrived, strict=True):
                until_in_flight(server, call, chunks, rooms=2)  # one of the rooms is the load's
            faulty.prefill.kill()
            answers = [call.result(FAIL_WITHIN_S) for call in calls]
        served = dict(load.right)
        faulty.prefill.start().wait()
        for answer in answers:
            assert "rank" in answer.failure, answer  # the lost rank, or the rank of this server that lost it
        deadline = time.monotonic() + 120
        while any(load.right[name] == served[name] for name in served):
            assert time.monotonic() < deadline, load.failures
            time.sleep(0.1)
    assert pids == [server.process.pid for server in survivors if server.process is not None]
    faulty.at_rest(before)


def test_first_token_is_the_same_for_any_decode_layout(faulty: Faulty) -> None:
    """Two prefill ranks share the sending both to one plain MLA decode rank and to two ranks with a slice each."""
    first, second = (faulty.expected["decode"], faulty.expected["single"])
    assert [answer.tokens[0] for answer in first] == [answer.tokens[0] for answer in second]
    wait_idle(*faulty.servers)


def test_no_shared_memory_on_the_prefill_server(faulty: Faulty) -> None:
    """The server may not make a file as large as its segment: it says so, and all rows go through sockets."""
    said = faulty.prefill.log.read_text(errors="replace")
    assert "no shared memory of" in said and "File too large" in said
    assert counters(faulty.decode)["wire_bytes"] > 0


def test_statistics_of_live_traffic(faulty: Faulty, nano_mla: str, statistics_folder: Path) -> None:
    """The prefill ranks' sums over their traffic match those of the plain model over the same texts."""
    from sglang_tpla.measure.statistics import Statistics, collect, combine
    from sglang_tpla.reference_model.forward import PlainModel

    files = sorted(statistics_folder.glob("*.safetensors"))
    assert len(files) >= 2 and len(files) % 2 == 0  # one a rank for each start of the server that wrote any
    whole = combine([Statistics.load(path) for path in files])
    assert whole.tokens >= 3000 and whole.layers[0].query_outer.shape == (8, 32, 32)
    texts = [torch.tensor([ids]) for ids in encoded(nano_mla, (*PROMPTS, *LONG))]
    plain = collect(PlainModel(nano_mla), texts)
    for number, live in enumerate(whole.layers):
        for what in ("covariance", "query_outer"):
            ours = getattr(live, what).flatten()
            alike = [
                float(torch.nn.functional.cosine_similarity(ours, getattr(layer, what).flatten(), dim=0))
                for layer in plain
            ]
            # The traffic was these texts in another proportion, and a few others.
            assert alike[number] > 0.9 and alike[number] == max(alike), (number, what, alike)
