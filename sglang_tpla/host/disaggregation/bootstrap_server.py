"""SGLang's bootstrap server (``sglang/srt/disaggregation/common/conn.py``) with a check of registrations.

The bootstrap server listens on the prefill server's ``--disaggregation-bootstrap-port``, or ends the process. Only this
prefill server's ranks may register, because decode servers would find another server's ranks in their place. Besides
SGLang's routes there are ``GET /challenge`` and ``GET /registrations`` (the number accepted, and refused for each
reason), the latter also as Prometheus series.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, PrefillServerInfo
from sglang.srt.runtime_context import get_parallel, get_serving
from sglang.srt.utils.network import NetworkAddress

from sglang_tpla.host.ledger import refuse
from sglang_tpla.host.process import server_identity
from sglang_tpla.transfer.network.bootstrap import CHALLENGE_PATH, MAX_BODY_BYTES, Gate, Registrar
from sglang_tpla.transfer.network.security import Security

logger = logging.getLogger(__name__)
OWN_PORT = "give each prefill server of a machine its own --disaggregation-bootstrap-port"
MALFORMED = (KeyError, TypeError, ValueError, RecursionError, AttributeError)  # raised by a wrong body or query
Handler = Callable[[web.Request], Awaitable[web.Response]]


class TplaKVBootstrapServer(CommonKVBootstrapServer):
    """Registers its own server's ranks; where there are keys, registrations must be signed.

    Raises:
        SystemExit: a port that is taken.
    """

    def __init__(self, host: str, port: int) -> None:
        security = Security.from_environment("prefill")
        security.check(host, "taking registrations on")
        try:
            self._socket = listening(host, port)
        except OSError as error:
            raise refuse(port_taken(host, port, error)) from error
        self._gate = Gate(security.secret)
        self._series = _series()
        super().__init__(host, port)

    def _setup_routes(self) -> None:
        super()._setup_routes()
        self.app.router.add_get(CHALLENGE_PATH, self._handle_challenge)
        self.app.router.add_get("/registrations", self._handle_registrations)

    async def _handle_challenge(self, request: web.Request) -> web.Response:
        return web.Response(text=self._gate.challenge())

    async def _handle_registrations(self, request: web.Request) -> web.Response:
        return web.json_response({"signed": self._gate.closed, **self._gate.counts})

    async def _handle_route_put(self, request: web.Request) -> web.Response:
        stock = super()._handle_route_put

        async def take(checked: web.Request) -> web.Response:
            registered = await checked.json()
            check_registration(registered, self)
            if registered.get("server") == server_identity():
                return await stock(checked)
            logger.error("a rank of another server wanted to register here: %s", registered)
            return web.Response(text=f"this is the bootstrap server of another prefill server; {OWN_PORT}", status=409)

        response = await self._checked(request, take)
        # A rank that registers again is still one rank.
        self._registered_count = sum(
            len(stages)
            for cp_groups in self.prefill_port_table.values()
            for tp_groups in cp_groups.values()
            for stages in tp_groups.values()
        )
        return response

    def _run_server(self) -> None:
        """Run SGLang's server on the socket that was bound before this thread began."""
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._runner = web.AppRunner(self.app, access_log=None)
        try:
            cleaning = self._loop.create_task(self._cleanup_expired_entries())
            self._loop.run_until_complete(self._runner.setup())
            self._loop.run_until_complete(web.SockSite(self._runner, self._socket).start())
            self._loop.run_forever()
            cleaning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(cleaning)
        finally:
            self._loop.run_until_complete(self._runner.cleanup())
            self._loop.close()

    async def _handle_register_dp_rank(self, request: web.Request) -> web.Response:
        return await self._checked(request, super()._handle_register_dp_rank)

    async def _handle_route_get(self, request: web.Request) -> web.Response:
        return readable_by_all(await self._answered(request, super()._handle_route_get))

    async def _handle_query_dp_ranks(self, request: web.Request) -> web.Response:
        return await self._answered(request, super()._handle_query_dp_ranks)

    async def _answered(self, request: web.Request, answer: Handler) -> web.Response:
        try:
            return await answer(request)
        except MALFORMED as error:
            return web.Response(text=f"malformed question to {request.path}: {error!r}", status=400)

    async def _checked(self, request: web.Request, take: Handler) -> web.Response:
        body = await request.read()
        reason, text = self._gate.wrong(request.method, request.path, body, request.headers), ""
        if reason is None:
            try:
                response = await take(request)
            except MALFORMED as error:
                reason, text = "malformed", f"malformed registration: {error!r}"
        self._gate.counts[reason or "accepted"] += 1
        if self._series is not None:
            self._series.labels(reason or "accepted").inc()
        if reason is None:
            return response
        if reason == "malformed":
            text = text or f"malformed registration: expected an object in JSON of at most {MAX_BODY_BYTES} bytes"
        else:
            text = f"{reason}; register with the prefill.secret of this server's key folder (--tpla-keys)"
        logger.warning("registration from %s refused: %s", request.remote, text)
        return web.Response(text=text, status=400 if reason == "malformed" else 401)


def listening(host: str, port: int) -> socket.socket:
    """Open a listening socket, IPv4 or IPv6 like the host.

    Raises:
        OSError: an address that is taken, or not this machine's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server((address[0], port), family=family, backlog=128)


def port_taken(host: str, port: int, error: OSError) -> str:
    """Return the reason why a prefill server with this bootstrap port does not start."""
    return f"the bootstrap server cannot listen on {host}:{port}: {error.strerror or error}; {OWN_PORT}"


def readable_by_all(answer: web.Response) -> web.Response:
    """Leave out the fields of a layout that have their default value.

    A decode server makes a ``PrefillServerInfo`` of all fields that it receives, and an older release lacks some.
    """
    if answer.status != 200 or answer.content_type != "application/json":
        return answer
    said = json.loads(answer.text or "null")
    if not isinstance(said, dict) or "attn_tp_size" not in said:  # the address of a rank
        return answer
    usual = {field.name: field.default for field in dataclasses.fields(PrefillServerInfo)}
    return web.json_response({name: value for name, value in said.items() if usual.get(name, said) != value})


def check_registration(data: dict[str, Any], known: CommonKVBootstrapServer) -> None:
    """Check that a registration's sizes agree with those of earlier ranks and that its rank lies within them.

    Raises:
        ValueError: sizes that disagree, or a rank outside of them.
    """
    for axis in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp"):
        size, rank = data[f"{axis}_size"], data[f"{axis}_rank"]
        if not 0 <= int(rank or 0) < int(size):
            raise ValueError(f"{axis}_rank must lie in 0...{int(size) - 1}; got {rank}")
    for name in ("attn_tp_size", "attn_cp_size", "pp_size"):
        if getattr(known, name) not in (None, data[name]):
            raise ValueError(f"{name} is {getattr(known, name)} for the ranks before; got {data[name]}")


def registration(manager: Any) -> Registrar:
    """Return the registration of a prefill rank, with the payload of ``CommonKVManager.register_to_bootstrap``.

    Args:
        manager: a `TplaKVManager`; decode servers connect to its ``local_ip`` and ``rank_port``.
    """
    if manager.dist_init_addr:  # the first of several machines has the bootstrap server
        host = NetworkAddress.parse(manager.dist_init_addr).resolved().host
    else:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(manager.bootstrap_host, manager.bootstrap_host)
    parallel = get_parallel()
    payload = {
        "attn_tp_size": manager.attn_tp_size,
        "attn_tp_rank": manager.attn_tp_rank,
        "attn_cp_size": manager.attn_cp_size,
        "attn_cp_rank": manager.attn_cp_rank,
        "attn_dp_size": manager.attn_dp_size,
        "attn_dp_rank": manager.attn_dp_rank,
        "pp_size": manager.pp_size,
        "pp_rank": manager.pp_rank,
        "system_dp_size": manager.system_dp_size,
        "system_dp_rank": manager.system_dp_rank % manager.system_dp_size,  # may be an attention group's
        "rank_ip": manager.local_ip,
        "rank_port": manager.rank_port,
        "page_size": manager.kv_args.page_size,
        # SGLang wants equal types on both sides; ours may differ, and our own registration compares them.
        "kv_cache_dtype": None,
        "load_balance_method": parallel.load_balance_method,
        "enable_dsa_cache_layer_split": parallel.enable_dsa_cache_layer_split,
        "prefill_http_port": get_serving().port,
        # Later releases ask for these; an older bootstrap server ignores them.
        "enable_kv_cache_sharding": False,
        "decode_allocation_policy": "early",
        "kv_layout": None,
        "dsv41_spec_layout": None,
        "server": server_identity(),
    }
    place = {
        "prefill_dp_rank": manager.data_parallel_group,
        "prefill_cp_rank": manager.attn_cp_rank,
        "target_tp_rank": manager.attn_tp_rank,
        "target_pp_rank": manager.pp_rank,
    }
    url = NetworkAddress(host, manager.bootstrap_port).to_url()
    return Registrar(url, payload, place, Security.from_environment("prefill").secret)


def _series() -> Any:
    """Return the counter of registrations, or None where SGLang names no folder for metrics and so publishes none."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    from prometheus_client import REGISTRY, Counter

    return Counter(
        "sglang_tpla:bootstrap_registrations",
        "Registrations at the bootstrap server: accepted, or why they were refused",
        ("result",),
        registry=REGISTRY,
    )
