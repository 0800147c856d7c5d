"""Speculative decoding on both kinds of server: the settings of SGLang that are supported.

The supported draft is that of DeepSeek V3 and R1: one NextN layer in the target's own checkpoint, which guesses a chain
of up to three tokens. Both servers run it, since the draft layer's cache and first guess are made with the prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sglang_tpla.attention.backends import Capability
from sglang_tpla.attention.interface import MAX_QUERY_LEN, DecodeShape
from sglang_tpla.config import ConfigError
from sglang_tpla.host import compat
from sglang_tpla.host.attention.supported import OURS, engine_unsupported_reason
from sglang_tpla.host.disaggregation.engine_memory import CACHE_DTYPES
from sglang_tpla.reference_model.checkpoint import Checkpoint, local_checkpoint

ALGORITHMS = ("EAGLE", "NEXTN")
NEXTN_LAYERS = "num_nextn_predict_layers"


def unsupported_reasons(args: Any, role: str) -> list[str]:
    """Return the reasons why the flags of a speculating server cannot be served; empty without speculation."""
    if args.speculative_algorithm is None:
        return []
    guesses = f"with {args.speculative_algorithm}"
    drafts, topk, steps = (
        args.speculative_num_draft_tokens, args.speculative_eagle_topk, args.speculative_num_steps,
    )  # fmt: skip
    draft_path = args.speculative_draft_model_path
    known = args.speculative_algorithm.upper() in ALGORITHMS
    too_many = (drafts or 1) > MAX_QUERY_LEN or (steps or 1) >= MAX_QUERY_LEN
    none = steps is not None and steps < 1
    chain = not (too_many or none) and (topk or 1) == 1
    # SGLang 0.5.17 has neither of these two flags.
    by_block = getattr(args, "speculative_use_block_verification", False)
    draft_dtype = getattr(args, "speculative_draft_kv_cache_dtype", None) or "auto"
    thresholds = args.speculative_accept_threshold_single, args.speculative_accept_threshold_acc
    cases = [
        (not known, "--speculative-algorithm", args.speculative_algorithm,
         f"the draft must be the checkpoint's own NextN layer; use {' or '.join(ALGORITHMS)}"),
        (known and draft_path not in (None, args.model_path), "--speculative-draft-model-path", draft_path,
         "the draft must be the checkpoint's own NextN layer; drop the flag"),
        ((topk or 1) > 1, "--speculative-eagle-topk", topk,
         "trees of guesses need a mask that the kernels do not read; use --speculative-eagle-topk 1"),
        (too_many, "--speculative-num-draft-tokens",
         drafts or (steps or 0) + 1, f"the kernels verify {MAX_QUERY_LEN} tokens a request at most; use "
         f"--speculative-num-steps {MAX_QUERY_LEN - 1}"),
        (none, "--speculative-num-steps", steps, "without a guess there is nothing to verify; use 1 to 3"),
        (chain and None not in (drafts, steps) and drafts != steps + 1, "--speculative-num-draft-tokens", drafts,
         f"a step verifies its {steps} guesses and the token before them; use {(steps or 0) + 1}, or drop the flag"),
        (args.speculative_adaptive, "--speculative-adaptive", "on",
         "attention is planned for one number of guesses; drop the flag"),
        (args.enable_multi_layer_eagle, "--enable-multi-layer-eagle", "on",
         "the draft is one layer; drop the flag"),
        (args.speculative_use_rejection_sampling, "--speculative-use-rejection-sampling", "on",
         "the first guess's probabilities do not travel from prefill to decode; drop the flag"),
        (by_block, "--speculative-use-block-verification", "on",
         "it turns on --speculative-use-rejection-sampling, and the first guess's probabilities do not travel from "
         "prefill to decode; drop the flag"),
        (draft_dtype.startswith("fp8"), "--speculative-draft-kv-cache-dtype", draft_dtype,
         "the draft's rows travel in the model's precision; drop the flag"),
        (bool(args.enable_custom_logit_processor), "--enable-custom-logit-processor", guesses,
         "SGLang applies a processor to no token that it verifies; drop one of them"),
        (args.grammar_backend == "outlines", "--grammar-backend", "outlines",
         "SGLang looks for each guess in a grammar's bits, which this one has not, and takes it back, which this one "
         "cannot, so that a request with a grammar would end the server; use xgrammar or llguidance"),
        (args.device == "cpu" and min(thresholds) < 1, "--speculative-accept-threshold-single and -acc", thresholds,
         "the CPU reference platform keeps guesses by the target's probability alone; drop the flags"),
        (compat.attention_groups(args) > 1, compat.attention_groups_flag(args), guesses,
         "the two were never tested together; drop one of them"),
        (role == "decode" and args.disaggregation_decode_enable_radix_cache,
         "--disaggregation-decode-enable-radix-cache", guesses, "the two were never tested together; drop one"),
        (role == "decode" and args.speculative_attention_mode != "decode", "--speculative-attention-mode",
         args.speculative_attention_mode, "a decode server verifies with its decode kernels; use "
         "--speculative-attention-mode decode, as the launcher does by itself"),
    ]  # fmt: skip
    return [f"{flag} {value} cannot be served: {why}" for bad, flag, value, why in cases if bad]


def check_draft(args: Any, text: Any, dtype: torch.dtype) -> None:
    """Refuse a checkpoint without the NextN layer, and a draft cache whose rows would be read as another dtype.

    SGLang would take random weights for a missing layer.

    Args:
        text: the config of the model's text part.
        dtype: the model's dtype.

    Raises:
        ConfigError: quoting the config, or naming the missing weights.
    """
    if args.speculative_algorithm is None:
        return
    # All rows of an agent have one dtype; beside sketched rows, a draft's rows have the model's dtype.
    rows_dtype = CACHE_DTYPES.get(args.kv_cache_dtype, dtype)
    given = getattr(args, "speculative_draft_kv_cache_dtype", None)  # not in 0.5.17
    if given is not None and (drafts := CACHE_DTYPES.get(given, dtype)) != rows_dtype:
        raise ConfigError(
            f"--speculative-draft-kv-cache-dtype {given} cannot be served: the draft's rows would be {drafts}, and "
            f"travel as {rows_dtype}, by the model's dtype and --kv-cache-dtype; drop the flag"
        )
    layers = getattr(text, NEXTN_LAYERS, None) or 0
    if layers != 1:
        raise ConfigError(
            f"--speculative-algorithm {args.speculative_algorithm} needs a checkpoint with one NextN layer; "
            f"{args.model_path} has {NEXTN_LAYERS}={layers}; drop the flag, or serve a checkpoint that has the layer"
        )
    checkpoint = Checkpoint(local_checkpoint(args.model_path, args.revision))
    name = checkpoint.layer_name(text.num_hidden_layers, "eh_proj.weight")
    if name not in checkpoint:
        raise ConfigError(
            f"--speculative-algorithm {args.speculative_algorithm} needs the weights of the NextN layer; "
            f"{args.model_path} has no {name}, although its config has {NEXTN_LAYERS}={layers}; drop the flag, or "
            "serve a checkpoint that has the layer"
        )


def check_backends(
    args: Any, backend: str, shapes: Sequence[DecodeShape], draft: DecodeShape, capability: Capability
) -> None:
    """Refuse attention backends that cannot verify guesses, and one that cannot serve the draft's layer.

    SGLang uses the decode server's backend for a draft whose backend no flag names.

    Args:
        backend: the decode server's attention backend.
        shapes: the shapes of its sliced layers; empty where it has no slices.
        draft: the shape of the draft's layer on one rank.

    Raises:
        ConfigError: naming the backends to use instead.
    """
    if args.speculative_algorithm is None:
        return
    if shapes and backend != OURS:
        raise ConfigError(
            f"--attention-backend {backend} was never tested in verifying guesses on a slice; use --attention-backend "
            f"{OURS} with --speculative-algorithm {args.speculative_algorithm}"
        )
    chosen = args.speculative_draft_attention_backend or backend
    if chosen == "torch_native":
        raise ConfigError(
            f"--speculative-draft-attention-backend {chosen} cannot guess, since SGLang has no draft steps for it; use "
            f"--speculative-draft-attention-backend {OURS}"
        )
    if chosen == OURS and (why := engine_unsupported_reason(OURS, draft, capability)) is not None:
        others = ("fa3", "flashinfer", "triton")
        able = [name for name in others if engine_unsupported_reason(name, draft, capability) is None]
        advice = f"use {' or '.join(able)}" if able else "drop --speculative-algorithm"
        raise ConfigError(
            f"--speculative-draft-attention-backend {OURS} cannot serve the draft's layer of {draft.latent_dim} + "
            f"{draft.rope_dim} and {draft.heads} heads a rank: {why}; {advice}"
        )
