"""A checkpoint with its NextN layer, put together as DeepSeek-V3's are, and one with a wider rope for GPU kernels."""

import json
import shutil
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.measure.text import TextPlan, read_text
from sglang_tpla.reference_model.forward import PlainModel, rms_norm

NEXTN_FILE = "nextn.safetensors"


def with_nextn(model: Path, nextn: Path, out: Path, *, rope_dim: int | None = None) -> Path:
    """Write ``model`` and the layer in ``nextn`` to the folder ``out``.

    Args:
        rope_dim: twice the model's own where the kernels need it so: the same function with every second frequency
            unused (`widen_rope`).
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model / name).is_file():
            shutil.copy(model / name, out / name)
    config = json.loads((model / "config.json").read_text())
    shards = {path.name: load_file(path) for path in [*model.glob("*.safetensors"), nextn / NEXTN_FILE]}
    if rope_dim is not None and rope_dim != config["qk_rope_head_dim"]:
        shards = {name: widen_rope(tensors, config, rope_dim) for name, tensors in shards.items()}
        config["qk_rope_head_dim"] = rope_dim
    config["num_nextn_predict_layers"] = 1
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name, tensors in shards.items():
        save_file(tensors, out / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def widen_rope(tensors: dict[str, torch.Tensor], config: dict[str, int], rope_dim: int) -> dict[str, torch.Tensor]:
    """The same attention with twice as many rotary values a head.

    Pair i of ``rope_dim`` values turns at the frequency ``base ** (-2 i / rope_dim)``: the old pair i is the new pair
    2 i, and those between are zero. The softmax scale is the root of the query's width, which the queries make up for.
    """
    heads, nope, old = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent = config["kv_lora_rank"]
    assert rope_dim == 2 * old, (rope_dim, old)
    places = torch.arange(old) // 2 * 4 + torch.arange(old) % 2  # pairs are neighbours, in interleaved order
    factor = ((nope + rope_dim) / (nope + old)) ** 0.5
    result = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
            wide = weight.new_zeros(latent + rope_dim, weight.shape[1])
            wide[:latent], wide[latent + places] = weight[:latent], weight[latent:]
            result[name] = wide
        elif name.endswith(("self_attn.q_b_proj.weight", "self_attn.q_proj.weight")):
            own = weight.view(heads, nope + old, -1).float() * factor
            wide = own.new_zeros(heads, nope + rope_dim, own.shape[2])
            wide[:, :nope], wide[:, nope + places] = own[:, :nope], own[:, nope:]
            result[name] = wide.flatten(0, 1).to(weight.dtype)
    return result


def pad_latent(model: Path, out: Path, latent: int) -> Path:
    """The same model with a wider latent whose further values are zero: stock kernels serve 512 + 64 alone.

    The latent's norm divides by the root of a mean over all values, so its weight shrinks by the root of what the width
    grows by (a power of four keeps it exact).
    """
    shutil.copytree(model, out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    old, factor = config["kv_lora_rank"], (config["kv_lora_rank"] / latent) ** 0.5
    for name in ("model.safetensors", NEXTN_FILE):
        tensors = load_file(out / name)
        for key, weight in tensors.items():
            if key.endswith("self_attn.kv_a_proj_with_mqa.weight"):
                zeros = weight.new_zeros(latent - old, weight.shape[1])
                tensors[key] = torch.cat((weight[:old], zeros, weight[old:]))
            elif key.endswith("self_attn.kv_a_layernorm.weight"):
                tensors[key] = torch.cat((weight * factor, weight.new_ones(latent - old)))
            elif key.endswith("self_attn.kv_b_proj.weight"):
                tensors[key] = torch.cat((weight, weight.new_zeros(len(weight), latent - old)), dim=1)
        save_file(tensors, out / name, metadata={"format": "pt"})
    config["kv_lora_rank"] = latent
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def copied_layer(model: Path, out: Path) -> Path:
    """A NextN layer for a checkpoint that has none: its last layer, over the hidden state as it came.

    It guesses what the target has just said: sometimes right, mostly not, which is what a test of both needs.
    """
    config = json.loads((model / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    weights = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    last, own = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    tensors = {own + name[len(last) :]: weight for name, weight in weights.items() if name.startswith(last)}
    norm = weights["model.norm.weight"]
    tensors[own + "enorm.weight"] = tensors[own + "hnorm.weight"] = torch.ones_like(norm)
    tensors[own + "eh_proj.weight"] = torch.cat((torch.zeros(hidden, hidden), torch.eye(hidden)), dim=1).to(norm)
    tensors[own + "shared_head.norm.weight"] = norm
    out.mkdir(parents=True, exist_ok=True)
    copied = {name: weight.clone() for name, weight in tensors.items()}
    save_file(copied, out / NEXTN_FILE, metadata={"format": "pt"})
    return out


def fitted_layer(model: Path, out: Path, text_tokens: int = 65536) -> Path:
    """A NextN layer that guesses well without training: the linear map of least squares, in a layer that adds nothing.

    It leads from the next token's embedding and the hidden state to the next hidden state. Of nano-mla's tokens it
    guesses two in five.
    """
    copied_layer(model, out)
    plain = PlainModel(str(model))
    rows = read_text(TextPlan((), 0, text_tokens, 0, 128, 128), plain.checkpoint).calibration  # [sequences, 256]
    hidden, eps = plain.spec.hidden, plain.spec.eps
    moments, products = torch.zeros(2 * hidden, 2 * hidden), torch.zeros(2 * hidden, hidden)
    one = torch.ones(hidden)
    for tokens in rows.split(16):
        states = plain.hidden_states(tokens)
        given = (plain.embedding[tokens[:, 1:]], states[:, :-1])
        inputs = torch.cat([rms_norm(part, one, eps) for part in given], dim=-1).flatten(0, 1)
        moments += inputs.T @ inputs
        products += inputs.T @ (states[:, 1:] / plain.final_norm).flatten(0, 1)
    fitted = torch.linalg.solve(moments + 1e-3 * len(rows) * torch.eye(2 * hidden), products)
    tensors = load_file(out / NEXTN_FILE)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensor)
        elif name.endswith("eh_proj.weight"):
            tensors[name] = fitted.T.to(tensor.dtype).contiguous()
    save_file(tensors, out / NEXTN_FILE, metadata={"format": "pt"})
    return out


def artifact_for(model: Path, artifact: str, out: Path) -> Path:
    """The artifact of a checkpoint for the one with its NextN layer: the same maps, another identity."""
    found = Artifact.load(artifact)
    config = json.loads((model / "config.json").read_text())
    meta = msgspec.structs.replace(
        found.meta, model_name=model.name, config_hash=config_hash(config), weights_hash=weights_hash(model)
    )
    Artifact(meta, found.tensors).save(out)
    return out
