"""A block of a GPU, as far as the rings of the Hopper kernels need one: warps, barriers, shared memory, copies.

A warp is a generator that is written line by line after its CUDA function. Whatever other warps may notice is a
``yield from`` of one of these operations, and between any two of them other warps may run for as long as they can:

    barrier.wait(phase), barrier.arrive()     an mbarrier; it counts warps here, and threads in CUDA
    barrier.sync(warp), barrier.arrive(warp)  bar.sync and bar.arrive
    memory.write(key, content)                a store, which takes a while
    memory.read(keys, content)                a load or a wgmma, which takes a while and must see ``content``
    copies.copy(...), copies.arrive(barrier)  cp.async and cp.async.mbarrier.arrive.noinc of one producer warp

A cell of memory holds the name of what was written to it, such as (segment, tile, half), so that a reader knows whether
it sees its own tile. Three things end a schedule with `RingError`: a read that sees something else, a wait that takes
one phase for another, and a state in which no warp can move.

The model knows nothing of lanes: those of a warp move together, and so do their copies. The warps of a warpgroup do
not, not even at a wgmma, since PTX does not call one a barrier. Fences between proxies are not modelled either.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable

# What a warp waits for; None: it can go on.
Condition = Callable[[], bool] | None
Steps = Generator[Condition, None, None]
Answer = Generator[Condition, None, bool]


class RingError(Exception):
    """A schedule by which the kernel would compute something wrong or never end."""


class Barrier:
    """An mbarrier: it counts arrivals, and the last one of a phase completes the phase and begins the next.

    CUDA's wait names a parity and returns as soon as the current phase has the other one, so it cannot tell a phase
    from those two before and after it. The kernels keep the parity alone. Warps of the model keep the number, so that a
    wait that goes wrong is found at once, even where nothing would come of it in this schedule. A ``trusting`` barrier
    goes by the parity alone, as the hardware does, and shows what comes of it.
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
    """A piece of shared memory: what each of its cells holds. A cell is what one warp writes at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cells: dict[Hashable, object] = {}

    def begin(self, key: Hashable) -> object:
        """Begin a write: until it has ended the cell holds something that no reader expects."""
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
        """Check what a reader sees. A read that takes a while is two of these with other operations between."""
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
    """The asynchronous copies of a warp: they land later, in the order in which they began."""

    def __init__(self) -> None:
        self.under_way: deque[Callable[[], None]] = deque()
        self.groups = 0  # begun and not landed

    def copy(self, memory: Memory, key: Hashable, content: object) -> Steps:
        token = memory.begin(key)
        self.under_way.append(lambda: memory.end(key, token, content))
        yield None

    def arrive(self, barrier: Barrier) -> Steps:
        """Arrive once all copies before have landed."""
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
        """The memory system's part."""
        while True:
            yield lambda: bool(self.under_way)
            self.under_way.popleft()()


class Role:
    """A warp, or the memory system on its behalf, which may have work left for ever."""

    def __init__(self, name: str, steps: Steps, endless: bool) -> None:
        self.name, self.steps, self.endless = name, steps, endless
        self.condition: Condition = None

    def can_move(self) -> bool:
        return self.condition is None or self.condition()


class Block:
    """The warps of a block, and their schedule.

    The scheduler keeps the warps in a list, lets the first one that can move take a step, and now and then puts one in
    another place. A warp at the end of the list starves; the one at its head runs until it has to wait. How often a
    warp changes places is drawn for each schedule, from at every step to hardly ever. (Priorities that change at a few
    random points are the method of Burckhardt et al., ASPLOS 2010.)
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
        """Run all warps to their ends; the number of steps.

        Raises:
            RingError: what a kernel that ran by this schedule would have got wrong.
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
    """Where a warp stands in a ring: its stage and the number of its round, whose parity is CUDA's ``phase``."""

    def __init__(self, stages: int, number: int = 0) -> None:
        self.stages = stages
        self.slot, self.round = number % stages, number // stages

    def advance(self, count: int = 1) -> None:
        self.slot, self.round = self.slot + count % self.stages, self.round + count // self.stages
        if self.slot >= self.stages:
            self.slot, self.round = self.slot - self.stages, self.round + 1
