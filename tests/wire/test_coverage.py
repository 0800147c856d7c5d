"""Prefill ranks of one server that send differently: every page, poisoned before, holds the rows that were sent."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from sglang_tpla.cache_rows.layer_rows import LayerRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer import workers
from sglang_tpla.transfer.memory.projection import Projection
from tests.ports import neighbouring_ports
from tests.wire import rig

PAGES = 30
POISON = 0xFF  # no number in any floating-point format here


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Let the system refuse shared memory, as with a full /dev/shm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "SharedSegment", mock.Mock(side_effect=OSError("no space")))
        yield


def transfer(
    prefills: Sequence[rig.PrefillRank],
    decodes: Sequence[rig.DecodeRank],
    steps: Sequence[Sequence[int]] = ((), ()),
    asked: Sequence[Sequence[int]] | None = None,
    tokens: int = PAGES * rig.PAGE,
    prefix: int = 0,
) -> None:
    """Move one room from all prefill ranks to all decode ranks, and check the pools.

    Args:
        steps: the pages after which each prefill rank's hand-over is cut.
        asked: the prefill ranks from which each decode rank wants rows; the others get dummy requests. None: all.
        prefix: tokens that decode has cached already.
    """
    with rig.serving(*prefills, *decodes):
        source = rig.pages(50, PAGES)
        targets = [rig.pages(index, PAGES) for index in range(len(decodes))]
        for prefill in prefills:
            prefill.agent.open_room(1)
        for index, (decode, target) in enumerate(zip(decodes, targets, strict=True)):
            for layer in decode.pool.layers:
                layer.view(torch.uint8).fill_(POISON)
            if decode.pool.row_format.kind == "sketched":
                for layer, rows in zip(decode.pool.layers, decode.pool.row_format.layers, strict=True):
                    layer[:, uncarried(rows)] = 0
            decode.metadata.write(3, bytes([POISON]) * decode.metadata.row_bytes)
            wanted = range(len(prefills)) if asked is None else asked[index]
            peers = [(*p.agent.address, number not in wanted) for number, p in enumerate(prefills)]
            rig.ask(decode, peers, 1, target, expected=len(decodes), prefix=prefix)
        for prefill, cuts in zip(prefills, steps, strict=True):
            rig.send(prefill, 1, source, cuts, tokens=tokens)
        rig.succeed(1, *prefills, *decodes)
        for decode, target in zip(decodes, targets, strict=True):
            rig.check_rows(prefills[0], decode, source, target, tokens)
            assert decode.metadata.read(3) == prefills[0].metadata.read(0)
            written = torch.zeros(rig.PAGES * rig.PAGE, dtype=torch.bool)
            written[torch.from_numpy(decode.pool.slots(target, tokens))] = True
            kind = decode.pool.row_format.kind
            for layer, rows in zip(decode.pool.layers, decode.pool.row_format.layers, strict=True):
                rest = layer[~written].view(torch.uint8)
                if kind == "sketched":
                    rest[:, uncarried(rows)] = POISON
                assert (rest == POISON).all()


def uncarried(rows: LayerRows) -> list[int]:
    """Return the bytes of a row that neither the common nor the own part brings."""
    brought = [field for part in (Part.COMMON, Part.OWN) for field in rows.fields(part)]
    kept = {item for field in brought for item in range(field.start, field.stop)}
    return [item for item in range(rows.row_items) if item not in kept]


def two(**changes: Any) -> list[rig.PrefillRank]:
    """Make two prefill ranks of one server, the second with other settings."""
    return [rig.prefill_rank(rank=0), rig.prefill_rank(rank=1, **changes)]


def groups(widths: Sequence[int] = (40,) * rig.LAYERS, **changes: Any) -> list[rig.DecodeRank]:
    """Make decode ranks of two latent groups, 16 of whose columns are shared."""
    ranks = []
    for group in range(2):
        parts = [rig.projection(group, width) for width in widths]
        z = Projection([part.matrices[i] for i, part in enumerate(parts)], [16] * rig.LAYERS)
        ranks.append(rig.decode_rank(z, rank=group, size=2, **changes))
    return ranks


@pytest.mark.parametrize("host", [None, "far"])
@pytest.mark.parametrize("changes", [{}, {"chunk_bytes": 4096}, {"staging_bytes": 12 << 10}, {"shared_memory": 0}])
@pytest.mark.parametrize("make", [lambda host: [rig.decode_rank(host=host)], lambda host: groups(host=host)])
def test_ranks_with_other_settings(
    make: Callable[[str | None], list[rig.DecodeRank]], changes: dict[str, int], host: str | None
) -> None:
    transfer(two(**changes), make(host))


@pytest.mark.parametrize("steps", [((), (13,)), ((10,), (20,)), ((1, 2, 3), (29,))])
@pytest.mark.parametrize("host", [None, "far"])
def test_ranks_that_hand_rows_over_in_other_steps(host: str | None, steps: Sequence[Sequence[int]]) -> None:
    transfer(two(chunk_bytes=4096), groups(host=host), steps)


@pytest.mark.parametrize("decodes_refused", [(), (1,), (0, 1)])
def test_ranks_that_the_system_refused_shared_memory(decodes_refused: Sequence[int]) -> None:
    prefills = [rig.prefill_rank(rank=0)]
    with refused():
        prefills.append(rig.prefill_rank(rank=1))
    decodes = groups()
    for index in decodes_refused:
        decodes[index].agent.close()
        with refused():
            decodes[index] = rig.decode_rank(decodes[index].projection, rank=index, size=2)
    transfer(prefills, decodes, ((), (13,)))


@pytest.mark.parametrize("asked", [((0, 1), (0,)), ((1,), (0, 1)), ((0,), (1,))])
@pytest.mark.parametrize("host", rig.HOSTS)
def test_decode_ranks_that_ask_for_unequal_shares(host: str | None, asked: Sequence[Sequence[int]]) -> None:
    transfer(two(chunk_bytes=4096), groups(host=host), asked=asked)


@pytest.mark.parametrize("host", [None, "far"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sketched_rows(count: int, host: str | None) -> None:
    """Two prefill ranks, the second with smaller chunks, serve every group."""
    parts = [rig.sketched_projection(group, 4, 32, (4, 2, 3)) for group in range(count)]
    ranks = [rig.decode_rank(z, rank=group, size=count, host=host) for group, z in enumerate(parts)]
    transfer(two(chunk_bytes=4096), ranks)


@pytest.mark.parametrize("host", [None, "far"])
@pytest.mark.parametrize("widths", [(48, 16, 32), (16, 16, 16), (16, 48, 16)])
def test_widths_that_differ_by_layer(widths: Sequence[int], host: str | None) -> None:
    """Some layers have only shared columns."""
    transfer(two(chunk_bytes=4096), groups(widths=widths, host=host))


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize("decode_refused", [False, True])
def test_sketched_rows_without_shared_memory(decode_refused: bool, host: str | None) -> None:
    """The layers' sketches have different widths; the sketch of all groups is in the common part."""
    decodes = []
    for group in range(2):
        with refused() if decode_refused and group else contextlib.nullcontext():
            decodes.append(rig.decode_rank(rig.sketched_projection(group), rank=group, size=2, host=host))
    transfer(two(chunk_bytes=4096), decodes, ((7,), (8,)))


@pytest.mark.parametrize("tokens", [PAGES * rig.PAGE - 1, PAGES * rig.PAGE - 3])
@pytest.mark.parametrize("prefix", [0, 4, 37])
def test_a_cached_prefix_and_a_last_page_that_is_not_full(prefix: int, tokens: int) -> None:
    transfer(two(chunk_bytes=4096), groups(host="far"), ((7,), (8,)), tokens=tokens, prefix=prefix)


def test_more_prefill_ranks_than_layers() -> None:
    """Some ranks send nothing but the metadata row."""
    prefills = [rig.prefill_rank(rank=rank) for rank in range(rig.LAYERS + 2)]
    transfer(prefills, groups(), ((),) * len(prefills))


def test_a_rank_that_restarted_with_another_chunk_size() -> None:
    """The rank's rooms fail with the reason; the next room is whole."""
    port = neighbouring_ports(2)  # for messages and for data; nothing else takes them before the restart
    first, second = two(port=port)
    decode = rig.decode_rank(host="far")
    with contextlib.closing(first.agent), contextlib.closing(decode.agent):
        for prefill in (first, second):
            prefill.agent.open_room(1)
        rig.ask(decode, [first.peer, second.peer], 1, rig.pages(0, PAGES))
        for prefill in (first, second):
            prefill.agent.send(1, rig.pages(50, 7), last=False)
        second.agent.close()
        rig.fail(1, str(port), decode)
        decode.agent.close_room(1)
        again = rig.prefill_rank(rank=1, port=port, chunk_bytes=4096)
        first.agent.close_room(1)
        with contextlib.closing(again.agent):
            rig.transfer([first, again], decode, 2, count=PAGES)
