"""The CPU platform's prefill attention against PyTorch's own, chunk by chunk."""

import pytest
import torch


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_against_scaled_dot_product(engine, monkeypatch, heads: int, dtype: torch.dtype) -> None:
    from sglang_tpla.host.cpu import attention as cpu_attention

    monkeypatch.setattr(cpu_attention, "ROWS", 10)  # several blocks a chunk
    torch.manual_seed(heads)
    width, rope, slots = 24, 8, 200
    prefixes, counts = [0, 7, 31, 2], [5, 1, 13, 20]
    lengths = [p + c for p, c in zip(prefixes, counts, strict=True)]
    keys = torch.randn(slots, 1, width + rope, dtype=dtype)
    rows = torch.randperm(slots)[: 4 * 45].view(4, 45)
    query = torch.randn(sum(counts), heads, width + rope, dtype=dtype)
    out = torch.full((sum(counts), heads, width), float("nan"), dtype=dtype)
    cpu_attention.extend(
        None, None, query, out, keys, keys[..., :width], rows, torch.arange(4), torch.tensor(lengths),
        torch.tensor(prefixes), torch.tensor(counts), scaling=0.3, causal=True,
    )  # fmt: skip
    start = 0
    for row, (prefix, count, length) in enumerate(zip(prefixes, counts, lengths, strict=True)):
        k = keys[rows[row, :length], 0].float()
        mask = torch.arange(length) <= torch.arange(prefix, length)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[start : start + count].float().transpose(0, 1), k.expand(heads, -1, -1),
            k[:, :width].expand(heads, -1, -1), attn_mask=mask, scale=0.3,
        ).transpose(0, 1)  # fmt: skip
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[start : start + count].float(), expected, rtol=tolerance, atol=tolerance)
        start += count
