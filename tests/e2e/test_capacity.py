"""For the same memory a decode rank at g = 2 holds 1.8 times the tokens: real servers, DeepSeek's 512 + 64 latent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_tpla.artifact.artifact import Artifact, ArtifactMeta, build
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from tests.e2e.servers import COMMON, launcher, running

LAYERS, HIDDEN, HEADS, D, ROPE, NOPE, V = 2, 128, 4, 512, 64, 32, 32


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory, nano_mla: str) -> Path:
    """A model with random weights, two dense layers and a latent of 512 + 64."""
    folder = tmp_path_factory.mktemp("wide")
    config = json.loads((Path(nano_mla) / "config.json").read_text())
    config |= {
        "num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS, "hidden_size": HIDDEN, "kv_lora_rank": D,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "qk_rope_head_dim": ROPE, "qk_nope_head_dim": NOPE,
        "v_head_dim": V, "q_lora_rank": None, "intermediate_size": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(nano_mla) / name).read_bytes())
    shapes = {
        "self_attn.q_proj": (HEADS * (NOPE + ROPE), HIDDEN),
        "self_attn.kv_a_proj_with_mqa": (D + ROPE, HIDDEN),
        "self_attn.kv_b_proj": (HEADS * (NOPE + V), D),
        "self_attn.o_proj": (HIDDEN, HEADS * V),
        "mlp.gate_proj": (256, HIDDEN),
        "mlp.up_proj": (256, HIDDEN),
        "mlp.down_proj": (HIDDEN, 256),
    }
    norms = {"self_attn.kv_a_layernorm": D, "input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    torch.manual_seed(0)
    tables = ("model.embed_tokens", "lm_head")
    weights = {f"{name}.weight": torch.randn(config["vocab_size"], HIDDEN) for name in tables}
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        weights |= {f"model.layers.{layer}.{n}.weight": torch.randn(*s) / s[1] ** 0.5 for n, s in shapes.items()}
        weights |= {f"model.layers.{layer}.{n}.weight": torch.ones(s) for n, s in norms.items()}
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def wide_artifact(wide_model: Path) -> Path:
    """An artifact of the identity, with two groups of 256."""
    eye = torch.eye(D)
    maps = [[(eye[:, h], eye[h], eye[h]) for h in (slice(0, 256), slice(256, 512))] for _ in range(LAYERS)]
    config = json.loads((wide_model / "config.json").read_text())
    meta = ArtifactMeta(
        format_version=1, model_name="wide", config_hash=config_hash(config), weights_hash=weights_hash(wide_model),
        transform="identity", groups=2, num_layers=LAYERS, latent_dim=D, rope_dim=ROPE, shared_dims=(0,) * LAYERS,
        widths=(256,) * LAYERS, calibrated_tokens=0, corpus="none", corpus_hash="", seed=0, created_by="test",
    )  # fmt: skip
    artifact: Artifact = build(meta, maps)
    artifact.save(wide_model / "identity-g2.safetensors")
    return wide_model / "identity-g2.safetensors"


def capacity(model: Path, log: Path, *args: str) -> tuple[int, int]:
    """Return the number of tokens that a decode server reports to hold, and its cache bytes a token on one rank."""
    common = [arg for arg in COMMON if arg not in ("--max-total-tokens", "20000")]
    size = ("--tp", "2", "--mem-fraction-static", "0.8", "--context-length", "4096")
    server = launcher("decode", model, log, *size, *args, common=common)
    server.env["SGLANG_TPLA_CPU_MEMORY_BYTES"] = str(4 << 30)
    with running(server):
        info = server.get("/server_info")
        return info["max_total_num_tokens"], info["tpla"]["cache_bytes_per_token_and_rank"]


def test_tokens_for_the_same_memory(wide_model: Path, wide_artifact: Path, logs: Path) -> None:
    whole, whole_bytes = capacity(wide_model, logs / "wide-g1.log", "--tpla-groups", "1")
    two = ("--tpla-groups", "2", "--tpla-artifact", str(wide_artifact))
    half, half_bytes = capacity(wide_model, logs / "wide-g2.log", *two)
    assert whole_bytes / half_bytes == pytest.approx(1.8)
    # A rank has 4 GiB for everything; the memory of the process itself varies a little from start to start.
    assert half / whole == pytest.approx(1.8, rel=0.03)
