"""Log-probabilities of a greedy answer's tokens: as a server said them, and as the plain PyTorch model has them."""

from collections.abc import Sequence

import torch

from sglang_tpla.reference_model.forward import LayerMaps, PlainModel
from tests.e2e.servers import Pair


def said_and_due(
    pair: Pair, model: PlainModel, ids: list[int], new_tokens: int, *candidates: Sequence[LayerMaps] | None
) -> tuple[torch.Tensor, ...]:
    """Return the server's values [new tokens], then the model's with each candidate's maps (None: plain MLA)."""
    _, answer = pair.generate(ids, new_tokens, return_logprob=True)
    said = answer["meta_info"]["output_token_logprobs"]
    tokens = torch.tensor([ids + [token for _, token, _ in said]])
    at = torch.arange(len(ids) - 1, tokens.shape[1] - 1)
    with torch.no_grad():
        outputs = [
            model.forward(tokens[:, :-1], maps=maps, prompt_tokens=len(ids)).log_softmax(-1) for maps in candidates
        ]
    due = (values[0, at, tokens[0, at + 1]] for values in outputs)
    return torch.tensor([value for value, *_ in said]), *due
