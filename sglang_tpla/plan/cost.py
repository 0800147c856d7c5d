"""What one rank does for one attention layer of one decode step: kernels by bytes and operations, and collectives.

Methods (T ranks, g latent groups; design, sections 2 and 7):

    tp    H/T heads, the whole latent on every rank
    tpla  H g/T heads, a slice of w values; ``scatter``: the groups' head outputs are summed before ``o_proj``, which
          is then not held g times
    dcp   all H heads' queries gathered, 1/T of the tokens, outputs and log-sum-exps exchanged
    dp    whole requests: every head's weights, 1/T of the batch
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

from sglang_tpla.attention.backends import BackendRefusal, choose
from sglang_tpla.attention.interface import MAX_QUERY_LEN, DecodeShape
from sglang_tpla.config import Layout, slice_width
from sglang_tpla.plan.model import PlanError, PlanModel

CACHE_DTYPES = ("bf16", "fp8")
WEIGHT_DTYPES = ("bf16", "fp8")
WIDTH_STEP = 32
# our kernel shares wider rows between its warpgroups in another way, at another rate
WIDE, WIDE_FROM = "hopper_wide", 256
_BF16_BYTES = 2


@dataclass(frozen=True)
class Load:
    """Requests that decode together, and the cached tokens each has.

    Args:
        verified: tokens of each that one step computes: more than one with speculative decoding.
        accepted: tokens that such a step adds to an answer on average, the target's own one included.
    """

    batch: int
    context_tokens: int
    verified: int = 1
    accepted: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.verified <= MAX_QUERY_LEN or not 1 <= self.accepted <= self.verified:
            raise PlanError(
                f"--verified-tokens must lie in 1...{MAX_QUERY_LEN} and --accepted-length between 1 and that, got "
                f"{self.verified} and {self.accepted:g}"
            )
        if self.batch < 1 or self.context_tokens < 1:
            raise PlanError(
                f"batch and context must be at least 1, got {self.batch} and {self.context_tokens}"
            )

    @property
    def tokens(self) -> int:
        """Cached tokens of all requests."""
        return self.batch * self.context_tokens


@dataclass(frozen=True)
class Precision:
    """Data types of the weights (bf16, or DeepSeek's block FP8) and of the cache."""

    weights: str = "bf16"
    cache: str = "bf16"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weights", self.weights, WEIGHT_DTYPES),
            ("cache", self.cache, CACHE_DTYPES),
        ):
            if value not in known:
                raise PlanError(f"--{name}-dtype must be one of {', '.join(known)}, got {value!r}")

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight; block FP8 has a float32 scale for 128 x 128 of them."""
        return 2.0 if self.weights == "bf16" else 1 + 4 / 128**2

    def cache_row_bytes(self, latent_dim: int, rope_dim: int, sliced: bool) -> int:
        """Bytes of one token in one layer. FP8 slices keep the rope in bf16 and a float32 scale."""
        if self.cache == "bf16":
            return 2 * (latent_dim + rope_dim)
        return latent_dim + 4 + 2 * rope_dim if sliced else latent_dim + rope_dim


@dataclass(frozen=True)
class Method:
    """One way to share attention over ``ranks`` GPUs.

    Args:
        kind: tp, tpla, dcp or dp. groups, shared_dims, scatter: for tpla.
    """

    kind: str
    ranks: int
    groups: int = 1
    shared_dims: int = 0
    scatter: bool = False

    @property
    def label(self) -> str:
        """For people."""
        if self.kind == "tpla":
            return f"TPLA g={self.groups}" + (", reduce-scatter" if self.scatter else "")
        return {"tp": "plain TP", "dcp": "DCP", "dp": "DP attention"}[self.kind]

    @property
    def code(self) -> str:
        """For the map: TP, DCP, DP, T2 (g = 2), T2s (with reduce-scatter)."""
        if self.kind == "tpla":
            return f"T{self.groups}" + ("s" if self.scatter else "")
        return self.kind.upper()

    @property
    def exact(self) -> bool:
        """Whether it computes plain MLA."""
        return self.kind != "tpla" or self.groups == 1

    @property
    def cache_ranks(self) -> int:
        """Ranks that a token's cache is dealt out over."""
        return self.ranks if self.kind in ("dcp", "dp") else 1


@dataclass(frozen=True)
class Piece:
    """One kernel: which rate it runs at (`hardware.Gpu.rates`), bytes, floating-point operations, launches.

    Args:
        one_request_bytes: of attention, the longest request's cache.
    """

    name: str
    rate: str
    moved_bytes: float
    flops: float
    launches: int = 1
    one_request_bytes: float = 0.0


@dataclass(frozen=True)
class Collective:
    """One collective among ``ranks`` ranks; sizes as in `hardware.Link.seconds`."""

    kind: str
    size_bytes: float
    ranks: int


@dataclass(frozen=True)
class RankWork:
    """All of it, and what it was counted from.

    Args:
        width: of the latent that the rank keeps. heads: whose weights it holds; out_heads: in ``o_proj``.
        read_heads: heads that attend (all of them under DCP). batch, context_tokens: what it attends to.
        kernel: its attention kernel.
    """

    pieces: tuple[Piece, ...]
    collectives: tuple[Collective, ...]
    width: int
    heads: int
    out_heads: int
    read_heads: int
    batch: int
    context_tokens: int
    kernel: str
    cache_row_bytes: int


def methods(ranks: int, model: PlanModel, groups: list[int] | None, shared_dims: int) -> list[Method]:
    """Every method on ``ranks`` GPUs; ``groups`` limits g, by default every divisor of the ranks from 2 on.

    Raises:
        PlanError: a g that does not divide the ranks.
    """
    for g in groups or []:
        if g < 2 or ranks % g:
            raise PlanError(f"--groups must be 2 or more and divide --ranks {ranks}, got {g}")
    if not 0 <= shared_dims < model.latent_dim:
        raise PlanError(
            f"--shared-dims must lie between 0 and {model.latent_dim - 1} for this model, got {shared_dims}"
        )
    sizes = groups or [g for g in range(2, ranks + 1) if ranks % g == 0]
    sliced = [Method("tpla", ranks, g, shared_dims, s) for g in sizes for s in (False, True)]
    alone = [Method("tp", ranks)]
    return alone if ranks == 1 else [*alone, *sliced, Method("dcp", ranks), Method("dp", ranks)]


def served_slice(
    model: PlanModel, method: Method, heads: int, capability: tuple[int, int]
) -> tuple[int, str]:
    """The slice's width, widened to the next one that a kernel on this GPU computes right, and that kernel.

    Raises:
        BackendRefusal: no kernel serves any width from there on.
    """
    width = slice_width(model.latent_dim, method.groups, method.shared_dims)
    first = -(-width // WIDTH_STEP) * WIDTH_STEP
    for wider in range(max(first, 2 * WIDTH_STEP), model.latent_dim, WIDTH_STEP):
        with contextlib.suppress(BackendRefusal):
            return wider, choose(DecodeShape(wider, heads, model.rope_dim), capability)
    raise BackendRefusal(
        f"no attention kernel serves a slice of width {width} or wider with {heads} heads and rope "
        f"{model.rope_dim} on compute capability {capability[0]}.{capability[1]}"
    )


def rank_work(
    model: PlanModel, method: Method, load: Load, precision: Precision, capability: tuple[int, int]
) -> RankWork:
    """One layer of one decode step on the busiest rank.

    Raises:
        ConfigError: the heads cannot be dealt out so. BackendRefusal: no kernel for the slice on this GPU.
    """
    ranks, groups = method.ranks, method.groups
    sliced = not method.exact
    heads = model.heads if method.kind == "dp" else Layout(ranks, groups, model.heads).local_heads
    batch = math.ceil(load.batch / ranks) if method.kind == "dp" else load.batch
    stock = "flashinfer_fa3" if capability == (9, 0) else "flashinfer_fa2"
    width, kernel = served_slice(model, method, heads, capability) if sliced else (model.latent_dim, stock)
    row_bytes = precision.cache_row_bytes(width, model.rope_dim, sliced)
    read_heads = model.heads if method.kind == "dcp" else heads
    context = math.ceil(load.context_tokens / (ranks if method.kind == "dcp" else 1))
    tokens = batch * context
    rows = batch * load.verified  # of every product
    out_heads = heads // groups if method.scatter else heads

    def gemm(name: str, parameters: float, columns: float, kind: str = "gemm") -> Piece:
        moved = parameters * precision.weight_bytes + rows * columns * _BF16_BYTES
        return Piece(name, f"{kind}_{precision.weights}", moved, 2 * rows * parameters)

    def absorbed(name: str, inner: int) -> Piece:
        parameters = heads * inner * width
        # kept in bf16 under block FP8 too, by SGLang and by us
        moved = parameters * _BF16_BYTES + rows * heads * (inner + width) * _BF16_BYTES
        return Piece(name, "bmm", moved, 2 * rows * parameters)

    head_dim = model.nope_dim + model.rope_dim
    query_in = model.q_lora_rank or model.hidden
    attended = 2 * width + model.rope_dim
    projected = 2 * rows * model.latent_dim * width if sliced else 0
    pieces = [
        gemm("down", model.down_parameters, model.hidden + model.down_parameters // model.hidden, "down"),
        Piece("norm, rope, cache write", "small", 0, projected, small_launches(model, method)),
        gemm("query", heads * model.query_parameters_a_head, query_in + heads * head_dim),
        absorbed("absorb", model.nope_dim),
        Piece(
            "attention",
            WIDE if kernel == "hopper" and width > WIDE_FROM else kernel,
            tokens * row_bytes + rows * read_heads * attended * _BF16_BYTES,
            2 * tokens * load.verified * read_heads * attended,
            one_request_bytes=context * row_bytes,
        ),
        absorbed("value", model.value_dim),
        gemm(
            "output",
            out_heads * model.output_parameters_a_head,
            model.hidden + out_heads * model.value_dim,
        ),
    ]
    vector = rows * _BF16_BYTES
    joins: list[Collective] = []
    if method.kind == "dcp":
        pieces.append(Piece("merge", "small", 2 * vector * model.heads * width, 0))
        joins.append(Collective("all_gather", vector * model.heads * (width + model.rope_dim), ranks))
        joins.append(Collective("all_to_all", vector * model.heads * (width + 2), ranks))
    if method.scatter:
        joins.append(Collective("reduce_scatter", vector * heads * model.value_dim, groups))
    if method.kind == "dp":
        joins.append(Collective("all_gather", load.batch * load.verified * _BF16_BYTES * model.hidden, ranks))
    else:
        joins.append(Collective("all_reduce", vector * model.hidden, ranks))
    return RankWork(
        pieces=tuple(pieces),
        collectives=tuple(joins),
        width=width,
        heads=heads,
        out_heads=out_heads,
        read_heads=read_heads,
        batch=batch,
        context_tokens=context,
        kernel=kernel,
        cache_row_bytes=row_bytes,
    )


def small_launches(model: PlanModel, method: Method) -> int:
    """Launches one after another between the products: norms, rotation, cache write.

    MLA's two norms run side by side; a slice's norm, projection, rotation and write are one kernel.
    """
    if method.kind == "tpla":
        return 2 if model.q_lora_rank else 1
    return 3


def break_even_tokens(model: PlanModel, method: Method, precision: Precision, width: int) -> float:
    """Cached tokens (batch times context) from which a slice saves more bytes than its head weights add.

    Bytes alone (design, section 7): (g - 1) times a rank's ``q_b_proj`` and, unless ``scatter``, ``o_proj``, over the
    cache bytes saved a token.
    """
    heads = model.heads / method.ranks
    parameters = heads * model.query_parameters_a_head
    if not method.scatter:
        parameters += heads * model.output_parameters_a_head
    whole = precision.cache_row_bytes(model.latent_dim, model.rope_dim, sliced=False)
    saved = whole - precision.cache_row_bytes(width, model.rope_dim, sliced=True)
    return (method.groups - 1) * parameters * precision.weight_bytes / saved if saved > 0 else math.inf
