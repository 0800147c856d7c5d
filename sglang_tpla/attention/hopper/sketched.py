"""The form of the Hopper decode kernel that reads sketched rows (`cache_rows.sketched`); `decode` compiles it.

The kernel serves rows of at least 256 bytes (whose w_pad, rope and size are multiples of 16) with w_pad 64 to 512,
sketch codes of 2, 3 and 4 bits, a rotary key of 64 values in 8 or 16 bits, up to 128 heads and query lengths 1 to 4.
The head of ``cuda/sketched_shapes.cuh`` explains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_tpla.attention.hopper import wgmma
from sglang_tpla.attention.hopper.plan import MAX_PARTS, SEGMENT_COST, TILE_TOKENS
from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.sketched import ALIGNMENT, SketchedRows, level_table

# The files are compiled as one text, in this order.
SOURCES = tuple(
    Path(__file__).parent / "cuda" / name
    for name in (
        "sketched_shapes.cuh",  # explanation; constants of a variant, parameters
        "hopper.cuh",  # barriers, asynchronous copies, wgmma
        "parts.cuh",  # a block's part of the plan
        "sketched_unpack.cuh",  # from codes to wgmma's operands
        "sketched_gather.cuh",  # the producer, which copies raw rows; the query
        "merge_shared.cuh",  # the request that a block helps to merge
        "sketched_attend.cuh",  # scores, softmax, values, partial results
        "merge.cuh",  # adding up partial results
        "sketched_decode.cu",  # the consumers' loop and the kernel
        "latent_plan.cu",  # the planning kernel
    )
)
BLOCK_BYTES = 227 * 1024  # shared memory of a block
MAX_STAGES = 8
SMALLEST_QUERY_BYTES = 10240  # the merge adds up in the query's memory
# warpgroups that add up values -> registers of a thread of the producer, of scores, of values
REGISTERS = {1: (40, 144, 184), 2: (32, 112, 112)}
MAX_ACCUMULATORS = 128  # of the values, a thread


def unsupported_reason(rows: SketchedRows) -> str | None:
    """The reason for which the kernel does not read such rows, or None."""
    if rows.row_bytes % ALIGNMENT or rows.w_pad % ALIGNMENT:
        return f"rows of {rows.row_bytes} bytes are shorter than 256, and not aligned to 16"
    if not 64 <= rows.w_pad <= 512:
        return f"w_pad {rows.w_pad} lies outside of 64 to 512"
    if rows.shared % 4 or rows.sketch_columns % 8:
        return (
            f"expected r a multiple of 4 and (g - 1) n one of 8; got {rows.shared} and {rows.sketch_columns}"
        )
    return None


@dataclass(frozen=True)
class SketchedVariant:
    """One compiled form of the kernel.

    Args:
        cache: the rows that the kernel reads.
        rows: query rows of a block, a multiple of 16.
        stages: tiles in the ring.
        buffers: groups of 32 columns (or tokens) whose registers wgmma may read at the same time.
        values: warpgroups that add up values.
    """

    cache: SketchedRows
    rows: int
    stages: int
    buffers: int = 2
    values: int = 1

    name = "sketched_decode"

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return 128 * (3 + self.values)

    @property
    def _query_bytes(self) -> int:
        pairs = [-(-columns // 32) for columns in (self.cache.sketch_columns, self.cache.rope_dim)]
        steps = self.cache.w_pad // 16 + 2 * sum(pairs)
        return max(-(-steps // 4) * self.rows * 128, SMALLEST_QUERY_BYTES)

    @property
    def fixed_bytes(self) -> int:
        """The shared memory besides query and ring: barriers, and what warps tell each other about query rows."""
        bare = 16 * self.stages + 32 + 16 + 16 + 32 + 512 + 4 * self.rows * (8 + 8 + 2 + 2)
        return -(-bare // 1024) * 1024

    @property
    def shared_bytes(self) -> int:
        """The dynamic shared memory: query, probabilities of two tiles, ring."""
        odd = self.cache.row_bytes // 16 % 2
        stride = self.cache.row_bytes + (0 if odd else 16)
        return self._query_bytes + 2 * self.rows * 128 + self.stages * TILE_TOKENS * stride + 16

    @property
    def fits(self) -> bool:
        """Whether a block has that much shared memory."""
        return self.fixed_bytes + self.shared_bytes <= BLOCK_BYTES

    @property
    def defines(self) -> dict[str, int]:
        """The macros of the CUDA source."""
        rows = self.cache
        levels = level_table(rows.sketch_bits)[: 1 << rows.sketch_bits - 1].to(torch.float16)
        words = levels.view(torch.int16).tolist() + [0] * (8 - len(levels))
        tables = {
            f"LEVELS_{name}_{i}": sum(
                (word >> shift & 255) << 8 * k for k, word in enumerate(words[4 * i : 4 * i + 4])
            )
            for name, shift in (("LOW", 0), ("HIGH", 8))
            for i in (0, 1)
        }
        return {
            "LATENT": rows.w_pad,
            "SHARED": rows.shared,
            "OWN": rows.own,
            "SKETCH": rows.sketch_columns,
            "BITS": rows.sketch_bits,
            "ROPE": rows.rope_dim,
            "ROPE_BITS": rows.rope_bits,
            "ROW_BYTES": rows.row_bytes,
            "ROWS": self.rows,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
            "FIXED_BYTES": self.fixed_bytes,
            "SHARED_BYTES": self.shared_bytes,
            "VALUES": self.values,
            "PRODUCER_REGISTERS": REGISTERS[self.values][0],
            "SCORE_REGISTERS": REGISTERS[self.values][1],
            "VALUE_REGISTERS": REGISTERS[self.values][2],
            "MAX_PARTS": MAX_PARTS,
            "SEGMENT_COST": SEGMENT_COST,
            "PLAN_BATCH": 2048,
            **tables,
        }

    def source(self) -> str:
        """The whole CUDA source."""
        text = "\n".join(path.read_text() for path in SOURCES)
        return wgmma.PRELUDE + wgmma.rows_source(self.rows) + text


def variant_for(shape: DecodeShape) -> SketchedVariant:
    """The best form for ``shape``: as many query rows a block as registers hold, and as many stages as fit."""
    assert shape.sketched is not None
    rows = shape.heads * shape.query_len
    blocks_of_columns = -(-shape.latent_dim // 64)
    most = min(64, MAX_ACCUMULATORS // blocks_of_columns * 2 // 16 * 16)
    row_blocks = -(-rows // most)
    per_block = -(-rows // (16 * row_blocks)) * 16
    stages = MAX_STAGES
    while True:
        variant = SketchedVariant(shape.sketched, per_block, stages)
        if variant.fits:
            return variant
        stages -= 1
