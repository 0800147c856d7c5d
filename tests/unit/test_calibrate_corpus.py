"""How much text a corpus gives: exactly what was asked for, or what there is."""

import pytest
import torch

from sglang_tpla.measure.corpus import CorpusError, Document, sequences

DOCUMENTS = [Document("a", "abcdefg"), Document("b", "hij")]  # 7 and 3 tokens, one separator after each


def tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def cut(count: int, length: int, fewer: bool) -> torch.Tensor:
    return sequences(DOCUMENTS, tokens, length=length, count=count, separator=0, fewer=fewer)


def test_fewer_takes_the_whole_sequences_that_there_are() -> None:
    found = cut(5, 4, fewer=True)
    assert found.tolist() == [tokens("abcd"), [*tokens("efg"), 0], [*tokens("hij"), 0]]
    assert torch.equal(cut(2, 4, fewer=True), found[:2])


@pytest.mark.parametrize(("count", "length", "fewer"), [(4, 4, False), (1, 13, True)])
def test_too_little_text_is_refused_with_the_numbers(count: int, length: int, fewer: bool) -> None:
    with pytest.raises(CorpusError, match=rf"expected {count * length} tokens .* the corpus has 12"):
        cut(count, length, fewer)
