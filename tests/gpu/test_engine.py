"""The whole engine on GPUs (stock SGLang, prefill, decode in several layouts, router), each against its reference.

The reference is the plain PyTorch model in float32: whole weights, no cache that crossed a wire, no engine. A server
computes in bfloat16, so it differs, sometimes by much: a token whose second and third expert score alike may be routed
to the other expert. The same plain model in bfloat16, on the same tokens, shows how much of the error is bfloat16's.
"""

import concurrent.futures
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.artifact.model_identity import weights_hash
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.reference_model.forward import PlainModel
from tests.block_fp8 import RoundedInputs, convert, quantised_weights
from tests.e2e.prompts import encoded, short_prompts, source
from tests.gpu.engine import ANY_WIDTH, DEVICE, GPUS, OUR_KERNEL, Engines

pytestmark = pytest.mark.gpu
TOKENS = 32
LOGPROBS = {"return_logprob": True}
CHUNKS = ("--chunked-prefill-size", "512")
TINY, TINY_ARTIFACT = "SGLANG_TPLA_TEST_TINY", "SGLANG_TPLA_TEST_TINY_ARTIFACT"  # folder, file
EXPERT_WIDTH = 512  # tiny's experts, 64 wide, are widened for tiny_fp8: two blocks for each of two ranks
RESULTS = "SGLANG_TPLA_TEST_RESULTS"  # folder for engine.json, all answers and the servers' logs
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the servers' dtype
# Another order of sums in bfloat16 (fewer heads a rank, other kernels) moves the error by about this factor.
NOISE = 1.5
MOSTLY_MLA = 0.5  # from this value on, answers are nearer to plain MLA than to TPLA
FLOAT32 = 1e-5 if DEVICE == "cpu" else 0.0  # error of sums in another order if nothing is bfloat16


@dataclass(frozen=True)
class Decoding:
    """A decode server's layout.

    Args:
        groups: number of latent groups and of ranks.
        flags: the server's flags besides those that name the groups.
    """

    groups: int
    flags: tuple[str, ...] = ()

    @property
    def served(self) -> bool:
        """Whether this machine can serve the layout: gloo on one GPU has no scatter."""
        return DEVICE == "cpu" or GPUS > 1 or "scatter" not in self.flags


LAYOUTS = {
    "one-group": Decoding(1),
    "two-groups": Decoding(2),
    "summed-heads": Decoding(2, ("--tpla-o-proj", "scatter")),
}
STOCK = LAYOUTS["one-group"]
# tiny-mla is too large for the repository: the environment names its folder on machines that have it. Block-FP8 layers
# run on GPUs alone.
MODELS = ("nano", *(("tiny", "tiny_fp8")[: 2 if DEVICE == "cuda" else 1] if TINY in os.environ else ()))
CASES = [(model, name) for model in MODELS for name, decoding in LAYOUTS.items() if decoding.served]
on_every_layout = pytest.mark.parametrize(("bench", "layout"), CASES, indirect=["bench"])


class Bench:
    """One model's servers, its float32 reference and the reference's twin in the servers' dtype.

    Args:
        layouts: decode servers to start.
    """

    def __init__(self, name: str, model: str, artifact: str, log: Path, layouts: set[str]) -> None:
        log.mkdir(parents=True, exist_ok=True)
        self.name, self.artifact = name, Artifact.load(artifact)
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._usual: torch.Tensor | None = None
        self.engines = Engines(model, log)
        self.plain = PlainModel(model, device=DEVICE)
        self.twin = PlainModel(model, DTYPE, device=DEVICE)
        self.coded = "quantization_config" in self.twin.checkpoint.config
        self._rounded = RoundedInputs(quantised_weights(self.twin)) if self.coded else contextlib.nullcontext()
        long = [source(seed, characters) for seed, characters in ((5, 2500), (6, 4500), (7, 12000))]
        # Up to about 3,300 tokens, or 7 chunks.
        self.prompts = encoded(model, [*short_prompts(8, seed=3), *long])
        self.engines.start_stock(*CHUNKS)
        self.engines.start_prefill(*CHUNKS)
        attention = ANY_WIDTH if name == "nano" else OUR_KERNEL
        for layout in layouts:
            decoding = LAYOUTS[layout]
            flags: tuple[str, ...] = ("--tpla-groups", str(decoding.groups), *decoding.flags)
            if decoding.groups > 1:
                flags += ("--tpla-artifact", artifact)
            self.engines.decode(layout, decoding.groups, *flags, *attention)

    def stock(self) -> list[dict[str, Any]]:
        """Return stock SGLang's answers to one request at a time; the server is asked once."""
        if "stock" not in self._answers:
            server = self.engines.stock
            assert server is not None
            self.engines.wait(server)
            self._answers["stock"] = [server.generate(ids, TOKENS, **LOGPROBS) for ids in self.prompts]
        return self._answers["stock"]

    def answers(self, layout: str) -> list[dict[str, Any]]:
        """Return a decode server's answers to one request at a time; the server is asked once."""
        if layout not in self._answers:
            pair = self.engines.pair(layout)
            self._answers[layout] = [pair.generate(prompt, TOKENS, **LOGPROBS)[1] for prompt in self.prompts]
        return self._answers[layout]

    @torch.no_grad()
    def expected(self, model: PlainModel, prompt: list[int], tokens: list[int], decoding: Decoding) -> torch.Tensor:
        """Return a plain model's logprobs of ``tokens`` after ``prompt`` in the layout, ``[len(tokens)]``."""
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        maps: dict[str, Any] = {}
        if decoding.groups > 1:
            maps = {"maps": model_maps(self.artifact, model), "prompt_tokens": len(prompt)}
        scores = model.forward(ids[:, :-1], **maps).float().log_softmax(-1)[0].cpu()
        at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        return scores[at, torch.tensor(tokens)]

    def errors(self, answers: list[dict[str, Any]], decoding: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
        """Return |logprob - the reference's| of every answered token in the layout, for the server and for the twin.

        Each is ``[prompts * TOKENS]``.
        """
        server, twin = [], []
        for prompt, answer in zip(self.prompts, answers, strict=True):
            said = answer["meta_info"]["output_token_logprobs"]
            tokens = [token for _, token, *_ in said]
            right = self.expected(self.plain, prompt, tokens, decoding)
            with self._rounded:
                rounded = self.expected(self.twin, prompt, tokens, decoding)
            server.append((torch.tensor([value for value, *_ in said]) - right).abs())
            twin.append((rounded - right).abs())
        return torch.cat(server), torch.cat(twin)

    def pull(self, answers: list[dict[str, Any]], decoding: Decoding) -> float:
        """Return the answers' position between the layout's reference (0) and plain MLA (1), averaged over all tokens.

        Other errors do not point in this direction.
        """
        along = total = 0.0
        for prompt, answer in zip(self.prompts, answers, strict=True):
            said = answer["meta_info"]["output_token_logprobs"]
            tokens = [token for _, token, *_ in said]
            right, mla = (self.expected(self.plain, prompt, tokens, one) for one in (decoding, STOCK))
            away = mla - right
            along += float(((torch.tensor([value for value, *_ in said]) - right) * away.sign()).sum())
            total += float(away.abs().sum())
        return along / total

    def usual(self, twin: torch.Tensor) -> torch.Tensor:
        """Return the expected errors of a server of this model: the twin's, or stock's if those are larger.

        The twin of a coded model does not round everything that a server rounds.
        """
        if not self.coded:
            return twin
        if self._usual is None:
            self._usual = self.errors(self.stock(), STOCK)[0]
        return max(twin, self._usual, key=lambda errors: float(errors.mean()))

    def save(self, file: Path) -> None:
        """Write all answers: tokens and their logprobs."""
        said = {
            layout: [[pair[:2] for pair in one["meta_info"]["output_token_logprobs"]] for one in answers]
            for layout, answers in self._answers.items()
        }
        file.write_text(json.dumps({"prompts": self.prompts, "answers": said}))


def agreement(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    """Return the share of greedy tokens before the answers part."""
    same = total = 0
    for one, other in zip(left, right, strict=True):
        pairs = list(zip(*(a["meta_info"]["output_token_logprobs"] for a in (one, other)), strict=True))
        parted = next((i for i, (a, b) in enumerate(pairs) if a[1] != b[1]), len(pairs))
        same, total = same + parted, total + len(pairs)
    return same / total


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    """Yield the dictionary of measurements, which goes to ``engine.json`` if a folder for results is named."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "gpus": GPUS,
        "tokens": TOKENS,
    }
    yield found
    if folder := os.environ.get(RESULTS):
        (Path(folder) / "engine.json").write_text(json.dumps(found, indent=1))


def block_fp8(folder: Path) -> tuple[str, str]:
    """Make checkpoint and artifact of ``tiny_fp8``. The maps are tiny's: the tests do not judge their quality."""
    model = folder / "tiny_fp8"
    convert(Path(os.environ[TINY]), model, EXPERT_WIDTH)
    maps = Artifact.load(os.environ[TINY_ARTIFACT])
    meta = msgspec.structs.replace(maps.meta, model_name=model.name, weights_hash=weights_hash(model))
    Artifact(meta, maps.tensors).save(folder / "tiny_fp8-g2.safetensors")
    return str(model), str(folder / "tiny_fp8-g2.safetensors")


@pytest.fixture(scope="module")
def benches(
    request: pytest.FixtureRequest, nano_mla: str, nano_artifact: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Bench]]:
    """Start all servers that the chosen tests need together; ``-k "tiny and one-group"`` needs fewer."""
    chosen: dict[str, set[str]] = {}
    for item in request.session.items:
        asked = item.callspec.params if hasattr(item, "callspec") else {}
        if "bench" in asked:
            chosen.setdefault(asked["bench"], set()).add(asked["layout"])
    folder = Path(os.environ.get(RESULTS) or tmp_path_factory.mktemp("engine"))
    models = {"nano": (nano_mla, nano_artifact)}
    if TINY in os.environ:
        models["tiny"] = (os.environ[TINY], os.environ[TINY_ARTIFACT])
    if "tiny_fp8" in chosen:
        models["tiny_fp8"] = block_fp8(tmp_path_factory.mktemp("block_fp8"))
    found: dict[str, Bench] = {}
    try:
        for name, (model, artifact) in models.items():
            if name in chosen:
                found[name] = Bench(name, model, artifact, folder / "logs" / name, chosen[name])
        yield found
    finally:
        for name, bench in found.items():
            bench.save(folder / f"answers_{name}.json")
            bench.engines.stop()


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Bench:
    return benches[request.param]


def summary(errors: torch.Tensor) -> dict[str, float]:
    return {"mean": float(errors.mean()), "p99": float(errors.quantile(0.99)), "max": float(errors.max())}


@on_every_layout
def test_answers_follow_the_reference(bench: Bench, layout: str, report: dict[str, Any]) -> None:
    stock, ours, decoding = bench.stock(), bench.answers(layout), LAYOUTS[layout]
    errors, twin = bench.errors(ours, decoding)
    to_plain, _ = bench.errors(ours, STOCK)
    info = bench.engines.decodes[layout].front.get("/server_info")
    entry = {
        "stock": summary(bench.errors(stock, STOCK)[0]),
        "ours": summary(errors),
        "reference_in_servers_dtype": summary(twin),
        "ours_against_plain_mla": summary(to_plain),
        "greedy_agreement_with_stock": agreement(stock, ours),
        "prompts": len(stock),
        "attention_backend": info["attention_backend"],
        "tpla": {key: info["tpla"][key] for key in ("groups", "head_shards", "widths")},
    }
    report[f"{bench.name} {layout}"] = entry
    assert info["tpla"]["groups"] == decoding.groups
    assert_usual(errors, bench.usual(twin))
    if decoding.groups > 1:
        entry["pull"] = bench.pull(ours, decoding)
        assert entry["pull"] < MOSTLY_MLA, entry


def assert_usual(errors: torch.Tensor, usual: torch.Tensor) -> None:
    """A server's errors are no larger than the servers' dtype explains."""
    assert float(errors.mean()) <= NOISE * float(usual.mean()) + FLOAT32, (summary(errors), summary(usual))
    p99 = 2 * NOISE * float(usual.quantile(0.99)) + 10 * FLOAT32
    assert float(errors.quantile(0.99)) <= p99, (summary(errors), summary(usual))


@on_every_layout
def test_many_at_once_answer_as_one_at_a_time(bench: Bench, layout: str) -> None:
    """Concurrent requests share batches, graphs and the transfer agents, and each still follows the reference."""
    pair = bench.engines.pair(layout)
    with concurrent.futures.ThreadPoolExecutor(len(bench.prompts)) as pool:
        together = list(pool.map(lambda prompt: pair.generate(prompt, TOKENS, **LOGPROBS)[1], bench.prompts))
    assert_good(bench, layout, together)


@pytest.mark.parametrize(("bench", "layout"), [(name, "two-groups") for name in MODELS], indirect=["bench"])
def test_answers_through_the_router(bench: Bench, layout: str) -> None:
    """Answers to all prompts at once through the real router follow the reference."""
    pytest.importorskip("sglang_router")
    bench.engines.pair(layout)
    front = bench.engines.start_router(layout)
    with concurrent.futures.ThreadPoolExecutor(len(bench.prompts)) as pool:
        routed = list(pool.map(lambda prompt: front.generate(prompt, TOKENS, **LOGPROBS), bench.prompts))
    assert_good(bench, layout, routed)


def assert_good(bench: Bench, layout: str, answers: list[dict[str, Any]]) -> None:
    """The answers are complete and follow the layout's reference."""
    errors, twin = bench.errors(answers, LAYOUTS[layout])
    assert errors.numel() == len(bench.prompts) * TOKENS
    assert_usual(errors, bench.usual(twin))
    if LAYOUTS[layout].groups > 1:
        assert bench.pull(answers, LAYOUTS[layout]) < MOSTLY_MLA
