"""One attention layer on the ranks of a server, and the plain PyTorch formula that their sum must equal.

The formula is written from the paper's equations and uses whole weights, without sharding.
"""

import math
from types import SimpleNamespace

import torch

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


def formula(x, lengths, past, weights, views, yarn=True):
    """o = sum_i softmax(scale (q^nope W_UK key_i^T + q^R rope_i^T)) value_i W_UV W_O, for the last tokens of requests.

    x is [batch * new, hidden], and lengths count the new tokens; past has one (normed latents [n, d], rotated keys
    [n, rope]) a request, without the new tokens. ``views`` gives each group's (key, value, rope) of such latents and
    keys.
    """
    if "q_proj" in weights:
        q = x @ weights["q_proj"].T
    else:
        q = rms_norm(x @ weights["q_a_proj"].T, weights["q_a_layernorm"]) @ weights["q_b_proj"].T
    q = q.view(-1, HEADS, NOPE + ROPE)
    new = len(x) // len(lengths)
    positions = last_positions(lengths, new)
    q_rope = rotate(q[..., NOPE:], positions, yarn)
    kv = x @ weights["kv_a_proj_with_mqa"].T
    latent, k_rope = rms_norm(kv[:, :D], weights["kv_a_layernorm"]), rotate(kv[:, D:], positions, yarn)
    w_uk, w_uv = weights["kv_b_proj"].view(HEADS, NOPE + V, D).split((NOPE, V), dim=1)
    out = torch.zeros(len(x), HEADS, V)
    for t in range(len(x)):
        first, (old_latent, old_rope) = t - t % new, past[t // new]
        keys = torch.cat((old_latent, latent[first : t + 1]))
        ropes = torch.cat((old_rope, k_rope[first : t + 1]))
        absorbed = torch.einsum("hn,hnd->hd", q[t, :, :NOPE], w_uk)
        for key, value, rope in views(keys, ropes):
            score = softmax_scale(yarn) * (absorbed @ key.T + q_rope[t] @ rope.T)
            out[t] += torch.einsum("hd,hvd->hv", score.softmax(-1) @ value, w_uv)
    return out.flatten(1) @ weights["o_proj"].T


def last_positions(lengths, new):
    """Positions [batch * new] of the last tokens of each request."""
    return (torch.tensor(lengths)[:, None] - new + torch.arange(new)).flatten()


def random_step(lengths, generator, dtype=torch.float32, new=1):
    """New tokens [batch * new, hidden] and the past of each request, as `formula` takes them."""
    x = torch.randn(len(lengths) * new, HIDDEN, generator=generator).to(dtype).float()
    past = [
        (torch.randn(n - new, D, generator=generator), torch.randn(n - new, ROPE, generator=generator)) for n in lengths
    ]
    return x, past


def build_rank(rank, size, groups, artifact, weights, q_rank, yarn, dtype, monkeypatch, o_proj="replicate"):
    """Build SGLang's attention module of one rank by its own weight loaders; without an artifact the stock module."""
    from sglang.srt.models.deepseek_common.deepseek_weight_loader import DeepseekV2WeightLoaderMixin
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    from sglang_tpla.config import Layout
    from sglang_tpla.host.compat import attention_rank
    from sglang_tpla.host.model import attention_layer as layer
    from sglang_tpla.host.process import Slice

    part = Slice(Layout(size, groups, HEADS), rank, artifact) if artifact else None
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


def page_table(lengths):
    """Slots [batch, longest] of the requests' tokens, in random order."""
    count = len(lengths) * max(lengths)
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)).view(len(lengths), -1) + 1


def decode_step(attention, backend, x, lengths, slots, **options):
    """Run one decode step of one rank, or verify several new tokens a request; ``options`` go to its forward."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    batch, new = len(lengths), len(x) // len(lengths)
    positions = last_positions(lengths, new)
    known = torch.tensor(lengths) - (new if new > 1 else 0)  # SGLang leaves out the tokens that are being verified
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if new == 1 else ForwardMode.TARGET_VERIFY, batch_size=batch,
        input_ids=torch.zeros(len(x), dtype=torch.long), req_pool_indices=torch.arange(batch), seq_lens=known,
        out_cache_loc=slots[torch.arange(batch).repeat_interleave(new), positions], seq_lens_sum=int(known.sum()),
        positions=positions,
    )  # fmt: skip
    boundary = attention_boundary()
    inputs = boundary.AttentionInputs(x, forward_batch, attention.prepare_qkv_latent if attention.q_lora_rank else None)
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        boundary.get_attn_tp_context().set_attn_inputs(inputs)
        backend.init_forward_metadata(forward_batch)
        out = attention(positions, x, forward_batch, zero_allocator=None, **options)
        boundary.get_attn_tp_context().clear_attn_inputs()
    return out.float()
