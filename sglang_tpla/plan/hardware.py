"""GPUs and links: how fast one kind of kernel runs, and what a collective costs.

A kernel takes ``overhead + max(bytes / bandwidth, operations / arithmetic rate)``. The H200's constants come from
measurements kept in ``benchmarks/results/h200``; other GPUs are the H200 scaled by the ratio of their data sheets'
bandwidth and bf16 rate, and links are assumptions. Every answer says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sglang_tpla.plan.model import PlanError


@dataclass(frozen=True)
class Rate:
    """Cost of one kind of kernel."""

    overhead_s: float
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, moved_bytes: float, flops: float) -> float:
        """Time of one launch."""
        return self.overhead_s + max(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        memory_bytes: what the device has. capability: CUDA compute capability; decides which kernels serve it.
        sheet_bytes_per_s, sheet_flops_per_s: data sheet, dense bf16.
        rates: by kind of kernel, see `work`.
        source: where the rates come from, for people.
    """

    name: str
    memory_bytes: float
    capability: tuple[int, int]
    sheet_bytes_per_s: float
    sheet_flops_per_s: float
    rates: Mapping[str, Rate]
    source: str

    def with_numbers(
        self,
        memory_bytes: float | None = None,
        sheet_bytes_per_s: float | None = None,
        sheet_flops_per_s: float | None = None,
    ) -> Gpu:
        """This GPU with other numbers; rates scale with bandwidth and arithmetic."""
        for name, value in (
            ("memory", memory_bytes),
            ("bandwidth", sheet_bytes_per_s),
            ("arithmetic rate", sheet_flops_per_s),
        ):
            if value is not None and not value > 0:
                raise PlanError(f"a GPU's {name} must be positive, got {value}")
        changed = replace(self, memory_bytes=memory_bytes or self.memory_bytes)
        if sheet_bytes_per_s is None and sheet_flops_per_s is None:
            return changed
        return _scaled(
            changed,
            self.name,
            changed.memory_bytes,
            self.capability,
            sheet_bytes_per_s or self.sheet_bytes_per_s,
            sheet_flops_per_s or self.sheet_flops_per_s,
            f"{self.source}, scaled to the numbers given",
        )


def _scaled(
    base: Gpu,
    name: str,
    memory_bytes: float,
    capability: tuple[int, int],
    bandwidth: float,
    flops: float,
    source: str,
) -> Gpu:
    wider, faster = bandwidth / base.sheet_bytes_per_s, flops / base.sheet_flops_per_s
    rates = {
        kind: Rate(rate.overhead_s, rate.bytes_per_s * wider, rate.flops_per_s * faster)
        for kind, rate in base.rates.items()
    }
    return Gpu(name, memory_bytes, capability, bandwidth, flops, MappingProxyType(rates), source)


@dataclass(frozen=True)
class Link:
    """What joins the ranks.

    Args:
        latency_s: one small collective among all ranks, under a CUDA graph.
        bytes_per_s: what one rank sends, and receives, at the same time.
    """

    name: str
    latency_s: float
    bytes_per_s: float
    source: str = field(default="assumed; not measured here")

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise PlanError(
                f"link {self.name}: expected a latency of at least 0 and a positive bandwidth, got "
                f"{self.latency_s} s and {self.bytes_per_s} bytes/s"
            )

    def seconds(self, kind: str, size_bytes: float, ranks: int) -> float:
        """Time of a collective.

        Args:
            kind: all_reduce, all_gather, reduce_scatter or all_to_all.
            size_bytes: the whole vector (of all ranks for all_gather, of one rank otherwise).
        """
        if ranks == 1:
            return 0.0
        passes = 2 if kind == "all_reduce" else 1
        return self.latency_s + passes * size_bytes * (ranks - 1) / ranks / self.bytes_per_s


MEASURED_ON = "one NVIDIA H200 (driver 580.159.04, CUDA 13.0, torch 2.11.0, FlashInfer 0.6.15.post1)"
H200 = Gpu(
    name="h200",
    memory_bytes=141e9,
    capability=(9, 0),
    sheet_bytes_per_s=4.8e12,
    sheet_flops_per_s=989e12,
    rates=MappingProxyType(
        {
            "gemm_bf16": Rate(3.0e-6, 3.6e12, 700e12),
            "gemm_fp8": Rate(5.0e-6, 3.4e12, 1200e12),
            "bmm": Rate(3.0e-6, 3.0e12, 500e12),
            "flashinfer_fa3": Rate(12.0e-6, 3.9e12, 550e12),
            "flashinfer_fa2": Rate(12.0e-6, 1.9e12, 250e12),
            "hopper": Rate(9.0e-6, 4.0e12, 550e12),
            "small": Rate(2.0e-6, 3.0e12, 50e12),
        }
    ),
    source=f"measured on {MEASURED_ON}",
)
_SHEET = "the H200's measured rates, scaled by the data sheets; not measured"
GPUS = {
    gpu.name: gpu
    for gpu in (
        H200,
        _scaled(H200, "h100", 80e9, (9, 0), 3.35e12, 989e12, _SHEET),
        _scaled(H200, "h20", 96e9, (9, 0), 4.0e12, 148e12, _SHEET),
        _scaled(H200, "a100", 80e9, (8, 0), 2.04e12, 312e12, _SHEET),
        _scaled(H200, "b200", 180e9, (10, 0), 8.0e12, 2250e12, _SHEET),
    )
}
LINKS = {
    link.name: link
    for link in (
        Link("nvlink", 10e-6, 360e9),
        Link("pcie", 30e-6, 40e9),
        Link("ethernet-400", 40e-6, 45e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        PlanError: not in the table.
    """
    if name.lower() not in GPUS:
        raise PlanError(
            f"--gpu must be one of {', '.join(GPUS)}, got {name!r}; for another one name the most similar and "
            "give --gpu-memory-gb, --gpu-bandwidth-gb-s and --gpu-tflops"
        )
    return GPUS[name.lower()]


def find_link(name: str) -> Link:
    """A link by name.

    Raises:
        PlanError: not in the table.
    """
    if name.lower() not in LINKS:
        raise PlanError(
            f"--link must be one of {', '.join(LINKS)}, got {name!r}; for another one name the most similar and "
            "give --link-latency-us and --link-gb-s"
        )
    return LINKS[name.lower()]
