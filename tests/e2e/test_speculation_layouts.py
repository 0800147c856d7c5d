"""Speculation in every layout: g from 1 to 4, one, two and four ranks, both kinds of rows, heads kept either way.

A server with speculation gives the same answers as the same server without it. The two run one after the other, because
two cores bear no more than four ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_tpla.calibrate import __main__ as calibrate
from tests.e2e.model_answers import agree, said
from tests.e2e.prompts import encoded, short_prompts
from tests.e2e.servers import Server, launcher, running, wait_idle
from tests.e2e.traffic import Pair
from tests.random_checkpoint import random_checkpoint
from tests.speculating_model import copied_layer, with_nextn

pytestmark = pytest.mark.slow

TOKENS = 40
COMMON = ("--skip-server-warmup", "--max-running-requests", "8")
LAYOUTS: list[tuple[int, int, str, str, int]] = [
    # ranks, groups, rows, heads, guesses
    (1, 1, "plain", "replicate", 1),
    (1, 1, "sketched", "replicate", 2),
    (2, 2, "plain", "scatter", 2),
    (4, 2, "sketched", "scatter", 1),
    (4, 4, "plain", "scatter", 2),
    (4, 4, "sketched", "replicate", 3),
]


def speculation(guesses: int) -> tuple[str, ...]:
    """Return the flags for so many guesses a step; 0 means no speculation."""
    return ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(guesses)) if guesses else ()


class Deployment:
    """A checkpoint with a layer that guesses, and prefill servers of it that stay up."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.stack = contextlib.ExitStack()
        self._prefill: dict[int, Server] = {}

    def prefill(self, guesses: int) -> Server:
        """Return the prefill server with so many guesses; 0 means no speculation."""
        if guesses not in self._prefill:
            log = self.folder / f"prefill-{guesses}.log"
            server = launcher("prefill", self.model, log, *speculation(guesses), *COMMON)
            self.stack.enter_context(running(server))
            self._prefill[guesses] = server
        return self._prefill[guesses]

    def answers(self, asked: list[list[int]], guesses: int, *layout: str) -> list[dict[str, Any]]:
        """Return the answers of a decode server with a layout: one at a time, then all at once."""
        prefill = self.prefill(guesses)
        decode = launcher("decode", self.model, self.folder / "decode.log", *layout, *COMMON, *speculation(guesses))
        told = {"return_logprob": True, "top_logprobs_num": 2}
        with running(decode):
            pair = Pair(prefill, decode)
            alone = [pair.generate(ids, TOKENS, **told)[1] for ids in asked]
            together = pair.generate(asked, TOKENS, **told)[1]
            wait_idle(prefill, decode)
        return [*alone, *together]


def deployment(folder: Path, model: Path) -> Iterator[Deployment]:
    made = Deployment(folder, with_nextn(model, copied_layer(model, folder / "layer"), folder / "speculating"))
    with made.stack:
        yield made


@pytest.fixture(scope="module")
def nano(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    yield from deployment(tmp_path_factory.mktemp("nano"), Path(nano_mla))


@pytest.fixture(scope="module")
def glm(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("glm")
    yield from deployment(folder, random_checkpoint(folder / "glm", "glm-4.7-flash", nano_mla))


@pytest.fixture(scope="module")
def prompts(nano_mla: str) -> list[list[int]]:
    return encoded(nano_mla, [*short_prompts(3, seed=9), "    pass\n" * 30])


def artifact(model: Path, groups: int, rows: str) -> Path:
    """Make an artifact from a few tokens, because the quality of its maps does not matter here."""
    out = model.parent / f"g{groups}-{rows}.safetensors"
    few = ("--tokens", "512", "--held-out-tokens", "64", "--prompt-tokens", "32", "--continuation-tokens", "32")
    made = ("--model-path", str(model), "--groups", str(groups), "--rows", rows, "--out", str(out), *few)
    assert calibrate.main([*made, "--quiet"]) == 0
    return out


def check(server: Deployment, asked: list[list[int]], guesses: int, rows: str, *layout: str) -> None:
    """Check that tokens equal those without speculation, and log-probabilities as nearly as the kind of rows allows."""
    expected = server.answers(asked, 0, *layout)[: len(asked)]
    answers = server.answers(asked, guesses, *layout)
    for answer, right in zip(answers, expected * 2, strict=True):
        agree(answer, right, {"plain": 1e-4, "sketched": 2e-2}[rows])
    alone = answers[: len(asked)]
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in alone)
    assert steps < sum(len(said(answer)) for answer in alone) < (guesses + 1) * steps


@pytest.mark.parametrize(("ranks", "groups", "rows", "heads", "guesses"), LAYOUTS)
def test_a_layout(
    nano: Deployment, prompts: list[list[int]], ranks: int, groups: int, rows: str, heads: str, guesses: int
) -> None:
    layout = ["--tp", str(ranks)]
    if groups > 1:
        maps = str(artifact(nano.model, groups, rows))
        layout += ["--tpla-groups", str(groups), "--tpla-artifact", maps, "--tpla-o-proj", heads]
    else:
        layout += ["--tpla-rows", rows]
    check(nano, prompts, guesses, rows, *layout)


@pytest.mark.parametrize("rows", ["plain", "sketched"])
def test_another_family_with_a_layer_that_guesses(glm: Deployment, prompts: list[list[int]], rows: str) -> None:
    """SGLang has a separate class for the draft of GLM-4.7-Flash."""
    maps = str(artifact(glm.model, 2, rows))
    check(glm, prompts, 3, rows, "--tp", "2", "--tpla-groups", "2", "--tpla-artifact", maps)
