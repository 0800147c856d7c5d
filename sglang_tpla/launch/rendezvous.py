"""The port at which a server's ranks meet, chosen by the launcher where no flag names it.

SGLang before 0.5.23 takes a port that the system would give to any connection (``get_free_port``), seconds before rank
0 listens there. A connection in between may get that port, and the server then ends with EADDRINUSE. The launcher takes
a free port below those that the system gives away.
"""

import random
import socket
from collections.abc import Sequence
from pathlib import Path

from sglang_tpla.launch.flags import has, integer, split_tokens

SERVER = ("-m", "sglang.launch_server")
# Tests and tools choose ports below this range; our servers' defaults and Kubernetes' node ports begin at 30,000.
FIRST_PORT, END_PORT = 24_000, 30_000
NEAR = range(-16, 256)  # around a server's port: a deployment counts up from it, and SGLang derives ports from it
TRIES = 100
SYSTEM_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORT_FLAG = "nccl-port"
# With these flags the ranks meet elsewhere, or each replica takes its own port.
ELSEWHERE = ("dist-init-addr", "nccl-init-addr", "nnodes")


def with_port(command: Sequence[str]) -> tuple[str, ...]:
    """Return a command, with a port for its ranks' rendezvous if it starts a server whose flags name none."""
    if tuple(command[1:3]) != SERVER:
        return tuple(command)
    arguments = split_tokens(command[3:])
    replicas = integer(arguments, "dp-size", 1) > 1 and not has(arguments, "enable-dp-attention")
    chosen = replicas or any(has(arguments, name) for name in (PORT_FLAG, *ELSEWHERE))
    port = None if chosen else free_port(integer(arguments, "port", END_PORT))
    return (*command, *(() if port is None else (f"--{PORT_FLAG}", str(port))))


def free_port(own: int = END_PORT) -> int | None:
    """Return a free port that the system gives to no connection, and that is not `NEAR` a server's ``own``, or None."""
    ports = [port for port in range(FIRST_PORT, min(END_PORT, _first_system_port())) if port - own not in NEAR]
    chosen = random.SystemRandom()  # two launchers of one machine choose differently
    for port in (chosen.choice(ports) for _ in range(TRIES if ports else 0)):
        if _is_free(port):
            return port
    return None


def _first_system_port() -> int:
    try:
        return int(SYSTEM_PORTS.read_text().split()[0])
    except OSError:
        return 32_768


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True
