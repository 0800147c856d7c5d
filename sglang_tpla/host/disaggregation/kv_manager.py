"""SGLang's scheduler-level disaggregation on the ZMQ transfer agents.

SGLang gives a manager a rank, a sender a request on prefill and a receiver a request on decode
(``sglang/srt/disaggregation/common/conn.py``). Here they are thin: everything that moves is `PrefillAgent` and
`DecodeAgent`, and they alone say who is alive: a bootstrap server that is away fails no transfer. Rank mapping is
SGLang's, but for one thing: every decode rank asks every tensor-parallel prefill rank.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np
import torch
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferMetric
from sglang.srt.disaggregation.common.conn import (
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
    KVTransferError,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from sglang_tpla.cache_rows.fp8 import FP8
from sglang_tpla.host import compat
from sglang_tpla.host.disaggregation.bootstrap_server import registration
from sglang_tpla.host.disaggregation.engine_memory import (
    cache_dtype,
    cache_pool,
    metadata_rows,
    prompt_limits,
)
from sglang_tpla.host.disaggregation.prefill_lookup import (
    Lookups,
    Place,
    rank_addresses,
    require_resolvable,
    why_unanswered,
)
from sglang_tpla.host.model.rows import projections, row_format, sketched
from sglang_tpla.host.process import current_slice, model_identity, settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState, TransferError, TransferMetric, remember

logger = logging.getLogger(__name__)
SWITCH_INTERVAL_S = 0.0002
# A scheduler that asks for the same room again this soon has nothing else to do, and naps.
IDLE_PASS_S, NAP_S = 0.0005, 0.0002
_agents: list[Any] = []


def agents() -> tuple[Any, ...]:
    """Agents of this process: one a rank."""
    return tuple(_agents)


class TplaKVManager(CommonKVManager):
    """One rank's agent, and what SGLang's common manager knows about its peers."""

    local_ip: str

    def __init__(
        self,
        args: Any,
        disaggregation_mode: DisaggregationMode,
        server_args: Any,
        is_mla_backend: bool = False,
    ) -> None:
        self.agent: Any  # a PrefillAgent or a DecodeAgent, as the server's role is
        self._lost_peers: deque[tuple[str, int]] = deque()
        self._watched: tuple[int, float] = (-1, 0.0)  # a room that is asked for, and when it last was
        self.rooms_taken: set[int] = set()  # from a request's opening of its room to the end of the request
        self.prompts: dict[int, int] = {}  # tokens of requests whose rooms are about to be opened, by room
        self._lookups = Lookups(self._look_up)
        self.unanswered: OrderedDict[str, str] = (
            OrderedDict()
        )  # by bootstrap server, why it was not found when last asked for
        self.rank_addresses: dict[
            str, dict[Place, dict[str, Any]]
        ] = {}  # by bootstrap server, as prefill_info_table
        # The scheduler's loop polls without rest while a transfer is under way; at Python's default of 5 ms each of
        # the agent's threads would wait that long for the interpreter after every call into ZMQ or torch.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self.server_socket.close(linger=0)  # the agent has its own
        if disaggregation_mode == DisaggregationMode.DECODE:
            self.agent = self._decode_agent()
        _agents.append(self.agent)
        if server_args.enable_metrics:
            # Not at the top: by now SGLang has set the folder that prometheus_client reads when it is imported.
            from sglang_tpla.transfer.metrics import AgentPublisher

            self._publisher = AgentPublisher(agents)

    def register_to_bootstrap(self) -> None:
        """Start the prefill agent and register its address instead of the common manager's socket."""
        # A server that only listens on loopback keeps its transfers there as well.
        host = (
            self.bootstrap_host if self.bootstrap_host in ("127.0.0.1", "localhost", "::1") else self.local_ip
        )
        self.agent = PrefillAgent(
            cache_pool(self.kv_args, self.server_args),
            metadata_rows(self.kv_args),
            model_hash=model_identity(self.server_args),
            settings=settings(),
            bind_host=host,
            rank=self.attn_tp_rank,
            size=self.attn_tp_size,
            bind_port=settings().listen_port and settings().listen_port + 2 * self._place,
            advertised_port=settings().advertised(self._place, ("", 0))[1],
            limits=prompt_limits(self.kv_args, self.server_args),
        )
        self.local_ip, self.rank_port = settings().advertised(self._place, self.agent.address)
        self._registrar = registration(self)
        self._registrar.start()

    @property
    def _place(self) -> int:
        """Number of this rank among all of its server."""
        group = self.system_dp_rank * self.attn_dp_size + self.attn_dp_rank
        return (group * self.attn_cp_size + self.attn_cp_rank) * self.attn_tp_size + self.attn_tp_rank

    def _decode_agent(self) -> DecodeAgent:
        part = current_slice(self.server_args, self.attn_tp_rank, self.attn_tp_size)
        text = compat.model_config(self.server_args).hf_text_config
        model = text.kv_lora_rank, text.qk_rope_head_dim
        layers = text.num_hidden_layers
        rows = row_format(
            *model,
            layers,
            fp8=cache_dtype(self.kv_args, self.server_args) == FP8,
            group=part.group if part is not None else 0,
        )
        draft_dtype = compat.model_config(self.server_args).dtype
        rows = rows.with_whole_latents(len(self.kv_args.kv_data_ptrs) - layers, *model, draft_dtype)
        projection = None
        pool = cache_pool(self.kv_args, self.server_args, rows)
        if part is not None:
            # Behind the target's layers come those of a draft model, which every rank keeps whole.
            drafts = len(pool.layers) - layers
            matrices = [*projections(part, layers, *model), *[torch.eye(pool.latent_dim)] * drafts]
            projection = Projection(matrices, rows.shared, sketched=rows if sketched() else None)
        return DecodeAgent(
            pool,
            metadata_rows(self.kv_args),
            projection,
            model_hash=model_identity(self.server_args),
            settings=settings(),
            rank=self.attn_tp_rank,
            size=self.attn_tp_size,
            limits=prompt_limits(self.kv_args, self.server_args),
            # Called from the agent's thread, while the scheduler may be between a look and a read of the same tables.
            on_peer_lost=lambda host, port: self._lost_peers.append((host, port)),
        )

    def nap_if_idle(self, room: int) -> None:
        """Called for each look at a room: give the agent's threads the interpreter where the scheduler only waits.

        SGLang's loop spins while transfers are under way. Beside it, each return of a thread from ZMQ, torch or a
        checksum waits for the switch interval, a dozen times a chunk; a scheduler that computes is not held up.
        """
        watched, before = self._watched
        now = time.monotonic()
        if room == watched and now - before < IDLE_PASS_S:
            time.sleep(NAP_S)
            now = time.monotonic()
        if room == watched or now - before > IDLE_PASS_S:
            self._watched = room, now

    def decline(self, req: Any, reason: str) -> None:
        """This server refused a request before it had a sender or receiver: the other side need not wait for it."""
        room = req.bootstrap_room
        try:
            if self.disaggregation_mode == DisaggregationMode.PREFILL:
                self.agent.decline(room, reason)
                return
            known = self.rank_addresses.get(
                NetworkAddress(req.bootstrap_host, req.bootstrap_port).to_host_port_str()
            )
            peers = {(info["rank_ip"], info["rank_port"], False) for info in (known or {}).values()}
            if peers:  # else its rank waits for room_timeout_s
                self.agent.open_room(room, sorted(peers))
                self.agent.abort(room, reason)
                self.agent.close_room(room)
        except TransferError as error:
            logger.error("room %s: %s", room, error)

    def forget_lost_peers(self) -> None:
        """Drop cached addresses of lost prefill ranks, so that the next request asks their bootstrap server anew."""
        while self._lost_peers:
            lost = self._lost_peers.popleft()

            def names(infos: Iterable[dict[str, Any]], lost: tuple[str, int] = lost) -> bool:
                return any((info["rank_ip"], int(info["rank_port"])) == lost for info in infos)

            with self.connection_lock:
                for key in [key for key, infos in self.connection_pool.items() if names(infos)]:
                    del self.connection_pool[key]
                for server in [one for one, ranks in self.rank_addresses.items() if names(ranks.values())]:
                    del self.rank_addresses[server]
                    self.prefill_info_table.pop(server, None)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but it does not wait for a bootstrap server, and a prefill server that cannot fit fails the
        requests that name it, not this server.
        """
        if bootstrap_addr in self.prefill_info_table and not self._lookups.under_way(bootstrap_addr):
            return True
        try:
            return self._lookups.known(bootstrap_addr)
        except (
            Exception
        ) as error:  # also what a stranger's answer led to: it fails the requests that named him
            text = f"prefill server {bootstrap_addr} cannot serve this decode server: {error}"
            logger.error("%s (%s)", text, type(error).__name__)
            for room in list(self.addr_to_rooms_tracker.get(bootstrap_addr, ())):
                self.record_failure(room, text)
                self.update_status(room, KVPoll.Failed)
            return False

    def _resolve_rank_mapping(self, info: Any) -> None:
        """As SGLang's, but with all tensor-parallel prefill ranks: they hold copies of the same rows.

        So the decode ranks of one host ask the same prefill ranks for the same chunks, which travel once, and each
        prefill rank sends a part. SGLang would pair equal numbers of ranks one to one: every byte once a rank.
        """
        super()._resolve_rank_mapping(info)
        info.target_tp_rank = None  # none is asked for form's sake alone
        info.target_tp_ranks = range(info.attn_tp_size)
        info.required_dst_info_num = self.attn_tp_size

    def _look_up(self, bootstrap_addr: str) -> bool:
        """Ask for a prefill server's layout and the addresses of its ranks (on a thread that may wait)."""
        require_resolvable(bootstrap_addr)
        if not super().try_ensure_parallel_info(bootstrap_addr):
            remember(self.unanswered, bootstrap_addr, why_unanswered(bootstrap_addr))
            return False
        info = self.prefill_info_table.pop(bootstrap_addr, None)
        found = info and rank_addresses(bootstrap_addr, info)
        if not found:
            remember(self.unanswered, bootstrap_addr, "it does not say where its ranks are")
            return False
        self.rank_addresses[bootstrap_addr], self.prefill_info_table[bootstrap_addr] = found, info
        return True


class _Request:
    """What sender and receiver share: the state of one room, and the reason it failed.

    A refusal of the agent (a room number in use, pages outside the pool) fails this request alone; the scheduler,
    which calls all this, goes on.
    """

    kv_mgr: TplaKVManager
    bootstrap_room: int
    conclude_state: Any
    _opened = False  # this request's room is open in the agent
    _owner = True  # SGLang's tables under the room number are this request's
    _reason: str | None = None
    _highest = KVPoll.Bootstrapping
    _metric = TransferMetric()

    def _ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Call the agent; False where it refuses."""
        try:
            call(*args, **kwargs)
        except TransferError as error:
            self._refuse(str(error))
            return False
        return True

    def _open(self, *peers: Any) -> None:
        """Open the room in the agent, unless another request has it: also one that has ended and is not cleared yet."""
        if self.bootstrap_room in self.kv_mgr.rooms_taken:
            self._refuse(
                f"room {self.bootstrap_room} is in use by another request of this {self.kv_mgr.agent.role} server"
            )
        elif self._ask(self.kv_mgr.agent.open_room, self.bootstrap_room, *peers):
            self.kv_mgr.rooms_taken.add(self.bootstrap_room)
            self._opened = True
        self._owner = self._opened

    def _refuse(self, reason: str) -> None:
        """Fail this request."""
        self._reason = reason
        self.conclude_state = KVPoll.Failed
        logger.error("room %s: %s", self.bootstrap_room, reason)

    def _state(self) -> Any:
        """KVPoll of the room: a failure known to SGLang's side counts before the agent's view."""
        if self.conclude_state is not None:
            return self.conclude_state
        state = self.kv_mgr.request_status.get(self.bootstrap_room, KVPoll.Bootstrapping)
        if state != KVPoll.Failed and self._opened:
            self.kv_mgr.nap_if_idle(self.bootstrap_room)
            state = int(self.kv_mgr.agent.poll(self.bootstrap_room))
        if state in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = state
            return state
        # The scheduler ends its process over a request that goes back: a decode rank that takes back what it asked for
        # leaves the request where it was, to be asked for again or to fail at its deadline.
        self._highest = max(self._highest, state)
        return self._highest

    def _end(self, reason: str) -> None:
        """Close the room; one that still moves is aborted first, so that its peers hear why."""
        if not self._opened:
            return
        agent, self._opened = self.kv_mgr.agent, False
        if not agent.poll(self.bootstrap_room).ended:
            agent.abort(self.bootstrap_room, reason)
        self._metric = agent.metric(self.bootstrap_room)  # the scheduler asks for it after clear()
        agent.close_room(self.bootstrap_room)
        self.kv_mgr.rooms_taken.discard(self.bootstrap_room)

    def failure_exception(self) -> NoReturn:
        """Raise why the request failed.

        Raises:
            KVTransferError: with the agent's reason, SGLang's, or the word that another rank failed.
        """
        self.conclude_state = KVPoll.Failed
        agent, reason = self.kv_mgr.agent, self._reason
        if reason is None and self._owner:
            with self.kv_mgr.failure_lock:
                reason = self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        if reason is None and self._opened and agent.poll(self.bootstrap_room) == RoomState.FAILED:
            reason = agent.failure(self.bootstrap_room)
        # this rank would have failed it a moment later
        if reason is None and self._opened and isinstance(agent, PrefillAgent):
            reason = agent.suspicion(self.bootstrap_room) or None
        elsewhere = (
            f"another tensor-parallel rank of this {settings().role} server failed the transfer; "
            "that rank's log says why"
        )
        self._end(reason or elsewhere)
        raise KVTransferError(self.bootstrap_room, reason or elsewhere, is_from_another_rank=reason is None)


class TplaKVSender(_Request, CommonKVSender):
    """One request on a prefill rank."""

    _early_send_wait_event: Any = None

    def __init__(
        self,
        mgr: TplaKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *args, **kwargs)
        self.init_time = time.time()
        self._open(mgr.prompts.pop(bootstrap_room, 0))

    def pop_decode_prefix_len(self) -> int:
        """Tokens that the decode side has already."""
        return self.kv_mgr.agent.prefix_tokens(self.bootstrap_room)

    def send(self, kv_indices: Any, state_indices: Any = None, num_kv_tokens: int | None = None) -> None:
        """Hand the next pages to the agent; the last call takes the metadata row along.

        A cached prefix that is sent ahead may still be written by the step before: SGLang leaves an event here.
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
        """KVPoll of the request."""
        state = self._state()
        if state == KVPoll.Bootstrapping:
            return self._check_bootstrap_timeout() or state
        return state

    def get_transfer_metric(self) -> KVTransferMetric:
        """Bytes on the wire and seconds from the first send to the last confirmation."""
        metric = self.kv_mgr.agent.metric(self.bootstrap_room) if self._opened else self._metric
        return KVTransferMetric(transfer_latency_s=metric.seconds, transfer_total_bytes=metric.wire_bytes)

    def _register_prefill_dp_rank(self) -> None:
        """As SGLang's, signed."""
        payload = {"bootstrap_room": self.bootstrap_room, "dp_rank": self.kv_mgr.attn_dp_rank}
        self._ask(self.kv_mgr._registrar.submit, "POST", "/register_dp_rank", payload)

    def clear(self) -> None:
        """Forget the request."""
        self._end("the prefill server dropped the request")
        if self._owner:
            super().clear()

    def abort(self) -> None:
        """The client gave up.

        Nothing stays under the room's number: later releases of SGLang abort a waiting request's sender and never
        clear it, and a number whose last request failed would fail the next one.
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
        self._born, self._prompt_tokens = time.monotonic(), mgr.prompts.pop(bootstrap_room or 0, 0)
        mgr.forget_lost_peers()
        super().__init__(mgr, bootstrap_addr, bootstrap_room)

    def init(self, prefill_dp_rank: int) -> None:
        """The prefill ranks are known: open the room, so that they hear that this request waits here for pages."""
        super().init(prefill_dp_rank)
        if self.conclude_state is None and self.bootstrap_infos is not None:
            peers = [
                (info["rank_ip"], info["rank_port"], bool(info["is_dummy"])) for info in self.bootstrap_infos
            ]
            self._open(peers, self._born, self._prompt_tokens)

    def _get_bootstrap_info_from_server(
        self, prefill_dp_rank: int, prefill_cp_rank: int, target_tp_rank: int, target_pp_rank: int
    ) -> Any:
        """What was looked up; None fails the request."""
        place = (prefill_dp_rank, prefill_cp_rank, target_tp_rank, target_pp_rank)
        found = self.kv_mgr.rank_addresses.get(self.bootstrap_addr, {}).get(place)
        return None if found is None else dict(found)  # SGLang adds to it

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
            destination: from 0.5.21 on, where SGLang wants the rows; only its device pool is served, and flags that ask
                for another are refused at the start (validation.py).
            device_kv_indices: with a host destination alone.
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
            )

    def poll(self) -> Any:
        """KVPoll of the request."""
        return self._state()

    def clear(self) -> None:
        """Forget the request; after this no frame of it is written any more."""
        self._end("the decode server dropped the request")
        if not self._owner:
            return
        super().clear()
        self.kv_mgr.addr_to_rooms_tracker.get(self.bootstrap_addr, set()).discard(self.bootstrap_room)

    def abort(self) -> None:
        """The client gave up, or SGLang did, which has asked the bootstrap server often enough."""
        reason = "Aborted by AbortReq."
        unknown = self.bootstrap_addr not in self.kv_mgr.prefill_info_table
        if unknown and (why := self.kv_mgr.unanswered.get(self.bootstrap_addr)):
            reason = f"no answer from the bootstrap server at {self.bootstrap_addr}: {why}"
        if self._owner:
            self.kv_mgr.record_failure(self.bootstrap_room, reason)
            self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed
        self._end(reason)
