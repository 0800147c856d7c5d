"""The form of the Hopper decode kernel that reads sketched rows (`cache_rows.sketched`); `decode` compiles it.

The kernel serves rows of at least 256 bytes (whose w_pad, rope and size are multiples of 16) with w_pad 64 to 512, r a
multiple of 4, (g - 1) n a multiple of 8, sketch codes of 2, 3 and 4 bits, a rotary key of 64 values in 8 or 16 bits, up
to 128 heads and query lengths 1 to 4. `sketched_tiles` serves many query rows on wide values better.
The head of ``cuda/sketched_shapes.cuh`` explains the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_tpla.attention.hopper import wgmma
from sglang_tpla.attention.hopper.compile import joined
from sglang_tpla.attention.hopper.plan import MAX_PARTS, SEGMENT_COST, TILE_TOKENS
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape
from sglang_tpla.cache_rows.sketched import ALIGNMENT, SketchedRows

# The files are compiled as one text, in this order.
SOURCES = (
    "sketched_params.cuh",  # parameters
    "hopper.cuh",  # barriers, asynchronous copies, wgmma
    "sketched_shapes.cuh",  # explanation; constants of a variant
    "parts.cuh",  # a block's part of the plan
    "sketched_common.cuh",  # the common code of this form and of `sketched_tiles`
    "sketched_codes.cuh",  # from codes to float16
    "sketched_unpack.cuh",  # from raw rows to wgmma's operands
    "sketched_gather.cuh",  # the producer, which copies raw rows
    "sketched_query.cuh",  # the query
    "merge_shared.cuh",  # the request that a block helps to merge
    "sketched_scores.cuh",  # scores, softmax
    "sketched_results.cuh",  # the common code of both forms of values
    "sketched_{values}_values.cuh",  # the values, by query rows or turned; partial results
    "merge.cuh",  # adding up partial results
    "sketched_decode.cu",  # the consumers' loop and the kernel
    "latent_plan.cu",  # the planning kernel
)
BLOCK_BYTES = 227 * 1024  # shared memory of a block
HALF_TOKENS = TILE_TOKENS // 2  # a stage of the ring
PANEL_BYTES = TILE_TOKENS * 128  # 64 columns of a tile's values
MAX_STAGES, MIN_STAGES = 12, 4  # half tiles; with three a reader could take a stage for the one before
SMALLEST_QUERY_BYTES = 10240  # the merge uses the query's memory for its sums
MAX_ACCUMULATORS = 128  # a thread's sums of turned values
MAX_ROW_VALUES = 288  # columns of values by query rows; a thread holds half as many sums


def unsupported_reason(rows: SketchedRows) -> str | None:
    """Return the reason why the kernel does not read such rows, or None."""
    if rows.row_bytes % ALIGNMENT or rows.w_pad % ALIGNMENT:
        return f"rows of {rows.row_bytes} bytes are shorter than 256, and not aligned to 16"
    if not 64 <= rows.w_pad <= 512:
        return f"w_pad {rows.w_pad} lies outside of 64 to 512"
    if rows.shared % 4 or rows.sketch_columns % 8:
        return f"expected r a multiple of 4 and (g - 1) n one of 8; got {rows.shared} and {rows.sketch_columns}"
    return None


def row_defines(rows: SketchedRows) -> dict[str, int]:
    """Return the macros that describe a row, and those of the plan."""
    return {
        "LATENT": rows.w_pad,
        "SHARED": rows.shared,
        "OWN": rows.own,
        "SKETCH": rows.sketch_columns,
        "BITS": rows.sketch_bits,
        "ROPE": rows.rope_dim,
        "ROPE_BITS": rows.rope_bits,
        "ROW_BYTES": rows.row_bytes,
        "MAX_PARTS": MAX_PARTS,
        "SEGMENT_COST": SEGMENT_COST,
        "PLAN_BATCH": 2048,
    }


@dataclass(frozen=True)
class SketchedVariant:
    """One compiled form of the kernel.

    Args:
        cache: the rows that the kernel reads.
        rows: query rows of a block, a multiple of 16.
        stages: half tiles in the ring.
        row_values: whether values are by query rows, from shared memory; otherwise they are turned, from raw rows.
    """

    cache: SketchedRows
    rows: int
    stages: int
    row_values: bool

    name = "sketched_decode"
    threads = 512

    @property
    def _query_bytes(self) -> int:
        pairs = [-(-columns // 32) for columns in (self.cache.sketch_columns, self.cache.rope_dim)]
        steps = self.cache.w_pad // 16 + 2 * sum(pairs)
        return max(-(-steps // 4) * self.rows * 128, SMALLEST_QUERY_BYTES)

    @property
    def _starts(self) -> int:
        """The number of score sums that do not begin with zero: kStarts in ``cuda/sketched_shapes.cuh``."""
        cache, split = self.cache, self.rows <= 32
        two = cache.shared > 0 and cache.own > 0
        apart = split and two and not self.row_values and cache.shared % 16 == 0
        of_bytes = split and not self.row_values and (apart or not two)
        return (cache.sketch_columns > 0) + (split and cache.rope_bits == 8) + (1 + apart if of_bytes else 0)

    @property
    def fixed_bytes(self) -> int:
        """The bytes of shared memory behind the ring: barriers, constants, and data that warps exchange."""
        bare = 16 * self.stages + 40 + 40 + 24 + 32 + 76 + 4 * self.rows * (8 + 8 + 2 + max(self._starts, 1))
        return -(-(bare + (32 if self.row_values else 12 * self.rows + 512)) // 16) * 16

    @property
    def shared_bytes(self) -> int:
        """The bytes of dynamic shared memory: query, two tiles' probabilities and values, ring, and the fixed part."""
        odd = self.cache.row_bytes // 16 % 2
        stride = self.cache.row_bytes + (0 if odd else 16)
        tile = 128 * (64 if self.row_values else self.rows)
        if self.row_values:
            tile += -(-self.cache.w_pad // 64) * PANEL_BYTES
        return self._query_bytes + 2 * tile + self.stages * HALF_TOKENS * stride + self.fixed_bytes

    @property
    def registers(self) -> tuple[int, int, int]:
        """The registers of a thread of the producer, of scores and of values; at most 512 with scores counted twice."""
        if self.row_values:
            values = self.cache.w_pad // 2 + 40
        else:
            values = min(184, -(-self.cache.w_pad // 64) * self.rows // 2 + 64)
        return 40, (472 - values) // 16 * 8, values // 8 * 8

    @property
    def fits(self) -> bool:
        """Whether the shared memory of a block suffices."""
        return self.shared_bytes <= BLOCK_BYTES

    @property
    def defines(self) -> dict[str, int]:
        return {
            **row_defines(self.cache),
            "ROWS": self.rows,
            "STAGES": self.stages,
            "ROW_VALUES": int(self.row_values),
            "FIXED_BYTES": self.fixed_bytes,
            "SHARED_BYTES": self.shared_bytes,
            **dict(zip(("PRODUCER_REGISTERS", "SCORE_REGISTERS", "VALUE_REGISTERS"), self.registers, strict=True)),
        }

    def source(self) -> str:
        form = "row" if self.row_values else "turned"
        text = joined(name.format(values=form) for name in SOURCES)
        instructions = wgmma.rows_source(self.rows)
        if self.row_values:
            instructions += wgmma.row_values_source(self.cache.w_pad)
        return wgmma.PRELUDE + instructions + text


def variant_for(shape: DecodeShape) -> SketchedVariant:
    """Return the best form for ``shape``: as many query rows, then stages, as a block's registers and memory hold.

    Raises:
        AttentionInputError: no form fits the shared memory of a block.
    """
    assert shape.sketched is not None
    rows, query_rows = shape.sketched, shape.heads * shape.query_len
    turned = min(64, MAX_ACCUMULATORS // -(-rows.w_pad // 64) * 2 // 16 * 16)
    forms = [(False, most) for most in range(turned, 0, -16)]
    if rows.w_pad <= MAX_ROW_VALUES and query_rows > 32:  # with fewer, unpacking is cheap and a long ring matters more
        forms.insert(0, (True, 64))
    for row_values, most in forms:
        row_blocks = -(-query_rows // most)
        per_block = -(-query_rows // (16 * row_blocks)) * 16
        for stages in range(MAX_STAGES, MIN_STAGES - 1, -1):
            variant = SketchedVariant(rows, per_block, stages, row_values)
            if variant.fits:
                return variant
    raise AttentionInputError(
        f"rows of {rows.row_bytes} bytes and queries of {shape.query_dim} columns do not fit the {BLOCK_BYTES} bytes "
        "of shared memory that a block has; choose more shared columns or fewer bits"
    )
