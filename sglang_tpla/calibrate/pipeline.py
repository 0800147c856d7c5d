"""The steps of the calibration command, from second moments to an artifact, as functions."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from tqdm import tqdm

import sglang_tpla
from sglang_tpla.artifact.artifact import FORMAT_VERSION, SKETCHED_VERSION, Artifact, ArtifactMeta, build
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.rounding_cost import LayerCosts
from sglang_tpla.calibrate.sketch_maps import layer_sketched_maps
from sglang_tpla.calibrate.transforms import TransformError, layer_maps
from sglang_tpla.measure.decode_error import measure, model_maps
from sglang_tpla.measure.statistics import Statistics, StatisticsError
from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.forward import PlainModel, absorbed_weights
from sglang_tpla.reference_model.spec import ModelSpec


def closed_form(
    statistics: Statistics,
    checkpoint: Checkpoint,
    transform: str,
    groups: int,
    shared_dims: Sequence[int],
    key_map: str = "regression",
) -> Artifact:
    """Return an artifact of plain rows, with an r per layer, from second moments and kv_b_proj alone.

    Raises:
        TransformError: the settings give no transform.
        StatisticsError: the moments are of another model.
    """
    check_statistics(statistics, checkpoint)
    spec, seed = ModelSpec.from_config(checkpoint.config), statistics.meta.seed
    maps = []
    for layer, (moments, shared) in enumerate(zip(statistics.layers, shared_dims, strict=True)):
        w_uk, _ = absorbed_weights(checkpoint, spec, layer)
        maps.append(layer_maps(transform, moments, w_uk, groups, shared, seed, key_map))
    meta = msgspec.structs.replace(
        _provenance(statistics, spec, transform, groups),
        shared_dims=tuple(shared_dims),
        widths=tuple(layer[0][0].shape[1] for layer in maps),
    )
    return build(meta, maps)


def layer_costs(statistics: Statistics, checkpoint: Checkpoint) -> list[LayerCosts]:
    """Return the cost of rounding in every layer, from second moments and kv_b_proj alone.

    Raises:
        StatisticsError: the moments are of another model.
    """
    check_statistics(statistics, checkpoint)
    spec = ModelSpec.from_config(checkpoint.config)
    return [
        LayerCosts.of(moments, *absorbed_weights(checkpoint, spec, layer), spec.scale)
        for layer, moments in enumerate(statistics.layers)
    ]


def sketched_form(
    statistics: Statistics, spec: ModelSpec, costs: Sequence[LayerCosts], rows: Sequence[SketchedRows]
) -> Artifact:
    """Return an artifact of sketched rows, sized layer by layer, from the cost of rounding in every layer.

    Raises:
        TransformError: layers differ in groups or the rotary key's bits, or the rows are of another model.
    """
    first = rows[0]
    for layer_rows in rows:
        if (layer_rows.latent_dim, layer_rows.rope_dim) != (spec.latent_dim, spec.rope_dim) or (
            layer_rows.groups,
            layer_rows.rope_bits,
        ) != (first.groups, first.rope_bits):
            raise TransformError(
                f"expected rows of {spec.latent_dim} + {spec.rope_dim} values with the same groups and --rope-bits in "
                f"every layer, got {layer_rows}"
            )
    maps = [layer_sketched_maps(cost, layer_rows) for cost, layer_rows in zip(costs, rows, strict=True)]
    meta = msgspec.structs.replace(
        _provenance(statistics, spec, "shared", first.groups),
        format_version=SKETCHED_VERSION,
        shared_dims=tuple(layer_rows.shared for layer_rows in rows),
        widths=tuple(layer_rows.w for layer_rows in rows),
        sketch_bits=tuple(layer_rows.sketch_bits for layer_rows in rows),
        rope_bits=first.rope_bits,
    )
    triples = [list(zip(layer.z, layer.a, layer.b, strict=True)) for layer in maps]
    return build(meta, triples, [layer.sketch for layer in maps])


def check_statistics(statistics: Statistics, checkpoint: Checkpoint) -> None:
    """Refuse moments of another model.

    Raises:
        StatisticsError: the configuration or weights differ, or layers, heads or tokens are too few.
    """
    spec = ModelSpec.from_config(checkpoint.config)
    found = (config_hash(checkpoint.config), weights_hash(checkpoint.path))
    meta = statistics.meta
    if (meta.config_hash, meta.weights_hash) != found:
        raise StatisticsError(
            f"the statistics are of {meta.model_name} (configuration {meta.config_hash[:12]}, weights "
            f"{meta.weights_hash[:12]}), the checkpoint {checkpoint.path} has {found[0][:12]} and "
            f"{found[1][:12]}; collect them from this model"
        )
    heads = statistics.layers[0].query_outer.shape[0]
    if (len(statistics.layers), heads) != (spec.layers, spec.heads):
        raise StatisticsError(
            f"expected statistics of {spec.layers} layers and {spec.heads} heads, got {len(statistics.layers)} and "
            f"{heads}; give the files of every tensor-parallel rank"
        )
    sizes = statistics.layers[0].latent_sum.shape[0], statistics.layers[0].query_outer.shape[1]
    if sizes != (spec.latent_dim, spec.nope_dim):
        raise StatisticsError(
            f"expected statistics of latents of {spec.latent_dim} values and queries of {spec.nope_dim}, got "
            f"{sizes[0]} and {sizes[1]}: the file is damaged; collect them again"
        )
    if statistics.tokens < spec.latent_dim:
        raise StatisticsError(
            f"expected statistics over at least {spec.latent_dim} tokens, one a latent dimension, got "
            f"{statistics.tokens}; collect longer"
        )


def _provenance(statistics: Statistics, spec: ModelSpec, transform: str, groups: int) -> ArtifactMeta:
    """Return metadata of plain rows, without the layers' widths."""
    source = statistics.meta
    return ArtifactMeta(
        format_version=FORMAT_VERSION,
        model_name=source.model_name,
        config_hash=source.config_hash,
        weights_hash=source.weights_hash,
        transform=transform,
        groups=groups,
        num_layers=spec.layers,
        latent_dim=spec.latent_dim,
        rope_dim=spec.rope_dim,
        shared_dims=(),
        widths=(),
        calibrated_tokens=statistics.tokens,
        corpus=source.corpus,
        corpus_hash=source.corpus_hash,
        seed=source.seed,
        created_by=f"sglang_tpla {sglang_tpla.__version__}",
    )


def with_report(
    artifact: Artifact,
    model: PlainModel,
    held_out: torch.Tensor,
    prompt_tokens: int,
    *,
    show_progress: bool,
) -> Artifact:
    """Return the artifact with its decode error on held-out text [sequences, length]."""
    with tqdm(total=held_out.numel(), desc="held-out error", unit="tok", disable=not show_progress) as bar:
        (errors,) = measure(model, held_out, [model_maps(artifact, model)], prompt_tokens, progress=bar.update)
    meta = msgspec.structs.replace(artifact.meta, error_report=errors.report())
    return replace(artifact, meta=meta)
