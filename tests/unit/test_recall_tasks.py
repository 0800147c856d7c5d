"""Documents with planted facts: questions ask for planted facts, sizes are as requested, and results add up."""

import random
import re
from pathlib import Path

import pytest

from sglang_tpla.evaluate.recall import PLAIN, recall_table, tally
from sglang_tpla.evaluate.recall_tasks import KINDS, make_document
from sglang_tpla.measure.corpus import Corpus, CorpusError, load_tokenizer
from tests.shipped import NANO


@pytest.fixture(scope="module")
def filler() -> list[str]:
    documents = Corpus.from_paths().split(0)[1][:40]
    return [line for document in documents for line in document.text.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_every_answer_is_said_once_and_the_length_is_kept(kind: str, length: int, filler: list[str]) -> None:
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(NANO)
    text = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    for seed in range(3):
        document = make_document(tokenizer, filler, length, kind, random.Random(seed))
        again = make_document(tokenizer, filler, length, kind, random.Random(seed))
        assert document == again
        assert 0.8 * length <= document.tokens.shape[1] <= length + 16
        prompt = text.decode(list(document.prompt))
        assert prompt.endswith("# checks\n")
        assert document.questions
        for (question, answer), place in zip(document.questions, document.answer_places(), strict=True):
            assert tuple(document.tokens[0, place.start : place.stop].tolist()) == answer
            asked = re.search(r"[a-z]+_[a-z]+", text.decode(list(question)))
            value = text.decode(list(answer)).removesuffix('"\n')
            assert asked is not None and value.isalnum()
            lines = prompt.splitlines()
            said = [at for at, line in enumerate(lines) if re.search(rf"\b{asked.group()}\b", line)]
            assert len(said) == 1
            assert f'"{value}"' in lines[said[0]] + lines[min(said[0] + 1, len(lines) - 1)]


def test_too_little_room_or_text_is_one_clear_error(filler: list[str]) -> None:
    tokenizer = load_tokenizer(NANO)
    with pytest.raises(CorpusError, match="no room"):
        make_document(tokenizer, filler, 20, "needle", random.Random(0))
    with pytest.raises(CorpusError, match="more to --corpus"):
        make_document(tokenizer, filler[:10], 1024, "needle", random.Random(0))
    with pytest.raises(CorpusError, match="needle, table, calls, many"):
        make_document(tokenizer, filler, 1024, "chain", random.Random(0))


def test_results_are_counted_against_what_plain_mla_answers(filler: list[str]) -> None:
    document = make_document(load_tokenizer(NANO), filler, 1024, "needle", random.Random(1))
    found = {PLAIN: [[True, True], [True, False], [True]], "mine": [[True, False], [True, True], [True]]}
    rows = {row.method: row for row in tally([(document, found), (document, found)])}
    assert (rows["mine"].questions, rows["mine"].answered, rows["mine"].plain, rows["mine"].kept) == (6, 4, 4, 2)
    assert (rows["mine"].tokens, rows["mine"].tokens_right) == (10, 8)
    assert (rows[PLAIN].answered, rows[PLAIN].kept) == (4, 4)
    table = recall_table(list(rows.values()))
    assert "4 of 6" in table and "2 of 4" in table


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "nothing"}}']
)
def test_a_damaged_tokenizer_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorpusError, match=r"tokenizer\.json is no tokenizer that can be read"):
        load_tokenizer(tmp_path)
