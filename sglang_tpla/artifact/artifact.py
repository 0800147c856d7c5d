"""The artifact: one safetensors file with the slicing maps of every layer and group, and their provenance.

Tensors, all float32, contiguous (d latent dims, w the layer's 8-bit or plain columns, g groups; n = w - r columns that
only one group keeps):

    layers.{l}.groups.{i}.Z  [d, w]   a rank caches z_i = RMSNorm(c) Z_i
    layers.{l}.groups.{i}.A  [w, d]   key map: scores use q_nope W_UK A_i^T z_i^T
    layers.{l}.groups.{i}.B  [w, d]   value map: o = sum_i (p_i z_i) B_i W_UV W_O

Format version 2 is that of sketched rows (`cache_rows.sketched`). A rank also keeps a sketch of the other groups'
columns, so a layer with own columns (n > 0) has one more tensor, and its key maps are taller:

    layers.{l}.sketch        [d, g n] blocks of all groups; a rank drops its own
    layers.{l}.groups.{i}.A  [w + (g - 1) n, d]   rows of [z_i | the other groups' blocks, ascending]

Widths may differ between layers; the groups of one layer share one width (short groups are padded with zero columns).
The first ``shared_dims[l]`` columns of Z are the same, bit for bit, in every group of layer l, so the transfer agent
sends them once. A layer with w = r = d is exact, except for the rounding of its rows.

Metadata are safetensors' string-to-string map, in which every value is JSON. They hold the hash of all content, so that
a flipped bit is noticed. Loading checks everything and fails with one ``ArtifactError``; a file that loads is safe to
serve.
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
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.errors import SglangTplaError
from sglang_tpla.reference_model.config_file import language_config, place, whole

FORMAT_VERSION = 1  # of plain rows
SKETCHED_VERSION = 2  # of sketched rows
MAP_NAMES = ("Z", "A", "B")
LARGEST_INVERSE_ERROR = 1e-2  # of an entry; the maps that calibrate writes have some 1e-6
HASH_KEY = "content_hash"  # a key of the file's metadata only; files made by other programs may lack it


class ArtifactError(SglangTplaError, ValueError):
    """An artifact cannot be used; the message says what was expected, what came, where, and what to do."""


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decode-phase error on held-out text, with an exact prompt and TPLA for every later token, against plain MLA.

    ``kl_*`` is in nats a token; ``perplexity_ratio`` is TPLA's perplexity over plain MLA's.
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
    """The provenance and layout of an artifact. ``shared_dims`` (r) and ``widths`` (w) have one entry a layer.

    ``sketch_bits`` has one entry a layer in version 2 and none in version 1; ``rope_bits`` is the number of bits of a
    rotary key's value in sketched rows.
    """

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
    sketch_bits: tuple[int, ...] = ()
    rope_bits: int = 16

    @property
    def sketched(self) -> bool:
        """Whether the maps are those of sketched rows."""
        return self.format_version == SKETCHED_VERSION

    def rows(self, layer: int) -> SketchedRows:
        """Return the sketched rows of a layer.

        Raises:
            ValueError: the artifact has no sketched rows, or sizes that the format cannot hold.
        """
        if not self.sketched:
            raise ValueError(f"an artifact of format version {self.format_version} has no sketched rows")
        return SketchedRows(
            latent_dim=self.latent_dim,
            groups=self.groups,
            shared=self.shared_dims[layer],
            own=self.widths[layer] - self.shared_dims[layer],
            rope_dim=self.rope_dim,
            sketch_bits=self.sketch_bits[layer],
            rope_bits=self.rope_bits,
        )


def sketch_name(layer: int) -> str:
    """Return the stored name of a layer's sketch map."""
    return f"layers.{layer}.sketch"


def tensor_name(layer: int, group: int, which: str) -> str:
    """Return the stored name of a map; ``which`` is Z, A or B."""
    return f"layers.{layer}.groups.{group}.{which}"


@dataclass(frozen=True)
class Artifact:
    """Maps and metadata, checked on construction.

    Args:
        meta: provenance and layout.
        tensors: float32 tensors by stored name, exactly those that ``meta`` implies.
        source: the file's name, for messages.

    Raises:
        ArtifactError: a tensor is missing, extra, of another shape or dtype or not finite; shared columns differ
            between groups; or metadata contradict each other.
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
        if path.is_dir():
            raise ArtifactError(f"expected an artifact file at {path}, found a folder; name the file in it")
        if not path.is_file():
            raise ArtifactError(
                f"expected an artifact file at {path}, found none; make one with "
                f"`python -m sglang_tpla.calibrate --model-path MODEL --groups G --out {path}`"
            )
        try:
            with safe_open(path, framework="pt") as handle:
                raw = dict(handle.metadata() or {})
                written = raw.pop(HASH_KEY, None)
                meta = _decode_meta(raw, str(path))
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{path} is not a readable safetensors file ({error}); copy it again or make it anew with "
                "`python -m sglang_tpla.calibrate`"
            ) from error
        artifact = cls(meta=meta, tensors=tensors, source=str(path))
        if written not in (None, found := msgspec.json.encode(artifact.content_hash).decode()):
            raise ArtifactError(
                f"{path} was damaged after it was written: expected content with sha256 {written}, found {found}; "
                "copy it again or make it anew with `python -m sglang_tpla.calibrate`"
            )
        if written is None:
            _check_inverses(artifact)
        return artifact

    def save(self, path: str | Path) -> None:
        """Write the whole file or nothing, through a temporary file in the same folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with replace_into(path) as temporary:
            written = {HASH_KEY: msgspec.json.encode(self.content_hash).decode()}
            save_file(tensors, temporary, metadata=_encode_meta(self.meta) | written)

    def maps(self, layer: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the maps Z [d, w], A [w, d], B [w, d] of one layer and group, float32."""
        z, a, b = (self.tensors[tensor_name(layer, group, which)] for which in MAP_NAMES)
        return z, a, b

    def sketch(self, layer: int) -> torch.Tensor:
        """Return the sketch map [d, g n] of a layer, float32; [d, 0] if the groups have no own columns.

        Raises:
            ValueError: the artifact has other rows.
        """
        if not self.meta.rows(layer).own:
            return torch.zeros(self.meta.latent_dim, 0, device="cpu")
        return self.tensors[sketch_name(layer)]

    @cached_property
    def content_hash(self) -> str:
        """The sha256 (hex) of the tensors in canonical order (layer, group, Z A B) and of the metadata."""
        digest = hashlib.sha256()
        for key, value in sorted(_encode_meta(self.meta).items()):
            digest.update(f"{key}={value}\n".encode())
        for name in expected_shapes(self.meta):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_model(self, config: Mapping[str, Any], weights_hash: str, groups: int) -> None:
        """Refuse another model or another number of groups.

        Raises:
            ArtifactError: the artifact was calibrated for another config hash, sizes, weights hash or ``groups``.
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
        self.check_sizes(config)
        if weights_hash != self.meta.weights_hash:
            raise ArtifactError(
                f"{self.source} was made from weights {self.meta.weights_hash[:12]} of {self.meta.model_name!r}, but "
                f"this checkpoint's are {weights_hash[:12]} (same configuration, other weights); {again}"
            )

    def check_sizes(self, config: Mapping[str, Any]) -> None:
        """Refuse layers or widths that differ from the model's; a file with the model's hash may still have such.

        Raises:
            ArtifactError: sizes differ; the message names all of them.
        """
        config = language_config(config)
        sizes = {
            "num_layers": whole(config, "num_hidden_layers"),
            "latent_dim": whole(config, "kv_lora_rank"),
            "rope_dim": whole(config, "qk_rope_head_dim"),
        }
        wrong = {name: size for name, size in sizes.items() if getattr(self.meta, name) != size}
        if wrong:
            expected = ", ".join(f"{name} {size}" for name, size in wrong.items())
            got = ", ".join(f"{name} {getattr(self.meta, name)}" for name in wrong)
            raise ArtifactError(
                f"{self.source}: expected {expected}, as the model's config{place(config)} says, got {got}; take this "
                "model's artifact, or make one with `python -m sglang_tpla.calibrate`"
            )


@contextmanager
def replace_into(path: Path) -> Iterator[str]:
    """Yield a temporary file in the same folder, which replaces ``path`` if the block ends without an error.

    Raises:
        OSError: the file cannot be written, also if safetensors writes it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def expected_shapes(meta: ArtifactMeta) -> dict[str, tuple[int, int]]:
    """Return the shape of each tensor by name, in canonical order: each layer's sketch, then its groups' maps."""
    d, shapes = meta.latent_dim, {}
    for layer, (width, shared) in enumerate(zip(meta.widths, meta.shared_dims, strict=True)):
        if meta.sketched and width > shared:
            shapes[sketch_name(layer)] = (d, meta.groups * (width - shared))
        keys = width + (meta.rows(layer).sketch_columns if meta.sketched else 0)
        for group in range(meta.groups):
            for which, shape in zip(MAP_NAMES, ((d, width), (keys, d), (width, d)), strict=True):
                shapes[tensor_name(layer, group, which)] = shape
    return shapes


def build(
    meta: ArtifactMeta,
    maps: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]],
    sketches: Sequence[torch.Tensor] = (),
) -> Artifact:
    """Build an artifact from ``maps[layer][group] = (Z, A, B)`` and, for sketched rows, ``sketches[layer]``.

    Tensors are converted to float32 on the CPU.
    """

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", torch.float32).contiguous().clone()

    tensors = {
        tensor_name(layer, group, which): stored(tensor)
        for layer, groups in enumerate(maps)
        for group, triple in enumerate(groups)
        for which, tensor in zip(MAP_NAMES, triple, strict=True)
    }
    tensors |= {sketch_name(layer): stored(sketch) for layer, sketch in enumerate(sketches) if sketch.numel()}
    return Artifact(meta=meta, tensors=tensors)


def _encode_meta(meta: ArtifactMeta) -> dict[str, str]:
    fields = msgspec.to_builtins(meta)
    if not meta.sketched:  # older releases read version 1 only in its own form
        del fields["sketch_bits"], fields["rope_bits"]
    return {key: msgspec.json.encode(value, order="sorted").decode() for key, value in fields.items()}


def _decode_meta(raw: dict[str, str], source: str) -> ArtifactMeta:
    raw.pop("format", None)  # some writers add {"format": "pt"}
    try:
        fields = {key: msgspec.json.decode(value) for key, value in raw.items()}
        if "format_version" not in fields:
            raise ArtifactError(f"{source} has no format_version in its metadata: not an artifact of this project")
        if fields["format_version"] not in (FORMAT_VERSION, SKETCHED_VERSION):
            raise ArtifactError(
                f"{source} has format version {fields['format_version']!r}, this release reads {FORMAT_VERSION} and "
                f"{SKETCHED_VERSION}; make the artifact anew with `python -m sglang_tpla.calibrate`"
            )
        return msgspec.convert(fields, ArtifactMeta, strict=True)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ArtifactError(f"the metadata of {source} is damaged: {error}; make the artifact anew") from error


def _check_meta(meta: ArtifactMeta, source: str) -> None:
    if meta.groups < 1 or meta.num_layers < 1 or meta.latent_dim < 1:
        raise ArtifactError(
            f"{source}: groups, num_layers and latent_dim must be positive, got {meta.groups}, {meta.num_layers}, "
            f"{meta.latent_dim}"
        )
    for label, values in (("shared_dims", meta.shared_dims), ("widths", meta.widths)):
        if len(values) != meta.num_layers:
            raise ArtifactError(f"{source}: expected one of {label} a layer ({meta.num_layers}), got {len(values)}")
    for layer, (shared, width) in enumerate(zip(meta.shared_dims, meta.widths, strict=True)):
        if not 0 <= shared <= width or not 1 <= width <= meta.latent_dim:
            raise ArtifactError(
                f"{source}: layer {layer} has width {width} and {shared} shared dims; expected "
                f"0 <= shared <= width and 1 <= width <= {meta.latent_dim}"
            )
    if len(meta.sketch_bits) != (meta.num_layers if meta.sketched else 0):
        raise ArtifactError(
            f"{source}: expected sketch_bits a layer ({meta.num_layers}) in format version {SKETCHED_VERSION} and none "
            f"in {FORMAT_VERSION}, got {len(meta.sketch_bits)} in version {meta.format_version}"
        )
    for layer in range(meta.num_layers if meta.sketched else 0):
        try:
            meta.rows(layer)
        except ValueError as error:
            raise ArtifactError(f"{source}: layer {layer}: {error}") from error


def _check_tensors(meta: ArtifactMeta, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    if meta.groups > len(tensors):  # check this before making a name for each
        raise ArtifactError(f"{source}: expected tensors of {meta.groups} groups, got {len(tensors)} tensors in all")
    shapes = expected_shapes(meta)
    missing = [name for name in shapes if name not in tensors]
    extra = sorted(set(tensors) - set(shapes))
    if missing or extra:
        raise ArtifactError(
            f"{source}: expected the {len(shapes)} tensors of {meta.num_layers} layers x {meta.groups} groups; missing "
            f"{missing[:3]} ({len(missing)} in all), not known {extra[:3]} ({len(extra)} in all)"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ArtifactError(
                f"{source}: expected {name} as float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{source}: {name} has values that are not finite; make the artifact anew")
    for layer, shared in enumerate(meta.shared_dims):
        first, *others = (
            tensors[tensor_name(layer, group, "Z")][:, :shared].contiguous().view(torch.int32)
            for group in range(meta.groups)
        )
        for group, other in enumerate(others, start=1):
            if not torch.equal(first, other):
                raise ArtifactError(
                    f"{source}: the {shared} shared columns of layer {layer} differ between groups 0 and {group}"
                )


def _check_inverses(artifact: Artifact) -> None:
    """Refuse sketched rows whose maps do not give the latent back, in a file without a hash that would notice it."""
    meta = artifact.meta
    for layer in range(meta.num_layers if meta.sketched else 0):
        sketch = artifact.sketch(layer).double()
        blocks = sketch.split(meta.rows(layer).own, 1) if sketch.numel() else ()
        groups = [[tensor.double() for tensor in artifact.maps(layer, group)] for group in range(meta.groups)]
        products = {
            tensor_name(layer, i, "A"): torch.cat([z, *blocks[:i], *blocks[i + 1 :]], 1) @ a
            for i, (z, a, _) in enumerate(groups)
        } | {f"the sum of Z B over the groups of layer {layer}": torch.stack([z @ b for z, _, b in groups]).sum(0)}
        for name, product in products.items():
            error = float((product - torch.eye(meta.latent_dim, dtype=torch.float64)).abs().max())
            if not error <= LARGEST_INVERSE_ERROR:
                raise ArtifactError(
                    f"{artifact.source} has no {HASH_KEY}, and its maps contradict each other: expected {name} to give "
                    f"the latent back within {LARGEST_INVERSE_ERROR:g}, found an error of {error:.3g}; copy the file "
                    "again or make it anew with `python -m sglang_tpla.calibrate`"
                )
