"""Bodies of requests that break the code which reads them.

SGLang's OpenAI protocol looks into fields before pydantic has checked their types, and answers 500 to what it cannot
look into (``"response_format": true``); routers try that again, and count it against the server.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

READS_BODIES = "request_body_to_args"  # the function of FastAPI in which bodies become requests
WRONG_VALUE = (AttributeError, TypeError, KeyError, IndexError, OverflowError, RecursionError)


def answer_unreadable(state: Any) -> None:
    """Before ``set_global_state``, which comes once in the process that serves HTTP, before its first request."""
    from sglang.srt.entrypoints.http_server import app

    for error in WRONG_VALUE:
        app.add_exception_handler(error, refuse)


async def refuse(request: Any, error: Exception) -> JSONResponse:
    """Status 400 for an error over the body; any other error is the server's.

    Raises:
        Exception: the error, where it came from elsewhere.
    """
    if not happened_in(READS_BODIES, error):
        raise error
    return JSONResponse(
        {"error": {"message": f"a field of the request has a wrong value: {error}", "code": 400}},
        status_code=400,
    )


def happened_in(function: str, error: BaseException) -> bool:
    """Whether a function of this name was being run."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == function:
            return True
        frame = frame.tb_next
    return False
