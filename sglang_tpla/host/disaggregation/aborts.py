"""Abort one request and no other, and tell its peer.

The hook is around ``Scheduler.abort_request`` in ``sglang/srt/managers/scheduler.py``. SGLang aborts every request
whose id begins with the named one, another client's too. SGLang also takes an aborted request out of the waiting queue
without telling its sender, which leaves the room open on the prefill rank for good and makes the decode server wait for
the transfer's deadline. Finally, SGLang overlooks requests that ``pause_generation`` took back from a decode server,
and computes them to their end after ``continue_generation``.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_tpla.host.requests.declined import DECLINED, RESERVED, decline

HELD = "held_rebootstrap_reqs"  # the retracted requests of a paused decode server
SAMPLE = re.compile(r"_[0-9a-f]{32}")  # SGLang's suffix for the samples of one request


def abort(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """Abort the named request and its samples, after telling the decode ranks of waiting ones."""
    if recv_req.rid == DECLINED:
        if recv_req.abort_message:  # a client's abort has no message, whatever its id
            decline(self, recv_req)
        return None
    named = recv_req.rid
    others = []
    if not recv_req.abort_all:
        for req in live_requests(self):
            if req.rid.startswith(named) and req.rid != named and not SAMPLE.fullmatch(req.rid[len(named) :]):
                others.append(req)
                req.rid = RESERVED + req.rid  # no client's id begins with this prefix
    try:
        # later releases abort the sender in their own code
        if not hasattr(self, "release_aborted_prefill_waiting_req"):
            drop_waiting(self, recv_req)
        answer_held(self, recv_req)
        return original(self, recv_req)
    finally:
        for req in others:
            req.rid = req.rid.removeprefix(RESERVED)


def live_requests(scheduler: Any) -> Iterator[Any]:
    """Yield every request that a scheduler holds, once."""
    queues = [scheduler.waiting_queue, scheduler.grammar_manager.grammar_queue]
    for name in ("disagg_prefill_bootstrap_queue", "disagg_decode_prealloc_queue", "disagg_decode_transfer_queue"):
        holder = getattr(scheduler, name, None)
        queues += [getattr(holder, part, None) or () for part in ("queue", "retracted_queue", HELD)]
    queues.append(getattr(scheduler, "disagg_prefill_inflight_queue", None) or ())
    queues += [batch.reqs for batch in (scheduler.running_batch, scheduler.last_batch) if batch is not None]
    queues.append([scheduler.chunked_req] if scheduler.chunked_req is not None else [])
    seen: set[int] = set()
    for queue in queues:
        for entry in queue:
            req = getattr(entry, "req", entry)  # decode's queues wrap requests
            if id(req) not in seen:
                seen.add(id(req))
                yield req


def drop_waiting(self: Any, recv_req: Any) -> None:
    """Close the rooms of waiting requests that are about to be dropped, which tells their decode ranks."""
    for req in self.waiting_queue:
        sender = getattr(req, "disagg_kv_sender", None)
        aborted = recv_req.abort_all or req.rid.startswith(recv_req.rid)
        if aborted and sender is not None and not req.pending_bootstrap:
            sender.clear()


def answer_held(self: Any, recv_req: Any) -> None:
    """Answer aborted requests that wait for ``continue_generation`` like running ones, with the tokens so far."""
    queue = getattr(self, "disagg_decode_prealloc_queue", None)
    held = getattr(queue, HELD, None) or []
    aborted = [req for req in held if recv_req.abort_all or req.rid.startswith(recv_req.rid)]
    if not aborted:
        return
    setattr(queue, HELD, [req for req in held if req not in aborted])
    for req in aborted:
        if req.pd_rebootstrap_forced_output_id is not None:  # the last token, which SGLang has taken off
            req.output_ids.append(req.pd_rebootstrap_forced_output_id)
        req.finished_reason = FINISH_ABORT()
        self.output_streamer.stream_output([req], req.return_logprob)
