"""The engine's backend around the decode kernel, with the kernel's PyTorch twin in its place.

The tests check the backend's own part: page table and lengths from SGLang's, new rows written before they are read,
fixed buffers for CUDA graphs, one kernel a width. The formula below knows neither pages nor plans.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.attention.interface import AttentionInputError, PageTable
from sglang_tpla.attention.reference import ReferenceDecode
from sglang_tpla.cache_rows.row_format import RowFormat
from tests.host.engine_parts import batch_of, stub_runner

HEADS, ROPE, CONTEXT, REQUESTS, SLOTS, SCALE = 4, 8, 24, 6, 200, 0.3
WIDTHS = (16, 24)  # of layers 0 and 1


class Twin(ReferenceDecode):
    """A PyTorch twin with the kernel's constructor, which remembers the addresses of its plans."""

    def __init__(self, shape: Any, scale: float, max_batch: int, device: torch.device) -> None:
        super().__init__(shape, scale)
        self.max_batch = max_batch
        self.addresses: set[tuple[int, int]] = set()

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        assert table.batch <= self.max_batch and lengths.dtype == torch.int32
        self.addresses.add((table.starts.data_ptr(), lengths.data_ptr()))
        super().plan(table, lengths)


class Pool:
    """Rows of two widths, written in both of SGLang's ways."""

    def __init__(self) -> None:
        self.rows = [torch.randn(SLOTS, 1, width + ROPE) for width in WIDTHS]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.rows[layer_id]

    def set_mla_kv_buffer(self, layer: Any, place: torch.Tensor, k: torch.Tensor, k_rope: torch.Tensor) -> None:
        self.rows[layer.layer_id][place] = torch.cat((k, k_rope), dim=-1)

    def set_kv_buffer(self, layer: Any, place: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.rows[layer.layer_id][place] = k


def runner_of(requests: Any, pool: Any, cache_dtype: torch.dtype, widths: tuple[int, ...]) -> Any:
    text = SimpleNamespace(kv_lora_rank=max(widths), num_hidden_layers=2)
    sizes = {"num_attention_heads": HEADS, "qk_rope_head_dim": ROPE, "hf_text_config": text}
    return stub_runner(requests, pool, cache_dtype, scaling=SCALE, **sizes)


@pytest.fixture
def backend(engine: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    from sglang_tpla.host.attention import backend as decode_attention

    monkeypatch.setattr(
        decode_attention.TplaDecodeBackend,
        "_kernel",
        lambda self, shape: Twin(shape, self._scale, self._max_batch, self._device),
    )
    rows = RowFormat.plain(WIDTHS, WIDTHS, ROPE)
    monkeypatch.setattr(decode_attention, "row_format", lambda *model: rows)
    torch.manual_seed(5)
    slots = torch.randperm(SLOTS - 1)[: REQUESTS * CONTEXT].view(REQUESTS, CONTEXT).to(torch.int32) + 1
    requests = SimpleNamespace(req_to_token=slots, size=REQUESTS)
    return decode_attention.TplaDecodeBackend(runner_of(requests, Pool(), torch.float32, WIDTHS))


def step_of(backend: Any, requests: list[int], lengths: list[int], padding: int = 0) -> Any:
    """Make a decode step, with SGLang's padding of a graph's batch: requests of row 0, length 1, slot 0."""
    slots = backend.req_to_token_pool.req_to_token
    place = [int(slots[r, n - 1]) for r, n in zip(requests, lengths, strict=True)] + [0] * padding
    fill = backend.get_cuda_graph_seq_len_fill_value()
    requests, lengths = requests + [0] * padding, lengths + [fill] * padding
    return batch_of("DECODE", requests, lengths, out_cache_loc=torch.tensor(place))


def step(backend: Any, batch: Any, layer_id: int, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one layer of a step with fresh queries and keys, and return the backend's output and the formula's."""
    width, tokens = WIDTHS[layer_id], batch.batch_size
    layer = SimpleNamespace(
        layer_id=layer_id, v_head_dim=width, head_dim=width + ROPE, tp_q_head_num=HEADS, scaling=SCALE
    )
    query, key = torch.randn(tokens, HEADS, width + ROPE), torch.randn(tokens, 1, width + ROPE)
    if split:
        q, q_rope = query[..., :width].transpose(0, 1).contiguous().transpose(0, 1), query[..., width:]
        out = backend.forward_decode(
            q, key[..., :width], key[..., :width], layer, batch, q_rope=q_rope, k_rope=key[..., width:]
        )
    else:
        out = backend.forward_decode(query, key, key[..., :width], layer, batch)
    slots, rows = backend.req_to_token_pool.req_to_token, backend.token_to_kv_pool.rows[layer_id]
    expected = []
    for i, (request, length) in enumerate(zip(batch.req_pool_indices, batch.seq_lens, strict=True)):
        past = rows[slots[request, :length].long(), 0].double()
        if batch.out_cache_loc[i]:
            assert torch.equal(past[-1], key[i, 0].double())  # written before it was read
        weights = (SCALE * (query[i].double() @ past.T)).softmax(-1)
        expected.append((weights @ past[:, :width]).flatten())
    return out, torch.stack(expected)


@pytest.mark.parametrize("split", [True, False], ids=["q-and-rope", "one-query"])
@pytest.mark.parametrize("layer_id", [0, 1])
def test_a_step_is_the_formula(backend: Any, layer_id: int, split: bool) -> None:
    for requests, lengths in (([3], [1]), ([5, 0, 2], [24, 7, 13]), ([1, 4], [2, 23])):
        batch = step_of(backend, requests, lengths)
        backend.init_forward_metadata(batch)
        out, expected = step(backend, batch, layer_id, split)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_replays_refill_the_buffers_that_a_graph_was_captured_with(backend: Any) -> None:
    backend.init_cuda_graph_state(max_bs=8, max_num_tokens=8)  # more than the pool has requests
    backend.init_forward_metadata_out_graph(step_of(backend, [], [], padding=4), in_capture=True)
    captured = [set(kernel.addresses) for kernel in backend._kernels.values()]
    for requests, lengths in (([0, 5], [9, 3]), ([2, 1, 4, 3], [24, 1, 8, 2])):
        batch = step_of(backend, requests, lengths, padding=4 - len(requests))
        backend.init_forward_metadata_out_graph(batch)
        out, expected = step(backend, batch, 0, True)
        real = len(requests)
        torch.testing.assert_close(out[:real].double(), expected[:real], rtol=1e-5, atol=1e-5)
    assert [kernel.addresses for kernel in backend._kernels.values()] == captured
    assert all(len(addresses) == 1 for addresses in captured)


def test_a_full_step_may_be_padded_beyond_the_pool(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention groups of four ranks pad six requests to eight in a step that no graph runs."""
    from sglang_tpla.host.attention import backend as decode_attention

    monkeypatch.setattr(decode_attention, "get_parallel", lambda: SimpleNamespace(attn_tp_size=4))
    pool = backend.req_to_token_pool, backend.token_to_kv_pool
    padded = decode_attention.TplaDecodeBackend(runner_of(*pool, torch.float32, WIDTHS))
    padded.init_forward_metadata_out_graph(step_of(padded, list(range(REQUESTS)), [5] * REQUESTS, padding=2))
    assert {kernel.max_batch for kernel in padded._kernels.values()} == {8}


def test_prompts_are_refused(backend: Any) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    with pytest.raises(AttentionInputError, match="--prefill-attention-backend"):
        backend.forward_extend(None, None, None, None, SimpleNamespace(forward_mode=ForwardMode.EXTEND))
