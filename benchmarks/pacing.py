"""A link of a given speed on loopback: the system sends on a socket no faster (``SO_MAX_PACING_RATE``)."""

import socket
import struct

from sglang_tpla.transfer.network import data_channel, data_listener

SO_MAX_PACING_RATE = 47  # of Linux; Python does not name it


def pace(stream: socket.socket, gigabits_s: float) -> None:
    """Slow a socket down; not where the speed is 0."""
    if gigabits_s:
        stream.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", int(gigabits_s * 1e9 / 8)))


def pace_channels(gigabits_s: float) -> None:
    """Slow down the data channels that this process's prefill agents will serve."""

    def set_up(stream: socket.socket, timeout_s: float) -> None:
        data_channel.set_up(stream, timeout_s)
        pace(stream, gigabits_s)

    data_listener.set_up = set_up
