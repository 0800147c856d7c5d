"""The rows of every layer of a pool (`layer_rows`), and the name by which a receiver announces them to a sender."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows, PlainRows, WholeRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.sketched import SketchedRows

# An announcement has these names in place of a dtype's.
SKETCHED_NAME = "sketched_rows"
RETIRED_NAME = "fp8_rows"  # older receivers' FP8 rows
ANNOUNCED = re.compile(SKETCHED_NAME + r" groups=(\d{1,4}) group=(\d{1,4}) sketch_bits=([\d*,]+) rope_bits=([\d*,]+)")
# This text follows if the last layers are a draft model's.
WHOLE = re.compile(r"(.+) whole_layers=([1-9]\d?) whole_dtype=(bfloat16|float16|float32)")
SENDER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # dtypes of a pool whose rows are sent in another format


@dataclass(frozen=True)
class RowFormat:
    """The rows of every layer of a pool, in order: all of one kind, except those of a draft's layers at the end."""

    layers: tuple[LayerRows, ...]

    @classmethod
    def plain(cls, widths: Sequence[int], shared: Sequence[int], rope_dim: int) -> RowFormat:
        return cls(tuple(PlainRows(w, r, rope_dim) for w, r in zip(widths, shared, strict=True)))

    @classmethod
    def sketched(cls, layers: Sequence[SketchedRows], group: int) -> RowFormat:
        """Return sketched rows on a rank of one latent group."""
        return cls(tuple(GroupRows(rows, group) for rows in layers))

    @classmethod
    def announced(
        cls, name: str, latent_dim: int, widths: Sequence[int], shared: Sequence[int], rope_dim: int
    ) -> RowFormat:
        """Return the rows that a receiver announced by ``name``, which it made with `name`.

        Raises:
            ValueError: ``name`` describes no rows.
        """
        if (draft := WHOLE.fullmatch(name)) is not None:
            kept, dtype = len(widths) - int(draft[2]), getattr(torch, draft[3])
            if (
                kept < 1
                or not cls.is_encoded(draft[1])
                or any(w != latent_dim for w in (*widths[kept:], *shared[kept:]))
            ):
                raise ValueError(f"expected {draft[2]} whole layers of {latent_dim} behind others, got {widths}")
            target = cls.announced(draft[1], latent_dim, widths[:kept], shared[:kept], rope_dim)
            return target.with_whole_latents(len(widths) - kept, latent_dim, rope_dim, dtype)
        if not name.startswith(SKETCHED_NAME):
            if " " in name:
                raise ValueError(f"expected the name of a dtype or of rows, got {name!r}")
            return cls.plain(widths, shared, rope_dim)
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
        """Return whether a receiver announced rows that the sender encodes."""
        return name.partition(" ")[0] == SKETCHED_NAME

    def name(self, dtype: torch.dtype) -> str:
        """Return the name that a receiver with a pool of this dtype announces."""
        head = self.layers[0]
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
        sketch, rope = (_fold([layer.sketch_bits for layer in rows]), _fold([layer.rope_bits for layer in rows]))
        return f" sketch_bits={sketch} rope_bits={rope}"

    @property
    def suffix(self) -> str:
        """The announced text of sketched rows; a projection's hash (`memory.projection`) covers it besides widths."""
        return f" {self.name(torch.uint8)}" if isinstance(self.layers[0], GroupRows) else ""

    @property
    def common_suffix(self) -> str:
        """The text that the hash of the common part covers; it is the same for every group."""
        head = self.layers[0]
        if not isinstance(head, GroupRows):
            return ""
        return f" {SKETCHED_NAME} groups={head.rows.groups}{self._bits}{self._whole}"

    @property
    def encoded(self) -> bool:
        """Whether rows are bytes that the sender makes, whatever dtype its own pool has."""
        return self.layers[0].encoded

    @property
    def kind(self) -> str:
        """The kind of rows: "plain" or "sketched"."""
        return "sketched" if self.encoded else "plain"

    @property
    def sketch_bits(self) -> list[int]:
        """The bits of a sketch code in each layer; empty if rows have no sketch."""
        return [rows.rows.sketch_bits for rows in self.layers if isinstance(rows, GroupRows) and rows.rows.own]

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """w of each layer."""
        return tuple(rows.width for rows in self.layers)

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """r of each layer."""
        return tuple(rows.shared for rows in self.layers)

    def sharing(self, shared: Sequence[int]) -> RowFormat:
        """Return the same rows with ``shared`` columns of every group; sketched rows keep their number."""
        if isinstance(self.layers[0], GroupRows):
            return self
        pairs = zip(self.layers, shared, strict=True)
        return RowFormat(
            tuple(rows if isinstance(rows, WholeRows) else replace(rows, shared=r) for rows, r in pairs)  # type: ignore[type-var]
        )

    def with_whole_latents(self, layers: int, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> RowFormat:
        """Return the same rows, followed by rows of whole latents for ``layers`` layers of a draft model.

        Args:
            dtype: the dtype of the draft's cache.
        """
        whole: LayerRows = PlainRows(latent_dim, latent_dim, rope_dim)
        if self.encoded:
            whole = WholeRows(latent_dim, rope_dim, dtype)
        return RowFormat(self.layers + (whole,) * layers)

    @cached_property
    def of_any_group(self) -> RowFormat:
        """The rows without their group: equal for the ranks that have the same common part."""
        return RowFormat(tuple(replace(rows, group=0) if isinstance(rows, GroupRows) else rows for rows in self.layers))

    def part(self, first: int, count: int) -> RowFormat:
        """Return the rows of ``count`` layers from the ``first`` on (by index)."""
        return RowFormat(self.layers[first : first + count])

    def item_dtype(self, sender: torch.dtype) -> torch.dtype:
        """Return the dtype of one item of a row if the sender's pool has dtype ``sender``."""
        return torch.uint8 if self.encoded else sender

    def row_bytes(self, sender: torch.dtype) -> list[int]:
        """Return the bytes of a token's row in each layer if the sender's pool has dtype ``sender``."""
        return [rows.row_items * self.item_dtype(sender).itemsize for rows in self.layers]

    def part_items(self, part: Part) -> list[int]:
        """Return the number of items that one part's payload has for a token, one entry a layer."""
        return [rows.part_items(part) for rows in self.layers]


def _fold(numbers: Sequence[int]) -> str:
    """Return one number a layer as text that counts repeats: ``4*3,2`` is 4, 4, 4, 2."""
    runs = [(number, len(list(run))) for number, run in groupby(numbers)]
    return ",".join(f"{number}*{count}" if count > 1 else f"{number}" for number, count in runs)


def _unfold(text: str, layers: int) -> list[int]:
    """Read one number a layer from `_fold`'s text.

    Raises:
        ValueError: ``text`` is not in that form, or is not for so many layers.
    """
    numbers: list[int] = []
    for run in text.split(","):
        number, _, count = run.partition("*")
        numbers += [int(number)] * min(int(count or 1), layers + 1)
    if len(numbers) != layers:
        raise ValueError(f"expected one number for each of {layers} layers, got {text!r}")
    return numbers
