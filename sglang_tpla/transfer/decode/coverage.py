"""The proof that a room's chunks are the whole request, each byte of it once.

A prefill rank decides how it cuts its share of a request into chunks, so a count of chunks proves nothing about rows.
A cell is one token of the request in one layer. It has two parts: the common and the own columns (`cache_rows.parts`).
"""

from collections.abc import Callable

import numpy as np

from sglang_tpla.cache_rows.parts import Part

BITS = {Part.COMMON: 1, Part.OWN: 2, Part.FULL: 3}
NAMES = {1: "common columns", 2: "own columns", 3: "row"}


class Coverage:
    """Tracks the cells that chunks of one room have claimed. Any thread that holds the agent's lock may call.

    Args:
        layers: number of layers in the pool.
        tokens: number of tokens that the request's pages hold.
        items: returns the number of items in one part of a layer's rows (by index); an empty part needs no chunk.
    """

    def __init__(self, layers: int, tokens: int, items: Callable[[int, Part], int]) -> None:
        needed = [sum(BITS[part] for part in (Part.COMMON, Part.OWN) if items(layer, part)) for layer in range(layers)]
        self._needed = np.array(needed, dtype=np.uint8)[:, None]  # [layers, 1]
        self._claimed = np.zeros((layers, tokens), dtype=np.uint8)

    def claim(self, layers: range, first_token: int, tokens: int, part: Part) -> str:
        """Claim a chunk's cells. If another chunk has claimed some of them, claim nothing and return the error."""
        cells = self._claimed[layers.start : layers.stop, first_token : first_token + tokens]
        bits = BITS[part] & self._needed[layers.start : layers.stop]
        twice = cells & bits
        if twice.any():
            row, token = np.argwhere(twice)[0]
            layer = layers.start + row
            what = "row" if twice[row, token] == self._needed[layers.start + row, 0] else NAMES[int(twice[row, token])]
            return f"that covers the {what} of layer {layer}, token {first_token + token}, which another chunk had"
        cells |= bits
        return ""

    def missing(self, tokens: int) -> str:
        """Return why the chunks are not exactly the request's first ``tokens`` tokens, or an empty string."""
        holes = (self._claimed[:, :tokens] & self._needed) != self._needed
        if holes.any():
            layer, token = np.argwhere(holes)[0]
            bits = int(self._needed[layer, 0] & ~self._claimed[layer, token])
            what = "row" if bits == self._needed[layer, 0] else NAMES[bits]
            return (
                f"{int(holes.sum())} of {holes.size} rows were not among the chunks that the prefill ranks announced "
                f"(first: {what} of layer {layer}, token {token})"
            )
        if self._claimed[:, tokens:].any():
            token = tokens + int(np.argwhere(self._claimed[:, tokens:].any(axis=0))[0, 0])
            return f"a chunk held token {token}, beyond the {tokens} that the prefill ranks announced"
        return ""
