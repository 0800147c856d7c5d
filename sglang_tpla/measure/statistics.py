"""Streamed second moments of latents and queries, layer by layer; closed-form maps need nothing else.

Per layer, in float64 (d latent dims, H heads, n nope dims a head):

    latent_count            tokens
    latent_sum     [d]      sum of c = RMSNorm(latent)
    latent_outer   [d, d]   sum of c^T c
    query_count             queries
    query_outer    [H, n, n] sum of q^T q of the queries' nope part, for each head separately

Absorbed queries are q W_UK, so their second moment [d, d] follows from ``query_outer`` and kv_b_proj. Memory does not
grow with the text, and the moments of two servers or ranks may be added. A damaged file, moments of different models
and missing heads raise `StatisticsError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sglang_tpla.artifact.artifact import replace_into
from sglang_tpla.errors import SglangTplaError
from sglang_tpla.measure.layer_inputs import walk
from sglang_tpla.reference_model.forward import AttentionInputs, PlainModel

_SUMS, _COUNTS = ("latent_sum", "latent_outer", "query_outer"), ("latent_count", "query_count")
_NAMES = _SUMS + _COUNTS
FORMAT_VERSION = 1


class StatisticsError(SglangTplaError, ValueError):
    """Statistics cannot be used; the message says what was expected, what came, where, and what to do."""


@dataclass
class LayerMoments:
    latent_sum: torch.Tensor
    latent_outer: torch.Tensor
    query_outer: torch.Tensor
    latent_count: float = 0.0
    query_count: float = 0.0

    @classmethod
    def zeros(cls, latent_dim: int, heads: int, nope_dim: int, device: str = "cpu") -> LayerMoments:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(latent_dim), zeros(latent_dim, latent_dim), zeros(heads, nope_dim, nope_dim))

    def update(self, latent: torch.Tensor, q_nope: torch.Tensor) -> None:
        """Add tokens: normed latents [N, d] and nope queries [N, H, n]."""
        latent = latent.double()
        self.latent_sum += latent.sum(0)
        self.latent_outer += latent.T @ latent
        self.latent_count += latent.shape[0]
        queries = q_nope.double().transpose(0, 1)  # [H, N, n]
        self.query_outer += queries.transpose(1, 2) @ queries
        self.query_count += q_nope.shape[0]

    def merge(self, other: LayerMoments) -> None:
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def on_cpu(self) -> LayerMoments:
        """Return the same sums on the CPU, which makes the maps."""
        return replace(self, **{name: getattr(self, name).cpu() for name in _SUMS})

    @property
    def finite(self) -> bool:
        """Whether every sum is finite; a single NaN in the model can make all of them NaN."""
        return all(bool(torch.isfinite(getattr(self, name)).all()) for name in _SUMS)

    @property
    def mean(self) -> torch.Tensor:
        """The mean latent [d]."""
        return self.latent_sum / max(self.latent_count, 1)

    @property
    def covariance(self) -> torch.Tensor:
        """The centred covariance of the latent [d, d]."""
        return self.latent_outer / max(self.latent_count, 1) - torch.outer(self.mean, self.mean)

    @property
    def reached(self) -> int:
        """The number of the latent's directions that the tokens reached; the moments say nothing about the others."""
        return int(torch.linalg.matrix_rank(self.latent_outer, hermitian=True))

    def absorbed_queries(self, w_uk: torch.Tensor) -> torch.Tensor:
        """Return the mean second moment of absorbed queries [d, d] over heads and queries; ``w_uk`` is [H, n, d]."""
        w = w_uk.double()
        total = torch.einsum("hnd,hnm,hme->de", w, self.query_outer.to(w.device), w)
        return total / max(self.query_count * w.shape[0], 1)


class StatisticsMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model and the text of the moments.

    ``first_head`` is the first head of a tensor-parallel rank that saw only some query heads.
    """

    format_version: int
    model_name: str
    config_hash: str
    weights_hash: str
    corpus: str
    corpus_hash: str
    seed: int
    first_head: int = 0


@dataclass
class Statistics:
    meta: StatisticsMeta
    layers: list[LayerMoments] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The number of tokens seen (the fewest over the layers)."""
        return int(min(layer.latent_count for layer in self.layers))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (float64), the whole file or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            for name in _NAMES:
                tensor = torch.as_tensor(getattr(layer, name), dtype=torch.float64)
                tensors[f"layers.{index}.{name}"] = tensor.cpu().contiguous()
        with replace_into(path) as temporary:
            save_file(tensors, temporary, metadata={"meta": msgspec.json.encode(self.meta).decode()})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        if not Path(path).is_file():
            raise StatisticsError(f"expected a statistics file at {path}, found none")
        try:
            with safe_open(path, framework="pt") as handle:
                raw = (handle.metadata() or {}).get("meta", "")
                meta = msgspec.json.decode(raw, type=StatisticsMeta)
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, msgspec.MsgspecError) as error:
            raise StatisticsError(f"{path} is not a readable statistics file: {error}") from error
        if meta.format_version != FORMAT_VERSION:
            raise StatisticsError(f"{path} has format {meta.format_version}, this release reads {FORMAT_VERSION}")
        count = len(tensors) // len(_NAMES)
        expected = {f"layers.{index}.{name}" for index in range(count) for name in _NAMES}
        if not count or set(tensors) != expected:
            raise StatisticsError(f"{path} is incomplete: {sorted(expected ^ set(tensors))[:4]} differ")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
                raise StatisticsError(f"{path}: expected {name} finite and float64, got {tensor.dtype}")
        shapes = _shapes(tensors)
        for name, tensor in tensors.items():
            expected_shape = shapes[name.rpartition(".")[2]]
            if tuple(tensor.shape) != expected_shape or (not expected_shape and tensor < 0):
                raise StatisticsError(
                    f"{path}: expected {name} to have the shape {expected_shape} of layer 0 and counts of at least 0, "
                    f"got {tuple(tensor.shape)}; collect the statistics again"
                )
        layers = []
        for index in range(count):
            sums = (tensors[f"layers.{index}.{name}"] for name in _SUMS)
            counts = (float(tensors[f"layers.{index}.{name}"]) for name in _COUNTS)
            layers.append(LayerMoments(*sums, *counts))
        return cls(meta, layers)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each sum and count; layer 0's sizes decide them for all layers."""
    latent = tensors["layers.0.latent_sum"].numel()
    heads, nope = (*tensors["layers.0.query_outer"].shape, 0, 0)[:2]
    sums = dict(zip(_SUMS, ((latent,), (latent, latent), (heads, nope, nope)), strict=True))
    return {**sums, **dict.fromkeys(_COUNTS, ())}


def combine(parts: Sequence[Statistics]) -> Statistics:
    """Combine the moments of several ranks and servers.

    Parts of the same heads, from several servers, are added. Parts of different heads, from ranks of one server that
    all saw the same latents, are joined.
    """
    if not parts:
        raise StatisticsError("expected at least one statistics file, got none")
    by_head: dict[int, Statistics] = {}
    for part in parts:
        _check_alike(parts[0], part)
        same = by_head.setdefault(part.meta.first_head, part)
        if same is not part:
            _add(same, part)
    ordered = [by_head[head] for head in sorted(by_head)]
    whole, expected = ordered[0], 0
    for part in ordered:
        if part.meta.first_head != expected:
            raise StatisticsError(
                f"expected statistics of the heads from {expected} on, got those from {part.meta.first_head} on; give "
                "the files of every tensor-parallel rank"
            )
        expected += len(part.layers[0].query_outer)
    for part in ordered[1:]:
        for ours, theirs in zip(whole.layers, part.layers, strict=True):
            # Scale to the same count, since only means over queries matter: ranks may have sampled different numbers.
            ratio = ours.query_count / max(theirs.query_count, 1)
            ours.query_outer = torch.cat([ours.query_outer, theirs.query_outer * ratio])
    return whole


def _check_alike(first: Statistics, part: Statistics) -> None:
    """Refuse statistics of different models or numbers of layers."""
    ours, theirs = first.meta, part.meta
    if (ours.config_hash, ours.weights_hash) != (theirs.config_hash, theirs.weights_hash):
        raise StatisticsError(
            f"statistics of different models cannot be put together: {ours.model_name} ({ours.weights_hash[:12]}) and "
            f"{theirs.model_name} ({theirs.weights_hash[:12]})"
        )
    if len(first.layers) != len(part.layers):
        raise StatisticsError(
            f"statistics of {len(first.layers)} and of {len(part.layers)} layers cannot be put together"
        )


def _add(same: Statistics, part: Statistics) -> None:
    """Add the moments of another server, of the same heads."""
    counts = [len(one.layers[0].query_outer) for one in (same, part)]
    if counts[0] != counts[1]:
        raise StatisticsError(
            f"statistics of {counts[0]} and of {counts[1]} heads from {part.meta.first_head} on cannot be put "
            "together; give files of servers with one tensor-parallel size"
        )
    for ours, theirs in zip(same.layers, part.layers, strict=True):
        ours.merge(theirs)


def collect(
    model: PlainModel, batches: Sequence[torch.Tensor], progress: Callable[[int], object] = lambda done: None
) -> list[LayerMoments]:
    """Collect the moments of every layer over token batches [B, S]; ``progress`` gets the number of tokens done.

    A model that keeps one layer in memory at a time runs layer by layer, and holds the hidden states of the whole text
    in memory instead of the weights.
    """
    spec = model.spec
    moments = [
        LayerMoments.zeros(spec.latent_dim, spec.heads, spec.nope_dim, str(model.device)) for _ in range(spec.layers)
    ]

    if not model.resident:
        whole = torch.cat(list(batches))
        for layer, inputs in walk(model, whole):
            for latent, q_nope in zip(inputs.latent, inputs.q_nope, strict=True):
                moments[layer].update(latent, q_nope.transpose(0, 1))
            progress(whole.numel() // spec.layers)
        return [part.on_cpu() for part in moments]

    def observe(layer: int, inputs: AttentionInputs, _out: torch.Tensor) -> None:
        moments[layer].update(inputs.latent.flatten(0, 1), inputs.q_nope.transpose(1, 2).flatten(0, 1))

    for tokens in batches:
        model.hidden_states(tokens.to(model.device), observer=observe)
        progress(tokens.numel())
    return [part.on_cpu() for part in moments]
