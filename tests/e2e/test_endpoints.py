"""``python -m sglang_tpla.evaluate --stock-url --tpla-url`` against a stock server and a TPLA deployment's router.

The tests compare its report with the plain PyTorch model on the same text: exact and through the slices.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.evaluate import __main__ as command
from sglang_tpla.measure.corpus import Corpus
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.servers import Server

PROMPTS, NEW_TOKENS = 2, 24


def expected_kl(reference: Server, artifact: Artifact, model_path: str) -> tuple[list[float], list[int]]:
    """Return the KL at every compared token of stock greedy answers, and how many tokens of each TPLA would repeat."""
    model = PlainModel(model_path)
    maps = model_maps(artifact, model)
    _, held_out = Corpus.from_paths().split(0)
    texts = [document.text[:2000] for document in held_out if len(document.text) >= 2000][:PROMPTS]
    found: list[float] = []
    agreed: list[int] = []
    for text in texts:
        answer = reference.post("/generate", {
            "text": text, "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": NEW_TOKENS},
        }).json()["meta_info"]  # fmt: skip
        prompt = [token for _, token, *_ in answer["input_token_logprobs"]]
        tokens = torch.tensor([prompt + [token for _, token, *_ in answer["output_token_logprobs"]]])
        with torch.inference_mode():
            exact = model.forward(tokens).log_softmax(-1)[0, len(prompt) - 1 : -1]
            sliced = model.forward(tokens, maps=maps, prompt_tokens=len(prompt)).log_softmax(-1)
        sliced = sliced[0, len(prompt) - 1 : -1]
        same = (exact.argmax(-1) == sliced.argmax(-1)).tolist()
        agreed.append(same.index(False) if False in same else len(same))
        kl = (exact.exp() * (exact - sliced)).sum(-1)
        found += kl[: agreed[-1] + 1].tolist()
    return found, agreed


def test_two_live_deployments(reference: Server, trio: Any, nano_mla: str, nano_artifact: str, tmp_path: Path) -> None:
    code = command.main([
        "--stock-url", reference.url, "--tpla-url", trio.router.url, "--prompts", str(PROMPTS),
        "--new-tokens", str(NEW_TOKENS), "--out", str(tmp_path), "--quiet",
    ])  # fmt: skip
    assert code == 0
    said = msgspec.json.decode((tmp_path / "endpoints.json").read_bytes())
    kl, agreed = expected_kl(reference, Artifact.load(nano_artifact), nano_mla)
    assert said["agreement_tokens"] == agreed
    assert said["tokens_compared"] == len(kl)
    # Twenty tokens, and one outcome for all others, show most of the divergence and never more than all of it.
    mean = sum(kl) / len(kl)
    assert 0.5 * mean <= said["kl_mean"] <= mean + 1e-4
    assert mean > 1e-4  # the slices differ at all


def test_the_same_deployment_twice_does_not_differ(reference: Server, tmp_path: Path) -> None:
    code = command.main([
        "--stock-url", reference.url, "--tpla-url", reference.url, "--prompts", "2", "--new-tokens", "8",
        "--out", str(tmp_path), "--quiet",
    ])  # fmt: skip
    assert code == 0
    said = msgspec.json.decode((tmp_path / "endpoints.json").read_bytes())
    assert said["departed"] == 0
    assert said["kl_mean"] == pytest.approx(0, abs=1e-6)
