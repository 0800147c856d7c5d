"""GPUs and links: the speed of each kind of kernel, and the cost of a collective.

A kernel takes ``overhead + max(bytes / bandwidth, operations / arithmetic rate)``. ``benchmarks/fit_plan.py`` fits the
H100's constants to the kernels of a first run of ``benchmarks/decode_layer.py``. Tests compare the planner's answers
with a later run on another card, ``benchmarks/results/h100/decode_layer_2026-11-25.json``, which also gave the rates of
the products of FlashInfer and of slices of width 256. Other GPUs are the H100 scaled by the ratio of their data sheets'
bandwidth and bf16 rate. Attention on sketched rows, the products of slices of width 256 and SGLang's FP8 cache under
Triton were measured on an H200 instead. Tests compare the H200 with ``decode_kernel_apart_2026-11-25.json`` and with
the steps of ``headline_*.json`` in ``benchmarks/results/h200``. Links are assumptions. Every answer says which figure
comes from where.

The rates of products hold for random data. The steps of ``headline_*.json`` had a cache of zeros, with which a GPU
draws less power and may clock higher. This is probably why the planner's time of steps that products bound is up to
1.16 times the measured time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

from sglang_tpla.plan.model import PlanError

Entry = TypeVar("Entry")
# A larger number of bytes, rate or time, or a smaller rate, is a typing mistake, and would end as NaN.
LARGEST, SMALLEST = 1e30, 1e-30


@dataclass(frozen=True)
class Rate:
    """Cost of one kind of kernel.

    Args:
        one_request: (bytes, seconds) of single requests, ascending, for attention that spreads a request badly.
    """

    overhead_s: float
    bytes_per_s: float
    flops_per_s: float
    one_request: tuple[tuple[float, float], ...] = ()

    def seconds(self, moved_bytes: float, flops: float, one_request_bytes: float = 0.0) -> float:
        """Return the time of one launch; ``one_request_bytes`` are those of attention's longest request."""
        together = self.overhead_s + max(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)
        return max(together, self.alone_s(one_request_bytes))

    def alone_s(self, size_bytes: float) -> float:
        """Return the time of one request alone: straight lines join the points, and the last line goes on."""
        points = self.one_request
        if not points or size_bytes <= points[0][0]:
            return points[0][1] if points and size_bytes else 0.0
        after = next((i for i, (size, _) in enumerate(points) if size >= size_bytes), len(points) - 1)
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (size_bytes - x0) * (y1 - y0) / (x1 - x0)


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        memory_bytes: the device's memory. capability: CUDA compute capability, which decides the kernels.
        multiprocessors: their number; FlashInfer deals out requests over them.
        sheet_bytes_per_s, sheet_flops_per_s: from the data sheet, dense bf16.
        rates: by kind of kernel, see `cost`.
        measured, from_data_sheets, assumed: sources of the rates, for people.
    """

    name: str
    memory_bytes: float
    capability: tuple[int, int]
    multiprocessors: int
    sheet_bytes_per_s: float
    sheet_flops_per_s: float
    rates: Mapping[str, Rate]
    measured: tuple[str, ...] = ()
    from_data_sheets: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def with_numbers(self, **numbers: float | None) -> Gpu:
        """Return this GPU with other numbers, where they are not None; rates scale with bandwidth and arithmetic."""
        names = {"memory_bytes": "memory", "sheet_bytes_per_s": "bandwidth", "sheet_flops_per_s": "arithmetic rate"}
        changes: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
        for key, value in changes.items():
            if not SMALLEST < value < LARGEST:
                raise PlanError(
                    f"a GPU's {names[key]} must be positive and below {LARGEST:.0e} (and above {SMALLEST:.0e}), got "
                    f"{value}"
                )
        if changes.keys() <= {"memory_bytes"}:
            return replace(self, **changes)
        return _scaled(self, "the table's rates, scaled to the numbers given on the command line", **changes)


def _scaled(base: Gpu, source: str, **changes: Any) -> Gpu:
    """Return ``base`` with other numbers, and with rates that follow those of the data sheets."""
    gpu = replace(base, **changes, measured=(), from_data_sheets=(source,), assumed=())
    wider = gpu.sheet_bytes_per_s / base.sheet_bytes_per_s
    faster = gpu.sheet_flops_per_s / base.sheet_flops_per_s
    rates = {
        kind: replace(
            rate,
            bytes_per_s=rate.bytes_per_s * wider,
            flops_per_s=rate.flops_per_s * faster,
            one_request=tuple((size * wider, seconds) for size, seconds in rate.one_request),
        )
        for kind, rate in base.rates.items()
    }
    return replace(gpu, rates=MappingProxyType(rates))


@dataclass(frozen=True)
class Link:
    """A link between the ranks.

    Args:
        latency_s: time of one small collective among all ranks, under a CUDA graph.
        bytes_per_s: rate at which one rank sends and, at the same time, receives.
    """

    name: str
    latency_s: float
    bytes_per_s: float
    source: str = "assumed; not measured here"

    def __post_init__(self) -> None:
        if not (0 <= self.latency_s < LARGEST and SMALLEST < self.bytes_per_s < LARGEST):
            raise PlanError(
                f"link {self.name}: expected a latency of at least 0 and a positive bandwidth, below {LARGEST:.0e} "
                f"(and above {SMALLEST:.0e}), got {self.latency_s} s and {self.bytes_per_s} bytes/s"
            )

    def seconds(self, kind: str, size_bytes: float, ranks: int) -> float:
        """Return the time of a collective.

        Args:
            kind: all_reduce, all_gather, reduce_scatter or all_to_all.
            size_bytes: the whole vector (of all ranks for all_gather, of one rank otherwise).
        """
        if ranks == 1:
            return 0.0
        passes = 2 if kind == "all_reduce" else 1
        return self.latency_s + passes * size_bytes * (ranks - 1) / ranks / self.bytes_per_s


# The bandwidth of a multiprocessor over its even share of the memory's, where few multiprocessors still read; from
# plain TP's steps of 48 and 56 requests of 32,768 tokens on an H200.
LONE_SHARE = 1.3
_RUN = "benchmarks/results/h100/decode_layer_2026-11-25.json"
H100 = Gpu(
    name="h100",
    memory_bytes=80e9,
    capability=(9, 0),
    multiprocessors=132,
    sheet_bytes_per_s=3.35e12,
    sheet_flops_per_s=989e12,
    rates=MappingProxyType(
        {
            "flashinfer_fa3": Rate(
                15.9e-6,
                2.8e12,
                532e12,
                (
                    (0.295e6, 12.4e-6),
                    (1.18e6, 13.7e-6),
                    (2.36e6, 16.4e-6),
                    (9.44e6, 23.8e-6),
                    (37.7e6, 53.4e-6),
                    (75.5e6, 63.5e-6),
                    (151e6, 96.5e-6),
                ),
            ),
            "hopper": Rate(12.4e-6, 2.83e12, 529e12),
            "hopper_256": Rate(12.4e-6, 2.83e12, 646e12),
            "hopper_wide": Rate(14.1e-6, 2.83e12, 381e12),
            "hopper_sketched": Rate(15e-6, 2.61e12, 496e12),
            "triton_fp8": Rate(40e-6, 0.326e12, 989e12),
            "flashinfer_fa2": Rate(12.0e-6, 1.3e12, 250e12),
            "gemm_bf16": Rate(3.0e-6, 2.69e12, 989e12),
            "gemm_fp8": Rate(5.8e-6, 2.4e12, 1440e12),
            "down_bf16": Rate(0.8e-6, 1.95e12, 222e12),
            "down_fp8": Rate(16.6e-6, 15e12, 309e12),
            "bmm": Rate(3.0e-6, 3.46e12, 369e12),
            "small": Rate(2.0e-6, 16.5e12, 2.9e12),
        }
    ),
    measured=(
        "matrix products in bf16 and block FP8 (cuBLASLt), attention at 512 + 64 (FlashInfer fa3) and on slices (our "
        f"Hopper kernel), small kernels: one H100 80GB HBM3, 1 to 128 requests of 2,048 to 131,072 tokens "
        f"(fitted to one run, checked against another: {_RUN}; from the latter are products of fa3 and of width 256)",
    ),
    assumed=(
        "FlashInfer fa2 (older and newer GPUs): two thirds of fa3's bandwidth, as once seen on an H200",
        "attention on sketched rows, and SGLang's own FP8 cache under its Triton kernel: rates on an H200, scaled by "
        "the data sheets' bandwidth",
    ),
)
_SHEET = "the H100's rates, measured and assumed, scaled by the data sheets' bandwidth and bf16 rate"
_SCALED_H200 = _scaled(H100, _SHEET, name="h200", memory_bytes=141e9, sheet_bytes_per_s=4.8e12)
H200 = replace(
    _SCALED_H200,
    rates=MappingProxyType(
        {**_SCALED_H200.rates, "hopper_256": replace(_SCALED_H200.rates["hopper_256"], flops_per_s=739e12)}
    ),
    measured=(
        "attention at 512 + 64 and on slices, 131,072 and 524,288 cached tokens, one H200: agrees with the scaled "
        "rates (benchmarks/results/h200/decode_kernel_apart_2026-11-25.json); slices of width 256 with 128 heads "
        "(benchmarks/results/h200/decode_kernel_2026-11-29.json)",
        "attention on sketched rows, 16 to 128 heads (benchmarks/results/h200/sketched_kernel_2026-12-01.json), and "
        "what a call of it costs at least in a step (benchmarks/results/h200/headline_alone_2026-12-01.json)",
        "how unevenly FlashInfer splits requests, and SGLang's own FP8 cache under its Triton kernel (no other), 16 "
        "heads, within 31% (benchmarks/results/h200/headline_alone_2026-11-30.json)",
    ),
)
_OTHERS = (  # name, memory, capability, multiprocessors, bandwidth, bf16 rate
    ("h20", 96e9, (9, 0), 78, 4.0e12, 148e12),
    ("a100", 80e9, (8, 0), 108, 2.04e12, 312e12),
    ("b200", 180e9, (10, 0), 148, 8.0e12, 2250e12),
)
_NUMBERS = ("name", "memory_bytes", "capability", "multiprocessors", "sheet_bytes_per_s", "sheet_flops_per_s")
GPUS = {"h100": H100, "h200": H200} | {
    row[0]: _scaled(H100, _SHEET, **dict(zip(_NUMBERS, row, strict=True))) for row in _OTHERS
}
LINKS = {
    link.name: link
    for link in (Link("nvlink", 10e-6, 360e9), Link("pcie", 30e-6, 40e9), Link("ethernet-400", 40e-6, 45e9))
}


def find(flag: str, table: Mapping[str, Entry], name: str, numbers: str) -> Entry:
    """Return a GPU or a link by name.

    Args:
        flag: the flag that names it. numbers: the flags that describe another one.

    Raises:
        PlanError: the table has none of that name.
    """
    if name.lower() not in table:
        raise PlanError(
            f"{flag} must be one of {', '.join(table)}, got {name!r}; for another one name the most similar and give "
            f"{numbers}"
        )
    return table[name.lower()]
