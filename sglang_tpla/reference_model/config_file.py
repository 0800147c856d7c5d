"""The only reader of a model's ``config.json``, which turns every form that Hugging Face writes into one.

- A multimodal wrapper keeps the language model's own configuration one level down.
- A null key counts as a missing key.
- The rotary embedding's keys are ``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5);
  a file may have both, one of them null.

A file that is no configuration, a value of another type, and a number that no model has raise `CheckpointError`, which
names the key, the value and the file. Nothing here imports torch, so that the launcher can read a config too.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_tpla.errors import SglangTplaError

NESTED = ("text_config", "language_config")  # a wrapper keeps the language model's configuration under one of these
DEFAULT_ROPE_THETA = 10000.0
LARGEST = 1 << 20  # larger than any size of any model
LARGEST_REAL = 1e38  # float32 holds it; a JSON number may be larger than float32 holds


class CheckpointError(SglangTplaError, ValueError):
    """A checkpoint cannot be read; the message says what was expected, what came, where, and what to do."""


class Config(dict[str, Any]):
    """A configuration, or a part of one, with the name of its file for messages; "" if it came from no file."""

    def __init__(self, values: Mapping[str, Any], file: str = "") -> None:
        super().__init__(values)
        self.file = file


def place(config: Mapping[str, Any]) -> str:
    """Return the words that name a configuration's file, to follow a value in a message."""
    file = getattr(config, "file", "")
    return f" in {file}" if file else ""


def read_config(path: str | Path) -> Config:
    """Return the language model's configuration from a file, or from a checkpoint's folder, in one form."""
    return language_config(read_whole_config(path))


def read_whole_config(path: str | Path) -> Config:
    """Return the configuration as the file has it, with a wrapper if there is one."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        if path.with_name("params.json").is_file():
            raise CheckpointError(
                f"{path.parent} is in Mistral's own format (params.json without config.json), which is not read: serve "
                "Mistral Large 3 with stock SGLang"
            )
        raise CheckpointError(f"expected a model directory with config.json, found none at {path}")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(loaded).__name__}")
    return Config(loaded, str(path))


def language_config(config: Mapping[str, Any]) -> Config:
    """Return the language model's own configuration, without null keys.

    The wrapper's quantisation applies if the inner configuration has none.
    """
    file = getattr(config, "file", "")
    nested = [config[name] for name in NESTED if isinstance(config.get(name), Mapping)]
    if config.get("kv_lora_rank") is None and nested:
        outer = {name: config[name] for name in ("quantization_config",) if name in config}
        config = {**outer, **nested[0]}
    return _without_nulls(config, file)


def _without_nulls(values: Mapping[str, Any], file: str) -> Config:
    return Config({name: value for name, value in values.items() if value is not None}, file)


def whole(config: Mapping[str, Any], key: str, least: int = 1, default: int | None = None) -> int:
    """Return a size of the model, a whole number from ``least`` on; without a default the key must be there.

    Raises:
        CheckpointError: the value is none; the message names the key, its value and the file.
    """
    value = _given(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise CheckpointError(
            f"expected {key} to be a whole number from {least} to {LARGEST}, got {_short(value)}{place(config)}"
        )
    return value


# The ranges that the arithmetic needs, by key: (lower bound, whether the bound itself is allowed, largest value).
# Smaller numbers give roots and logarithms that are not finite, and an epsilon above 1 leaves nothing of the values.
_ABOVE_ZERO = (0.0, False, LARGEST_REAL)
_FROM_ZERO = (0.0, True, LARGEST_REAL)
_RANGES = {
    "rms_norm_eps": (0.0, True, 1.0),
    "routed_scaling_factor": _ABOVE_ZERO,
    "rope_theta": (1.0, False, LARGEST_REAL),  # yarn divides by its logarithm
    "factor": _ABOVE_ZERO,
    "original_max_position_embeddings": (1.0, True, LARGEST_REAL),
    "max_position_embeddings": (1.0, True, LARGEST_REAL),
    # SGLang takes its default for null and for 0.
    "beta_fast": _FROM_ZERO,
    "beta_slow": _FROM_ZERO,
    "mscale": _FROM_ZERO,
    "mscale_all_dim": _FROM_ZERO,
}


def real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a number of the model, in the range of its arithmetic; without a default the key must be there.

    Raises:
        CheckpointError: the value is out of range; the message names the key, its value and the file.
    """
    return _in_range(_given(config, key, default), key, config)


def _in_range(value: Any, key: str, config: Mapping[str, Any]) -> float:
    least, itself, largest = _RANGES.get(key, (-math.inf, True, LARGEST_REAL))
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_REAL
    if not number or value > largest or not (value >= least if itself else value > least):
        words = f" {'from' if itself else 'above'} {least:g}" if least > -math.inf else ""
        words += f" to {largest:g}" if largest < LARGEST_REAL else ""
        raise CheckpointError(f"expected {key} to be a number{words}, got {_short(value)}{place(config)}")
    return float(value)


def _given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(
            f"the model's config has no {key!r}{place(config)}: expected a DeepSeek V2, V3 or Kimi K2 shaped model"
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def rope_scaling(config: Mapping[str, Any]) -> Config:
    """Return the scaling of the rotary embedding, ``rope_scaling`` or ``rope_parameters``, without null keys."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"expected rope_scaling to be a mapping, got {_short(found)}{place(config)}")
    return _without_nulls(found, getattr(config, "file", ""))


def weight_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of a weight that share one scale in a block-quantised checkpoint."""
    part = config.get("quantization_config") or {}
    block = part.get("weight_block_size") if isinstance(part, Mapping) else part
    block = [128, 128] if block is None else block
    good = isinstance(block, (list, tuple)) and len(block) == 2
    if not good or not all(type(size) is int and 1 <= size <= LARGEST for size in block):
        raise CheckpointError(
            f"expected weight_block_size of quantization_config to be two whole numbers from 1 on, got {_short(block)}"
            f"{place(config)}"
        )
    return block[0], block[1]


def separator(config: Mapping[str, Any]) -> int | None:
    """Return the token that ends a text: the first if the model has several, None if the config names none."""
    token = config.get("eos_token_id")
    token = token[0] if isinstance(token, list) and token else token
    if token is None or (type(token) is int and 0 <= token <= LARGEST):
        return token
    raise CheckpointError(
        f"expected eos_token_id to be a token's number, or a list of them, got {_short(token)}{place(config)}"
    )


def check_query_scaling(config: Mapping[str, Any]) -> None:
    """Refuse a model that scales queries by their position, as Mistral's models do.

    SGLang knows one of the two names, and only some of its attention paths follow it.

    Raises:
        CheckpointError: the model scales queries; the message names the key.
    """
    for name, part in (
        ("llama_4_scaling", config),
        *(("llama_4_scaling_beta", config.get(key)) for key in ("rope_scaling", "rope_parameters")),
        ("llama_4_scaling_beta", config),
    ):
        if isinstance(part, Mapping) and part.get(name) is not None:
            raise CheckpointError(
                f"the model scales queries by their position (its config{place(config)} has {name} = "
                f"{_short(part[name])}), which "
                "sglang_tpla does not compute: serve it with stock SGLang"
            )


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the rotary embedding's base; a base in the scaling replaces the config's, as in transformers 5."""
    parts = (config.get("rope_scaling"), config.get("rope_parameters"), config)
    given = (part.get("rope_theta") for part in parts if isinstance(part, Mapping))
    theta = next((base for base in given if base is not None), DEFAULT_ROPE_THETA)
    return _in_range(theta, "rope_theta", config)
