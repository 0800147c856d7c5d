"""Ask plain MLA, the paper's recipe and an artifact questions about documents of ``recall_tasks``.

In one process a document's prompt is computed once, exactly; its questions and answers are then decoded by teacher
forcing through each method. Between two live deployments every question is a separate request: the prompt with the
earlier questions and answers, answered greedily.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import httpx
import msgspec
import torch

from sglang_tpla.evaluate.endpoints import TIMEOUT_S, ask, unusable
from sglang_tpla.evaluate.recall_tasks import KINDS, TaskDocument, make_document
from sglang_tpla.measure.corpus import Tokenizer
from sglang_tpla.reference_model.forward import LayerCache, LayerMaps, PlainModel

PLAIN = "plain MLA"


class RecallRow(msgspec.Struct, frozen=True):
    """One method's results on the documents of one kind and length.

    ``answered`` counts questions for which every token of the answer is the most likely one. ``plain`` counts the
    questions that plain MLA answers, and ``kept`` those of them that the method answers too. ``tokens_right`` counts
    the most likely ones among all ``tokens`` of answers.
    """

    method: str
    kind: str
    length: int
    questions: int
    answered: int
    plain: int
    kept: int
    tokens: int
    tokens_right: int


def documents(
    tokenizer: Tokenizer, filler: Sequence[str], lengths: Sequence[int], count: int, seed: int
) -> list[TaskDocument]:
    """Make ``count`` documents of each length, the kinds in turn."""
    found = []
    for length in lengths:
        for number in range(count):
            rng = random.Random(f"{seed}/{length}/{number}")
            found.append(make_document(tokenizer, filler, length, KINDS[number % len(KINDS)], rng))
    return found


@torch.inference_mode()
def first_tokens(
    model: PlainModel, document: TaskDocument, methods: Mapping[str, Sequence[LayerMaps | None]]
) -> dict[str, list[list[bool]]]:
    """Return whether each token of each answer is the most likely one, by method; plain MLA is one of them."""
    tokens = document.tokens.to(model.device)
    prompt = len(document.prompt)
    exact, cache = model.prefill(tokens)
    past = [LayerCache(layer.latent[:, :prompt], layer.k_rope[:, :prompt]) for layer in cache]
    hidden = {PLAIN: exact[0, prompt:]}
    for name, maps in methods.items():
        hidden[name] = model.hidden_states(tokens[:, prompt:], maps=list(maps), past=past)[0]
    found: dict[str, list[list[bool]]] = {}
    for name, states in hidden.items():
        found[name] = []
        for place in document.answer_places():
            wanted = tokens[0, place.start : place.stop]
            # The state before a token predicts it; states[0] is that of the first question's first token.
            chosen = model.logits(states[place.start - prompt - 1 : place.stop - prompt - 1]).argmax(-1)
            found[name].append((chosen == wanted).tolist())
    return found


def recall(
    model: PlainModel,
    methods: Mapping[str, Sequence[LayerMaps | None]],
    cases: Sequence[TaskDocument],
    progress: Callable[[int], object] = lambda done: None,
) -> list[RecallRow]:
    """Return the results of every method by kind and length, in one process."""
    results = []
    for document in cases:
        results.append((document, first_tokens(model, document, methods)))
        progress(1)
    return tally(results)


def tally(results: Sequence[tuple[TaskDocument, Mapping[str, Sequence[Sequence[bool]]]]]) -> list[RecallRow]:
    """Count by length, kind and method (PLAIN is one) whether each token of each answer is the most likely one."""
    sums: dict[tuple[int, str, str], list[int]] = {}
    for document, found in results:
        plain = [all(answer) for answer in found[PLAIN]]
        for method, answers in found.items():
            row = sums.setdefault((document.length, document.kind, method), [0] * 6)
            right = [all(answer) for answer in answers]
            counts = (
                len(right),
                sum(right),
                sum(plain),
                sum(ours and theirs for ours, theirs in zip(right, plain, strict=True)),
                sum(map(len, answers)),
                sum(map(sum, answers)),
            )
            for place, value in enumerate(counts):
                row[place] += value
    ordered = sorted(sums, key=lambda key: (key[0], KINDS.index(key[1])))
    return [RecallRow(method, kind, length, *sums[length, kind, method]) for length, kind, method in ordered]


def recall_endpoints(
    urls: Mapping[str, str],
    cases: Sequence[TaskDocument],
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> list[RecallRow]:
    """Return the results of live servers by name; PLAIN is one of them.

    Raises:
        EndpointError: a server is not there, refuses, or answers without token ids.
    """
    results = []
    with httpx.Client(timeout=TIMEOUT_S) as client:
        for document in cases:
            found: dict[str, list[list[bool]]] = {name: [] for name in urls}
            context = list(document.prompt)
            for question, answer in document.questions:
                context += question
                for name, url in urls.items():
                    given = _greedy(client, url, context, len(answer))
                    padded = [*given, *[-1] * len(answer)]
                    found[name].append([ours == theirs for ours, theirs in zip(padded, answer, strict=False)])
                context += answer
            results.append((document, found))
            progress(1)
    return tally(results)


def _greedy(client: httpx.Client, url: str, tokens: Sequence[int], new_tokens: int) -> list[int]:
    meta = ask(client, url, {"input_ids": list(tokens)}, new_tokens, ignore_eos=True)
    try:
        # every entry is [log-probability, token id, text or null]
        return [int(entry[1]) for entry in meta["output_token_logprobs"]]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise unusable(url, error) from error


def recall_table(rows: Sequence[RecallRow]) -> str:
    """Return the results as text: a line for each length and kind, a column for each method, and sums by length."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [f"{'length':>7} {'kind':<8}" + "".join(f" {method:>20}" for method in methods)]
    for length in dict.fromkeys(row.length for row in rows):
        here = [row for row in rows if row.length == length]
        for kind in (*dict.fromkeys(row.kind for row in here), "all"):
            cells = []
            for method in methods:
                ours = [row for row in here if row.method == method and kind in (row.kind, "all")]
                kept, plain = sum(row.kept for row in ours), sum(row.plain for row in ours)
                asked, answered = sum(row.questions for row in ours), sum(row.answered for row in ours)
                share = f"{kept} of {plain}" if method != PLAIN else f"{answered} of {asked}"
                cells.append(f" {share:>20}")
            lines.append(f"{length:>7} {kind:<8}" + "".join(cells))
    lines.append("plain MLA: of all questions asked; the others: of those that plain MLA answers")
    return "\n".join(lines)
