"""Small prefill and decode ranks with real sockets on loopback, and one transfer between them."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.config import Settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.memory.rows import RowReader, RowWriter
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState
from tests import sketched_reference
from tests.wire.proxy import FaultProxy

LAYERS, LATENT, ROPE, PAGE, PAGES = 3, 64, 16, 4, 96
ITEM_BYTES = (64, 512)
HOSTS = [None, "far", ""]  # decode ranks share memory with prefill, only among themselves, or not at all
ROWS = os.environ.get("TEST_WIRE_ROWS", "plain")  # the rows of decode ranks unless a test names others (conftest.py)
SETTINGS = Settings(
    role="prefill",
    chunk_bytes=8 << 10,
    staging_bytes=128 << 10,
    heartbeat_s=0.1,
    peer_timeout_s=2.0,
    transfer_timeout_s=30.0,
)


class WrittenLater:
    """An event that writes a prefill rank's rows, which are zero before it."""

    def __init__(self, prefill: PrefillRank) -> None:
        self.waited = False
        self._rows = [(layer, layer.clone()) for layer in prefill.pool.layers]
        for layer, _ in self._rows:
            layer.zero_()

    def synchronize(self) -> None:
        self.waited = True
        for layer, rows in self._rows:
            layer.copy_(rows)


def settings(**changes: float) -> Settings:
    """Return the rig's settings with some changed."""
    return replace(SETTINGS, **changes)


def wait(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait until the condition holds; fail with ``what`` if it does not within ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.001)


@dataclass
class PrefillRank:
    """A prefill agent with the pool and metadata that it serves."""

    agent: PrefillAgent
    pool: CachePool
    metadata: MetadataRows

    @property
    def peer(self) -> tuple[str, int, bool]:
        """The rank as a sending peer of ``open_room``."""
        return (*self.agent.address, False)


@dataclass
class DecodeRank:
    """A decode agent with the pool and metadata that it fills."""

    agent: DecodeAgent
    pool: CachePool
    metadata: MetadataRows
    projection: Projection | None

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, which must be equal in all layers."""
        (size,) = {layer[0].nbytes for layer in self.pool.layers}
        return size


Rank = PrefillRank | DecodeRank


def check_apart(patch: pytest.MonkeyPatch) -> None:
    """Let checkers, not the threads that read and write rows, compute checksums, as on a GPU."""
    read, write = RowReader.read, RowWriter.write
    patch.setattr(RowReader, "read", lambda *given: lambda: read(*given)() and None)
    patch.setattr(RowWriter, "write", lambda *given: write(*given) and b"")


@contextlib.contextmanager
def serving(*ranks: Rank) -> Iterator[None]:
    """Close the ranks' agents at the end."""
    with contextlib.ExitStack() as stack:
        for rank in ranks:
            stack.enter_context(contextlib.closing(rank.agent))
        yield


def prefill_rank(
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    rank: int = 0,
    port: int = 0,
    advertised_port: int = 0,
    device: str = "cpu",
    **changes: float,
) -> PrefillRank:
    """Make a prefill rank with random rows; equal seeds give equal rows."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(PAGES * PAGE, LATENT + ROPE, generator=generator).to(device, dtype) for _ in range(LAYERS)]
    pool = CachePool(layers, LATENT, ROPE, PAGE)
    rows = np.random.default_rng(seed)
    metadata = MetadataRows([rows.integers(0, 256, (8, size_), dtype=np.uint8) for size_ in ITEM_BYTES])
    agent = PrefillAgent(
        pool,
        metadata,
        model_hash="model",
        settings=settings(**changes),
        bind_host="127.0.0.1",
        rank=rank,
        bind_port=port,
        advertised_port=advertised_port,
    )
    return PrefillRank(agent, pool, metadata)


def data_port(prefill: PrefillRank, announced: int | None = None) -> int:
    """Return the port of a prefill rank's data channels, and make the rank announce another port, if given."""
    listener = prefill.agent.router.listener
    real = listener.announced_port
    listener.announced_port = real if announced is None else announced
    return real


def through(prefill: PrefillRank) -> FaultProxy:
    """Make a proxy for all of a prefill rank's traffic, including its data channels."""
    proxy = FaultProxy(prefill.agent.address[1], data_port(prefill))
    data_port(prefill, proxy.data_port)
    return proxy


def projection(group: int, width: int = 40, shared: int = 16) -> Projection:
    """Make a random projection; groups share the leading columns."""
    common = torch.Generator().manual_seed(1000)
    own = torch.Generator().manual_seed(2000 + group)
    matrices = [
        torch.cat(
            (torch.randn(LATENT, shared, generator=common), torch.randn(LATENT, width - shared, generator=own)), dim=1
        )
        for _ in range(LAYERS)
    ]
    return Projection(matrices, [shared] * LAYERS)


def sketched_projection(
    group: int, groups: int = 2, shared: int = 16, sketch_bits: Sequence[int] = (4, 4, 2), rope_bits: int = 16
) -> Projection:
    """Make a random projection to sketched rows; groups have the shared and the sketch columns in common."""
    common, own = (torch.Generator().manual_seed(seed) for seed in (3000, 4000 + group))
    rows = [
        SketchedRows.of(LATENT, groups, shared, ROPE, sketch_bits=bits, rope_bits=rope_bits) for bits in sketch_bits
    ]
    matrices = [
        torch.cat(
            (
                torch.randn(LATENT, kind.shared, generator=common),
                torch.randn(LATENT, kind.own, generator=own),
                torch.randn(LATENT, kind.groups * kind.own, generator=common),
            ),
            dim=1,
        )
        for kind in rows
    ]
    return Projection(matrices, [kind.shared for kind in rows], sketched=RowFormat.sketched(rows, group))


def even_rows() -> Projection | None:
    """Return a projection to rows of the test's kind with equal sizes in all layers; None for plain rows."""
    return sketched_projection(0, sketch_bits=(4,) * LAYERS) if ROWS == "sketched" else None


def decode_rank(
    z: Projection | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    size: int = 1,
    model_hash: str = "model",
    page_size: int = PAGE,
    host: str | None = None,
    device: str = "cpu",
    **changes: float,
) -> DecodeRank:
    """Make a decode rank with zeroed rows in the format of ``z``, or plain in ``dtype``."""
    if z is None and ROWS == "sketched":
        z = sketched_projection(0)
    rows = RowFormat.plain((LATENT,) * LAYERS, (LATENT,) * LAYERS, ROPE)
    if z is not None:
        rows = z.sketched or RowFormat.plain(z.widths, z.shared, ROPE)
    dtype = rows.item_dtype(dtype)
    layers = [torch.zeros(PAGES * PAGE, layer.row_items, dtype=dtype, device=device) for layer in rows.layers]
    pool = CachePool(layers, LATENT, ROPE, page_size, encoding=rows)
    metadata = MetadataRows([np.zeros((8, size_), dtype=np.uint8) for size_ in ITEM_BYTES])
    agent = DecodeAgent(
        pool, metadata, z, model_hash=model_hash, settings=settings(**changes), rank=rank, size=size, host_id=host
    )
    return DecodeRank(agent, pool, metadata, z)


def pages(seed: int, count: int) -> np.ndarray:
    """Return distinct pages in random order."""
    return np.random.default_rng(seed).permutation(PAGES)[:count].astype(np.int32)


def ask(
    decode: DecodeRank,
    prefills: Sequence[tuple[str, int, bool]],
    room: int,
    destination: np.ndarray,
    expected: int = 1,
    prefix: int = 0,
    metadata_row: int = 3,
) -> None:
    """Open a room on a decode rank, and ask for the room once its prefill ranks have registered the decode rank."""
    decode.agent.open_room(room, prefills)
    wait(lambda: decode.agent.poll(room) != RoomState.BOOTSTRAPPING, f"registration for room {room}")
    assert decode.agent.poll(room) == RoomState.WAITING, decode.agent.failure(room)
    decode.agent.request(room, destination, metadata_row=metadata_row, expected_ranks=expected, prefix_tokens=prefix)


def ended(agent: PrefillAgent | DecodeAgent, room: int) -> RoomState:
    """Wait for the end of a room and return its last state."""
    wait(lambda: agent.poll(room).ended, f"the end of room {room}")
    return agent.poll(room)


def succeed(room: int, *ranks: Rank) -> None:
    """Wait until a room succeeds on each rank."""
    for rank in ranks:
        assert ended(rank.agent, room) == RoomState.SUCCESS, rank.agent.failure(room)


def fail(room: int, said: str, *ranks: Rank) -> None:
    """Wait until a room fails on each rank, for a reason that contains ``said``."""
    for rank in ranks:
        assert ended(rank.agent, room) == RoomState.FAILED
        assert said in rank.agent.failure(room)


def close(room: int, *ranks: Rank) -> None:
    for rank in ranks:
        rank.agent.close_room(room)


def idle(*ranks: Rank) -> None:
    """Wait until no staging is in use, and check that no room is left and no internal error happened."""
    for rank in ranks:
        wait(lambda agent=rank.agent: agent.stats().staging_used_bytes == 0, "staging to be free")
        assert (rank.agent.stats().rooms, rank.agent.stats().internal_errors) == (0, 0)


def send(
    prefill: PrefillRank,
    room: int,
    source: np.ndarray,
    cuts: Sequence[int] = (),
    tokens: int | None = None,
    metadata_row: int = 0,
) -> None:
    """Hand over a room's pages, ``tokens`` tokens in all, in steps that end at ``cuts``."""
    for start, stop in itertools.pairwise((0, *cuts, len(source))):
        last = stop == len(source)
        prefill.agent.send(
            room,
            source[start:stop],
            last=last,
            metadata_row=metadata_row if last else None,
            num_tokens=tokens - start * PAGE if last and tokens is not None else None,
        )


def begin(
    prefills: Sequence[PrefillRank],
    decodes: Sequence[DecodeRank],
    room: int,
    source: np.ndarray,
    targets: Sequence[np.ndarray],
    cuts: Sequence[int] = (),
) -> None:
    """Open a room on all ranks, let each decode rank ask all prefill ranks for it, and hand over its pages."""
    for prefill in prefills:
        prefill.agent.open_room(room)
    for decode, target in zip(decodes, targets, strict=True):
        ask(decode, [prefill.peer for prefill in prefills], room, target, expected=len(decodes))
    for prefill in prefills:
        send(prefill, room, source, cuts)


def transfer(
    prefills: PrefillRank | Sequence[PrefillRank],
    decodes: DecodeRank | Sequence[DecodeRank],
    room: int = 1,
    count: int = 90,
    cuts: Sequence[int] = (),
) -> None:
    """Move a room of ``count`` pages from all prefill ranks to all decode ranks, and check it to the last bit."""
    prefills = [prefills] if isinstance(prefills, PrefillRank) else prefills
    decodes = [decodes] if isinstance(decodes, DecodeRank) else decodes
    source, targets = pages(50 + room, count), [pages(room + index, count) for index in range(len(decodes))]
    begin(prefills, decodes, room, source, targets, cuts)
    succeed(room, *prefills, *decodes)
    for decode, target in zip(decodes, targets, strict=True):
        check_rows(prefills[0], decode, source, target, count * PAGE)
        assert decode.metadata.read(3) == prefills[0].metadata.read(0)


def check_rows(
    prefill: PrefillRank, decode: DecodeRank, source: np.ndarray, destination: np.ndarray, tokens: int
) -> None:
    """Compare the received rows with the formula: raw rows bit by bit, projected rows with float64."""
    from_slots, to_slots = prefill.pool.slots(source, tokens), decode.pool.slots(destination, tokens)
    for layer in range(LAYERS):
        rows = prefill.pool.layers[layer].cpu()[torch.from_numpy(from_slots)]
        got = decode.pool.layers[layer].cpu()[torch.from_numpy(to_slots)]
        kind = decode.pool.row_format.layers[layer]
        if isinstance(kind, GroupRows):
            assert decode.projection is not None
            _check_sketched_rows(rows, got, decode.projection.matrices[layer], kind)
            continue
        if decode.projection is None:
            assert torch.equal(rows.view(torch.uint8), got.view(torch.uint8)), f"layer {layer} differs"
            continue
        z = decode.projection.matrices[layer].double()
        want = rows[:, :LATENT].double() @ z
        width = z.shape[1]
        scale = {torch.bfloat16: 2**-8, torch.float32: 2**-20}[rows.dtype]
        torch.testing.assert_close(got[:, :width].double(), want, rtol=scale, atol=scale)
        assert torch.equal(rows[:, LATENT:], got[:, width:]), f"rope of layer {layer} differs"


def _check_sketched_rows(rows: torch.Tensor, got: torch.Tensor, z: torch.Tensor, kind: GroupRows) -> None:
    """Compare prefill's ``rows`` with the sketched rows that arrived, for every seventh token."""
    columns = rows[:, :LATENT].double() @ z.double()
    key = rows[:, LATENT:].bfloat16() if kind.rows.rope_bits == 16 else rows[:, LATENT:]
    for token in range(0, len(rows), 7):
        row = bytes(got[token].tolist())
        if not kind.rows.own:  # without own columns no part brings their scale
            row = row[:-6] + b"\x80\x3f" + row[-4:]
        sketched_reference.assert_row(row, kind.rows, kind.group, columns[token].numpy(), key[token].double().numpy())
