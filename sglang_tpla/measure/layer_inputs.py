"""The inputs for learning a layer's maps: exact latents and queries on calibration text, and sliced attention.

Sliced attention takes a few sampled queries and uses absorbed weights, as the decode kernels do.
Shapes: S tokens, H heads, d latent, n nope, e rope, g groups, w slice width, Q sampled queries of B sequences.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from sglang_tpla.reference_model.forward import Attention, AttentionInputs, PlainModel


@dataclass(frozen=True)
class Batch:
    """Some sequences and some of their queries.

    ``latent`` [B, S, d], ``k_rope`` [B, S, e], ``absorbed`` [B, H, Q, d] (queries times W_UK), ``q_rope``
    [B, H, Q, e], ``positions`` [B, Q].
    """

    latent: torch.Tensor
    k_rope: torch.Tensor
    absorbed: torch.Tensor
    q_rope: torch.Tensor
    positions: torch.Tensor

    def rope_scores(self, scale: float) -> torch.Tensor:
        """Return the rotary part of the scores, which slicing does not change, causally masked, [B, H, Q, S]."""
        scores = scale * (self.q_rope @ self.k_rope[:, None].transpose(-1, -2))
        keys = torch.arange(self.latent.shape[1], device=scores.device)
        hidden = keys[None, None] > self.positions[:, :, None]
        return scores.masked_fill(hidden[:, None], float("-inf"))


def sample(
    attention: Attention,
    inputs: AttentionInputs,
    generator: torch.Generator,
    *,
    sequences: int,
    queries: int,
    first_query: int,
) -> Batch:
    """Draw random sequences, and random positions of their queries from ``first_query`` (or the last token) on."""
    count, tokens = inputs.latent.shape[:2]
    device = inputs.latent.device
    picked = torch.randint(count, (sequences,), generator=generator).to(device)
    first = min(first_query, tokens - 1)
    positions = torch.randint(first, tokens, (sequences, queries), generator=generator).to(device)
    return batch_of(attention, inputs, picked, positions)


def batch_of(attention: Attention, inputs: AttentionInputs, picked: torch.Tensor, positions: torch.Tensor) -> Batch:
    """Return the sequences ``picked`` [B] and the queries at ``positions`` [B, Q]."""
    rows = picked[:, None]
    # [B, Q, H, .] -> [B, H, Q, .]
    q_nope, q_rope = (
        queries.transpose(1, 2)[rows, positions].transpose(1, 2) for queries in (inputs.q_nope, inputs.q_rope)
    )
    absorbed = torch.einsum("bhqn,hnd->bhqd", q_nope, attention.w_uk)
    return Batch(inputs.latent[picked], inputs.k_rope[picked], absorbed, q_rope, positions)


def walk(model: PlainModel, tokens: torch.Tensor) -> Iterator[tuple[int, AttentionInputs]]:
    """Yield the exact attention inputs of one layer after the other for tokens [N, S].

    Memory holds the hidden states of the text and the inputs of one layer, and the weights of one layer if the model
    reads layers on request.
    """
    with torch.no_grad():
        hidden = [model.embedding[part.to(model.device)] for part in tokens.split(4)]
    for index in range(model.spec.layers):
        with torch.no_grad():
            seen = [model.attention_inputs(index, part) for part in hidden]
            names = [field.name for field in fields(AttentionInputs)]
            columns = {name: torch.cat([getattr(inputs, name) for inputs in seen]) for name in names}
        yield index, AttentionInputs(**columns)
        with torch.no_grad():
            for place, inputs in enumerate(seen):
                out = model.layers[index].attention(inputs)
                hidden[place] = model.finish_layer(index, hidden[place], out)


def exact_context(
    batch: Batch,
    rope_scores: torch.Tensor,
    scale: float,
    *,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attended latents p c of exact attention, [B, H, Q, d], with other keys or values [B, S, d] if given."""
    keys, values = ((batch.latent if given is None else given)[:, None] for given in (key, value))
    scores = scale * (batch.absorbed @ keys.transpose(-1, -2)) + rope_scores
    return scores.softmax(-1) @ values


def sliced_slices(
    batch: Batch, rope_scores: torch.Tensor, scale: float, z_map: torch.Tensor, a_map: torch.Tensor
) -> torch.Tensor:
    """Return the attended slices p_i z_i of one group, [B, H, Q, w]."""
    z = (batch.latent @ z_map)[:, None]  # [B, 1, S, w]
    scores = scale * ((batch.absorbed @ a_map.T) @ z.transpose(-1, -2)) + rope_scores
    return scores.softmax(-1) @ z


def head_outputs(context: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Return the values of attended latents [B, H, Q, d], flattened over heads: [B, Q, H * v]."""
    values = torch.einsum("bhqd,hvd->bqhv", context, attention.w_uv)
    return values.flatten(2)
