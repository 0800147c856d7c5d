"""The accuracy tables of docs/accuracy.md: ``make accuracy``, or ``python benchmarks/accuracy.py``.

For each checkpoint and row: calibrate on a corpus's calibration split, measure on its held-out split (prompt
512 exact, 512 tokens decoded through TPLA, fp32), in closed form and learned, beside the paper's recipe (PCA,
RMSNorm over the slice). Finished rows are kept in a cache folder, so a run that is interrupted goes on.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from sglang_tpla.artifact.artifact import ErrorReport
from sglang_tpla.artifact.model_identity import weights_hash
from sglang_tpla.calibrate import pipeline
from sglang_tpla.calibrate.__main__ import ERRORS
from sglang_tpla.calibrate.learn_layer import LearnPlan
from sglang_tpla.calibrate.learn_model import forget_finished, learn_model
from sglang_tpla.measure.corpus import CorpusError
from sglang_tpla.measure.decode_error import measure, model_maps
from sglang_tpla.measure.paper import paper_layers
from sglang_tpla.measure.statistics import Statistics
from sglang_tpla.measure.text import Text, TextPlan, collect_statistics, read_text
from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.forward import PlainModel

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "accuracy.md"


@dataclass(frozen=True)
class Row:
    """One line of a table: a layout, and the KL that it must not exceed."""

    model: str
    groups: int
    shared_dims: int
    bar_kl: float


ROWS = (
    Row("nano-mla", 2, 32, 0.010),
    Row("nano-mla", 2, 48, 0.0040),
    Row("nano-mla", 4, 48, 0.0080),
    Row("tiny-mla", 2, 0, 0.0025),
    Row("tiny-mla", 2, 64, 0.0010),
    Row("tiny-mla", 4, 64, 0.0028),
    Row("tiny-mla", 8, 64, 0.0048),
    Row("tiny-mla", 16, 64, 0.0065),
)


class RowResult(msgspec.Struct, frozen=True):
    """A row's measurements: reports by method."""

    model: str
    groups: int
    width: int
    shared_dims: int
    bar_kl: float
    corpus: str
    corpus_hash: str
    seed: int
    calibration_tokens: int
    learn_steps: int
    shared: ErrorReport
    learned: ErrorReport
    paper: ErrorReport | None


@dataclass(frozen=True)
class Settings:
    """The settings that decide a table besides its rows."""

    plan: TextPlan
    learn: LearnPlan
    device: str
    cache: Path


def measure_rows(path: Path, rows: Sequence[Row], settings: Settings) -> list[RowResult]:
    """Return the results of one checkpoint's rows, from the cache if it has them."""
    files = {row: settings.cache / f"{_key(path, row, settings)}.json" for row in rows}
    missing = [row for row, file in files.items() if not file.exists()]
    if missing:
        checkpoint = Checkpoint(path)
        text = read_text(settings.plan, checkpoint)
        model = PlainModel(checkpoint, torch.float32, settings.device)
        statistics = collect_statistics(model, text, settings.plan.seed, show_progress=True)
        for row in missing:
            result = _measure(row, model, statistics, text, settings)
            files[row].parent.mkdir(parents=True, exist_ok=True)
            files[row].write_bytes(msgspec.json.format(msgspec.json.encode(result)))
            forget_finished(settings.cache / "work", model.spec.layers)
    return [msgspec.json.decode(files[row].read_bytes(), type=RowResult) for row in rows]


def _measure(row: Row, model: PlainModel, statistics: Statistics, text: Text, settings: Settings) -> RowResult:
    shared_dims = [row.shared_dims] * model.spec.layers
    shared = pipeline.closed_form(statistics, model.checkpoint, "shared", row.groups, shared_dims)
    learned = learn_model(
        model, shared, statistics, text.calibration, settings.learn, settings.cache / "work", show_progress=True
    )
    candidates = [model_maps(artifact, model) for artifact in (shared, learned)]
    prompt = settings.plan.prompt_tokens
    closed_errors, learned_errors = measure(model, text.held_out, candidates, prompt, batch=_batch(model))
    paper = None
    if row.shared_dims == 0 or row.groups >= 2:
        sliced = paper_layers(model, statistics, row.groups)
        (paper_errors,) = measure(model, text.held_out, [sliced], prompt, batch=_batch(model))
        paper = paper_errors.report()
    return RowResult(
        model=row.model,
        groups=row.groups,
        width=shared.meta.widths[0],
        shared_dims=row.shared_dims,
        bar_kl=row.bar_kl,
        corpus=text.corpus,
        corpus_hash=text.corpus_hash,
        seed=settings.plan.seed,
        calibration_tokens=shared.meta.calibrated_tokens,
        learn_steps=settings.learn.steps,
        shared=closed_errors.report(),
        learned=learned_errors.report(),
        paper=paper,
    )


def _batch(model: PlainModel) -> int:
    # A GPU needs several sequences at a time to be busy; on a CPU they would not fit the caches.
    return 8 if model.device.type == "cuda" else 1


def _key(path: Path, row: Row, settings: Settings) -> str:
    what = (weights_hash(path), row, settings.plan, settings.learn)
    return f"{row.model}-g{row.groups}-r{row.shared_dims}-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"


def markdown(results: Sequence[RowResult]) -> str:
    """Return the tables as the documentation has them."""
    lines: list[str] = []
    for model in dict.fromkeys(result.model for result in results):
        rows = [result for result in results if result.model == model]
        first = rows[0]
        report = first.shared
        lines += [
            f"### {model}",
            "",
            f"Text: `{first.corpus}` (hash {first.corpus_hash[:12]}), split by seed {first.seed}; calibrated on "
            f"{first.calibration_tokens:,} tokens, measured on {report.tokens:,} tokens of other files, prompt "
            f"{report.prompt_tokens}, continuation {report.continuation_tokens}, fp32. Perplexity of plain MLA: "
            f"{report.perplexity_mla:.3f}.",
            "",
            "| g | width per rank | r | bar | KL, `shared` | KL, `learned` | perplexity, `learned` | same top token | "
            "the paper's recipe: width, KL |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            met = "met" if row.learned.kl_mean <= row.bar_kl else "missed"
            latent = (row.width - row.shared_dims) * row.groups + row.shared_dims
            paper = f"{latent // row.groups}, {row.paper.kl_mean:.4f}" if row.paper else "-"
            lines.append(
                f"| {row.groups} | {row.width} | {row.shared_dims} | {row.bar_kl} | {row.shared.kl_mean:.5f} | "
                f"{row.learned.kl_mean:.5f} ({row.learn_steps}; {met}) | x{row.learned.perplexity_ratio:.4f} | "
                f"{row.learned.top1_agreement:.1%} | {paper} |"
            )
        lines.append("")
    return "\n".join(lines)


START, END = "<!-- tables: make accuracy -->", "<!-- end of tables -->"


def write_into(document: Path, tables: str) -> None:
    """Replace the tables between the markers of a document, except those of models not measured now.

    Raises:
        CorpusError: the markers are missing.
    """
    text = document.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise CorpusError(f"expected the markers {START!r} and {END!r} in {document}; put them where tables go")
    before, rest = text.split(START, 1)
    old, after = rest.split(END, 1)
    sections = {**_sections(old), **_sections(tables)}
    body = "\n".join(sections[name] for name in sorted(sections))
    document.write_text(f"{before}{START}\n\n{body}\n{END}{after}", encoding="utf-8")


def _sections(tables: str) -> dict[str, str]:
    parts = tables.split("### ")[1:]
    return {part.split("\n", 1)[0].strip(): f"### {part.strip()}\n" for part in parts}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every bar is met, 1 if one is missed, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python benchmarks/accuracy.py", description=__doc__)
    parser.add_argument("--nano", type=Path, default=ROOT / "examples" / "nano-mla", help="nano-mla's folder")
    parser.add_argument("--tiny", type=Path, help="tiny-mla's folder (default: ../shared/models/tiny-mla if there)")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="PATH", help="default: Python's library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=262144, help="calibration tokens")
    parser.add_argument("--held-out-tokens", type=int, default=16384)
    for name in ("steps", "sequences", "queries"):
        parser.add_argument(f"--learn-{name}", type=int, default=getattr(LearnPlan, name), help="as of calibrate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="rows whose MODEL-gG-rR starts with this")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sglang_tpla" / "accuracy")
    parser.add_argument(
        "--write", type=Path, help="document whose tables to replace (default: docs/accuracy.md, without --only)"
    )
    arguments = parser.parse_args(argv)
    tiny = arguments.tiny or ROOT.parent / "shared" / "models" / "tiny-mla"
    folders = {"nano-mla": arguments.nano, "tiny-mla": tiny}
    try:
        settings = Settings(
            TextPlan(
                corpus=tuple(arguments.corpus),
                seed=arguments.seed,
                calibration_tokens=arguments.tokens,
                held_out_tokens=arguments.held_out_tokens,
            ),
            LearnPlan(
                steps=arguments.learn_steps,
                sequences=arguments.learn_sequences,
                queries=arguments.learn_queries,
                seed=arguments.seed,
            ),
            arguments.device,
            arguments.cache,
        )
        results: list[RowResult] = []
        for name, folder in folders.items():
            if name == "tiny-mla" and arguments.tiny is None and not folder.is_dir():
                print(f"{name} is not at {folder}: its table is left out (--tiny PATH gives it)", file=sys.stderr)
                continue
            wanted = [row for row in ROWS if row.model == name and _wanted(row, arguments.only)]
            results += measure_rows(folder, wanted, settings)
        tables = markdown(results)
        print(tables)
        target = arguments.write
        if target is None and arguments.only is None and DOCUMENT.is_file():
            target = DOCUMENT
        if target is not None:
            write_into(target, tables)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(result.learned.kl_mean <= result.bar_kl for result in results) else 1


def _wanted(row: Row, only: str | None) -> bool:
    return only is None or f"{row.model}-g{row.groups}-r{row.shared_dims}".startswith(only)


if __name__ == "__main__":
    sys.exit(main())
