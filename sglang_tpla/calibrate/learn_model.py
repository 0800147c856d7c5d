"""Learn the maps of a whole model, one layer after the other, resumable at every layer.

Finished layers are kept in a folder named after a hash of everything that decides the result (model, text, starting
maps, plan). So a killed run continues where it stopped, ends with the same bits, and never mixes two settings.
`forget_finished` removes the folder once the artifact is written: the error report before that takes long too, and a
disk may be full.
"""

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sglang_tpla.artifact.artifact import Artifact, ArtifactError, build, replace_into
from sglang_tpla.calibrate.learn_layer import LearnedLayer, LearnPlan, learn_layer
from sglang_tpla.calibrate.refit_values import refit_values
from sglang_tpla.calibrate.transforms import Maps
from sglang_tpla.measure.layer_inputs import sample, walk
from sglang_tpla.measure.statistics import Statistics
from sglang_tpla.reference_model.forward import Attention, AttentionInputs, PlainModel

_REFIT_SEED = 7919  # gives the refit other queries than the steps


def learn_model(
    model: PlainModel,
    start: Artifact,
    statistics: Statistics,
    tokens: torch.Tensor,
    plan: LearnPlan,
    work_folder: Path,
    *,
    refit: bool = False,
    show_progress: bool = False,
) -> Artifact:
    """Make an artifact with transform ``learned`` from a starting one.

    Args:
        model: the exact model.
        start: the maps to start from, of the same model.
        statistics: second moments, for the coordinates.
        tokens: calibration text [N, S].
        plan: steps and batches.
        work_folder: folder for finished layers, in a subfolder named by the settings.
        refit: refit the value maps in closed form at the end of each layer.
        show_progress: show a progress bar over all steps.

    Raises:
        ArtifactError: a finished layer's file is damaged.
    """
    key = _key(start, tokens, plan, refit, model)
    folder = work_folder / f"layers-{key[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    all_maps: list[Maps] = []
    total = plan.total_steps * model.spec.layers
    with tqdm(total=total, desc="learning", unit="step", disable=not show_progress) as bar:
        for layer, inputs in walk(model, tokens):
            file = _file(folder, layer)
            if file.exists():
                learned = _load(file, layer, start.meta.groups)
                bar.update(plan.total_steps)
            else:
                attention = model.layers[layer].attention
                initial = [start.maps(layer, group) for group in range(start.meta.groups)]
                shared = start.meta.shared_dims[layer]
                covariance = statistics.layers[layer].covariance
                learned = learn_layer(attention, inputs, initial, shared, covariance, plan, layer, progress=bar.update)
                if refit:
                    learned = replace(learned, maps=_refit(attention, inputs, learned.maps, plan, layer))
                _save(file, learned)
            bar.set_postfix_str(f"layer {layer}: {learned.error_before:.2e} -> {learned.error_after:.2e}")
            all_maps.append(learned.maps)
    name = "learned" if plan.steps else f"{start.meta.transform}+refit" if refit else start.meta.transform
    meta = msgspec.structs.replace(start.meta, transform=name, error_report=None)
    return build(meta, all_maps)


def forget_finished(work_folder: Path, layers: int) -> None:
    """Remove the layers of runs that have all of them, whose artifact is written; those of other runs stay."""
    for folder in work_folder.glob("layers-*"):
        if all(_file(folder, layer).exists() for layer in range(layers)):
            shutil.rmtree(folder)
    if work_folder.exists() and not any(work_folder.iterdir()):
        work_folder.rmdir()


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _refit(attention: Attention, inputs: AttentionInputs, maps: Maps, plan: LearnPlan, layer: int) -> Maps:
    generator = torch.Generator().manual_seed((plan.seed + _REFIT_SEED) * 1000003 + layer)
    size = {"sequences": 2, "queries": plan.queries, "first_query": plan.first_query}
    batches = [sample(attention, inputs, generator, **size) for _ in range(32)]
    return refit_values(attention, batches, maps, iterations=10)[0]


def _key(start: Artifact, tokens: torch.Tensor, plan: LearnPlan, refit: bool, model: PlainModel) -> str:
    digest = hashlib.sha256(start.content_hash.encode())
    digest.update(tokens.cpu().numpy().tobytes())
    settings = {**asdict(plan), "refit": refit, "device": model.device.type, "dtype": str(model.dtype)}
    digest.update(msgspec.json.encode(settings, order="sorted"))
    return digest.hexdigest()


def _save(path: Path, learned: LearnedLayer) -> None:
    tensors = {
        f"{group}.{which}": part.detach().cpu().float().contiguous().clone()
        for group, triple in enumerate(learned.maps)
        for which, part in zip("ZAB", triple, strict=True)
    }
    note = {"error_before": learned.error_before, "error_after": learned.error_after}
    with replace_into(path) as temporary:
        save_file(tensors, temporary, metadata={"note": msgspec.json.encode(note).decode()})


def _load(path: Path, layer: int, groups: int) -> LearnedLayer:
    try:
        with safe_open(path, framework="pt") as handle:
            note = msgspec.json.decode((handle.metadata() or {}).get("note", ""), type=dict[str, float])
            maps: Maps = [
                (handle.get_tensor(f"{group}.Z"), handle.get_tensor(f"{group}.A"), handle.get_tensor(f"{group}.B"))
                for group in range(groups)
            ]
        return LearnedLayer(maps, note["error_before"], note["error_after"])
    except (SafetensorError, OSError, KeyError, msgspec.MsgspecError) as error:
        raise ArtifactError(
            f"the finished layer {layer} at {path} is not readable ({error}); delete that file and run again"
        ) from error
