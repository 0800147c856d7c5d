"""The reference against the definition, computed token by token with Python numbers, and the reference's refusals."""

import math
import random

import pytest
import torch

from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable
from sglang_tpla.attention.reference import ReferenceDecode, latent_attention


def slow_attention(q, keys, values, scale):
    """Return softmax(scale * q . k) v for one query row, with exact sums."""
    scores = [scale * math.fsum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    return [math.fsum(w * v[i] for w, v in zip(weights, values, strict=True)) / total for i in range(len(values[0]))]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("query_len", [1, 3])
def test_reference_is_the_definition(page_size: int, query_len: int) -> None:
    torch.manual_seed(page_size * 10 + query_len)
    width, rope, heads, lengths = 5, 3, 2, [7, 1, 0, 12, 3]
    pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages) + 2)[: sum(pages)].to(torch.int32)
    indptr = torch.tensor([0, *pages]).cumsum(0).to(torch.int32)
    cache = torch.randn((sum(pages) + 2) * page_size, width + rope, dtype=torch.float64)
    q_latent = torch.randn(len(lengths) * query_len, heads, width, dtype=torch.float64)
    q_rope = torch.randn(len(lengths) * query_len, heads, rope, dtype=torch.float64)
    shape = DecodeShape(width, heads, rope, query_len, page_size, torch.float64)
    table = PageTable.from_csr(indptr, order, page_size)
    out = latent_attention(shape, q_latent, q_rope, cache, table, torch.tensor(lengths, dtype=torch.int32), 0.3)
    for request, length in enumerate(lengths):
        pages_of = order[indptr[request] : indptr[request + 1]].tolist()
        rows = [cache[pages_of[t // page_size] * page_size + t % page_size].tolist() for t in range(length)]
        for j in range(query_len):
            seen = rows[: max(0, length - query_len + 1 + j)]
            for head in range(heads):
                token = request * query_len + j
                got = out[token, head]
                if not seen:
                    assert not got.any()
                    continue
                query = q_latent[token, head].tolist() + q_rope[token, head].tolist()
                expected = slow_attention(query, seen, [row[:width] for row in seen], 0.3)
                torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_req_to_token_equals_csr() -> None:
    torch.manual_seed(0)
    shape = DecodeShape(32, 2, rope_dim=8, dtype=torch.float32)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    order = torch.randperm(13).to(torch.int32)
    req_to_token = torch.full((5, 10), 12, dtype=torch.int32)
    req_to_token[3, :4], req_to_token[1, :9] = order[:4], order[4:]
    inputs = torch.randn(2, 2, 32), torch.randn(2, 2, 8), torch.randn(13, 40)
    answers = []
    for table in (
        PageTable.from_csr(torch.tensor([0, 4, 13], dtype=torch.int32), order),
        PageTable.from_req_to_token(req_to_token, torch.tensor([3, 1])),
    ):
        backend = ReferenceDecode(shape, 0.2)
        backend.plan(table, lengths)
        answers.append(backend.run(*inputs))
    assert torch.equal(*answers)


def test_wrong_inputs_are_named() -> None:
    shape = DecodeShape(32, 2, rope_dim=8, dtype=torch.float32)
    backend = ReferenceDecode(shape, 1.0)
    with pytest.raises(RuntimeError, match="before plan"):
        backend.run(torch.zeros(1, 2, 32), torch.zeros(1, 2, 8), torch.zeros(4, 40))
    table = PageTable.from_csr(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    backend.plan(table, torch.tensor([1], dtype=torch.int32))
    with pytest.raises(AttentionInputError, match=r"kv_cache must be .*\[4, 40\].*got .*\[4, 48\]"):
        backend.run(torch.zeros(1, 2, 32), torch.zeros(1, 2, 8), torch.zeros(4, 48))
    with pytest.raises(AttentionInputError, match=r"q_latent must be torch.float32"):
        backend.run(torch.zeros(1, 2, 32).half(), torch.zeros(1, 2, 8), torch.zeros(4, 40))
    with pytest.raises(AttentionInputError, match="power of two"):
        DecodeShape(64, 8, page_size=3)
    with pytest.raises(AttentionInputError, match="query_len"):
        DecodeShape(64, 8, query_len=5)
    with pytest.raises(AttentionInputError, match="int32"):
        PageTable(torch.zeros(3), torch.zeros(1, dtype=torch.int32))


def test_scrambling_pages_changes_nothing() -> None:
    """The same tokens in other slots give the same answer."""
    dice = random.Random(1)
    torch.manual_seed(1)
    shape, rows = DecodeShape(16, 3, 8, dtype=torch.float32), torch.randn(20, 24)
    q_latent, q_rope = torch.randn(1, 3, 16), torch.randn(1, 3, 8)
    answers = []
    for _ in range(3):
        slots = dice.sample(range(50), 20)
        cache = torch.full((50, 24), float("nan"))
        cache[torch.tensor(slots)] = rows
        table = PageTable(torch.tensor(slots, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        answers.append(latent_attention(shape, q_latent, q_rope, cache, table, torch.tensor([20]), 0.25))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[2])
