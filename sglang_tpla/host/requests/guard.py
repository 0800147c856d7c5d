"""An error of a control request is the answer to that request, and does not end the scheduler.

The hook is around ``TypeBasedDispatcher.__call__`` (``sglang/utils.py``), through which a scheduler finds the handler
of a message. SGLang lets an error of a handler end the process: a load format or a weight's name that does not exist,
say. `admission` deals with errors of generation requests. An error of the GPU passes, because the process cannot go on
after it. If a handler fails on some ranks only, while the others wait for them in a collective operation, they hang,
as in SGLang.
"""

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from sglang.srt.managers import io_struct

logger = logging.getLogger(__name__)

# Requests that nobody waits for an answer to.
UNANSWERED = ("ConfigureLoggingReq", "ContinueGenerationReqInput", "FreezeGCReq", "PauseGenerationReqInput")
TEXTS = ("message", "error_message")


def dispatch(original: Callable[..., Any], self: Any, obj: Any) -> Any:
    """Hook around ``TypeBasedDispatcher.__call__``: answer a control request whose handler raises an error."""
    try:
        return original(self, obj)
    except Exception as error:
        name, of_gpu = type(obj).__name__, isinstance(error, getattr(torch, "AcceleratorError", ()))
        kind = getattr(io_struct, name.removesuffix("Input") + "Output", None)
        if of_gpu or "CUDA error" in str(error) or (kind is None and name not in UNANSWERED):
            raise
        logger.exception("%s failed; the server goes on", name)
        return None if kind is None else failure(kind, f"{type(error).__name__}: {error}")


def failure(kind: type[msgspec.Struct], text: str) -> msgspec.Struct:
    """Return the answer of a type that says, as far as it can, that a request failed."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if field.name in ("success", "updated"):
            values[field.name] = False
        elif field.name in TEXTS:
            values[field.name] = text
        elif field.required:
            values[field.name] = None
    return kind(**values)
