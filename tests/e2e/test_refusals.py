"""The launcher refuses settings that cannot work, at start, with one clear message and a failing exit code.

`test_flags` runs the real command; the other tests run it as a fork, which saves them SGLang's imports.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.servers import COMMON, ROOT
from tests.forking import Forks

LAUNCH = ("-m", "sglang_tpla.launch")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks.start() as started:
        yield started


def refused(forks: Forks | None, *args: str, said: tuple[str, ...]) -> None:
    """Run the launcher until it refuses, and check that its output has the words and no traceback."""
    if forks is None:
        command = [sys.executable, *LAUNCH, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    else:
        done = forks.run(*LAUNCH, *args, env=os.environ)
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert all(words in output for words in said) and "Traceback" not in output, output[-2000:]


def decode(model: str, artifact: str, *args: str) -> tuple[str, ...]:
    return ("--role", "decode", "--model-path", model, *COMMON, "--tp", "2", "--tpla-groups", "2",
            "--tpla-artifact", artifact, *args)  # fmt: skip


def prefill(model: str, *args: str) -> tuple[str, ...]:
    return ("--role", "prefill", "--model-path", model, *COMMON, *args)


def other_model(folder: Path, nano_mla: str, **changes: object) -> str:
    """Copy the checkpoint with a changed config."""
    shutil.copytree(nano_mla, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_flags(nano_mla: str, nano_artifact: str) -> None:
    """The message names every flag to drop at once, with its reason."""
    wrong = (
        "--dcp-size", "2", "--enable-hierarchical-cache", "--page-size", "16", "--speculative-algorithm", "NGRAM",
        "--tokenizer-worker-num", "2", "--grpc-mode", "--kv-cache-dtype", "fp8_e4m3",
    )  # fmt: skip
    said = (
        "drop --dcp-size", "DCP", "slices", "drop --enable-hierarchical-cache", "rank 0", "use --page-size 1",
        "drop --tokenizer-worker-num 2", "loads no plug-in", "drop --grpc-mode", "--speculative-algorithm",
        "NextN layer", "FP8 rows, which were retired", "use --tpla-rows sketched", "drop --kv-cache-dtype fp8_e4m3",
    )  # fmt: skip
    refused(None, *decode(nano_mla, nano_artifact, *wrong), said=said)


def test_attention_backend(forks: Forks, nano_mla: str, nano_artifact: str) -> None:
    asked = decode(nano_mla, nano_artifact, "--attention-backend", "flashinfer")
    refused(forks, *asked, said=("flashinfer", "80", "torch_native"))


def test_sparse_attention_model(forks: Forks, tmp_path: Path, nano_mla: str, nano_artifact: str) -> None:
    model = other_model(tmp_path / "dsa", nano_mla, index_topk=64, index_head_dim=32, index_n_heads=4)
    refused(forks, *decode(model, nano_artifact), said=("sparse attention",))


def test_artifact_of_another_model(forks: Forks, tmp_path: Path, nano_mla: str, nano_artifact: str) -> None:
    model = other_model(tmp_path / "other", nano_mla, rms_norm_eps=1e-5)
    refused(forks, *decode(model, nano_artifact), said=("nano-mla-g2", "calibrate"))


def test_an_artifact_of_fewer_layers(
    forks: Forks, tmp_path: Path, nano_mla: str, nano_artifact: str, sketched_artifact: str
) -> None:
    """SGLang plans layers by the artifact while it resolves its flags, before hashes are compared."""
    model = other_model(tmp_path / "more", nano_mla, num_hidden_layers=6)
    for artifact in (nano_artifact, sketched_artifact):
        said = (f"{artifact}: expected num_layers 6", f"{model}/config.json", "got num_layers 4")
        refused(forks, *decode(model, artifact), said=said)


def test_constants_that_no_model_has(forks: Forks, tmp_path: Path, nano_mla: str) -> None:
    model = other_model(tmp_path / "below", nano_mla, rms_norm_eps=-1e-6)
    refused(forks, *prefill(model), said=(f"expected rms_norm_eps to be a number from 0 to 1, got -1e-06 in {model}",))


def test_groups_of_another_artifact(forks: Forks, nano_mla: str, nano_artifact: str) -> None:
    asked = decode(nano_mla, nano_artifact, "--tp", "4", "--tpla-groups", "4")
    refused(forks, *asked, said=("groups", "calibrate"))


def test_damaged_artifact(forks: Forks, tmp_path: Path, nano_mla: str, nano_artifact: str) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(Path(nano_artifact).read_bytes()[:-1000])
    refused(forks, *decode(nano_mla, str(damaged)), said=(str(damaged),))


def test_a_bootstrap_port_that_another_server_has(forks: Forks, nano_mla: str) -> None:
    """A server on that port would look healthy, and its ranks would take the place of the other server's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(
            forks,
            *prefill(nano_mla, "--disaggregation-bootstrap-port", port),
            said=(f"cannot listen on 127.0.0.1:{port}", "its own --disaggregation-bootstrap-port"),
        )


def test_prompts_cut_to_a_length_of_each_servers_own(forks: Forks, nano_mla: str) -> None:
    refused(forks, *prefill(nano_mla, "--allow-auto-truncate"), said=("drop --allow-auto-truncate",))


def test_models_that_are_not_served_are_refused_by_name(forks: Forks, tmp_path: Path, nano_mla: str) -> None:
    for name, reason in (("KimiLinearForCausalLM", "linear-attention"), ("SarvamMLAForCausalLM", "class of its own")):
        model = other_model(tmp_path / name, nano_mla, architectures=[name])
        said = (f"is a {name}, which sglang_tpla does not serve", reason, "DeepseekV3ForCausalLM")
        refused(forks, *prefill(model), said=said)


def test_mistral_large_3_by_its_own_format(forks: Forks, tmp_path: Path, nano_mla: str) -> None:
    """SGLang reads ``params.json`` for such a name, so the architecture is known only then."""
    model = Path(other_model(tmp_path / "Mistral-Large-3-tiny", nano_mla))
    params = {
        "dim": 256, "n_layers": 4, "head_dim": 64, "hidden_dim": 512, "n_heads": 8, "n_kv_heads": 8, "norm_eps": 1e-6,
        "rope_theta": 10000.0, "vocab_size": 4096, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "llama_4_scaling": {"original_max_position_embeddings": 9, "beta": 1},
        "moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "expert_hidden_dim": 64},
    }  # fmt: skip
    (model / "params.json").write_text(json.dumps(params))
    refused(forks, *prefill(str(model)), said=("is a MistralLarge3ForCausalLM, which sglang_tpla does not serve",))
    (model / "config.json").unlink()
    refused(forks, *prefill(str(model)), said=("Mistral's own format",))
