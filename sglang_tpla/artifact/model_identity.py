"""The identity of an artifact's model: a hash of the attention configuration and a cheap hash of the weights.

Both are the same on every machine and for every copy of a checkpoint. Both stay cheap for a checkpoint of hundreds of
gigabytes, because the weights' hash reads at most 64 KiB and one norm vector a layer.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.config_file import language_config, real, rope_scaling, rope_theta, whole

_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_theta",
    "rms_norm_eps",
)
# These keys of rope_scaling change the model's arithmetic; the others are only spellings (type, rope_type).
_ROPE_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_DEFAULTS = {"rms_norm_eps": 1e-6}
_WEIGHTS = ("self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight")
HEAD_BYTES = 65536


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of the keys of a Hugging Face config that decide the attention's mathematics.

    Names of architectures, dtypes, vocabulary and feed-forward sizes do not count. ``rope_parameters``
    (transformers 5) and ``rope_theta`` + ``rope_scaling`` (older) give the same hash.

    Raises:
        CheckpointError: a key is missing or holds no number.
    """
    config = language_config(config)
    rope = rope_scaling(config)
    config |= {"rope_theta": rope_theta(config)}
    canonical: dict[str, Any] = {}
    for key in _KEYS:
        absent = key == "q_lora_rank" and key not in config
        canonical[key] = None if absent else real(config, key, _DEFAULTS.get(key))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        canonical["rope_scaling"] = {key: real(rope, key) for key in _ROPE_KEYS if rope.get(key) is not None}
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def weights_hash(model_path: str | Path, draft: bool = False) -> str:
    """Return the sha256 (hex) of each layer's ``kv_a_layernorm.weight`` and first 64 KiB of ``kv_b_proj.weight``.

    The hash covers stored bytes, in layer order, so that quantised and unquantised copies differ.

    Args:
        draft: also hash the NextN layer behind the others, its ``eh_proj.weight`` first.

    Raises:
        CheckpointError: the directory is no readable checkpoint of this family.
    """
    checkpoint = Checkpoint(model_path)
    layers = whole(checkpoint.config, "num_hidden_layers")
    names = [(layer, tail) for layer in range(layers) for tail in _WEIGHTS]
    if draft:
        names += [(layers, tail) for tail in ("eh_proj.weight", *_WEIGHTS)]
    digest = hashlib.sha256()
    for layer, tail in names:
        digest.update(checkpoint.stored_head(checkpoint.layer_name(layer, tail), HEAD_BYTES))
    return digest.hexdigest()
