"""Answer 400 to request bodies that break the code which reads them.

SGLang's OpenAI protocol reads fields before pydantic has checked their types, and answers 500 where that fails
(``"response_format": true``). Routers try again after a 500, and count it against the server.
"""

from typing import Any

from starlette.responses import JSONResponse

from sglang_tpla.host.requests.control import refuse_fatal

READS_BODIES = "request_body_to_args"  # FastAPI's function that turns bodies into requests
WRONG_VALUE = (AttributeError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError)


def answer_unreadable(state: Any) -> None:
    """Hook before ``set_global_state``, which the process that serves HTTP calls once before its first request.

    Control requests that would end the scheduler are refused from here on as well.
    """
    from sglang.srt.entrypoints.http_server import app

    for error in WRONG_VALUE:
        app.add_exception_handler(error, refuse)
    refuse_fatal(app, state.tokenizer_manager.server_args)


async def refuse(request: Any, error: Exception) -> JSONResponse:
    """Answer an error over the body with status 400; raise any other error again, because it is the server's.

    Raises:
        Exception: an error from elsewhere.
    """
    if not happened_in(error, READS_BODIES):
        raise error
    return JSONResponse(
        {"error": {"message": f"a field of the request has a wrong value: {error}", "code": 400}}, status_code=400
    )


def happened_in(error: BaseException, *functions: str) -> bool:
    """Return whether the error happened within a function of one of these names."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name in functions:
            return True
        frame = frame.tb_next
    return False
