"""The TPLA layer inside SGLang against a plain PyTorch formula written from the paper's equations.

Every rank of T is built from SGLang's own ``DeepseekV2AttentionMLA`` with the shards that its weight loaders cut; the
sum over ranks is what the all-reduce after the block gives. The formula uses whole weights and no sharding.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sglang_tpla.calibrate.transforms import layer_maps
from sglang_tpla.measure.statistics import LayerMoments
from tests.host.engine_parts import attention_boundary

HIDDEN, HEADS, D, ROPE, NOPE, V, Q_RANK = 48, 8, 32, 16, 24, 20, 40
EPS = 1e-6
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip


def make_weights(q_rank: int | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Whole weights of one attention layer, [out, in], float32."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    weights = {
        "kv_a_proj_with_mqa": draw(D + ROPE, HIDDEN),
        "kv_b_proj": draw(HEADS * (NOPE + V), D),
        "o_proj": draw(HIDDEN, HEADS * V),
        "kv_a_layernorm": 1 + 0.3 * torch.randn(D, generator=generator),
    }
    if q_rank is None:
        return weights | {"q_proj": draw(HEADS * (NOPE + ROPE), HIDDEN)}
    return weights | {
        "q_a_proj": draw(q_rank, HIDDEN),
        "q_a_layernorm": 1 + 0.3 * torch.randn(q_rank, generator=generator),
        "q_b_proj": draw(HEADS * (NOPE + ROPE), q_rank),
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor, yarn: bool) -> torch.Tensor:
    """Interleaved rotary embedding [..., rope] with yarn as DeepSeek defines it; positions match x's first axis."""
    inverse = 10000.0 ** (-torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
    if yarn:

        def correction(rotations: float) -> float:
            return (
                ROPE * math.log(YARN["original_max_position_embeddings"] / (rotations * 2 * math.pi))
                / (2 * math.log(10000.0))
            )  # fmt: skip

        low = max(math.floor(correction(YARN["beta_fast"])), 0)
        high = min(math.ceil(correction(YARN["beta_slow"])), ROPE - 1)
        ramp = ((torch.arange(ROPE // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        inverse = inverse / YARN["factor"] * ramp + inverse * (1 - ramp)
    angle = positions.double()[:, None] * inverse  # [tokens, rope / 2]
    cos, sin = (t.view(len(positions), *[1] * (x.ndim - 2), -1) for t in (angle.cos(), angle.sin()))
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def softmax_scale(yarn: bool) -> float:
    mscale = 0.1 * YARN["mscale_all_dim"] * math.log(YARN["factor"]) + 1.0 if yarn else 1.0
    return (NOPE + ROPE) ** -0.5 * mscale * mscale


def formula(x, lengths, past, weights, maps, yarn):
    """o = sum_i (softmax(scale (q^nope W_UK A_i^T z_i^T + q^R k^R^T)) z_i) B_i W_UV W_O, one new token a request.

    x [batch, hidden]; past: one (normed latents [n, d], roped keys [n, rope]) a request, the new token not included.
    """
    if "q_proj" in weights:
        q = x @ weights["q_proj"].T
    else:
        q = rms_norm(x @ weights["q_a_proj"].T, weights["q_a_layernorm"]) @ weights["q_b_proj"].T
    q = q.view(-1, HEADS, NOPE + ROPE)
    positions = torch.tensor(lengths) - 1
    q_rope = rotate(q[..., NOPE:], positions, yarn)
    kv = x @ weights["kv_a_proj_with_mqa"].T
    latent, k_rope = rms_norm(kv[:, :D], weights["kv_a_layernorm"]), rotate(kv[:, D:], positions, yarn)
    w_uk, w_uv = weights["kv_b_proj"].view(HEADS, NOPE + V, D).split((NOPE, V), dim=1)
    out = torch.zeros(len(x), HEADS, V)
    for b, (old_latent, old_rope) in enumerate(past):
        keys = torch.cat((old_latent, latent[b : b + 1]))
        ropes = torch.cat((old_rope, k_rope[b : b + 1]))
        absorbed = torch.einsum("hn,hnd->hd", q[b, :, :NOPE], w_uk)
        for z_map, a_map, b_map in maps:
            z = keys @ z_map
            score = softmax_scale(yarn) * (absorbed @ a_map.T @ z.T + q_rope[b] @ ropes.T)
            out[b] += torch.einsum("hw,wd,hvd->hv", score.softmax(-1) @ z, b_map, w_uv)
    return out.flatten(1) @ weights["o_proj"].T


def random_maps(groups: int, width: int, generator: torch.Generator):
    return [
        tuple(
            torch.randn(*shape, generator=generator) / math.sqrt(D)
            for shape in ((D, width), (width, D), (width, D))
        )
        for _ in range(groups)
    ]


def calibrated_maps(transform: str, groups: int, weights, generator: torch.Generator):
    moments = LayerMoments.zeros(D, HEADS, NOPE)
    moments.update(
        torch.randn(500, D, generator=generator), torch.randn(500, HEADS, NOPE, generator=generator)
    )
    w_uk = weights["kv_b_proj"].view(HEADS, NOPE + V, D)[:, :NOPE]
    shared = D // 4 if transform == "shared" and groups > 1 else 0
    return [
        tuple(part.float() for part in maps)
        for maps in layer_maps(transform, moments, w_uk, groups, shared, seed=0)
    ]


class OneGroup:
    """Stands where the artifact does: the maps of one layer."""

    def __init__(self, maps) -> None:
        self._maps = maps
        self.meta = SimpleNamespace(sketched=False)

    def maps(self, layer: int, group: int):
        return self._maps[group]


def build_rank(rank, size, groups, maps, weights, q_rank, yarn, dtype, monkeypatch, o_proj="replicate"):
    """SGLang's attention module of one rank, weights loaded by its own loaders and folded; stock's without maps."""
    from sglang.srt.models.deepseek_common.deepseek_weight_loader import DeepseekV2WeightLoaderMixin
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    from sglang_tpla.config import Layout
    from sglang_tpla.host.compat import attention_rank
    from sglang_tpla.host.model import attention_layer as layer
    from sglang_tpla.host.process import Slice

    part = Slice(Layout(size, groups, HEADS), rank, OneGroup(maps)) if maps else None
    monkeypatch.setattr(layer, "make_slice", lambda heads, r, t: part)
    monkeypatch.setattr(layer, "settings", lambda: SimpleNamespace(o_proj=o_proj))
    monkeypatch.setattr(layer, "head_shard_ranks", lambda groups: None)
    config = SimpleNamespace(rms_norm_eps=EPS, rope_interleave=True, architectures=["DeepseekV3ForCausalLM"])
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with attention_rank(rank, size):
            attention = DeepseekV2AttentionMLA(
                config=config, hidden_size=HIDDEN, num_heads=HEADS, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
                v_head_dim=V, q_lora_rank=q_rank, kv_lora_rank=D, rope_theta=10000.0,
                rope_scaling=dict(YARN) if yarn else None, max_position_embeddings=256, reduce_results=False,
                layer_id=0, prefix="attn",
            )  # fmt: skip
    finally:
        torch.set_default_dtype(previous)
    parameters = dict(attention.named_parameters())
    fused = {"fused_qkv_a_proj_with_mqa.weight": ("q_a_proj", "kv_a_proj_with_mqa")}
    for name, parameter in parameters.items():
        names = fused.get(name, (name.removesuffix(".weight"),))
        full = torch.cat([weights[n] for n in names]).to(dtype)
        loader = getattr(parameter, "weight_loader", None)
        loader(parameter, full) if loader else parameter.data.copy_(full)
    assert "kv_a_layernorm.weight" in parameters

    class Holder(DeepseekV2WeightLoaderMixin, torch.nn.Module):
        pass

    holder = Holder()
    holder.model = torch.nn.Module()
    holder.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    holder.model.layers[0].self_attn = attention
    holder.model.start_layer, holder.model.end_layer = 0, 1
    holder.config, holder.quant_config = config, None
    holder.post_load_weights()
    return attention


def run_rank(attention, x, lengths, past, z_map, dtype, **options):
    """One decode step of one rank over a pool that holds the projected past; ``options`` go to the layer's forward."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    from sglang_tpla.host.cpu.pool import CpuLatentPool

    width, batch, longest = z_map.shape[1], len(x), max(lengths)
    pool = CpuLatentPool(
        batch * longest + 8, page_size=1, dtype=dtype, kv_lora_rank=width, qk_rope_head_dim=ROPE, layer_num=1,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    slots = (
        torch.randperm(batch * longest, generator=torch.Generator().manual_seed(1)).view(batch, longest) + 1
    )
    for b, (latent, rope) in enumerate(past):
        rows = torch.cat((latent @ z_map, rope), dim=-1).to(dtype)
        pool.kv_buffer[0][slots[b, : len(rows)], 0] = rows
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=slots), token_to_kv_pool=pool
    )
    backend = TorchNativeAttnBackend(runner)
    length = torch.tensor(lengths)
    positions = length - 1
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE, batch_size=batch, input_ids=torch.zeros(batch, dtype=torch.long),
        req_pool_indices=torch.arange(batch), seq_lens=length, out_cache_loc=slots[torch.arange(batch), positions],
        seq_lens_sum=sum(lengths), positions=positions,
    )  # fmt: skip
    boundary = attention_boundary()
    inputs = boundary.AttentionInputs(
        x, forward_batch, attention.prepare_qkv_latent if attention.q_lora_rank else None
    )
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        boundary.get_attn_tp_context().set_attn_inputs(inputs)
        backend.init_forward_metadata(forward_batch)
        out = attention(positions, x, forward_batch, zero_allocator=None, **options)
        boundary.get_attn_tp_context().clear_attn_inputs()
    return out.float()


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


@pytest.fixture(params=[False, True], ids=["separate", "one-write"])
def one_write(request, monkeypatch) -> bool:
    """Whether norm, projection and cache write are one step, as on a GPU; the kernel's twin stands for it."""
    if request.param:
        from sglang_tpla.attention.cache_write import reference
        from sglang_tpla.host.model import attention_layer as layer

        monkeypatch.setattr(layer, "puts_off", lambda latent: True)
        monkeypatch.setattr(layer, "write", reference.write)
    return request.param


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
    if dtype == torch.bfloat16:  # what both sides see is what bf16 can hold
        weights = {name: w.bfloat16().float() for name, w in weights.items()}
    x = torch.randn(len(lengths), HIDDEN, generator=generator).to(dtype).float()
    past = [
        (torch.randn(n - 1, D, generator=generator), torch.randn(n - 1, ROPE, generator=generator))
        for n in lengths
    ]
    expected = formula(x, lengths, past, weights, maps, yarn)

    total = torch.zeros_like(expected)
    for rank in range(size):
        attention = build_rank(rank, size, groups, maps, weights, q_rank, yarn, dtype, monkeypatch)
        assert attention.num_local_heads == HEADS * groups // size
        total += run_rank(attention, x.to(dtype), lengths, past, maps[rank % groups][0], dtype)

    error = (total - expected).norm() / expected.norm()
    assert error < (2e-5 if dtype == torch.float32 else 3e-2), f"relative error {error:.2e}"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_temperature_by_position_is_stocks(engine, monkeypatch, one_write, groups) -> None:
    """``llama_4_scaling`` of a model's config: stock's layer and ours over maps that lose nothing say the same."""
    generator = torch.Generator().manual_seed(groups)
    weights = make_weights(Q_RANK, generator)
    lengths = [21, 3, 9]
    scaling = 1 + 0.5 * torch.log1p(torch.floor(torch.tensor(lengths) / 4))[:, None, None]  # [tokens, 1, 1]
    x = torch.randn(len(lengths), HIDDEN, generator=generator)
    past = [
        (torch.randn(n - 1, D, generator=generator), torch.randn(n - 1, ROPE, generator=generator))
        for n in lengths
    ]
    identity = torch.eye(D)
    stock_layer = build_rank(0, 1, 1, None, weights, Q_RANK, True, torch.float32, monkeypatch)
    stock = run_rank(stock_layer, x, lengths, past, identity, torch.float32, llama_4_scaling=scaling)
    plain = run_rank(stock_layer, x, lengths, past, identity, torch.float32)
    one = (identity, identity, identity / groups)
    ours = sum(
        run_rank(
            build_rank(rank, groups, groups, [one] * groups, weights, Q_RANK, True, torch.float32, monkeypatch),
            x, lengths, past, identity, torch.float32, llama_4_scaling=scaling,
        )
        for rank in range(groups)
    )  # fmt: skip
    assert (stock - plain).norm() / plain.norm() > 1e-3
    assert (ours - stock).norm() / stock.norm() < 2e-5


@pytest.mark.parametrize(("size", "groups"), [(2, 2), (4, 2), (4, 4), (8, 4)])
def test_head_outputs_summed_before_o_proj(engine, monkeypatch, size, groups) -> None:
    """`--tpla-o-proj scatter`: ranks hold plain TP's part of ``o_proj``, and the sum over ranks is the formula.

    The ranks run one after another: what each would send is kept, and the reduce-scatter done here.
    """
    from sglang_tpla.host.model import attention_layer as layer

    generator = torch.Generator().manual_seed(size + groups)
    weights = make_weights(Q_RANK, generator)
    maps = random_maps(groups, 11, generator)
    lengths = [9, 4, 1]
    x = torch.randn(len(lengths), HIDDEN, generator=generator)
    past = [
        (torch.randn(n - 1, D, generator=generator), torch.randn(n - 1, ROPE, generator=generator))
        for n in lengths
    ]
    expected = formula(x, lengths, past, weights, maps, True)

    sent: list[torch.Tensor] = []  # [h, tokens, v] of each rank

    def keep(values: torch.Tensor, among: int) -> torch.Tensor:
        assert among == groups
        sent.append(values)
        return values[: len(values) // groups]

    monkeypatch.setattr(layer, "sum_over_groups", keep)
    projections = []
    for rank in range(size):
        args = (rank, size, groups, maps, weights, Q_RANK, True, torch.float32, monkeypatch, "scatter")
        attention = build_rank(*args)
        assert attention.o_proj.weight.shape == (HIDDEN, HEADS * V // size)
        run_rank(attention, x, lengths, past, maps[rank % groups][0], torch.float32)
        projections.append(attention.o_proj)
    total = torch.zeros_like(expected)
    for rank, o_proj in enumerate(projections):
        first = rank - rank % groups
        summed = torch.stack(sent[first : first + groups]).sum(0).chunk(groups)[rank % groups]
        total += o_proj(summed.transpose(0, 1).flatten(1))[0]
    assert (total - expected).norm() / expected.norm() < 2e-5
