"""The plain forward is tested against transformers' models, and its TPLA mode against a loop from the equations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.artifact.model_identity import weights_hash
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.reference_model.checkpoint import Checkpoint, CheckpointError, dequantise_blocks
from sglang_tpla.reference_model.forward import Bf16Maps, PlainModel
from tests.block_fp8 import quantise_blocks
from tests.random_checkpoint import save
from tests.shipped import ARTIFACT, NANO

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "rope_theta": 10000.0,
}


def save_random(kind: str, path: Path, **changes: object):
    """Save a random model of a family where the plain forward can read it."""
    torch.manual_seed(0)
    config_class, model_class = {
        "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
        "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    }[kind]
    config = config_class(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    model = model_class(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default 0.02 leaves attention uniform, which would hide a wrong scale.
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[-1]))
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.uniform_(-0.3, 0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("v3", {}),
        ("v3", {"q_lora_rank": None}),
        ("v3", {"rope_parameters": YARN}),
        ("v3", {"rope_interleave": False}),
        ("v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
        ("v2", {"topk_method": "greedy", "norm_topk_prob": False, "q_lora_rank": None}),
        ("v2", {"topk_method": "greedy", "norm_topk_prob": False, "n_routed_experts": None}),
    ],
)
def test_random_models_equal_transformers(kind: str, changes: dict, tmp_path: Path) -> None:
    if kind == "v2" and changes.get("n_routed_experts", 1) is None:
        changes = {**changes, "n_routed_experts": 8, "first_k_dense_replace": 3}
    reference = save_random(kind, tmp_path, **changes)
    tokens = torch.randint(0, 97, (2, 61), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
    found = PlainModel(tmp_path).forward(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_nano_equals_transformers(nano_model: PlainModel) -> None:
    reference = transformers.DeepseekV3ForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()
    tokens = torch.randint(3, 4096, (2, 130), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(nano_model.forward(tokens), expected, atol=1e-4, rtol=1e-4)


def random_maps(layers: int, groups: int, latent: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[0])

    return [
        [(matrix(latent, width), matrix(width, latent), matrix(width, latent)) for _ in range(groups)]
        for _ in range(layers)
    ]


def decode_by_the_book(model: PlainModel, tokens: torch.Tensor, maps, prompt: int) -> torch.Tensor:
    """Compute the logits of one sequence [S] token by token: absorbed queries, sliced cache, one softmax a group."""
    spec = model.spec
    exact_hidden, cache = model.prefill(tokens[None, :prompt])
    latents = [list(layer.latent[0]) for layer in cache]
    ropes = [list(layer.k_rope[0]) for layer in cache]
    rows = list(model.logits(exact_hidden)[0])
    for position in range(prompt, len(tokens)):
        hidden = model.embedding[tokens[position]][None, None]
        for index, layer in enumerate(model.layers):
            inputs = model.attention_inputs(index, hidden, position)
            latents[index].append(inputs.latent[0, 0])
            ropes[index].append(inputs.k_rope[0, 0])
            c, k_rope = torch.stack(latents[index]), torch.stack(ropes[index])
            heads = []
            for head in range(spec.heads):
                w_uk, w_uv = layer.attention.w_uk[head], layer.attention.w_uv[head]
                out = torch.zeros(spec.value_dim)
                for z_map, a_map, b_map in maps[index]:
                    z = c @ z_map
                    absorbed = inputs.q_nope[0, head, 0] @ w_uk @ a_map.T
                    scores = spec.scale * (z @ absorbed + k_rope @ inputs.q_rope[0, head, 0])
                    out = out + scores.softmax(0) @ z @ b_map @ w_uv.T
                heads.append(out)
            hidden = model.finish_layer(index, hidden, F.linear(torch.cat(heads), layer.attention.o)[None, None])
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + spec.eps) * model.final_norm
        rows.append(F.linear(normed[0, 0], model.lm_head))
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_teacher_forced_tpla_equals_token_by_token(groups: int, tmp_path: Path) -> None:
    save_random("v3", tmp_path, rope_parameters=YARN)
    model = PlainModel(tmp_path, torch.float32)
    tokens = torch.randint(0, 97, (23,), generator=torch.Generator().manual_seed(3))
    maps = random_maps(3, groups, 16, 7, seed=4)
    expected = decode_by_the_book(model, tokens, maps, prompt=9)
    found = model.forward(tokens[None], maps=maps, prompt_tokens=9)[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # The prompt goes through plain MLA, and the rest does not.
    plain = model.forward(tokens[None])[0]
    torch.testing.assert_close(found[:9], plain[:9], atol=1e-4, rtol=1e-4)
    assert (found[9:] - plain[9:]).abs().max() > 0.1


@pytest.mark.parametrize("prompt_tokens", [20, 30])
def test_a_prompt_that_is_the_whole_text_is_exact(nano_model: PlainModel, prompt_tokens: int) -> None:
    tokens, maps = torch.arange(5, 25)[None], model_maps(Artifact.load(ARTIFACT), nano_model)
    with torch.inference_mode():
        found = nano_model.forward(tokens, maps=maps, prompt_tokens=prompt_tokens)
        assert torch.equal(found, nano_model.forward(tokens))


def test_block_fp8_is_dequantised() -> None:
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.5
    found = dequantise_blocks(weight, scale, (128, 128))
    for row, column in ((0, 0), (127, 128), (128, 127), (199, 299)):
        expected = weight[row, column].float() * scale[row // 128, column // 128]
        assert found[row, column] == expected
    with pytest.raises(CheckpointError, match=r"\(2, 3\)"):
        dequantise_blocks(weight, scale[:, :2], (128, 128))


def test_a_model_without_latent_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.layers.0.self_attn.k_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="multi-head latent attention"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 4},
        {"qk_nope_head_dim": 16, "v_head_dim": 48},
        {"kv_lora_rank": 64},
        {"qk_rope_head_dim": 16},
        {"q_lora_rank": 64},
        {"hidden_size": 128},
        {"n_routed_experts": 4},
        {"vocab_size": 4095},
    ],
)
def test_a_config_of_another_model_is_refused(sizes: dict[str, int], nano_model: PlainModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(nano_model.checkpoint.config | sizes))
    (tmp_path / "model.safetensors").symlink_to((NANO / "model.safetensors").resolve())
    with pytest.raises(CheckpointError, match=r"as its config\.json implies, got .*: the two are not of one model"):
        PlainModel(tmp_path)


@pytest.mark.parametrize("tail", ["self_attn.kv_a_layernorm.weight", "mlp.gate_proj.weight", "input_layernorm.weight"])
def test_a_tensor_cut_short_is_named(tail: str, nano_model: PlainModel, tmp_path: Path) -> None:
    weights = load_file(NANO / "model.safetensors")
    name = f"model.layers.0.{tail}"
    weights[name] = weights[name][:64].clone()
    with pytest.raises(CheckpointError, match=f"expected {name!r} in .* to be "):
        PlainModel(save(tmp_path / "model", nano_model.checkpoint.config, weights, str(NANO)))


def test_weights_stored_as_integers_are_refused(nano_model: PlainModel, tmp_path: Path) -> None:
    """8-bit integers have the shape of the weights, and would pass for weights a hundred times as large."""
    weights = load_file(NANO / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    step = weights[name].float().abs().amax(1, keepdim=True) / 127
    weights[name], weights[f"{name}_scale"] = (weights[name].float() / step).round().to(torch.int8), step
    folder = save(tmp_path / "model", nano_model.checkpoint.config, weights, str(NANO))
    with pytest.raises(CheckpointError, match=f"{name!r} in .* is stored as torch.int8: expected bfloat16"):
        PlainModel(folder)


def test_a_head_of_its_own_is_not_replaced_by_the_embedding(nano_model: PlainModel, tmp_path: Path) -> None:
    config, weights = nano_model.checkpoint.config, load_file(NANO / "model.safetensors")
    del weights["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"expected a tensor 'lm_head\.weight' in "):
        PlainModel(save(tmp_path / "lost", config | {"tie_word_embeddings": False}, weights, str(NANO)))
    tied = PlainModel(save(tmp_path / "tied", config | {"tie_word_embeddings": True}, weights, str(NANO)))
    assert torch.equal(tied.lm_head, tied.embedding)
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])  # SGLang ignores it, too
    tied = PlainModel(save(tmp_path / "stale", config | {"tie_word_embeddings": True}, weights, str(NANO)))
    assert torch.equal(tied.lm_head, tied.embedding)


def test_tensors_of_another_model_are_left_out(nano_model: PlainModel, tmp_path: Path) -> None:
    """SGLang loads the names that it knows and warns of others, such as those of a draft head in the same folder."""
    config, weights = nano_model.checkpoint.config, load_file(NANO / "model.safetensors")
    name = "layers.0.self_attn.kv_b_proj.weight"
    weights[f"draft.{name}"] = torch.zeros_like(weights[f"model.{name}"])
    folder = save(tmp_path / "draft", config, weights, str(NANO))
    assert Checkpoint(folder).prefix == "model." and weights_hash(folder) == weights_hash(NANO)
    weights["draft.embed_tokens.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"tensors of several models, draft\.\*, model\.\*"):
        Checkpoint(save(tmp_path / "two", config, weights, str(NANO)))


def test_a_device_computes() -> None:
    with pytest.raises(CheckpointError, match="expected a torch device that computes, got 'meta'"):
        PlainModel(NANO, device="meta")


def test_a_shard_or_an_index_that_cannot_be_read_is_named(nano_model: PlainModel, tmp_path: Path) -> None:
    save(tmp_path / "model", nano_model.checkpoint.config, load_file(NANO / "model.safetensors"), str(NANO))
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a readable safetensors file"):
        PlainModel(tmp_path / "model")
    shard.write_bytes(whole)
    index = tmp_path / "model" / "model.safetensors.index.json"
    for content in (b"[1]", b"{}", b'{"weight_map": [1]}', b'{"weight_map": {"a": 1}}', b"\xff", b"{"):
        index.write_bytes(content)
        with pytest.raises(CheckpointError, match="weight_map"):
            Checkpoint(tmp_path / "model")


def test_files_are_checked_before_the_first_layer(nano_model: PlainModel, tmp_path: Path) -> None:
    """A model read layer by layer would otherwise fail hours later, at the first layer of the damaged file."""
    weights = load_file(NANO / "model.safetensors")
    folder = save(tmp_path / "model", nano_model.checkpoint.config, weights, str(NANO))
    last = {name for name in weights if name.startswith("model.layers.3.")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(last, "last.safetensors")
    index["weight_map"]["model.layers.9.draft.weight"] = "left_out.safetensors"  # no layer of the model
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: weights[name] for name in last}, folder / "last.safetensors")
    PlainModel(folder, resident=False)

    save_file({name: weights[name] for name in sorted(last)[1:]}, folder / "last.safetensors")
    with pytest.raises(CheckpointError, match=f"names last.safetensors for '{min(last)}', which is not in that file"):
        PlainModel(folder, resident=False)
    (folder / "last.safetensors").write_bytes((folder / "last.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"last.safetensors is not a readable safetensors file.*copy it again"):
        PlainModel(folder, resident=False)
    (folder / "last.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"last.safetensors for 'model.layers.3.*missing"):
        PlainModel(folder, resident=False)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in last}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected a tensor 'model.layers.3.self_attn.kv_b_proj.weight'"):
        PlainModel(folder, resident=False)


def test_a_tensor_in_two_files_needs_an_index(nano_model: PlainModel, tmp_path: Path) -> None:
    weights = load_file(NANO / "model.safetensors")
    folder = save(tmp_path / "model", nano_model.checkpoint.config, weights, str(NANO))
    save_file({"model.norm.weight": 2 * weights["model.norm.weight"]}, folder / "older.safetensors")
    assert torch.equal(PlainModel(folder).final_norm, nano_model.final_norm)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' in model-0000\d-of-00002.safetensors and older"):
        Checkpoint(folder)


def test_fp8_shards_are_read_as_shipped(nano_model: PlainModel, tmp_path: Path) -> None:
    """nano-mla in 128 x 128 blocks over two shards computes the same as its dequantised weights."""
    stored, plain = load_file(NANO / "model.safetensors"), load_file(NANO / "model.safetensors")
    for name in plain:
        if name.endswith("_proj.weight") and ".self_attn." in name:
            stored[name], stored[f"{name}_scale_inv"] = quantise_blocks(plain[name])
            plain[name] = dequantise_blocks(stored[name], stored[f"{name}_scale_inv"], (128, 128))
    for folder, weights in (("fp8", stored), ("plain", plain)):
        save(tmp_path / folder, nano_model.checkpoint.config, weights, str(NANO))
    tokens = torch.randint(3, 4096, (1, 40), generator=torch.Generator().manual_seed(5))
    found = PlainModel(tmp_path / "fp8", resident=False).forward(tokens)
    torch.testing.assert_close(found, PlainModel(tmp_path / "plain").forward(tokens), atol=1e-4, rtol=1e-4)
    assert (found - nano_model.forward(tokens)).abs().max() > 1e-2

    index_path = tmp_path / "fp8" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"]["model.layers.0.self_attn.kv_b_proj.weight_scale_inv"]
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_scale_inv"):
        PlainModel(tmp_path / "fp8")


@torch.no_grad()
def test_maps_through_a_cache_of_lower_precision(nano_model: PlainModel) -> None:
    attention = nano_model.layers[0].attention
    inputs = nano_model.attention_inputs(0, nano_model.embedding[torch.arange(3, 30)[None]])
    (maps,) = random_maps(1, 2, 128, 48, seed=6)
    found = attention.tpla_heads_out(inputs, Bf16Maps(maps))
    rounded = replace(inputs, k_rope=inputs.k_rope.bfloat16().float())
    by_hand = [(lambda latent, z=z: (latent @ z).bfloat16().float(), a, b) for z, a, b in maps]
    assert torch.equal(found, attention.tpla_heads_out(rounded, by_hand))
    assert not torch.equal(found, attention.tpla_heads_out(inputs, maps))
