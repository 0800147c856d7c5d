"""Aborted requests that wait to be prefilled: SGLang drops them without a word to their sender.

Before ``Scheduler.abort_request`` in ``sglang/srt/managers/scheduler.py``, which takes a request out of the waiting
queue and, unless it is still bootstrapping, leaves its room open on the prefill rank for good, and the decode server
waiting for the transfer's deadline.
"""

from __future__ import annotations

from typing import Any


def drop_waiting(self: Any, recv_req: Any) -> None:
    """Close the rooms of waiting requests that are about to be dropped, which tells their decode ranks."""
    for req in self.waiting_queue:
        sender = getattr(req, "disagg_kv_sender", None)
        aborted = recv_req.abort_all or req.rid.startswith(recv_req.rid)
        if aborted and sender is not None and not req.pending_bootstrap:
            sender.clear()
