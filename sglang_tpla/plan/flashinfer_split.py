"""A model of how FlashInfer's MLA kernel splits requests over a GPU's multiprocessors, and of the cost of the split.

The model follows ``MLAPlan`` of ``flashinfer/attention/scheduler.cuh`` (0.6): a request is cut into chunks of at most
``limit`` tokens, and each chunk goes to the cluster of blocks that has least. ``limit`` is the even share rounded up,
so that 64 requests of one length divide well over 132 multiprocessors and 48 leave some with nearly twice their share.
"""

import heapq
from dataclasses import dataclass

TILE_ROWS = 64  # query rows of a block; more make clusters of two
MOST_REQUESTS = 2048  # with more, a chunk is so small a part of a share that nothing is left to even out


@dataclass(frozen=True)
class Requests:
    """Requests of one length that attend together: ``query_rows`` are heads times query tokens of each."""

    number: int
    tokens: int
    query_rows: int


@dataclass(frozen=True)
class Uneven:
    """The time of a call over the time with the same work on every busy multiprocessor, at least 1.

    Args:
        products: for operations, which each multiprocessor does at its own pace.
        bytes: for reads, which become faster for the others when some multiprocessors have ended.
    """

    products: float = 1.0
    bytes: float = 1.0


def chunk_limit(tokens: int) -> int:
    """Return the most tokens of a chunk where a cluster's even share is ``tokens``."""
    for share, limit in ((8, 32), (16, 64), (32, 128), (64, 192)):
        if tokens <= share:
            return limit
    return -(-tokens // 256) * 256


def cluster_tokens(requests: Requests, multiprocessors: int) -> list[int]:
    """Return the tokens that each cluster of blocks reads."""
    size = 2 if requests.query_rows > TILE_ROWS else 1
    clusters = max(1, multiprocessors // size)
    parts = requests.number * -(-requests.query_rows // (size * TILE_ROWS))
    limit = chunk_limit(-(-parts * requests.tokens // clusters))
    heap = [(0, index) for index in range(clusters)]
    for _ in range(parts):
        for start in range(0, requests.tokens, limit):
            taken, index = heap[0]
            heapq.heapreplace(heap, (taken + min(limit, requests.tokens - start), index))
    return [taken for taken, _ in heap]


def uneven(requests: Requests, multiprocessors: int, alone: float) -> Uneven:
    """Return the cost of the split.

    Args:
        alone: bandwidth of one multiprocessor over its even share of the memory's bandwidth where few others read.
            Multiprocessors without work do not count as ended readers: the time of so small a load is overhead.
    """
    if requests.number > MOST_REQUESTS:
        return Uneven()
    taken = sorted(tokens for tokens in cluster_tokens(requests, multiprocessors) if tokens)
    total, reading = sum(taken), len(taken)
    # Time in tokens of an even share: while n of all still read, each is min(all / n, alone) times as fast.
    time, before = 0.0, 0
    for ended, tokens in enumerate(taken):
        time += (tokens - before) / min(reading / (reading - ended), alone)
        before = tokens
    return Uneven(taken[-1] * reading / total, time * reading / total)
