"""``python -m sglang_tpla.evaluate``: measure how far decoding with an artifact differs from plain MLA, and why.

Without servers: ``--model-path M --artifact A`` measures on one process and writes JSON and an HTML page.
With two live servers: ``--stock-url U --tpla-url V`` compares their log-probabilities through the HTTP API.
With either, ``--task-tokens 1024 2048`` also counts the correct answers to questions about facts planted in documents.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from sglang_tpla.artifact.artifact import Artifact, ArtifactError, ArtifactMeta
from sglang_tpla.artifact.model_identity import weights_hash
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.config import not_retired
from sglang_tpla.evaluate.endpoints import EndpointError, compare_endpoints
from sglang_tpla.evaluate.generate import long_answers
from sglang_tpla.evaluate.layers import kl_alone, layer_errors
from sglang_tpla.evaluate.recall import PLAIN, RecallRow, documents, recall, recall_endpoints, recall_table
from sglang_tpla.evaluate.recall_tasks import TaskDocument
from sglang_tpla.evaluate.report import (
    ENDPOINTS,
    Bin,
    Evaluation,
    LayerRow,
    LongRow,
    outputs,
    summary,
    write,
    write_json,
)
from sglang_tpla.evaluate.retrieval import Needle, NeedleRow, needles, retrieval
from sglang_tpla.measure.corpus import Corpus, CorpusError, load_tokenizer
from sglang_tpla.measure.decode_error import DecodeErrors, measure, model_maps, quantile
from sglang_tpla.measure.outputs import OutputError, check_outputs
from sglang_tpla.measure.paper import paper_layers
from sglang_tpla.measure.statistics import StatisticsError
from sglang_tpla.measure.text import HELD_OUT_TOKENS, TextPlan, collect_statistics, read_text
from sglang_tpla.reference_model.checkpoint import Checkpoint, CheckpointError
from sglang_tpla.reference_model.forward import Bf16Maps, LayerMaps, PlainModel
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

ERRORS = (ArtifactError, CheckpointError, CorpusError, StatisticsError, EndpointError, OutputError, OSError)

POSITIONS = 16
PAPER_TOKENS = 16384  # calibration text for the principal components of the paper's recipe, or all if there is less


def _at_least(least: int) -> Callable[[str], int]:
    """Return a flag's type: it accepts whole numbers that are not below ``least``."""

    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")

    return number


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(prog="python -m sglang_tpla.evaluate", description=__doc__)
    text.add_argument("--model-path", type=Path, help="checkpoint directory")
    text.add_argument("--artifact", type=Path, help="artifact to measure")
    text.add_argument("--corpus", nargs="+", default=[], metavar="PATH", help="default: Python's library")
    text.add_argument("--seed", type=int, help="split of the text (default: the artifact's, so it was held out)")
    text.add_argument(
        "--tokens", type=int, help=f"decoded tokens measured (default {HELD_OUT_TOKENS}, or what there is)"
    )
    text.add_argument("--prompt-tokens", type=int, default=512)
    text.add_argument("--continuation-tokens", type=int, default=512)
    text.add_argument(
        "--long-tokens", type=_at_least(0), default=128, help="follow the model's own answers this far; 0: not"
    )
    text.add_argument("--long-answers", type=_at_least(1), default=4, help="how many of them (default 4)")
    text.add_argument("--needle-tokens", type=_at_least(1), nargs="*", default=[], help="retrieval prompts: 1024 ...")
    text.add_argument("--needle-cases", type=_at_least(1), default=4, help="needles for each length and depth")
    text.add_argument(
        "--task-tokens",
        type=_at_least(1),
        nargs="*",
        default=[],
        metavar="TOKENS",
        help="lengths of documents with planted facts and questions: 1024 2048 4096 ...",
    )
    text.add_argument(
        "--task-documents", type=_at_least(1), default=8, help="documents of each length, kinds in turn (default 8)"
    )
    text.add_argument(
        "--no-paper", action="store_true", help="leave out the paper's recipe, which is measured side by side"
    )
    text.add_argument(
        "--cache-dtype",
        default="exact",
        type=not_retired("an artifact of `python -m sglang_tpla.calibrate --rows sketched`"),
        choices=("exact", "bf16"),
        help="precision that slices are cached in, here for its error alone (default exact: fp32)",
    )
    text.add_argument("--device", default="cpu")
    text.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for JSON and HTML")
    text.add_argument("--quiet", action="store_true", help="no progress bars")
    text.add_argument("--stock-url", help="a stock server (or its router)")
    text.add_argument("--tpla-url", help="a TPLA deployment's router")
    text.add_argument("--prompts", type=_at_least(1), default=16, help="prompts sent to both servers (default 16)")
    text.add_argument("--new-tokens", type=_at_least(1), default=128, help="answer length there (default 128)")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return 0 on success or 2 on bad input."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.out.exists() and not arguments.out.is_dir():
            raise ArtifactError(f"expected a folder to write to at --out {arguments.out}, found a file")
        live = bool(arguments.stock_url or arguments.tpla_url)
        inputs = {"--artifact": [arguments.artifact] if arguments.artifact else [], "--corpus": arguments.corpus}
        check_outputs(outputs(arguments.out, live=live), inputs, arguments.model_path)
        if live:
            return _endpoints(arguments)
        if not arguments.model_path or not arguments.artifact:
            raise ArtifactError(
                "expected --model-path and --artifact, or --stock-url and --tpla-url for two live servers"
            )
        evaluation = evaluate(arguments)
        data, page = write(evaluation, arguments.out)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(evaluation))
    print(f"wrote {data} and {page}")
    return 0


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Measure everything, without writing the files."""
    checkpoint = Checkpoint(arguments.model_path)
    artifact = Artifact.load(arguments.artifact)
    artifact.check_model(checkpoint.config, weights_hash(checkpoint.path), artifact.meta.groups)
    if artifact.meta.sketched and arguments.cache_dtype != "exact":
        raise ArtifactError(
            f"{arguments.artifact} is of sketched rows, which have a precision of their own: leave out --cache-dtype"
        )
    seed = artifact.meta.seed if arguments.seed is None else arguments.seed
    plan = TextPlan(
        corpus=tuple(arguments.corpus),
        seed=seed,
        calibration_tokens=1,
        held_out_tokens=arguments.tokens,
        prompt_tokens=arguments.prompt_tokens,
        continuation_tokens=arguments.continuation_tokens,
    )
    plan.check_report()
    if arguments.long_tokens == 1:
        raise CorpusError(
            "expected --long-tokens to be 0 (no long answers) or at least 2, as the last token has no next one to "
            "compare with, got 1"
        )
    text = read_text(plan, checkpoint)
    if not len(text.held_out):
        raise CorpusError("expected --tokens to be at least 1, got 0")
    # Make documents before measuring anything, so that lengths without room for one are refused at once.
    hidden, tasks = _needles(checkpoint.path, plan, arguments), _tasks(checkpoint.path, plan, arguments)
    model = PlainModel(checkpoint, torch.float32, arguments.device)
    sliced = model_maps(artifact, model)
    maps: list[LayerMaps] = sliced
    if arguments.cache_dtype == "bf16":
        maps = [Bf16Maps(layer) for layer in sliced if not isinstance(layer, SketchedMaps)]
    quiet = arguments.quiet

    def errors_of(candidate: list[LayerMaps], what: str) -> DecodeErrors:
        with tqdm(total=text.held_out.numel(), desc=what, unit="tok", disable=quiet) as bar:
            return measure(model, text.held_out, [candidate], plan.prompt_tokens, progress=bar.update)[0]

    errors = errors_of(maps, "held-out error")
    paper = None if arguments.no_paper else _paper(model, plan, artifact.meta.groups, quiet)
    return Evaluation(
        model_name=artifact.meta.model_name,
        artifact_hash=artifact.content_hash,
        transform=artifact.meta.transform,
        groups=artifact.meta.groups,
        widths=artifact.meta.widths,
        shared_dims=artifact.meta.shared_dims,
        corpus=text.corpus,
        corpus_hash=text.corpus_hash,
        seed=seed,
        cache_dtype=arguments.cache_dtype,
        report=errors.report(),
        paper=None if paper is None else errors_of(paper, "the paper's recipe").report(),
        bytes_per_token=cache_bytes(artifact.meta),
        bytes_mla=2 * model.spec.layers * (model.spec.latent_dim + model.spec.rope_dim),
        by_position=positions(errors),
        layers=_layers(model, sliced, text.held_out, artifact, plan.prompt_tokens, quiet),
        long_answers=_long(model, maps, text.held_out, arguments),
        needles=_retrieval(model, maps, hidden, arguments.quiet),
        recall=_recall(model, maps, paper, tasks, arguments.quiet),
    )


def cache_bytes(meta: ArtifactMeta) -> int:
    """Return the bytes that a rank caches of a token in all layers: in sketched rows, or at 16 bits a value."""
    if meta.sketched:
        rows = RowFormat.sketched([meta.rows(layer) for layer in range(meta.num_layers)], group=0)
    else:
        rows = RowFormat.plain(meta.widths, meta.shared_dims, meta.rope_dim)
    return sum(rows.row_bytes(torch.bfloat16))


def _paper(model: PlainModel, plan: TextPlan, groups: int, quiet: bool) -> list[LayerMaps]:
    """Return maps by the paper's recipe, from moments over a little calibration text."""
    little = replace(plan, calibration_tokens=None, usual_calibration_tokens=PAPER_TOKENS, held_out_tokens=0)
    text = read_text(little, model.checkpoint)
    return paper_layers(model, collect_statistics(model, text, plan.seed, show_progress=not quiet), groups)


def _tasks(model_path: Path, plan: TextPlan, arguments: argparse.Namespace) -> list[TaskDocument]:
    if not arguments.task_tokens:
        return []
    held_out = Corpus.from_paths(plan.corpus).split(plan.seed)[1]
    lines = [line for document in held_out for line in document.text.splitlines()]
    return documents(load_tokenizer(model_path), lines, arguments.task_tokens, arguments.task_documents, plan.seed)


def _recall(
    model: PlainModel,
    maps: list[LayerMaps],
    paper: list[LayerMaps] | None,
    cases: list[TaskDocument],
    quiet: bool,
) -> tuple[RecallRow, ...]:
    methods = {"the artifact": maps} if paper is None else {"the paper's recipe": paper, "the artifact": maps}
    with tqdm(total=len(cases), desc="tasks", unit="document", disable=quiet or not cases) as bar:
        return tuple(recall(model, methods, cases, bar.update))


def positions(errors: DecodeErrors) -> tuple[Bin, ...]:
    """Return the KL against the position after the prompt, in at most `POSITIONS` equal ranges."""
    length = errors.kl.shape[1]
    step = -(-length // POSITIONS)
    return tuple(
        Bin(
            start,
            min(start + step, length) - 1,
            errors.kl[:, start : start + step].double().mean().item(),
            quantile(errors.kl[:, start : start + step].flatten().double(), 0.95),
        )
        for start in range(0, length, step)
    )


def _layers(
    model: PlainModel, maps: list[LayerMaps], tokens: torch.Tensor, artifact: Artifact, prompt_tokens: int, quiet: bool
) -> tuple[LayerRow, ...]:
    some = tokens[:4]
    with tqdm(total=some.numel(), desc="layer by layer", unit="tok", disable=quiet) as bar:
        alone = kl_alone(model, maps, some, prompt_tokens, bar.update)
    return tuple(
        LayerRow(layer, artifact.meta.widths[layer], output, heads, alone[layer])
        for layer, (output, heads) in enumerate(layer_errors(model, maps, some, prompt_tokens))
    )


def _long(
    model: PlainModel, maps: list[LayerMaps], tokens: torch.Tensor, arguments: argparse.Namespace
) -> tuple[LongRow, ...]:
    if arguments.long_tokens < 1:
        return ()
    prompts = tokens[: arguments.long_answers, : arguments.prompt_tokens]
    rows = []
    for temperature in (0.0, 1.0):
        total = arguments.long_tokens * len(prompts)
        with tqdm(total=total, desc="long answers", unit="tok", disable=arguments.quiet) as bar:
            errors, agreement = long_answers(
                model, maps, prompts, arguments.long_tokens, temperature=temperature, progress=bar.update
            )
        rows.append(LongRow(temperature, arguments.long_tokens, errors.report(), agreement, positions(errors)))
    return tuple(rows)


def _needles(model_path: Path, plan: TextPlan, arguments: argparse.Namespace) -> list[list[Needle]]:
    if not arguments.needle_tokens:
        return []
    tokenizer = load_tokenizer(model_path)
    filler: list[int] = []
    for document in Corpus.from_paths(plan.corpus).split(plan.seed)[1]:
        filler += tokenizer(document.text)
        if len(filler) > 4 * max(arguments.needle_tokens):
            break
    return needles(tokenizer, filler, arguments.needle_tokens, arguments.needle_cases, plan.seed)


def _retrieval(
    model: PlainModel, maps: list[LayerMaps], made: list[list[Needle]], quiet: bool
) -> tuple[NeedleRow, ...]:
    with tqdm(total=sum(map(len, made)), desc="needles", unit="case", disable=quiet or not made) as bar:
        return tuple(retrieval(model, maps, made, bar.update))


def _endpoint_recall(arguments: argparse.Namespace) -> list[RecallRow]:
    if not arguments.task_tokens:
        return []
    if not arguments.model_path:
        raise EndpointError("--task-tokens cuts documents to length: give --model-path for its tokenizer")
    plan = TextPlan(corpus=tuple(arguments.corpus), seed=arguments.seed or 0)
    cases = _tasks(arguments.model_path, plan, arguments)
    urls = {PLAIN: arguments.stock_url, "TPLA": arguments.tpla_url}
    with tqdm(total=len(cases), desc="tasks", unit="document", disable=arguments.quiet) as bar:
        return recall_endpoints(urls, cases, progress=bar.update)


def _endpoints(arguments: argparse.Namespace) -> int:
    if not (arguments.stock_url and arguments.tpla_url):
        raise EndpointError("expected both --stock-url and --tpla-url, got one of them")
    tasks = _endpoint_recall(arguments)
    _, held_out = Corpus.from_paths(arguments.corpus).split(arguments.seed or 0)
    # About 2,000 characters of text are about 500 tokens.
    prompts = [document.text[:2000] for document in held_out if len(document.text) >= 2000][: arguments.prompts]
    if not prompts:
        raise CorpusError("expected held-out documents of 2,000 characters or more, found none")
    with tqdm(total=len(prompts), desc="prompts", disable=arguments.quiet) as bar:
        found = compare_endpoints(
            arguments.stock_url, arguments.tpla_url, prompts, new_tokens=arguments.new_tokens, progress=bar.update
        )
    kl = torch.tensor([value for comparison in found for value in comparison.kl], dtype=torch.float64)
    if not kl.numel():
        raise EndpointError(
            f"{arguments.stock_url} or {arguments.tpla_url} answered every prompt with no token: nothing to compare"
        )
    result = {
        "stock_url": arguments.stock_url,
        "tpla_url": arguments.tpla_url,
        "prompts": len(found),
        "tokens_compared": kl.numel(),
        "kl_mean": kl.mean().item(),
        "kl_p95": quantile(kl, 0.95),
        "kl_p99": quantile(kl, 0.99),
        "departed": sum(comparison.departed for comparison in found),
        "agreement_tokens": [comparison.agreement_tokens for comparison in found],
        "largest_logprob_difference": max(comparison.largest_logprob_difference for comparison in found),
        "recall": msgspec.to_builtins(tasks),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / ENDPOINTS
    write_json(result, path)
    print(
        f"{result['tokens_compared']} tokens of {len(found)} prompts: KL {result['kl_mean']:.5f} a token "
        f"(99% {result['kl_p99']:.4f}), answers parted on {result['departed']} prompts; wrote {path}"
    )
    if tasks:
        print(recall_table(tasks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
