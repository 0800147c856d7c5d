"""Decode attention over a paged cache of FP8 rows (`cache_rows.fp8`) behind the attention interface, in Triton.

The kernel serves every w that is a multiple of 32 from 64 to 512, up to 128 heads, query lengths 1 to 4, every page
size that is a power of two, and bfloat16 queries. It splits the cache over its length and merges in a fixed order, so
results repeat to the last bit. ``plan`` only remembers the step's tensors: programs find their stretch from lengths on
the device, and a CUDA graph of ``run`` stays right when lengths, page table and queries are refilled in place. The twin
is `reference.ReferenceDecode`.
"""

from dataclasses import dataclass

import torch

from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable, checked_inputs, checked_plan
from sglang_tpla.cache_rows import fp8 as fp8_rows

MAX_SPLITS = 128  # of one request
SMALLEST_BLOCK = 16  # columns; a matrix product takes no narrower block


@dataclass(frozen=True)
class Tiling:
    """The sizes of the kernel's tiles; results of two tilings differ in rounding alone.

    Args:
        rows: query rows (tokens x heads) of a program. tokens: cache rows of a step of its loop.
        warps, stages: as Triton counts them. programs: programs of a multiprocessor that share a step's tokens.
        compute: type in which values, queries and probabilities are multiplied.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int = 2
    compute: str = "float16"


def tiling_for(shape: DecodeShape) -> Tiling:
    """Return the fastest tiling for ``shape`` among those measured."""
    rows = shape.heads * shape.query_len
    if rows <= 32 or shape.latent_dim > 256:
        return Tiling(16 if rows <= 16 else 32, 64, 4, 3)
    if shape.latent_dim > 192:
        return Tiling(64, 32, 4, 4)
    return Tiling(64, 64, 4, 3)


def column_blocks(shared: int, w: int) -> tuple[int, int, int, int]:
    """Return the widths of the blocks in which columns are loaded: two of shared, two of own columns; 0 is no block.

    The first block of a part is the largest power of two in it; the second block is the rest.
    """

    def blocks(count: int) -> tuple[int, int]:
        first = 1 << count.bit_length() >> 1
        # a rest narrower than a matrix product is loaded, masked, with the first block
        return (count, 0) if count - first < SMALLEST_BLOCK else (first, count - first)

    return (*blocks(shared), *blocks(w - shared))


def _padded(width: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (width - 1).bit_length()) if width else 0


class Fp8Decode:
    """The kernel for one shape, with its buffers.

    Args:
        shape: the shape to serve, with ``fp8_shared``.
        scale: softmax scale.
        max_batch: most requests of a step.
        device: a GPU.
        tiling: a tiling other than ``tiling_for(shape)``, for measuring.

    Raises:
        AttentionInputError: a shape that the kernel does not serve.
    """

    def __init__(
        self, shape: DecodeShape, scale: float, max_batch: int, device: torch.device, tiling: Tiling | None = None
    ) -> None:
        self.shape, self.scale, self.max_batch = shape, scale, max_batch
        self.device = torch.device(device)
        self.tiling = tiling or tiling_for(shape)
        if self.device.type == "cuda":
            from sglang_tpla.attention.backends import require

            require("fp8_triton", shape, torch.cuda.get_device_capability(device))
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        else:  # Triton's interpreter
            processors = 4
        self._rows = shape.heads * shape.query_len
        self._row_blocks = -(-self._rows // self.tiling.rows)
        self._target = processors * self.tiling.programs
        most = max(batch * self._splits(batch) for batch in range(1, max_batch + 1))
        self._partial_out = torch.empty(most * self._rows * shape.latent_dim, dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(most * self._rows, dtype=torch.float32, device=device)
        self._table: PageTable | None = None
        self._lengths: torch.Tensor | None = None

    def _splits(self, batch: int) -> int:
        """Return the most stretches of a request: four times an even share, for requests longer than the others."""
        return max(1, min(MAX_SPLITS, 4 * self._target // (batch * self._row_blocks)))

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Remember the step's table and lengths, once `checked_plan` has passed them."""
        checked_plan(table, lengths, self.max_batch)
        self._table, self._lengths = table, lengths

    def run(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over the planned step; see ``interface.py``.

        Raises:
            AttentionInputError: inputs that do not fit the shape, or rows that are not contiguous.
        """
        import triton

        from sglang_tpla.attention.fp8 import decode_triton as kernels

        table, lengths, shape, tiling = self._table, self._lengths, self.shape, self.tiling
        if table is None or lengths is None:
            raise RuntimeError("Fp8Decode.run came before plan: plan the step first")
        cache = checked_inputs(shape, table, q_latent, q_rope, kv_cache)
        if not cache.is_contiguous() or cache.data_ptr() % fp8_rows.ALIGNMENT:
            raise AttentionInputError(
                f"an FP8 cache must be contiguous and start at a 16-byte border; got strides {cache.stride()}"
            )
        for name, tensor in (("q_latent", q_latent), ("q_rope", q_rope)):
            if tensor.stride(-1) != 1:
                raise AttentionInputError(f"{name} must have contiguous rows; got strides {tensor.stride()}")
        if out is None:
            out = torch.empty(q_latent.shape, dtype=shape.dtype, device=q_latent.device)
        batch = table.batch
        if batch == 0:
            return out
        assert shape.fp8_shared is not None
        w, splits = shape.latent_dim, self._splits(batch)
        s0, s1, o0, o1 = column_blocks(shape.fp8_shared, w)
        kernels.fp8_decode_kernel[(self._row_blocks, splits, batch)](
            q_latent,
            q_rope,
            cache,
            cache.view(torch.bfloat16),
            cache.view(torch.float32),
            table.indices,
            table.starts,
            lengths,
            self._partial_out,
            self._partial_lse,
            *q_latent.stride()[:2],
            *q_rope.stride()[:2],
            batch,
            splits,
            self._target,
            self.scale * 1.4426950408889634,  # log2(e): the kernels work in base 2
            HEADS=shape.heads,
            QUERY_LEN=shape.query_len,
            ROPE=shape.rope_dim,
            PAGE=shape.page_size,
            ROW_BYTES=shape.cache_dim,
            S0=s0,
            S1=s1,
            O0=o0,
            O1=o1,
            S0_BLOCK=_padded(s0),
            S1_BLOCK=_padded(s1),
            O0_BLOCK=_padded(o0),
            O1_BLOCK=_padded(o1),
            ROPE_BLOCK=_padded(shape.rope_dim),
            ROWS=tiling.rows,
            BLOCK_N=tiling.tokens,
            COMPUTE=getattr(triton.language, tiling.compute) if cache.is_cuda else triton.language.float32,
            KEYS=triton.language.bfloat16 if cache.is_cuda else triton.language.float32,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        kernels.fp8_merge_kernel[(self._rows, batch)](
            self._partial_out,
            self._partial_lse,
            lengths,
            out,
            *out.stride()[:2],
            batch,
            self._row_blocks,
            splits,
            self._target,
            HEADS=shape.heads,
            QUERY_LEN=shape.query_len,
            W=w,
            W_BLOCK=triton.next_power_of_2(w),
            BLOCK_N=tiling.tokens,
            num_warps=4,
        )
        return out
