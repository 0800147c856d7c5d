"""A rank's projection Z, one matrix per layer, which the prefill side applies before it sends (design, section 2).

``z = c_hat @ Z``: latent ``[tokens, d]`` to ``[tokens, w]``, computed in float32 and cast to the cache dtype.
The decode layer projects new tokens with the same function, so both kinds of row are rounded alike.

The first ``shared[l]`` columns of Z are the same for all groups of a server; together with the rope they form
the *common* part of a row, the other columns are a group's *own* part. Each part has a content hash, so the
sender sees which ranks want the same bytes.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer.room import TransferError

IDENTITY_HASH = "identity"


def project_latent(latent: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Project latent rows ``[..., d]`` with z ``[d, w]`` in float32. Return ``[..., w]`` in the latent's dtype."""
    return (latent.to(torch.float32) @ z.to(torch.float32)).to(latent.dtype)


@dataclass(frozen=True)
class Projection:
    """Z of one rank for its layers.

    Args:
        matrices: ``[d, columns]`` float32 on the CPU, one per layer.
        shared: how many leading columns of each matrix are the same in every group.
        sketched: the row format if rows are sketched, with the columns ``[shared | own | sketch of all groups]``; None
            if each matrix has the ``w`` columns of the slice.

    Raises:
        TransferError: the shapes do not fit, or values are not finite.
    """

    matrices: Sequence[torch.Tensor]
    shared: Sequence[int]
    sketched: RowFormat | None = None

    def __post_init__(self) -> None:
        if not self.matrices or len(self.matrices) != len(self.shared):
            raise TransferError(
                f"a projection needs one matrix and one shared width a layer; got {len(self.matrices)} matrices and "
                f"{len(self.shared)} shared widths"
            )
        d = self.matrices[0].shape[0]
        if self.sketched is not None and (
            tuple(self.sketched.shared) != tuple(self.shared)
            or [rows.columns for rows in self.sketched.layers] != [matrix.shape[-1] for matrix in self.matrices]
        ):
            raise TransferError(
                "a projection of sketched rows has the columns [shared | own | sketch of all groups]; got widths "
                f"{[matrix.shape[-1] for matrix in self.matrices][:4]}... for {self.sketched.layers[0]}...; make the "
                "artifact anew"
            )
        most = d if self.sketched is None else 2 * d
        for index, (matrix, shared) in enumerate(zip(self.matrices, self.shared, strict=True)):
            if (
                matrix.ndim != 2
                or matrix.dtype != torch.float32
                or matrix.device.type != "cpu"
                or matrix.shape[0] != d
                or not 1 <= matrix.shape[1] <= most
                or not 0 <= shared <= matrix.shape[1]
            ):
                raise TransferError(
                    f"layer {index} of a projection must be float32 [{d}, w] on the CPU with 0 <= "
                    f"shared <= w <= {most}; got {matrix.dtype} {tuple(matrix.shape)} on {matrix.device}, "
                    f"shared={shared}"
                )
            if not bool(torch.isfinite(matrix).all()):
                raise TransferError(
                    f"layer {index} of the projection has values that are not finite; make the artifact anew"
                )

    @property
    def latent_dim(self) -> int:
        """d, the width of the latent that goes in."""
        return self.matrices[0].shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """w_l of each layer."""
        if self.sketched is not None:
            return self.sketched.widths
        return tuple(matrix.shape[1] for matrix in self.matrices)

    @cached_property
    def layer_bytes(self) -> tuple[bytes, ...]:
        """Each matrix as little-endian float32, row by row, as it travels at registration."""
        return tuple(np.ascontiguousarray(matrix.numpy(), dtype="<f4").tobytes() for matrix in self.matrices)

    @cached_property
    def content_hash(self) -> str:
        """The sha256 (hex) of layout and values."""
        rows = self.sketched or RowFormat.plain(self.widths, self.shared, 0)
        digest = projection_digest(self.latent_dim, rows)
        for data in self.layer_bytes:
            digest.update(data)
        return str(digest.hexdigest())

    @cached_property
    def common_hash(self) -> str:
        """The sha256 (hex) of the columns of the common part, which is equal in every group of a server."""
        rows = self.sketched or RowFormat.plain(self.widths, self.shared, 0)
        head = f"common 0 {tuple(self.shared)}{rows.common_suffix}"
        digest = hashlib.sha256(head.encode())
        for matrix, layer in zip(self.matrices, rows.layers, strict=True):
            for columns in layer.part_columns(Part.COMMON):
                digest.update(np.ascontiguousarray(matrix[:, columns].numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()


def projection_digest(latent_dim: int, rows: RowFormat) -> Any:
    """Begin the hash under which a projection is registered: sha256 over its layout.

    The 0 is the number of the first layer. Each layer's little-endian float32 values follow, in order.
    """
    head = f"projection 0 {latent_dim} {rows.widths} {rows.shared}{rows.suffix}"
    return hashlib.sha256(head.encode())


def stack_layers(matrices: Sequence[torch.Tensor], kinds: Sequence[Hashable]) -> tuple[torch.Tensor, ...]:
    """Stack successive layers' ``[d, columns]`` matrices of one shape and kind, each stack for one batched product."""
    pairs = zip(matrices, kinds, strict=True)
    runs = groupby(pairs, key=lambda pair: (pair[0].shape[1], pair[1]))
    return tuple(torch.stack([matrix for matrix, _ in run]) for _, run in runs)


def cut_stacks(stacks: Sequence[torch.Tensor], first: int, count: int) -> tuple[torch.Tensor, ...]:
    """Return the stacks of layers ``first ... first + count - 1`` (counted from the first stack's first)."""
    found, start = [], 0
    for stack in stacks:
        stop = start + stack.shape[0]
        low, high = max(first, start), min(first + count, stop)
        if low < high:
            found.append(stack[low - start : high - start])
        start = stop
    return tuple(found)
