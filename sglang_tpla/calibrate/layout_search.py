"""Choose a layout: the fewest cached bytes a token and rank that keep KL under a bound.

`search` measures each layer's KL with only that layer in the candidate rows and all others exact, at every size. The
layers' KL nearly add up, so a greedy walk gives layouts with a size for each layer, exact layers (w = d) among them:
the walk starts at the smallest rows, and each step enlarges the layer that gains most KL a byte. Uniform layouts and
the walk's layouts near the bound are then measured whole, and the cheapest within the bound is taken. Choices are made
on calibration text; the artifact's report is on held-out text as always. `Search` has the sizes of plain rows,
`sketch_search` those of sketched rows.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.cache_rows.layer_rows import PlainRows
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.transforms import TransformError
from sglang_tpla.config import slice_width
from sglang_tpla.measure.decode_error import measure, model_maps
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel

Rows = PlainRows | SketchedRows
# One family of candidates: its name, its groups, and the rows that a layer may have, by ascending size.
LookedAt = tuple[str, int, Sequence[Rows]]
_SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)  # the candidates for r, as shares of d
_MOST_RANKS = 4096  # finding the divisors of a mistyped number could take all day
MOST_LAYOUTS = 12  # layouts of one number of groups that are measured whole


def each(values: Sequence[int]) -> str:
    """Return each layer's number as text, or one number if all layers have the same."""
    return "/".join(map(str, values if len(set(values)) > 1 else values[:1]))


def size_bytes(rows: Rows) -> int:
    """Return the bytes of a layer's row; plain rows count as bf16."""
    return rows.row_bytes if isinstance(rows, SketchedRows) else 2 * rows.row_items


@dataclass(frozen=True)
class Point:
    """A layout that was measured whole: its groups, the rows of each layer, and its KL."""

    groups: int
    rows: tuple[Rows, ...]
    kl: float

    @property
    def bytes_per_token(self) -> int:
        """The bytes that a rank caches for a token in all layers, with rope."""
        return sum(map(size_bytes, self.rows))

    @property
    def label(self) -> str:
        """The layout in words: each layer's width, or its shared columns and sketch bits."""
        sketched = [rows for rows in self.rows if isinstance(rows, SketchedRows)]
        if not sketched:
            return each([rows.width for rows in self.rows if isinstance(rows, PlainRows)])
        key = ", rotary key at 8 bits" if sketched[0].rope_bits == 8 else ""
        if self.groups == 1:
            return f"plain MLA in 8-bit rows (no artifact needed){key}"
        bits = each([rows.sketch_bits for rows in sketched])
        return f"r {each([rows.shared for rows in sketched])}, bits {bits}{key}"


@dataclass(frozen=True)
class Search:
    """The layouts that may be chosen.

    Args:
        ranks: T; g runs over its divisors above 1.
        max_kl: the bound, nats a token.
        has_width: returns whether the attention backend serves a slice width.
        heads: H; the T/g head shards must divide it. 0 allows every g.
    """

    ranks: int
    max_kl: float
    has_width: Callable[[int], bool]
    heads: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.ranks <= _MOST_RANKS or not 0 < self.max_kl < math.inf:
            raise TransformError(
                f"expected --ranks of at least 2 and at most {_MOST_RANKS}, and a finite --max-kl above 0, got "
                f"{self.ranks} and {self.max_kl}"
            )

    def group_counts(self) -> list[int]:
        """Return the candidates for g: the divisors of the ranks above 1 that a server can serve."""
        return [g for g in range(2, self.ranks + 1) if self.ranks % g == 0 and self.heads % (self.ranks // g) == 0]

    def shared_choices(self, latent_dim: int, groups: int) -> list[int]:
        """Return every r whose slice width the backend serves, ascending; d (an exact layer) is the last."""
        found: dict[int, int] = {}
        for share in _SHARES:
            start = round(share * latent_dim)
            # Take the smallest r from here on whose width is served.
            for shared in range(start, latent_dim):
                width = slice_width(latent_dim, groups, shared)
                if self.has_width(width) and (latent_dim - shared) % groups == 0:
                    found.setdefault(width, shared)
                    break
        choices = sorted(found.values())
        if self.has_width(latent_dim):
            choices.append(latent_dim)
        if not choices:
            raise TransformError(
                f"the attention backend serves no slice width of a latent of {latent_dim} at {groups} groups; choose "
                "another --attention-backend"
            )
        return choices

    def looked_at(self, latent_dim: int, rope_dim: int) -> Iterable[LookedAt]:
        """Yield the plain rows of every g."""
        for groups in self.group_counts():
            shared = self.shared_choices(latent_dim, groups)
            yield f"g = {groups}", groups, [PlainRows(slice_width(latent_dim, groups, r), r, rope_dim) for r in shared]


def search(
    model: PlainModel,
    tokens: torch.Tensor,
    prompt_tokens: int,
    max_kl: float,
    looked_at: Iterable[LookedAt],
    made: Callable[[int, Sequence[Rows]], Artifact],
    progress: Callable[[str], None],
) -> list[Point]:
    """Return every measured layout, the cheapest first; ``made`` returns the artifact for groups and rows."""

    def kl_of(candidates: Sequence[Sequence[LayerMaps | None]]) -> list[float]:
        return [errors.mean_kl for errors in measure(model, tokens, candidates, prompt_tokens)]

    layers = model.spec.layers
    points: list[Point] = []
    for name, groups, choices in looked_at:
        maps = [model_maps(made(groups, [rows] * layers), model) for rows in choices]
        picks = [[choice] * layers for choice in range(len(choices))]  # a pick has a choice per layer
        if len(picks) > 1:
            alone: list[list[float]] = []
            for layer in range(layers):
                progress(f"{name}: layer {layer + 1} of {layers}")
                exact: list[LayerMaps | None] = [None] * layers
                alone.append(kl_of([[*exact[:layer], one[layer], *exact[layer + 1 :]] for one in maps]))
            walk = widening_walk(alone, [size_bytes(rows) for rows in choices])
            picks += [pick for pick in walk if pick not in picks]
            picks = near_the_bound(picks, alone, max_kl)
        progress(f"{name}: {len(picks)} layouts")
        found = kl_of([[maps[choice][layer] for layer, choice in enumerate(pick)] for pick in picks])
        for pick, kl in zip(picks, found, strict=True):
            points.append(Point(groups, tuple(choices[choice] for choice in pick), kl))
    return sorted(points, key=lambda point: (point.bytes_per_token, point.kl))


def widening_walk(alone: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[list[int]]:
    """Return layouts (a choice per layer) from the smallest on; each enlarges the layer that gains most for its size.

    Args:
        alone: KL of each layer by itself at each choice, [layers][choices].
        sizes: the size of a row at each choice, ascending.
    """
    current = [0] * len(alone)
    walk = [list(current)]
    while True:
        best: tuple[float, int, int] | None = None
        for layer, choice in enumerate(current):
            # A step may skip choices that gain nothing by themselves.
            for wider in range(choice + 1, len(sizes)):
                gain = (alone[layer][choice] - alone[layer][wider]) / (sizes[wider] - sizes[choice])
                if best is None or gain > best[0]:
                    best = (gain, layer, wider)
        if best is None:
            return walk
        current[best[1]] = best[2]
        walk.append(list(current))


def near_the_bound(picks: list[list[int]], alone: Sequence[Sequence[float]], max_kl: float) -> list[list[int]]:
    """Return the uniform layouts, and those of the others whose layers' KL adds up to about the bound."""

    def distance(pick: list[int]) -> float:
        total = sum(alone[layer][choice] for layer, choice in enumerate(pick))
        return abs(torch.tensor(max(total, 1e-12) / max_kl).log().item())

    uniform = [pick for pick in picks if len(set(pick)) == 1]
    mixed = sorted((pick for pick in picks if len(set(pick)) > 1), key=distance)
    return uniform + mixed[: max(MOST_LAYOUTS - len(uniform), 4)]


def table(points: Sequence[Point], chosen: Point | None, bytes_mla: int) -> str:
    """Return the frontier and plain MLA as text; layouts that another beats on both counts are omitted."""
    lines = [f"{'g':>3} {'bytes a token and rank':>23} {'of MLA':>7} {'KL a token':>11}  layout"]
    best = float("inf")
    for point in points:
        mark = "  <- chosen" if point is chosen else ""
        if point.kl >= best and not mark and point.groups > 1:
            continue
        best = min(best, point.kl)
        lines.append(
            f"{point.groups:>3} {point.bytes_per_token:>23} {point.bytes_per_token / bytes_mla:>7.1%} "
            f"{point.kl:>11.5f}  {point.label}{mark}"
        )
    lines.append(f"{'-':>3} {bytes_mla:>23} {1:>7.1%} {0:>11.5f}  plain MLA")
    return "\n".join(lines)
