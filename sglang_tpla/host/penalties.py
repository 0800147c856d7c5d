"""Apply penalties and minimum lengths to requests whose guesses are verified, as without speculation.

SGLang penalises all tokens that a step verifies by the state of its penalizers before the step, and reports only the
last token of the step to them. So ``min_new_tokens`` would count steps, each of up to four tokens, and
``frequency_penalty``, ``presence_penalty`` and ``repetition_penalty`` would miss most of an answer. Here each verified
token has its own penalty, which counts the answer so far and the guesses before that token. The hook is around
``eagle_sample`` of ``sglang/srt/speculative/eagle_utils.py``; the formulas follow ``sglang/srt/sampling/penaltylib/``.

With overlap scheduling SGLang launches a step before it has read the previous one. The penalties then count the tokens
that the previous step's verification kept, which are on the device; without speculation, SGLang's penalties miss the
previous step's token.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from sglang_tpla.host.cpu.speculation import sample_or_verify
from sglang_tpla.host.requests.masks import open_closed_rows


@dataclasses.dataclass
class Answer:
    """A request's answer so far.

    Args:
        ends: mask [vocabulary] of the tokens that end the answer.
        counts: number of times that the answer holds each token, float32 [vocabulary].
        counted: number of the answer's tokens that ``counts`` has seen.
        step: tokens of the last step [tokens], and a mask of the tokens that its verification kept.
    """

    ends: torch.Tensor
    counts: torch.Tensor
    counted: int = 0
    step: tuple[torch.Tensor, torch.Tensor] | None = None


_answers: WeakKeyDictionary[Any, Answer] = WeakKeyDictionary()


def verify(
    original: Callable[..., Any], verify_input: Any, batch: Any, logits_output: Any, *rest: Any, **named: Any
) -> Any:
    """Hook around ``eagle_sample``: penalise each token, then verify; on a CPU no GPU kernel takes part."""
    on_cpu = torch.device(batch.device).type == "cpu"
    call = (lambda *args, **kwargs: sample_or_verify(original, *args, **kwargs)) if on_cpu else original
    info = batch.sampling_info
    if batch.forward_mode.is_idle() or info.acc_additive_penalties is None:
        return call(verify_input, batch, logits_output, *rest, **named)
    requests = len(batch.seq_lens)
    logits = logits_output.next_token_logits
    penalise(logits.view(requests, -1, logits.shape[-1]), verify_input.draft_token.view(requests, -1), batch)
    batch.sampling_info = dataclasses.replace(info, acc_additive_penalties=None, acc_scaling_penalties=None)
    try:
        verified = call(verify_input, batch, logits_output, *rest, **named)
    finally:
        batch.sampling_info = info
    predict, _, accept_index = verified  # [requests * tokens]; [requests, tokens], -1 after the last token that is kept
    tokens, kept = predict.long()[accept_index.long().clamp(min=0)], accept_index >= 0
    for i, req in enumerate(batch.reqs):
        if is_penalised(req.sampling_params):
            _answers[req].step = tokens[i], kept[i]
    return verified


def penalise(
    logits: torch.Tensor,  # [requests, tokens, vocabulary], changed in place
    chains: torch.Tensor,  # [requests, tokens], each request's guesses after its last token
    batch: Any,
) -> None:
    """Penalise the logits after each token of each chain as SGLang does where it decodes one token a step."""
    places = [i for i, req in enumerate(batch.reqs) if is_penalised(req.sampling_params)]
    if not places:
        return
    reqs = [batch.reqs[i] for i in places]
    rows = torch.tensor(places, device=logits.device)
    chains = chains[rows].long()

    def of(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]  # [penalised requests, 1]

    params = [req.sampling_params for req in reqs]
    frequency = of([one.frequency_penalty for one in params])
    presence = of([one.presence_penalty for one in params])
    repetition = of([one.repetition_penalty for one in params])
    least = of([one.min_new_tokens for one in params])
    # The cache holds all tokens but the last one.
    length = batch.seq_lens[rows].float()[:, None] + 1 - of([len(req.origin_input_ids) for req in reqs])
    answers = [answer_of(req, logits[0, 0]) for req in reqs]
    ends = torch.stack([answer.ends for answer in answers])
    counts = torch.stack([answer.counts for answer in answers])  # [penalised requests, vocabulary]
    unread = length > of([len(req.output_ids) for req in reqs])
    last_alone = torch.arange(chains.shape[1], device=logits.device) == 0
    steps = [answer.step or (chain, last_alone) for answer, chain in zip(answers, chains, strict=True)]
    tokens, kept = (torch.stack(part) for part in zip(*steps, strict=True))  # [penalised requests, tokens]
    counts.scatter_add_(1, tokens, (kept & unread).float())
    for place in range(chains.shape[1]):
        if place:
            counts.scatter_add_(1, chains[:, place : place + 1], torch.ones_like(frequency))
        said = counts > 0
        values = logits[rows, place].float() - frequency * counts - presence * said
        values = torch.where(ends & (length + place < least), -math.inf, values)
        scaled = torch.where(values < 0, values * repetition, values / repetition)
        logits[rows, place] = torch.where(said, scaled, values).to(logits.dtype)
    open_closed_rows(logits)


def is_penalised(params: Any) -> bool:
    """Return whether a request's logits depend on its answer so far."""
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )


def answer_of(req: Any, like: torch.Tensor) -> Answer:
    """Return a request's answer after counting the tokens since the last step; ``like`` is a row of logits."""
    answer = _answers.get(req)
    if answer is None:
        answer = _answers[req] = Answer(ending(req, like), torch.zeros_like(like, dtype=torch.float32))
    new = torch.tensor(list(req.output_ids[answer.counted :]), dtype=torch.int64).to(like.device)
    answer.counts.index_add_(0, new, torch.ones_like(new, dtype=torch.float32))
    answer.counted += len(new)
    return answer


def ending(req: Any, like: torch.Tensor) -> torch.Tensor:
    """Return a mask [vocabulary] of the tokens that end an answer."""
    tokenizer = req.tokenizer
    ids = {
        *(req.sampling_params.stop_token_ids or ()),
        *(req.eos_token_ids or ()),
        *(getattr(tokenizer, "additional_stop_token_ids", None) or ()),
        getattr(tokenizer, "eos_token_id", None),
    }
    found = torch.zeros_like(like, dtype=torch.bool)
    found[[token for token in ids if token is not None and token < len(like)]] = True
    return found
