"""A control request that would end the scheduler is answered 400; others reach SGLang's own route whole."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Body, FastAPI
from starlette.routing import Match

from sglang_tpla.host.requests.control import EXPERTS, PROFILE, refuse_fatal


def served(recorder: str | None) -> FastAPI:
    app = FastAPI()

    async def profile(obj: dict[str, Any] | None = Body(None)) -> dict[str, Any] | None:  # noqa: B008
        return obj

    async def record() -> str:
        return "recorded"

    profile._auth_level = record._auth_level = "admin"  # type: ignore[attr-defined]
    app.api_route(PROFILE, methods=["GET", "POST"])(profile)
    for path in EXPERTS:
        app.api_route(path, methods=["GET", "POST"])(record)
    refuse_fatal(app, SimpleNamespace(expert_distribution_recorder_mode=recorder))
    return app


def ask(app: FastAPI, method: str, path: str, body: Any = None) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, json=body)

    return asyncio.run(run())


def test_experts_are_recorded_where_the_server_has_a_recorder() -> None:
    for path in EXPERTS:
        for method in ("GET", "POST"):
            answer = ask(served(None), method, path)
            assert answer.status_code == 400 and "--expert-distribution-recorder-mode" in answer.text
            assert ask(served("stat"), method, path).json() == "recorded"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"activities": ["CPU", "RPD"]}, "activities must be among CPU, GPU"),
        ({"activities": [{}]}, "activities must be"),
        ({"profile_prefix": "a/b"}, "profile_prefix must be"),
        ({"profile_id": "é" * 60}, "profile_id must be"),
        ({"output_dir": "/proc/nothing"}, "cannot be made"),
        ({"output_dir": "a\0b"}, "cannot be made"),
        ({"output_dir": "~nobody-here/x"}, "cannot be made"),
    ],
)
def test_a_profile_that_cannot_be_taken(body: dict[str, Any], why: str) -> None:
    answer = ask(served(None), "POST", PROFILE, body)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text


def test_other_profiles_reach_sglang(tmp_path: Path) -> None:
    body = {"activities": ["CPU", "GPU"], "output_dir": str(tmp_path / "new"), "num_steps": 3, "profile_prefix": "p"}
    assert ask(served(None), "POST", PROFILE, body).json() == body
    assert ask(served(None), "GET", PROFILE).json() is None
    assert ask(served(None), "POST", PROFILE, [1]).status_code == 422


def test_who_may_ask_is_unchanged() -> None:
    """SGLang looks up the right in the endpoint of the first route that matches."""
    for path in (PROFILE, *EXPERTS):
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        matches = [route.matches(scope) for route in served(None).routes]
        found = next(child for match, child in matches if match is Match.FULL)
        assert found["endpoint"]._auth_level == "admin"
