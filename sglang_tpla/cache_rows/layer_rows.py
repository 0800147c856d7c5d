"""How one layer's rows are encoded, apart from how rows move: the items of a row, and those of each part.

    PlainRows   items of the pool's dtype   [w latent | rope]
    GroupRows   bytes                       [w bytes | rope | sketch of the other groups' columns | scales]
                                            (`cache_rows.sketched`)
    WholeRows   bytes                       [d latent | rope] of the model's dtype: a draft's layers behind GroupRows

The sender projects in float32 and encodes straight from the result, so values are rounded once. GroupRows and WholeRows
are bytes from the sender's gather on.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_tpla.cache_rows import sketched
from sglang_tpla.cache_rows.parts import Field, Part, side_by_side
from sglang_tpla.cache_rows.sketched import SketchedRows


class LayerRows(Hashable, Protocol):
    """The rows of one layer on one rank; equal objects are encoded alike. The classes below document only differences.

    Attributes:
        width: w, latent values of a row that attention uses as values.
        shared: r, how many of these values every group has.
        rope_dim: values of the rotary key.
        encoded: whether rows are bytes that the sender makes, whatever dtype its own pool has.
        row_items: items of a row.
        columns: columns of the projection from which rows are made.
    """

    @property
    def width(self) -> int: ...
    @property
    def shared(self) -> int: ...
    @property
    def rope_dim(self) -> int: ...
    @property
    def encoded(self) -> bool: ...
    @property
    def row_items(self) -> int: ...
    @property
    def columns(self) -> int: ...

    def fields(self, part: Part) -> tuple[Field, ...]:
        """Return the items of the row that a part fills; other items of the payload belong to other groups."""

    def part_items(self, part: Part) -> int:
        """Return the number of items that one part's payload has for a token."""

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        """Return the columns of the projection from which a part is made."""

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        """Write one part of each row.

        Args:
            z: ``[..., columns]``, the columns of `part_columns`, float32 (or the pool's dtype, if they are raw).
            k_rope: ``[..., rope]``, unused in a group's own part.
            out: ``[..., part_items]``.
        """


def part_width(rows: LayerRows, part: Part) -> int:
    """Return the number of columns of the projection from which a part is made."""
    return sum(len(range(rows.columns)[run]) for run in rows.part_columns(part))


class _SharedFirst:
    """The common part of rows whose projection is the slice; the columns of every group come first."""

    @property
    def columns(self: LayerRows) -> int:
        return self.width

    def part_items(self: LayerRows, part: Part) -> int:
        return sum(field.size for field in self.fields(part))

    def part_columns(self: LayerRows, part: Part) -> tuple[slice, ...]:
        r = self.shared
        return ({Part.FULL: slice(None), Part.COMMON: slice(r), Part.OWN: slice(r, None)}[part],)


@dataclass(frozen=True)
class PlainRows(_SharedFirst):
    """``[w latent | rope]`` of the pool's dtype."""

    width: int
    shared: int
    rope_dim: int

    encoded = False

    @property
    def row_items(self) -> int:
        return self.width + self.rope_dim

    def fields(self, part: Part) -> tuple[Field, ...]:
        end = self.row_items
        match part:
            case Part.FULL:
                return side_by_side((0, end))
            case Part.COMMON:
                return side_by_side((0, self.shared), (self.width, end))
            case Part.OWN:
                return side_by_side((self.shared, self.width))

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        width = z.shape[-1]
        out[..., :width] = z
        if part is not Part.OWN:
            out[..., width:] = k_rope


@dataclass(frozen=True)
class GroupRows:
    """Sketched rows (`cache_rows.sketched`) on a rank of one latent group.

    Raises:
        ValueError: there is no such group.
    """

    rows: SketchedRows
    group: int

    encoded = True

    def __post_init__(self) -> None:
        if not 0 <= self.group < self.rows.groups:
            raise ValueError(f"sketched rows of {self.rows.groups} groups have none of number {self.group}")

    @property
    def width(self) -> int:
        """Columns kept at 8 bits."""
        return self.rows.w

    @property
    def shared(self) -> int:
        return self.rows.shared

    @property
    def rope_dim(self) -> int:
        return self.rows.rope_dim

    @property
    def row_items(self) -> int:
        return self.rows.row_bytes

    @property
    def columns(self) -> int:
        """Columns of the projection: shared, own, and the sketch of all groups."""
        return self.rows.w + self.rows.groups * self.rows.own

    def fields(self, part: Part) -> tuple[Field, ...]:
        match part:  # the common part brings every group's sketch; a row takes those of the other groups
            case Part.FULL:
                return side_by_side((0, self.row_items))
            case Part.COMMON:
                copies = self.rows.common_copies(self.group)
            case Part.OWN:
                copies = self.rows.own_copies()
        return tuple(Field(to, to + size, payload) for payload, to, size in copies)

    def part_items(self, part: Part) -> int:
        rows = self.rows
        return {Part.FULL: rows.row_bytes, Part.COMMON: rows.common_bytes, Part.OWN: rows.own_bytes}[part]

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        own = slice(self.rows.shared, self.rows.w)
        match part:
            case Part.FULL:
                return (slice(None),)
            case Part.COMMON:
                return slice(own.start), slice(own.stop, None)
            case Part.OWN:
                return (own,)

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        rows, r = self.rows, self.rows.shared
        match part:
            case Part.FULL:
                shared, own, sketch = z.split([r, rows.own, rows.groups * rows.own], dim=-1)
                out.copy_(sketched.pack_rows(rows, self.group, shared, own, sketch, k_rope))
            case Part.COMMON:
                out.copy_(sketched.encode_common(rows, z[..., :r], z[..., r:], k_rope))
            case Part.OWN:
                out.copy_(sketched.encode_own(rows, z))


@dataclass(frozen=True)
class WholeRows(_SharedFirst):
    """``[d latent | rope]`` in a pool of bytes: rows of a draft model's layer, the same on every rank."""

    width: int
    rope_dim: int
    dtype: torch.dtype

    encoded = True

    @property
    def shared(self) -> int:
        return self.width

    @property
    def row_items(self) -> int:
        return (self.width + self.rope_dim) * self.dtype.itemsize

    def fields(self, part: Part) -> tuple[Field, ...]:
        return () if part is Part.OWN else side_by_side((0, self.row_items))

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        if part is not Part.OWN:
            row = torch.cat((z.to(self.dtype), k_rope.to(self.dtype)), dim=-1)
            out.copy_(row.contiguous().view(torch.uint8))
