"""A batch in which one request asks for log-probabilities of named tokens."""

from __future__ import annotations

from typing import Any

import torch

from sglang_tpla.host.requests.logprobs import all_tensors


def test_a_batch_in_which_not_everyone_names_tokens(engine: None) -> None:
    """As the scheduler goes on: each entry is copied from the device."""
    from sglang.srt.layers.logprob_processor import LogprobStage, get_token_ids_logprobs_raw

    logprobs = torch.randn(3, 8).log_softmax(-1)
    asked: list[Any] = [None, [5, 2], None]
    for on_device in (True, False):
        known = {"stage": LogprobStage.DECODE, "no_copy_to_cpu": on_device}
        values, tokens = all_tensors(
            get_token_ids_logprobs_raw(logprobs, asked, **known), logprobs, asked, **known
        )
        assert tokens == [[], [5, 2], []]
        found = [entry.tolist() for entry in values] if on_device else values
        assert found == [[], logprobs[1, [5, 2]].tolist(), []]
