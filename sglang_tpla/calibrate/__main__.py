"""``python -m sglang_tpla.calibrate``: make the artifact that a TPLA decode server loads."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_tpla.artifact.artifact import Artifact, ArtifactError
from sglang_tpla.attention.backends import BACKENDS
from sglang_tpla.cache_rows.sketched import ROPE_BITS, SKETCH_BITS
from sglang_tpla.calibrate import pipeline
from sglang_tpla.calibrate.layout_search import Search, each, search, table
from sglang_tpla.calibrate.learn_layer import LearnPlan
from sglang_tpla.calibrate.learn_model import forget_finished, learn_model
from sglang_tpla.calibrate.sketch_layout import sketched_rows, usual_rows
from sglang_tpla.calibrate.sketch_search import SketchedSearch
from sglang_tpla.calibrate.transforms import TRANSFORMS, TransformError, check_settings
from sglang_tpla.config import not_retired
from sglang_tpla.measure.corpus import CorpusError
from sglang_tpla.measure.decode_error import measure, model_maps
from sglang_tpla.measure.outputs import Output, OutputError, check_outputs, is_artifact, is_statistics
from sglang_tpla.measure.statistics import Statistics, StatisticsError, combine
from sglang_tpla.measure.text import (
    CALIBRATION_TOKENS,
    HELD_OUT_TOKENS,
    SKETCHED_CALIBRATION_TOKENS,
    Text,
    TextPlan,
    collect_statistics,
    read_text,
)
from sglang_tpla.reference_model.checkpoint import Checkpoint, CheckpointError
from sglang_tpla.reference_model.forward import PlainModel
from sglang_tpla.reference_model.spec import ModelSpec

_GROUPS = 2
_CHOICE_SEQUENCES = 8  # sequences of calibration text on which layouts are compared
_SKETCHED_CHOICE_SEQUENCES = 4  # fewer for sketched rows, because there are more of them to compare
ERRORS = (ArtifactError, CheckpointError, CorpusError, OutputError, StatisticsError, TransformError, OSError)


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(prog="python -m sglang_tpla.calibrate", description=__doc__)
    text.add_argument("--model-path", required=True, help="checkpoint directory with config.json and safetensors")
    text.add_argument("--out", required=True, type=Path, help="artifact file to write")
    text.add_argument("--groups", type=int, help="latent groups g (default 2, or as --max-kl chooses)")
    text.add_argument(
        "--transform",
        default="shared",
        choices=(*TRANSFORMS, "learned"),
        help="default: shared. learned lowers the KL of plain rows by a quarter to a half, in minutes a "
        "layer; sketched rows lose nothing but rounding and have no use for it",
    )
    text.add_argument("--key-map", default="regression", choices=("regression", "scalar"), help="scalar: the paper's")
    text.add_argument(
        "--rows",
        type=not_retired("--rows sketched"),
        choices=("sketched", "plain"),
        help="what a rank caches of a token: its columns at 8 bits and a sketch of the others (the default with "
        "--transform shared and several groups), or its columns in the model's precision",
    )
    text.add_argument(
        "--shared-dims",
        type=int,
        help="latent values every group keeps (default: d/4 for shared; in sketched rows at most 64, or more where "
        "the sketch would be noisy)",
    )
    text.add_argument(
        "--own-bits", type=int, default=8, choices=(8,), help="bits of a rank's own columns in sketched rows"
    )
    text.add_argument(
        "--sketch-bits",
        type=int,
        choices=SKETCH_BITS,
        help="bits of a sketched column (default 4, or by layer where fewer and more shared columns cost far less; "
        "--max-kl chooses among all)",
    )
    text.add_argument(
        "--rope-bits",
        type=int,
        choices=ROPE_BITS,
        help="bits of the rotary key's values in sketched rows (default 16, or 8 where the sketch would be noisy: what "
        "that saves is spent on shared columns)",
    )
    text.add_argument(
        "--corpus", nargs="+", default=[], metavar="PATH", help="files or folders (default: Python's library)"
    )
    text.add_argument(
        "--tokens",
        type=int,
        help=f"calibration tokens (default {SKETCHED_CALIBRATION_TOKENS} for sketched rows, else "
        f"{CALIBRATION_TOKENS}, or what there is)",
    )
    text.add_argument(
        "--held-out-tokens",
        type=int,
        help=f"tokens of the error report; 0 for none (default {HELD_OUT_TOKENS}, or what there is)",
    )
    text.add_argument("--prompt-tokens", type=int, default=512, help="exact prompt of the report (default 512)")
    text.add_argument(
        "--continuation-tokens", type=int, default=512, help="tokens decoded through TPLA after it (default 512)"
    )
    text.add_argument("--seed", type=int, default=0, help="decides the split and the order of the text")
    for name, what in (
        ("steps", "Adam steps a layer"),
        ("sequences", "sequences a step"),
        ("queries", "queries a sequence and step"),
    ):
        default = getattr(LearnPlan, name)
        text.add_argument(f"--learn-{name}", type=int, default=default, help=f"{what} of learned (default {default})")
    text.add_argument(
        "--refit-values", action="store_true", help="refit the value maps in closed form given the probabilities"
    )
    text.add_argument("--max-kl", type=float, help="choose the cheapest layout within this KL a token (needs --ranks)")
    text.add_argument("--ranks", type=int, help="tensor-parallel ranks of the decode server, for --max-kl")
    text.add_argument(
        "--attention-backend",
        metavar="NAME",
        default="reference",
        type=not_retired("--rows sketched"),
        choices=[backend.name for backend in BACKENDS],
        help="whose widths --max-kl may choose (default: reference, any)",
    )
    text.add_argument("--save-stats", type=Path, metavar="FILE", help="also write the second moments")
    text.add_argument(
        "--from-stats",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="second moments collected elsewhere (files of several ranks or servers are put together); "
        "of the checkpoint only kv_b_proj and the latent's norm are read, and there is no error report",
    )
    text.add_argument(
        "--one-layer-at-a-time", action="store_true", help="hold one layer's weights, for models that do not fit"
    )
    text.add_argument("--device", default="cpu", help="torch device (default cpu)")
    text.add_argument("--quiet", action="store_true", help="no progress bars")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return 0 on success or 2 on bad input."""
    arguments = parser().parse_args(argv)
    try:
        artifact = make(arguments)
        artifact.save(arguments.out)
        forget_finished(_work_folder(arguments.out), artifact.meta.num_layers)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(artifact))
    size_mb = arguments.out.stat().st_size / 1e6
    print(f"wrote {arguments.out} ({size_mb:.2f} MB), hash {artifact.content_hash[:16]}")
    return 0


def make(arguments: argparse.Namespace) -> Artifact:
    """Make the artifact, without writing it."""
    checkpoint = Checkpoint(arguments.model_path)
    spec = ModelSpec.from_config(checkpoint.config)
    if arguments.max_kl is not None and arguments.groups is not None:
        raise TransformError(
            f"--max-kl chooses g among the divisors of --ranks, got --groups {arguments.groups} as well: leave one out"
        )
    if arguments.max_kl is not None:
        _check_choice(arguments)
    transform, groups = arguments.transform, _GROUPS if arguments.groups is None else arguments.groups
    rows = row_choice(arguments, groups)
    shared_dims = arguments.shared_dims
    if shared_dims is None:
        shared_dims = spec.latent_dim // 4 if transform in ("shared", "learned") and groups > 1 else 0
    check_settings(transform, groups, shared_dims, spec.latent_dim)
    if rows == "sketched" and arguments.shared_dims is not None and arguments.max_kl is None:
        # Refuse these settings before any text is read.
        bits = arguments.sketch_bits or 4, arguments.rope_bits or 16
        sketched_rows(spec.latent_dim, spec.rope_dim, groups, shared_dims, *bits)

    def closed_form(statistics: Statistics) -> Artifact:
        if rows == "sketched":
            costs = pipeline.layer_costs(statistics, checkpoint)
            asked = arguments.sketch_bits, arguments.rope_bits, arguments.shared_dims
            layout = usual_rows(costs, spec.rope_dim, groups, *asked)
            return pipeline.sketched_form(statistics, spec, costs, layout)
        first = "shared" if transform == "learned" else transform
        shared = [shared_dims] * spec.layers
        return pipeline.closed_form(statistics, checkpoint, first, groups, shared, arguments.key_map)

    _check_together(arguments)
    wanted = None if arguments.max_kl is None else _wanted(arguments, rows, spec)
    if arguments.from_stats:
        return closed_form(_given_statistics(arguments))
    plan = TextPlan(
        corpus=tuple(arguments.corpus),
        seed=arguments.seed,
        calibration_tokens=arguments.tokens,
        held_out_tokens=arguments.held_out_tokens,
        prompt_tokens=arguments.prompt_tokens,
        continuation_tokens=arguments.continuation_tokens,
        usual_calibration_tokens=SKETCHED_CALIBRATION_TOKENS if rows == "sketched" else CALIBRATION_TOKENS,
    )
    if plan.held_out_tokens != 0:
        plan.check_report(", or --held-out-tokens 0")
    learning = LearnPlan(
        steps=arguments.learn_steps if transform == "learned" else 0,
        sequences=arguments.learn_sequences,
        queries=arguments.learn_queries,
        seed=plan.seed,
        first_query=plan.prompt_tokens // 2,
    )
    text = read_text(plan, checkpoint)
    resident = not arguments.one_layer_at_a_time
    model = PlainModel(checkpoint, torch.float32, arguments.device, resident=resident)
    show = not arguments.quiet
    statistics = collect_statistics(model, text, plan.seed, show_progress=show)
    if arguments.save_stats is not None:
        statistics.save(arguments.save_stats)
    warn_of_gaps(statistics)
    artifact = closed_form(statistics) if wanted is None else choose(arguments, wanted, model, statistics, text, rows)
    if transform == "learned" or arguments.refit_values:
        artifact = learn_model(
            model,
            artifact,
            statistics,
            text.calibration,
            learning,
            _work_folder(arguments.out),
            refit=arguments.refit_values,
            show_progress=show,
        )
    if len(text.held_out):
        artifact = pipeline.with_report(artifact, model, text.held_out, plan.prompt_tokens, show_progress=show)
    return artifact


def _check_together(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and files that must not or cannot be written."""
    if arguments.max_kl is not None and arguments.ranks is None:
        raise TransformError("--max-kl chooses g among the divisors of --ranks: give --ranks T as well")
    if arguments.ranks is not None and arguments.max_kl is None:
        raise TransformError("--ranks is of --max-kl, which chooses g among its divisors: give both, or --groups")
    if arguments.from_stats and arguments.max_kl is not None:
        raise TransformError("--max-kl measures on text and needs the model: leave out --from-stats")
    # A corpus need not be checked, because no text is an artifact or statistics.
    outputs = [Output("--out", arguments.out, "an artifact", is_artifact)]
    if arguments.save_stats is not None:
        outputs.append(Output("--save-stats", arguments.save_stats, "statistics", is_statistics))
    check_outputs(outputs, {"--from-stats": arguments.from_stats or ()}, arguments.model_path)
    if arguments.from_stats and arguments.save_stats is not None:
        raise TransformError("--save-stats keeps second moments of text; with --from-stats none is read: leave one out")
    text_flags = {
        "--corpus": arguments.corpus,
        "--tokens": arguments.tokens,
        "--held-out-tokens": arguments.held_out_tokens,
    }
    if arguments.from_stats and (asked := [flag for flag, value in text_flags.items() if value]):
        raise TransformError(f"--from-stats has second moments, and no text is read: leave out {' and '.join(asked)}")


def _given_statistics(arguments: argparse.Namespace) -> Statistics:
    """Return the second moments of the files that are given."""
    if arguments.transform == "learned" or arguments.refit_values:
        raise TransformError(
            "--from-stats has second moments only; learned maps and refits need the model and text: leave out "
            "--from-stats, or take --transform shared"
        )
    # Drop duplicates: a file that two patterns name would count twice.
    files = {os.path.realpath(path): path for path in arguments.from_stats}.values()
    statistics = combine([Statistics.load(path) for path in files])
    warn_of_gaps(statistics)
    return statistics


def _work_folder(out: Path) -> Path:
    return out.parent / f"{out.name}.work"


def warn_of_gaps(statistics: Statistics) -> None:
    """Warn on stderr if the tokens do not reach all directions of a latent, because maps are a guess in the others.

    Statistics of a server's traffic can have this gap after few requests, or many similar ones, and they have no error
    report that would show it.
    """
    reached = [layer.reached for layer in statistics.layers]
    least, latent_dim = min(reached), len(statistics.layers[0].latent_sum)
    if least < latent_dim:
        print(
            f"warning: {statistics.tokens} tokens reach {least} of the latent's {latent_dim} directions in layer "
            f"{reached.index(least)}, and the maps are a guess in the others: other text may cost many times as much; "
            "give more text, and more kinds of it",
            file=sys.stderr,
        )


def row_choice(arguments: argparse.Namespace, groups: int) -> str:
    """Return the requested row format, or the default: sketched if the maps are those of ``shared`` and g > 1."""
    simple = arguments.transform == "shared" and arguments.key_map == "regression" and not arguments.refit_values
    rows = arguments.rows
    if rows is None:
        rows = "sketched" if simple and groups > 1 else "plain"
    if rows != "sketched" and (arguments.sketch_bits or arguments.rope_bits):
        raise TransformError(
            f"--sketch-bits and --rope-bits are those of sketched rows, got {rows} rows: leave them out, or take "
            "--rows sketched with --transform shared"
        )
    if rows == "sketched" and not simple:
        raise TransformError(
            "--rows sketched takes --transform shared with neither --key-map scalar nor --refit-values (its error is "
            "that of rounding, which they do not lower); leave them out, or take --rows plain"
        )
    return str(rows)


def _check_choice(arguments: argparse.Namespace) -> None:
    """Refuse options that the choice of a layout would ignore.

    Raises:
        TransformError: another transform or key map, or shared columns of plain rows, whose number is chosen.
    """
    asked = [
        f"--transform {arguments.transform}" if arguments.transform not in ("shared", "learned") else "",
        f"--key-map {arguments.key_map}" if arguments.key_map != "regression" else "",
    ]
    if row_choice(arguments, _GROUPS) == "plain" and arguments.shared_dims is not None:
        asked.append(f"--shared-dims {arguments.shared_dims} in plain rows")
    if any(asked):
        raise TransformError(
            "--max-kl chooses among layouts of --transform shared with --key-map regression, and the shared columns of "
            f"plain rows, got {' and '.join(filter(None, asked))}: leave that out, or leave out --max-kl"
        )


def _wanted(arguments: argparse.Namespace, rows: str, spec: ModelSpec) -> Search:
    backend = next(entry for entry in BACKENDS if entry.name == arguments.attention_backend)
    any_width = rows == "sketched"  # a backend's slice widths do not apply to sketched rows
    wanted = Search(
        arguments.ranks, arguments.max_kl, lambda width: any_width or backend.has_width(width), heads=spec.heads
    )
    if rows == "plain":
        list(wanted.looked_at(spec.latent_dim, spec.rope_dim))  # raises before any text is read
    elif arguments.shared_dims is not None:
        counts = wanted.group_counts()
        held = _sketched_search(arguments).looked_at(spec.latent_dim, spec.rope_dim, counts)
        if not any(groups > 1 for _, groups, _ in held):
            bits = arguments.sketch_bits or 4, arguments.rope_bits or 16
            sketched_rows(spec.latent_dim, spec.rope_dim, counts[0], arguments.shared_dims, *bits)
    return wanted


def _sketched_search(arguments: argparse.Namespace) -> SketchedSearch:
    bits = SKETCH_BITS if arguments.sketch_bits is None else (arguments.sketch_bits,)
    keys = ROPE_BITS if arguments.rope_bits is None else (arguments.rope_bits,)
    return SketchedSearch(bits, keys, arguments.shared_dims)


def choose(
    arguments: argparse.Namespace,
    wanted: Search,
    model: PlainModel,
    statistics: Statistics,
    text: Text,
    rows: str,
) -> Artifact:
    """Make the cheapest layout within the bound, and print all candidates.

    Raises:
        TransformError: no layout keeps the bound.
    """

    def tell(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr)

    spec, prompt_tokens = model.spec, arguments.prompt_tokens
    if rows == "sketched":
        looked_at = _sketched_search(arguments).looked_at(spec.latent_dim, spec.rope_dim, wanted.group_counts())
        costs, sequences = pipeline.layer_costs(statistics, model.checkpoint), _SKETCHED_CHOICE_SEQUENCES
    else:
        looked_at, sequences = wanted.looked_at(spec.latent_dim, spec.rope_dim), _CHOICE_SEQUENCES

    def made(groups: int, layers: Sequence[Any]) -> Artifact:
        if rows == "sketched":
            return pipeline.sketched_form(statistics, spec, costs, layers)
        return pipeline.closed_form(statistics, model.checkpoint, "shared", groups, [layer.shared for layer in layers])

    points = search(model, text.calibration[:sequences], prompt_tokens, wanted.max_kl, looked_at, made, tell)
    bytes_mla = 2 * spec.layers * (spec.latent_dim + spec.rope_dim)
    within = [point for point in points if point.groups > 1 and point.kl <= wanted.max_kl]
    held_out: list[float] = []
    for point in within:
        artifact = made(point.groups, point.rows)
        # The bound is promised on text that neither the maps nor the choice have seen.
        if len(text.held_out):
            (errors,) = measure(model, text.held_out, [model_maps(artifact, model)], prompt_tokens)
            held_out.append(errors.mean_kl)
        if not held_out or held_out[-1] <= wanted.max_kl:
            print(table(points, point, bytes_mla))
            return artifact
    print(table(points, None, bytes_mla))
    best = f"{min(point.kl for point in points if point.groups > 1):.3g}"
    if held_out:
        best = f"{min(held_out):.3g} on held-out text ({len(held_out)} keep it on the calibration's)"
    raise TransformError(
        f"no layout over {wanted.ranks} ranks keeps KL within {wanted.max_kl}; the best looked at has {best}: raise "
        "--max-kl, or serve plain MLA"
    )


def summary(artifact: Artifact) -> str:
    """Return a few lines that describe the artifact and its distance from plain MLA."""
    meta = artifact.meta
    lines = [sketched_summary(artifact) if meta.sketched else plain_summary(artifact)]
    lines.append(f"calibrated on {meta.calibrated_tokens} tokens of {meta.corpus} (seed {meta.seed})")
    report = meta.error_report
    if report is not None:
        lines.append(
            f"held-out, prompt exact, {report.tokens} decoded tokens: KL {report.kl_mean:.5f} a token "
            f"(95% {report.kl_p95:.4f}, 99% {report.kl_p99:.4f}), perplexity x{report.perplexity_ratio:.4f} "
            f"of {report.perplexity_mla:.3f}, same top token {report.top1_agreement:.1%}"
        )
    return "\n".join(lines)


def sketched_summary(artifact: Artifact) -> str:
    meta = artifact.meta
    rows = [meta.rows(layer) for layer in range(meta.num_layers)]
    mean = sum(layer.row_bytes for layer in rows) / len(rows)
    share = mean / (2 * (meta.latent_dim + meta.rope_dim))
    return (
        f"{meta.model_name}: sketched rows, g = {meta.groups}, {each([layer.shared for layer in rows])} shared and "
        f"{each([layer.own for layer in rows])} own columns at 8 bits, the other groups' at "
        f"{each([layer.sketch_bits for layer in rows])} bits, rotary key at {meta.rope_bits}: "
        f"{each([layer.row_bytes for layer in rows])} bytes a token and layer ({share:.1%} of plain MLA's in bf16)"
    )


def plain_summary(artifact: Artifact) -> str:
    meta = artifact.meta
    widths = sorted(set(meta.widths))
    kept = sum(meta.widths) / meta.num_layers + meta.rope_dim
    share = kept / (meta.latent_dim + meta.rope_dim)
    return (
        f"{meta.model_name}: {meta.transform}, g = {meta.groups}, width {'/'.join(map(str, widths))} + "
        f"{meta.rope_dim} of {meta.latent_dim} + {meta.rope_dim} values a token and layer ({share:.0%})"
    )


if __name__ == "__main__":
    sys.exit(main())
