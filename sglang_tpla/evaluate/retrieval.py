"""Retrieval from a long prompt: a value is planted at some depth, and a question at the end asks for it.

    filler ... `token_7f3a = "qk81zd"` ... filler ... `assert token_7f3a == "`  ->  qk81zd"

The prompt is exact; only the answer is decoded through slices, and there a sliced score would lose the needle. Plain
MLA's success is reported as well, since a small model may not retrieve at all.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

import msgspec
import torch

from sglang_tpla.measure.corpus import CorpusError, Tokenizer
from sglang_tpla.measure.decode_error import measure
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel

_LETTERS = ascii_lowercase + digits
_DEPTHS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Needle:
    """One case: the tokens of prompt and answer, and the needle's depth (0 start, 1 end)."""

    depth: float
    prompt_tokens: int
    tokens: torch.Tensor


class NeedleRow(msgspec.Struct, frozen=True):
    """The cases of one length and depth: the shares of right answers, and the KL a token of the answers."""

    prompt_tokens: int
    depth: float
    cases: int
    right_mla: float
    right_tpla: float
    same_top: float
    kl_mean: float


def make_needle(tokenizer: Tokenizer, filler: Sequence[int], length: int, depth: float, seed: int) -> Needle:
    """Make a prompt of ``length`` filler tokens with one planted assignment, and its answer.

    Raises:
        CorpusError: the filler is too short, or the length has no room for a needle.
    """
    rng = random.Random(seed)
    name = "token_" + "".join(rng.choices(_LETTERS, k=4))
    value = "".join(rng.choices(_LETTERS, k=8))
    needle = tokenizer(f'\n{name} = "{value}"\n')
    question = tokenizer(f'\nassert {name} == "')
    answer = tokenizer(value + '"')
    room = length - len(needle) - len(question)
    if room < 2:
        raise CorpusError(f"a prompt of {length} tokens has no room for a needle; take 64 or more")
    if len(filler) < room:
        raise CorpusError(f"expected {room} tokens of filler text, got {len(filler)}; give more to --corpus")
    start = rng.randrange(len(filler) - room + 1)
    body = list(filler[start : start + room])
    cut = int(depth * room)
    tokens = body[:cut] + needle + body[cut:] + question + answer
    return Needle(depth, length, torch.tensor(tokens, dtype=torch.long))


def needles(
    tokenizer: Tokenizer, filler: Sequence[int], lengths: Sequence[int], cases: int, seed: int
) -> list[list[Needle]]:
    """Make ``cases`` needles for each length and depth.

    Raises:
        CorpusError: the filler is too short, or a length has no room for a needle.
    """
    return [
        [make_needle(tokenizer, filler, length, depth, seed * 7919 + case) for case in range(cases)]
        for length in lengths
        for depth in _DEPTHS
    ]


def retrieval(
    model: PlainModel,
    maps: Sequence[LayerMaps],
    made: Sequence[Sequence[Needle]],
    progress: Callable[[int], object] = lambda done: None,
) -> list[NeedleRow]:
    """Return the results for every length and depth, over the needles of each."""
    results = []
    for same_place in made:
        right = {"mla": 0, "tpla": 0}
        kl: list[torch.Tensor] = []
        same: list[torch.Tensor] = []
        for needle in same_place:
            prompt = needle.prompt_tokens - 1  # the question's last token predicts the answer's first
            whole = needle.tokens[None, :-1]
            expected = needle.tokens[prompt + 1 :]
            (errors,) = measure(model, whole, [list(maps)], prompt)
            kl.append(errors.kl[0])
            same.append(errors.same_top[0].float())
            right["mla"] += torch.equal(errors.top_mla[0], expected)
            right["tpla"] += torch.equal(errors.top_tpla[0], expected)
            progress(1)
        results.append(
            NeedleRow(
                prompt_tokens=same_place[0].prompt_tokens,
                depth=same_place[0].depth,
                cases=len(same_place),
                right_mla=right["mla"] / len(same_place),
                right_tpla=right["tpla"] / len(same_place),
                same_top=torch.cat(same).mean().item(),
                kl_mean=torch.cat(kl).double().mean().item(),
            )
        )
    return results
