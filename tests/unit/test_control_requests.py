"""A control request that would end the scheduler is answered 400; others reach SGLang's own route whole."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Body, FastAPI
from starlette.routing import Match

from sglang_tpla.host.requests.control import MEMORY, OLLAMA, PROFILE, STATE, WRONG, refuse_fatal

JSON = {"content-type": "application/json"}


def served(saver: bool = False) -> FastAPI:
    app = FastAPI()

    async def body(obj: dict[str, Any] | None = Body(None)) -> dict[str, Any] | None:  # noqa: B008
        return obj

    async def done() -> str:
        return "done"

    body._auth_level = done._auth_level = "admin"  # type: ignore[attr-defined]
    for path in WRONG:
        app.api_route(path, methods=["GET", "POST", "PUT"])(body)
    for path in (*MEMORY, *OLLAMA):
        app.api_route(path, methods=["GET", "POST"])(done)
    refuse_fatal(app, SimpleNamespace(enable_memory_saver=saver))
    return app


def ask(app: FastAPI, method: str, path: str, body: Any = None, content: str | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, json=body, content=content, headers=JSON if content else {})

    return asyncio.run(run())


def test_memory_of_a_server_that_was_not_started_for_it() -> None:
    for path in MEMORY:
        for method in ("GET", "POST"):
            answer = ask(served(), method, path)
            assert answer.status_code == 400 and "--enable-memory-saver" in answer.text
            assert ask(served(saver=True), method, path).json() == "done"


@pytest.mark.parametrize("path", OLLAMA)
def test_requests_that_can_name_no_room_are_refused_before_their_stream_begins(path: str) -> None:
    answer = ask(served(), "POST", path, {"model": "m", "prompt": "x"})
    assert answer.status_code == 400 and "/v1/chat/completions to the router" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"pp_max_micro_batch_size": 2.5}, "whole number; got 2.5"),
        ({"pp_max_micro_batch_size": True}, "whole number; got True"),
        ({"speculative_accept_threshold_single": 1.5}, "0...1; got 1.5"),
        ({"speculative_accept_threshold_acc": "a"}, "0...1; got 'a'"),
        ({"pp_max_micro_batch_size": 2, "speculative_accept_threshold_acc": 0.5}, ""),
        ({"unknown": 2.5}, ""),
        (7, ""),
    ],
)
def test_numbers_that_later_steps_fail_on(state: Any, why: str) -> None:
    answer = ask(served(), "PUT", STATE, {"server_args": state})
    if why:
        assert answer.status_code == 400 and why in answer.json()["error"]["message"]
    else:
        assert answer.json() == {"server_args": state}


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/slow_down", {"forward_sleep_time": 1e300}, "at most 60 seconds; got 1e+300"),
        ("/slow_down", {"forward_sleep_time": float("inf")}, "at most 60 seconds; got inf"),
        ("/slow_down", {"forward_sleep_time": 0.5}, ""),
        ("/slow_down", {"forward_sleep_time": None}, ""),
        ("/configure_logging", {"log_requests_level": 99}, "one of (0, 1, 2, 3); got 99"),
        ("/configure_logging", {"log_level": "loud"}, "got 'loud'"),
        (
            "/configure_logging",
            {"dump_requests_folder": "/proc/nothing"},
            "dump_requests_folder '/proc/nothing' cannot",
        ),
        ("/configure_logging", {"log_requests_level": 3, "log_level": "info", "dump_requests_folder": ""}, ""),
    ],
)
def test_what_later_steps_and_requests_would_fail_on(path: str, body: dict[str, Any], why: str) -> None:
    data = json.dumps(body)  # httpx refuses an infinite number
    answer = ask(served(), "POST", path, content=data)
    if why:
        assert answer.status_code == 400 and why in answer.json()["error"]["message"]
    else:
        assert answer.json() == body


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"activities": ["CPU", "RPD"]}, "activities must be among CPU, GPU"),
        ({"activities": [{}]}, "activities must be"),
        ({"profile_by_stage": True}, "needs num_steps"),
        ({"profile_by_stage": True, "num_steps": 0}, "at least 1; got 0"),
        ({"profile_prefix": "a/b"}, "profile_prefix must be"),
        ({"profile_id": "é" * 60}, "profile_id must be"),
        ({"output_dir": "/proc/nothing"}, "cannot be made"),
        ({"output_dir": "a\0b"}, "cannot be made"),
        ({"output_dir": "~nobody-here/x"}, "cannot be made"),
    ],
)
def test_a_profile_that_cannot_be_taken(body: dict[str, Any], why: str) -> None:
    answer = ask(served(), "POST", PROFILE, body)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text


def test_other_profiles_reach_sglang(tmp_path: Path) -> None:
    body = {"activities": ["CPU", "GPU"], "output_dir": str(tmp_path / "new"), "num_steps": 3, "profile_prefix": "p"}
    assert ask(served(), "POST", PROFILE, body).json() == body
    assert ask(served(), "GET", PROFILE).json() is None
    assert ask(served(), "POST", PROFILE, [1]).status_code == 422


def test_who_may_ask_is_unchanged() -> None:
    """SGLang looks up the right in the endpoint of the first route that matches."""
    for path in (PROFILE, *MEMORY):
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        matches = [route.matches(scope) for route in served().routes]
        found = next(child for match, child in matches if match is Match.FULL)
        assert found["endpoint"]._auth_level == "admin"
