"""Penalties of verified tokens, against SGLang's own penalizers, which see one token after another."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

VOCAB, GUESSES, PROMPT = 12, 3, 5
TOKENS = GUESSES + 1
NOTHING = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
# Parameters of each request of the batch; the last request reaches its minimum length within the chain in any case.
ASKED: list[dict[str, float]] = [
    {},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.4, "repetition_penalty": 1.6},
    {"frequency_penalty": 0.2, "presence_penalty": 0.3, "repetition_penalty": 0.5, "min_new_tokens": 100},
    {"min_new_tokens": 5},
]

pytestmark = pytest.mark.usefixtures("engine")


class Request:
    """The attributes of a request that penalizers read."""

    def __init__(self, said: list[int], asked: dict[str, float]) -> None:
        self.origin_input_ids, self.output_ids = [0] * PROMPT, said
        self.eos_token_ids = {4}  # 0.5.17 holds back no other ones
        self.sampling_params = SimpleNamespace(**{**NOTHING, **asked}, stop_token_ids={3})
        self.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=4)


@dataclasses.dataclass
class Info:
    """A batch's record of its requests' sampling."""

    acc_additive_penalties: torch.Tensor | None
    acc_scaling_penalties: torch.Tensor | None = None
    is_all_greedy: bool = True


class Batch(SimpleNamespace):
    """A batch of one step, with the requests' lengths in the cache, which lacks the last token of each request."""

    def __init__(self, reqs: list[Request], said: int) -> None:
        lengths = torch.full((len(reqs),), PROMPT + said - 1)
        mode = SimpleNamespace(is_idle=lambda: False)
        info = Info(torch.zeros(len(reqs), VOCAB))
        super().__init__(reqs=reqs, device="cpu", seq_lens=lengths, forward_mode=mode, sampling_info=info)


def one_by_one(req: Request, said: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Return one row of logits with SGLang's penalties after an answer that grew token by token."""
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
    from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

    class Alone:
        reqs, device = (req,), "cpu"

    kinds = ("FrequencyPenalizer", "PresencePenalizer", "RepetitionPenalizer", "MinNewTokensPenalizer")
    alone: Any = Alone()
    penalizers = BatchedPenalizerOrchestrator(VOCAB, alone, {getattr(penaltylib, "Batched" + kind) for kind in kinds})
    for token in said:
        penalizers.cumulate_output_tokens(torch.tensor([token]))
    result = logits[None].clone()
    penalizers.accumulate_additive_penalties(result)
    factors = penalizers.accumulate_scaling_penalties()
    if factors is not None:
        apply_scaling_penalties(result, factors)
    return result[0]


def penalised(batch: Batch, chains: torch.Tensor, logits: torch.Tensor, kept: tuple[int, ...] = (1,)) -> torch.Tensor:
    """Return the logits for SGLang's verification, which then keeps the tokens ``kept`` of the last request's chain."""
    from sglang_tpla.host import penalties

    info, output = batch.sampling_info, SimpleNamespace(next_token_logits=logits.clone().flatten(0, 1))
    seen = []
    predict = torch.full((len(batch.reqs), TOKENS), 11, dtype=torch.int32)
    index = torch.full((len(batch.reqs), TOKENS), -1, dtype=torch.int32)
    predict[-1, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    index[-1, : len(kept)] = torch.arange(len(kept)) + predict[:-1].numel()
    verified = predict.flatten(), (index >= 0).sum(1), index

    def original(verify_input: Any, batch: Any, logits_output: Any, mask: Any) -> Any:
        assert batch.sampling_info.acc_additive_penalties is None  # otherwise they would count twice
        assert batch.sampling_info.acc_scaling_penalties is None
        seen.append(logits_output.next_token_logits)
        return verified

    verify_input = SimpleNamespace(draft_token=chains.flatten())
    assert penalties.verify(original, verify_input, batch, output, None) is verified
    assert batch.sampling_info is info
    return seen[0].view_as(logits)


@pytest.mark.parametrize("seed", range(4))
def test_each_verified_token_is_penalised_for_all_before_it(seed: int) -> None:
    """The answer grows in three steps that keep one, four and two tokens."""
    torch.manual_seed(seed)
    reqs = [Request([int(torch.randint(VOCAB, ()))], asked) for asked in ASKED]
    for kept in (1, 4, 2):
        logits = torch.randn(len(reqs), TOKENS, VOCAB) * 3
        guesses = torch.randint(VOCAB, (len(reqs), GUESSES))
        chains = torch.cat((torch.tensor([[req.output_ids[-1]] for req in reqs]), guesses), dim=1)
        found = penalised(Batch(reqs, len(reqs[0].output_ids)), chains, logits)
        for i, place in itertools.product(range(len(reqs)), range(TOKENS)):
            said = [*reqs[i].output_ids, *chains[i, 1 : place + 1].tolist()]
            torch.testing.assert_close(found[i, place], one_by_one(reqs[i], said, logits[i, place]))
        for req, row in zip(reqs, guesses.tolist(), strict=True):
            req.output_ids += [*row, 1][:kept]


def test_a_step_that_was_not_read_yet_counts() -> None:
    """With overlap scheduling a request's answer lacks the tokens of the previous step; its length includes them."""
    torch.manual_seed(5)
    req = Request([6], {"frequency_penalty": 1.0, "min_new_tokens": 7})

    def check(length: int, before: list[int], chain: list[int], kept: tuple[int, ...]) -> None:
        logits = torch.randn(1, TOKENS, VOCAB)
        found = penalised(Batch([req], length), torch.tensor([chain]), logits, kept)
        for place in range(TOKENS):
            expected = logits[0, place].clone()
            for token in [*before, *chain[1 : place + 1]]:
                expected[token] -= 1
            if length + place < 7:
                expected[[3, 4]] = -torch.inf
            torch.testing.assert_close(found[0, place], expected)

    check(2, [6, 7], [7, 8, 9, 10], (8, 9, 2))  # decode's first step: only the chain tells of the token before
    req.output_ids += [7]
    check(5, [6, 7, 8, 9, 2], [2, 9, 0, 1], (9,))
    req.output_ids += [8, 9, 2]
    check(6, [6, 7, 8, 9, 2, 9], [9, 1, 1, 0], (1, 5))
    req.output_ids += [9, 1, 5]  # nothing is unread
    check(8, [6, 7, 8, 9, 2, 9, 1, 5], [5, 0, 0, 0], (2,))


def test_a_request_that_may_say_nothing_is_left_a_token() -> None:
    req = Request([1], {"min_new_tokens": 9})
    req.sampling_params.stop_token_ids = set(range(VOCAB))
    found = penalised(Batch([req], 1), torch.tensor([[1, 2, 3, 4]]), torch.randn(1, TOKENS, VOCAB))
    assert torch.isfinite(found).all()
