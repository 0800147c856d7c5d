"""Plain MLA's own continuations, greedy or sampled, and how TPLA follows them.

Long answers are measured on text that the model wrote itself: plain MLA continues a prompt token by token, then one
teacher-forced pass through the slices gives TPLA's distribution at every position. As long as both agree on the greedy
token, TPLA would have written the same text; at the first disagreement, a greedy TPLA answer departs.
"""

from collections.abc import Callable, Sequence

import torch

from sglang_tpla.measure.decode_error import DecodeErrors, measure
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel


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
    """Continue prompts [B, P] with plain MLA, and return [B, P + new_tokens]."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    tokens = prompts.to(model.device)
    hidden, cache = model.prefill(tokens)
    for _ in range(new_tokens):
        logits = model.logits(hidden[:, -1]).float()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
        hidden, cache = model.prefill(chosen, cache)
        progress(chosen.shape[0])
    return tokens.cpu()


def long_answers(
    model: PlainModel,
    maps: Sequence[LayerMaps],
    prompts: torch.Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[DecodeErrors, tuple[int, ...]]:
    """Measure along plain MLA's continuations of prompts [B, P], and find where a greedy TPLA answer would depart.

    Returns:
        The errors, and for each sequence the number of tokens before the first different choice (all if none differs).
    """
    text = generate(model, prompts, new_tokens, temperature=temperature, progress=progress)
    (errors,) = measure(model, text, [list(maps)], prompts.shape[1])
    agreement = []
    for row in errors.same_top:
        wrong = (~row).nonzero()
        agreement.append(int(wrong[0]) if len(wrong) else row.numel())
    return errors, tuple(agreement)
