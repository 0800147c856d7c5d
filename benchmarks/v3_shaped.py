"""A checkpoint and an artifact of DeepSeek-V3's latent shape with random weights, for benchmarks that only time.

The latent (512 + 64 values a token and layer) and the heads' sizes are V3's; the caller chooses the numbers of layers
and heads and all other widths.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_tpla.artifact.artifact import SKETCHED_VERSION, ArtifactMeta, build
from sglang_tpla.artifact.model_identity import config_hash, weights_hash

NANO = Path(__file__).parents[1] / "examples" / "nano-mla"
LATENT, ROPE, NOPE, VALUE, VOCABULARY = 512, 64, 128, 128, 4096
SHARED = 64  # columns of sketched rows that every group keeps
SMALL = {"heads": 16, "hidden": 256, "query_latent": 128, "intermediate": 512}  # to try a benchmark on a CPU


@dataclass(frozen=True)
class Shape:
    """The sizes that the caller chooses.

    Args:
        layers: number of layers, all with a dense feed-forward part of ``intermediate``.
        context: the longest context in tokens.
    """

    layers: int
    context: int
    heads: int
    hidden: int
    query_latent: int
    intermediate: int


def write_checkpoint(folder: Path, shape: Shape, only_identity: bool = False) -> None:
    """Write config, tokenizer and bf16 weights.

    Args:
        only_identity: write only the weights that identify a checkpoint (`weights_hash`), the same in every layer, for
            servers that make up all weights (``--load-format dummy``).
    """
    config = json.loads((NANO / "config.json").read_text())
    config |= {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "kv_lora_rank": LATENT,
        "q_lora_rank": shape.query_latent, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE,
        "first_k_dense_replace": shape.layers, "max_position_embeddings": shape.context, "vocab_size": VOCABULARY,
    }  # fmt: skip
    config["rope_scaling"]["original_max_position_embeddings"] = shape.context
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5).to(torch.bfloat16)

    def norm(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    tensors = {}
    common = draw(shape.heads * (NOPE + VALUE), LATENT) if only_identity else None
    for layer in range(shape.layers):
        identity = {
            "self_attn.kv_a_layernorm": norm(LATENT),
            "self_attn.kv_b_proj": draw(shape.heads * (NOPE + VALUE), LATENT) if common is None else common.clone(),
        }
        rest = {} if only_identity else {
            "input_layernorm": norm(shape.hidden),
            "post_attention_layernorm": norm(shape.hidden),
            "self_attn.q_a_proj": draw(shape.query_latent, shape.hidden),
            "self_attn.q_a_layernorm": norm(shape.query_latent),
            "self_attn.q_b_proj": draw(shape.heads * (NOPE + ROPE), shape.query_latent),
            "self_attn.kv_a_proj_with_mqa": draw(LATENT + ROPE, shape.hidden),
            "self_attn.o_proj": draw(shape.hidden, shape.heads * VALUE),
            "mlp.gate_proj": draw(shape.intermediate, shape.hidden),
            "mlp.up_proj": draw(shape.intermediate, shape.hidden),
            "mlp.down_proj": draw(shape.hidden, shape.intermediate),
        }  # fmt: skip
        tensors |= {f"model.layers.{layer}.{name}.weight": value for name, value in (identity | rest).items()}
    if not only_identity:
        tensors |= {
            "model.embed_tokens.weight": draw(VOCABULARY, shape.hidden),
            "lm_head.weight": draw(VOCABULARY, shape.hidden),
            "model.norm.weight": norm(shape.hidden),
        }
    save_file(tensors, folder / "model.safetensors")


def described(model: Path, groups: int, shared: int, width: int, sketch_bits: int = 0) -> ArtifactMeta:
    """Return the description of maps for a checkpoint, without calibration; sketched rows have ``sketch_bits``."""
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    return ArtifactMeta(
        format_version=SKETCHED_VERSION if sketch_bits else 1,
        model_name=model.name,
        config_hash=config_hash(config),
        weights_hash=weights_hash(model),
        transform="identity",
        groups=groups,
        num_layers=layers,
        latent_dim=LATENT,
        rope_dim=ROPE,
        shared_dims=(shared,) * layers,
        widths=(width,) * layers,
        calibrated_tokens=0,
        corpus="none",
        corpus_hash="0" * 64,
        seed=0,
        created_by="benchmarks/v3_shaped.py",
        sketch_bits=(sketch_bits,) * layers if sketch_bits else (),
    )


def write_artifact(path: Path, model: Path, groups: int) -> None:
    """Write maps that cut the latent into ``groups`` runs of columns: transform ``identity``, without calibration."""
    meta = described(model, groups, 0, LATENT // groups)
    columns = torch.eye(LATENT).split(LATENT // groups, dim=1)
    build(meta, [[(z, z.T, z.T) for z in columns]] * meta.num_layers).save(path)


def write_sketched_artifact(path: Path, model: Path, groups: int) -> None:
    """Write maps of sketched rows that share 64 columns and deal out the others, without calibration."""
    own = (LATENT - SHARED) // groups
    meta = described(model, groups, SHARED, SHARED + own, 4)
    columns = torch.eye(LATENT)
    blocks = columns[:, SHARED:].split(own, dim=1)
    maps = []
    for group, block in enumerate(blocks):
        z = torch.cat([columns[:, :SHARED], block], dim=1)
        others = [other for index, other in enumerate(blocks) if index != group]
        b = z.T.clone()
        b[:SHARED] /= groups
        maps.append((z, torch.cat([z, *others], dim=1).T, b))
    build(meta, [maps] * meta.num_layers, [torch.cat(blocks, dim=1)] * meta.num_layers).save(path)
