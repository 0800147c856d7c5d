"""Log-probabilities of named tokens beside requests that name none.

SGLang gathers a batch's values on the device, with an empty list for every request without ``token_ids_logprob``, and
then copies each entry as a tensor. So a batch in which only some requests name tokens ends the server.
"""

from __future__ import annotations

from typing import Any

import torch


def all_tensors(
    result: tuple[list[Any], list[Any]],
    logprobs: torch.Tensor,
    *args: Any,
    no_copy_to_cpu: bool = False,
    **kwargs: Any,
) -> tuple[list[Any], list[Any]]:
    """Hook after ``get_token_ids_logprobs_raw``: make tensors of entries without values too, which are copied."""
    values, tokens = result
    if no_copy_to_cpu:
        values = [logprobs.new_empty(0) if isinstance(entry, list) else entry for entry in values]
    return values, tokens
