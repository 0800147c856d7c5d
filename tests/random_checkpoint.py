"""Small random checkpoints of the served model families, as Hugging Face stores them: sharded, with an index."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# 4 heads of 32 + 16 over a latent of 64: sizes are the only thing that differs from the published configs.
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "vocab_size": 4096, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
BIASED = {"topk_method": "noaux_tc", "norm_topk_prob": True, "n_group": 1, "topk_group": 1}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "scoring_func": "sigmoid"} | BIASED
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v2": SIZES
    | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None,
        "rope_theta": 10000,
        "rope_scaling": YARN, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    },
    "moonlight": SIZES
    | V3
    | {"q_lora_rank": None, "rope_theta": 50000.0, "rope_scaling": None, "routed_scaling_factor": 2.446},
    "kimi-k2": SIZES
    | V3
    | {"q_lora_rank": 96, "rope_theta": 50000.0, "rope_scaling": YARN, "routed_scaling_factor": 2.827},
    "glm-4.7-flash": SIZES
    | BIASED
    | {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "q_lora_rank": 96,
        "rope_theta": 1000000.0, "routed_scaling_factor": 1.8, "partial_rotary_factor": 1.0, "qk_nope_head_dim": 24,
    },
    "deepseek-v2.5": SIZES
    | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": 96, "rope_theta": 10000,
        "rope_scaling": YARN, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False,
        "routed_scaling_factor": 16.0, "n_group": 4, "topk_group": 2,
    },
    "deepseek-v3": SIZES
    | V3
    | {
        "q_lora_rank": 96, "rope_theta": 10000, "rope_scaling": YARN, "routed_scaling_factor": 2.5, "n_group": 4,
        "topk_group": 2,
    },
}  # fmt: skip
# The encoders are as small as they can be: no test shows them an image.
VISION = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
VISION_K25 = VISION | {
    "text_hidden_size": 128, "mm_hidden_size": 32, "vt_hidden_size": 32, "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 1, "vt_intermediate_size": 32,
}  # fmt: skip
# name -> the language model, the key of its config, the prefix of its weights, and what the wrapper adds
WRAPPERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "kimi-k2.5": (
        "kimi-k2",
        "text_config",
        "language_model.",
        {
            "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
            "vision_config": VISION_K25, "media_placeholder_token_id": 4095,
        },
    ),
    "kimi-vl": (
        "moonlight",
        "text_config",
        "language_model.",
        {
            "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl",
            "vision_config": VISION, "media_placeholder_token_id": 4095,
        },
    ),
    "deepseek-vl2": (
        "deepseek-v2",
        "language_config",
        "language.",
        {
            "model_type": "deepseek_vl_v2", "tile_tag": "2D",
            "projector_config": {"projector_type": "linear", "input_dim": 8, "n_embed": 128},
            "candidate_resolutions": [[384, 384]],
        },
    ),
}  # fmt: skip
PROCESSOR_CONFIG = {
    "auto_map": {"AutoProcessor": "processing_text.TextProcessor"},
    # what SGLang's own processor needs, for DeepSeek-VL2
    "candidate_resolutions": [[384, 384]], "patch_size": 14, "downsample_ratio": 2,
}  # fmt: skip
# Published wrappers carry their processor's code, which SGLang runs with --trust-remote-code. This one takes text.
TEXT_PROCESSOR = '''"""A processor without images."""
from types import SimpleNamespace

from transformers import AutoTokenizer, ProcessorMixin


class TextProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor = None
        config = dict(patch_size=14, merge_kernel_size=2, in_patch_limit=64, patch_limit_on_one_side=8)
        self.media_processor = SimpleNamespace(media_proc_cfg=config | dict(image_mean=[0.5], image_std=[0.5]))

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls(AutoTokenizer.from_pretrained(path))
'''


def draw_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights of a whole model under their published names, bfloat16 but for the routers' biases."""
    generator = torch.Generator().manual_seed(0)
    hidden, heads, d, rope = (
        config[name] for name in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
    )
    nope, value, rank = config["qk_nope_head_dim"], config["v_head_dim"], config.get("q_lora_rank")
    weights: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        drawn = torch.randn(rows, columns, generator=generator) * columns**-0.5
        weights[f"{name}.weight"] = drawn.bfloat16()

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = (1 + 0.2 * torch.randn(size, generator=generator)).bfloat16()

    def gated(name: str, inner: int) -> None:
        matrix(f"{name}.gate_proj", inner, hidden)
        matrix(f"{name}.up_proj", inner, hidden)
        matrix(f"{name}.down_proj", hidden, inner)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    matrix("lm_head", config["vocab_size"], hidden)
    norm("model.norm", hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        norm(f"{name}.input_layernorm", hidden)
        norm(f"{name}.post_attention_layernorm", hidden)
        if rank is None:
            matrix(f"{name}.self_attn.q_proj", heads * (nope + rope), hidden)
        else:
            matrix(f"{name}.self_attn.q_a_proj", rank, hidden)
            norm(f"{name}.self_attn.q_a_layernorm", rank)
            matrix(f"{name}.self_attn.q_b_proj", heads * (nope + rope), rank)
        matrix(f"{name}.self_attn.kv_a_proj_with_mqa", d + rope, hidden)
        norm(f"{name}.self_attn.kv_a_layernorm", d)
        matrix(f"{name}.self_attn.kv_b_proj", heads * (nope + value), d)
        matrix(f"{name}.self_attn.o_proj", hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            gated(f"{name}.mlp", config["intermediate_size"])
            continue
        matrix(f"{name}.mlp.gate", config["n_routed_experts"], hidden)
        if config["topk_method"] == "noaux_tc":
            bias = 0.1 * torch.randn(config["n_routed_experts"], generator=generator)
            weights[f"{name}.mlp.gate.e_score_correction_bias"] = bias
        for expert in range(config["n_routed_experts"]):
            gated(f"{name}.mlp.experts.{expert}", config["moe_intermediate_size"])
        gated(f"{name}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
    return weights


def save(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer_of: str) -> Path:
    """Write a checkpoint in two shards with their index, and another checkpoint's tokenizer; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    place: dict[str, str] = {}
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{shard:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        place |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(tokenizer_of) / file, folder / file)
    return folder


def random_checkpoint(folder: Path, family: str, tokenizer_of: str) -> Path:
    """A small random checkpoint of a family of `CONFIGS` or `WRAPPERS`."""
    if family in CONFIGS:
        return save(folder, CONFIGS[family], draw_weights(CONFIGS[family]), tokenizer_of)
    name, key, prefix, outer = WRAPPERS[family]
    inner = CONFIGS[name]
    weights = {prefix + name: weight for name, weight in draw_weights(inner).items()}
    save(folder, {**outer, key: inner}, weights, tokenizer_of)
    (folder / "processing_text.py").write_text(TEXT_PROCESSOR)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR_CONFIG))
    return folder
