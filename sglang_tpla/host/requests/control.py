"""Refuse control requests that the scheduler cannot carry out, and whose answers could not say so.

SGLang (``sglang/srt/entrypoints/http_server.py``) passes on releases of memory that the server was not started for,
profiles that cannot be taken or written, and numbers that later steps fail on. Here a route before SGLang's own answers
400 to these, and to requests of Ollama's API. `guard` answers the other errors of control requests.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

OLLAMA = tuple(os.environ.get(f"SGLANG_OLLAMA_{what.upper()}_ROUTE", f"/api/{what}") for what in ("chat", "generate"))
MEMORY = tuple(f"/{what}_memory_occupation" for what in ("release", "resume"))
LOGGING = "/configure_logging"
PROFILE = "/start_profile"
SLOW_DOWN = "/slow_down"
STATE = "/set_internal_state"
LOG_REQUESTS_LEVELS = (0, 1, 2, 3)
LONGEST_SLEEP_S = 60.0  # before each step; a scheduler that sleeps serves nobody
NAME_LENGTH = 100  # of a prefix or id; both are parts of a file's name


def refuse_fatal(app: Any, server_args: Any) -> None:
    """Put routes before those of SGLang's app whose requests the scheduler may fail on."""
    routes = app.router.routes
    paths = (*MEMORY, *OLLAMA, *WRONG)
    own = {route.path: route for route in routes if getattr(route, "path", None) in paths}
    checks: dict[str, Any] = {path: Checked(own[path], wrong) for path, wrong in WRONG.items()}
    # SGLang would answer these with status 500, or with 200 and a stream that breaks off.
    checks |= dict.fromkeys(OLLAMA, _refusal("Ollama's API names no room: send /v1/chat/completions to the router"))
    if not server_args.enable_memory_saver:
        why = "this server cannot give memory back; start it with --enable-memory-saver"
        checks |= dict.fromkeys(MEMORY, _refusal(why))
    for path, check in checks.items():
        # SGLang reads here who may send the request.
        check._auth_level = getattr(own[path].endpoint, "_auth_level", None)
        routes.insert(0, Route(path, check, methods=sorted(own[path].methods)))


def refused(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": 400}}, status_code=400)


def _refusal(message: str) -> Any:
    """Return an endpoint that refuses every request with ``message``."""

    async def refuse(request: Request) -> JSONResponse:
        return refused(message)

    return refuse


class Checked:
    """The endpoint (ASGI) that checks a request's body and passes the request on to SGLang's route.

    Args:
        route: SGLang's.
        wrong: returns what is wrong with a body that is a JSON object, or an empty string. SGLang itself answers other
            bodies, and fields of another type.
    """

    _auth_level: Any = None

    def __init__(self, route: Any, wrong: Callable[[dict[str, Any]], str]) -> None:
        self._route, self._wrong = route, wrong

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        try:
            asked = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            asked = None
        if isinstance(asked, dict) and (wrong := self._wrong(asked)):
            await refused(wrong)(scope, receive, send)
            return
        replayed = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return replayed.pop() if replayed else await receive()

        await self._route.handle(scope, replay, send)


def wrong_state(asked: dict[str, Any]) -> str:
    """Return what is wrong with the numbers that a request sets in a scheduler, or an empty string."""
    state = asked.get("server_args")
    if not isinstance(state, dict):
        return ""
    for name, number in state.items():
        if name == "pp_max_micro_batch_size" and (not isinstance(number, int) or isinstance(number, bool)):
            return f"pp_max_micro_batch_size must be a whole number; got {number!r:.80}"
        if name.startswith("speculative_accept_threshold") and not (
            isinstance(number, int | float) and 0 <= number <= 1
        ):
            return f"{name} must lie in 0...1; got {number!r:.80}"
    return ""


def wrong_logging(asked: dict[str, Any]) -> str:
    """Return why a change of the log would fail later requests, or an empty string."""
    level, name = asked.get("log_requests_level"), asked.get("log_level")
    if isinstance(level, int) and level not in LOG_REQUESTS_LEVELS:
        return f"log_requests_level must be one of {LOG_REQUESTS_LEVELS}; got {level!r:.80}"
    if isinstance(name, str) and name.upper() not in logging.getLevelNamesMapping():
        return f"log_level must be one of {', '.join(logging.getLevelNamesMapping())}; got {name!r:.80}"
    for field in ("dump_requests_folder", "crash_dump_folder"):
        folder = asked.get(field)
        if isinstance(folder, str) and folder and (wrong := _unwritable(field, folder)):
            return wrong
    return ""


def wrong_sleep(asked: dict[str, Any]) -> str:
    """Return what is wrong with the time that a scheduler is to sleep, or an empty string."""
    sleep_s = asked.get("forward_sleep_time")
    if isinstance(sleep_s, int | float) and not sleep_s <= LONGEST_SLEEP_S:
        return f"forward_sleep_time must be at most {LONGEST_SLEEP_S:g} seconds; got {sleep_s!r:.80}"
    return ""


def wrong_profile(asked: dict[str, Any]) -> str:
    """Return what keeps a profile from being taken and written, or an empty string."""
    known = ["CPU", "GPU"] + ["MEM", "CUDA_PROFILER"] * torch.cuda.is_available()
    activities = asked.get("activities")
    if isinstance(activities, list) and (unknown := [one for one in activities if one not in known]):
        return f"activities must be among {', '.join(known)} on this server; got {unknown!r:.80}"
    for field in ("profile_prefix", "profile_id"):
        name = asked.get(field)
        if isinstance(name, str) and (len(name.encode(errors="replace")) > NAME_LENGTH or set(name) & {"/", "\0"}):
            return f"{field} must be a part of a file's name, at most {NAME_LENGTH} bytes without /; got {name!r:.80}"
    steps = asked.get("num_steps")
    if asked.get("profile_by_stage") is True and not (isinstance(steps, int) and steps > 0):
        return f"profile_by_stage needs num_steps, which must be at least 1; got {steps!r:.80}"
    folder = asked.get("output_dir")
    return _unwritable("output_dir", folder) if isinstance(folder, str) else ""


def _unwritable(field: str, folder: str) -> str:
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of nobody
        return f"{field} {folder!r:.80} cannot be made: {error}"
    return "" if os.access(path, os.W_OK | os.X_OK) else f"{field} {folder!r:.80} cannot be written to"


WRONG: dict[str, Callable[[dict[str, Any]], str]] = {
    LOGGING: wrong_logging,
    PROFILE: wrong_profile,
    SLOW_DOWN: wrong_sleep,
    STATE: wrong_state,
}
