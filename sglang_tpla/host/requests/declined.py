"""Tell the other server of a request that was refused where it entered this one.

The edge has no agent. The edge sends its schedulers a message of SGLang's, an abort of an id that no client can have.
Each rank's agent then tells the other server, which answers its half of the request at once and with the reason.
"""

import itertools
import json
from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq

from sglang_tpla.host.requests.fields import (
    FIRST_ROOM,
    LAST_ROOM,
    MAX_SAMPLES,
    RequestRefused,
    checked_host,
    is_integer,
)
from sglang_tpla.transfer.room import REFUSED

RESERVED = "\0"  # no client's id begins with it
DECLINED = RESERVED + "declined"
FAILED = "failed over the request: "  # the server's fault, not the request's
PLACE = ("bootstrap_room", "bootstrap_host", "bootstrap_port")
MAX_REASON_CHARACTERS = 1024


def declined(obj: Any, role: str, error: Exception) -> AbortReq | None:
    """Make the message about a refused request's rooms, or None if it names none.

    Args:
        obj: a request as its client sent it, or as SGLang has filled it in by now; nothing in it is trusted.
    """
    fields = [getattr(obj, name, None) for name in PLACE]
    count = len(fields[0]) if isinstance(fields[0], list) else 1
    columns = [value if isinstance(value, list) else [value] * count for value in fields]
    rows = itertools.islice(zip(*columns, strict=False), MAX_SAMPLES)  # a client's list may have any length
    places = [place for row in rows if (place := checked_place(*row))]
    if not places:
        return None
    # Any other kind of error is this server's fault, and another server may serve the request.
    status = getattr(error, "status_code", 400 if isinstance(error, ValueError) else 500)
    reason = f"the {role} server {REFUSED if status < 500 else FAILED}{error}"[:MAX_REASON_CHARACTERS]
    return AbortReq(rid=DECLINED, abort_message=json.dumps({"places": places, "reason": reason}))


def checked_place(room: Any, host: Any, port: Any) -> tuple[int, str, int | None] | None:
    """Return the room, and host and port of the bootstrap server, if the other server may wait there."""
    if not is_integer(room) or not FIRST_ROOM <= room <= LAST_ROOM or host == FAKE_BOOTSTRAP_HOST:
        return None
    if port is not None and (not is_integer(port) or not 1 <= port <= 65535):
        return None
    try:
        return room, checked_host(host), port
    except RequestRefused:
        return None


def decline(scheduler: Any, message: AbortReq) -> None:
    """Let this rank's agent tell the other server, as `declined` says."""
    decodes = scheduler.disaggregation_mode == DisaggregationMode.DECODE
    queue = scheduler.disagg_decode_prealloc_queue if decodes else scheduler.disagg_prefill_bootstrap_queue
    said = json.loads(message.abort_message)
    for room, host, port in said["places"]:
        queue.kv_manager.decline(room, host, port, said["reason"])
