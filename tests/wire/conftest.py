"""Fixtures of the wire tests. Their pools are so small that rows would never be moved in extents."""

import contextlib
from collections.abc import Iterator

import pytest

from sglang_tpla.transfer.memory import iovec
from tests.wire import rig
from tests.wire.proxy import FaultProxy


@pytest.fixture(autouse=True)
def short_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one page are sent from where they lie, and received there."""
    monkeypatch.setattr(iovec, "MIN_EXTENT_BYTES", 128)


@pytest.fixture(params=["plain", "sketched"])
def rows_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decode ranks that are not given rows have these, child processes' too; for whole files by ``usefixtures``."""
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
    """A decode rank on the host that the test names by ``indirect``, or on prefill's."""
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
    """The network that data channels go through."""
    with contextlib.closing(FaultProxy(rig.data_port(prefill))) as proxy:
        rig.data_port(prefill, proxy.port)
        yield proxy
