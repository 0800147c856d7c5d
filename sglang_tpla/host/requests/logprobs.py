"""Log-probabilities of tokens that a request names (``token_ids_logprob``), on a decode server.

SGLang gathers a batch's values on the device, with an empty list for every request that names no tokens, and then
copies each entry as a tensor. So a batch in which only some requests name tokens ends the server.

Prefill sends no such values for the first token. Up to 0.5.19 decode leaves no place for them either, and cuts its
values by the number of tokens: each part of a streamed answer, and each fifty tokens of any other, then loses a value.
"""

from typing import Any

import torch


def all_tensors(
    result: tuple[list[Any], list[Any]], logprobs: torch.Tensor, *args: Any, no_copy_to_cpu: bool = False, **kwargs: Any
) -> tuple[list[Any], list[Any]]:
    """Hook after ``get_token_ids_logprobs_raw``: make a tensor of each entry without values too, for SGLang to copy."""
    values, tokens = result
    if no_copy_to_cpu:
        values = [logprobs.new_empty(0) if isinstance(entry, list) else entry for entry in values]
    return values, tokens


def keep_first_place(req: Any) -> None:
    """Leave an empty place for the first token of a request whose cache has come, where SGLang has left none."""
    if not req.return_logprob or req.logprob.token_ids_logprob is None:
        return
    logprob = req.logprob
    if len(logprob.output_token_ids_logprobs_val) < len(logprob.output_token_logprobs_val):
        logprob.output_token_ids_logprobs_val.append([])
        logprob.output_token_ids_logprobs_idx.append([])
