"""Seconds of a rank's work on a GPU and a link: all modelled; `hardware` says which constants were measured."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_tpla.plan.cost import RankWork
from sglang_tpla.plan.hardware import Gpu, Link


@dataclass(frozen=True)
class Price:
    """One layer of one decode step.

    Args:
        kernels_s: by kernel, in the order they run. collectives_s: all collectives together.
    """

    kernels_s: dict[str, float]
    collectives_s: float

    @property
    def layer_s(self) -> float:
        """All of it."""
        return sum(self.kernels_s.values()) + self.collectives_s


def price(work: RankWork, gpu: Gpu, link: Link) -> Price:
    """Kernels run one after another, then the collectives: nothing overlaps."""
    kernels: dict[str, float] = {}
    for piece in work.pieces:
        rate = gpu.rates[piece.rate]
        moved, flops = piece.moved_bytes / piece.launches, piece.flops / piece.launches
        once = rate.seconds(moved, flops, piece.one_request_bytes)
        kernels[piece.name] = kernels.get(piece.name, 0.0) + piece.launches * once
    joins = sum(link.seconds(join.kind, join.size_bytes, join.ranks) for join in work.collectives)
    return Price(kernels, joins)
