"""A rank's projection Z, one matrix a layer: what the prefill side applies before it sends (design, section
2).

``z = c_hat @ Z``: latent ``[tokens, d]`` to ``[tokens, w]``, computed in float32 and cast to the cache dtype.
The decode layer projects new tokens with the same function, so both kinds of row are rounded alike.

The first ``shared[l]`` columns of Z are the same for all groups of a server; together with the rope they form
the *common* part of a row, the other columns are a group's *own* part. Each part has a content hash, so the
sender sees which ranks want the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch

from sglang_tpla.transfer.room import TransferError

IDENTITY_HASH = "identity"


def project_latent(latent: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Project latent rows ``[..., d]`` with z ``[d, w]`` in float32; result ``[..., w]`` in the latent's
    dtype.
    """
    return (latent.to(torch.float32) @ z.to(torch.float32)).to(latent.dtype)


@dataclass(frozen=True)
class Projection:
    """Z of one rank for a run of layers.

    Args:
        matrices: ``[d, w_l]`` float32 on the CPU, one a layer.
        shared: how many leading columns of each are the same in every group.
        first_layer: model layer of ``matrices[0]``.

    Raises:
        TransferError: shapes that do not fit, or values that are not finite.
    """

    matrices: Sequence[torch.Tensor]
    shared: Sequence[int]
    first_layer: int = 0

    def __post_init__(self) -> None:
        if not self.matrices or len(self.matrices) != len(self.shared):
            raise TransferError(
                "a projection needs one matrix and one shared width a layer; got "
                f"{len(self.matrices)} matrices and "
                f"{len(self.shared)} shared widths"
            )
        d = self.matrices[0].shape[0]
        for index, (matrix, shared) in enumerate(zip(self.matrices, self.shared, strict=True)):
            if (
                matrix.ndim != 2
                or matrix.dtype != torch.float32
                or matrix.device.type != "cpu"
                or matrix.shape[0] != d
                or not 1 <= matrix.shape[1] <= d
                or not 0 <= shared <= matrix.shape[1]
            ):
                raise TransferError(
                    f"layer {self.first_layer + index} of a projection must be "
                    f"float32 [{d}, w] on the CPU with "
                    f"0 <= shared <= w <= {d}; got {matrix.dtype} {tuple(matrix.shape)} on {matrix.device}, "
                    f"shared={shared}"
                )
            if not bool(torch.isfinite(matrix).all()):
                raise TransferError(
                    f"layer {self.first_layer + index} of the projection has "
                    "values that are not finite; make the "
                    "artifact anew"
                )

    @property
    def latent_dim(self) -> int:
        """d, the width of the latent that goes in."""
        return self.matrices[0].shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """w_l, one entry a layer."""
        return tuple(matrix.shape[1] for matrix in self.matrices)

    def matrix(self, layer: int) -> torch.Tensor:
        """Z ``[d, w]`` of a model layer."""
        return self.matrices[layer - self.first_layer]

    def project(self, latent: torch.Tensor, layer: int) -> torch.Tensor:
        """`project_latent` with this layer's Z; the result has the latent's dtype and device."""
        return project_latent(latent, self.matrix(layer).to(latent.device))

    @cached_property
    def layer_bytes(self) -> tuple[bytes, ...]:
        """Each matrix as little-endian float32, row by row: what travels at registration."""
        return tuple(np.ascontiguousarray(matrix.numpy(), dtype="<f4").tobytes() for matrix in self.matrices)

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) over layout and values."""
        digest = projection_digest(self.first_layer, self.latent_dim, self.widths, self.shared)
        for data in self.layer_bytes:
            digest.update(data)
        return str(digest.hexdigest())

    @cached_property
    def common_hash(self) -> str:
        """sha256 (hex) over the shared columns of all layers: equal in every group of one server."""
        digest = hashlib.sha256(f"common {self.first_layer} {tuple(self.shared)}".encode())
        for matrix, shared in zip(self.matrices, self.shared, strict=True):
            digest.update(np.ascontiguousarray(matrix[:, :shared].numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()


def projection_digest(first_layer: int, latent_dim: int, widths: Sequence[int], shared: Sequence[int]) -> Any:
    """The hash under which a projection is registered, before its values: sha256 over its layout.

    Each layer's little-endian float32 values follow, in order.
    """
    head = f"projection {first_layer} {latent_dim} {tuple(widths)} {tuple(shared)}"
    return hashlib.sha256(head.encode())


@dataclass(frozen=True)
class Stack:
    """Matrices of neighbouring layers with one width, as one tensor, so that they are applied in one batch.

    Args:
        z: ``[layers, d, w]`` float32.
        shared: how many leading columns of each are the same in every group.
    """

    z: torch.Tensor
    shared: int


def stack_layers(matrices: Sequence[torch.Tensor], shared: Sequence[int]) -> tuple[Stack, ...]:
    """``[d, w]`` matrices of neighbouring layers as few stacks, in order."""
    stacks = []
    pairs = zip(matrices, shared, strict=True)
    for (_, common), run in groupby(pairs, key=lambda pair: (pair[0].shape[1], pair[1])):
        stacks.append(Stack(torch.stack([matrix for matrix, _ in run]), common))
    return tuple(stacks)


def cut_stacks(stacks: Sequence[Stack], first: int, count: int) -> tuple[Stack, ...]:
    """The stacks of layers ``first ... first + count - 1`` (counted from the first stack's first)."""
    found, start = [], 0
    for stack in stacks:
        stop = start + stack.z.shape[0]
        low, high = max(first, start), min(first + count, stop)
        if low < high:
            found.append(Stack(stack.z[low - start : high - start], stack.shared))
        start = stop
    return tuple(found)
