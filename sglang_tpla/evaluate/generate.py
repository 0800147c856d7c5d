"""Plain MLA's own continuations, greedy or sampled, and how TPLA follows them.

Long answers are measured on text that the model wrote itself: plain MLA continues a prompt token by token,
then one teacher-forced pass through the slices gives TPLA's distribution at every position. As long as both
agree on the greedy token, TPLA would have written the same; the first disagreement is where a greedy TPLA
answer departs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.measure.decode_error import DecodeErrors, measure
from sglang_tpla.reference_model.forward import LayerCache, LayerMaps, PlainModel


@torch.inference_mode()
def generate(
    model: PlainModel,
    prompts: torch.Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> torch.Tensor:
    """Continue prompts [B, P] with plain MLA. Return [B, P + new_tokens]."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    hidden, cache = model.prefill(prompts.to(model.device))
    tokens = prompts.to(model.device)
    for _ in range(new_tokens):
        logits = model.logits(hidden[:, -1]).float()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
        grown: list[LayerCache] = []

        def keep(_layer: int, inputs, _out: torch.Tensor, grown: list[LayerCache] = grown) -> None:  # type: ignore[no-untyped-def]
            grown.append(LayerCache(inputs.latent, inputs.k_rope))

        hidden = model.hidden_states(chosen, past=cache, observer=keep)
        cache = grown
        progress(chosen.shape[0])
    return tokens.cpu()


@dataclass(frozen=True)
class LongAnswer:
    """Errors along plain MLA's continuations, and where a greedy TPLA answer would first depart.

    ``agreement_tokens`` [sequences]: tokens before the first different choice (all of them when none differs).
    """

    errors: DecodeErrors
    agreement_tokens: tuple[int, ...]


def long_answers(
    model: PlainModel,
    maps: Sequence[LayerMaps],
    prompts: torch.Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    progress: Callable[[int], object] = lambda done: None,
) -> LongAnswer:
    """Measure along plain MLA's continuations of prompts [B, P]."""
    text = generate(model, prompts, new_tokens, temperature=temperature, progress=progress)
    (errors,) = measure(model, text, [list(maps)], prompts.shape[1])
    agreement = []
    for row in errors.same_top:
        wrong = (~row).nonzero()
        agreement.append(int(wrong[0]) if len(wrong) else row.numel())
    return LongAnswer(errors, tuple(agreement))
