"""Transform ``learned``: maps optimised layer by layer on the layer's own output error.

The maps start as those of ``shared``. For each layer, Adam minimises the squared error of the attention's output (after
W_O) over sampled queries of the calibration text, with exact inputs. Adam changes no other weight, and no error passes
from layer to layer. Parameters are in whitened coordinates, in which every direction of the latent has the same
variance, so that one step size suits all directions:

    Z_i = C^-1/2 [S | R_i],   A_i = A'_i C^1/2,   B_i = B'_i C^1/2

S is one tensor for all groups, so the shared columns stay the same, bit for bit. `learn_model` runs layer after layer,
and can resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F

from sglang_tpla.calibrate.transforms import Maps, TransformError
from sglang_tpla.measure.layer_inputs import Batch, exact_context, head_outputs, sample, sliced_slices
from sglang_tpla.reference_model.forward import Attention, AttentionInputs

_VARIANCE_FLOOR = 1e-8
_NO_OUTPUT = 1e-30  # the square of a dead layer's output is 0, and so is its error


@dataclass(frozen=True)
class LearnPlan:
    """The steps and the batches of learning.

    ``rate`` is Adam's peak step size for a layer whose relative squared error is 1e-3. For another layer, the rate is
    scaled by the square root of the ratio of the errors, which measures how far the layer's maps are from the best.
    Layers differ in the step size that they tolerate: each of ``trial_scales`` times the rate is tried for
    ``trial_steps``, and the best is used for all ``steps``. A layer with an error below ``good_enough`` is left as it
    is. ``queries`` counts the queries of each sequence.
    """

    steps: int = 400
    rate: float = 1e-3
    highest_rate: float = 2e-3
    good_enough: float = 1e-5
    sequences: int = 8
    queries: int = 32
    first_query: int = 256
    warmup_steps: int = 20
    trial_scales: tuple[float, ...] = (1.0, 0.25)
    trial_steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise TransformError if a field is out of range."""
        least = {"steps": 0, "sequences": 1, "queries": 1, "first_query": 0, "trial_steps": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise TransformError(f"expected {name} of learning to be at least {low}, got {getattr(self, name)}")
        if not self.trial_scales or min(self.rate, self.highest_rate, *self.trial_scales) <= 0:
            raise TransformError(
                f"expected rate, highest_rate and trial_scales (one or more) of learning above 0, got {self.rate}, "
                f"{self.highest_rate} and {self.trial_scales}"
            )

    @property
    def trials(self) -> tuple[float, ...]:
        """The scales to try; a single one needs no trial."""
        return self.trial_scales if len(self.trial_scales) > 1 and self.steps else ()

    @property
    def total_steps(self) -> int:
        """The steps of a layer, trials included."""
        return self.steps + len(self.trials) * self.trial_steps


@dataclass(frozen=True)
class LearnedLayer:
    """Maps of each group (float32), and the relative squared output error before and after."""

    maps: Maps
    error_before: float
    error_after: float


class _Whitened:
    """Parameters of one layer in whitened coordinates."""

    def __init__(self, maps: Maps, shared_dims: int, covariance: torch.Tensor, device: torch.device) -> None:
        values, vectors = torch.linalg.eigh(covariance.double().cpu())
        values = values.clamp_min(values[-1] * _VARIANCE_FLOOR)
        root = (vectors * values.sqrt()) @ vectors.T
        inverse = (vectors / values.sqrt()) @ vectors.T
        white = [(root @ z.double().cpu(), a.double().cpu(), b.double().cpu()) for z, a, b in maps]
        # Use unit columns: the scale of a slice is free, and the step size is relative to it.
        norms = [z.norm(dim=0).clamp_min(1e-6) for z, _, _ in white]

        def stack(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(parts).to(device, torch.float32).requires_grad_()

        pairs = list(zip(white, norms, strict=True))
        columns = [z / norm for (z, _, _), norm in pairs]
        self.shared = columns[0][:, :shared_dims].to(device, torch.float32).requires_grad_()
        self.rest = stack([z[:, shared_dims:] for z in columns])
        self.keys = stack([norm[:, None] * (a @ inverse) for (_, a, _), norm in pairs])
        self.values = stack([norm[:, None] * (b @ inverse) for (_, _, b), norm in pairs])
        self.root = root.to(device, torch.float32)
        self.inverse = inverse.to(device, torch.float32)

    def leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in (self.shared, self.rest, self.keys, self.values) if leaf.numel()]

    def maps(self) -> Maps:
        """Return the maps in the latent's own coordinates; the shared columns are computed once."""
        common = self.inverse @ self.shared
        return [
            (torch.cat([common, self.inverse @ rest], 1), keys @ self.root, values @ self.root)
            for rest, keys, values in zip(self.rest, self.keys, self.values, strict=True)
        ]


def output_error(attention: Attention, batch: Batch, maps: Maps) -> torch.Tensor:
    """Return the squared error of the layer's output over the batch, divided by the square of the exact output."""
    scale = attention.spec.scale
    rope = batch.rope_scores(scale)
    with torch.no_grad():
        exact = exact_context(batch, rope, scale)
        target = F.linear(head_outputs(exact, attention), attention.o)
    context = reduce(torch.add, (sliced_slices(batch, rope, scale, z, a) @ b for z, a, b in maps))
    found = F.linear(head_outputs(context, attention), attention.o)
    return (found - target).pow(2).sum() / target.pow(2).sum().clamp_min(_NO_OUTPUT)


def learn_layer(
    attention: Attention,
    inputs: AttentionInputs,
    maps: Maps,
    shared_dims: int,
    covariance: torch.Tensor,
    plan: LearnPlan,
    layer: int,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> LearnedLayer:
    """Optimise one layer's maps.

    Args:
        attention: the layer's exact attention.
        inputs: that attention's inputs on calibration text.
        maps: the maps to start from, (Z, A, B) of each group.
        shared_dims: leading columns of Z that all groups share.
        covariance: the covariance of the latent [d, d], for the coordinates.
        plan: steps and batch.
        layer: number of the layer; this number and the seed decide the batches.
        progress: called with the number of steps just done.
    """
    device = inputs.latent.device
    generator = torch.Generator().manual_seed(plan.seed * 1000003 + layer)
    size = {"sequences": plan.sequences, "queries": plan.queries, "first_query": plan.first_query}

    def draw() -> Batch:
        return sample(attention, inputs, generator, **size)

    # The errors before and after are measured on the same queries, which the steps do not aim to draw.
    probes = [draw() for _ in range(8)]

    def probe(current: Maps) -> float:
        with torch.no_grad():
            return sum(output_error(attention, batch, current).item() for batch in probes) / len(probes)

    start = [(z.to(device).float(), a.to(device).float(), b.to(device).float()) for z, a, b in maps]
    before = probe(start)
    if before < plan.good_enough or plan.steps == 0:
        progress(plan.total_steps)
        return LearnedLayer(start, before, before)

    def descend(scale: float, steps: int) -> Maps:
        whitened = _Whitened(maps, shared_dims, covariance, device)
        peak = scale * min(plan.rate * (before / 1e-3) ** 0.5, plan.highest_rate)
        optimiser = torch.optim.Adam(whitened.leaves(), lr=peak, betas=(0.9, 0.99))
        warmup_steps = max(1, min(plan.warmup_steps, steps // 2))

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        for _ in range(steps):
            loss = output_error(attention, draw(), whitened.maps())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            progress(1)
        with torch.no_grad():
            return whitened.maps()

    tried = {scale: probe(descend(scale, plan.trial_steps)) for scale in plan.trials}
    scale = min(tried, key=tried.__getitem__) if tried else plan.trial_scales[0]
    learned = descend(scale, plan.steps)
    after = probe(learned)
    # The result is never worse than the start.
    return LearnedLayer(learned, before, after) if after < before else LearnedLayer(start, before, before)
