"""Requests that cannot be served get one 4xx at once, and nobody else notices; all others are served."""

import concurrent.futures
import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from sglang_tpla.transfer.room import OTHER_PROMPT
from tests.e2e.odd_requests import native, openai
from tests.e2e.servers import Server, request_body, wait_idle
from tests.e2e.traffic import client

PROMPT = "x = 1\n"
TOKENS = 6
COMPLETION = {"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "temperature": 0}
DEADLINE_S = 60.0  # half of the transfers' deadline: a request that waits for that one hangs
EXAMPLES = int(os.environ.get("TEST_ODD_REQUESTS", "50"))


def ask_both(trio: Any, path: str, body: dict[str, Any]) -> list[httpx.Response]:
    """Send the same body to prefill and decode, as a router would, and return their answers, which must be in time."""
    content = json.dumps(body).encode()

    def ask(server: Server) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return client.post(server.url + path, content=content, headers=headers, timeout=DEADLINE_S)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, (trio.prefill, trio.decode)))


def plain(trio: Any) -> list[int]:
    """Return the answer to a plain request, which must always be the same."""
    said = trio.router.generate(PROMPT, TOKENS, DEADLINE_S)
    return list(said["output_ids"])


@contextmanager
def neighbour(trio: Any) -> Iterator[None]:
    """Send a request again and again, and check that its answer stays the same."""
    expected, over, wrong, asked = plain(trio), threading.Event(), list[str](), itertools.count()

    def ask() -> None:
        while not over.is_set():
            try:
                if (got := plain(trio)) != expected:
                    wrong.append(f"{got} instead of {expected}")
            except Exception as error:
                wrong.append(repr(error))
            next(asked)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not wrong and next(asked) > 0, wrong[:3]
    assert plain(trio) == expected


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text[:500]
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def test_parallel_samples_are_served(trio: Any) -> None:
    """All greedy samples equal the plain answer, and each came through its own room."""
    one = texts(trio.router.post("/v1/completions", COMPLETION))
    (chat,) = texts(trio.router.post("/v1/chat/completions", CHAT))
    for n in (2, 3):
        assert texts(trio.router.post("/v1/completions", COMPLETION | {"n": n})) == one * n
    assert texts(trio.router.post("/v1/chat/completions", CHAT | {"n": 2})) == [chat] * 2
    other = texts(trio.router.post("/v1/completions", COMPLETION | {"prompt": "import os\n"}))
    both = COMPLETION | {"prompt": [PROMPT, "import os\n"], "n": 2}
    assert texts(trio.router.post("/v1/completions", both)) == [*one, *one, *other, *other]
    body = request_body(PROMPT, TOKENS) | {"rid": "mine"}
    body["sampling_params"] |= {"n": 2}
    said = trio.router.post("/generate", body).json()
    assert [answer["text"] for answer in said] == one * 2
    assert len({answer["meta_info"]["id"] for answer in said}) == 2
    hot = texts(trio.router.post("/v1/completions", COMPLETION | {"n": 4, "temperature": 1.5, "max_tokens": 12}))
    assert len(set(hot)) > 1
    streamed: dict[int, str] = {}
    with httpx.stream(
        "POST", trio.router.url + "/v1/completions", json=COMPLETION | {"n": 2, "stream": True}
    ) as events:
        for line in events.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert streamed == {0: one[0], 1: one[0]}
    wait_idle(trio.prefill, trio.decode)


def test_samples_of_a_direct_request_come_to_the_same_rooms(trio: Any) -> None:
    expected = plain(trio)
    body = request_body([PROMPT, PROMPT], TOKENS) | trio.pair.place()
    body["sampling_params"] |= {"n": 3}
    answers = ask_both(trio, "/generate", body)
    assert [a.status_code for a in answers] == [200, 200], [a.text[:300] for a in answers]
    assert [said["output_ids"] for said in answers[1].json()] == [expected] * 6


def test_grammars_hold_from_the_first_token(trio: Any) -> None:
    """Prefill samples the first token and decode the others: both under the grammar."""
    said = texts(trio.router.post("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}))
    assert isinstance(json.loads(said[0]), dict)
    for n in (1, 2):
        for text in texts(trio.router.post("/v1/completions", COMPLETION | {"regex": "[0-9]{3}-[ab]{2}", "n": n})):
            assert re.fullmatch("[0-9]{3}-[ab]{0,2}", text), text
    body = request_body(PROMPT, TOKENS)
    body["sampling_params"] |= {"ebnf": 'root ::= "yes" | "no"', "ignore_eos": False}
    assert trio.router.post("/generate", body).json()["text"] in ("yes", "no")
    for wrong in ({"regex": "[0-9"}, {"ebnf": "root ::="}, {"json_schema": "{"}):
        answer = trio.router.post("/v1/completions", COMPLETION | wrong, DEADLINE_S)
        assert answer.status_code == 400, answer.text[:300]


REFUSED: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 999999]}, {"input_ids": [1, -1]}, {"input_ids": [[1], [4096]]},
    {"text": PROMPT, "input_ids": []}, {"text": PROMPT, "input_ids": [1, 999999]}, {"text": ""},
    {"text": PROMPT, "session_params": {"id": "a"}}, {"text": PROMPT, "lora_path": "nobody"},
    {"text": PROMPT, "return_logprob": True, "top_logprobs_num": 500},
    {"text": PROMPT, "return_hidden_states": True}, {"text": "x " * 20000}, {},
    {"text": PROMPT, "rid": "HEALTH_CHECK_1"},
    {"text": PROMPT, "rid": "\0declined"},
    {"text": PROMPT, "sampling_params": {"regex": "["}}, {"text": PROMPT, "sampling_params": {"ebnf": "root ::= root"}},
    {"text": PROMPT, "sampling_params": {"regex": "([a-z]{1,20}){1,50}"}},
    {"text": PROMPT, "sampling_params": {"ebnf": "root ::= Token(4096)"}},
]  # fmt: skip


def test_refusals_through_the_router_are_client_errors(trio: Any) -> None:
    """No answer is 500, which the router would retry until its circuit breakers close the service."""
    with neighbour(trio):
        for changes in REFUSED:
            body = {"sampling_params": {"max_new_tokens": 2}} | changes
            for _ in range(6):  # more than the router's failures before it opens a circuit
                answer = trio.router.post("/generate", body, DEADLINE_S)
                assert 400 <= answer.status_code < 500, (changes, answer.text[:300])
                assert "message" in answer.text, changes


def test_tokens_named_for_their_log_probabilities_beside_requests_that_name_none(trio: Any) -> None:
    """The requests run for long enough to meet in one batch of the decode server."""
    plain_body = request_body(PROMPT, 64)
    named = plain_body | {"return_logprob": True, "token_ids_logprob": [5, 7]}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        bodies = [plain_body, named, plain_body | {"return_logprob": True}] * 2
        answers = list(pool.map(lambda body: trio.router.post("/generate", body, DEADLINE_S), bodies))
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text[:300] for answer in answers]
    said = [answer.json() for answer in answers]
    assert all(one["output_ids"] == said[0]["output_ids"] for one in said)
    for one in said[1::3]:
        values = one["meta_info"]["output_token_ids_logprobs"]
        # The first token has no values: prefill sampled it.
        assert (
            len(values) == 64
            and not values[0]
            and all([token for _, token, _ in value] == [5, 7] for value in values[1:])
        )


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_grammar_that_has_no_way_on_ends_its_request_alone(trio: Any, temperature: int) -> None:
    """After its first token the grammar forbids everything, so that no token can be sampled."""
    body = request_body(PROMPT, TOKENS)
    body["sampling_params"] |= {"ebnf": 'root ::= "a" dead\ndead ::= dead', "temperature": temperature}
    with neighbour(trio):
        answer = trio.router.post("/generate", body, DEADLINE_S)
    assert answer.status_code < 500, answer.text[:300]
    if answer.status_code == 200:
        assert answer.json()["meta_info"]["finish_reason"]["type"] == "abort", answer.text[:300]
    body["sampling_params"] |= {"ebnf": 'root ::= "a"', "min_new_tokens": 4, "ignore_eos": False}
    answer = trio.router.post("/generate", body, DEADLINE_S)
    assert answer.json()["text"] == "a", answer.text[:300]
    wait_idle(trio.prefill, trio.decode)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bootstrap_room": 2**63}, "from 1 to 9223372036854775807; got 9223372036854775808"),
        ({"bootstrap_room": None}, "send requests to the router"),
        ({"bootstrap_host": "2.2.2.2"}, "name a prefill server"),
        ({"text": [PROMPT, PROMPT], "bootstrap_room": [2, 2]}, "2 comes twice"),
        ({"text": [PROMPT, PROMPT], "bootstrap_room": [2]}, "one room for each of 2 prompts"),
    ],
)
def test_where_a_request_goes_is_checked_on_both_servers(trio: Any, changes: dict[str, Any], said: str) -> None:
    answers = ask_both(trio, "/generate", trio.pair.body(PROMPT, 2) | changes)
    assert [a.status_code for a in answers] == [400, 400], [a.text[:300] for a in answers]
    assert all(said in a.text for a in answers), [a.text[:300] for a in answers]


@pytest.mark.parametrize(
    "changes",
    [
        {"response_format": True}, {"messages": 5}, {"messages": [{"role": "user", "content": {"a": 1}}]}, {"n": {}},
        {"chat_template_kwargs": {"chat_template": "{{ 1/0 }}"}}, {"chat_template_kwargs": {"max_length": 10**9}},
        {"chat_template_kwargs": {"tools": {"a": 1}}},
    ],
    ids=repr,
)  # fmt: skip
def test_a_chat_that_cannot_be_read(trio: Any, changes: dict[str, Any]) -> None:
    answers = ask_both(trio, "/v1/chat/completions", CHAT | trio.pair.place() | changes)
    assert [a.status_code for a in answers] == [400, 400], [a.text[:300] for a in answers]


@pytest.mark.parametrize(
    "changes",
    [
        {"rid": "HEALTH_CHECK_1", "log_metrics": False, "bootstrap_host": "2.2.2.2", "input_ids": [999999]},
        {"sampling_params": {"repetition_penalty": 1e-300, "temperature": 1.0, "max_new_tokens": 300}},
        {"custom_labels": {"tenant": "a"}},
        {"sampling_params": {"temperature": 1e39, "regex": "[0-9]+"}},  # masked logits over an infinite float32
        {"sampling_params": {"stop_token_ids": [999999]}},  # beside anybody's min_new_tokens
    ],
    ids=repr,
)
def test_what_would_end_a_server_once_it_is_let_in(trio: Any, changes: dict[str, Any]) -> None:
    body = {**({} if "input_ids" in changes else {"text": PROMPT}), **trio.pair.place(), **changes}
    answers = ask_both(trio, "/generate", body)
    assert [a.status_code for a in answers] == [400, 400], [a.text[:300] for a in answers]
    plain(trio)


def test_control_requests_that_fail_end_no_server(trio: Any) -> None:
    expected = plain(trio)
    nothing = {"model_path": "/nothing", "load_format": "nothing"}
    for path, body, said in (
        ("/update_weights_from_disk", nothing, "nothing"),
        ("/get_weights_by_name", {"name": "no.such.weight"}, ""),
        ("/send_weights_to_remote_instance", {"master_address": "here", "ports": "1,2,3"}, "Expected"),
        ("/start_expert_distribution_record", {}, "expert_distribution_recorder_mode"),
        ("/resume_memory_occupation", {}, "--enable-memory-saver"),
        ("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 2.5}}, "whole number"),
    ):
        for server in (trio.pair.prefill, trio.pair.decode):
            answer = server.post(path, body)
            assert answer.status_code == 400 and said in answer.text, (path, answer.status_code, answer.text[:300])
    assert plain(trio) == expected


def test_a_time_of_arrival_that_is_no_number(trio: Any) -> None:
    """This endpoint of SGLang checks no types."""
    parameters = {"sampling_params": {"max_new_tokens": 2}, "received_time": "x", **trio.pair.place()}
    answers = ask_both(trio, "/vertex_generate", {"instances": [{"text": PROMPT}], "parameters": parameters})
    assert [a.status_code for a in answers] == [400, 400], [a.text[:300] for a in answers]
    plain(trio)


def test_the_spelling_of_a_host_does_not_matter(trio: Any) -> None:
    expected = plain(trio)
    for host in ("LOCALHOST", "localhost.", "127.0.0.1"):
        answers = ask_both(trio, "/generate", trio.pair.body(PROMPT, TOKENS, bootstrap_host=host))
        assert answers[1].json()["output_ids"] == expected, answers[1].text[:300]


@pytest.mark.parametrize(
    ("length", "statuses", "said"),
    [(20, [400], "prefill computed another prompt"), (17, [400, 400], OTHER_PROMPT), (25, [400, 400], OTHER_PROMPT)],
)
def test_a_room_with_two_prompts_is_never_answered_from_the_other_ones_cache(
    trio: Any, length: int, statuses: list[int], said: str
) -> None:
    """Two clients chose one room, or tokenizers differ: decode refuses, and so does prefill where lengths differ."""
    body = trio.pair.place()
    prompts = [list(range(40, 60)), list(range(50, 50 + length))]

    def ask(server: Server, prompt: list[int]) -> httpx.Response:
        return client.post(server.url + "/generate", json=request_body(prompt, TOKENS) | body, timeout=DEADLINE_S)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        prefill = pool.submit(ask, trio.prefill, prompts[0])
        answers = [ask(trio.decode, prompts[1]), prefill.result()][: len(statuses)]
    assert [answer.status_code for answer in answers] == statuses, [answer.text[:300] for answer in answers]
    assert all(said in answer.text and "room of its own" in answer.text for answer in answers)
    wait_idle(trio.prefill, trio.decode)


@pytest.mark.parametrize(
    ("place_there", "said"),
    [
        ({"bootstrap_host": "no-such-host.invalid"}, "'no-such-host.invalid' cannot be resolved"),
        ({"bootstrap_port": 1}, "no answer from the bootstrap server at 127.0.0.1:1: nobody listens there"),
    ],
)
def test_a_bootstrap_server_that_is_not_found_is_named_to_the_client(
    trio: Any, place_there: dict[str, Any], said: str
) -> None:
    """Decode ranks find the reason at different times, and the rank that answers the client must know the reason."""
    for _ in range(3):
        body = trio.pair.body(PROMPT, 2) | place_there
        answer = client.post(trio.decode.url + "/generate", json=body, timeout=10)
        assert answer.status_code == 500
        assert said in answer.text


def test_an_abort_takes_down_no_request_whose_id_begins_alike(trio: Any) -> None:
    def run(rid: str, tokens: int) -> httpx.Response:
        return ask_both(trio, "/generate", trio.pair.body(PROMPT, tokens, rid=rid))[1]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        longer, named = pool.submit(run, "mine-2", 200), pool.submit(run, "mine", 4000)
        while not named.done() and not longer.done():
            client.post(trio.decode.url + "/abort_request", json={"rid": "mine"}, timeout=10)
        assert longer.result().json()["meta_info"]["finish_reason"]["type"] == "length"
        ended = named.result()
        assert ended.status_code != 200 or ended.json()["meta_info"]["finish_reason"]["type"] == "abort", ended.text
    wait_idle(trio.prefill, trio.decode)


def check_odd(trio: Any, path: str, body: dict[str, Any]) -> None:
    body = trio.pair.place() | body
    try:
        answers = ask_both(trio, path, body)
    except httpx.TimeoutException:
        pytest.fail(f"no answer within {DEADLINE_S} s: {path} {body!r:.600}")
    said = [f"{answer.status_code} {answer.text[:300]}" for answer in answers]
    assert all(answer.status_code < 500 for answer in answers), (path, repr(body)[:600], said)
    assert all(server.process.poll() is None for server in (trio.prefill, trio.decode)), (path, body)


odd = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="TEST_ODD_REQUESTS" not in os.environ, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip


@pytest.mark.parametrize("drawn", [native(), openai()], ids=["native", "openai"])
def test_odd_values(trio: Any, drawn: SearchStrategy[tuple[str, dict[str, Any]]]) -> None:
    """No process dies or hangs, no failure counts against the server, and a neighbour's answer stays the same."""

    @odd
    @given(drawn)
    def each(request: tuple[str, dict[str, Any]]) -> None:
        check_odd(trio, *request)

    with neighbour(trio):
        each()
    wait_idle(trio.prefill, trio.decode)
