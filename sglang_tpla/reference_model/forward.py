"""Plain PyTorch forward of DeepSeek V2/V3 and Kimi K2 shaped models, exact or with TPLA decoding.

This reference for calibration and evaluation takes whole sequences, without cache or kernels, and computes every step
as SGLang's ``srt/models/deepseek_v2.py`` and transformers' ``DeepseekV3ForCausalLM`` do. A prompt attends exactly, as
plain MLA prefills it. With maps, every token after the prompt attends through the slices, over all earlier tokens
(docs/design.md, section 2):

    p_i = softmax(scale (q_nope W_UK A_i^T z_i^T + q_rope k_rope^T)),   o = sum_i (p_i z_i) B_i W_UV W_O

This is teacher forcing: one pass gives the results of decoding the same text token by token.
Shapes: B batch, S tokens, H heads, d latent dims, n nope, e rope, v value dims a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F

from sglang_tpla.reference_model.checkpoint import Checkpoint, CheckpointError
from sglang_tpla.reference_model.feed_forward import FeedForward, load_feed_forward
from sglang_tpla.reference_model.rotary import Rotary, rotate
from sglang_tpla.reference_model.sketched_layer import SketchedMaps
from sglang_tpla.reference_model.spec import ModelSpec

# A slicer is Z [d, w], or a function from latents [B, S, d] to slices [B, S, w], which only comparisons need.
Slicer = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
# One layer's maps are (Z, A [w, d], B [w, d]) for each group, or the maps of sketched rows; None means exact attention.
GroupMaps = tuple[Slicer, torch.Tensor, torch.Tensor]
LayerMaps = Sequence[GroupMaps] | SketchedMaps


class Bf16Maps(list[GroupMaps]):
    """The maps of a layer whose cache rounds its rows to bfloat16, to measure the error of that rounding."""


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention: S tokens, of which the last Q have queries.

    ``latent`` [B, S, d] is normed; ``k_rope`` [B, S, e] is rotated, and so is ``q_rope`` [B, H, Q, e]; ``q_nope`` is
    [B, H, Q, n].
    """

    latent: torch.Tensor
    q_nope: torch.Tensor
    q_rope: torch.Tensor
    k_rope: torch.Tensor

    def after(self, past: LayerCache) -> AttentionInputs:
        """Return the same queries with earlier tokens' latents in front."""
        return AttentionInputs(
            torch.cat([past.latent, self.latent], 1), self.q_nope, self.q_rope, torch.cat([past.k_rope, self.k_rope], 1)
        )


@dataclass(frozen=True)
class LayerCache:
    """The exact cache of one layer: ``latent`` [B, P, d] after RMSNorm and ``k_rope`` [B, P, e]."""

    latent: torch.Tensor
    k_rope: torch.Tensor


Observer = Callable[[int, AttentionInputs, torch.Tensor], None]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm the last axis, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _through_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


@dataclass(frozen=True)
class Attention:
    """The weights and the arithmetic of one attention layer.

    ``w_uk`` [H, n, d] and ``w_uv`` [H, v, d] are the halves of kv_b_proj; projections are [out, in].
    """

    spec: ModelSpec
    q_a: torch.Tensor | None
    q_a_norm: torch.Tensor | None
    q_b: torch.Tensor
    kv_a: torch.Tensor
    kv_a_bias: torch.Tensor | None
    q_a_bias: torch.Tensor | None
    kv_norm: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    o: torch.Tensor
    o_bias: torch.Tensor | None

    def inputs(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> AttentionInputs:
        """Compute queries and latents of normed hidden states [B, S, hidden]; cos and sin are [S, e/2]."""
        spec = self.spec
        batch, tokens = x.shape[:2]
        if self.q_a is None or self.q_a_norm is None:
            q = F.linear(x, self.q_b)
        else:
            q = F.linear(rms_norm(F.linear(x, self.q_a, self.q_a_bias), self.q_a_norm, spec.eps), self.q_b)
        q = q.view(batch, tokens, spec.heads, spec.nope_dim + spec.rope_dim).transpose(1, 2)
        raw = F.linear(x, self.kv_a, self.kv_a_bias)
        return AttentionInputs(
            latent=rms_norm(raw[..., : spec.latent_dim], self.kv_norm, spec.eps),
            q_nope=q[..., : spec.nope_dim],
            q_rope=rotate(q[..., spec.nope_dim :], cos, sin, spec.rope_halves),
            k_rope=rotate(raw[..., spec.latent_dim :], cos, sin, spec.rope_halves),
        )

    def heads_out(self, inputs: AttentionInputs, key_latent: torch.Tensor, value_latent: torch.Tensor) -> torch.Tensor:
        """Attend causally with all queries, and return [B, H, Q, v].

        Keys come from ``key_latent`` and values from ``value_latent``, both [B, S, d].
        """
        batch, tokens = key_latent.shape[:2]
        spec = self.spec
        if inputs.q_nope.shape[2] == 1:
            return self._one_query(inputs, key_latent, value_latent)
        k_nope = torch.einsum("bsd,hnd->bhsn", key_latent, self.w_uk)
        value = torch.einsum("bsd,hvd->bhsv", value_latent, self.w_uv)
        k_rope = inputs.k_rope[:, None].expand(batch, spec.heads, tokens, spec.rope_dim)
        key = torch.cat([k_nope, k_rope], -1)
        query = torch.cat([inputs.q_nope, inputs.q_rope], -1)
        return causal_attention(query, key, value, spec.scale)

    def _one_query(self, inputs: AttentionInputs, key_latent: torch.Tensor, value_latent: torch.Tensor) -> torch.Tensor:
        # The last token sees every key, so it needs no mask. Absorbed weights spare making the cache's keys and values.
        absorbed = torch.einsum("bhqn,hnd->bhqd", inputs.q_nope, self.w_uk)
        scores = absorbed @ key_latent[:, None].mT + inputs.q_rope @ inputs.k_rope[:, None].mT
        context = (scores * self.spec.scale).softmax(-1) @ value_latent[:, None]
        return torch.einsum("bhqd,hvd->bhqv", context, self.w_uv)

    def project(self, heads_out: torch.Tensor) -> torch.Tensor:
        """Project [B, H, queries, v] to [B, queries, hidden]."""
        return F.linear(heads_out.transpose(1, 2).flatten(2), self.o, self.o_bias)

    def tpla_heads_out(self, inputs: AttentionInputs, maps: LayerMaps) -> torch.Tensor:
        """Attend through the slices, and return the sum over the groups, [B, H, Q, v]."""
        parts = []
        if isinstance(maps, SketchedMaps):
            for view in maps.views(inputs.latent, inputs.k_rope):
                parts.append(self.heads_out(replace(inputs, k_rope=view.k_rope), view.key, view.value))
            return reduce(torch.add, parts)
        rounds = isinstance(maps, Bf16Maps)
        if rounds:
            inputs = replace(inputs, k_rope=_through_bf16(inputs.k_rope))
        for z_map, a_map, b_map in maps:
            # [B, S, w]
            z = inputs.latent @ z_map if isinstance(z_map, torch.Tensor) else z_map(inputs.latent)
            z = _through_bf16(z) if rounds else z
            parts.append(self.heads_out(inputs, z @ a_map, z @ b_map))
        return reduce(torch.add, parts)

    def __call__(self, inputs: AttentionInputs, maps: LayerMaps | None = None) -> torch.Tensor:
        """Attend through ``maps``, or exactly without them, and return [B, Q, hidden]."""
        if maps is None:
            return self.project(self.heads_out(inputs, inputs.latent, inputs.latent))
        return self.project(self.tpla_heads_out(inputs, maps))


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend with the last Q of S tokens: query [B, H, Q, k], key [B, H, S, k], value [B, H, S, v]."""
    queries, tokens = query.shape[2], key.shape[2]
    value_dim = value.shape[-1]
    if value_dim < key.shape[-1]:
        # The fused kernels need one width; the unfused kernel is about three times slower.
        value = F.pad(value, (0, key.shape[-1] - value_dim))
    if queries == tokens:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=key.device).tril(tokens - queries)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out[..., :value_dim]


@dataclass(frozen=True)
class Layer:
    attention: Attention
    feed_forward: FeedForward
    input_norm: torch.Tensor
    post_norm: torch.Tensor


class _LastLayer:
    """Layers that are read on request; only the last one read stays in memory."""

    def __init__(self, model: PlainModel) -> None:
        self._model = model
        self._index: int | None = None
        self._layer: Layer | None = None

    def __iter__(self) -> Iterator[Layer]:
        return (self[index] for index in range(self._model.spec.layers))

    def __getitem__(self, index: int) -> Layer:
        if self._layer is None or self._index != index:
            self._layer = None  # release the old weights before the new ones come
            self._layer, self._index = self._model.load_layer(index), index
        return self._layer


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name or number; torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"expected a torch device that is here, got {name!r}: {reason}") from error
    if device.type == "meta":
        raise CheckpointError("expected a torch device that computes, got 'meta', whose tensors hold no values")
    return device


class PlainModel:
    """A whole model in memory.

    Args:
        checkpoint: the checkpoint directory, or a path to one.
        dtype: dtype of weights and arithmetic.
        device: torch device.
        resident: keep every layer's weights in memory; otherwise only those of the layer used last.

    Raises:
        CheckpointError: a tensor or a file is missing or damaged, the configuration is of another family, or there is
            no such device.
    """

    layers: list[Layer] | _LastLayer

    def __init__(
        self,
        checkpoint: Checkpoint | str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        resident: bool = True,
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        self.spec = ModelSpec.from_config(self.checkpoint.config)
        self.checkpoint.check_files(self.spec.layers)
        self.dtype, self.device = dtype, _device(device)
        self.rotary = Rotary(self.spec, self.device)
        table = self.spec.vocab, self.spec.hidden
        self.embedding = self._tensor(f"{self.checkpoint.prefix}embed_tokens.weight", *table)
        self.final_norm = self._tensor(f"{self.checkpoint.prefix}norm.weight", self.spec.hidden)
        head = f"{self.checkpoint.prefix.removesuffix('model.')}lm_head.weight"
        # The config's flag overrides the files: the file of a separate head may be missing, which is an error, and a
        # model that shares the embedding may have a head in its files, which SGLang ignores.
        tied = self.checkpoint.config.get("tie_word_embeddings")
        own_head = tied is False or (tied is not True and head in self.checkpoint)
        self.lm_head = self._tensor(head, *table) if own_head else self.embedding
        self.resident = resident
        self.layers = [self.load_layer(index) for index in range(self.spec.layers)] if resident else _LastLayer(self)

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, self.dtype, shape).to(self.device)

    def load_layer(self, index: int) -> Layer:
        def norm(tail: str) -> torch.Tensor:
            return self._tensor(self.checkpoint.layer_name(index, tail), self.spec.hidden)

        return Layer(
            attention=load_attention(self.checkpoint, self.spec, index, self.dtype, self.device),
            feed_forward=load_feed_forward(self.checkpoint, self.spec, index, self.dtype, self.device),
            input_norm=norm("input_layernorm.weight"),
            post_norm=norm("post_attention_layernorm.weight"),
        )

    def attention_inputs(self, index: int, hidden: torch.Tensor, first_position: int = 0) -> AttentionInputs:
        """Compute queries and latents of layer ``index`` for hidden states [B, Q, hidden]."""
        layer = self.layers[index]
        cos, sin = self.rotary.tables(first_position + hidden.shape[1], hidden.dtype)
        normed = rms_norm(hidden, layer.input_norm, self.spec.eps)
        return layer.attention.inputs(normed, cos[first_position:], sin[first_position:])

    def finish_layer(self, index: int, hidden: torch.Tensor, attention_out: torch.Tensor) -> torch.Tensor:
        """Add residuals and the feed-forward, and return the hidden states after layer ``index``."""
        layer = self.layers[index]
        hidden = hidden + attention_out
        return hidden + layer.feed_forward(rms_norm(hidden, layer.post_norm, self.spec.eps))

    def hidden_states(
        self,
        tokens: torch.Tensor,
        *,
        maps: Sequence[LayerMaps | None] | None = None,
        past: Sequence[LayerCache] | None = None,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """Compute the normed hidden states [B, Q, hidden] of tokens [B, Q].

        Args:
            tokens: token ids.
            maps: per layer, maps of every group, or None for an exact layer.
            past: per layer, the exact cache of earlier tokens.
            observer: called with (layer, attention inputs, attention output [B, Q, hidden]).
        """
        if maps is not None and len(maps) != self.spec.layers:
            raise ValueError(f"expected maps for {self.spec.layers} layers, got {len(maps)}")
        first_position = past[0].latent.shape[1] if past is not None else 0
        hidden = self.embedding[tokens]
        for index, layer in enumerate(self.layers):
            inputs = self.attention_inputs(index, hidden, first_position)
            if past is not None:
                inputs = inputs.after(past[index])
            out = layer.attention(inputs, maps[index] if maps is not None else None)
            if observer is not None:
                observer(index, inputs, out)
            hidden = self.finish_layer(index, hidden, out)
        return rms_norm(hidden, self.final_norm, self.spec.eps)

    def prefill(
        self, tokens: torch.Tensor, past: Sequence[LayerCache] | None = None
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """Compute exact normed hidden states [B, S, hidden] of tokens [B, S] after ``past``, and the whole cache."""
        cache: list[LayerCache] = []

        def keep(_layer: int, inputs: AttentionInputs, _out: torch.Tensor) -> None:
            cache.append(LayerCache(inputs.latent, inputs.k_rope))

        return self.hidden_states(tokens, past=past, observer=keep), cache

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [..., vocab] of normed hidden states [..., hidden]."""
        return F.linear(hidden, self.lm_head)

    def forward(
        self, tokens: torch.Tensor, *, maps: Sequence[LayerMaps | None] | None = None, prompt_tokens: int = 0
    ) -> torch.Tensor:
        """Compute logits [B, S, vocab] of tokens [B, S]: the prompt exactly, later tokens through ``maps``."""
        if prompt_tokens >= tokens.shape[1]:
            maps = None  # no token follows the prompt
        if maps is None or prompt_tokens == 0:
            return self.logits(self.hidden_states(tokens, maps=maps))
        prompt, cache = self.prefill(tokens[:, :prompt_tokens])
        decoded = self.hidden_states(tokens[:, prompt_tokens:], maps=maps, past=cache)
        return self.logits(torch.cat([prompt, decoded], 1))


def absorbed_weights(
    checkpoint: Checkpoint, spec: ModelSpec, layer: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both halves of a layer's kv_b_proj, [H, n, d] and [H, v, d], reading no other weight."""
    shape = (spec.heads * (spec.nope_dim + spec.value_dim), spec.latent_dim)
    kv_b = checkpoint.tensor(checkpoint.layer_name(layer, "self_attn.kv_b_proj.weight"), dtype, shape)
    w_uk, w_uv = kv_b.view(spec.heads, -1, spec.latent_dim).split([spec.nope_dim, spec.value_dim], 1)
    return w_uk, w_uv


def load_attention(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    def get(tail: str, *shape: int) -> torch.Tensor:
        return checkpoint.tensor(checkpoint.layer_name(index, f"self_attn.{tail}"), dtype, shape or None).to(device)

    def maybe(tail: str) -> torch.Tensor | None:
        return get(tail) if checkpoint.layer_name(index, f"self_attn.{tail}") in checkpoint else None

    w_uk, w_uv = absorbed_weights(checkpoint, spec, index, dtype)
    low_rank = spec.q_lora_rank is not None
    query_rows, query_in = spec.heads * (spec.nope_dim + spec.rope_dim), spec.q_lora_rank or spec.hidden
    return Attention(
        spec=spec,
        q_a=get("q_a_proj.weight", query_in, spec.hidden) if low_rank else None,
        q_a_norm=get("q_a_layernorm.weight", query_in) if low_rank else None,
        q_b=get("q_b_proj.weight" if low_rank else "q_proj.weight", query_rows, query_in),
        kv_a=get("kv_a_proj_with_mqa.weight", spec.latent_dim + spec.rope_dim, spec.hidden),
        kv_a_bias=maybe("kv_a_proj_with_mqa.bias"),
        q_a_bias=maybe("q_a_proj.bias"),
        kv_norm=get("kv_a_layernorm.weight", spec.latent_dim),
        w_uk=w_uk.to(device).contiguous(),
        w_uv=w_uv.to(device).contiguous(),
        o=get("o_proj.weight", spec.hidden, spec.heads * spec.value_dim),
        o_bias=maybe("o_proj.bias"),
    )
