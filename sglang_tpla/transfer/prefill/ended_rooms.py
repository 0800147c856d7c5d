"""A prefill agent's memory of rooms that have ended, and of aborts that came before their room was opened.

Nothing waits and nothing is sent here. Everything runs under the agent's lock.
"""

from collections import OrderedDict

from sglang_tpla.transfer.room import remember


class EndedRooms:
    """Remembers ended generations by decode agent (a process) and not by connection: connections come and go."""

    def __init__(self) -> None:
        # the newest generation of a room that has ended for an agent
        self._generations: OrderedDict[tuple[int, str], int] = OrderedDict()
        # aborts of rooms that the scheduler has not opened: generation, reason, and when the abort came
        self._early_aborts: OrderedDict[tuple[int, str], tuple[int, str, float]] = OrderedDict()
        # rooms that failed before every rank had asked: the agents that know of it, the reason, and when
        self._failed_unbound: OrderedDict[int, tuple[set[str], str, float]] = OrderedDict()

    def has_ended(self, room_id: int, agent: str, generation: int) -> bool:
        """Return whether an agent's generation of a room, or a later one, has ended."""
        return generation <= self._generations.get((room_id, agent), -1)

    def end(self, room_id: int, agent: str, generation: int) -> None:
        """Note that a generation of a room has ended for an agent."""
        key = (room_id, agent)
        remember(self._generations, key, max(generation, self._generations.get(key, -1)))

    def fail_unbound(self, room_id: int, spoken: set[str], reason: str, now: float) -> None:
        """Note that a room failed before every rank had asked for it. The agents in ``spoken`` know of it."""
        remember(self._failed_unbound, room_id, (spoken, reason, now))

    def failed_unbound(self, room_id: int, agent: str) -> str | None:
        """Return why a room failed, or None if it did not fail or this agent has spoken of it before."""
        spoken, reason, _ = self._failed_unbound.get(room_id, (set(), "", 0.0))
        if not reason or agent in spoken:
            return None
        spoken.add(agent)
        return reason

    def abort_early(self, room_id: int, agent: str, generation: int, reason: str, now: float) -> None:
        """Keep an agent's abort of a room that the scheduler may still open."""
        remember(self._early_aborts, (room_id, agent), (generation, reason, now))

    def take_early_aborts(self, room_id: int) -> dict[str, tuple[int, str]]:
        """Return and forget the aborts that came before a room was opened: each agent's generation and reason."""
        keys = [key for key in self._early_aborts if key[0] == room_id]
        return {key[1]: self._early_aborts.pop(key)[:2] for key in keys}

    def expire(self, now: float, patience_s: float) -> None:
        """Forget the early aborts and failed rooms that are older than ``patience_s``: no rank will ask for them."""
        while self._early_aborts and now - next(iter(self._early_aborts.values()))[2] > patience_s:
            self._early_aborts.popitem(last=False)
        while self._failed_unbound and now - next(iter(self._failed_unbound.values()))[2] > patience_s:
            self._failed_unbound.popitem(last=False)
