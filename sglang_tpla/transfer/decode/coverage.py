"""The proof that a room's chunks are the whole request, each byte of it once.

Prefill ranks decide for themselves how they cut and share a request, so that counting chunks says nothing about rows.
A cell is one layer of one token of the request, in two parts: the common and the own columns (`cache_rows.parts`).
"""

from collections.abc import Callable

import numpy as np

from sglang_tpla.cache_rows.parts import Part

BITS = {Part.COMMON: 1, Part.OWN: 2, Part.FULL: 3}
NAMES = {1: "common columns", 2: "own columns", 3: "row"}


class Coverage:
    """The cells that chunks of one room have claimed. Any thread that holds the agent's lock may call.

    Args:
        layers: of the pool.
        tokens: that the pages of the request hold.
        items: how many items one part of a row has in a layer (by index); a part without any needs no chunk.
    """

    def __init__(self, layers: int, tokens: int, items: Callable[[int, Part], int]) -> None:
        needed = [sum(BITS[part] for part in (Part.COMMON, Part.OWN) if items(layer, part)) for layer in range(layers)]
        self._needed = np.array(needed, dtype=np.uint8)[:, None]  # [layers, 1]
        self._claimed = np.zeros((layers, tokens), dtype=np.uint8)

    def claim(self, layers: range, first_token: int, tokens: int, part: Part) -> str:
        """Claim a chunk's cells, or return what is wrong and claim nothing, because another chunk had some of them."""
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
        """Return what keeps the chunks from being exactly the request's first ``tokens`` tokens, or nothing."""
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
