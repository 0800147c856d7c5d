"""Choose a layout: the fewest cached values a token and rank that keep KL under a bound.

The search makes ``shared`` maps for every g that divides the ranks and for a grid of r, and measures each layer's KL
with only that layer sliced. The layers' KL nearly add up, so a greedy walk gives layouts with a width for each layer,
exact layers (w = d) among them: it starts at the narrowest widths, and each step widens the layer that buys most KL a
value. Uniform layouts and the walk's layouts are then measured whole, and the cheapest within the bound is taken.
Choices are made on calibration text; the artifact's report is on held-out text as always.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.pipeline import key_weights
from sglang_tpla.calibrate.transforms import Maps, TransformError, layer_maps
from sglang_tpla.config import slice_width
from sglang_tpla.measure.decode_error import measure
from sglang_tpla.measure.statistics import Statistics
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel

MOST_LAYOUTS = 12  # of one number of groups, measured whole


def each(values: Sequence[int]) -> str:
    """Return each layer's number, or the one number of all layers."""
    return "/".join(map(str, values if len(set(values)) > 1 else values[:1]))


@dataclass(frozen=True)
class Point:
    """A layout that was measured whole.

    ``bytes_per_token``: a rank's, all layers, with rope, in bf16 or in the sketched ``rows`` of each layer.
    """

    groups: int
    shared_dims: tuple[int, ...]
    widths: tuple[int, ...]
    bytes_per_token: int
    kl: float
    rows: tuple[SketchedRows, ...] = ()

    @property
    def label(self) -> str:
        """The layers' differences in words: widths, or shared columns and sketch bits."""
        if not self.rows:
            return each(self.widths)
        if self.groups == 1:
            return f"plain MLA in 8-bit rows (no artifact needed){self._key}"
        return f"r {each(self.shared_dims)}, bits {each([layer.sketch_bits for layer in self.rows])}{self._key}"

    @property
    def _key(self) -> str:
        return ", rotary key at 8 bits" if self.rows[0].rope_bits == 8 else ""


@dataclass(frozen=True)
class Search:
    """What may be chosen.

    Args:
        ranks: T; g runs over its divisors above 1.
        max_kl: the bound, nats a token.
        has_width: which slice widths the attention backend serves.
        shares: r as shares of d that are looked at.
    """

    ranks: int
    max_kl: float
    has_width: Callable[[int], bool]
    shares: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)

    def __post_init__(self) -> None:
        if self.ranks < 2 or not 0 < self.max_kl < math.inf:
            raise TransformError(
                f"expected --ranks of at least 2 and a finite --max-kl above 0, got {self.ranks} and {self.max_kl}"
            )

    def group_counts(self) -> list[int]:
        """Return the g to look at: the divisors of the ranks above 1."""
        return [g for g in range(2, self.ranks + 1) if self.ranks % g == 0]

    def shared_choices(self, latent_dim: int, groups: int) -> list[int]:
        """Return every r whose slice width the backend serves, ascending; d (an exact layer) is the last."""
        found: dict[int, int] = {}
        for share in self.shares:
            start = round(share * latent_dim)
            # the nearest r above whose width is served
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


def search(
    model: PlainModel,
    statistics: Statistics,
    tokens: torch.Tensor,
    prompt_tokens: int,
    wanted: Search,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Return every layout that was measured, the cheapest first."""
    points: list[Point] = []
    for groups in wanted.group_counts():
        points += _search_groups(model, statistics, tokens, prompt_tokens, wanted, groups, progress)
    return sorted(points, key=lambda point: (point.bytes_per_token, point.kl))


def _search_groups(
    model: PlainModel,
    statistics: Statistics,
    tokens: torch.Tensor,
    prompt_tokens: int,
    wanted: Search,
    groups: int,
    progress: Callable[[str], None],
) -> list[Point]:
    spec = model.spec
    choices = wanted.shared_choices(spec.latent_dim, groups)
    maps = [point_maps(model, statistics, groups, [shared] * spec.layers) for shared in choices]
    widths = [slice_width(spec.latent_dim, groups, shared) for shared in choices]
    found = measured_layouts(
        model, tokens, prompt_tokens, maps, widths, wanted.max_kl, lambda line: progress(f"g = {groups}: {line}")
    )
    return [
        Point(
            groups,
            tuple(choices[c] for c in pick),
            tuple(widths[c] for c in pick),
            2 * sum(widths[c] + spec.rope_dim for c in pick),
            kl,
        )
        for pick, kl in found
    ]


def measured_layouts(
    model: PlainModel,
    tokens: torch.Tensor,
    prompt_tokens: int,
    maps: Sequence[Sequence[LayerMaps]],
    sizes: Sequence[int],
    max_kl: float,
    progress: Callable[[str], None],
) -> list[tuple[list[int], float]]:
    """Measure each layer by itself at every choice, then uniform layouts and the walk's near the bound whole.

    Return these layouts (a choice per layer) with their KL.

    Args:
        maps: [choices][layers].
        sizes: of a row at each choice, ascending.
    """

    def kl_of(candidates: Sequence[Sequence[LayerMaps | None]]) -> list[float]:
        return [errors.kl.double().mean().item() for errors in measure(model, tokens, candidates, prompt_tokens)]

    layers = len(maps[0])
    picks = [[choice] * layers for choice in range(len(maps))]
    if len(picks) > 1:
        alone: list[list[float]] = []
        for layer in range(layers):
            progress(f"layer {layer + 1} of {layers}")
            exact: list[LayerMaps | None] = [None] * layers
            alone.append(kl_of([[*exact[:layer], made[layer], *exact[layer + 1 :]] for made in maps]))
        picks += [pick for pick in widening_walk(alone, sizes) if pick not in picks]
        picks = near_the_bound(picks, alone, max_kl)
    progress(f"{len(picks)} layouts")
    found = kl_of([[maps[choice][layer] for layer, choice in enumerate(pick)] for pick in picks])
    return list(zip(picks, found, strict=True))


def widening_walk(alone: Sequence[Sequence[float]], widths: Sequence[int]) -> list[list[int]]:
    """Return layouts (a choice per layer) from the narrowest on; each widens the layer that buys most per value.

    Args:
        alone: KL of each layer by itself at each choice, [layers][choices].
        widths: slice width of each choice, ascending.
    """
    current = [0] * len(alone)
    walk = [list(current)]
    while True:
        best: tuple[float, int, int] | None = None
        for layer, choice in enumerate(current):
            # a step may skip choices that buy nothing by themselves
            for wider in range(choice + 1, len(widths)):
                gain = (alone[layer][choice] - alone[layer][wider]) / (widths[wider] - widths[choice])
                if best is None or gain > best[0]:
                    best = (gain, layer, wider)
        if best is None:
            return walk
        current[best[1]] = best[2]
        walk.append(list(current))


def near_the_bound(picks: list[list[int]], alone: Sequence[Sequence[float]], max_kl: float) -> list[list[int]]:
    """Return the uniform layouts, and of the others those whose layers' KL adds up to about the bound."""

    def distance(pick: list[int]) -> float:
        total = sum(alone[layer][choice] for layer, choice in enumerate(pick))
        return abs(torch.tensor(max(total, 1e-12) / max_kl).log().item())

    uniform = [pick for pick in picks if len(set(pick)) == 1]
    mixed = sorted((pick for pick in picks if len(set(pick)) > 1), key=distance)
    return uniform + mixed[: max(MOST_LAYOUTS - len(uniform), 4)]


def point_maps(model: PlainModel, statistics: Statistics, groups: int, shared_dims: Sequence[int]) -> list[Maps]:
    """Make ``shared`` maps (float32, on the model's device) with an r per layer."""
    layers: list[Maps] = []
    for layer, shared in enumerate(shared_dims):
        w_uk = key_weights(model.checkpoint, layer)
        made = layer_maps("shared", statistics.layers[layer], w_uk, groups, shared, statistics.meta.seed)
        where = model.device, model.dtype
        layers.append([(z.to(*where), a.to(*where), b.to(*where)) for z, a, b in made])
    return layers


def table(points: Sequence[Point], chosen: Point | None, bytes_mla: int) -> str:
    """Return the frontier as text, without layouts that another one beats on both counts, and with plain MLA."""
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
