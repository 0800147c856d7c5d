"""The evaluation's JSON and its one-page HTML with plots."""

import base64
import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from sglang_tpla.artifact.artifact import ErrorReport, replace_into
from sglang_tpla.evaluate.recall import RecallRow, recall_table
from sglang_tpla.evaluate.retrieval import NeedleRow
from sglang_tpla.measure.outputs import Output, begins_with

DATA, PAGE, ENDPOINTS = "evaluation.json", "evaluation.html", "endpoints.json"
TITLE = "TPLA against plain MLA"
PAGE_HEAD = "<!doctype html><html lang=en><meta charset=utf-8><title>"


class Bin(msgspec.Struct, frozen=True):
    """KL over a range of positions after the prompt, [first, last]."""

    first: int
    last: int
    kl_mean: float
    kl_p95: float


class LayerRow(msgspec.Struct, frozen=True):
    """One layer: the relative squared output error, whole and by head, and the KL a token if only it is sliced."""

    layer: int
    width: int
    output_error: float
    head_errors: tuple[float, ...]
    kl_alone: float


class LongRow(msgspec.Struct, frozen=True):
    """Plain MLA's own continuations at one temperature."""

    temperature: float
    new_tokens: int
    report: ErrorReport
    agreement_tokens: tuple[int, ...]
    by_position: tuple[Bin, ...]


class Evaluation(msgspec.Struct, frozen=True):
    """All measurements of one artifact: ``layers`` always with exact slices, the others in ``cache_dtype``."""

    model_name: str
    artifact_hash: str
    transform: str
    groups: int
    widths: tuple[int, ...]
    shared_dims: tuple[int, ...]
    corpus: str
    corpus_hash: str
    seed: int
    cache_dtype: str
    bytes_per_token: int
    bytes_mla: int
    report: ErrorReport
    paper: ErrorReport | None
    by_position: tuple[Bin, ...]
    layers: tuple[LayerRow, ...]
    long_answers: tuple[LongRow, ...]
    needles: tuple[NeedleRow, ...]
    recall: tuple[RecallRow, ...]


def outputs(folder: Path, *, live: bool) -> list[Output]:
    """Return the files that the command will write for two live servers (``live``), or for an artifact."""

    def named(name: str, begin: str) -> Output:
        return Output("--out", folder / name, "an earlier result of this command", begins_with(begin))

    if live:
        return [named(ENDPOINTS, '{\n "stock_url":')]
    return [named(DATA, '{\n "model_name":'), named(PAGE, PAGE_HEAD + TITLE)]


def write(evaluation: Evaluation, folder: Path) -> tuple[Path, Path]:
    """Write ``evaluation.json`` and ``evaluation.html``, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / DATA, folder / PAGE
    write_json(evaluation, data)
    with replace_into(page) as temporary:
        Path(temporary).write_text(_page(evaluation), encoding="utf-8")
    return data, page


def write_json(result: object, path: Path) -> None:
    """Write a result as JSON that people can read, too."""
    with replace_into(path) as temporary:
        Path(temporary).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))


def summary(evaluation: Evaluation) -> str:
    """Return a few lines for the terminal that describe an evaluation."""
    report = evaluation.report
    worst = max(evaluation.layers, key=lambda row: row.kl_alone, default=None)
    lines = [
        f"{evaluation.model_name}: {evaluation.transform}, g = {evaluation.groups}, "
        f"{evaluation.bytes_per_token} of {evaluation.bytes_mla} cached bytes a token and rank "
        f"({evaluation.bytes_per_token / evaluation.bytes_mla:.1%})"
        + ("" if evaluation.cache_dtype == "exact" else f", slices cached in {evaluation.cache_dtype}"),
        f"{report.tokens} decoded tokens of {evaluation.corpus} (seed {evaluation.seed}), prompt exact: "
        f"KL {report.kl_mean:.5f} (95% {report.kl_p95:.4f}, 99% {report.kl_p99:.4f}), "
        f"perplexity x{report.perplexity_ratio:.4f}, same top token {report.top1_agreement:.1%}",
    ]
    if evaluation.paper is not None:
        lines.append(
            f"the paper's recipe at g = {evaluation.groups}, on the same text: KL {evaluation.paper.kl_mean:.5f}, "
            f"perplexity x{evaluation.paper.perplexity_ratio:.4f}, same top token {evaluation.paper.top1_agreement:.1%}"
        )
    if worst is not None:
        lines.append(f"layer {worst.layer} costs most: KL {worst.kl_alone:.5f} by itself")
    for row in evaluation.long_answers:
        kind = "greedy" if row.temperature == 0 else f"sampled at {row.temperature}"
        mean = sum(row.agreement_tokens) / len(row.agreement_tokens)
        lines.append(
            f"{kind} answers of {row.new_tokens} tokens: KL {row.report.kl_mean:.5f}, "
            f"first other choice after {mean:.0f} tokens on average"
        )
    for needle in evaluation.needles:
        lines.append(
            f"needle at {needle.depth:.0%} of {needle.prompt_tokens}: right {needle.right_tpla:.0%} "
            f"(plain MLA {needle.right_mla:.0%}), same top token {needle.same_top:.1%}"
        )
    if evaluation.recall:
        lines.append(recall_table(evaluation.recall))
    return "\n".join(lines)


def _page(evaluation: Evaluation) -> str:
    title = f"{TITLE}: {html.escape(evaluation.model_name)}"
    text = html.escape(summary(evaluation))
    images = "\n".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{png}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, png in _plots(evaluation)
    )
    return (
        f"{PAGE_HEAD}{title}</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap}"
        "img{max-width:100%}</style>"
        f"<h1>{title}</h1><pre>{text}</pre>{images}</html>\n"
    )


def _plots(evaluation: Evaluation) -> list[tuple[str, str]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots: list[tuple[str, str]] = []

    @contextmanager
    def plot(name: str) -> Iterator[Any]:
        figure, target = Figure(figsize=(8, 3.5), layout="constrained"), io.BytesIO()
        yield figure.add_subplot()
        FigureCanvasAgg(figure).print_png(target)
        plots.append((name, base64.b64encode(target.getvalue()).decode()))

    series = [("held-out text", evaluation.by_position)]
    series += [
        ("greedy" if row.temperature == 0 else f"sampled, {row.temperature}", row.by_position)
        for row in evaluation.long_answers
    ]
    with plot("KL a token against position") as axes:
        for label, bins in series:
            axes.plot([(b.first + b.last) / 2 for b in bins], [b.kl_mean for b in bins], label=label)
        axes.set(xlabel="tokens after the prompt", ylabel="KL a token (nats)", ylim=(0, None))
        axes.legend()
    if evaluation.layers:
        with plot("Which layers cost") as axes:
            axes.bar([row.layer for row in evaluation.layers], [row.kl_alone for row in evaluation.layers])
            axes.set(xlabel="layer", ylabel="KL with only this layer sliced")
        with plot("Output error by layer and head") as axes:
            image = axes.imshow([row.head_errors for row in evaluation.layers], aspect="auto")
            axes.set(xlabel="head", ylabel="layer")
            axes.figure.colorbar(image, label="relative squared error")
    return plots
