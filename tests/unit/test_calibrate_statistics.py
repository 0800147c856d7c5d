"""Streamed statistics, and the text from which they come."""

import itertools
import os
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sglang_tpla.measure.corpus import Corpus, CorpusError, Document, load_tokenizer, sequences
from sglang_tpla.measure.statistics import LayerMoments, Statistics, StatisticsError, StatisticsMeta, combine
from sglang_tpla.measure.text import Text as CalibrationText
from sglang_tpla.measure.text import collect_statistics
from sglang_tpla.reference_model.forward import PlainModel
from tests.shipped import NANO


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 199), max_size=6), seed=st.integers(0, 1000))
def test_streamed_equals_batch(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(200, 6, generator=generator) + 3
    queries = torch.randn(200, 2, 4, generator=generator)
    edges = [0, *sorted(set(cuts)), 200]
    streamed = LayerMoments.zeros(6, 2, 4)
    for start, end in itertools.pairwise(edges):
        part = LayerMoments.zeros(6, 2, 4)
        part.update(latent[start:end], queries[start:end])
        streamed.merge(part)
    wide, wide_queries = latent.double(), queries.double()
    torch.testing.assert_close(streamed.mean, wide.mean(0))
    torch.testing.assert_close(streamed.covariance, torch.cov(wide.T, correction=0), atol=1e-10, rtol=1e-9)
    w_uk = torch.randn(2, 4, 6, generator=generator)
    absorbed = torch.einsum("thn,hnd->thd", wide_queries, w_uk.double()).flatten(0, 1)
    expected = absorbed.T @ absorbed / absorbed.shape[0]
    torch.testing.assert_close(streamed.absorbed_queries(w_uk), expected)


def test_collection_is_deterministic_and_does_not_grow(nano_model: PlainModel, tmp_path: Path) -> None:
    tokens = torch.randint(3, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    text = CalibrationText("toy", "hash", tokens, tokens[:0])
    first = collect_statistics(nano_model, text, 0, show_progress=False)
    again = collect_statistics(nano_model, text, 0, show_progress=False)
    assert first.tokens == 120
    first.save(tmp_path / "one")
    again.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    longer = CalibrationText("toy", "hash", tokens.repeat(4, 1), tokens[:0])
    collect_statistics(nano_model, longer, 0, show_progress=False).save(tmp_path / "three")
    assert (tmp_path / "three").stat().st_size == (tmp_path / "one").stat().st_size

    loaded = Statistics.load(tmp_path / "one")
    assert loaded.meta == first.meta
    for ours, theirs in zip(first.layers, loaded.layers, strict=True):
        assert torch.equal(ours.latent_outer, theirs.latent_outer)
        assert torch.equal(ours.query_outer, theirs.query_outer)
        assert ours.latent_count == theirs.latent_count


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(StatisticsError, match="expected a statistics file"):
        Statistics.load(path)
    path.write_bytes(b"\0" * 50)
    with pytest.raises(StatisticsError, match="not a readable"):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.latent_sum", (6, 1)),
        ("layers.0.query_outer", (2,)),
        ("layers.1.latent_outer", (3, 3)),
        ("layers.1.query_outer", (2, 4, 3)),
        ("layers.1.latent_count", (2,)),
        ("layers.0.query_count", ()),
    ],
)
def test_sums_of_other_sizes_are_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path, meta = tmp_path / "s", StatisticsMeta(1, "toy", "", "", "", "", 0)
    Statistics(meta, [LayerMoments.zeros(6, 2, 4), LayerMoments.zeros(6, 2, 4)]).save(path)
    assert len(Statistics.load(path).layers) == 2
    tensors = load_file(path) | {name: torch.full(shape, -1.0, dtype=torch.float64)}
    save_file(tensors, path, {"meta": msgspec.json.encode(meta).decode()})
    with pytest.raises(StatisticsError, match=r"to have the shape .* of layer 0 and counts of at least 0"):
        Statistics.load(path)


def test_ranks_of_servers_that_divide_the_heads_differently_are_refused() -> None:
    meta = StatisticsMeta(1, "toy", "", "", "", "", 0)
    parts = [Statistics(meta, [LayerMoments.zeros(6, heads, 4)]) for heads in (2, 4)]
    with pytest.raises(StatisticsError, match="of 2 and of 4 heads from 0 on cannot be put together"):
        combine(parts)


def test_split_is_disjoint_seeded_and_stable() -> None:
    corpus = Corpus.from_paths()
    calibration, held_out = corpus.split(1)
    names = {document.name for document in calibration}
    assert not names & {document.name for document in held_out}
    assert len(calibration) + len(held_out) == len(corpus.documents)
    assert 0.15 < len(held_out) / len(corpus.documents) < 0.35
    assert corpus.split(1) == (calibration, held_out)
    assert corpus.split(2)[1] != held_out
    assert Corpus.from_paths().content_hash == corpus.content_hash


def test_corpus_from_files(tmp_path: Path) -> None:
    lines = "".join(f"line {number}\n" for number in range(20000))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    corpus = Corpus.from_paths([tmp_path])
    assert all(document.name.startswith(f"{tmp_path.name}/a.txt#") for document in corpus.documents)
    assert "".join(document.text for document in corpus.documents) == lines
    calibration, held_out = corpus.split(0)
    assert calibration
    assert held_out
    with pytest.raises(CorpusError, match="found none"):
        Corpus.from_paths([tmp_path / "missing"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CorpusError, match="UTF-8"):
        Corpus.from_paths([tmp_path])


def test_a_file_named_twice_is_not_held_out_of_its_own_text(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for number in range(12):
        (tmp_path / "part" / f"{number}.txt").write_text(f"text of number {number}\n" * 20)
    (tmp_path / "again.txt").symlink_to(tmp_path / "part" / "3.txt")
    for paths in ([tmp_path, tmp_path / "part"], [tmp_path / "part", tmp_path / "part" / "7.txt"]):
        corpus = Corpus.from_paths(paths)
        assert len(corpus.documents) == 12
        for seed in range(5):
            calibration, held_out = corpus.split(seed)
            assert not {document.text for document in calibration} & {document.text for document in held_out}


def test_a_copy_is_not_held_out_of_its_own_text(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text of number {number % 20}\n" * 20)
    calibration, held_out = Corpus.from_paths([tmp_path]).split(0)
    assert len(calibration) == 30
    assert held_out and not {document.text for document in calibration} & {document.text for document in held_out}
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("one text\n" * 20)
    with pytest.raises(CorpusError, match="has 1 different document"):
        Corpus.from_paths([tmp_path]).split(0)


def test_a_folder_has_one_name_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names decide the split: evaluation of the folder where one is would measure on calibration text."""
    inside = tmp_path / "corpus" / "inside"
    inside.mkdir(parents=True)
    for number in range(16):
        (inside / f"{number}.txt").write_text(f"text of number {number}\n")
    monkeypatch.chdir(inside)
    assert Corpus.from_paths(["."]) == Corpus.from_paths([inside])
    assert Corpus.from_paths([".."]) == Corpus.from_paths([tmp_path / "corpus"])


def test_large_files_are_left_out_only_beside_enough_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_tpla.measure.corpus._LARGEST_FILE_BYTES", 1000)
    for number in range(16):
        (tmp_path / f"{number}.txt").write_text(f"large text {number}\n" * 100)
    assert len(Corpus.from_paths([tmp_path]).documents) == 16
    for number in range(16):
        (tmp_path / f"small{number}.txt").write_text(f"small text {number}\n")
    assert all("small" in document.name for document in Corpus.from_paths([tmp_path]).documents)


def test_a_file_that_is_given_is_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a folder may be skipped, but nobody would notice the loss of a file that the command names."""
    monkeypatch.setattr("sglang_tpla.measure.corpus._LARGEST_FILE_BYTES", 1000)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number}.txt").write_text(f"small text {number}\n")
    large, latin, binary = tmp_path / "large.txt", folder / "latin.txt", folder / "weights.bin"
    large.write_text("large text\n" * 100)
    latin.write_bytes("Grüße\n".encode("latin-1"))
    binary.write_bytes(b"\0" * 10)
    assert [document.name for document in Corpus.from_paths([large, folder]).documents].count("large.txt") == 1
    for path in (latin, binary):
        with pytest.raises(CorpusError, match=f"UTF-8 text in --corpus {path}"):
            Corpus.from_paths([large, path])


def test_one_long_line_is_divided(tmp_path: Path) -> None:
    text = "".join(f"word {number} of a text without line ends " for number in range(20000))
    (tmp_path / "line.txt").write_text(text)
    corpus = Corpus.from_paths([tmp_path / "line.txt"])
    assert "".join(document.text for document in corpus.documents) == text
    assert len(corpus.documents) == -(-len(text) // 32768)
    assert all(corpus.split(0))


def test_names_that_are_not_utf8_are_names(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for number in range(16):
        (folder / os.fsdecode(b"\xe9%d" % number)).write_text(f"text {number}\n")
    corpus = Corpus.from_paths([folder])
    assert (corpus.name, len(corpus.documents)) == ("caf\\udce9", 16)
    assert corpus.name.encode()


def test_sequences_join_documents_in_order() -> None:
    corpus = Corpus.from_paths()
    documents = corpus.split(0)[1][:3]
    tokenizer = load_tokenizer(NANO)
    found = sequences(documents, tokenizer, length=10, count=20, separator=1).flatten().tolist()
    expected: list[int] = []
    for document in documents:
        expected += [*tokenizer(document.text), 1]
    assert found == expected[:200]
    with pytest.raises(CorpusError, match="fewer tokens"):
        sequences(documents, tokenizer, length=1000, count=10**6, separator=1)


DOCUMENTS = [Document("a", "abcdefg"), Document("b", "hij")]  # 7 and 3 tokens, each followed by one separator


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
