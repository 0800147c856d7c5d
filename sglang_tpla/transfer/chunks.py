"""How a room's rows are cut into chunks: rectangles of layers x tokens x one part of the row (`cache_rows.parts`).

A chunk's payload is layer by layer, token by token, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tpla.transfer import messages

# A GPU's chunk is made, checked, written and checked, one after the other, by as many threads. So a short prompt's rows
# are cut into as many chunks, unless these were so small that the messages of each would cost more. On a CPU one thread
# does most of it, and smaller chunks gained nothing.
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
    """Return the layers, counted from a rank's first one, that it sends where ``count`` ranks hold the same ones.

    Ranks share a request by layers and by nothing else, so that each may cut its own into chunks as it likes: the
    shares are disjoint and whole whatever its chunk size, its memory and the steps in which its rows come.
    """
    return range(layers * index // count, layers * (index + 1) // count)


def enough_bytes(total_bytes: int, device: str) -> int:
    """Return how large chunks of so many bytes in all need to be at most."""
    return max(-(-total_bytes // STAGES[device]), LEAST_BYTES)


def cut(
    first_layer: int, widths: Sequence[int], first_token: int, tokens: int, item_bytes: int, max_bytes: int
) -> list[Rectangle]:
    """Cut ``tokens`` rows of ``widths`` values in every layer into rectangles of at most ``max_bytes``.

    Few tokens: many layers a chunk. Many tokens: one layer a chunk, in blocks of like size. Layers of width 0
    are covered without bytes. Raises ValueError if one row does not fit in ``max_bytes``.
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
