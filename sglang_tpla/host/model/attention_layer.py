"""TPLA decode layers inside SGLang's DeepSeek models (V2, V3, Kimi K2).

Rank t keeps group ``t % g``'s slice of the latent and computes the heads of shard ``t // g``:

    z_i = RMSNorm(c) Z_i;   p_i = softmax(scale (q W_UK A_i^T z_i^T + q^R k^R^T));   o_i = (p_i z_i) B_i W_UV W_O

The all-reduce after the attention block, which SGLang does anyway, adds the o_i over groups and head shards. A_i and
B_i are folded into the absorbed weights (``w_kc`` [h, qk_nope, d] -> [h, qk_nope, w], ``w_vc`` [h, d, v] -> [h, w, v]),
so the layer runs SGLang's own absorbed path with w in the place of d. Sketched rows add the sketch's columns to
``w_kc`` alone. With ``--tpla-o-proj scatter`` the p_i z_i B_i W_UV are summed over groups before W_O
(`head_reduce_scatter`). The hooks follow ``DeepseekV2AttentionMLA`` of ``sglang/srt/models/deepseek_v2.py``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
from sglang.srt.runtime_context import get_parallel
from torch import nn

from sglang_tpla.artifact.fold import fold_key_map, fold_value_map
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.write import write
from sglang_tpla.host.attention.supported import OURS
from sglang_tpla.host.compat import attention_rank, attention_share
from sglang_tpla.host.model.draft_model import building_draft
from sglang_tpla.host.model.head_reduce_scatter import head_shard_ranks, sum_over_groups
from sglang_tpla.host.model.rows import layer_maps
from sglang_tpla.host.process import make_slice, settings
from sglang_tpla.transfer.memory.projection import project_latent


class SlicedNorm(nn.Module):
    """SGLang's latent norm followed by the projection to this rank's slice: ``[..., d] -> [..., w]``.

    The norm sees the whole latent, so it is exact. ``weight`` is the norm's own parameter under its own name, so the
    checkpoint loads as before. Where one kernel writes the rows, both steps are deferred: the raw latent goes on to
    `absorbed_core`, which knows the rows' places.
    """

    z: torch.Tensor | None  # [d, w] float32; None where it is the identity (g = 1) and needs no product

    def __init__(self, norm: Any, z: torch.Tensor, wide: bool) -> None:
        """Wrap SGLang's norm; ``wide`` keeps slices in float32, for a cache that does its own rounding."""
        super().__init__()
        self._wide = wide
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon
        self._norm = (norm,)  # a tuple, because a submodule would list the weight twice
        whole = z.shape[0] == z.shape[1] and torch.equal(z, torch.eye(len(z), device=z.device))
        self.register_buffer("z", None if whole else z.to(norm.weight.device), persistent=False)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Norm and project the latent, or return it unchanged where both steps are deferred."""
        return latent if defers(latent) else self.project(latent)

    def project(self, latent: torch.Tensor) -> torch.Tensor:
        normed = self._norm[0](latent)
        if self._wide:
            normed = normed.to(torch.float32)
        return normed if self.z is None else project_latent(normed, self.z)


class DeferredRotation(nn.Module):
    """SGLang's rotary embedding, deferred to `absorbed_core` where one kernel rotates and writes the rows."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query and key, or return both unchanged where rotation is deferred."""
        return (query, key) if defers(key) else self.rotary(positions, query, key)


def defers(latent: torch.Tensor) -> bool:
    """Return whether norm, projection and rotation wait for the cache write, whose kernel needs a GPU."""
    return latent.is_cuda


def build_attention(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Hook around ``DeepseekV2AttentionMLA.__init__``: build for head shards and for the slice's width."""
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    parallel = get_parallel()
    part = make_slice(given["num_heads"], parallel.attn_tp_rank, parallel.attn_tp_size)
    self.tpla = None
    if part is None or building_draft():
        original(self, *args, **kwargs)
        return
    shard, shards = part.layout.head_shard_of(part.rank), part.layout.head_shards
    # The linear layers and the head count take this shard as their rank, so that g ranks hold the same heads.
    with attention_rank(shard, shards):
        original(self, *args, **kwargs)
    maps = layer_maps(part, self.layer_id, self.kv_lora_rank, self.qk_rope_head_dim)
    self.tpla = maps
    self.tpla_width = len(maps.value_map)
    self.tpla_summed_groups = part.layout.groups if settings().o_proj == "scatter" else 1
    if self.tpla_summed_groups > 1:
        head_shard_ranks(self.tpla_summed_groups)
        self.o_proj = RowParallelLinear(
            self.num_heads * self.v_head_dim,
            self.hidden_size,
            bias=False,
            quant_config=given["quant_config"],
            reduce_results=given["reduce_results"],
            prefix=f"{given['prefix']}.o_proj",
            **attention_share(),
        )
    self.kv_a_layernorm = SlicedNorm(self.kv_a_layernorm, maps.projection, wide=maps.rows is not None)
    if self.rotary_emb is not None:
        self.rotary_emb = DeferredRotation(self.rotary_emb)
    self.attn_mqa = RadixAttention(
        self.num_local_heads,
        len(maps.key_map) + self.qk_rope_head_dim,
        self.scaling,
        num_kv_heads=1,
        layer_id=self.layer_id,
        v_head_dim=self.tpla_width,
        quant_config=given["quant_config"],
        prefix=f"{given['prefix']}.attn_mqa",
    )


def absorbed_only(original: Callable[..., Any], self: Any, forward_batch: Any) -> Any:
    """Hook around ``dispatch_attn_forward_method``: absorb every batch, because a slice has no per-head keys."""
    method = original(self, forward_batch)
    return method if self.tpla is None else AttnForwardMethod.MLA


def fold_weights(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Hook around ``post_load_weights``: fold the maps into SGLang's ``w_kc`` and ``w_vc`` [.., d, ..]."""
    sliced = [
        module for module in self.modules() if getattr(module, "tpla", None) is not None and hasattr(module, "w_kc")
    ]
    folded = [(module.w_kc, module.w_vc) for module in sliced]
    for module in sliced:  # SGLang would copy into the present tensors, which after a first load have the slice's shape
        module.w_kc = module.w_vc = None
    original(self, *args, **kwargs)
    for module, (old_kc, old_vc) in zip(sliced, folded, strict=True):
        if module.w_kc is None:  # a partial reload left this layer alone
            module.w_kc, module.w_vc = old_kc, old_vc
            continue
        a, b = module.tpla.key_map, module.tpla.value_map
        dtype = module.w_kc.dtype if module.w_kc.dtype.itemsize > 1 else torch.bfloat16
        scale = float(module.w_scale) if module.w_kc.dtype.itemsize == 1 else 1.0
        module.w_kc = _keep_storage(old_kc, fold_key_map(module.w_kc, a, scale).to(dtype))
        module.w_vc = _keep_storage(old_vc, fold_value_map(module.w_vc, b, scale).to(dtype))
        module.w_scale = 1.0


def _keep_storage(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Return ``old`` with the values of ``new``, because captured graphs hold its address; at first, ``new`` itself."""
    return new if old is None else old.copy_(new)


def write_rows(
    self: Any,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    q_rope: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
) -> bool:
    """Norm, project, rotate and write the rows of a decode step or of a verified draft with one kernel.

    The function returns False, and writes nothing, where that kernel does not serve.

    Args:
        latent: [tokens, 1, d], before the norm. k_rope: [tokens, 1, rope], not rotated.
        q_rope: [tokens, h, rope], rotated in place. positions: [tokens].
    """
    norm, rotary = self.kv_a_layernorm, self.rotary_emb
    cache = get_token_to_kv_pool().get_key_buffer(self.layer_id)
    plain = self.tpla.rows is None
    same = latent.dtype == norm.weight.dtype and (not plain or latent.dtype == cache.dtype)
    mode = forward_batch.forward_mode
    if not (mode.is_decode() or mode.is_target_verify()) or not same:
        return False
    if rotary is not None and rotary.rotary.cos_sin_cache.dtype != torch.float32:
        return False  # SGLang's kernel does not know this head size, and only SGLang's own embedding serves it
    write(
        CacheWrite(
            latent=latent.squeeze(1),
            k_rope=k_rope.squeeze(1),
            slots=forward_batch.out_cache_loc,
            cache=cache if plain else cache.view(torch.uint8),
            weight=norm.weight,
            eps=norm.variance_epsilon,
            z=norm.z,
            cos_sin=None if rotary is None else rotary.rotary.cos_sin_cache,
            positions=None if rotary is None else positions,
            q_rope=q_rope,
            neox=rotary is not None and rotary.rotary.is_neox_style,
            sketched=self.tpla.rows,
        )
    )
    return True


def absorbed_core(
    original: Callable[..., Any],
    self: Any,
    q_pe: torch.Tensor,  # [tokens, h, rope]
    k_pe: torch.Tensor,  # [tokens, 1, rope]
    q_nope_out: torch.Tensor,  # [tokens, h, w], with sketched rows also the sketch's columns
    k_nope: torch.Tensor,  # [tokens, 1, w], or the raw latent where norm and projection are deferred
    forward_batch: Any,
    zero_allocator: Any,
    positions: torch.Tensor,
    topk_indices: Any,
    llama_4_scaling: torch.Tensor | None,  # [tokens, 1, 1]
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    """Hook around ``forward_absorb_core``: the same steps at the slice's width."""
    if self.tpla is None:
        return original(
            self, q_pe, k_pe, q_nope_out, k_nope, forward_batch, zero_allocator, positions, topk_indices,
            llama_4_scaling, *rest, **named,
        )  # fmt: skip
    key: torch.Tensor | None = k_nope
    if defers(k_nope):
        key = None
        if not write_rows(self, k_nope, k_pe, q_pe, positions, forward_batch):
            key = self.kv_a_layernorm.project(k_nope.squeeze(1)).unsqueeze(1)
            if self.rotary_emb is not None:
                q_pe, k_pe = self.rotary_emb.rotary(positions, q_pe, k_pe)
    if key is not None and self.tpla.rows is not None:
        # Write sketched rows here, because SGLang passes on no key of their width.
        cache = get_token_to_kv_pool().get_key_buffer(self.layer_id).view(torch.uint8)
        write(CacheWrite(key.squeeze(1), k_pe.squeeze(1), forward_batch.out_cache_loc, cache, sketched=self.tpla.rows))
        key = None
    if llama_4_scaling is not None:  # a temperature by position scales the whole query
        q_nope_out, q_pe = q_nope_out * llama_4_scaling, q_pe * llama_4_scaling
    save = {"save_kv_cache": key is not None}
    if self.current_attention_backend in (OURS, *FORWARD_ABSORB_CORE_ATTENTION_BACKENDS):
        out = self.attn_mqa(q_nope_out, key, key, forward_batch, **save, q_rope=q_pe, k_rope=k_pe)
    else:
        query = torch.cat((q_nope_out, q_pe), dim=-1)  # [tokens, h, w + rope]
        row = None if key is None else torch.cat((key, k_pe), dim=-1)  # [tokens, 1, w + rope]
        out = self.attn_mqa(query, row, key, forward_batch, **save)
    latent = out.view(-1, self.num_local_heads, self.tpla_width).transpose(0, 1)  # [h, tokens, w]
    if self.tpla_summed_groups > 1:
        values = sum_over_groups(torch.bmm(latent, self.w_vc), self.tpla_summed_groups).transpose(0, 1)
    else:
        values = out.new_empty(out.shape[0], self.num_local_heads, self.w_vc.shape[2])
        torch.bmm(latent, self.w_vc, out=values.transpose(0, 1))
    # values: [tokens, this rank's heads of o_proj, v]
    return self.o_proj(values.flatten(1))[0]
