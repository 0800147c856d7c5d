"""Fixtures of the wire tests."""

import contextlib
from collections.abc import Iterator

import pytest

from sglang_tpla.transfer.memory import iovec
from tests.wire import rig
from tests.wire.proxy import FaultProxy


@pytest.fixture(autouse=True)
def short_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rows of one page be sent and received in place; the tests' pools are too small for the usual bound."""
    monkeypatch.setattr(iovec, "MIN_EXTENT_BYTES", 128)


@pytest.fixture(params=["plain", "sketched"])
def rows_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rows of decode ranks, in child processes too, unless a test names others. Use it with ``usefixtures``."""
    monkeypatch.setattr(rig, "ROWS", request.param)
    monkeypatch.setenv("TEST_WIRE_ROWS", request.param)
    return request.param


@pytest.fixture
def prefill() -> Iterator[rig.PrefillRank]:
    rank = rig.prefill_rank()
    with rig.serving(rank):
        yield rank


@pytest.fixture(params=[None])
def decode(request: pytest.FixtureRequest) -> Iterator[rig.DecodeRank]:
    """A decode rank on the host that the test names by ``indirect``, or on prefill's host."""
    rank = rig.decode_rank(host=request.param)
    with rig.serving(rank):
        yield rank


@pytest.fixture
def far() -> Iterator[rig.DecodeRank]:
    """A decode rank of another host."""
    rank = rig.decode_rank(host="far")
    with rig.serving(rank):
        yield rank


@pytest.fixture
def data(prefill: rig.PrefillRank) -> Iterator[FaultProxy]:
    """A proxy that all data channels go through."""
    with contextlib.closing(FaultProxy(rig.data_port(prefill))) as proxy:
        rig.data_port(prefill, proxy.port)
        yield proxy
