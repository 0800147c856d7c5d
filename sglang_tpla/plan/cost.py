"""One rank's work for one attention layer of one decode step, the seconds that it takes, and the memory beside it.

Work is a list of kernels with their bytes and operations, and of collectives. The time is modelled from this list
without any overlap; `hardware` says which constants were measured.

Methods (T ranks, g latent groups; docs/design.md):

    tp    H/T heads, the whole latent on every rank
    tpla  H g/T heads, a slice of w values; with ``scatter`` the groups' head outputs are summed before ``o_proj``, so
          that a rank holds 1/g of its heads there. g = 1 in sketched rows is plain MLA with an 8-bit cache
    dcp   all H heads' queries gathered, 1/T of the tokens, outputs and log-sum-exps exchanged
    dp    whole requests: every head's weights, 1/T of the batch
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tpla.attention.backends import BackendRefusal, choose
from sglang_tpla.attention.interface import MAX_QUERY_LEN, DecodeShape
from sglang_tpla.cache_rows.shared_columns import default_shared
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.config import ConfigError, Layout, slice_width
from sglang_tpla.plan.flashinfer_split import Requests, Uneven, uneven
from sglang_tpla.plan.hardware import LONE_SHARE, Gpu, Link
from sglang_tpla.plan.model import PlanError, PlanModel

CACHE_DTYPES = ("bf16", "fp8")
ROWS = ("sketched", "plain")  # TPLA's formats; calibrate makes the first by default
WEIGHT_DTYPES = ("bf16", "fp8")
WIDTH_STEP = 32
# With many heads, products are most of our kernel's work at this width, and the kernel divides wider rows between its
# warpgroups in another way. So each of the two has its own rate.
FULL, WIDE, FULL_WIDTH = "hopper_256", "hopper_wide", 256
TRITON_HEADS = 16  # heads of a block of SGLang's Triton kernel; each block reads the cache for itself
_BF16_BYTES = 2
LARGEST_LOAD = 10**12  # requests, or tokens of one; a larger number is a typing mistake, and may not fit a float


@dataclass(frozen=True)
class Load:
    """Requests that decode together, and the number of cached tokens of each.

    Args:
        verified: tokens of a request that one step computes; more than one with speculative decoding.
        accepted: tokens that such a step adds to an answer on average, the target's own token included.
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
        if not (1 <= self.batch <= LARGEST_LOAD and 1 <= self.context_tokens <= LARGEST_LOAD):
            raise PlanError(
                f"--batch and --context must be at least 1 and at most {LARGEST_LOAD:,}, got {self.batch} and "
                f"{self.context_tokens}"
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.context_tokens


@dataclass(frozen=True)
class Precision:
    """Data types of the weights (bf16, or DeepSeek's block FP8) and of the cache."""

    weights: str = "bf16"
    cache: str = "bf16"

    def __post_init__(self) -> None:
        for name, value, known in (("weights", self.weights, WEIGHT_DTYPES), ("cache", self.cache, CACHE_DTYPES)):
            if value not in known:
                raise PlanError(f"--{name}-dtype must be one of {', '.join(known)}, got {value!r}")

    @property
    def weight_bytes(self) -> float:
        """The bytes of one weight; block FP8 has a float32 scale for 128 x 128 weights."""
        return 2.0 if self.weights == "bf16" else 1 + 4 / 128**2

    def whole_row_bytes(self, model: PlanModel) -> int:
        """Return the bytes of one token in one layer of SGLang's own cache, which holds the whole latent."""
        return (2 if self.cache == "bf16" else 1) * (model.latent_dim + model.rope_dim)


@dataclass(frozen=True)
class Method:
    """One way to share attention over ``ranks`` GPUs.

    Args:
        kind: tp, tpla, dcp or dp. groups, shared_dims, scatter, rows (`ROWS`): for tpla.
    """

    kind: str
    ranks: int
    groups: int = 1
    shared_dims: int = 0
    scatter: bool = False
    rows: str = "plain"

    @property
    def label(self) -> str:
        if self.kind == "tpla" and self.groups == 1 and self.rows == "sketched":
            return "8-bit MLA"
        if self.kind == "tpla":
            kind = "" if self.rows == "plain" else f" {self.rows}"
            return f"TPLA g={self.groups}{kind}" + (", reduce-scatter" if self.scatter else "")
        return {"tp": "plain TP", "dcp": "DCP", "dp": "DP attention"}[self.kind]

    @property
    def code(self) -> str:
        """The name in the map: TP, DCP, DP, T2 (g = 2), T2s (reduce-scatter), T2.8 (sketched), MLA8."""
        if self.kind == "tpla" and self.groups == 1 and self.rows == "sketched":
            return "MLA8"
        if self.kind == "tpla":
            kind = {"plain": "", "sketched": ".8"}[self.rows]
            return f"T{self.groups}{kind}" + ("s" if self.scatter else "")
        return self.kind.upper()

    @property
    def exact(self) -> bool:
        """Whether the method computes plain MLA."""
        return self.kind != "tpla"

    @property
    def closeness(self) -> int:
        """The distance from the model's own answers: 0 exact, 1 rounded, 2 sketched too, 3 part of the latent."""
        if self.exact:
            return 0
        return 1 if self.groups == 1 else 2 if self.rows == "sketched" else 3

    @property
    def error(self) -> str:
        """The change of the model's answers in words; empty where the method is exact."""
        return (
            "",
            "it rounds the cache to 8 bits, some 0.0002 nats a token",
            "it rounds the cache, some 0.0005 nats a token",
            "it is approximate: measure its error on your text first",
        )[self.closeness]

    @property
    def cache_ranks(self) -> int:
        """The number of ranks over which a token's cache is dealt out."""
        return self.ranks if self.kind in ("dcp", "dp") else 1


@dataclass(frozen=True)
class Piece:
    """One kernel: its kind of rate (`hardware.Gpu.rates`), bytes, floating-point operations, launches.

    Args:
        one_request_bytes: the longest request's cache, for attention.
        requests: the requests that FlashInfer deals out over the multiprocessors; None for other kernels.
    """

    name: str
    rate: str
    moved_bytes: float
    flops: float
    launches: int = 1
    one_request_bytes: float = 0.0
    requests: Requests | None = None


@dataclass(frozen=True)
class Collective:
    """One collective among ``ranks`` ranks; sizes as in `hardware.Link.seconds`."""

    kind: str
    size_bytes: float
    ranks: int


@dataclass(frozen=True)
class ServedRows:
    """The rows of a method on a GPU, and the kernel that reads them.

    Args:
        width: columns attended to as values. query_columns: columns of a query's latent part.
        row_bytes: bytes of a token and layer.
        projected: columns to which a new token's latent is projected; 0 keeps the latent whole.
    """

    width: int
    query_columns: int
    row_bytes: int
    projected: int
    kernel: str


@dataclass(frozen=True)
class RankWork:
    """All work of a rank, with the sizes from which it was counted.

    Args:
        rows: the cache's, and the attention kernel.
        heads: heads whose weights the rank holds; out_heads: those in ``o_proj``.
        read_heads: heads that attend (all of them under DCP). batch, context_tokens: requests and tokens attended to.
    """

    pieces: tuple[Piece, ...]
    collectives: tuple[Collective, ...]
    rows: ServedRows
    heads: int
    out_heads: int
    read_heads: int
    batch: int
    context_tokens: int


def methods(
    ranks: int,
    model: PlanModel,
    groups: list[int] | None = None,
    shared_dims: int | None = None,
    rows: Sequence[str] = ROWS,
) -> list[Method]:
    """Return every method on ``ranks`` GPUs.

    Args:
        groups: values of g; by default every divisor of the ranks from 2 on.
        shared_dims: r; by default the choice of calibrate.
        rows: formats of TPLA's cache to price.
    """
    quarter = model.latent_dim // 4
    for g in groups or []:
        if g < 2 or ranks % g:
            raise PlanError(f"--groups must be 2 or more and divide --ranks {ranks}, got {g}")
    if shared_dims is not None and not 0 <= shared_dims < model.latent_dim:
        raise PlanError(
            f"--shared-dims must lie between 0 and {model.latent_dim - 1} for this model, got {shared_dims}"
        )
    sizes = groups or [g for g in range(2, ranks + 1) if ranks % g == 0]

    def usual(g: int, kind: str) -> int:
        return default_shared(model.latent_dim, g) if kind == "sketched" else quarter

    sliced = [
        Method("tpla", ranks, g, usual(g, kind) if shared_dims is None else shared_dims, scatter, kind)
        for kind in rows
        for g in sizes
        for scatter in (False, True)
    ]
    alone = [Method("tp", ranks)]
    if "sketched" in rows:
        alone.append(Method("tpla", ranks, 1, model.latent_dim, rows="sketched"))
    return alone if ranks == 1 else [*alone, *sliced, Method("dcp", ranks), Method("dp", ranks)]


def whole_rows(model: PlanModel, precision: Precision, capability: tuple[int, int]) -> ServedRows:
    """Return SGLang's own rows and kernel; on Hopper, Triton reads FP8 rows because FlashInfer refuses them."""
    kernel = "flashinfer_fa2"
    if capability == (9, 0):
        kernel = "triton_fp8" if precision.cache == "fp8" else "flashinfer_fa3"
    return ServedRows(model.latent_dim, model.latent_dim, precision.whole_row_bytes(model), 0, kernel)


def served_rows(model: PlanModel, method: Method, heads: int, capability: tuple[int, int]) -> ServedRows:
    """Return TPLA's rows; plain slices are widened to the next width that a kernel on this GPU serves.

    Raises:
        BackendRefusal: no kernel reads such rows on this GPU. ConfigError: there are no such rows.
    """
    if method.rows == "sketched":
        try:
            rows = SketchedRows.of(model.latent_dim, method.groups, method.shared_dims, model.rope_dim)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        with contextlib.suppress(BackendRefusal):
            kernel = choose(DecodeShape.of_sketched(rows, heads), capability)
            columns = rows.w + rows.groups * rows.own
            return ServedRows(rows.w_pad, rows.score_columns, rows.row_bytes, columns, kernel)
        raise _unread(f"sketched rows of {rows.row_bytes} bytes, width {rows.w},", model, heads, capability)
    width = slice_width(model.latent_dim, method.groups, method.shared_dims)
    first = -(-width // WIDTH_STEP) * WIDTH_STEP
    for wider in range(max(first, 2 * WIDTH_STEP), model.latent_dim, WIDTH_STEP):
        with contextlib.suppress(BackendRefusal):
            kernel = choose(DecodeShape(wider, heads, model.rope_dim), capability)
            return ServedRows(wider, wider, _BF16_BYTES * (wider + model.rope_dim), wider, kernel)
    raise _unread(f"plain rows of width {width} or wider", model, heads, capability)


def _unread(rows: str, model: PlanModel, heads: int, capability: tuple[int, int]) -> BackendRefusal:
    return BackendRefusal(
        f"no attention kernel reads {rows} with {heads} heads and rope {model.rope_dim} on compute capability "
        f"{capability[0]}.{capability[1]}"
    )


def rank_work(
    model: PlanModel, method: Method, load: Load, precision: Precision, capability: tuple[int, int]
) -> RankWork:
    """Return the work of one layer of one decode step on the busiest rank.

    The errors are those of `Layout` and of `served_rows`.
    """
    ranks, groups = method.ranks, method.groups
    heads = model.heads if method.kind == "dp" else Layout(ranks, groups, model.heads).local_heads
    batch = math.ceil(load.batch / ranks) if method.kind == "dp" else load.batch
    # one group of plain rows is plain MLA
    ours = method.kind == "tpla" and (groups > 1 or method.rows != "plain")
    kept = served_rows(model, method, heads, capability) if ours else whole_rows(model, precision, capability)
    width = kept.width
    read_heads = model.heads if method.kind == "dcp" else heads
    context = math.ceil(load.context_tokens / (ranks if method.kind == "dcp" else 1))
    tokens = batch * context
    rows = batch * load.verified  # rows of every product
    out_heads = heads // groups if method.scatter else heads

    def gemm(name: str, parameters: float, columns: float, kind: str = "gemm") -> Piece:
        moved = parameters * precision.weight_bytes + rows * columns * _BF16_BYTES
        return Piece(name, f"{kind}_{precision.weights}", moved, 2 * rows * parameters)

    def absorbed(name: str, inner: int, columns: int) -> Piece:
        parameters = heads * inner * columns
        # SGLang and this package keep these weights in bf16 under block FP8 too
        moved = parameters * _BF16_BYTES + rows * heads * (inner + columns) * _BF16_BYTES
        return Piece(name, "bmm", moved, 2 * rows * parameters)

    head_dim = model.nope_dim + model.rope_dim
    query_in = model.q_lora_rank or model.hidden
    attended = kept.query_columns + width + model.rope_dim
    reads = math.ceil(read_heads / TRITON_HEADS) if kept.kernel == "triton_fp8" else 1
    projected = 2 * rows * model.latent_dim * kept.projected
    pieces = [
        gemm("down", model.down_parameters, model.hidden + model.down_parameters // model.hidden, "down"),
        Piece("norm, rope, cache write", "small", 0, projected, small_launches(model, method)),
        gemm("query", heads * model.query_parameters_a_head, query_in + heads * head_dim),
        absorbed("absorb", model.nope_dim, kept.query_columns),
        Piece(
            "attention",
            attention_rate(kept),
            reads * tokens * kept.row_bytes + rows * read_heads * attended * _BF16_BYTES,
            2 * tokens * load.verified * read_heads * attended,
            one_request_bytes=context * kept.row_bytes,
            requests=Requests(batch, context, read_heads * load.verified)
            if kept.kernel.startswith("flashinfer")
            else None,
        ),
        absorbed("value", model.value_dim, width),
        gemm("output", out_heads * model.output_parameters_a_head, model.hidden + out_heads * model.value_dim),
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
        rows=kept,
        heads=heads,
        out_heads=out_heads,
        read_heads=read_heads,
        batch=batch,
        context_tokens=context,
    )


def attention_rate(rows: ServedRows) -> str:
    """Return the kind of rate of the kernel that reads these rows."""
    if rows.kernel != "hopper" or rows.width < FULL_WIDTH:
        return rows.kernel
    return FULL if rows.width == FULL_WIDTH else WIDE


def small_launches(model: PlanModel, method: Method) -> int:
    """Return the number of launches, one after another, between the products: norms, rotation, cache write.

    MLA's two norms run side by side; one kernel does a slice's norm, projection, rotation and write.
    """
    if method.kind == "tpla":
        return 2 if model.q_lora_rank else 1
    return 3


def break_even_tokens(model: PlanModel, method: Method, precision: Precision, row_bytes: int) -> float:
    """Return the cached tokens (batch times context) above which rows of so many bytes save more than head weights add.

    Only bytes count here (docs/design.md): (g - 1) times a rank's ``q_b_proj`` and, unless ``scatter``,
    ``o_proj``, over the cache bytes saved a token.
    """
    heads = model.heads / method.ranks
    parameters = heads * model.query_parameters_a_head
    if not method.scatter:
        parameters += heads * model.output_parameters_a_head
    saved = precision.whole_row_bytes(model) - row_bytes
    return (method.groups - 1) * parameters * precision.weight_bytes / saved if saved > 0 else math.inf


@dataclass(frozen=True)
class Price:
    """The time of one layer of one decode step.

    Args:
        kernels_s: by kernel, in the order of launches. collectives_s: all collectives together.
    """

    kernels_s: dict[str, float]
    collectives_s: float

    @property
    def layer_s(self) -> float:
        """The whole time of a layer."""
        return sum(self.kernels_s.values()) + self.collectives_s


def price(work: RankWork, gpu: Gpu, link: Link) -> Price:
    """Price a rank's work: kernels run one after another, then the collectives, without overlap."""
    kernels: dict[str, float] = {}
    for piece in work.pieces:
        rate = gpu.rates[piece.rate]
        split = uneven(piece.requests, gpu.multiprocessors, LONE_SHARE) if piece.requests else Uneven()
        moved, flops = split.bytes * piece.moved_bytes / piece.launches, split.products * piece.flops / piece.launches
        once = rate.seconds(moved, flops, piece.one_request_bytes)
        kernels[piece.name] = kernels.get(piece.name, 0.0) + piece.launches * once
    joins = sum(link.seconds(join.kind, join.size_bytes, join.ranks) for join in work.collectives)
    return Price(kernels, joins)


def weight_bytes(model: PlanModel, work: RankWork, precision: Precision, gpus: int) -> float:
    """Return the bytes of weights on one rank; weights other than attention are spread evenly over ``gpus``."""
    heads = work.heads
    quantised = model.down_parameters
    quantised += heads * model.query_parameters_a_head + work.out_heads * model.output_parameters_a_head
    per_head = model.nope_dim + model.value_dim
    quantised += heads * per_head * model.latent_dim  # kv_b_proj, the source of the absorbed weights
    absorbed = heads * (model.nope_dim * work.rows.query_columns + model.value_dim * work.rows.width)
    attention = model.layers * (quantised * precision.weight_bytes + absorbed * _BF16_BYTES)
    others = model.other_parameters * precision.weight_bytes + model.table_parameters * _BF16_BYTES
    return attention + others / gpus


def tokens_that_fit(model: PlanModel, method: Method, work: RankWork, weights: float, gpu: Gpu, fraction: float) -> int:
    """Return the cached tokens that fit on all ranks together; 0 where the weights alone do not fit."""
    free = gpu.memory_bytes * fraction - weights
    return max(0, int(free // (work.rows.row_bytes * model.layers))) * method.cache_ranks
