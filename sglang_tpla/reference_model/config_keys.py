"""Keys of a Hugging Face config that models spell in more than one way; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NESTED = ("text_config", "language_config")  # where multimodal wrappers keep the language model's config
DEFAULT_ROPE_THETA = 10000.0


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's own config, which multimodal wrappers keep one level down.

    How weights are quantised is taken from the wrapper where the inner config does not say it.
    """
    if config.get("kv_lora_rank") is None:
        for name in NESTED:
            if isinstance(config.get(name), Mapping):
                outer = {key: config[key] for key in ("quantization_config",) if key in config}
                return {**outer, **config[name]}
    return dict(config)


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding.

    Transformers 5 keeps it in ``rope_parameters`` and older configs beside ``rope_scaling``; null counts as absent.
    """
    places = (config, config.get("rope_scaling"), config.get("rope_parameters"))
    found = [
        place["rope_theta"]
        for place in places
        if isinstance(place, Mapping) and place.get("rope_theta") is not None
    ]
    return float(found[0]) if found else DEFAULT_ROPE_THETA
