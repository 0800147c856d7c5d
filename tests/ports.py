"""Ports for servers that are told where to listen.

They lie below those that the system gives to connections (from 32,768 on), and none is given twice: between its choice
and its server's start nobody else takes it. An SGLang server with attention groups also listens on some ports from 233
above its own on (``ZMQ_TCP_PORT_DELTA``): none of those is given to anybody.
"""

import contextlib
import random
import socket

FIRST, LAST = 10_000, 24_000  # the launcher's own choice lies above
DELTA, MORE = 233, 7  # where a server's further ports begin, and how many there are at most
_random = random.SystemRandom()  # processes that share the tests choose for themselves
_given: set[int] = set()


def neighbouring_ports(count: int) -> int:
    """The first of some free ports in a row."""
    while True:
        first = _random.randrange(FIRST, LAST - count)
        ports = range(first, first + count)
        # of each 466 ports the first 226: whatever lies 233 to 239 above one of them is none of them
        if ports[0] % (2 * DELTA) + count <= DELTA - MORE and _given.isdisjoint(ports):
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                for port in ports:
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                _given.update(ports)
                return first


def free_ports(count: int) -> list[int]:
    """Some free ports."""
    return [neighbouring_ports(1) for _ in range(count)]
