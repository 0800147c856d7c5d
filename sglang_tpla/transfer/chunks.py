"""The cutting of a room's rows into chunks: rectangles of layers x tokens x one part of the row (`cache_rows.parts`).

A chunk's payload has the rows layer by layer, token by token, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tpla.transfer import messages

# On GPUs a chunk passes through four stages, each with its own thread: make, check, write, check. So a short prompt's
# rows are cut into four chunks to fill this pipeline, unless chunks would be so small that their messages cost more. On
# a CPU one thread does most of the work, and smaller chunks gained nothing.
STAGES, LEAST_BYTES = {"cpu": 1, "cuda": 4}, 4 << 20


@dataclass(frozen=True)
class Rectangle:
    """Layers ``first_layer...`` of tokens ``first_token...`` (after the cached prefix)."""

    first_layer: int
    layers: int
    first_token: int
    tokens: int
    payload_bytes: int


def layers_of(chunk: Rectangle | messages.Chunk | messages.Share) -> range:
    """Return the layers of a chunk, planned or on the wire."""
    return range(chunk.first_layer, chunk.first_layer + chunk.layers)


def share_of(layers: int, index: int, count: int) -> range:
    """Return the layers that a rank sends, counted from its first one, if ``count`` ranks hold the same layers.

    Ranks share a request only by layers, so that each rank may cut its share into chunks as it likes: the shares are
    disjoint and complete, whatever a rank's chunk size, its memory, and the steps in which its rows come.
    """
    return range(layers * index // count, layers * (index + 1) // count)


def enough_bytes(total_bytes: int, device: str) -> int:
    """Return the chunk size beyond which larger chunks of ``total_bytes`` in all gain nothing."""
    return max(-(-total_bytes // STAGES[device]), LEAST_BYTES)


def cut(
    first_layer: int, widths: Sequence[int], first_token: int, tokens: int, item_bytes: int, max_bytes: int
) -> list[Rectangle]:
    """Cut ``tokens`` rows of ``widths`` values in every layer into rectangles of at most ``max_bytes``.

    With few tokens a chunk has many layers. With many tokens a chunk has one layer, and blocks of tokens are of similar
    size. Layers of width 0 are covered without bytes. Raises ValueError if one row does not fit in ``max_bytes``.
    """
    row_bytes = max(widths, default=0) * item_bytes
    if row_bytes > max_bytes:
        raise ValueError(f"one row of {row_bytes} bytes does not fit in a chunk of {max_bytes} bytes")
    if row_bytes == 0 or tokens == 0:
        return []
    blocks = -(-tokens // max(1, max_bytes // row_bytes))
    rectangles = []
    for block in range(blocks):
        start, stop = tokens * block // blocks, tokens * (block + 1) // blocks
        layer = 0
        while layer < len(widths):
            end, size = layer, 0
            while end < len(widths) and size + widths[end] * (stop - start) * item_bytes <= max_bytes:
                size += widths[end] * (stop - start) * item_bytes
                end += 1
            if size:
                rectangles.append(Rectangle(first_layer + layer, end - layer, first_token + start, stop - start, size))
            layer = end
    return rectangles
