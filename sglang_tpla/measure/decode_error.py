"""Decode-phase error against plain MLA by teacher forcing: the prompt is exact, every later token goes through TPLA.

Only positions whose attention went through the slices count: a sequence of P + C tokens gives C predictions of the next
token, at positions P to P + C - 1. The last one has no next token and counts for KL and agreement only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.artifact.artifact import Artifact, ArtifactError, ErrorReport
from sglang_tpla.reference_model.forward import LayerCache, LayerMaps, PlainModel
from sglang_tpla.reference_model.sketched_layer import SketchedMaps


@dataclass(frozen=True)
class DecodeErrors:
    """Per-token results [sequences, continuation], float32, and the text's protocol.

    ``kl`` is KL(MLA || TPLA) in nats; ``nll_*`` is the negative log-likelihood of the true next token (NaN at the last
    position); ``top_*`` is the likeliest next token.
    """

    prompt_tokens: int
    kl: torch.Tensor
    nll_mla: torch.Tensor
    nll_tpla: torch.Tensor
    top_mla: torch.Tensor
    top_tpla: torch.Tensor

    @property
    def same_top(self) -> torch.Tensor:
        """Whether both put the same token first."""
        return self.top_mla == self.top_tpla

    @property
    def mean_kl(self) -> float:
        return self.kl.double().mean().item()

    def report(self) -> ErrorReport:
        """Return the figures.

        Raises:
            ArtifactError: the figures are not finite, and no artifact can hold such figures.
        """
        flat = self.kl.flatten().double()
        mla = self.nll_mla.double().nanmean().exp().item()
        tpla = self.nll_tpla.double().nanmean().exp().item()
        if not math.isfinite(self.mean_kl + mla + tpla):
            raise ArtifactError(
                "the log-probabilities on the held-out text are not finite, or so low that the perplexity is not: "
                "expected a checkpoint without NaN and infinity, whose layers stay within float32"
            )
        return ErrorReport(
            tokens=self.kl.numel(),
            prompt_tokens=self.prompt_tokens,
            continuation_tokens=self.kl.shape[1],
            kl_mean=self.mean_kl,
            kl_p95=quantile(flat, 0.95),
            kl_p99=quantile(flat, 0.99),
            perplexity_mla=mla,
            perplexity_tpla=tpla,
            perplexity_ratio=tpla / mla,
            top1_agreement=self.same_top.double().mean().item(),
        )


def quantile(values: torch.Tensor, share: float) -> float:
    """Return the value below which ``share`` of a flat tensor lies (no size limit, unlike torch.quantile)."""
    ordered = values.sort().values
    return ordered[min(int(share * ordered.numel()), ordered.numel() - 1)].item()


def model_maps(artifact: Artifact, model: PlainModel) -> list[LayerMaps]:
    """Move an artifact's maps to the model's dtype and device."""
    meta, where = artifact.meta, (model.device, model.dtype)
    maps: list[LayerMaps] = []
    for layer in range(meta.num_layers):
        triples = [artifact.maps(layer, group) for group in range(meta.groups)]
        if meta.sketched:
            z, a, b = zip(*triples, strict=True)
            maps.append(SketchedMaps(meta.rows(layer), z, artifact.sketch(layer), a, b).to(*where))
        else:
            maps.append([(z.to(*where), a.to(*where), b.to(*where)) for z, a, b in triples])
    return maps


@torch.inference_mode()
def measure(
    model: PlainModel,
    tokens: torch.Tensor,
    candidates: Sequence[Sequence[LayerMaps | None]],
    prompt_tokens: int,
    *,
    batch: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> list[DecodeErrors]:
    """Measure the errors of each candidate (maps of every layer) on tokens [sequences, S].

    Plain MLA runs once for all candidates. ``progress`` gets the number of tokens done.

    Raises:
        ValueError: no continuation follows the prompt.
    """
    if not 0 <= prompt_tokens < tokens.shape[1]:
        raise ValueError(f"expected a prompt shorter than the {tokens.shape[1]} tokens, got {prompt_tokens}")
    rows: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in candidates]
    for start in range(0, tokens.shape[0], batch):
        part = tokens[start : start + batch].to(model.device)
        exact, cache = model.prefill(part)
        reference = model.logits(exact[:, prompt_tokens:]).float().log_softmax(-1)
        # Plain MLA and every candidate share the prompt.
        past = [LayerCache(layer.latent[:, :prompt_tokens], layer.k_rope[:, :prompt_tokens]) for layer in cache]
        following = part[:, prompt_tokens + 1 :]
        for index, maps in enumerate(candidates):
            hidden = model.hidden_states(part[:, prompt_tokens:], maps=maps, past=past)
            found = model.logits(hidden).float().log_softmax(-1)
            rows[index].append(tuple(value.cpu() for value in compare(reference, found, following)))
        progress(part.numel())
    return [DecodeErrors(prompt_tokens, *map(torch.cat, zip(*parts, strict=True))) for parts in rows]


def compare(reference: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute KL, both negative log-likelihoods and both top tokens [B, C] of log-probabilities [B, C, vocab].

    ``following`` [B, C-1] holds the true next tokens.
    """
    kl = (reference.exp() * (reference - found)).sum(-1).clamp_min(0)
    nan = torch.full_like(kl[:, :1], float("nan"))

    def nll(logprobs: torch.Tensor) -> torch.Tensor:
        picked = -logprobs[:, :-1].gather(-1, following[..., None])[..., 0]
        return torch.cat([picked, nan], 1)

    return kl, nll(reference), nll(found), reference.argmax(-1), found.argmax(-1)
