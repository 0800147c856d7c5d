"""Chains of guesses on the CPU platform are compared with plain loops over Python lists."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.host.cpu import speculation

REQUESTS, GUESSES = 5, 3
TOKENS = GUESSES + 1


def verified(candidates: list[list[int]], said: list[list[int]]) -> list[list[int]]:
    """Return the tokens that each request's answer gains: right guesses, and the target's token after the last."""
    grown = []
    for guessed, right in zip(candidates, said, strict=True):
        kept = 0
        while kept < GUESSES and guessed[kept + 1] == right[kept]:
            kept += 1
        grown.append(right[: kept + 1])
    return grown


def filled() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the empty tensors that SGLang hands over."""
    return (
        torch.zeros(REQUESTS * TOKENS, dtype=torch.int32),
        torch.full((REQUESTS, GUESSES + 1), -1, dtype=torch.int32),
        torch.empty(REQUESTS, dtype=torch.int32),
    )


@pytest.mark.parametrize("seed", range(20))
def test_guesses_are_kept_up_to_the_first_wrong_one(seed: int) -> None:
    torch.manual_seed(seed)
    candidates, said = torch.randint(3, (2, REQUESTS, TOKENS))
    predicts, accept_index, accepted = speculation.verify_chain(
        pytest.fail, *filled(), candidates=candidates, target_predict=said
    )
    expected = verified(candidates.tolist(), said.tolist())
    assert [n + 1 for n in accepted.tolist()] == [len(tokens) for tokens in expected]
    for row, tokens in zip(accept_index.tolist(), expected, strict=True):
        assert row[len(tokens) :] == [-1] * (TOKENS - len(tokens))
        assert predicts[row[: len(tokens)]].tolist() == tokens
    last = torch.empty(REQUESTS, dtype=torch.int32)
    speculation.last_accepted(
        pytest.fail, predicts[accept_index.long()], accepted + 1, last, accept_index.shape[1], REQUESTS
    )
    assert last.tolist() == [tokens[-1] for tokens in expected]


def test_the_chain_is_laid_out_in_a_row() -> None:
    bonus, drafts, lengths = torch.tensor([7, 8]), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([10, 3])
    _, positions, index, following, siblings, tokens = speculation.build_chain(
        pytest.fail, bonus, None, None, drafts, lengths, 13, 1, GUESSES, TOKENS
    )
    assert positions.tolist() == [10, 11, 12, 13, 3, 4, 5, 6]
    assert index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert following.tolist() == [[1, 2, 3, -1]] * 2
    assert siblings.tolist() == [[-1] * TOKENS] * 2
    assert tokens.tolist() == [7, 1, 2, 3, 8, 4, 5, 6]


def test_slots_come_out_of_the_page_table() -> None:
    table = torch.arange(60, dtype=torch.int32).view(4, 15) + 100
    rows, starts = torch.tensor([3, 1]), torch.tensor([2, 9])
    found = speculation.extend_slots(pytest.fail, rows, table, starts, starts + 4, 2, 4, "cpu")
    assert found.tolist() == [147, 148, 149, 150, 124, 125, 126, 127] and found.dtype == torch.int64
    guessed = torch.empty(6, dtype=torch.int64)
    speculation.GuessSlots[(2,)](rows, table, starts, guessed, 15, 1, GUESSES)
    assert guessed.tolist() == [147, 148, 149, 124, 125, 126]
    speculation.reserve_slots(
        pytest.fail, rows, table, starts, starts + torch.tensor([1, 2]), torch.tensor([5, 6, 7]), 2
    )
    assert table[3, 2:4].tolist() == [5, 148] and table[1, 9:12].tolist() == [6, 7, 126]


def sample(probabilities: torch.Tensor, candidates: torch.Tensor, draws: int) -> list[list[int]]:
    """Verify one request's chain many times independently, and return the tokens that each adds."""
    predicts = torch.zeros(draws * TOKENS, dtype=torch.int32)
    index = torch.full((draws, TOKENS), -1, dtype=torch.int32)
    count = torch.empty(draws, dtype=torch.int32)
    speculation.sample_chain(
        predicts, index, count, candidates.expand(draws, TOKENS), probabilities.expand(draws, TOKENS, -1),
        torch.rand(draws, TOKENS), torch.rand(draws),
    )  # fmt: skip
    return [[int(predicts[i]) for i in row if i >= 0] for row in index.tolist()]


def test_sampled_tokens_have_the_targets_distribution() -> None:
    """A chi-squared test holds for the first token of 20,000 verifications, and for the second after a right guess."""
    torch.manual_seed(11)
    probabilities = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]]
    )
    candidates = torch.tensor([0, 2, 0, 3])  # guesses 2, 0, 3 after token 0
    drawn = sample(probabilities, candidates, 20_000)
    first = torch.bincount(torch.tensor([tokens[0] for tokens in drawn]), minlength=4)
    assert chi_squared(first, probabilities[0]) < 16.27  # exceeded once in a thousand, at three degrees of freedom
    second = torch.bincount(torch.tensor([tokens[1] for tokens in drawn if tokens[0] == 2]), minlength=4)
    assert chi_squared(second, probabilities[1]) < 16.27
    assert all(len(tokens) == 1 for tokens in drawn if tokens[0] != 2)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [(2, None, [0, 0, 3 / 7, 4 / 7]), (None, 0.65, [0, 0, 3 / 7, 4 / 7]), (3, 0.4, [0, 0, 0, 1.0])],
)
def test_only_the_likeliest_are_drawn(top_k: int | None, top_p: float | None, expected: list[float]) -> None:
    limits = [None if limit is None else torch.tensor([limit]) for limit in (top_k, top_p)]
    found = speculation.limited(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), *limits)
    torch.testing.assert_close(found, torch.tensor([expected]))


def chi_squared(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_nothing_is_compiled_on_a_cpu() -> None:
    assert not any(speculation.supports_triton(pytest.fail, name) for name in ("tpla", "triton", "torch_native"))


def test_the_draft_takes_the_targets_embedding() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Module()
            self.model.embed_tokens = torch.nn.Embedding(4, 2)
            self.lm_head = torch.nn.Linear(2, 4)

    model: Any = Model()
    embed, head = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.zeros(4, 2))
    speculation.share_embedding(pytest.fail, model, embed, head)
    assert model.model.embed_tokens.weight is embed and model.lm_head.weight is head


LOGITS = [2.0, -1.0, 4.0, 0.5]


def sampled_answer(**changes: Any) -> list[int]:
    """Return the answer of `sample_or_verify` to one sampling request of two guesses; it may change ``logits``."""
    logits = changes.pop("logits", torch.tensor([LOGITS] * 3))  # [drafted tokens, vocabulary]
    nothing = dict.fromkeys(("logit_bias", "top_ks", "top_ps"))
    info = {**nothing, "need_top_k_sampling": False, "need_top_p_sampling": False, "is_all_greedy": False}
    info |= {"temperatures": torch.ones(1, 1), **{key: value for key, value in changes.items() if key != "mask"}}
    batch = SimpleNamespace(
        sampling_info=SimpleNamespace(**info),
        forward_mode=SimpleNamespace(is_idle=lambda: False),
        seq_lens=torch.tensor([5]),
    )
    verify = SimpleNamespace(draft_token_num=3, max_tree_depth=3, draft_token=torch.tensor([0, 1, 1]))
    output = SimpleNamespace(next_token_logits=logits)
    predicts, count, index = speculation.sample_or_verify(None, verify, batch, output, changes.get("mask"))
    return [int(predicts[i]) for i in index[0, : int(count[0])].tolist()]


def test_a_grammar_beside_sampled_guesses_is_obeyed() -> None:
    """Only token 1 is allowed, so both guesses are kept, and the token after them is another 1."""

    def forbid(logits: torch.Tensor) -> None:
        logits[:, [0, 2, 3]] = float("-inf")

    for seed in range(20):
        torch.manual_seed(seed)
        assert sampled_answer(mask=SimpleNamespace(apply=forbid)) == [1, 1, 1]


def test_a_bias_counts_in_log_probabilities_as_well() -> None:
    """SGLang makes them of the logits that it verified, as of those that it samples from without speculation."""
    bias, logits = torch.tensor([[0.0, 3.0, -1e9, 0.0]]), torch.tensor([LOGITS] * 3)
    assert 2 not in sampled_answer(logits=logits, logit_bias=bias)
    assert torch.equal(logits, torch.tensor([LOGITS] * 3) + bias)
