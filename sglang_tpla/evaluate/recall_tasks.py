"""Documents with facts planted in a text and questions at its end; a rank that sees only part of a score errs there.

A document is filler (lines of real text) with planted facts, then ``# checks``, then questions with their answers:

    needle   # the code of brave_otter is "58231"             # the code of brave_otter is "
    calls    def brave_otter():\\n    return "58231"           assert brave_otter() == "
    many     SETTINGS["brave_otter"] = "58231"                assert SETTINGS["brave_otter"] == "
    table    TABLE = {\\n    "brave_otter": "58231",\\n ...     assert TABLE["brave_otter"] == "

Needles are few and far between; the facts of other kinds are many and alike. Plain MLA computes the prompt, up to
``# checks``; questions and answers are decoded, so that every look-up happens in decode.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

import torch

from sglang_tpla.measure.corpus import CorpusError, Tokenizer

KINDS = ("needle", "table", "calls", "many")
_FIRST = """
    amber azure bold brave brisk calm clear cold crisp dark deep dry eager early fast fierce fine firm fresh gentle
    grand green happy hidden honest humble keen kind late light little lucky merry mild misty narrow neat noble old
    pale plain proud quick quiet rare rapid rich ripe round royal rusty safe sharp silent silver simple slow small
    smooth soft solid steep still strong sunny swift tall tame thick thin tiny tough vast warm wide wild wise young
""".split()  # noqa: SIM905
_SECOND = """
    anchor apple arrow badge basin beach bell bird boat bridge brook cabin candle canyon castle cave cliff cloud
    coast comet crane creek crown desert door dragon drum eagle ember falcon feather fern field flame flute forest
    fox frost garden gate glacier grove hammer harbor hawk hill island jewel kettle key lake lamp lantern leaf lion
    marsh meadow mirror moon mountain oak ocean orchard otter owl palace path pearl planet pond raven reef river
    road rose sail seed shadow shell ship shore snow spring star stone storm stream sun temple thunder tiger torch
    tower valley wolf
""".split()  # noqa: SIM905
_MOST_QUESTIONS = 24
# The least and the most facts of a document that has room for them, and the least tokens for each fact.
_FACTS = {"needle": (2, 12), "table": (8, 60), "calls": (4, 40), "many": (10, 60)}
_TOKENS_A_FACT = 60


@dataclass(frozen=True)
class TaskDocument:
    """A prompt and questions with their answers, all in tokens; joined in order, they are the document."""

    kind: str
    length: int
    prompt: tuple[int, ...]
    questions: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def tokens(self) -> torch.Tensor:
        """The whole document, [1, tokens]."""
        rest = [token for question, answer in self.questions for token in (*question, *answer)]
        return torch.tensor([[*self.prompt, *rest]], dtype=torch.long)

    def answer_places(self) -> list[range]:
        """Return the places of each answer's tokens in the document."""
        places, at = [], len(self.prompt)
        for question, answer in self.questions:
            at += len(question)
            places.append(range(at, at + len(answer)))
            at += len(answer)
        return places


def make_document(
    tokenizer: Tokenizer, filler: Sequence[str], length: int, kind: str, rng: random.Random
) -> TaskDocument:
    """Make a document of at most ``length`` tokens, and not many fewer.

    Args:
        filler: lines of text, more than the document takes.
        kind: one of ``KINDS``.

    Raises:
        CorpusError: the filler is too short, or the length has no room for a question.
    """
    if kind not in KINDS:
        raise CorpusError(f"expected a kind of document among {', '.join(KINDS)}, got {kind!r}")
    least, most = _FACTS[kind]
    count = max(min(rng.randint(least, most), length // _TOKENS_A_FACT), 1)
    names, values = _names(rng, count), [_value(rng) for _ in range(count)]
    asked = rng.sample(range(count), min(count, _MOST_QUESTIONS))
    facts, questions = _wording(kind, names, values, asked)
    sized_questions = tuple((tuple(tokenizer(q)), tuple(tokenizer(a))) for q, a in questions)
    ending = tokenizer("\n\n# checks\n")
    room = length - len(ending) - sum(len(q) + len(a) for q, a in sized_questions)
    room -= sum(len(tokenizer(fact + "\n")) for fact in facts)
    if room < 0:
        raise CorpusError(f"a document of {length} tokens has no room for {count} facts; take 512 or more")
    lines = _filler(tokenizer, filler, room, rng)
    ends = len(lines) + 1
    places = [rng.randrange(ends)] * len(facts) if kind == "table" else [rng.randrange(ends) for _ in facts]
    for place, fact in sorted(zip(places, range(len(facts)), strict=True), reverse=True):
        lines.insert(place, facts[fact])
    # The joined text may give a few more tokens than its lines did.
    prompt = tokenizer("\n".join(lines))
    return TaskDocument(kind, length, (*prompt, *ending), sized_questions)


def _wording(
    kind: str, names: Sequence[str], values: Sequence[str], asked: Sequence[int]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the facts in the order in which they are planted, and questions with answers."""
    pairs = list(zip(names, values, strict=True))
    match kind:
        case "needle":
            facts = [f'# the code of {name} is "{value}"' for name, value in pairs]
            questions = [f'# the code of {names[index]} is "' for index in asked]
        case "calls":
            facts = [f'def {name}():\n    return "{value}"' for name, value in pairs]
            questions = [f'assert {names[index]}() == "' for index in asked]
        case "many":
            facts = [f'SETTINGS["{name}"] = "{value}"' for name, value in pairs]
            questions = [f'assert SETTINGS["{names[index]}"] == "' for index in asked]
        case _:
            facts = ["TABLE = {", *(f'    "{name}": "{value}",' for name, value in pairs), "}"]
            questions = [f'assert TABLE["{names[index]}"] == "' for index in asked]
    return facts, [(question, f'{values[index]}"\n') for question, index in zip(questions, asked, strict=True)]


def _names(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{rng.choice(_FIRST)}_{rng.choice(_SECOND)}"] = None
    return list(found)


def _value(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choices(digits, k=rng.randint(4, 8)))
    return "".join(rng.choices(ascii_lowercase + digits, k=rng.randint(5, 8)))


def _filler(tokenizer: Tokenizer, filler: Sequence[str], room: int, rng: random.Random) -> list[str]:
    """Return successive lines of ``room`` tokens at most."""
    at, used = rng.randrange(max(len(filler) // 2, 1)), 0
    lines: list[str] = []
    while at < len(filler):
        used += len(tokenizer(filler[at] + "\n"))
        if used > room:
            return lines
        lines.append(filler[at])
        at += 1
    raise CorpusError(f"expected more than {room} tokens of filler text, got {used}; give more to --corpus")
