"""How a cache row is encoded, apart from how rows move: what its items are, and which of them make up each part.

    PlainRows   items of the pool's dtype   [w latent | rope]
    Fp8Rows     bytes                       [w e4m3 | rope bfloat16 | scale of the shared, of the own columns | zeros]
                                            (`cache_rows.fp8`)
    GroupRows   bytes                       [w int8 | rope | sketch of the other groups' columns | scales]
                                            (`cache_rows.sketched`)
    WholeRows   bytes                       [d latent | rope] of the model's dtype: a draft's layers behind one of the
                                            two above

Each layer has rows of its own; a `RowFormat` is those of a pool. A receiver announces its format; the sender projects
in float32 and encodes straight from that, so values are rounded once, and rows of a format of their own are bytes from
the sender's gather on.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch

from sglang_tpla.cache_rows import fp8 as fp8_rows
from sglang_tpla.cache_rows import sketched
from sglang_tpla.cache_rows.parts import Field, Part, side_by_side
from sglang_tpla.cache_rows.sketched import SketchedRows

# in the place of a dtype's name, where formats are announced
FP8_NAME = "fp8_rows"
SKETCHED_NAME = "sketched_rows"
ANNOUNCED = re.compile(
    SKETCHED_NAME + r" groups=(\d{1,4}) group=(\d{1,4}) sketch_bits=([\d*,]+) rope_bits=([\d*,]+)"
)
# behind it, where the last layers are a draft model's
WHOLE = re.compile(r"(.+) whole_layers=([1-9]\d?) whole_dtype=(bfloat16|float16|float32)")
SENDER_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
)  # of a pool whose rows are sent in another format


class LayerRows(Hashable, Protocol):
    """The rows of one layer on one rank; equal ones are encoded alike.

    Attributes:
        width: w, latent values of a row that are attended to as values.
        shared: r, how many of them every group has.
        rope_dim: values of the rotary key.
        encoded: whether rows are bytes that the sender makes, whatever dtype its own pool has.
        row_items: items of a row.
        columns: of the projection that rows are made from.
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

    def unsupported_reason(self) -> str | None:
        """Why there are no such rows, or None."""

    def fields(self, part: Part) -> tuple[Field, ...]:
        """Items of the row that a part fills; what else the payload holds is not this rank's."""

    def part_items(self, part: Part) -> int:
        """Items a token of one part's payload."""

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        """Columns of the projection that a part is made from."""

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        """Write one part of each row.

        Args:
            z: ``[..., columns]``, those of `part_columns`, float32 (or the pool's dtype, where they are raw).
            k_rope: ``[..., rope]``, unused in a group's own part.
            out: ``[..., part_items]``.
        """


@dataclass(frozen=True)
class PlainRows:
    """``[w latent | rope]`` of the pool's dtype."""

    width: int
    shared: int
    rope_dim: int

    encoded = False

    @property
    def row_items(self) -> int:
        """Items of a row."""
        return self.width + self.rope_dim

    @property
    def columns(self) -> int:
        """Columns of the projection."""
        return self.width

    def unsupported_reason(self) -> str | None:
        """Any width will do."""
        return None

    def fields(self, part: Part) -> tuple[Field, ...]:
        """See `LayerRows`."""
        end = self.row_items
        match part:
            case Part.FULL:
                return side_by_side((0, end))
            case Part.COMMON:
                return side_by_side((0, self.shared), (self.width, end))
            case Part.OWN:
                return side_by_side((self.shared, self.width))

    def part_items(self, part: Part) -> int:
        """See `LayerRows`."""
        return sum(field.size for field in self.fields(part))

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        """See `LayerRows`."""
        return (_columns(self.shared, part),)

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        """See `LayerRows`."""
        width = z.shape[-1]
        out[..., :width] = z
        if part is not Part.OWN:
            out[..., width:] = k_rope


@dataclass(frozen=True)
class Fp8Rows:
    """The bytes of `cache_rows.fp8`."""

    width: int
    shared: int
    rope_dim: int

    encoded = True

    @property
    def row_items(self) -> int:
        """Bytes of a row."""
        return fp8_rows.row_bytes(self.width, self.rope_dim)

    @property
    def columns(self) -> int:
        """Columns of the projection."""
        return self.width

    def unsupported_reason(self) -> str | None:
        """Why a slice cannot be kept in such rows, or None."""
        return fp8_rows.unsupported_reason(self.width, self.rope_dim)

    def fields(self, part: Part) -> tuple[Field, ...]:
        """See `LayerRows`."""
        scales = self.width + 2 * self.rope_dim
        middle = scales + fp8_rows.SCALE_BYTES
        match part:
            case Part.FULL:
                return side_by_side((0, self.row_items))
            case Part.COMMON:
                return side_by_side((0, self.shared), (self.width, middle))
            case Part.OWN if self.shared < self.width:
                return side_by_side((self.shared, self.width), (middle, middle + fp8_rows.SCALE_BYTES))
            case _:
                return ()

    def part_items(self, part: Part) -> int:
        """See `LayerRows`."""
        return sum(field.size for field in self.fields(part))

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        """See `LayerRows`."""
        return (_columns(self.shared, part),)

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        """See `LayerRows`."""
        match part:
            case Part.FULL:
                out.copy_(fp8_rows.pack_rows(z, k_rope, self.shared))
            case Part.COMMON:
                out.copy_(fp8_rows.pack_common(z, k_rope))
            case Part.OWN:
                out.copy_(fp8_rows.pack_own(z))


@dataclass(frozen=True)
class GroupRows:
    """The bytes of `cache_rows.sketched`, on a rank of one latent group."""

    rows: SketchedRows
    group: int

    encoded = True

    @property
    def width(self) -> int:
        """Columns kept at 8 bits."""
        return self.rows.w

    @property
    def shared(self) -> int:
        """Columns that every group keeps."""
        return self.rows.shared

    @property
    def rope_dim(self) -> int:
        """Values of a rotary key."""
        return self.rows.rope_dim

    @property
    def row_items(self) -> int:
        """Bytes of a row."""
        return self.rows.row_bytes

    @property
    def columns(self) -> int:
        """Columns of the projection: shared, own, and the sketch of all groups."""
        return self.rows.w + self.rows.groups * self.rows.own

    def unsupported_reason(self) -> str | None:
        """Why there are no such rows, or None."""
        if not 0 <= self.group < self.rows.groups:
            return f"sketched rows of {self.rows.groups} groups have none of number {self.group}"
        return None

    def fields(self, part: Part) -> tuple[Field, ...]:
        """See `LayerRows`; the common part brings every group's sketch, and a row has those of the others."""
        match part:
            case Part.FULL:
                return side_by_side((0, self.row_items))
            case Part.COMMON:
                copies = self.rows.common_copies(self.group)
            case Part.OWN:
                copies = self.rows.own_copies()
        return tuple(Field(to, to + size, payload) for payload, to, size in copies)

    def part_items(self, part: Part) -> int:
        """See `LayerRows`."""
        rows = self.rows
        return {Part.FULL: rows.row_bytes, Part.COMMON: rows.common_bytes, Part.OWN: rows.own_bytes}[part]

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        """See `LayerRows`."""
        own = slice(self.rows.shared, self.rows.w)
        match part:
            case Part.FULL:
                return (slice(None),)
            case Part.COMMON:
                return slice(own.start), slice(own.stop, None)
            case Part.OWN:
                return (own,)

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        """See `LayerRows`."""
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
class WholeRows:
    """``[d latent | rope]`` in a pool of bytes: rows of a draft model's layer, the same on every rank."""

    width: int
    rope_dim: int
    dtype: torch.dtype

    encoded = True

    @property
    def shared(self) -> int:
        """All of them."""
        return self.width

    @property
    def row_items(self) -> int:
        """Bytes of a row."""
        return (self.width + self.rope_dim) * self.dtype.itemsize

    @property
    def columns(self) -> int:
        """Columns of the projection, which is the identity."""
        return self.width

    def unsupported_reason(self) -> str | None:
        """Any width will do."""
        return None

    def fields(self, part: Part) -> tuple[Field, ...]:
        """See `LayerRows`; all of it is common."""
        return () if part is Part.OWN else side_by_side((0, self.row_items))

    def part_items(self, part: Part) -> int:
        """See `LayerRows`."""
        return 0 if part is Part.OWN else self.row_items

    def part_columns(self, part: Part) -> tuple[slice, ...]:
        """See `LayerRows`."""
        return (_columns(self.width, part),)

    def encode(self, z: torch.Tensor, k_rope: torch.Tensor, part: Part, out: torch.Tensor) -> None:
        """See `LayerRows`."""
        if part is not Part.OWN:
            row = torch.cat((z.to(self.dtype), k_rope.to(self.dtype)), dim=-1)
            out.copy_(row.contiguous().view(torch.uint8))


def _columns(shared: int, part: Part) -> slice:
    return {Part.FULL: slice(None), Part.COMMON: slice(shared), Part.OWN: slice(shared, None)}[part]


@dataclass(frozen=True)
class RowFormat:
    """The rows of every layer of a pool, in order: all of one kind, but for those of a draft's layers at the end."""

    layers: tuple[LayerRows, ...]

    @classmethod
    def plain(cls, widths: Sequence[int], shared: Sequence[int], rope_dim: int) -> RowFormat:
        """Plain rows."""
        return cls(tuple(PlainRows(w, r, rope_dim) for w, r in zip(widths, shared, strict=True)))

    @classmethod
    def fp8(cls, widths: Sequence[int], shared: Sequence[int], rope_dim: int) -> RowFormat:
        """FP8 rows."""
        return cls(tuple(Fp8Rows(w, r, rope_dim) for w, r in zip(widths, shared, strict=True)))

    @classmethod
    def sketched(cls, layers: Sequence[SketchedRows], group: int) -> RowFormat:
        """Sketched rows on a rank of one latent group."""
        return cls(tuple(GroupRows(rows, group) for rows in layers))

    @classmethod
    def announced(
        cls, name: str, latent_dim: int, widths: Sequence[int], shared: Sequence[int], rope_dim: int
    ) -> RowFormat:
        """What a receiver announced: ``name`` (`name`) stands in the place of a dtype's.

        Raises:
            ValueError: it describes no rows.
        """
        if (draft := WHOLE.fullmatch(name)) is not None:
            kept, dtype = len(widths) - int(draft[2]), getattr(torch, draft[3])
            if (
                kept < 1
                or not cls.is_encoded(draft[1])
                or any(w != latent_dim for w in (*widths[kept:], *shared[kept:]))
            ):
                raise ValueError(
                    f"expected {draft[2]} whole layers of {latent_dim} behind others, got {widths}"
                )
            target = cls.announced(draft[1], latent_dim, widths[:kept], shared[:kept], rope_dim)
            return target.with_whole_latents(len(widths) - kept, latent_dim, rope_dim, dtype)
        if not name.startswith(SKETCHED_NAME):
            if " " in name:
                raise ValueError(f"expected the name of a dtype or of rows, got {name!r}")
            return (cls.fp8 if name == FP8_NAME else cls.plain)(widths, shared, rope_dim)
        found = ANNOUNCED.fullmatch(name)
        if found is None:
            raise ValueError(f"expected a description of sketched rows, got {name!r}")
        groups, group = int(found[1]), int(found[2])
        bits = zip(_unfold(found[3], len(widths)), _unfold(found[4], len(widths)), strict=True)
        return cls.sketched(
            [
                SketchedRows(latent_dim, groups, r, w - r, rope_dim, sketch_bits, rope_bits)
                for w, r, (sketch_bits, rope_bits) in zip(widths, shared, bits, strict=True)
            ],
            group,
        )

    @staticmethod
    def is_encoded(name: str) -> bool:
        """Whether what a receiver announced are rows that the sender makes."""
        return name.partition(" ")[0] in (FP8_NAME, SKETCHED_NAME)

    def name(self, dtype: torch.dtype) -> str:
        """What a receiver with a pool of this dtype announces."""
        head = self.layers[0]
        if isinstance(head, Fp8Rows):
            return FP8_NAME + self._whole
        if isinstance(head, GroupRows):
            return f"{SKETCHED_NAME} groups={head.rows.groups} group={head.group}{self._bits}{self._whole}"
        return str(dtype).removeprefix("torch.")

    @property
    def _whole(self) -> str:
        rows = [layer for layer in self.layers if isinstance(layer, WholeRows)]
        kind = str(rows[0].dtype).removeprefix("torch.") if rows else ""
        return f" whole_layers={len(rows)} whole_dtype={kind}" if rows else ""

    @property
    def _bits(self) -> str:
        rows = [layer.rows for layer in self.layers if isinstance(layer, GroupRows)]
        sketch, rope = (
            _fold([layer.sketch_bits for layer in rows]),
            _fold([layer.rope_bits for layer in rows]),
        )
        return f" sketch_bits={sketch} rope_bits={rope}"

    @property
    def suffix(self) -> str:
        """What the hash of a projection (`memory.projection`) says of the rows beside their widths: of sketched rows
        all that is announced.
        """
        return f" {self.name(torch.uint8)}" if isinstance(self.layers[0], GroupRows) else ""

    @property
    def common_suffix(self) -> str:
        """What the hash of the common part says of them: the same for every group."""
        head = self.layers[0]
        return (
            f" {SKETCHED_NAME} groups={head.rows.groups}{self._bits}{self._whole}"
            if isinstance(head, GroupRows)
            else ""
        )

    @property
    def encoded(self) -> bool:
        """Whether rows are bytes that the sender makes, whatever dtype its own pool has."""
        return self.layers[0].encoded

    @property
    def kind(self) -> str:
        """ "plain", "fp8" or "sketched"."""
        return {PlainRows: "plain", Fp8Rows: "fp8", GroupRows: "sketched"}[type(self.layers[0])]

    @property
    def sketch_bits(self) -> list[int]:
        """Bits of a sketch code in each layer; empty where rows have no sketch."""
        return [
            rows.rows.sketch_bits for rows in self.layers if isinstance(rows, GroupRows) and rows.rows.own
        ]

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """w of each layer."""
        return tuple(rows.width for rows in self.layers)

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """r of each layer."""
        return tuple(rows.shared for rows in self.layers)

    def sharing(self, shared: Sequence[int]) -> RowFormat:
        """The same rows, so many of whose columns are those of every group; sketched rows know that by themselves."""
        if isinstance(self.layers[0], GroupRows):
            return self
        pairs = zip(self.layers, shared, strict=True)
        return RowFormat(
            tuple(rows if isinstance(rows, WholeRows) else replace(rows, shared=r) for rows, r in pairs)  # type: ignore[type-var]
        )

    def with_whole_latents(
        self, layers: int, latent_dim: int, rope_dim: int, dtype: torch.dtype
    ) -> RowFormat:
        """The same, and behind them rows of whole latents of so many layers: those of a draft model.

        Args:
            dtype: of the draft's cache.
        """
        whole: LayerRows = PlainRows(latent_dim, latent_dim, rope_dim)
        if self.encoded:
            whole = WholeRows(latent_dim, rope_dim, dtype)
        return RowFormat(self.layers + (whole,) * layers)

    @cached_property
    def of_any_group(self) -> RowFormat:
        """Equal for the ranks whose common part is the same."""
        return RowFormat(
            tuple(replace(rows, group=0) if isinstance(rows, GroupRows) else rows for rows in self.layers)
        )

    def part(self, first: int, count: int) -> RowFormat:
        """Those of ``count`` layers from the ``first`` on (by index)."""
        return RowFormat(self.layers[first : first + count])

    def item_dtype(self, sender: torch.dtype) -> torch.dtype:
        """Type of one item of a row, where the sender's pool has dtype ``sender``."""
        return torch.uint8 if self.encoded else sender

    def part_items(self, part: Part) -> list[int]:
        """Items a token of one part's payload, one entry a layer."""
        return [rows.part_items(part) for rows in self.layers]


def _fold(numbers: Sequence[int]) -> str:
    """One number a layer as runs: ``4*3,2`` is 4, 4, 4, 2."""
    runs = [(number, len(list(run))) for number, run in groupby(numbers)]
    return ",".join(f"{number}*{count}" if count > 1 else f"{number}" for number, count in runs)


def _unfold(text: str, layers: int) -> list[int]:
    """One number a layer of `_fold`'s runs.

    Raises:
        ValueError: it is no such text, or not for so many layers.
    """
    numbers: list[int] = []
    for run in text.split(","):
        number, _, count = run.partition("*")
        numbers += [int(number)] * min(int(count or 1), layers + 1)
    if len(numbers) != layers:
        raise ValueError(f"expected one number for each of {layers} layers, got {text!r}")
    return numbers
