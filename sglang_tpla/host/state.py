"""What this process serves: settings, artifact and layout, worked out once from the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_tpla.calibrate.artifact import Artifact
from sglang_tpla.config import ConfigError, Layout, Settings


@cache
def settings() -> Settings:
    """Settings of this server process.

    Raises:
        ConfigError: the process was not started by the launcher.
    """
    found = Settings.from_environment(os.environ)
    if found is None:
        raise ConfigError(
            "this process has no SGLANG_TPLA_ROLE; start it with `python -m sglang_tpla.launch`"
        )
    return found


def serves_decode() -> bool:
    """Whether this process belongs to a decode server of ours."""
    found = Settings.from_environment(os.environ)
    return found is not None and found.role == "decode"


@cache
def artifact() -> Artifact | None:
    """The calibration artifact of a decode server, or None for plain MLA."""
    path = settings().artifact
    return Artifact.load(path) if path else None


@dataclass(frozen=True)
class Slice:
    """What one decode rank keeps of every layer: its group's maps and the widths."""

    layout: Layout
    rank: int
    artifact: Artifact

    @property
    def group(self) -> int:
        """This rank's latent group."""
        return self.layout.group_of(self.rank)


def make_slice(heads: int, rank: int, tp_size: int) -> Slice | None:
    """The slice of attention rank ``rank`` of ``tp_size``, or None where the server keeps the whole latent."""
    loaded = artifact()
    if loaded is None:
        return None
    return Slice(Layout(tp_size, settings().groups, heads), rank, loaded)


def describe(
    layout: Layout,
    latent_dim: int,
    rope_dim: int,
    widths: tuple[int, ...],
    row_bytes: Sequence[int],
    value_bytes: int,
) -> dict[str, Any]:
    """The ``tpla`` section of ``/server_info``: layout, widths, and cache bytes per token and rank.

    Args:
        row_bytes: of a token's row in every layer's cache.
        value_bytes: of a value in the cache of plain MLA, in the model's own precision.
    """
    from sglang_tpla.host.hooks import applied

    loaded = artifact()
    return {
        "role": settings().role,
        "groups": layout.groups,
        "head_shards": layout.head_shards,
        "o_proj": settings().o_proj,
        "latent_dim": latent_dim,
        "rope_dim": rope_dim,
        "widths": list(widths),
        "artifact": settings().artifact,
        "artifact_sha256": loaded.content_hash if loaded else None,
        "transform": loaded.meta.transform if loaded else "none",
        "cache_bytes_per_token_and_rank": sum(row_bytes),
        "mla_cache_bytes_per_token_and_rank": value_bytes * len(widths) * (latent_dim + rope_dim),
        "hooks": list(applied()),
    }


def current_slice(server_args: Any, rank: int, tp_size: int) -> Slice | None:
    """`make_slice` for the model of a server."""
    return make_slice(server_args.get_model_config().hf_text_config.num_attention_heads, rank, tp_size)


def model_identity(server_args: Any) -> str:
    """What a prefill and a decode server must share: hashes of the config and of the weights."""
    from sglang_tpla.calibrate.identity import config_hash, weights_hash
    from sglang_tpla.host.refusals import local_checkpoint
    from sglang_tpla.models.checkpoint import Checkpoint

    folder = local_checkpoint(server_args.model_path, server_args.revision)
    return f"{config_hash(Checkpoint(folder).config)}:{weights_hash(folder)}"
