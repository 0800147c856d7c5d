"""The artifact: one safetensors file with the slicing maps of every layer and group, and where they came
from.

Tensors, all float32, contiguous (d latent dims, w the layer's slice width, g groups):

    layers.{l}.groups.{i}.Z  [d, w]   z_i = RMSNorm(c) Z_i, what a rank caches
    layers.{l}.groups.{i}.A  [w, d]   key map: scores use q_nope W_UK A_i^T z_i^T
    layers.{l}.groups.{i}.B  [w, d]   value map: o = sum_i (p_i z_i) B_i W_UV W_O

Widths may differ between layers; the groups of one layer share one width (short groups are padded with zero
columns). The first ``shared_dims[l]`` columns of Z are the same, bit for bit, in every group of layer l: the
transfer agent sends them once. A layer with w = r = d is exact.

Metadata is safetensors' string-to-string map, every value JSON. Loading checks everything and fails with one
``ArtifactError``; a file that loads is safe to serve.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sglang_tpla.artifact.model_identity import config_hash
from sglang_tpla.errors import SglangTplaError

FORMAT_VERSION = 1
MAP_NAMES = ("Z", "A", "B")


class ArtifactError(SglangTplaError, ValueError):
    """An artifact that cannot be used: what was expected, what came, where, what to do."""


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode-phase error on held-out text: prompt exact, every later token through TPLA, against plain MLA.

    ``kl_*`` in nats a token; ``perplexity_ratio`` TPLA over plain MLA.
    """

    tokens: int
    prompt_tokens: int
    continuation_tokens: int
    kl_mean: float
    kl_p95: float
    kl_p99: float
    perplexity_mla: float
    perplexity_tpla: float
    perplexity_ratio: float
    top1_agreement: float


class ArtifactMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Provenance and layout. ``shared_dims`` (r) and ``widths`` (w) have one entry a layer."""

    format_version: int
    model_name: str
    config_hash: str
    weights_hash: str
    transform: str
    groups: int
    num_layers: int
    latent_dim: int
    rope_dim: int
    shared_dims: tuple[int, ...]
    widths: tuple[int, ...]
    calibrated_tokens: int
    corpus: str
    corpus_hash: str
    seed: int
    created_by: str
    error_report: ErrorReport | None = None


def tensor_name(layer: int, group: int, which: str) -> str:
    """Stored name of a map; ``which`` is Z, A or B."""
    return f"layers.{layer}.groups.{group}.{which}"


@dataclass(frozen=True)
class Artifact:
    """Maps and metadata, checked on construction.

    Args:
        meta: provenance and layout.
        tensors: float32 tensors by stored name, exactly those that ``meta`` implies.
        source: where it came from, for messages.

    Raises:
        ArtifactError: a tensor is missing, extra, of another shape or dtype, not finite, or the shared
        columns
            differ between groups; or the metadata contradicts itself.
    """

    meta: ArtifactMeta
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    source: str = "artifact in memory"

    def __post_init__(self) -> None:
        _check_meta(self.meta, self.source)
        _check_tensors(self.meta, self.tensors, self.source)

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read and check a file.

        Raises:
            ArtifactError: the file is missing, damaged, of another format version, or inconsistent.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(
                f"expected an artifact file at {path}, found none; make one with "
                f"`python -m sglang_tpla.calibrate --model-path MODEL --groups G --out {path}`"
            )
        try:
            with safe_open(path, framework="pt") as handle:
                raw = dict(handle.metadata() or {})
                meta = _decode_meta(raw, str(path))
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{path} is not a readable safetensors file ({error}); copy it again or make it anew with "
                "`python -m sglang_tpla.calibrate`"
            ) from error
        return cls(meta=meta, tensors=tensors, source=str(path))

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all (temporary file in the same folder, then rename)."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with replace_into(path) as temporary:
            save_file(tensors, temporary, metadata=_encode_meta(self.meta))

    def maps(self, layer: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Z [d, w], A [w, d], B [w, d] of one layer and group, float32."""
        z, a, b = (self.tensors[tensor_name(layer, group, which)] for which in MAP_NAMES)
        return z, a, b

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) over the tensors in canonical order (layer, group, Z A B) and the metadata."""
        digest = hashlib.sha256()
        for key, value in sorted(_encode_meta(self.meta).items()):
            digest.update(f"{key}={value}\n".encode())
        for name in expected_names(self.meta):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_model(self, config: Mapping[str, Any], weights_hash: str, groups: int) -> None:
        """Refuse another model or another number of groups.

        Raises:
            ArtifactError: the config hash, the weights hash or ``groups`` differ from what was calibrated.
        """
        again = "make one for this model with `python -m sglang_tpla.calibrate`"
        if groups != self.meta.groups:
            raise ArtifactError(
                f"{self.source} has maps for {self.meta.groups} groups, but --tpla-groups is {groups}; set "
                f"--tpla-groups {self.meta.groups} or calibrate with --groups {groups}"
            )
        found = config_hash(config)
        if found != self.meta.config_hash:
            raise ArtifactError(
                f"{self.source} was made for {self.meta.model_name!r} with attention configuration "
                f"{self.meta.config_hash[:12]}, but this model's is {found[:12]}; {again}"
            )
        if weights_hash != self.meta.weights_hash:
            raise ArtifactError(
                f"{self.source} was made from weights {self.meta.weights_hash[:12]} of "
                f"{self.meta.model_name!r}, but "
                f"this checkpoint's are {weights_hash[:12]} (same configuration, other weights); {again}"
            )


@contextmanager
def replace_into(path: Path) -> Iterator[str]:
    """A temporary file in the same folder that takes ``path``'s place if the block ends well."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def expected_names(meta: ArtifactMeta) -> list[str]:
    """Every tensor name of an artifact in canonical order."""
    return [
        tensor_name(layer, group, which)
        for layer in range(meta.num_layers)
        for group in range(meta.groups)
        for which in MAP_NAMES
    ]


def build(
    meta: ArtifactMeta, maps: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]
) -> Artifact:
    """An artifact from ``maps[layer][group] = (Z, A, B)``; tensors are converted to float32 on the CPU."""
    tensors = {
        tensor_name(layer, group, which): tensor.detach().to("cpu", torch.float32).contiguous().clone()
        for layer, groups in enumerate(maps)
        for group, triple in enumerate(groups)
        for which, tensor in zip(MAP_NAMES, triple, strict=True)
    }
    return Artifact(meta=meta, tensors=tensors)


def _encode_meta(meta: ArtifactMeta) -> dict[str, str]:
    fields = msgspec.to_builtins(meta)
    return {key: msgspec.json.encode(value, order="sorted").decode() for key, value in fields.items()}


def _decode_meta(raw: dict[str, str], source: str) -> ArtifactMeta:
    raw.pop("format", None)  # some writers add {"format": "pt"}
    try:
        fields = {key: msgspec.json.decode(value) for key, value in raw.items()}
        if "format_version" not in fields:
            raise ArtifactError(
                f"{source} has no format_version in its metadata: not an artifact of this project"
            )
        if fields["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"{source} has format version {fields['format_version']!r}, this release reads "
                f"{FORMAT_VERSION}; "
                "make the artifact anew with `python -m sglang_tpla.calibrate`"
            )
        return msgspec.convert(fields, ArtifactMeta, strict=True)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ArtifactError(
            f"the metadata of {source} is damaged: {error}; make the artifact anew"
        ) from error


def _check_meta(meta: ArtifactMeta, source: str) -> None:
    if meta.groups < 1 or meta.num_layers < 1 or meta.latent_dim < 1:
        raise ArtifactError(
            f"{source}: groups, num_layers and latent_dim must be positive, got {meta.groups}, "
            f"{meta.num_layers}, "
            f"{meta.latent_dim}"
        )
    for label, values in (("shared_dims", meta.shared_dims), ("widths", meta.widths)):
        if len(values) != meta.num_layers:
            raise ArtifactError(
                f"{source}: expected one of {label} a layer ({meta.num_layers}), got {len(values)}"
            )
    for layer, (shared, width) in enumerate(zip(meta.shared_dims, meta.widths, strict=True)):
        if not 0 <= shared <= width or not 1 <= width <= meta.latent_dim:
            raise ArtifactError(
                f"{source}: layer {layer} has width {width} and {shared} shared dims; expected "
                f"0 <= shared <= width and 1 <= width <= {meta.latent_dim}"
            )


def _check_tensors(meta: ArtifactMeta, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    names = expected_names(meta)
    missing = [name for name in names if name not in tensors]
    extra = sorted(set(tensors) - set(names))
    if missing or extra:
        raise ArtifactError(
            f"{source}: expected the {len(names)} tensors of {meta.num_layers} layers x {meta.groups} "
            f"groups; "
            f"missing {missing[:3]} ({len(missing)} in all), not known {extra[:3]} ({len(extra)} in all)"
        )
    for layer in range(meta.num_layers):
        width, shared = meta.widths[layer], meta.shared_dims[layer]
        shapes = {"Z": (meta.latent_dim, width), "A": (width, meta.latent_dim), "B": (width, meta.latent_dim)}
        for group in range(meta.groups):
            for which, shape in shapes.items():
                name = tensor_name(layer, group, which)
                tensor = tensors[name]
                if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                    raise ArtifactError(
                        f"{source}: expected {name} as float32 {shape}, got {tensor.dtype} "
                        f"{tuple(tensor.shape)}"
                    )
                if not bool(torch.isfinite(tensor).all()):
                    raise ArtifactError(
                        f"{source}: {name} has values that are not finite; make the artifact anew"
                    )
        first = tensors[tensor_name(layer, 0, "Z")][:, :shared].contiguous().view(torch.int32)
        for group in range(1, meta.groups):
            other = tensors[tensor_name(layer, group, "Z")][:, :shared].contiguous().view(torch.int32)
            if not torch.equal(first, other):
                raise ArtifactError(
                    f"{source}: the {shared} shared columns of layer {layer} differ between groups 0 and "
                    f"{group}"
                )
