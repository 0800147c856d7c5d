"""A body that breaks the code which reads it is answered 400; the same error elsewhere is the server's."""

import asyncio
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import BaseModel, model_validator

from sglang_tpla.host.requests.bodies import WRONG_VALUE, refuse


class Asked(BaseModel):
    """This body's validator looks into a field before its type is checked."""

    form: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def look(cls, values: dict[str, Any]) -> dict[str, Any]:
        values.get("form", {}).get("type")
        return values


def served() -> FastAPI:
    app = FastAPI()

    @app.post("/ask")
    async def ask(body: Asked) -> str:
        return "answered"

    @app.post("/broken")
    async def broken(body: Asked) -> str:
        raise AttributeError("the server's own")

    for error in WRONG_VALUE:
        app.add_exception_handler(error, refuse)
    return app


def post(path: str, body: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(served(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(path, json=body)

    return asyncio.run(run())


def test_a_body_that_cannot_be_looked_into() -> None:
    assert post("/ask", {"form": {"type": "x"}}).json() == "answered"
    for body in ({"form": True}, {"form": None}, []):
        answer = post("/ask", body)
        assert answer.status_code == 400 and "wrong value" in answer.json()["error"]["message"], body


def test_an_error_of_the_servers_own() -> None:
    assert post("/broken", {"form": {}}).status_code == 500
