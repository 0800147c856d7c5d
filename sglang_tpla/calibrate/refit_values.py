"""Closed-form refit of the value maps for fixed probabilities of each group: least squares, no gradient.

With u_{i,h} = p_{i,h} z_i fixed, the layer's output is linear in the B_i:

    min over B of  sum_q | sum_h (sum_i u_{i,h} B_i - p_h c) W_UV_h^T W_O_h^T |^2

solved by conjugate gradients on the normal equations from the maps at hand, which is also what keeps
directions that the text says nothing about where they were. Shapes: M queries, H heads, w slice width, d
latent dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.calibrate.transforms import Maps
from sglang_tpla.measure.layer_inputs import Batch, exact_context, head_outputs, sliced_slices
from sglang_tpla.reference_model.forward import Attention


@dataclass(frozen=True)
class _Problem:
    """``slices`` [M, H, g * w] -> output [M, hidden] through B [g * w, d]; ``target`` [M, hidden]."""

    slices: torch.Tensor
    target: torch.Tensor
    w_uv: torch.Tensor  # [H, v, d]
    o: torch.Tensor  # [hidden, H, v]

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        values = torch.einsum("mhd,hvd->mhv", self.slices @ b, self.w_uv)
        return values.flatten(1) @ self.o.flatten(1).T

    def backward(self, residual: torch.Tensor) -> torch.Tensor:
        values = (residual @ self.o.flatten(1)).view(len(residual), *self.o.shape[1:])
        context = torch.einsum("mhv,hvd->mhd", values, self.w_uv)
        return self.slices.flatten(0, 1).T @ context.flatten(0, 1)


@torch.inference_mode()
def refit_values(
    attention: Attention, batches: Sequence[Batch], maps: Maps, *, iterations: int
) -> tuple[Maps, float, float]:
    """Refit B. Return the maps, and the relative squared output error on the batches before and after.

    The error never grows: conjugate gradients lower it at every step.
    """
    problem = _set_up(attention, batches, maps)
    start = torch.cat([b for _, _, b in maps])
    residual = problem.target - problem.forward(start)
    energy = problem.target.pow(2).sum()
    before = (residual.pow(2).sum() / energy).item()
    solution, gradient = start.clone(), problem.backward(residual)
    direction, norm = gradient.clone(), gradient.pow(2).sum()
    for _ in range(iterations):
        if norm <= 0:
            break
        moved = problem.forward(direction)
        step = norm / moved.pow(2).sum()
        solution += step * direction
        residual -= step * moved
        gradient = problem.backward(residual)
        new_norm = gradient.pow(2).sum()
        direction = gradient + (new_norm / norm) * direction
        norm = new_norm
    after = (residual.pow(2).sum() / energy).item()
    width = maps[0][0].shape[1]
    refitted = [(z, a, b.clone()) for (z, a, _), b in zip(maps, solution.split(width), strict=True)]
    return refitted, before, after


def _set_up(attention: Attention, batches: Sequence[Batch], maps: Maps) -> _Problem:
    spec = attention.spec
    o = attention.o.view(-1, spec.heads, spec.value_dim)
    slices, targets = [], []
    for batch in batches:
        rope = batch.rope_scores(spec.scale)
        parts = [sliced_slices(batch, rope, spec.scale, z, a) for z, a, _ in maps]
        slices.append(torch.cat(parts, -1).transpose(1, 2).flatten(0, 1))  # [B * Q, H, g * w]
        exact = exact_context(batch, rope, spec.scale)
        targets.append(head_outputs(exact, attention).flatten(0, 1) @ attention.o.T)
    return _Problem(torch.cat(slices), torch.cat(targets), attention.w_uv, o)
