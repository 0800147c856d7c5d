"""Make loopback a link of a given speed: the system sends on a socket no faster (``SO_MAX_PACING_RATE``)."""

import socket
import struct

from sglang_tpla.transfer.network import data_channel, data_listener

SO_MAX_PACING_RATE = 47  # Linux's number; Python has no name for it


def pace(stream: socket.socket, gigabits_s: float) -> None:
    """Limit a socket to a speed; a speed of 0 means no limit."""
    if gigabits_s:
        stream.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", int(gigabits_s * 1e9 / 8)))


def pace_channels(gigabits_s: float) -> None:
    """Limit the data channels that this process's prefill agents will serve to a speed."""

    def set_up(stream: socket.socket, timeout_s: float) -> None:
        data_channel.set_up(stream, timeout_s)
        pace(stream, gigabits_s)

    data_listener.set_up = set_up
