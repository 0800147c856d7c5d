"""The text of a calibration or evaluation: its documents, their division into sequences, and the moments over them."""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.measure.corpus import Corpus, CorpusError, load_tokenizer, sequences
from sglang_tpla.measure.statistics import FORMAT_VERSION, Statistics, StatisticsError, StatisticsMeta, collect
from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.config_file import separator, whole
from sglang_tpla.reference_model.forward import PlainModel

CALIBRATION_TOKENS, HELD_OUT_TOKENS = 131072, 8192
LARGEST_SEED = 2**32 - 1  # learning makes seeds a million times as large, and generators take 64 bits
SKETCHED_CALIBRATION_TOKENS = 65536  # closed-form maps need no more


@dataclass(frozen=True)
class TextPlan:
    """The choice of a text, its amount and its division into sequences.

    If a number of tokens is given, the text must have that many; None takes the usual number, or all tokens if there
    are fewer.

    Raises:
        CorpusError: a count is not positive, or the seed is out of range.
    """

    corpus: tuple[str, ...] = ()
    seed: int = 0
    calibration_tokens: int | None = None
    held_out_tokens: int | None = None
    prompt_tokens: int = 512
    continuation_tokens: int = 512
    usual_calibration_tokens: int = CALIBRATION_TOKENS

    def __post_init__(self) -> None:
        if abs(self.seed) > LARGEST_SEED:
            raise CorpusError(f"expected --seed to lie between {-LARGEST_SEED} and {LARGEST_SEED}, got {self.seed}")
        for name in ("calibration_tokens", "prompt_tokens", "continuation_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"expected {name} to be at least 1, got {value}")
        if self.held_out_tokens is not None and self.held_out_tokens < 0:
            raise CorpusError(f"expected held_out_tokens to be 0 (no report) or more, got {self.held_out_tokens}")

    def check_report(self, instead: str = "") -> None:
        """Check that errors can be measured on the text: the last token of a sequence has no next one to compare with.

        Args:
            instead: an alternative for the user, for the message.

        Raises:
            CorpusError: continuations have one token.
        """
        if self.continuation_tokens < 2:
            raise CorpusError(
                "expected --continuation-tokens to be at least 2 for an error report, as the last token has no next "
                f"one to compare with, got {self.continuation_tokens}; give more{instead}"
            )

    @property
    def length(self) -> int:
        """The tokens of one sequence."""
        return self.prompt_tokens + self.continuation_tokens


@dataclass(frozen=True)
class Text:
    """Token sequences [count, length] of a plan: calibration and held-out come from disjoint documents."""

    corpus: str
    corpus_hash: str
    calibration: torch.Tensor
    held_out: torch.Tensor


def read_text(plan: TextPlan, checkpoint: Checkpoint) -> Text:
    """Read, split and tokenise the text of a plan.

    ``held_out_tokens`` counts continuation tokens, because only they are measured.

    Raises:
        CorpusError: too little text, or no tokenizer.
    """
    corpus = Corpus.from_paths(plan.corpus)
    calibration, held_out = corpus.split(plan.seed)
    tokenizer = load_tokenizer(checkpoint.path)
    ends = separator(checkpoint.config)

    def cut(documents: list, tokens: int | None, usual: int, counted: int) -> torch.Tensor:
        count = -(-(usual if tokens is None else tokens) // counted)
        if count == 0:
            return torch.empty(0, plan.length, dtype=torch.long)
        return sequences(documents, tokenizer, length=plan.length, count=count, separator=ends, fewer=tokens is None)

    text = Text(
        corpus.name,
        corpus.content_hash,
        cut(calibration, plan.calibration_tokens, plan.usual_calibration_tokens, plan.length),
        cut(held_out, plan.held_out_tokens, HELD_OUT_TOKENS, plan.continuation_tokens),
    )
    vocab = whole(checkpoint.config, "vocab_size")
    largest = max((int(tokens.max()) for tokens in (text.calibration, text.held_out) if tokens.numel()), default=-1)
    if largest >= vocab:
        raise CorpusError(
            f"the tokenizer in {checkpoint.path} made the token {largest}, and the model knows {vocab} (vocab_size): "
            "expected the tokenizer that the model was trained with"
        )
    return text


def collect_statistics(model: PlainModel, text: Text, seed: int, *, show_progress: bool) -> Statistics:
    """Collect the second moments of every layer over the calibration text."""
    meta = StatisticsMeta(
        format_version=FORMAT_VERSION,
        model_name=model.checkpoint.path.resolve().name,
        config_hash=config_hash(model.checkpoint.config),
        weights_hash=weights_hash(model.checkpoint.path),
        corpus=text.corpus,
        corpus_hash=text.corpus_hash,
        seed=seed,
    )
    with (
        torch.inference_mode(),
        tqdm(total=text.calibration.numel(), desc="statistics", unit="tok", disable=not show_progress) as bar,
    ):
        layers = collect(model, text.calibration.split(1), bar.update)
    for index, layer in enumerate(layers):
        if not layer.finite:
            raise StatisticsError(
                f"layer {index} of {meta.model_name} gets queries or latents that are not finite on this text: "
                "expected a checkpoint without NaN and infinity, whose layers stay within float32"
            )
    return Statistics(meta, layers)
