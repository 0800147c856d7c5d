"""Attribute the error to layers and heads.

``layer_errors`` gives the relative squared error of one layer's attention output, whole and head by head, on exact
inputs. ``kl_alone`` gives the KL a token when only one layer decodes through slices and the rest are exact; the sum
over layers is close to the whole model's KL, so this shows where width would be best spent.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sglang_tpla.measure.decode_error import measure
from sglang_tpla.measure.layer_inputs import Batch, batch_of, exact_context, head_outputs, sliced_slices, walk
from sglang_tpla.reference_model.forward import Attention, AttentionInputs, LayerMaps, PlainModel
from sglang_tpla.reference_model.sketched_layer import SketchedMaps


@torch.no_grad()
def layer_errors(
    model: PlainModel, maps: Sequence[LayerMaps], tokens: torch.Tensor, first_query: int, *, queries: int = 64
) -> list[tuple[float, tuple[float, ...]]]:
    """Measure every layer at ``queries`` sampled positions of each sequence of tokens [N, S].

    Returns:
        For each layer the relative squared error of its output, and that of each head's share of it [H].
    """
    return [
        _layer_error(layer, model.layers[layer].attention, inputs, maps[layer], first_query, queries)
        for layer, inputs in walk(model, tokens)
    ]


def _layer_error(
    layer: int, attention: Attention, inputs: AttentionInputs, maps: LayerMaps, first_query: int, queries: int
) -> tuple[float, tuple[float, ...]]:
    spec = attention.spec
    generator = torch.Generator().manual_seed(layer)
    device = inputs.latent.device
    whole = torch.zeros(2, dtype=torch.float64)
    heads = torch.zeros(2, spec.heads, dtype=torch.float64)
    per_head = attention.o.view(-1, spec.heads, spec.value_dim)
    for sequence in range(inputs.latent.shape[0]):
        span = inputs.latent.shape[1] - first_query
        positions = torch.randperm(span, generator=generator)[:queries][None].to(device) + first_query
        batch = batch_of(attention, inputs, torch.tensor([sequence], device=device), positions)
        rope = batch.rope_scores(spec.scale)
        exact = exact_context(batch, rope, spec.scale)
        found = _sliced_context(batch, maps, rope, spec.scale)
        target = head_outputs(exact, attention)
        wrong = head_outputs(found, attention) - target
        for place, value in enumerate((wrong, target)):
            whole[place] += (value @ attention.o.T).double().pow(2).sum().cpu()
            # [B, Q, H, hidden] would be large, so compute the norm through each head's Gram matrix instead.
            split = value.unflatten(-1, (spec.heads, spec.value_dim))
            gram = torch.einsum("ohv,ohu->hvu", per_head, per_head)
            heads[place] += torch.einsum("bqhv,hvu,bqhu->h", split, gram, split).double().cpu()
    ratio = heads[0] / heads[1].clamp_min(1e-30)
    return (whole[0] / whole[1].clamp_min(1e-30)).item(), tuple(ratio.tolist())


def _sliced_context(batch: Batch, maps: LayerMaps, rope: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the latents [B, H, Q, d] attended through the slices, summed over the groups."""
    found = torch.zeros_like(batch.absorbed)
    if isinstance(maps, SketchedMaps):
        for view in maps.views(batch.latent, batch.k_rope):
            rope = replace(batch, k_rope=view.k_rope).rope_scores(scale)
            found += exact_context(batch, rope, scale, key=view.key, value=view.value)
        return found
    for z_map, a_map, b_map in maps:
        if not isinstance(z_map, torch.Tensor):
            raise TypeError("layer errors need linear slices (a matrix Z)")
        found += sliced_slices(batch, rope, scale, z_map, a_map) @ b_map
    return found


def kl_alone(
    model: PlainModel,
    maps: Sequence[LayerMaps],
    tokens: torch.Tensor,
    prompt_tokens: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """Return the KL a token that each layer's slicing causes by itself."""
    candidates: list[list[LayerMaps | None]] = [
        [maps[index] if index == layer else None for index in range(len(maps))] for layer in range(len(maps))
    ]
    return [errors.mean_kl for errors in measure(model, tokens, candidates, prompt_tokens, progress=progress)]
