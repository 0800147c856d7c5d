"""The evaluation is tested against direct computations of each figure, as a command, and with two live endpoints."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accuracy import END, START, write_into

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.evaluate.endpoints import EndpointError, compare_endpoints, partial_kl
from sglang_tpla.evaluate.generate import generate, long_answers
from sglang_tpla.evaluate.layers import kl_alone, layer_errors
from sglang_tpla.evaluate.recall import PLAIN, recall_endpoints
from sglang_tpla.evaluate.recall_tasks import TaskDocument
from sglang_tpla.evaluate.report import outputs
from sglang_tpla.measure.corpus import CorpusError
from sglang_tpla.measure.decode_error import compare, model_maps
from sglang_tpla.measure.outputs import check_outputs
from sglang_tpla.measure.paper import paper_layers
from sglang_tpla.measure.statistics import LayerMoments, Statistics, StatisticsMeta
from sglang_tpla.reference_model.forward import PlainModel
from tests.shipped import ARTIFACT, NANO, SKETCHED_ARTIFACT, call_command, run_command
from tests.stub_server import answering

ONE = ("--model-path", NANO, "--artifact", ARTIFACT, "--tokens", "64")


@pytest.fixture(scope="module")
def maps(nano_model: PlainModel):
    return model_maps(Artifact.load(ARTIFACT), nano_model)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 4096, (2, 80), generator=torch.Generator().manual_seed(0))


def test_figures_equal_torch_s_own(tokens: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    exact, found = torch.randn(2, 1, 7, 11, generator=generator).log_softmax(-1)
    following = torch.randint(0, 11, (1, 6), generator=generator)
    kl, nll_exact, nll_found, *tops = compare(exact, found, following)
    p, q = torch.distributions.Categorical(logits=exact), torch.distributions.Categorical(logits=found)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))
    for nll, logprobs in ((nll_exact, exact), (nll_found, found)):
        expected = torch.nn.functional.nll_loss(logprobs[0, :-1], following[0], reduction="none")
        torch.testing.assert_close(nll[0, :-1], expected)
        assert nll[0, -1].isnan()
    assert torch.equal(tops[0], exact.argmax(-1)) and torch.equal(tops[1], found.argmax(-1))


def test_layer_errors_are_of_the_layer_s_attention(nano_model: PlainModel, maps, tokens: torch.Tensor) -> None:
    seen = {}

    def observe(layer, inputs, out) -> None:
        seen[layer] = (inputs, out)

    nano_model.hidden_states(tokens[:1], observer=observe)
    errors = layer_errors(nano_model, maps, tokens[:1], 40, queries=40)
    for layer, (output, heads) in enumerate(errors):
        inputs, exact = seen[layer]
        sliced = nano_model.layers[layer].attention(inputs, maps[layer])
        wrong = (sliced - exact)[0, 40:].pow(2).sum() / exact[0, 40:].pow(2).sum()
        assert output == pytest.approx(wrong.item(), rel=1e-3)
        assert len(heads) == 8


def test_layers_alone_and_together(nano_model: PlainModel, maps, tokens: torch.Tensor) -> None:
    alone = kl_alone(nano_model, maps, tokens, 40)
    exact = nano_model.forward(tokens)[:, 40:].log_softmax(-1)
    found = nano_model.forward(tokens, maps=[None, None, maps[2], None], prompt_tokens=40)[:, 40:].log_softmax(-1)
    expected = (exact.exp() * (exact - found)).sum(-1).mean().item()
    assert alone[2] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_generation_is_greedy_and_sampling_is_seeded(nano_model: PlainModel, tokens: torch.Tensor) -> None:
    prompts = tokens[:, :20]
    text = generate(nano_model, prompts, 12)
    assert torch.equal(text[:, :20], prompts)
    # Each token is the choice of a whole forward over the text before it.
    assert torch.equal(nano_model.forward(text).argmax(-1)[:, 19:-1], text[:, 20:])
    one, two = (generate(nano_model, prompts, 12, temperature=1.0, seed=seed) for seed in (1, 2))
    assert torch.equal(one, generate(nano_model, prompts, 12, temperature=1.0, seed=1))
    assert not torch.equal(one, two)


def test_agreement_is_where_a_greedy_tpla_answer_departs(nano_model: PlainModel, maps, tokens) -> None:
    _, agreement = long_answers(nano_model, maps, tokens[:, :30], 24)
    for row in range(2):
        # Decode greedily through the slices, with one whole pass a token.
        mla, tpla = tokens[row : row + 1, :30], tokens[row : row + 1, :30]
        mla = generate(nano_model, mla, 24)
        agreed = 0
        for step in range(24):
            tpla = torch.cat([tpla, mla[:, 30 + step : 31 + step]], 1)
            # The token after position 30 + step is the first that decoding chose.
            chosen = nano_model.forward(tpla, maps=maps, prompt_tokens=30)[:, -1].argmax(-1, keepdim=True)
            exact = nano_model.forward(mla[:, : 31 + step])[:, -1].argmax(-1, keepdim=True)
            if not torch.equal(chosen, exact):
                break
            agreed += 1
        assert agreement[row] == agreed


def evaluate(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the command with ``--out folder``, unless another is given."""
    return call_command("evaluate", "--out", folder, *arguments)


def test_command_writes_json_and_a_page_with_plots(tmp_path: Path) -> None:
    done = run_command(
        *("evaluate", "--out", tmp_path),
        *("--model-path", NANO, "--artifact", ARTIFACT, "--cache-dtype", "bf16"),
        *("--tokens", 128, "--prompt-tokens", 64, "--continuation-tokens", 64, "--long-tokens", 16),
        *("--long-answers", 2, "--needle-tokens", 128, "--needle-cases", 1),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["report"]["tokens"] == 128
    assert found["report"]["kl_mean"] > 0
    assert found["cache_dtype"] == "bf16" and "cached in bf16" in done.stdout
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, 3]
    assert [row["temperature"] for row in found["long_answers"]] == [0.0, 1.0]
    assert [row["depth"] for row in found["needles"]] == [0.1, 0.5, 0.9]
    assert sum(b["last"] - b["first"] + 1 for b in found["by_position"]) == 64
    page = (tmp_path / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    check_outputs(outputs(tmp_path, live=False), {})  # both may be written again


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--model-path and --artifact"),
        (["--stock-url", "http://127.0.0.1:9"], "both --stock-url and --tpla-url"),
        (["--model-path", NANO, "--artifact", "/nonexistent"], "expected an artifact file"),
        (["--model-path", NANO, "--artifact", SKETCHED_ARTIFACT, "--cache-dtype", "bf16"], "leave out --cache-dtype"),
        ([*ONE, "--cache-dtype", "fp8"], "fp8 asks for FP8 rows, which were retired"),
        (["--stock-url", "http://a", "--tpla-url", "http://b", "--task-tokens", "512"], "give --model-path"),
        (["--stock-url", "http://127.0.0.1:9", "--tpla-url", "http://127.0.0.1:9"], "did not answer"),
        (["--task-documents", "0"], "--task-documents: expected a whole number of at least 1, got '0'"),
        (["--long-tokens", "many"], "--long-tokens: expected a whole number of at least 0, got 'many'"),
        ([*ONE, "--continuation-tokens", "1"], "expected --continuation-tokens to be at least 2 for an error report"),
        ([*ONE, "--long-tokens", "1"], "expected --long-tokens to be 0 (no long answers) or at least 2"),
        ([*ONE, "--task-tokens", "40"], "a document of 40 tokens has no room"),
        ([*ONE, "--needle-tokens", "20"], "a prompt of 20 tokens has no room for a needle"),
        ([*ONE, "--needle-tokens", "10000000"], "tokens of filler text"),
        ([*ONE, "--out", ARTIFACT], "expected a folder to write to at --out"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, says: str, tmp_path: Path) -> None:
    done = evaluate(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_sketched_rows_beside_the_paper_s_recipe_and_plain_mla(tmp_path: Path) -> None:
    done = evaluate(
        tmp_path,
        *("--model-path", NANO, "--artifact", SKETCHED_ARTIFACT, "--tokens", 256, "--long-tokens", 0, "--quiet"),
        *("--task-tokens", 512, "--task-documents", 4),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["bytes_per_token"] == 4 * 176 and found["bytes_mla"] == 4 * 320
    assert found["report"]["kl_mean"] < 0.01 * found["paper"]["kl_mean"]
    assert len(found["layers"]) == 4 and all(0 < row["output_error"] < 1e-3 for row in found["layers"])
    methods = {"plain MLA", "the paper's recipe", "the artifact"}
    assert {row["method"] for row in found["recall"]} == methods
    assert {row["kind"] for row in found["recall"]} == {"needle", "table", "calls", "many"}
    assert all(row["kept"] <= row["plain"] <= row["questions"] for row in found["recall"])
    assert "the paper's recipe" in done.stdout and "512 all" in done.stdout


def test_a_corpus_that_calibrates_is_enough_to_evaluate(tmp_path: Path) -> None:
    """The paper's recipe takes all calibration text if there is little; flags for fewer tokens mean held-out text."""
    (tmp_path / "corpus").mkdir()
    for number in range(16):
        words = " ".join(f"word {place * number}" for place in range(150))
        (tmp_path / "corpus" / f"{number}.txt").write_text(words)
    done = evaluate(
        tmp_path / "out",
        *("--model-path", NANO, "--artifact", ARTIFACT, "--corpus", tmp_path / "corpus", "--tokens", 32, "--quiet"),
        *("--prompt-tokens", 32, "--continuation-tokens", 32, "--long-tokens", 0),
    )
    assert done.returncode == 0, done.stderr
    assert "the paper's recipe at g = 2" in done.stdout


def test_the_paper_s_recipe_takes_a_text_of_few_different_tokens(nano_model: PlainModel) -> None:
    """Rounding makes the energy of directions that no token takes negative, and yet no map becomes complex."""
    moments = LayerMoments.zeros(128, 8, 32)
    gamma = nano_model.layers[0].attention.kv_norm.double()
    energies = torch.full((128,), -1e-17, dtype=torch.float64)
    energies[:5] = 1
    moments.latent_outer, moments.latent_count = torch.diag(energies * gamma**2) * 100, 100.0
    meta = StatisticsMeta(1, "nano", "", "", "", "", 0)
    latent = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(2))
    for layer in paper_layers(nano_model, Statistics(meta, [moments] * 4), 3):
        parts = [slicer(latent) for slicer, _, _ in layer]
        assert all(part.isfinite().all() and not part.is_complex() for part in parts)
        assert parts[0].abs().max() > 0 and parts[2].abs().max() == 0


def test_the_paper_s_recipe_takes_a_norm_with_a_zero(nano_model: PlainModel) -> None:
    """The channel's value before the norm cannot be known, and is not needed."""
    layer = nano_model.layers[0]
    gamma = layer.attention.kv_norm.clone()
    gamma[7] = 0
    dead = replace(layer, attention=replace(layer.attention, kv_norm=gamma))
    latent = torch.randn(1, 400, 128, generator=torch.Generator().manual_seed(2)) * gamma
    moments = LayerMoments.zeros(128, 8, 32)
    moments.update(latent[0], torch.zeros(400, 8, 32))
    statistics = Statistics(StatisticsMeta(1, "nano", "", "", "", "", 0), [moments])
    model = SimpleNamespace(layers=[dead], device=nano_model.device, dtype=nano_model.dtype)
    ((slicer, _, back),) = paper_layers(model, statistics, 1)[0]  # type: ignore[arg-type]
    found = slicer(latent) @ back
    angle = torch.nn.functional.cosine_similarity(found, latent, dim=-1)  # one group changes the length only
    assert found.isfinite().all() and found[..., 7].abs().max() == 0 and angle.min() > 0.9999


def test_questions_to_live_servers_are_counted_token_by_token() -> None:
    case = TaskDocument("needle", 512, (5, 6), (((7,), (1, 2)), ((8,), (1, 3))))
    top = [{1: -0.1}, {2: -0.1}]
    with saying([1, 2], top) as stock, saying([1], top[:1]) as tpla:
        rows = recall_endpoints({PLAIN: stock, "TPLA": tpla}, [case])
    plain, sliced = rows
    assert (plain.questions, plain.answered, plain.tokens, plain.tokens_right) == (2, 1, 4, 3)
    assert (sliced.answered, sliced.plain, sliced.kept, sliced.tokens_right) == (0, 1, 0, 2)


@contextmanager
def saying(tokens: list[int], tops: list[dict[int, float]]) -> Iterator[str]:
    """Serve /generate with a fixed list of tokens and alternatives, and yield the URL."""
    meta = {
        "output_token_logprobs": [[tops[i][t], t, None] for i, t in enumerate(tokens)],
        "output_top_logprobs": [[[lp, t, None] for t, lp in top.items()] for top in tops],
    }

    def generate(path: str, body: bytes) -> tuple[int, bytes]:
        asked = json.loads(body)
        good = asked["return_logprob"] and asked["sampling_params"]["temperature"] == 0
        return 200, json.dumps({"text": "", "meta_info": meta if good else {}}).encode()

    with answering(generate) as address:
        yield f"http://{address}"


def test_endpoints_are_compared_until_they_part() -> None:
    stock = [{1: math.log(0.6), 2: math.log(0.3)}, {1: math.log(0.5), 2: math.log(0.4)}] * 2
    tpla = [{1: math.log(0.5), 2: math.log(0.4)}, {1: math.log(0.4), 2: math.log(0.5)}] * 2
    with saying([1, 1, 1, 1], stock) as ours, saying([1, 2, 1, 1], tpla) as theirs:
        (found,) = compare_endpoints(ours, theirs, ["x"])
        (same,) = compare_endpoints(ours, ours, ["x"])
    assert (found.agreement_tokens, found.departed, len(found.kl)) == (1, True, 2)
    expected = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.4)
    assert found.kl[0] == pytest.approx(expected, abs=1e-9)
    assert (same.agreement_tokens, same.departed, same.kl) == (4, False, (0.0,) * 4)


def test_partial_kl_is_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(3)
    exact, found = torch.randn(2, 50, generator=generator).log_softmax(-1)
    whole = (exact.exp() * (exact - found)).sum().item()
    listed = [{int(t): float(lp[t]) for t in lp.topk(20).indices} for lp in (exact, found)]
    assert 0 <= partial_kl(*listed) <= whole


def test_a_server_without_logprobs_is_named() -> None:
    with answering(lambda path, body: (400, b"no")) as server, pytest.raises(EndpointError, match="answered 400"):
        compare_endpoints(f"http://{server}", f"http://{server}", ["x"])


@pytest.mark.parametrize("url", ["http://[::1", "http://localhost:port", "http://a..b", f"http://{'a' * 70}.com"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(EndpointError, match=re.escape(f"{url} did not answer: ")):
        compare_endpoints(url, url, ["x"])


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1000.0])
def test_alternatives_that_are_no_logprobs_are_refused(value: float) -> None:
    with saying([1], [{1: value}]) as server, pytest.raises(EndpointError, match="without usable log-probabilities"):
        compare_endpoints(server, server, ["x"])


def test_tables_replace_only_the_models_measured(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(f"top\n{START}\n\n### a\n\nold a\n\n### b\n\nold b\n\n{END}\nbottom\n")
    write_into(document, "### b\n\nnew b\n")
    assert document.read_text() == f"top\n{START}\n\n### a\n\nold a\n\n### b\n\nnew b\n\n{END}\nbottom\n"
    document.write_text("no markers")
    with pytest.raises(CorpusError, match="markers"):
        write_into(document, "### b\n")
