"""Price every method at one load, and recommend one.

A method that changes the model's answers is recommended only where it pays. Plain MLA with an 8-bit cache only rounds:
it must beat the best exact method by a margin, unless nothing exact fits. TPLA on several groups also replicates head
weights: it must beat the better of those two by the margin. Slices in plain rows see only part of the latent:
they must beat all of these by the margin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tpla.attention.backends import BackendRefusal
from sglang_tpla.config import ConfigError
from sglang_tpla.plan.cost import (
    Load,
    Method,
    Precision,
    Price,
    break_even_tokens,
    price,
    rank_work,
    tokens_that_fit,
    weight_bytes,
)
from sglang_tpla.plan.hardware import Gpu, Link
from sglang_tpla.plan.model import PlanModel


@dataclass(frozen=True)
class Setting:
    """The model, the machine and the methods, which stay the same for every load.

    Args:
        gpus: number of GPUs that hold the weights other than attention.
        memory_fraction: share of the device for weights and cache together.
        margin: share of its time by which TPLA must beat the best exact method.
    """

    model: PlanModel
    gpu: Gpu
    link: Link
    precision: Precision
    methods: Sequence[Method]
    gpus: int
    memory_fraction: float = 0.88
    margin: float = 0.05


@dataclass(frozen=True)
class Row:
    """One method at one load; ``refused`` is the reason where the method is impossible."""

    method: Method
    refused: str | None = None
    price: Price | None = None
    width: int = 0
    heads: int = 0
    cache_bytes_per_token_and_rank: float = math.nan
    weight_bytes_per_rank: float = math.nan
    tokens_that_fit: int = 0
    fits: bool = False
    break_even_tokens: float = math.nan

    @property
    def layer_s(self) -> float:
        """The time of a layer; infinite where the method is refused or the load does not fit."""
        return self.price.layer_s if self.price and self.fits else math.inf

    @property
    def order(self) -> tuple[float, int, float]:
        """The order of preference, least first: time, then closeness to the model's answers, then bytes."""
        return self.layer_s, self.method.closeness, self.cache_bytes_per_token_and_rank


@dataclass(frozen=True)
class Answer:
    """All methods at one load, the fastest and the recommended one (None where nothing fits), and the reasons."""

    load: Load
    rows: tuple[Row, ...]
    fastest: Method | None
    recommended: Method | None
    reasons: tuple[str, ...]


def row(setting: Setting, method: Method, load: Load) -> Row:
    model, precision = setting.model, setting.precision
    try:
        work = rank_work(model, method, load, precision, setting.gpu.capability)
    except (ConfigError, BackendRefusal) as error:
        return Row(method, refused=str(error))
    if method.kind == "dcp" and load.verified > 1:
        refused = "SGLang verifies guesses beside DCP on few attention backends, none of them Hopper's"
    else:
        refused = None
    weights = weight_bytes(model, work, precision, setting.gpus)
    tokens = tokens_that_fit(model, method, work, weights, setting.gpu, setting.memory_fraction)
    sliced = method.kind == "tpla" and method.groups > 1
    even = break_even_tokens(model, method, precision, work.rows.row_bytes) if sliced else math.nan
    return Row(
        method=method,
        refused=refused,
        price=price(work, setting.gpu, setting.link),
        width=work.rows.width,
        heads=work.heads,
        cache_bytes_per_token_and_rank=work.rows.row_bytes * model.layers / method.cache_ranks,
        weight_bytes_per_rank=weights,
        tokens_that_fit=tokens,
        # the busiest rank's tokens: DP attention keeps a request whole on one rank
        fits=refused is None and work.batch * work.context_tokens <= tokens // method.cache_ranks,
        break_even_tokens=even,
    )


def answer(setting: Setting, load: Load) -> Answer:
    rows = tuple(row(setting, method, load) for method in setting.methods)
    best = min(rows, key=lambda r: r.order)
    if not best.fits:
        return Answer(load, rows, None, None, (_nothing(setting, rows, load),))
    tiers = [[r for r in rows if r.method.closeness == tier] for tier in range(4)]
    fastest = [min(tier, key=lambda r: r.order) for tier in tiers if tier]
    base = chosen = fastest[0]
    for found in fastest[1:]:
        if found.layer_s < chosen.layer_s * (1 - setting.margin):
            base, chosen = chosen, found
    # The rival is the method that the chosen one displaced, or the fastest of the others.
    others = [r for r in fastest if r is not chosen]
    rival = base if base is not chosen else min(others, key=lambda r: r.order, default=None)
    return Answer(load, rows, best.method, chosen.method, reasons(setting, load, rows, chosen, rival))


def _nothing(setting: Setting, rows: Sequence[Row], load: Load) -> str:
    able = [r for r in rows if r.refused is None]
    if not able:
        return "nothing fits: every method is impossible here, for the reason beside it"
    most = max(able, key=lambda r: r.tokens_that_fit)
    if not most.tokens_that_fit:
        least = min(r.weight_bytes_per_rank for r in able)
        return (
            f"nothing fits: the weights alone take {least / 1e9:.0f} GB a rank, and --memory-fraction "
            f"{setting.memory_fraction:g} leaves {setting.memory_fraction * setting.gpu.memory_bytes / 1e9:.0f} of "
            f"{setting.gpu.name}'s {setting.gpu.memory_bytes / 1e9:.0f} GB; use FP8 weights or spread them over more "
            "GPUs (--gpus)"
        )
    said = (
        f"nothing fits: the load has {load.tokens:,} cached tokens, and the most that fit are "
        f"{most.tokens_that_fit:,} ({most.method.label})"
    )
    if most.method.kind != "dp":
        return said
    return (
        f"{said}, {most.tokens_that_fit // most.method.ranks:,} a rank, where the busiest would have "
        f"{math.ceil(load.batch / most.method.ranks)} whole requests of {load.context_tokens:,}"
    )


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def reasons(setting: Setting, load: Load, rows: Sequence[Row], chosen: Row, rival: Row | None) -> tuple[str, ...]:
    """Return the reasons in plain words: the chosen method's strength, and the other methods' losses.

    Args:
        rival: the method that the chosen one displaced; for an exact one, the fastest that is not exact. None if there
            is no other method.
    """
    said: list[str] = []
    plain = next((r for r in rows if r.method.kind == "tp" and r.price), None)
    assert chosen.price is not None
    if plain and plain.price and not plain.fits:
        said.append(
            f"plain TP does not fit: {plain.tokens_that_fit:,} tokens at most, because every rank keeps the whole "
            "latent"
        )
    if chosen.method.kind == "tp":
        said.append(
            f"plain TP is exact and reads the cache in {_us(chosen.price.kernels_s['attention'])} a layer, which "
            "is too little for the others' weights or collectives to pay back"
        )
    elif chosen.method.kind == "dcp":
        said.append(
            f"DCP is exact and reads 1/{chosen.method.ranks} of the tokens a rank; its collectives take "
            f"{_us(chosen.price.collectives_s)} a layer on {setting.link.name}. It goes neither with speculative "
            "decoding, pipeline stages nor every attention backend: if it is not open to you, give --without dcp"
        )
    elif chosen.method.kind == "dp":
        said.append(
            f"DP attention is exact and each rank reads only its own requests' cache, for "
            f"{chosen.weight_bytes_per_rank / 1e9:.0f} GB of weights a rank; it does not make one request faster, "
            "and needs requests of even length"
        )
    else:
        said.append(_why_ours(chosen, rival))
    ours = [r for r in rows if r.method.kind == "tpla" and r.method.groups > 1 and r.fits and r.price]
    sliced = min(ours, key=lambda r: r.order, default=None)
    if sliced is not None and sliced is not chosen and chosen.method.groups == 1:
        said.append(_why_not_sliced(sliced, chosen, setting))
    if load.verified > 1:
        said.append(
            f"every method verifies {load.verified} tokens a request in a step and keeps {load.accepted:g} of them: a "
            "step reads the cache once for all of them, so the weights and collectives that a method adds weigh more, "
            "and what it saves of the cache less"
        )
    return tuple(said)


def _why_ours(chosen: Row, rival: Row | None) -> str:
    what = (
        f"{chosen.method.label} (width {chosen.width}) reads {chosen.cache_bytes_per_token_and_rank:,.0f} bytes a "
        f"token and rank"
    )
    if rival is None or not rival.fits:
        return f"{what}, and nothing exact fits; {chosen.method.error}"
    gain = rival.layer_s / chosen.layer_s
    kind = "the best exact method, " if rival.method.exact else ""
    return (
        f"{what} and takes {_us(chosen.layer_s)} a layer where {kind}{rival.method.label}, takes "
        f"{_us(rival.layer_s)} ({gain:.2f} times); {chosen.method.error}"
    )


def _why_not_sliced(sliced: Row, chosen: Row, setting: Setting) -> str:
    text = f"{sliced.method.label}, the fastest TPLA, takes {_us(sliced.layer_s)} against {_us(chosen.layer_s)}"
    if sliced.layer_s < chosen.layer_s:
        return f"{text}: less than the {setting.margin:.0%} that it should gain (--margin)"
    if math.isfinite(sliced.break_even_tokens) and chosen.method.kind == "tp":
        text += f"; by bytes alone it pays against plain TP from {sliced.break_even_tokens:,.0f} cached tokens on"
    return text


def overall(answers: Sequence[Answer]) -> Method | None:
    """Return the method that is, on average over several loads, least behind each load's recommended one.

    That method fits as many of the loads as any recommended method does. The order of a row decides between equals.
    """
    able = [a for a in answers if a.recommended is not None]
    candidates = {a.recommended for a in able}
    times = [{r.method: r.layer_s for r in a.rows} for a in able]

    def order(row: Row) -> tuple[float, ...]:
        behind = [at[row.method] / at[a.recommended] for a, at in zip(able, times, strict=True) if a.recommended]
        return behind.count(math.inf), sum(ratio for ratio in behind if math.isfinite(ratio)), *row.order[1:]

    rows = [row for row in able[0].rows if row.method in candidates] if able else []
    return min(rows, key=order).method if rows else None
