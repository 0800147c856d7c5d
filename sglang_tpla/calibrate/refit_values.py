"""Closed-form refit of the value maps for fixed probabilities of each group: least squares, no gradient.

With u_{i,h} = p_{i,h} z_i fixed, the layer's output is linear in the B_i:

    min over B of  sum_q | sum_h (sum_i u_{i,h} B_i - p_h c) W_UV_h^T W_O_h^T |^2

Conjugate gradients solve the normal equations. They start from the given maps, so directions that the text says
nothing about stay as they were. Shapes: M queries, H heads, w slice width, d latent dims.
"""

from collections.abc import Sequence

import torch

from sglang_tpla.calibrate.transforms import Maps
from sglang_tpla.measure.layer_inputs import Batch, exact_context, head_outputs, sliced_slices
from sglang_tpla.reference_model.forward import Attention


@torch.inference_mode()
def refit_values(
    attention: Attention, batches: Sequence[Batch], maps: Maps, *, iterations: int
) -> tuple[Maps, float, float]:
    """Refit B, and return the maps and the relative squared output error on the batches before and after.

    Conjugate gradients lower the error at every step, so it never grows.
    """
    scale, spec = attention.spec.scale, attention.spec
    parts, targets = [], []
    for batch in batches:
        rope = batch.rope_scores(scale)
        sliced = [sliced_slices(batch, rope, scale, z, a) for z, a, _ in maps]
        parts.append(torch.cat(sliced, -1).transpose(1, 2).flatten(0, 1))
        exact = exact_context(batch, rope, scale)
        targets.append(head_outputs(exact, attention).flatten(0, 1) @ attention.o.T)
    slices, target = torch.cat(parts), torch.cat(targets)  # [M, H, g * w], [M, hidden]

    def output(b: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [M, hidden] for B [g * w, d]."""
        values = torch.einsum("mhd,hvd->mhv", slices @ b, attention.w_uv)
        return values.flatten(1) @ attention.o.T

    def gradient_of(residual: torch.Tensor) -> torch.Tensor:
        values = (residual @ attention.o).view(len(residual), spec.heads, spec.value_dim)
        context = torch.einsum("mhv,hvd->mhd", values, attention.w_uv)
        return slices.flatten(0, 1).T @ context.flatten(0, 1)

    start = torch.cat([b for _, _, b in maps])
    residual = target - output(start)
    energy = target.pow(2).sum()
    before = (residual.pow(2).sum() / energy).item()
    solution, gradient = start.clone(), gradient_of(residual)
    direction, norm = gradient.clone(), gradient.pow(2).sum()
    for _ in range(iterations):
        if norm <= 0:
            break
        moved = output(direction)
        step = norm / moved.pow(2).sum()
        solution += step * direction
        residual -= step * moved
        gradient = gradient_of(residual)
        new_norm = gradient.pow(2).sum()
        direction = gradient + (new_norm / norm) * direction
        norm = new_norm
    after = (residual.pow(2).sum() / energy).item()
    width = maps[0][0].shape[1]
    refitted = [(z, a, b.clone()) for (z, a, _), b in zip(maps, solution.split(width), strict=True)]
    return refitted, before, after
