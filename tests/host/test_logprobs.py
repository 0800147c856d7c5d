"""A batch in which one request asks for log-probabilities of named tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.host.requests.logprobs import all_tensors, keep_first_place


def test_a_batch_in_which_not_everyone_names_tokens(engine: None) -> None:
    """Every entry must be a tensor, because the scheduler then copies each one from the device."""
    from sglang.srt.layers.logprob_processor import LogprobStage, get_token_ids_logprobs_raw

    logprobs = torch.randn(3, 8).log_softmax(-1)
    asked: list[Any] = [None, [5, 2], None]
    for on_device in (True, False):
        known = {"stage": LogprobStage.DECODE, "no_copy_to_cpu": on_device}
        values, tokens = all_tensors(get_token_ids_logprobs_raw(logprobs, asked, **known), logprobs, asked, **known)
        assert tokens == [[], [5, 2], []]
        found = [entry.tolist() for entry in values] if on_device else values
        assert found == [[], logprobs[1, [5, 2]].tolist(), []]


@pytest.mark.parametrize(("named", "places"), [([5, 2], [[], [-1.0, -2.0]]), (None, [[-1.0, -2.0]])])
def test_the_first_token_has_a_place_without_values(named: list[int] | None, places: list[Any]) -> None:
    """Each value is at the place of its own token, however the answer is cut."""
    logprob = SimpleNamespace(
        token_ids_logprob=named,
        output_token_logprobs_val=[-0.5],
        output_token_ids_logprobs_val=[],
        output_token_ids_logprobs_idx=[],
    )
    req = SimpleNamespace(return_logprob=True, logprob=logprob)
    for _ in range(2):  # the second time there is a place
        keep_first_place(req)
    logprob.output_token_ids_logprobs_val.append([-1.0, -2.0])
    assert logprob.output_token_ids_logprobs_val == places
