"""Copies, checksums, sends and reads of pieces: C and Python agree with each other and with xxHash's own library."""

import contextlib
import socket
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tpla.transfer.memory import copy, native
from sglang_tpla.transfer.memory.iovec import IoVec, one_piece

SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=12)
WAYS = pytest.mark.parametrize("way", ["C", "Python"])


@pytest.fixture
def library(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "Python":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert native.library() is not None, "these tests need a C compiler"


def pieces(sizes: list[int], seed: int) -> IoVec:
    """Return random pieces with gaps between them, in reverse order of memory."""
    memory = np.random.default_rng(seed).integers(0, 256, sum(sizes) + 7 * len(sizes), dtype=np.uint8)
    places, place = [], memory.size
    for size in sizes:
        place -= size + 7
        places.append((memory.ctypes.data + place, size))
    return IoVec(np.array(places, dtype=np.uint64), memory)


def content(payload: IoVec) -> bytes:
    return b"".join(payload.views)


def checksum_of(payload: IoVec) -> bytes:
    """Return the checksum that a copy computes."""
    return copy.copy_pieces(payload, one_piece(np.empty(payload.size_bytes, dtype=np.uint8)))


@WAYS
@settings(deadline=None)
@given(sizes=SIZES)
def test_checksums_are_xxh3(way: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if way == "Python":
            patch.setattr(native, "library", lambda: None)
        payload = pieces(sizes, 1)
        assert checksum_of(payload) == xxhash.xxh3_64_digest(content(payload))
        assert copy.check_pieces(payload) == xxhash.xxh3_64_digest(content(payload))


@pytest.mark.parametrize("size", [*range(236, 330), 1023, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 70_001])
def test_checksums_at_the_formula_s_edges(size: int) -> None:
    payload = pieces([size], size)
    assert checksum_of(payload) == xxhash.xxh3_64_digest(content(payload))


@pytest.mark.parametrize("offset", [0, 16, 5])
@pytest.mark.parametrize(
    "sizes", [[5000], [64, 5000], [64, 1100], [1000, 4096, 24], [1024, 1025, 3072], [960, 64, 2048, 1], [5000, 7, 9000]]
)
def test_blocks_are_copied_and_checked_wherever_they_begin(sizes: list[int], offset: int) -> None:
    source, room = pieces(sizes, 8), np.zeros(sum(sizes) + 128, dtype=np.uint8)
    first = -room.ctypes.data % 64 + offset
    target = room[first : first + sum(sizes)]
    assert copy.copy_pieces(source, one_piece(target)) == xxhash.xxh3_64_digest(content(source))
    assert target.tobytes() == content(source)
    assert not room[:first].any() and not room[first + target.size :].any()


@pytest.mark.parametrize("without", ["-DPORTABLE", "-DNO_AVX512"])
def test_the_formula_of_older_processors_is_the_same(
    without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TPLA_CACHE", str(tmp_path))
    older = native.loaded(native.compiled(f"cc {without}"))
    monkeypatch.setattr(native, "library", lambda: older)
    payload = pieces([5000, 1, 64, 63, 900, 40_000], 3)
    assert checksum_of(payload) == xxhash.xxh3_64_digest(content(payload))


@WAYS
@settings(deadline=None)
@given(sizes=SIZES, cuts=SIZES)
def test_copies_are_whole_and_checked(way: str, sizes: list[int], cuts: list[int]) -> None:
    total = min(sum(sizes), sum(cuts))
    source, target = (pieces(_cut(part, total), seed) for seed, part in enumerate((sizes, cuts)))
    with pytest.MonkeyPatch.context() as patch:
        if way == "Python":
            patch.setattr(native, "library", lambda: None)
        assert copy.copy_pieces(source, target) == xxhash.xxh3_64_digest(content(source))
    assert content(source) == content(target)


def _cut(sizes: list[int], total: int) -> list[int]:
    """Return the first of ``sizes`` up to a sum of ``total``."""
    kept = []
    for size in sizes:
        if total:
            kept.append(min(size, total))
            total -= kept[-1]
    return kept


@WAYS
@pytest.mark.parametrize("known", [b"", b"digested"])
@pytest.mark.parametrize("sizes", [[200], [300_000, 1, 70_000, 4096], [1152] * 700])
def test_what_is_sent_comes_with_its_checksum(library: None, known: bytes, sizes: list[int]) -> None:
    """The test uses TCP with small buffers, so that both ends often stop in the middle."""
    source, target = pieces(sizes, 4), pieces(sizes[::-1], 5)
    outgoing, intake = copy.SocketCopy(source, known), copy.SocketCopy(target)
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far = server.accept()[0]
    with near, far:
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        while intake.left_bytes:
            with contextlib.suppress(BlockingIOError):
                if outgoing.left_bytes:
                    outgoing.send(near)
            with contextlib.suppress(BlockingIOError):
                intake.receive(far, 50_000)
    want = xxhash.xxh3_64_digest(content(source))
    assert not outgoing.left_bytes and content(target) == content(source)
    assert intake.digest() == want and outgoing.digest() == (known or want)


@WAYS
def test_the_end_of_a_stream_and_errors(library: None) -> None:
    near, far = socket.socketpair()
    with far:
        far.setblocking(False)
        intake = copy.SocketCopy(pieces([600], 1))
        with near:
            with pytest.raises(BlockingIOError):
                intake.receive(far, 100)
            near.send(b"x" * 300)
            assert intake.receive(far, 1 << 20) == 300
        assert intake.receive(far, 1 << 20) == 0
        with pytest.raises(BrokenPipeError):
            copy.SocketCopy(pieces([600], 1)).send(far)


def test_without_a_compiler_it_says_so_and_python_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SGLANG_TPLA_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    native.library.cache_clear()
    try:
        assert native.library() is None
        payload = pieces([5000], 1)
        assert checksum_of(payload) == xxhash.xxh3_64_digest(content(payload))
        assert sum("install gcc" in message for message in caplog.messages) == 1
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TPLA_CACHE", str(tmp_path))
    with pytest.raises(native.NativeError, match=r"refuses.*native\.c.*unrecognized"):
        native.compiled("cc -mno-such-option")
    assert not list(tmp_path.rglob("*.so"))
