"""The decode layer with sketched rows inside SGLang's own attention module: T ranks together are the formula.

Every rank is built, loaded and folded as in a server, writes its new token's row and attends through the engine's
backend. The formula knows whole weights, and of a row only what the reference model says that it stands for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import GroupRows, RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

sys.path.insert(0, str(Path(__file__).parent))
import test_layer
from test_layer import (
    HEADS,
    HIDDEN,
    NOPE,
    Q_RANK,
    ROPE,
    D,
    V,
    attention_boundary,
    build_rank,
    make_weights,
    rms_norm,
    rotate,
    softmax_scale,
)


class SketchedArtifact:
    """Stands where the artifact does: the maps of one layer."""

    def __init__(self, maps: SketchedMaps) -> None:
        self._maps = maps
        self.meta = SimpleNamespace(sketched=True, rows=lambda layer: maps.rows)

    def maps(self, layer: int, group: int) -> tuple[torch.Tensor, ...]:
        return self._maps.z[group], self._maps.a[group], self._maps.b[group]

    def sketch(self, layer: int) -> torch.Tensor:
        return self._maps.sketch


def exact_maps(rows: SketchedRows, generator: torch.Generator) -> SketchedMaps:
    """Maps of a random basis that lose nothing but rounding; the sketch has scales of its own."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    r, n, g = rows.shared, rows.own, rows.groups
    shared, own = basis[:, :r], [basis[:, r + i * n : r + (i + 1) * n] for i in range(g)]
    scales = 0.5 + torch.rand(g * n, generator=generator)
    sketch = torch.cat(own, 1) * scales
    back = torch.cat(own, 1) / scales  # [d, g n]
    z = [torch.cat([shared, part], 1) for part in own]
    a = []
    for i in range(g):
        others = [back[:, j * n : (j + 1) * n] for j in range(g) if j != i]
        a.append(torch.cat([shared, own[i], *others], 1).T.contiguous())
    b = [torch.cat([shared / g, part], 1).T.contiguous() for part in own]
    return SketchedMaps(rows, z, sketch, a, b)


def formula(x: Any, lengths: Any, past: Any, weights: Any, maps: SketchedMaps) -> torch.Tensor:
    """One new token a request, through what each group's rows stand for, summed over the groups."""
    q = rms_norm(x @ weights["q_a_proj"].T, weights["q_a_layernorm"]) @ weights["q_b_proj"].T
    q = q.view(-1, HEADS, NOPE + ROPE)
    positions = torch.tensor(lengths) - 1
    q_rope = rotate(q[..., NOPE:], positions, True)
    kv = x @ weights["kv_a_proj_with_mqa"].T
    latent, k_rope = rms_norm(kv[:, :D], weights["kv_a_layernorm"]), rotate(kv[:, D:], positions, True)
    w_uk, w_uv = weights["kv_b_proj"].view(HEADS, NOPE + V, D).split((NOPE, V), dim=1)
    out = torch.zeros(len(x), HEADS, V)
    for request, (old_latent, old_rope) in enumerate(past):
        keys = torch.cat((old_latent, latent[request : request + 1]))
        ropes = torch.cat((old_rope, k_rope[request : request + 1]))
        absorbed = torch.einsum("hn,hnd->hd", q[request, :, :NOPE], w_uk)
        for view in maps.views(keys, ropes):
            score = absorbed @ view.key.T + q_rope[request] @ view.k_rope.T
            seen = (softmax_scale(True) * score).softmax(-1) @ view.value
            out[request] += torch.einsum("hd,hvd->hv", seen, w_uv)
    return out.flatten(1) @ weights["o_proj"].T


def run_rank(
    attention: Any, x: Any, lengths: Any, past: Any, kind: GroupRows, maps: SketchedMaps
) -> torch.Tensor:
    """One decode step of one rank over rows of its past tokens, through the backend of ``--attention-backend tpla``."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    batch, longest = len(x), max(lengths)
    cache = torch.full((batch * longest + 8, 1, kind.row_items), 255, dtype=torch.uint8)
    slots = (
        torch.randperm(batch * longest, generator=torch.Generator().manual_seed(1)).view(batch, longest) + 1
    )
    for request, (latent, rope) in enumerate(past):
        z = torch.cat([latent @ maps.z[kind.group], latent @ maps.sketch], 1)
        packed = torch.empty(len(latent), kind.row_items, dtype=torch.uint8)
        kind.encode(z, rope, Part.FULL, packed)
        cache[slots[request, : len(latent)], 0] = packed
    pool = SimpleNamespace(get_key_buffer=lambda layer_id: cache.view(torch.float8_e4m3fn))
    runner = SimpleNamespace(
        device="cpu", gpu_id=0, kv_cache_dtype=torch.float8_e4m3fn, token_to_kv_pool=pool, is_draft_worker=False,
        req_to_token_pool=SimpleNamespace(req_to_token=slots.to(torch.int32), size=batch),
        server_args=SimpleNamespace(speculative_algorithm=None),
        model_config=SimpleNamespace(
            scaling=attention.scaling, num_attention_heads=attention.num_local_heads, qk_rope_head_dim=ROPE,
            dtype=torch.float32, hf_text_config=SimpleNamespace(kv_lora_rank=D, num_hidden_layers=1),
        ),
    )  # fmt: skip
    backend = TplaDecodeBackend(runner)
    length = torch.tensor(lengths)
    positions = length - 1
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE, batch_size=batch, input_ids=torch.zeros(batch, dtype=torch.long),
        req_pool_indices=torch.arange(batch), seq_lens=length, out_cache_loc=slots[torch.arange(batch), positions],
        seq_lens_sum=sum(lengths), positions=positions,
    )  # fmt: skip
    boundary = attention_boundary()
    inputs = boundary.AttentionInputs(x, forward_batch, attention.prepare_qkv_latent)
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        boundary.get_attn_tp_context().set_attn_inputs(inputs)
        backend.init_forward_metadata(forward_batch)
        out = attention(positions, x, forward_batch, zero_allocator=None)
        boundary.get_attn_tp_context().clear_attn_inputs()
    return out.float()


@pytest.fixture(params=[False, True], ids=["separate", "one-write"])
def one_write(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether norm, projection and cache write are one step, as on a GPU; the kernel's twin stands for it."""
    if request.param:
        from sglang_tpla.host.model import attention_layer as layer

        monkeypatch.setattr(layer, "puts_off", lambda latent: True)
    return request.param


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (1, SketchedRows.of(D, 1, D, ROPE)),
        (2, SketchedRows.of(D, 1, D, ROPE)),
        (2, SketchedRows.of(D, 2, 8, ROPE)),
        (4, SketchedRows.of(D, 2, 8, ROPE, sketch_bits=2, rope_bits=8)),
        (4, SketchedRows.of(D, 4, 0, ROPE, sketch_bits=3)),
        (2, SketchedRows.of(D, 2, D, ROPE)),
    ],
    ids=str,
)
def test_sum_over_ranks_is_the_formula(
    engine: None, monkeypatch: pytest.MonkeyPatch, one_write: bool, size: int, rows: SketchedRows
) -> None:
    from sglang_tpla.host.attention import backend

    generator = torch.Generator().manual_seed(size)
    weights, lengths = make_weights(Q_RANK, generator), [31, 1, 6, 8]
    maps = exact_maps(rows, generator)
    monkeypatch.setattr(test_layer, "OneGroup", SketchedArtifact)
    x = torch.randn(len(lengths), HIDDEN, generator=generator)
    past = [
        (torch.randn(n - 1, D, generator=generator), torch.randn(n - 1, ROPE, generator=generator))
        for n in lengths
    ]
    expected = formula(x, lengths, past, weights, maps)
    total = torch.zeros_like(expected)
    for rank in range(size):
        kind = GroupRows(rows, rank % rows.groups)
        of_rank = RowFormat((kind,))
        monkeypatch.setattr(backend, "row_format", lambda *model, fp8, found=of_rank: found)
        attention = build_rank(
            rank, size, rows.groups, maps, weights, Q_RANK, True, torch.float32, monkeypatch
        )
        assert attention.num_local_heads == HEADS * rows.groups // size
        total += run_rank(attention, x, lengths, past, kind, maps)
    error = (total - expected).norm() / expected.norm()
    # the formula rounds in the same places; a code on the other side of a boundary moves little
    assert error < 2e-3, f"relative error {error:.2e}"
