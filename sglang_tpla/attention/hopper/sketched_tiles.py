"""The form of the kernel for sketched rows that serves many query rows on wide values; `decode` compiles it.

The kernel unpacks every code once, to shared memory, where both products read it. With 64 query rows and w_pad 288 this
form takes three quarters of the time of `sketched`. The head of ``cuda/tiles_shapes.cuh`` explains the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_tpla.attention.hopper import wgmma
from sglang_tpla.attention.hopper.compile import joined
from sglang_tpla.attention.hopper.plan import TILE_TOKENS
from sglang_tpla.attention.hopper.sketched import BLOCK_BYTES, PANEL_BYTES, row_defines
from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

# The files are compiled as one text, in this order.
SOURCES = (
    "sketched_params.cuh",  # parameters
    "hopper.cuh",  # barriers, asynchronous copies, wgmma
    "merge_shared.cuh",  # the request that a block helps to merge
    "sketched_codes.cuh",  # from codes to float16
    "tiles_shapes.cuh",  # explanation; constants of a variant, shared memory
    "parts.cuh",  # a block's part of the plan
    "sketched_common.cuh",  # the common code of both forms
    "tiles_fill.cuh",  # the warps that unpack tiles
    "tiles_query.cuh",  # the query
    "tiles_scores.cuh",  # scores, softmax
    "tiles_values.cuh",  # values; partial results
    "merge.cuh",  # adding up partial results
    "tiles_decode.cu",  # the consumers' loop and the kernel
    "latent_plan.cu",  # the planning kernel
)
FEWEST_QUERY_ROWS = 49
FEWEST_COLUMNS, MOST_COLUMNS = 272, 320  # value columns; fewer are unpacked faster by the warps that multiply
FILL_WARPS = 8
STAGES = 2  # unpacked tiles
FEWEST_FILL_REGISTERS = 72


@dataclass(frozen=True)
class TiledVariant:
    """One compiled form of the kernel.

    Args:
        cache: the rows that the kernel reads.
        query_steps: steps of 16 columns whose query the warpgroup of scores holds in registers; the query of the other
            steps is in shared memory.
    """

    cache: SketchedRows
    query_steps: int

    name = "sketched_tiles"
    threads = 512
    rows = 64  # query rows of a block

    @property
    def steps(self) -> int:
        """The number of products of 16 columns for the scores: own columns, rotary key, sketch."""
        return self.cache.w_pad // 16 + self.cache.rope_dim // 16 + -(-self.cache.sketch_columns // 16)

    @property
    def fixed_bytes(self) -> int:
        """The bytes of shared memory behind the rings: barriers, constants, and the data that warpgroups exchange."""
        told = 2 * TILE_TOKENS * STAGES + 2 * 4 * self.rows + 2 * self.steps
        return -(-(8 * (4 * STAGES + 2) + 32 + 16 + 4 + 16 + 12 + told) // 16) * 16

    @property
    def shared_bytes(self) -> int:
        """The bytes of dynamic shared memory: query, probabilities, unpacked rows, raw rows and the fixed part."""
        query, tile = -(-(self.steps - self.query_steps) // 4), -(-self.steps // 4)
        raw = FILL_WARPS * 8 * self.cache.row_bytes
        return (query + 1 + STAGES * tile) * PANEL_BYTES + raw + self.fixed_bytes

    @property
    def registers(self) -> tuple[int, int, int]:
        """The registers of a thread that unpacks, of one for scores and of one for values.

        These numbers add up to at most 512, with the first counted twice, because two warpgroups unpack.
        """
        held = self.cache.w_pad // 2  # a thread's sums of values
        values = max(held + 32, min(held + 40, 184))
        scores = 32 + 4 * self.query_steps + 72
        return (512 - scores - values) // 16 * 8, scores, values

    @property
    def fits(self) -> bool:
        """Whether the shared memory and the registers of a block suffice."""
        return self.shared_bytes <= BLOCK_BYTES and self.registers[0] >= FEWEST_FILL_REGISTERS

    @property
    def defines(self) -> dict[str, int]:
        names = ("FILL_REGISTERS", "SCORE_REGISTERS", "VALUE_REGISTERS")
        return {
            **row_defines(self.cache),
            "QUERY_STEPS": self.query_steps,
            "SHARED_BYTES": self.shared_bytes,
            **dict(zip(names, self.registers, strict=True)),
        }

    def source(self) -> str:
        instructions = wgmma.tile_scores_source() + wgmma.row_values_source(self.cache.w_pad)
        return wgmma.PRELUDE + instructions + joined(SOURCES)


def variant_for(shape: DecodeShape) -> TiledVariant | None:
    """Return the form for ``shape``, or None if `sketched` serves it better."""
    assert shape.sketched is not None
    cache = shape.sketched
    if shape.heads * shape.query_len < FEWEST_QUERY_ROWS or not FEWEST_COLUMNS <= cache.w_pad <= MOST_COLUMNS:
        return None
    variants = (TiledVariant(cache, query_steps) for query_steps in (16, 20, 12, 8))
    return next((variant for variant in variants if variant.fits), None)
