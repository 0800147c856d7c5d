"""The one reader of a model's ``config.json``, which turns every form that Hugging Face writes into one.

- A multimodal wrapper keeps the language model's own configuration one level down.
- A null key counts as a missing key.
- The rotary embedding stands in ``rope_theta`` and ``rope_scaling`` (transformers 4) or in ``rope_parameters`` (5);
  a file may have both, one of them null.

A file that is none, or a value of another type, raises `CheckpointError`. Nothing here imports torch, so that the
launcher can read a config too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_tpla.errors import SglangTplaError

NESTED = ("text_config", "language_config")  # wrappers keep the language model's configuration there
DEFAULT_ROPE_THETA = 10000.0
LARGEST = 1 << 20  # no size of any model comes near
LARGEST_REAL = 1e300  # a JSON number may be larger than any float


class CheckpointError(SglangTplaError, ValueError):
    """A checkpoint that cannot be read; the message says what was expected, what came, where, and what to do."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the language model's configuration in a file, or in a checkpoint's folder, in one form."""
    return language_config(read_whole_config(path))


def read_whole_config(path: str | Path) -> dict[str, Any]:
    """Return the configuration as the file has it, a wrapper's included."""
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
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(loaded).__name__}")
    return loaded


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's own configuration, without null keys.

    The wrapper's quantisation applies where the inner configuration has none.
    """
    nested = [config[name] for name in NESTED if isinstance(config.get(name), Mapping)]
    if config.get("kv_lora_rank") is None and nested:
        outer = {name: config[name] for name in ("quantization_config",) if name in config}
        config = {**outer, **nested[0]}
    return {name: value for name, value in config.items() if value is not None}


def whole(config: Mapping[str, Any], key: str, least: int = 1, default: int | None = None) -> int:
    """Return a size of the model, a whole number from ``least`` on; without a default the key must be there.

    Raises:
        CheckpointError: naming the key and what it holds.
    """
    value = config.get(key)
    if value is None:
        value = _given(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise CheckpointError(f"expected {key} to be a whole number from {least} to {LARGEST}, got {_short(value)}")
    return value


def real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a finite number of the model; without a default the key must be there.

    Raises:
        CheckpointError: naming the key and what it holds.
    """
    value = config.get(key)
    if value is None:
        value = _given(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST_REAL:
        raise CheckpointError(f"expected {key} to be a number, got {_short(value)}")
    return float(value)


def _given(key: str, default: Any) -> Any:
    if default is None:
        raise CheckpointError(f"the model's config has no {key!r}: expected a DeepSeek V2, V3 or Kimi K2 shaped model")
    return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stretch of the rotary embedding, ``rope_scaling`` or ``rope_parameters``, without null keys."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"expected rope_scaling to be a mapping, got {found!r}")
    return {name: value for name, value in found.items() if value is not None}


def check_query_scaling(config: Mapping[str, Any]) -> None:
    """Refuse a model that scales queries by their position, as Mistral's do.

    SGLang knows one of the two names, and follows it in some of its ways to compute attention, not in all.

    Raises:
        CheckpointError: naming the key.
    """
    for name, part in (
        ("llama_4_scaling", config),
        *(("llama_4_scaling_beta", config.get(key)) for key in ("rope_scaling", "rope_parameters")),
        ("llama_4_scaling_beta", config),
    ):
        if isinstance(part, Mapping) and part.get(name) is not None:
            raise CheckpointError(
                f"the model scales queries by their position (its config has {name} = {part[name]!r}), which "
                "sglang_tpla does not compute: serve it with stock SGLang"
            )


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the rotary embedding's base; one beside the stretch replaces the config's own, as in transformers 5."""
    parts = (config.get("rope_scaling"), config.get("rope_parameters"), config)
    given = (part.get("rope_theta") for part in parts if isinstance(part, Mapping))
    theta = next((base for base in given if base is not None), DEFAULT_ROPE_THETA)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < LARGEST_REAL:
        raise CheckpointError(f"expected rope_theta to be a number above 0, got {_short(theta)}")
    return float(theta)
