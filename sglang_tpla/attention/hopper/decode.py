"""Our paged latent decode kernel for Hopper (``cuda/``) behind the attention interface.

The kernel serves every w that is a multiple of 32 from 64 to 512, with a rope part of 64, 8 to 128 heads, query lengths
1 to 4 and pages of 1 or 64 tokens, in bfloat16 (`backends` has the table). Two other kernels read sketched rows
(`sketched`, `sketched_tiles`). ``plan`` and ``run`` launch fixed grids on fixed buffers and never wait for the device,
so a CUDA graph of them stays right when lengths, page table and queries are refilled in place.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from sglang_tpla.attention.hopper import sketched, sketched_tiles, wgmma
from sglang_tpla.attention.hopper.compile import KernelModule, cached_cubin, joined
from sglang_tpla.attention.hopper.plan import MAX_PARTS, SEGMENT_COST, TILE_TOKENS
from sglang_tpla.attention.hopper.sketched import SketchedVariant
from sglang_tpla.attention.hopper.sketched_tiles import TiledVariant
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable, checked_inputs

# The files are compiled as one text, in this order.
SOURCES = (
    "shapes.cuh",  # constants of a variant, parameters
    "hopper.cuh",  # barriers, asynchronous copies, wgmma
    "parts.cuh",  # a block's part of the plan
    "gather.cuh",  # the producer, which gathers cache rows
    "attend.cuh",  # scores, softmax, values, partial results
    "turns.cuh",  # the consumers' loop over tiles for more than 64 rows
    "merge_shared.cuh",  # the request that a block helps to merge
    "merge.cuh",  # adding up partial results
    "latent_decode.cu",  # the consumers' loop and the kernel
    "latent_plan.cu",  # the planning kernel
)
# Barriers take the first 1,024 bytes of a block's 227 KiB.
SHARED_LIMIT_BYTES = 226 * 1024
MAX_STAGES = 8
MODES = {"tokens": 0, "rows": 1, "width": 2}


@dataclass(frozen=True)
class Variant:
    """One compiled form of the kernel; see the head of the CUDA source for the modes.

    Args:
        latent_dim: w. rope_dim: rotary values. mode: how two warpgroups divide the work.
        stages: tiles in the ring.
    """

    latent_dim: int
    rope_dim: int
    mode: str
    stages: int

    @property
    def rows(self) -> int:
        return 128 if self.mode == "rows" else 64

    @property
    def out_columns(self) -> int:
        """The number of value columns that a warpgroup accumulates."""
        panels = -(-self.latent_dim // 64)
        return 64 * (-(-panels // 2) if self.mode == "width" else panels)

    @property
    def shared_bytes(self) -> int:
        """The bytes of dynamic shared memory: query, ring of tiles, slots of two chunks of 4 or 8 tiles."""
        panels = -(-(self.latent_dim + self.rope_dim) // 64)
        query_panels = -(-self.latent_dim // 64) if self.mode == "rows" else panels
        ring = panels * 128 * self.stages * TILE_TOKENS
        return query_panels * 128 * self.rows + ring + (2048 if self.mode == "rows" else 4096)

    @property
    def defines(self) -> dict[str, int]:
        return {
            "LATENT": self.latent_dim,
            "ROPE": self.rope_dim,
            "MODE": MODES[self.mode],
            "STAGES": self.stages,
            "OUT_COLUMNS": self.out_columns,
            "MAX_PARTS": MAX_PARTS,
            "SEGMENT_COST": SEGMENT_COST,
            "PLAN_BATCH": 2048,
        }

    name = "latent_decode"
    threads = 384

    def source(self) -> str:
        return wgmma.PRELUDE + wgmma.scores_source() + wgmma.values_source(self.out_columns) + joined(SOURCES)


AnyVariant = Variant | SketchedVariant | TiledVariant


def variant_for(shape: DecodeShape) -> AnyVariant:
    """Return the form of the kernel that serves ``shape`` best, with as many stages as shared memory holds."""
    if shape.sketched is not None:
        return sketched_tiles.variant_for(shape) or sketched.variant_for(shape)
    rows = shape.heads * shape.query_len
    mode = "width" if shape.latent_dim > 256 else "tokens" if rows <= 64 else "rows"
    variants = (Variant(shape.latent_dim, shape.rope_dim, mode, stages) for stages in range(MAX_STAGES, 0, -1))
    return next(variant for variant in variants if variant.shared_bytes <= SHARED_LIMIT_BYTES)


class _Params(ctypes.Structure):
    """The CUDA source's ``struct Params``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_latent", "q_rope", "kv", "out", "partial_out", "partial_sums")),
        *((name, ctypes.c_void_p) for name in ("lengths", "page_indices", "page_starts")),
        *((name, ctypes.c_void_p) for name in ("part_begin", "split_start", "arrived")),
        *(
            (f"{name}_{of}_stride", ctypes.c_longlong)
            for name in ("q_latent", "q_rope", "out")
            for of in ("token", "head")
        ),
        ("kv_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("heads", "query_len", "page_bits", "batch")),
        ("scale_log2", ctypes.c_float),
    )


@functools.cache
def _loaded(variant: AnyVariant, device_index: int) -> tuple[KernelModule, dict[str, object]]:
    with torch.cuda.device(device_index):
        torch.cuda.current_stream()  # PyTorch's context must be current before the driver loads into it
        module = KernelModule(cached_cubin(variant.source(), variant.defines, variant.name + ".cu"))
        kernels = {"decode": module.kernel(variant.name, variant.shared_bytes), "plan": module.kernel("latent_plan")}
    return module, kernels


class HopperDecode:
    """The kernel for one shape, with its plan and workspace buffers.

    Args:
        shape: the shape to serve.
        scale: softmax scale.
        max_batch: the largest number of requests in a step.
        device: a Hopper GPU.

    Raises:
        AttentionInputError: the kernel does not serve ``shape``.
        KernelCompileError: the compiler or the driver refused the kernel.
    """

    def __init__(self, shape: DecodeShape, scale: float, max_batch: int, device: torch.device) -> None:
        from sglang_tpla.attention.backends import require

        name = "hopper" if shape.sketched is None else "hopper_sketched"
        require(name, shape, torch.cuda.get_device_capability(device))
        self.shape = shape
        self.scale = scale
        self.max_batch = max_batch
        self.device = torch.device(device)
        self.variant = variant_for(shape)
        self._module, self._kernels = _loaded(self.variant, self.device.index or 0)
        rows = shape.heads * shape.query_len
        self._row_blocks = -(-rows // self.variant.rows)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.parts = min(MAX_PARTS, max(1, processors // self._row_blocks))
        splits = max_batch + self.parts
        self._part_begin = torch.zeros(self.parts + 1, 8, dtype=torch.int32, device=device)
        self._split_start = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(self._row_blocks * max_batch, dtype=torch.int32, device=device)
        self._partial_out = torch.empty(splits * rows * shape.latent_dim, dtype=torch.float16, device=device)
        self._partial_sums = torch.empty(splits * 3 * rows, dtype=torch.float32, device=device)
        self._table: PageTable | None = None
        self._lengths: torch.Tensor | None = None
        # The first run after a plan waits for the whole plan, so that later runs may read it at once.
        self._after_plan = False

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Lay out a step on the device from lengths on the device, without reading anything back.

        Raises:
            AttentionInputError: lengths are not contiguous int32 [batch], or are more than ``max_batch``.
        """
        if lengths.dtype != torch.int32 or lengths.shape != table.starts.shape or not lengths.is_contiguous():
            raise AttentionInputError(
                f"lengths must be contiguous int32 [{table.batch}]; got {lengths.dtype} {list(lengths.shape)}"
            )
        if table.batch > self.max_batch:
            raise AttentionInputError(f"at most {self.max_batch} requests were announced; got {table.batch}")
        self._table, self._lengths = table, lengths
        self._after_plan = False
        arguments = (
            ctypes.c_void_p(lengths.data_ptr()),
            ctypes.c_void_p(table.starts.data_ptr()),
            ctypes.c_int(table.batch),
            ctypes.c_int(self.parts),
            ctypes.c_void_p(self._part_begin.data_ptr()),
            ctypes.c_void_p(self._split_start.data_ptr()),
            ctypes.c_void_p(self._arrived.data_ptr()),
            ctypes.c_int(self._arrived.numel()),
        )
        self._module.launch(self._kernels["plan"], (1, 1), 32, arguments, self._stream())

    def run(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over the planned step; see ``interface.py``.

        Raises:
            AttentionInputError: an input does not fit the shape, or its rows do not start at 16-byte boundaries.
        """
        table, lengths, shape = self._table, self._lengths, self.shape
        if table is None or lengths is None:
            raise RuntimeError("HopperDecode.run came before plan: plan the step first")
        cache = checked_inputs(shape, table, q_latent, q_rope, kv_cache)
        if out is None:
            dims = (*q_latent.shape[:-1], shape.latent_dim)
            out = torch.empty(dims, dtype=shape.dtype, device=q_latent.device)
        for name, tensor in (("q_latent", q_latent), ("q_rope", q_rope), ("kv_cache", cache), ("out", out)):
            odd = any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
            if tensor.stride(-1) != 1 or odd or tensor.data_ptr() % 16:
                raise AttentionInputError(
                    f"{name} must have contiguous rows that start at 16-byte borders; "
                    f"got strides {tensor.stride()}; pass a contiguous tensor"
                )
        params = _Params(
            *(tensor.data_ptr() for tensor in (q_latent, q_rope, cache, out, self._partial_out, self._partial_sums)),
            *(tensor.data_ptr() for tensor in (lengths, table.indices, table.starts)),
            *(tensor.data_ptr() for tensor in (self._part_begin, self._split_start, self._arrived)),
            *(*q_latent.stride()[:2], *q_rope.stride()[:2], *out.stride()[:2], cache.stride(0)),
            shape.heads,
            shape.query_len,
            table.page_size.bit_length() - 1,
            table.batch,
            self.scale * 1.4426950408889634,  # log2(e): the kernel works in base 2
        )
        grid = (self.parts, self._row_blocks)
        self._module.launch(
            self._kernels["decode"],
            grid,
            self.variant.threads,
            (params,),
            self._stream(),
            shared_bytes=self.variant.shared_bytes,
            early=self._after_plan,
        )
        self._after_plan = True
        return out

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream
