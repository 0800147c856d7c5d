"""Feed-forward layers of the plain forward: dense ones, and mixtures of experts with V2's and V3's routing.

Routing follows SGLang's ``srt/layers/moe/topk.py``: softmax ``greedy`` and ``group_limited_greedy`` (V2), and sigmoid
``noaux_tc``, whose correction bias decides the choice but not the weight (V3, Kimi K2).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.spec import ModelSpec, Routing


@dataclass(frozen=True)
class Dense:
    """A gated SiLU layer; ``gate`` and ``up`` are [inner, hidden], ``down`` is [hidden, inner]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


@dataclass(frozen=True)
class Mixture:
    """Routed experts and the shared one; ``router`` is [experts, hidden], ``bias`` [experts] or None."""

    routing: Routing
    router: torch.Tensor
    bias: torch.Tensor | None
    experts: tuple[Dense, ...]
    shared: Dense | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(flat.dtype, torch.float32)
        chosen, weights = route(self.routing, F.linear(flat.to(wide), self.router.to(wide)), self.bias)
        out = self.shared(flat) if self.shared is not None else torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if token.numel():
                part = expert(flat[token]) * weights[token, slot, None].to(flat.dtype)
                out = out.index_add(0, token, part)
        return out.view_as(x)


FeedForward = Dense | Mixture


def route(
    routing: Routing, router_logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and weights, both [tokens, per_token], by router logits [tokens, experts]."""
    logits = router_logits
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if routing.method in ("noaux_tc", "group_limited_greedy"):
        grouped = choice.view(choice.shape[0], routing.groups, -1)
        if routing.method == "noaux_tc":
            group_scores = grouped.topk(min(2, grouped.shape[-1]), -1)[0].sum(-1)
        else:
            group_scores = grouped.max(-1).values
        kept = group_scores.topk(routing.groups_per_token, -1)[1]
        mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~mask[..., None], float("-inf")).flatten(1)
    chosen = choice.topk(routing.per_token, -1)[1]
    weights = scores.gather(1, chosen)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * routing.scaling


def load_feed_forward(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device
) -> FeedForward:
    def get(tail: str, *shape: int) -> torch.Tensor:
        return checkpoint.tensor(checkpoint.layer_name(index, f"mlp.{tail}"), dtype, shape or None).to(device)

    def dense(stem: str) -> Dense:
        down = get(f"{stem}down_proj.weight")
        inner = down.shape[-1]
        return Dense(
            get(f"{stem}gate_proj.weight", inner, spec.hidden), get(f"{stem}up_proj.weight", inner, spec.hidden), down
        )

    if spec.routing is None or not spec.is_moe(index):
        return dense("")
    bias = checkpoint.layer_name(index, "mlp.gate.e_score_correction_bias")
    return Mixture(
        routing=spec.routing,
        router=get("gate.weight", spec.routing.experts, spec.hidden),
        bias=checkpoint.tensor(bias, torch.float32).to(device) if bias in checkpoint else None,
        experts=tuple(dense(f"experts.{expert}.") for expert in range(spec.routing.experts)),
        shared=dense("shared_experts.") if spec.routing.shared_experts else None,
    )
