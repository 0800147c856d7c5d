"""SGLang's scheduler-level disaggregation on the ZMQ transfer agents.

SGLang makes a manager for each rank, a sender for each request on prefill and a receiver for each request on decode
(``sglang/srt/disaggregation/common/conn.py``). Here these classes are thin: `PrefillAgent` and `DecodeAgent` move
everything and alone decide which peers are alive, so an unreachable bootstrap server fails no transfer. The rank
mapping is SGLang's with one change: every decode rank asks every tensor-parallel prefill rank.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from sglang_tpla.host import compat
from sglang_tpla.host.disaggregation.bootstrap_server import registration
from sglang_tpla.host.disaggregation.engine_memory import cache_pool, metadata_rows, prompt_limits
from sglang_tpla.host.disaggregation.prefill_lookup import (
    Lookups,
    Place,
    Unanswered,
    rank_addresses,
    require_resolvable,
    why_unanswered,
)
from sglang_tpla.host.model.rows import layer_maps, row_format, sketched
from sglang_tpla.host.process import make_slice, model_identity, settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import TransferError

logger = logging.getLogger(__name__)
SWITCH_INTERVAL_S = 0.0002
# A scheduler that asks for the same room again within this time has nothing else to do, and naps. With naps of 0.2 ms
# caches of 8,192 tokens took 86 ms instead of 73 (an H200).
IDLE_PASS_S, NAP_S = 0.0005, 0.001
_agents: list[Any] = []


def agents() -> tuple[Any, ...]:
    """Return the agents of this process, one for each rank."""
    return tuple(_agents)


class TplaKVManager(CommonKVManager):
    """One rank's agent, with the knowledge of SGLang's common manager about its peers."""

    local_ip: str

    def __init__(
        self, args: Any, disaggregation_mode: DisaggregationMode, server_args: Any, is_mla_backend: bool = False
    ) -> None:
        self.agent: Any  # a PrefillAgent or a DecodeAgent, by the server's role
        self._lost_peers: deque[tuple[str, int]] = deque()
        self._watched: tuple[int, float] = (-1, 0.0)  # the last room asked for, and the time
        self.rooms_taken: set[int] = set()  # from a request's opening of its room to the end of the request
        self._prompt = (0, 0)  # room and tokens of the request whose room is opened next
        self.forward_stream: Any = None  # the engine's, on decode
        self._lookups = Lookups(self._look_up)
        self.unanswered = Unanswered()
        self.rank_addresses: dict[str, dict[Place, dict[str, Any]]] = {}  # by bootstrap server
        # The scheduler's loop polls without rest during a transfer. At Python's default switch interval of 5 ms, each
        # of the agent's threads would wait that long for the interpreter after every call into ZMQ or torch.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self.server_socket.close(linger=0)  # the agent has its own
        if disaggregation_mode == DisaggregationMode.DECODE:
            self.agent = self._decode_agent()
        _agents.append(self.agent)
        if server_args.enable_metrics:
            # Imported here, because prometheus_client reads a folder at import that SGLang has set by now.
            from sglang_tpla.transfer.metrics import AgentPublisher

            self._publisher = AgentPublisher(agents)

    def register_to_bootstrap(self) -> None:
        """Start the prefill agent and register its address instead of the common manager's socket."""
        # A server that listens only on loopback keeps its transfers there as well.
        host = self.bootstrap_host if self.bootstrap_host in ("127.0.0.1", "localhost", "::1") else self.local_ip
        self.agent = PrefillAgent(
            cache_pool(self.kv_args, self.server_args),
            metadata_rows(self.kv_args),
            model_hash=model_identity(self.server_args),
            settings=settings(),
            bind_host=host,
            rank=self.attn_tp_rank,
            bind_port=settings().listen_port and settings().listen_port + 2 * self._place,
            advertised_port=settings().advertised(self._place, ("", 0))[1],
            limits=prompt_limits(self.kv_args, self.server_args),
        )
        self.local_ip, self.rank_port = settings().advertised(self._place, self.agent.address)
        self.registrar = registration(self)
        self.registrar.start()

    @property
    def data_parallel_group(self) -> int:
        """The number of this rank's replica or attention group; SGLang's ``system_dp_rank`` may be either's."""
        return self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank

    @property
    def _place(self) -> int:
        """The number of this rank among all ranks of its server."""
        group = self.data_parallel_group * self.attn_cp_size + self.attn_cp_rank
        return group * self.attn_tp_size + self.attn_tp_rank

    def _decode_agent(self) -> DecodeAgent:
        config = compat.model_config(self.server_args)
        text = config.hf_text_config
        part = make_slice(text.num_attention_heads, self.attn_tp_rank, self.attn_tp_size)
        model = text.kv_lora_rank, text.qk_rope_head_dim
        layers = text.num_hidden_layers
        rows = row_format(*model, layers, part.group if part is not None else 0)
        rows = rows.with_whole_latents(len(self.kv_args.kv_data_ptrs) - layers, *model, config.dtype)
        projection = None
        pool = cache_pool(self.kv_args, self.server_args, rows)
        if part is not None:
            # A draft model's layers follow the target's, and every rank keeps them whole.
            drafts = len(pool.layers) - layers
            matrices = [layer_maps(part, layer, *model).projection for layer in range(layers)]
            matrices += [torch.eye(pool.latent_dim)] * drafts
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
            # The agent's thread calls this while the scheduler may be between two reads of the same tables.
            on_peer_lost=lambda host, port: self._lost_peers.append((host, port)),
        )

    def note_prompt(self, room: int, tokens: int) -> None:
        """Note the length of a request's prompt. SGLang opens the request's room next, or none (a retracted one)."""
        self._prompt = room, tokens

    def noted_prompt(self, room: int | None) -> int:
        """Return the length of the prompt that was noted for a room, or 0 where none was."""
        noted, tokens = self._prompt
        return tokens if noted == room else 0

    def steps_under_way(self) -> Any:
        """Return an event behind the decode steps that the engine has queued; None where there is no stream of them.

        With overlap scheduling SGLang launches a step before it has read the one before. Where that one ended a
        request, its slots are free, and may be another's at once, while the step still writes a row into one of them.
        What the engine writes there comes later on its stream; a row that the agent wrote too early would be lost.
        """
        if not isinstance(self.forward_stream, torch.cuda.Stream):
            return None
        return self.forward_stream.record_event()

    def nap_if_idle(self, room: int) -> None:
        """Leave the interpreter to the agent's threads if the scheduler, which polls a room, only waits.

        SGLang's loop spins during transfers. Without the nap, a thread that returns from ZMQ, torch or a checksum waits
        for the switch interval, a dozen times a chunk. A scheduler that computes is not delayed.
        """
        watched, before = self._watched
        now = time.monotonic()
        if room == watched and now - before < IDLE_PASS_S:
            time.sleep(NAP_S)
            now = time.monotonic()
        if room == watched or now - before > IDLE_PASS_S:
            self._watched = room, now

    def decline(self, room: int, host: str, port: int | None, reason: str) -> None:
        """Tell the other side not to wait for a request that this server refused before it made a sender or receiver.

        Args:
            host, port: the address of the prefill server's bootstrap server.
        """
        if room in self.rooms_taken:
            return  # the room is another request's
        try:
            if self.disaggregation_mode == DisaggregationMode.PREFILL:
                self.agent.decline(room, reason)
                return
            known = self.rank_addresses.get(NetworkAddress(host, port).to_host_port_str())
            peers = {(info["rank_ip"], info["rank_port"], False) for info in (known or {}).values()}
            if peers:  # without peers the other rank waits for room_timeout_s
                self.agent.open_room(room, sorted(peers))
                self.agent.abort(room, reason)
                self.agent.close_room(room)
        except TransferError as error:
            logger.error("room %s: %s", room, error)

    def _fail_prefill_recompute(self, kv_receiver: Any, reason: str) -> None:
        """Fail a retracted request that prefill does not compute anew; one of SGLang's threads calls this.

        SGLang would write into its tables by the room's number. By then the request may have left, because a client's
        abort makes prefill refuse it as well, and the number may be another request's.
        """
        kv_receiver.give_up(reason)

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
        """Do as SGLang does, without waiting for a bootstrap server.

        An incompatible prefill server fails the requests that name it, and not this server.
        """
        if bootstrap_addr in self.prefill_info_table and not self._lookups.under_way(bootstrap_addr):
            return True
        try:
            return self._lookups.known(bootstrap_addr)
        except Exception as error:  # any answer, also a stranger's, may fail only the requests that named its server
            text = f"prefill server {bootstrap_addr} cannot serve this decode server: {error}"
            logger.error("%s (%s)", text, type(error).__name__)
            for room in list(self.addr_to_rooms_tracker.get(bootstrap_addr, ())):
                self.record_failure(room, text)
                self.update_status(room, KVPoll.Failed)
            return False

    def _resolve_rank_mapping(self, info: Any) -> None:
        """Map ranks as SGLang does, but to all tensor-parallel prefill ranks, which hold copies of the same rows.

        So the decode ranks of one host ask the same prefill ranks for the same chunks, which travel once, and each
        prefill rank sends a part. SGLang would pair equal numbers of ranks one to one and send every byte to each rank.
        """
        super()._resolve_rank_mapping(info)
        info.target_tp_rank = None  # so that SGLang marks no rank as a dummy
        info.target_tp_ranks = range(info.attn_tp_size)
        info.required_dst_info_num = self.attn_tp_size

    def _look_up(self, bootstrap_addr: str) -> bool:
        """Ask for a prefill server's layout and the addresses of its ranks, on a thread that may wait."""
        why = ""  # stays empty where an answer is refused: the waiting requests then get the refusal
        try:
            why = self._why_not_found(bootstrap_addr)
        finally:
            self.unanswered.note(bootstrap_addr, why)
        return not why

    def _why_not_found(self, bootstrap_addr: str) -> str:
        """Keep a prefill server's layout and the addresses of its ranks, or return why it did not give them."""
        require_resolvable(bootstrap_addr)
        aside = _Aside(self)
        if not CommonKVManager.try_ensure_parallel_info(aside, bootstrap_addr):
            return why_unanswered(bootstrap_addr)
        info = aside.prefill_info_table[bootstrap_addr]
        found = rank_addresses(bootstrap_addr, info)
        if not found:
            return "it does not say where its ranks are"
        # The layout comes second, because SGLang opens a request with any layout that it finds.
        with self.connection_lock:  # the scheduler may be forgetting ranks meanwhile, of this server too
            self.rank_addresses[bootstrap_addr], self.prefill_info_table[bootstrap_addr] = found, info
        return ""


class _Aside:
    """A manager with a table of layouts that SGLang does not see yet, and otherwise the same manager."""

    def __init__(self, manager: TplaKVManager) -> None:
        self._manager = manager
        self.prefill_info_table: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)
