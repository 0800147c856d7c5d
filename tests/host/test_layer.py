"""The TPLA layer inside SGLang against the formula of `layer_ranks`.

Every rank of T is built from SGLang's own ``DeepseekV2AttentionMLA`` with the shards that its weight loaders cut; the
sum over ranks stands for the all-reduce after the block.
"""

from types import SimpleNamespace

import pytest
import torch

from sglang_tpla.calibrate.transforms import layer_maps
from sglang_tpla.measure.statistics import LayerMoments
from tests.host.engine_parts import cpu_pool
from tests.host.layer_artifacts import OneGroup, random_maps, views_of
from tests.host.layer_ranks import (
    HEADS,
    NOPE,
    Q_RANK,
    ROPE,
    D,
    V,
    build_rank,
    decode_step,
    formula,
    make_weights,
    page_table,
    random_step,
)


def calibrated_maps(transform: str, groups: int, weights, generator: torch.Generator):
    moments = LayerMoments.zeros(D, HEADS, NOPE)
    moments.update(torch.randn(500, D, generator=generator), torch.randn(500, HEADS, NOPE, generator=generator))
    w_uk = weights["kv_b_proj"].view(HEADS, NOPE + V, D)[:, :NOPE]
    shared = D // 4 if transform == "shared" and groups > 1 else 0
    return [
        tuple(part.float() for part in maps) for maps in layer_maps(transform, moments, w_uk, groups, shared, seed=0)
    ]


def run_rank(attention, x, lengths, past, z_map, dtype, **options):
    """Run one decode step of one rank over a pool that holds the projected past."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    slots = page_table(lengths)
    pool = cpu_pool(slots.numel() + 8, z_map.shape[1], ROPE, 1, dtype)
    for b, (latent, rope) in enumerate(past):
        rows = torch.cat((latent @ z_map, rope), dim=-1).to(dtype)
        pool.kv_buffer[0][slots[b, : len(rows)], 0] = rows
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=slots), token_to_kv_pool=pool)
    return decode_step(attention, TorchNativeAttnBackend(runner), x, lengths, slots, **options)


CASES = [
    # size, groups, transform, q_rank, yarn, lengths
    (1, 1, "random", Q_RANK, False, [7]),
    (1, 1, "identity", Q_RANK, True, [1, 13]),
    (2, 2, "identity", Q_RANK, False, [5, 1, 9]),
    (2, 2, "hadamard", Q_RANK, True, [17]),
    (2, 2, "pca", None, True, [3, 11, 2]),
    (2, 2, "shared", Q_RANK, True, [31, 1, 6, 8, 2]),
    (4, 2, "shared", None, False, [4, 4, 19]),
    (4, 4, "shared", Q_RANK, True, [23, 2, 1]),
    (4, 4, "pca", Q_RANK, True, [10]),
    (4, 4, "hadamard", None, True, [1, 2, 3, 4, 5, 6, 7]),
    (8, 4, "random", Q_RANK, True, [9, 14]),
    (4, 1, "identity", Q_RANK, True, [12, 5]),
    (4, 2, "random", Q_RANK, True, [15, 1, 2]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("size", "groups", "transform", "q_rank", "yarn", "lengths"), CASES)
def test_sum_over_ranks_is_the_formula(
    engine, monkeypatch, one_write, size, groups, transform, q_rank, yarn, lengths, dtype
) -> None:
    generator = torch.Generator().manual_seed(hash((size, groups, transform, yarn)) % 1000)
    weights = make_weights(q_rank, generator)
    if transform == "random":
        maps = random_maps(groups, 13 if groups == 1 else 11, generator)
    else:
        maps = calibrated_maps(transform, groups, weights, generator)
    if dtype == torch.bfloat16:  # both sides see weights that bf16 can hold
        weights = {name: w.bfloat16().float() for name, w in weights.items()}
    x, past = random_step(lengths, generator, dtype)
    expected = formula(x, lengths, past, weights, views_of(maps), yarn)

    total = torch.zeros_like(expected)
    for rank in range(size):
        attention = build_rank(rank, size, groups, OneGroup(maps), weights, q_rank, yarn, dtype, monkeypatch)
        assert attention.num_local_heads == HEADS * groups // size
        total += run_rank(attention, x.to(dtype), lengths, past, maps[rank % groups][0], dtype)

    error = (total - expected).norm() / expected.norm()
    assert error < (2e-5 if dtype == torch.float32 else 3e-2), f"relative error {error:.2e}"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_temperature_by_position_is_stocks(engine, monkeypatch, one_write, groups) -> None:
    """With ``llama_4_scaling``, stock SGLang's layer and ours over lossless maps agree."""
    generator = torch.Generator().manual_seed(groups)
    weights = make_weights(Q_RANK, generator)
    lengths = [21, 3, 9]
    scaling = 1 + 0.5 * torch.log1p(torch.floor(torch.tensor(lengths) / 4))[:, None, None]  # [tokens, 1, 1]
    x, past = random_step(lengths, generator)
    identity = torch.eye(D)
    stock_layer = build_rank(0, 1, 1, None, weights, Q_RANK, True, torch.float32, monkeypatch)
    stock = run_rank(stock_layer, x, lengths, past, identity, torch.float32, llama_4_scaling=scaling)
    plain = run_rank(stock_layer, x, lengths, past, identity, torch.float32)
    artifact = OneGroup([(identity, identity, identity / groups)] * groups)
    ours = sum(
        run_rank(
            build_rank(rank, groups, groups, artifact, weights, Q_RANK, True, torch.float32, monkeypatch),
            x, lengths, past, identity, torch.float32, llama_4_scaling=scaling,
        )
        for rank in range(groups)
    )  # fmt: skip
    assert (stock - plain).norm() / plain.norm() > 1e-3
    assert (ours - stock).norm() / stock.norm() < 2e-5
