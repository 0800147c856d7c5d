"""Speculative decoding on the CPU reference platform: plain PyTorch where SGLang has kernels for GPUs and for AMX.

Only chains of guesses (``--speculative-eagle-topk 1``) are served, in which guess i + 1 follows guess i. Each function
hooks the one of the same purpose in ``sglang/srt/speculative/eagle_utils.py``, ``sglang/srt/mem_cache/allocation.py``
or ``sglang/kernels/ops/speculative/``.
"""

from collections.abc import Callable
from typing import Any

import torch


def supports_triton(original: Callable[[str], bool], backend: str) -> bool:
    """Hook around ``support_triton``: compile nothing on a CPU, with any attention backend."""
    return False


def build_chain(
    original: Callable[..., Any],
    bonus_tokens: torch.Tensor,  # [requests], the last verified token
    parent_list: Any,
    top_scores_index: Any,
    draft_tokens: torch.Tensor,  # [requests, guesses]
    seq_lens: torch.Tensor,  # [requests]
    seq_lens_sum: int,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, ...]:
    """Hook around ``build_tree_kernel_efficient``: make an unread mask, positions, links and tokens."""
    requests, tokens = seq_lens.numel(), num_verify_tokens
    place = torch.arange(tokens)
    following = torch.where(place + 1 < tokens, place + 1, -1)
    return (
        torch.ones(requests * tokens * tokens, dtype=torch.bool),
        (seq_lens[:, None] + place).flatten(),
        torch.arange(requests * tokens).view(requests, tokens),
        following.repeat(requests, 1),
        torch.full((requests, tokens), -1),
        torch.cat((bonus_tokens[:, None], draft_tokens), dim=1).flatten(),
    )


def verify_chain(
    original: Callable[..., Any],
    predicts: torch.Tensor,  # [requests * tokens] int32, filled
    accept_index: torch.Tensor,  # [requests, guesses + 1] int32, -1, filled for accepted tokens
    accept_token_num: torch.Tensor,  # [requests] int32, filled: accepted guesses
    candidates: torch.Tensor,  # [requests, tokens], each request's guesses after its last token
    target_predict: torch.Tensor,  # [requests, tokens]
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hook around ``verify_tree_greedy_func``: accept guesses up to the first that differs from the target's token."""
    right = (candidates[:, 1:] == target_predict[:, :-1]).int().cumprod(dim=1).sum(dim=1)  # [requests]
    return accept_chain(predicts, accept_index, accept_token_num, target_predict, right)


def accept_chain(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    said: torch.Tensor,  # [requests, tokens]: the token after each token of the chain
    accepted: torch.Tensor,  # [requests]: number of guesses that stay
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fill in ``accepted`` guesses and the target's token after them, as SGLang's kernels do."""
    requests, tokens = said.shape
    place = torch.arange(tokens)
    kept = place <= accepted[:, None]
    predicts.view(requests, tokens)[kept] = said[kept].to(predicts.dtype)
    index = torch.arange(requests * tokens).view(requests, tokens)
    accept_index.copy_(torch.where(kept, index, -1)[:, : accept_index.shape[1]])
    accept_token_num.copy_(accepted)
    return predicts, accept_index, accept_token_num


def sample_chain(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,  # [requests, tokens]
    probabilities: torch.Tensor,  # [requests, tokens, vocabulary]: the target's, after each token
    coins: torch.Tensor,  # [requests, tokens] in [0, 1): one for each guess
    last_coins: torch.Tensor,  # [requests] in [0, 1)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept each guess with the target's probability of it; at the first refusal, sample from all other tokens.

    Every token then has the target's distribution, whatever the guesses are.
    """
    requests, tokens = candidates.shape
    guesses = candidates[:, 1:, None].long()
    likely = probabilities[:, :-1].gather(2, guesses)[..., 0]  # [requests, guesses]
    accepted = (coins[:, : tokens - 1] < likely).int().cumprod(dim=1).sum(dim=1)
    rest = probabilities[torch.arange(requests), accepted].clone()  # [requests, vocabulary]
    refused = accepted < tokens - 1
    rest[refused, guesses[refused, accepted[refused], 0]] = 0
    cumulated = rest.cumsum(dim=-1)
    drawn = (cumulated <= last_coins[:, None] * cumulated[:, -1:]).sum(dim=-1).clamp_(max=rest.shape[1] - 1)
    said = torch.cat((candidates[:, 1:], candidates[:, :1]), dim=1).clone()
    said[torch.arange(requests), accepted] = drawn.to(said.dtype)
    return accept_chain(predicts, accept_index, accept_token_num, said, accepted)


def sample_or_verify(
    original: Callable[..., Any],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    grammar_mask: Any = None,
    *rest: Any,
    **named: Any,
) -> Any:
    """Replace ``eagle_sample`` for requests that sample, which SGLang verifies only with a GPU's kernels.

    The logits already contain the penalties (``host/penalties.py``).
    """
    info = batch.sampling_info
    if batch.forward_mode.is_idle() or info.is_all_greedy:
        return original(verify_input, batch, logits_output, grammar_mask, *rest, **named)
    drafts = verify_input.draft_token_num
    logits = logits_output.next_token_logits  # changed in place: log-probabilities are made of them afterwards
    if info.logit_bias is not None:
        logits.add_(info.logit_bias.repeat_interleave(drafts, dim=0))
    if grammar_mask is not None:
        grammar_mask.apply(logits)
    probabilities = limited(
        (logits.float() / info.temperatures.repeat_interleave(drafts, dim=0)).softmax(-1),
        info.top_ks.repeat_interleave(drafts, dim=0) if info.need_top_k_sampling else None,
        info.top_ps.repeat_interleave(drafts, dim=0) if info.need_top_p_sampling else None,
    )
    requests = len(batch.seq_lens)
    predicts = torch.zeros(requests * drafts, dtype=torch.int32)
    index = torch.full((requests, verify_input.max_tree_depth), -1, dtype=torch.int32)
    count = torch.empty(requests, dtype=torch.int32)
    candidates = verify_input.draft_token.view(requests, drafts)
    sample_chain(
        predicts,
        index,
        count,
        candidates,
        probabilities.view(requests, drafts, -1),
        torch.rand(requests, drafts),
        torch.rand(requests),
    )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for shared in (predicts, index, count):  # every rank draws, and all ranks take the draw of rank 0
            torch.distributed.broadcast(shared, src=0)
    return predicts, count + 1, index


def limited(
    probabilities: torch.Tensor,  # [rows, vocabulary]
    top_ks: torch.Tensor | None,  # [rows]
    top_ps: torch.Tensor | None,  # [rows]
) -> torch.Tensor:
    """Keep only the likeliest tokens: ``top_k`` of them, or as many as make up ``top_p`` of the probability."""
    ordered, places = probabilities.sort(dim=-1, descending=True)
    if top_ks is not None:
        ordered[torch.arange(ordered.shape[1]) >= top_ks[:, None]] = 0
    if top_ps is not None:
        before = ordered.cumsum(-1) - ordered
        ordered[before > top_ps[:, None] * ordered.sum(-1, keepdim=True)] = 0
    kept = torch.zeros_like(probabilities).scatter_(-1, places, ordered)
    return kept / kept.sum(-1, keepdim=True)


def last_accepted(
    original: Callable[..., None],
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Hook around ``fill_bonus_tokens_func``: fill in each request's last token."""
    place = torch.arange(batch_size) * accept_stride + accept_lens - 1
    bonus_tokens.copy_(accept_tokens.flatten()[place])


def _slots_from(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, starts: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the slots of ``count`` tokens of each request from ``starts`` on, flat."""
    columns = starts.long()[:, None] + torch.arange(count)
    return req_to_token[req_pool_indices.long()[:, None], columns].flatten().to(torch.int64)


def extend_slots(
    original: Callable[..., torch.Tensor],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> torch.Tensor:
    """Hook around ``assign_extend_cache_locs_func``: find the slots of the verified tokens' rows."""
    return _slots_from(req_to_token, req_pool_indices, start_offset, draft_token_num)


class GuessSlots:
    """Stands in for the kernel ``assign_draft_cache_locs_contiguous``, which finds the slots of the guesses' rows."""

    def __class_getitem__(cls, grid: Any) -> Callable[..., None]:
        return cls.assign

    @staticmethod
    def assign(
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        seq_lens: torch.Tensor,
        out_cache_loc: torch.Tensor,
        pool_len: int,
        topk: int,
        count: int,
        **positions: Any,
    ) -> None:
        """Fill in the slots of ``topk * count`` tokens of each request; 0.5.23 also asks for positions, on a GPU."""
        out_cache_loc.copy_(_slots_from(req_to_token, req_pool_indices, seq_lens, topk * count))


def reserve_slots(
    original: Callable[..., None],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Hook around ``assign_req_to_token_pool_func``: take slots for tokens ``start_offset`` up to ``end_offset``."""
    taken = 0
    for row, start, stop in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:stop] = out_cache_loc[taken : taken + stop - start].to(req_to_token.dtype)
        taken += stop - start


def share_embedding(original: Callable[..., None], self: Any, embed: Any, head: Any) -> None:
    """Hook around the draft's ``set_embed_and_head``: share both, without emptying a GPU's cache as SGLang does."""
    del self.model.embed_tokens.weight, self.lm_head.weight
    self.model.embed_tokens.weight, self.lm_head.weight = embed, head
