"""Hooks where a request reaches a scheduler: one that cannot run is refused at once, on both sides and without a room.

SGLang marks such a request and lets one token of it run, so that its caches are cleaned up. Between prefill and decode
that would start a transfer that the other side does not know of, and then wait for its deadline.
"""

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, DisaggregationMode, prepare_abort
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.utils.network import NetworkAddress

from sglang_tpla.host.requests.declined import FAILED
from sglang_tpla.transfer.room import REFUSED

REFUSED_ADVICE = " or enable --allow-auto-truncate"  # SGLang's, for a long prompt; `host/validation.py` refuses it

logger = logging.getLogger(__name__)


def admit(original: Callable[..., None], self: Any, req: Any, is_retracted: bool = False) -> None:
    """Hook around ``Scheduler._add_request_to_queue``: refuse a request or let it in."""
    if is_retracted:
        original(self, req, is_retracted=True)
        return
    decodes = self.disaggregation_mode == DisaggregationMode.DECODE
    queue = self.disagg_decode_prealloc_queue if decodes else self.disagg_prefill_bootstrap_queue
    reason, status = None, HTTPStatus.BAD_REQUEST
    if isinstance(req.to_finish, FINISH_ABORT):
        reason, status = req.to_finish.message.replace(REFUSED_ADVICE, ""), req.to_finish.status_code or status
    else:
        reason = no_priority(self, req) or no_token_allowed(req)
        if decodes:
            reason = reason or no_such_rank(queue, req) or no_prompts_experts(self, req)
    if reason is None:
        original(self, req)
        return
    logger.error("%s, %s", reason, req.rid)
    if hasattr(self, "_release_aborted_request"):  # later releases hold inputs and cache handles for a request
        self._release_aborted_request(req)
    prepare_abort(req, reason, status_code=status)
    self.output_streamer.stream_output([req], req.return_logprob)
    if req.bootstrap_room is not None and req.bootstrap_host not in (None, FAKE_BOOTSTRAP_HOST):
        verb = REFUSED if status < HTTPStatus.INTERNAL_SERVER_ERROR else FAILED
        reason = f"the {self.disaggregation_mode.value} server {verb}{reason}"
        queue.kv_manager.decline(req.bootstrap_room, req.bootstrap_host, req.bootstrap_port, reason)


def no_such_rank(queue: Any, req: Any) -> str | None:
    """Return why the data-parallel prefill rank that a request names cannot exist; None if no reason is known."""
    rank, host = req.disagg_prefill_dp_rank, req.bootstrap_host
    if rank is None or host is None:
        return None
    address = NetworkAddress(host, req.bootstrap_port).to_host_port_str()
    info = queue.kv_manager.prefill_info_table.get(address)
    if info is None or 0 <= rank < info.dp_size:
        return None
    return f"disagg_prefill_dp_rank must lie in 0...{info.dp_size - 1} for the prefill server {address}; got {rank}"


def no_priority(scheduler: Any, req: Any) -> str | None:
    """Return the reason for refusing a priority on a server that takes none, or None.

    SGLang would refuse it without telling the other server, which may have been started with other flags.
    """
    refuses = scheduler.abort_on_priority_when_disabled and not scheduler.enable_priority_scheduling
    return "priority is disabled on this server: leave it out" if refuses and req.priority is not None else None


def no_prompts_experts(scheduler: Any, req: Any) -> str | None:
    """Return the reason for refusing the prompt's experts on a decode server, or None.

    SGLang would answer with whatever an earlier request left in the slots of the prompt's tokens.
    """
    length = len(req.origin_input_ids)
    if not scheduler.server_args.enable_return_routed_experts or not req.return_routed_experts:
        return None
    if req.routed_experts_start_len >= length:
        return None
    return (
        f"a decode server does not know the experts of the prompt: routed_experts_start_len must be {length}, the "
        f"length of the prompt; got {req.routed_experts_start_len}. Prefill's own answer has them"
    )


def no_token_allowed(req: Any) -> str | None:
    """Return the reason for refusing a ready grammar that masks every token (``root ::= root``), or None."""
    if req.grammar is None:
        return None
    mask = req.grammar.allocate_vocab_mask(req.vocab_size, 1, "cpu")
    if mask is None or mask.dtype != torch.int32:  # outlines marks forbidden tokens instead of bits
        return None
    req.grammar.fill_vocab_mask(mask, 0)
    return None if mask.any() else "the grammar of this request allows no token to begin with: it has no end"


def handle(original: Callable[..., None], self: Any, recv_req: Any, **kwargs: Any) -> None:
    """Hook around ``Scheduler.handle_generate_request``: let an error over one request fail that request alone."""
    try:
        original(self, recv_req, **kwargs)
    except Exception as error:
        logger.exception("request %s ends here", recv_req.rid)
        reason = {
            "type": "abort",
            "status_code": HTTPStatus.BAD_REQUEST,
            "message": f"this server cannot read the request: {type(error).__name__}: {error}",
        }
        self.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=recv_req.rid, finished_reason=reason), recv_req)


def note_idle(self: Any) -> None:
    """Hook before ``Scheduler.on_idle`` on prefill: tell the agent that no request is left to open a room.

    A decode rank that asks for a room whose request was refused at the edge, or never came, then does not wait for the
    deadline.
    """
    self.disagg_prefill_bootstrap_queue.kv_manager.agent.note_idle()
