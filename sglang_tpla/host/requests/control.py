"""Refuse control requests that would end the scheduler, which runs them without catching errors.

SGLang (``sglang/srt/entrypoints/http_server.py``) passes on records of experts that the server was not started for, and
profiles that cannot be taken or written. Here a route before SGLang's own answers 400 to these.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

EXPERTS = tuple(f"/{what}_expert_distribution_record" for what in ("start", "stop", "dump"))
PROFILE = "/start_profile"
NAME_LENGTH = 100  # of a prefix or id; both are parts of a file's name


def refuse_fatal(app: Any, server_args: Any) -> None:
    """Put routes before those of SGLang's app whose requests may end the scheduler."""
    routes = app.router.routes
    own = {route.path: route for route in routes if getattr(route, "path", None) in (*EXPERTS, PROFILE)}
    checks: dict[str, Any] = {PROFILE: CheckedProfile(own[PROFILE])}
    if server_args.expert_distribution_recorder_mode is None:
        checks |= dict.fromkeys(EXPERTS, refuse_record)
    for path, check in checks.items():
        # SGLang reads here who may send the request.
        check._auth_level = getattr(own[path].endpoint, "_auth_level", None)
        routes.insert(0, Route(path, check, methods=["GET", "POST"]))


def refused(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": 400}}, status_code=400)


async def refuse_record(request: Request) -> JSONResponse:
    """Answer a request to record experts on a server without a recorder."""
    return refused("this server records no experts; start it with --expert-distribution-recorder-mode")


class CheckedProfile:
    """The endpoint (ASGI) that checks a profile's request and passes it on to SGLang's route."""

    _auth_level: Any = None

    def __init__(self, route: Any) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        if wrong := wrong_profile(body):
            await refused(wrong)(scope, receive, send)
            return
        replayed = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return replayed.pop() if replayed else await receive()

        await self._route.handle(scope, replay, send)


def wrong_profile(body: bytes) -> str:
    """Return what keeps the profile of a request's body from being taken and written, or an empty string.

    SGLang itself answers bodies that are no objects, and fields of another type.
    """
    try:
        asked = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, dict):
        return ""
    known = ["CPU", "GPU"] + ["MEM", "CUDA_PROFILER"] * torch.cuda.is_available()
    activities = asked.get("activities")
    if isinstance(activities, list) and (unknown := [one for one in activities if one not in known]):
        return f"activities must be among {', '.join(known)} on this server; got {unknown!r:.80}"
    for field in ("profile_prefix", "profile_id"):
        name = asked.get(field)
        if isinstance(name, str) and (len(name.encode(errors="replace")) > NAME_LENGTH or set(name) & {"/", "\0"}):
            return f"{field} must be a part of a file's name, at most {NAME_LENGTH} bytes without /; got {name!r:.80}"
    folder = asked.get("output_dir")
    return _unwritable(folder) if isinstance(folder, str) else ""


def _unwritable(folder: str) -> str:
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of nobody
        return f"output_dir {folder!r:.80} cannot be made: {error}"
    return "" if os.access(path, os.W_OK | os.X_OK) else f"output_dir {folder!r:.80} cannot be written to"
