"""A model of a GPU's block, as far as the rings of the Hopper kernels need it: warps, barriers, shared memory, copies.

A warp is a generator that follows its CUDA function line by line. Every effect that other warps may notice is a
``yield from`` of one of these operations, and between any two of them other warps may run for as long as they can:

    barrier.wait(phase), barrier.arrive()     an mbarrier; it counts warps here, and threads in CUDA
    barrier.sync(warp), barrier.arrive(warp)  bar.sync and bar.arrive
    memory.write(key, content)                a store, which takes a while
    memory.read(keys, content)                a load or a wgmma, which takes a while and must see ``content``
    copies.copy(...), copies.arrive(barrier)  cp.async and cp.async.mbarrier.arrive.noinc of one producer warp

A cell of memory holds the name of its content, such as (segment, tile, half), so that a reader knows whether it sees
the right tile. Three things end a schedule with `RingError`: a read that sees other content, a wait that takes one
phase for another, and a state in which no warp can move.

The model has no lanes: the lanes of a warp move together, and so do their copies. The warps of a warpgroup do not move
together, not even at a wgmma, since PTX does not call that a barrier. Fences between proxies are not modelled either.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable

# The condition for which a warp waits; None means that the warp can go on.
Condition = Callable[[], bool] | None
Steps = Generator[Condition, None, None]
Answer = Generator[Condition, None, bool]


class RingError(Exception):
    """With this schedule, the kernel would compute something wrong or never end."""


class Barrier:
    """An mbarrier: it counts arrivals, and the last one of a phase completes the phase and begins the next.

    CUDA's wait names a parity and returns as soon as the current phase has the other parity, so a wait cannot tell a
    phase from the ones two earlier and two later. The kernels keep only the parity. Warps of the model keep the number,
    so that a wrong wait is found at once, even if it has no consequences in this schedule. A ``trusting`` barrier uses
    only the parity, as the hardware does, and shows the consequences.
    """

    def __init__(self, name: str, arrivals: int, trusting: bool = False) -> None:
        self.name, self.arrivals, self.trusting = name, arrivals, trusting
        self.pending, self.completed = arrivals, 0

    def count(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self.pending, self.completed = self.arrivals, self.completed + 1

    def arrive(self) -> Steps:
        self.count()
        yield None

    def wait(self, phase: int) -> Steps:
        """Wait until ``phase`` (0, 1, 2 and so on) has completed. Phase -1 has completed from the start."""

        def returns() -> bool:
            parity_has_changed = self.completed % 2 != phase % 2
            if not self.trusting:
                if parity_has_changed and self.completed <= phase:
                    raise RingError(
                        f"a wait for phase {phase} of {self.name} returns, though {self.completed} is under way"
                    )
                if self.completed > phase + 1:
                    raise RingError(
                        f"a wait for phase {phase} of {self.name} comes late: {self.completed} is under way"
                    )
            return parity_has_changed

        yield returns


class NamedBarrier:
    """A barrier of the block, which `bar.sync` and `bar.arrive` name by a number."""

    def __init__(self, name: str, warps: int) -> None:
        self.name, self.warps = name, warps
        self.arrived: set[Hashable] = set()
        self.generation = 0

    def count(self, warp: Hashable) -> None:
        if warp in self.arrived:
            raise RingError(f"{warp} arrives at {self.name} twice before the others have come")
        self.arrived.add(warp)
        if len(self.arrived) == self.warps:
            self.arrived.clear()
            self.generation += 1

    def arrive(self, warp: Hashable) -> Steps:
        self.count(warp)
        yield None

    def sync(self, warp: Hashable) -> Steps:
        generation = self.generation
        self.count(warp)
        yield lambda: self.generation > generation


class Memory:
    """A piece of shared memory, as the contents of its cells. A cell is the memory that one warp writes at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cells: dict[Hashable, object] = {}

    def begin(self, key: Hashable) -> object:
        """Begin a write: until the write has ended, the cell holds an object that no reader expects."""
        self.cells[key] = under_way = object()
        return under_way

    def end(self, key: Hashable, under_way: object, content: object) -> None:
        if self.cells[key] is not under_way:
            raise RingError(f"{self.name} {key}: another write came before that of {content} had ended")
        self.cells[key] = content

    def write(self, key: Hashable, content: object) -> Steps:
        under_way = self.begin(key)
        yield None
        self.end(key, under_way, content)
        yield None

    def expect(self, keys: Iterable[Hashable], content: object) -> None:
        """Check the content that a reader sees. A read that takes a while is two checks with operations between."""
        for key in keys:
            if (seen := self.cells.get(key)) != content:
                what = "a write under way" if type(seen) is object else seen
                raise RingError(f"{self.name} {key}: a reader of {content} sees {what}")

    def read(self, keys: Iterable[Hashable], content: object) -> Steps:
        keys = tuple(keys)
        self.expect(keys, content)
        yield None
        self.expect(keys, content)


class Copies:
    """The asynchronous copies of a warp, which complete later in the order of their start."""

    def __init__(self) -> None:
        self.under_way: deque[Callable[[], None]] = deque()
        self.groups = 0  # groups in flight

    def copy(self, memory: Memory, key: Hashable, content: object) -> Steps:
        token = memory.begin(key)
        self.under_way.append(lambda: memory.end(key, token, content))
        yield None

    def arrive(self, barrier: Barrier) -> Steps:
        """Arrive once all earlier copies are complete."""
        self.under_way.append(barrier.count)
        yield None

    def commit(self) -> None:
        def landed() -> None:
            self.groups -= 1

        self.groups += 1
        self.under_way.append(landed)

    def wait_group(self, pending: int) -> Steps:
        yield lambda: self.groups <= pending

    def land(self) -> Steps:
        """Complete copies, as the memory system does."""
        while True:
            yield lambda: bool(self.under_way)
            self.under_way.popleft()()


class Role:
    """A warp, or the memory system on a warp's behalf; at the end, only the memory system may still wait for work."""

    def __init__(self, name: str, steps: Steps, endless: bool) -> None:
        self.name, self.steps, self.endless = name, steps, endless
        self.condition: Condition = None

    def can_move(self) -> bool:
        return self.condition is None or self.condition()


class Block:
    """The warps of a block, and their schedule.

    The scheduler keeps the warps in a list, lets the first warp that can move take a step, and sometimes moves a warp
    to another place. A warp at the end of the list starves; the warp at its head runs until it has to wait. Each
    schedule draws how often a warp is moved, from every step to hardly ever. (The method, priorities that change at a
    few random points, is that of Burckhardt et al., ASPLOS 2010.)
    """

    def __init__(self, seed: int, trusting: bool = False) -> None:
        self.random = random.Random(seed)
        self.trusting = trusting
        self.roles: list[Role] = []

    def barrier(self, name: str, arrivals: int) -> Barrier:
        return Barrier(name, arrivals, self.trusting)

    def barriers(self, name: str, count: int, arrivals: int) -> list[Barrier]:
        return [self.barrier(f"{name}[{i}]", arrivals) for i in range(count)]

    def named_barrier(self, name: str, warps: int) -> NamedBarrier:
        return NamedBarrier(name, warps)

    def copies(self, name: str) -> Copies:
        copies = Copies()
        self.roles.append(Role(f"copies of {name}", copies.land(), endless=True))
        return copies

    def start(self, name: str, steps: Steps) -> None:
        self.roles.append(Role(name, steps, endless=False))

    def run(self) -> int:
        """Run all warps to their ends, and return the number of steps.

        Raises:
            RingError: a kernel with this schedule would go wrong; the message says how.
        """
        chance = 10 ** self.random.uniform(-2.5, 0)
        self.random.shuffle(self.roles)
        steps = 0
        while role := next(filter(self._can_move, self.roles), None):
            steps += 1
            try:
                role.condition = next(role.steps)
            except StopIteration:
                self.roles.remove(role)
            except RingError as error:
                raise RingError(f"{role.name}: {error}") from None
            if self.roles and self.random.random() < chance:
                moved = self.roles.pop(self.random.randrange(len(self.roles)))
                self.roles.insert(self.random.randint(0, len(self.roles)), moved)
        if stuck := [role.name for role in self.roles if not role.endless]:
            raise RingError(f"no warp can move: {', '.join(sorted(stuck))}")
        return steps

    @staticmethod
    def _can_move(role: Role) -> bool:
        try:
            return role.can_move()
        except RingError as error:
            raise RingError(f"{role.name}: {error}") from None


class Place:
    """A warp's position in a ring: its stage and the number of its round, whose parity is CUDA's ``phase``."""

    def __init__(self, stages: int, number: int = 0) -> None:
        self.stages = stages
        self.slot, self.round = number % stages, number // stages

    def advance(self, count: int = 1) -> None:
        self.slot, self.round = self.slot + count % self.stages, self.round + count // self.stages
        if self.slot >= self.stages:
            self.slot, self.round = self.slot - self.stages, self.round + 1
