"""Tokens sampled by TPLA decode servers with speculation, against the distribution that the PyTorch model gives them.

    python benchmarks/speculation_sampling.py --out FILE [--model DIR --artifact FILE] [--nextn DIR] [--draws 20000]
        [--answers-file FILE --limit-s S]

Runs on the CPU reference platform in float32: a prefill server and a decode server of two groups on two ranks, first
with speculation and then without. At each of three prompts many answers are sampled at temperature 1. Every token but
an answer's first (which prefill draws) is one draw of the next token, behind the prompt and the tokens before it. With
``--nextn`` the checkpoint gets a trained draft; otherwise the draft is a linear map (``tests/speculating_model.py``).

The PyTorch model computes the whole distribution of each draw, over the same slices. The draw then becomes a number
between 0 and 1: the probability of all likelier tokens, and a random share of the token's own. These numbers are
uniform for any right sampler, whatever the distributions are, and a chi-squared test over 40 equal cells says whether
they are. A second one compares the cells with and without speculation. To show what the tests can see, the same draws
are also tested against the distributions at temperature 1.1, which must be refuted.

A run that has worked for ``--limit-s`` ends, and the next one with the same ``--answers-file`` goes on.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import header
from benchmarks.speculation_requests import Draws, same_source
from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel
from tests.e2e.prompts import encoded
from tests.e2e.servers import launcher
from tests.e2e.traffic import Pair
from tests.speculating_model import artifact_for, fitted_layer, with_nextn

ROOT = Path(__file__).resolve().parents[1]
CELLS, SEED, AT_ONCE, OTHER_TEMPERATURE = 40, 17, 64, 1.1
PROMPTS = (
    "import os\nimport json\n\n\ndef read_config(path):\n    with open(path) as file:\n        ",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def distance(self, ",
    "for index, item in enumerate(items):\n    if item is None:\n        continue\n    ",
)


def numbers(
    answers: Sequence[Sequence[int]], prompt: list[int], model: PlainModel, maps: Sequence[LayerMaps],
    generator: torch.Generator,
) -> dict[float, torch.Tensor]:  # fmt: skip
    """Return one number in [0, 1] for each draw, by the distributions at temperature 1 and at another one."""
    found: dict[float, list[torch.Tensor]] = {1.0: [], OTHER_TEMPERATURE: []}
    share = torch.rand(len(answers), len(answers[0]) - 1, generator=generator, dtype=torch.float64)
    for first in range(0, len(answers), AT_ONCE):
        tokens = torch.tensor([[*prompt, *answer] for answer in answers[first : first + AT_ONCE]])
        with torch.no_grad():
            logits = model.forward(tokens[:, :-1], maps=maps, prompt_tokens=len(prompt))[:, len(prompt) :].double()
        drawn = tokens[:, len(prompt) + 1 :, None]  # [answers, draws of each, 1]
        for temperature, rows in found.items():
            chances = (logits / temperature).softmax(-1)
            own = chances.gather(2, drawn)
            likelier = (chances * (chances > own)).sum(-1)
            rows.append((likelier + own[..., 0] * share[first : first + AT_ONCE]).flatten())
    return {temperature: torch.cat(rows) for temperature, rows in found.items()}


def uniform(drawn: torch.Tensor) -> dict[str, float]:
    """Test the hypothesis that numbers of [0, 1] are uniform."""
    seen, expected = torch.histc(drawn, CELLS, 0, 1), len(drawn) / CELLS
    chi = ((seen - expected) ** 2 / expected).sum()
    chance = torch.special.gammaincc(torch.tensor((CELLS - 1) / 2, dtype=torch.float64), chi / 2)
    return {"draws": len(drawn), "cells": CELLS, "chi_squared": float(chi), "p": float(chance)}


def cells(drawn: torch.Tensor) -> Counter[int]:
    """Count the numbers of each cell."""
    return Counter((drawn * CELLS).long().clamp(max=CELLS - 1).tolist())


def deploy(model: Path, artifact: Path, seed: int, flags: Sequence[str], stack: contextlib.ExitStack) -> Pair:
    """Start a prefill server and a decode server of two groups; servers of one seed could draw alike."""
    common = (*flags, "--skip-server-warmup", "--max-running-requests", str(AT_ONCE), "--random-seed")
    prefill = launcher("prefill", model, model.parent / f"prefill-{seed}.log", *common, str(seed))
    layout = ("--tp", "2", "--tpla-groups", "2", "--tpla-artifact", str(artifact), *common, str(seed + 1))
    decode = launcher("decode", model, model.parent / f"decode-{seed}.log", *layout)
    for server in (prefill, decode):
        stack.callback(server.stop)
        server.start()
    return Pair(prefill.wait(), decode.wait())


def report(
    answers: Draws, kinds: Sequence[str], prompts: list[list[int]], model: PlainModel, maps: Sequence[LayerMaps]
) -> list[dict[str, Any]]:
    """Test the draws at every prompt."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": PROMPTS[index], "tokens": len(prompt)}
        counts = []
        for kind in kinds:
            ids, steps = zip(*answers.at(prompt, kind), strict=True)
            found = numbers(ids, prompt, model, maps, generator)
            row[kind] = uniform(found[1.0]) | {
                "tokens_a_step": len(found[1.0]) / sum(steps),
                f"p_at_temperature_{OTHER_TEMPERATURE}": uniform(found[OTHER_TEMPERATURE])["p"],
            }
            counts.append(cells(found[1.0]))
        row["with beside without"] = same_source(*counts)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "nano-mla")
    parser.add_argument("--artifact", type=Path, default=ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors")
    parser.add_argument("--nextn", type=Path, help="folder of the model's trained NextN layer")
    parser.add_argument("--draws", type=int, default=20_000, help="at each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--guesses", type=int, default=3, help="a step")
    parser.add_argument("--answers-file", type=Path, help="keeps the answers for the next run")
    parser.add_argument("--limit-s", type=float, default=1e9, help="no request is sent after so many seconds")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.monotonic()
    prompts = encoded(args.model, PROMPTS)
    kinds = {
        "with speculation": ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(args.guesses)),
        "without": (),
    }
    answers, needed = Draws(args.answers_file), -(-args.draws // (args.tokens - 1))
    params = {"max_new_tokens": args.tokens, "temperature": 1.0, "ignore_eos": True}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        layer = args.nextn or fitted_layer(args.model, folder / "layer")
        model = with_nextn(args.model, layer, folder / "model")
        artifact = artifact_for(model, str(args.artifact), folder / "artifact.safetensors")
        for number, (kind, flags) in enumerate(kinds.items()):
            missing = [index for index, prompt in enumerate(prompts) if len(answers.at(prompt, kind)) < needed]
            if not missing:
                continue
            with contextlib.ExitStack() as stack:
                pair = deploy(model, artifact, SEED + 100 * answers.runs + 10 * number, flags, stack)
                for index in missing:
                    made = answers.at(prompts[index], kind)
                    while len(made) < needed:
                        if time.monotonic() - began > args.limit_s:
                            answers.keep()
                            print(f"{kind}, prompt {index}: {len(made)} of {needed} answers; run again", flush=True)
                            return
                        asked = [prompts[index]] * min(AT_ONCE, needed - len(made))
                        said = pair.generate(asked, args.tokens, timeout_s=600, sampling_params=params)[1]
                        steps = (one["meta_info"].get("spec_verify_ct") or args.tokens - 1 for one in said)
                        made += [(one["output_ids"], count) for one, count in zip(said, steps, strict=True)]
                        print(f"{kind}, {index}: {len(made)}, {time.monotonic() - began:.0f} s", flush=True)
        answers.keep()
    reference = PlainModel(str(args.model))
    maps = model_maps(Artifact.load(str(args.artifact)), reference)
    result = {
        **header("cpu"),
        "model": args.model.name,
        "draft": args.nextn.name if args.nextn else "a linear map",
        "groups": 2,
        "guesses": args.guesses,
        "seed": SEED,
        "runs": answers.runs + 1,
        "prompts": report(answers, list(kinds), prompts, reference, maps),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
