"""The addresses of a pool's layers, for kernels that process several layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: types for copies bit by bit
ALIGNED_BYTES = 16  # the size of a GPU's longest load


class LayerTable:
    """Layers, and the table by which a kernel finds their rows.

    Args:
        layers: ``[slots, items]`` each, rows contiguous, of one dtype and on one device.

    Attributes:
        places: int64 ``[layers, 2]`` on the device, in items: a layer's offset from the first layer, and the distance
            between its rows.
        aligned: the largest power of two, in items and at most 16 bytes, that divides all of these, the items of a row
            and the layers' offsets in their storage.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self.layers = layers
        self.dtype = layers[0].dtype
        begin, item = layers[0].data_ptr(), layers[0].element_size()
        places = [((layer.data_ptr() - begin) // item, layer.stride(0)) for layer in layers]
        numbers = [number for place in places for number in place]
        numbers += [number for layer in layers for number in (layer.shape[1], int(layer.storage_offset()))]
        self.places = torch.tensor(places, dtype=torch.int64, device=layers[0].device)
        self.aligned = math.gcd(ALIGNED_BYTES // item, *numbers)
        self._as_integers = {item: self} if layers[0].dtype == INTEGERS[item] else {}

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.layers[layer]

    def as_integers(self, size_bytes: int) -> LayerTable:
        """Return the same memory as integers of ``size_bytes``, which must divide rows and their distances."""
        if size_bytes not in self._as_integers:
            self._as_integers[size_bytes] = LayerTable([layer.view(INTEGERS[size_bytes]) for layer in self.layers])
        return self._as_integers[size_bytes]
