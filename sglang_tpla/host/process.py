"""The settings, the artifact and the layout of this process, read once from its environment."""

import os
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.config import SERVER_VARIABLE, ConfigError, Layout, Settings
from sglang_tpla.host import compat

HOOKED: list[str] = []  # the targets in SGLang that are hooked in this process


@cache
def settings() -> Settings:
    """Return the settings of this server process.

    Raises:
        ConfigError: a process that the launcher did not start.
    """
    found = Settings.from_environment(os.environ)
    if found is None:
        raise ConfigError("this process has no SGLANG_TPLA_ROLE; start it with `python -m sglang_tpla.launch`")
    return found


def serves_decode() -> bool:
    """Return whether this process belongs to a decode server of ours."""
    found = Settings.from_environment(os.environ)
    return found is not None and found.role == "decode"


def name_server(dist_init_addr: str | None, nodes: int) -> None:
    """Give this server a unique name before its first process starts.

    The machines of one server derive the same name from ``--dist-init-addr``.
    """
    name = f"nodes of {dist_init_addr}" if nodes > 1 else secrets.token_hex(16)
    os.environ.setdefault(SERVER_VARIABLE, name)


def server_identity() -> str:
    """Return the name that `name_server` gave; the server's ranks register with it."""
    return os.environ.get(SERVER_VARIABLE, "")


@cache
def artifact() -> Artifact | None:
    """Return the calibration artifact of a decode server, or None for plain MLA."""
    path = settings().artifact
    return Artifact.load(path) if path else None


@dataclass(frozen=True)
class Slice:
    """A decode rank's share of the latent and of the heads.

    Args:
        layout: the layout of all ranks. rank: this rank.
        artifact: the maps; None where sketched rows hold the whole latent without an artifact (`model.rows`).
    """

    layout: Layout
    rank: int
    artifact: Artifact | None

    @property
    def group(self) -> int:
        return self.layout.group_of(self.rank)


def make_slice(heads: int, rank: int, tp_size: int) -> Slice | None:
    """Return the slice of attention rank ``rank`` of ``tp_size``, or None where the rows are stock SGLang's."""
    loaded = artifact()
    if loaded is None and settings().rows != "sketched":
        return None
    return Slice(Layout(tp_size, settings().groups, heads), rank, loaded)


def model_identity(server_args: Any) -> str:
    """Return the hashes of config and weights, those of a draft included, on which both servers must agree."""
    from sglang_tpla.artifact.model_identity import config_hash, weights_hash
    from sglang_tpla.reference_model.checkpoint import Checkpoint, local_checkpoint

    args = compat.resolved(server_args)
    folder = local_checkpoint(args.model_path, args.revision)
    return f"{config_hash(Checkpoint(folder).config)}:{weights_hash(folder, draft=compat.speculates(args))}"
