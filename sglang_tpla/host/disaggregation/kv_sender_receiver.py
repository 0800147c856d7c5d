"""One request's ends in SGLang's disaggregation: a sender on prefill and a receiver on decode.

Both classes follow ``sglang/srt/disaggregation/common/conn.py``, with this rank's transfer agent behind them.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferMetric
from sglang.srt.disaggregation.common.conn import CommonKVReceiver, CommonKVSender, KVTransferError

from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager
from sglang_tpla.host.process import settings
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState, TransferError, TransferMetric

HOLD_BACK_S = 0.2
LOOKUP_HOLD_BACK_S = 3.0  # each rank asks bootstrap servers by itself, once a second

logger = logging.getLogger(__name__)


class _Request:
    """The common part of sender and receiver: the state of one room, and the reason for its failure.

    The scheduler calls all methods except `TplaKVReceiver.give_up`. A refusal by the agent (a room number in use, pages
    outside the pool) fails this request alone, and the scheduler goes on.
    """

    kv_mgr: TplaKVManager
    bootstrap_room: int
    conclude_state: Any
    _opened = False  # this request's room is open in the agent
    _owner = True  # SGLang's tables under the room number are this request's
    _reason: str | None = None
    _given_up: str | None = None  # the reason that a thread other than the scheduler's gave
    _highest = KVPoll.Bootstrapping
    _failed_at: float | None = None  # when this rank first saw its room failed
    _metric = TransferMetric()

    def _ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Call the agent, and return whether it accepted."""
        try:
            call(*args, **kwargs)
        except TransferError as error:
            self._refuse(str(error))
            return False
        return True

    def _open(self, *peers: Any) -> None:
        """Open the room in the agent, unless another request has it, even an ended one that is not cleared yet."""
        if self.bootstrap_room in self.kv_mgr.rooms_taken:
            self._refuse(
                f"room {self.bootstrap_room} is in use by another request of this {self.kv_mgr.agent.role} server"
            )
        elif self._ask(self.kv_mgr.agent.open_room, self.bootstrap_room, *peers):
            self.kv_mgr.rooms_taken.add(self.bootstrap_room)
            self._opened = True
        self._owner = self._opened

    def _refuse(self, reason: str) -> None:
        self._reason = reason
        self.conclude_state = KVPoll.Failed
        logger.error("room %s: %s", self.bootstrap_room, reason)

    def _state(self) -> Any:
        """Return the KVPoll of the room; a failure that SGLang's side knows overrides the agent's view."""
        if self.conclude_state is not None:
            return self.conclude_state
        state = self.kv_mgr.request_status.get(self.bootstrap_room, KVPoll.Bootstrapping)
        if state != KVPoll.Failed and self._opened:
            self.kv_mgr.nap_if_idle(self.bootstrap_room)
            state = int(self.kv_mgr.agent.poll(self.bootstrap_room))
        if self._given_up is not None and state != KVPoll.Success:
            state = KVPoll.Failed
        if state == KVPoll.Failed and self._holds_back():
            return self._highest
        if state in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = state
            return state
        # The scheduler ends its process over a state that goes backwards. So a request that a decode rank has taken
        # back keeps its state until it is asked for again or fails at its deadline.
        self._highest = max(self._highest, state)
        return self._highest

    def _holds_back(self) -> bool:
        """Return whether this rank still holds back a failure, so that the rank that answers the client hears it first.

        One rank's failure fails the request on all ranks at once. Each rank finds the reason itself, or hears it from
        the other server.
        """
        if self.kv_mgr.attn_tp_rank == 0:
            return False
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        return now - self._failed_at < (HOLD_BACK_S if self._opened else LOOKUP_HOLD_BACK_S)

    def _not_found(self) -> str:
        """Return the reason why the request's bootstrap server is not known, or an empty text."""
        return ""

    def _end(self, reason: str) -> None:
        """Close the room; abort it first if it has not ended, so that its peers hear the reason."""
        if not self._opened:
            return
        agent, self._opened = self.kv_mgr.agent, False
        if not agent.poll(self.bootstrap_room).ended:
            agent.abort(self.bootstrap_room, reason)
        self._metric = agent.metric(self.bootstrap_room)  # the scheduler asks for it after clear()
        agent.close_room(self.bootstrap_room)
        self.kv_mgr.rooms_taken.discard(self.bootstrap_room)

    def failure_exception(self) -> NoReturn:
        """Raise the reason for the request's failure.

        Raises:
            KVTransferError: with the agent's reason, SGLang's, or the news that another rank failed.
        """
        self.conclude_state = KVPoll.Failed
        agent, reason = self.kv_mgr.agent, self._reason
        if reason is None and self._owner:
            with self.kv_mgr.failure_lock:
                reason = self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        if reason is None and self._opened and agent.poll(self.bootstrap_room) == RoomState.FAILED:
            reason = agent.failure(self.bootstrap_room)
        if reason is None:
            reason = self._given_up
        # The agent suspects a failure, and would have failed the request a moment later.
        if reason is None and self._opened and isinstance(agent, PrefillAgent):
            reason = agent.suspicion(self.bootstrap_room) or None
        if reason is None:
            reason = self._not_found() or None
        elsewhere = (
            f"another tensor-parallel rank of this {settings().role} server failed the transfer; "
            "that rank's log says why"
        )
        self._end(reason or elsewhere)
        raise KVTransferError(self.bootstrap_room, reason or elsewhere, is_from_another_rank=reason is None)


class TplaKVSender(_Request, CommonKVSender):
    """One request on a prefill rank."""

    _early_send_wait_event: Any = None

    def __init__(self, mgr: TplaKVManager, bootstrap_addr: str, bootstrap_room: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *args, **kwargs)
        self._made = time.monotonic()
        self._open(mgr.noted_prompt(bootstrap_room))

    def pop_decode_prefix_len(self) -> int:
        """Return the number of tokens that the decode side has already."""
        return self.kv_mgr.agent.prefix_tokens(self.bootstrap_room)

    def send(self, kv_indices: Any, state_indices: Any = None, num_kv_tokens: int | None = None) -> None:
        """Hand the next pages to the agent; the last call also hands over the metadata row.

        The previous step may still be writing a cached prefix that is sent ahead; SGLang then leaves an event here.
        """
        after, self._early_send_wait_event = self._early_send_wait_event, None
        self.curr_idx += len(kv_indices)
        last = self.curr_idx == self.num_kv_indices
        self._ask(
            self.kv_mgr.agent.send,
            self.bootstrap_room,
            np.asarray(kv_indices, dtype=np.int32),
            last=last,
            metadata_row=self.aux_index if last else None,
            num_tokens=num_kv_tokens,
            after=after,
        )

    def poll(self) -> Any:
        state = self._state()
        if state == KVPoll.Bootstrapping:
            # SGLang compares with the time of day, which may be set meanwhile
            self.init_time = time.time() - (time.monotonic() - self._made)
            return self._check_bootstrap_timeout() or state
        return state

    def get_transfer_metric(self) -> KVTransferMetric:
        """Return the bytes on the wire, and the seconds from the first send to the last confirmation."""
        metric = self.kv_mgr.agent.metric(self.bootstrap_room) if self._opened else self._metric
        return KVTransferMetric(transfer_latency_s=metric.seconds, transfer_total_bytes=metric.wire_bytes)

    def _register_prefill_dp_rank(self) -> None:
        """Register as SGLang does, with a signature."""
        payload = {"bootstrap_room": self.bootstrap_room, "dp_rank": self.kv_mgr.attn_dp_rank}
        self._ask(self.kv_mgr.registrar.submit, "POST", "/register_dp_rank", payload)

    def clear(self) -> None:
        self._end("the prefill server dropped the request")
        if self._owner:
            super().clear()

    def abort(self) -> None:
        """Fail the request, because the client gave up.

        Nothing stays under the room's number: later releases of SGLang abort a waiting request's sender without
        clearing it, and a number whose last request failed would fail the next request.
        """
        self._reason = self._reason or "Aborted by AbortReq."
        self._end(self._reason)
        self.clear()
        self._owner = False
        self.conclude_state = KVPoll.Failed


class TplaKVReceiver(_Request, CommonKVReceiver):
    """One request on a decode rank."""

    def __init__(self, mgr: TplaKVManager, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        self.bootstrap_infos = None
        self._born, self._prompt_tokens = time.monotonic(), mgr.noted_prompt(bootstrap_room)
        mgr.forget_lost_peers()
        super().__init__(mgr, bootstrap_addr, bootstrap_room)

    def init(self, prefill_dp_rank: int) -> None:
        """Open the room, now that the prefill ranks are known, so that they hear that this request waits for pages."""
        super().init(prefill_dp_rank)
        if self.conclude_state is None and self.bootstrap_infos is not None:
            peers = [(info["rank_ip"], info["rank_port"], bool(info["is_dummy"])) for info in self.bootstrap_infos]
            self._open(peers, self._born, self._prompt_tokens)

    def _get_bootstrap_info_from_server(
        self, prefill_dp_rank: int, prefill_cp_rank: int, target_tp_rank: int, target_pp_rank: int
    ) -> Any:
        """Return the result of the look-up; None fails the request."""
        place = (prefill_dp_rank, prefill_cp_rank, target_tp_rank, target_pp_rank)
        found = self.kv_mgr.rank_addresses.get(self.bootstrap_addr, {}).get(place)
        return None if found is None else dict(found)  # a copy, because SGLang adds to it

    def _register_kv_args(self) -> bool:
        infos: list[dict[str, Any]] = self.bootstrap_infos or []
        connect = self.kv_mgr.agent.connect
        return all(self._ask(connect, info["rank_ip"], info["rank_port"]) for info in infos)

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: Any = None,
        decode_prefix_len: int | None = None,
        destination: Any = None,
        device_kv_indices: Any = None,
    ) -> None:
        """Ask the prefill ranks for the request's cache.

        Args:
            destination: SGLang's choice of pool from 0.5.21 on; only the device's is served, and validation.py refuses
                flags that ask for another at start.
            device_kv_indices: given only with a host destination.
        """
        if getattr(destination, "name", "DEVICE") != "DEVICE" or device_kv_indices is not None:
            self._refuse(
                f"room {self.bootstrap_room}: rows are received into the device's pool, and SGLang asked for "
                f"{destination}; drop --disaggregation-decode-host-receive-threshold"
            )
            return
        if self.bootstrap_infos is None:
            self.kv_mgr.record_failure(
                self.bootstrap_room, f"no prefill address for bootstrap server {self.bootstrap_addr}"
            )
            self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
            return
        if self._opened:
            self._ask(
                self.kv_mgr.agent.request,
                self.bootstrap_room,
                np.asarray(kv_indices, dtype=np.int32),
                metadata_row=aux_index,
                expected_ranks=self.required_dst_info_num,
                prefix_tokens=decode_prefix_len or 0,
                after=self.kv_mgr.steps_under_way(),
            )

    def poll(self) -> Any:
        return self._state()

    def _not_found(self) -> str:
        if self.bootstrap_addr in self.kv_mgr.prefill_info_table:
            return ""
        return self.kv_mgr.unanswered.reason(self.bootstrap_addr)

    def clear(self) -> None:
        """Forget the request, after which none of its frames is written."""
        self._end("the decode server dropped the request")
        if not self._owner:
            return
        super().clear()
        self.kv_mgr.addr_to_rooms_tracker.get(self.bootstrap_addr, set()).discard(self.bootstrap_room)

    def abort(self) -> None:
        """Fail the request, because the client gave up, or SGLang did after asking the bootstrap server in vain."""
        not_found = self._not_found()
        reason = not_found or "Aborted by AbortReq."
        if self._owner:
            self.kv_mgr.record_failure(self.bootstrap_room, reason)
            self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        if not not_found or self.kv_mgr.request_status.get(self.bootstrap_room) != KVPoll.Failed:
            # `_state` holds back the other reason, because the ranks find it at different times.
            self.conclude_state = KVPoll.Failed
        self._end(reason)

    def give_up(self, reason: str) -> None:
        """Fail the request; the scheduler learns of it when it next polls.

        Any thread may call this, however late: the request may have left, and another one may have its room.
        """
        self._given_up = reason
