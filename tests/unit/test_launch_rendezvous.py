"""The launcher chooses the port at which a server's ranks meet, unless the user has, or each replica needs one."""

import socket
import sys

import pytest

from sglang_tpla.launch import rendezvous
from sglang_tpla.launch.flags import split_tokens, value_of
from sglang_tpla.launch.rendezvous import free_port, with_port

SERVER = (sys.executable, "-m", "sglang.launch_server", "--model-path", "m")


@pytest.mark.parametrize("more", [(), ("--tp", "2"), ("--dp-size", "2", "--enable-dp-attention"), ("--dp", "1")])
def test_a_server_gets_a_port_that_the_system_gives_to_nobody(more: tuple[str, ...]) -> None:
    command = with_port([*SERVER, *more])
    assert command[: len(SERVER) + len(more)] == (*SERVER, *more)
    port = int(value_of(split_tokens(command[3:]), "nccl-port") or 0)
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        assert 0 < port < int(file.read().split()[0])
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    "more",
    [
        ("--nccl-port", "29500"),
        ("--nccl_port=29500",),
        ("--dist-init-addr", "10.0.0.1:5000", "--nnodes", "2"),
        ("--nccl-init-addr", "10.0.0.1:5000"),
        ("--dp-size", "2"),
        ("--data-parallel-size", "2"),
    ],
)
def test_ranks_that_meet_elsewhere_are_left_alone(more: tuple[str, ...]) -> None:
    assert with_port([*SERVER, *more]) == (*SERVER, *more)


def test_a_router_meets_nobody() -> None:
    router = (sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation")
    assert with_port(router) == router


def test_a_taken_port_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher skips a taken port. If no port is free, it chooses none, and SGLang takes its default."""
    taken = free_port()
    assert taken is not None
    monkeypatch.setattr(rendezvous, "FIRST_PORT", taken)
    for system_port, expected in ((taken + 2, {taken + 1}), (taken + 1, {None}), (taken, {None})):
        monkeypatch.setattr(rendezvous, "_first_system_port", lambda port=system_port: port)
        with socket.create_server(("127.0.0.1", taken)):
            assert {free_port() for _ in range(10)} == expected
    monkeypatch.setattr(rendezvous, "_first_system_port", lambda: taken)
    assert with_port(SERVER) == SERVER


def test_ports_that_a_deployment_counts_up_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of ``--role all`` start together, so decode's port is not yet bound when prefill chooses."""
    first = free_port()
    assert first is not None
    monkeypatch.setattr(rendezvous, "FIRST_PORT", first)
    monkeypatch.setattr(rendezvous, "END_PORT", first + 3)
    server = (*SERVER, "--port", str(first - 1))
    assert with_port(server) == server
    assert with_port([*SERVER, "--port", "1000"]) != (*SERVER, "--port", "1000")
