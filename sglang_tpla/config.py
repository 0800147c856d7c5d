"""Settings, and each tensor-parallel rank's latent group, head shard and widths.

Notation of the design (TPLA, arXiv 2508.15881): T attention ranks, g latent groups, T/g head shards.
Rank t belongs to group ``t % g`` and head shard ``t // g``; it computes ``H * g / T`` heads on its
group's slice of the latent. The replicated rotary key travels beside every slice.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from sglang_tpla.errors import SglangTplaError


class ConfigError(SglangTplaError, ValueError):
    """A setting that cannot work; the message says what was expected, what came, where, and what to do."""


@dataclass(frozen=True)
class Layout:
    """The division of the latent and the query heads among T attention tensor-parallel ranks.

    Args:
        tp_size: T, attention tensor-parallel ranks.
        groups: g, latent groups; divides T.
        heads: H, query heads of the whole model; T/g divides H.

    Raises:
        ConfigError: g does not divide T, or T/g does not divide H.
    """

    tp_size: int
    groups: int
    heads: int

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.groups < 1:
            raise ConfigError(
                f"--tpla-groups and --tp-size must be at least 1; got groups={self.groups}, tp_size={self.tp_size}"
            )
        if self.tp_size % self.groups:
            raise ConfigError(
                f"--tpla-groups must divide the attention tensor-parallel size: got groups={self.groups} with "
                f"tp_size={self.tp_size}; use one of {[g for g in range(1, self.tp_size + 1) if self.tp_size % g == 0]}"
            )
        if self.heads % self.head_shards:
            raise ConfigError(
                f"the model's {self.heads} query heads cannot be split over {self.head_shards} head "
                f"shards (tp_size={self.tp_size} / groups={self.groups}); choose groups so that "
                f"tp_size/groups divides {self.heads}"
            )

    @property
    def head_shards(self) -> int:
        """The number of head shards, T/g."""
        return self.tp_size // self.groups

    @property
    def local_heads(self) -> int:
        """The query heads that one rank computes, H*g/T."""
        return self.heads // self.head_shards

    def group_of(self, rank: int) -> int:
        """Return the latent group of a rank."""
        return rank % self.groups

    def head_shard_of(self, rank: int) -> int:
        """Return the head shard of a rank."""
        return rank // self.groups


def slice_width(latent_dim: int, groups: int, shared_dims: int) -> int:
    """Return the latent values that one rank keeps of a token and layer: w = r + ceil((d - r) / g)."""
    return shared_dims + -(-(latent_dim - shared_dims) // groups)


ENV_PREFIX = "SGLANG_TPLA_"
SERVER_VARIABLE = ENV_PREFIX + "SERVER"  # a server sets it for its own processes, see host/process.py
CACHE_VARIABLE = ENV_PREFIX + "CACHE"  # the folder of compiled kernels and of the environment
UNCHECKED_VARIABLE = ENV_PREFIX + "ALLOW_UNKNOWN_HOST"
CPU_MEMORY_VARIABLE = ENV_PREFIX + "CPU_MEMORY_BYTES"
# All variables that are not settings; docs/launcher.md explains them.
OTHER_VARIABLES = (SERVER_VARIABLE, CACHE_VARIABLE, UNCHECKED_VARIABLE, CPU_MEMORY_VARIABLE)
OF_TESTS = (ENV_PREFIX + "TEST_", ENV_PREFIX + "BENCH_")  # prefixes of the variables of tests and benchmarks
ROLES = ("prefill", "decode")
O_PROJ = ("replicate", "scatter")
ROWS = ("plain", "sketched")
RETIRED = ("fp8", "fp8_triton", "fp8_reference")  # names of a row format of older versions, and of its kernels
EVERY_TOKENS = 8192  # prefilled tokens between two writes of statistics
# Bytes of a chunk and of staging. A chunk of any size costs some 0.2 ms for messages (on a GPU also for launches).
DEFAULT_BYTES = {"cpu": (16 << 20, 256 << 20), "cuda": (16 << 20, 512 << 20)}


def fp8_rows_retired(origin: str, instead: str) -> str:
    """Return the refusal of FP8 rows, which older versions had; ``origin`` says which setting asks for them."""
    return (
        f"{origin} asks for FP8 rows, which were retired: sketched rows hold 8-bit caches with a smaller error; "
        f"use {instead}"
    )


def check_rows(rows: str, origin: str) -> None:
    """Refuse a row format that servers do not know.

    Raises:
        ConfigError: naming the formats that servers know.
    """
    if rows in RETIRED:
        raise ConfigError(fp8_rows_retired(f"{origin} {rows}", "--tpla-rows sketched"))
    if rows not in ROWS:
        raise ConfigError(f"{origin} must be one of {', '.join(ROWS)}; got {rows!r}")


def not_retired(instead: str) -> Callable[[str], str]:
    """Return an argparse type that refuses the names of FP8 rows and of their kernels, and says what to use instead."""

    def known(text: str) -> str:
        if text in RETIRED:
            raise argparse.ArgumentTypeError(fp8_rows_retired(text, instead))
        return text

    return known


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", suffix: str = "") -> str:
    """Return a hint at the nearest known name, between ``prefix`` and ``suffix``, or a full stop if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}{suffix}?" if near else "."


def check_variables(names: Iterable[str], origin: str) -> None:
    """Refuse variables with our prefix that nothing reads, with the nearest one that is read.

    Raises:
        ConfigError: naming the variable.
    """
    known = [*Settings.variables(), *OTHER_VARIABLES]
    for name in names:
        if name.startswith(ENV_PREFIX) and name not in known and not name.startswith(OF_TESTS):
            # Compare without the prefix, which all names share.
            hint = did_you_mean(name.removeprefix(ENV_PREFIX), [k.removeprefix(ENV_PREFIX) for k in known], ENV_PREFIX)
            raise ConfigError(f"{origin}: there is no {name}{hint} Unset it, or take one of {', '.join(known)}")


def parsed(text: str, kind: str, origin: str) -> Any:
    """Return a setting's value, of the type that its field names; the error names ``origin``, the text's place."""
    try:
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError as error:
        raise ConfigError(f"{origin} must be of type {kind}; got {text!r}") from error


def without_brackets(host: str) -> str:
    """Return an IPv6 address without the brackets of a URL, and other hosts unchanged."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_host(text: str) -> bool:
    """Return whether a text is an IP address, or may be a host name: neither a URL nor a name with a port."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return re.search(r"[:/*\s]|^$", text) is None
    return True


@dataclass(frozen=True)
class Settings:
    """The settings that the launcher passes to every process of a server through its environment.

    The engine spawns its schedulers as new processes; the environment is the one channel that reaches
    them all before any plug-in code runs. A process without ``SGLANG_TPLA_ROLE`` is stock SGLang.

    Args:
        role: ``prefill`` (stock model, our transfer agent) or ``decode`` (TPLA layers and our agent).
        groups: g, latent groups; 1 is plain MLA.
        artifact: path of the calibration artifact; needed when ``groups`` > 1.
        rows: ``sketched`` caches 8-bit columns and a sketch of the other groups' (`cache_rows.sketched`), ``plain``
            values of the cache's dtype. An artifact says which by itself; without one, ``sketched`` is plain MLA with
            an 8-bit cache.
        o_proj: ``replicate`` holds the output projection of a rank's heads, g times plain TP's; ``scatter`` sums the
            groups' head outputs first (a reduce-scatter a layer) and holds it once.
        chunk_bytes: largest payload of one frame; 0 takes 16 MiB.
        staging_bytes: ceiling of the staging memory of one rank; 0 takes 256 MiB, on a GPU 512 MiB.
        heartbeat_s: seconds between heartbeats on an idle connection.
        peer_timeout_s: seconds without a sign of life after which a peer is given up.
        transfer_timeout_s: seconds a request may wait for its cache before it fails.
        room_timeout_s: seconds a prefill server waits for a sign that some decode server knows of a request.
        keys: folder of CURVE keys made by ``python -m sglang_tpla.transfer.keys``; needed beyond loopback.
        insecure: 1 allows transfers without keys on any address, for a network that nobody else can reach.
        shared_memory: 0 sends every payload through sockets, also to ranks of the same machine.
        listen_port: port of the first prefill rank of this machine's transfers, its data channels come to the one
            after it, and each further rank takes the next two; 0 takes ports that the system chooses.
        advertise: HOST or HOST:PORT under which decode servers reach the first prefill rank, where that is not the
            address it listens on (containers, address translation); ports are counted as from ``listen_port``.
        statistics_folder: where a prefill server keeps second moments of its traffic for ``calibrate --from-stats``;
            None collects nothing.
        statistics_every_tokens: prefilled tokens between two writes of them.

    Raises:
        ConfigError: a value out of range, or no artifact with ``groups`` > 1.
    """

    role: str
    groups: int = 1
    artifact: str | None = None
    rows: str | None = None
    o_proj: str = "replicate"
    chunk_bytes: int = 0
    staging_bytes: int = 0
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 10.0
    transfer_timeout_s: float = 120.0
    room_timeout_s: float = 15.0
    keys: str | None = None
    insecure: int = 0
    shared_memory: int = 1
    listen_port: int = 0
    advertise: str | None = None
    statistics_folder: str | None = None
    statistics_every_tokens: int = EVERY_TOKENS

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role must be one of {ROLES}; got {self.role!r}")
        if self.groups < 1:
            raise ConfigError(f"--tpla-groups must be at least 1; got {self.groups}")
        if self.role == "prefill" and (self.groups > 1 or self.artifact or self.rows):
            raise ConfigError(
                "a prefill server is stock MLA and takes neither --tpla-groups, --tpla-artifact nor --tpla-rows: "
                "decode servers hand over their projection when they register; drop the flag"
            )
        if self.groups > 1 and not self.artifact:
            raise ConfigError(
                f"--tpla-groups {self.groups} needs --tpla-artifact; make one with `python -m sglang_tpla.calibrate "
                f"--model-path MODEL --groups {self.groups} --rows sketched --out FILE`"
            )
        if self.rows is not None:
            check_rows(self.rows, "--tpla-rows")
        if self.o_proj not in O_PROJ:
            raise ConfigError(f"--tpla-o-proj must be one of {', '.join(O_PROJ)}; got {self.o_proj!r}")
        if self.o_proj == "scatter" and self.groups == 1:
            raise ConfigError("--tpla-o-proj scatter sums over latent groups, and --tpla-groups is 1; drop it")
        if self.insecure not in (0, 1):
            raise ConfigError(f"--tpla-insecure must be 0 or 1; got {self.insecure}")
        if self.role == "decode" and (self.statistics_folder or self.statistics_every_tokens != EVERY_TOKENS):
            raise ConfigError(
                "--tpla-statistics-folder and --tpla-statistics-every-tokens are for prefill servers, which see the "
                "whole latent; drop them on decode"
            )
        if self.shared_memory not in (0, 1):
            raise ConfigError(f"--tpla-shared-memory must be 0 or 1; got {self.shared_memory}")
        if not 0 <= self.listen_port < 65535:
            raise ConfigError(f"--tpla-listen-port must lie in 0...65534; got {self.listen_port}")
        if self.role == "decode" and (self.listen_port or self.advertise):
            raise ConfigError(
                "--tpla-listen-port and --tpla-advertise are for prefill servers, which decode servers connect to; "
                "drop them on decode"
            )
        if self.advertise is not None:
            self.advertised(0, ("", 0))
        if self.statistics_every_tokens < 1:
            raise ConfigError(f"--tpla-statistics-every-tokens must be at least 1; got {self.statistics_every_tokens}")
        for device in DEFAULT_BYTES:
            chunk_bytes, staging_bytes = self._sizes(device)
            if not 4096 <= chunk_bytes <= staging_bytes:
                raise ConfigError(
                    f"--tpla-chunk-bytes must lie between 4096 and --tpla-staging-bytes, {staging_bytes}; got "
                    f"{chunk_bytes}"
                )
        for name in ("heartbeat_s", "peer_timeout_s", "transfer_timeout_s", "room_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                flag = f"--tpla-{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be positive and finite; got {getattr(self, name)}")
        if self.room_timeout_s <= 2 * self.heartbeat_s:
            raise ConfigError(
                f"--tpla-room-timeout-s must exceed two heartbeats of --tpla-heartbeat-s, {self.heartbeat_s}, in which "
                f"decode servers name the requests that wait there; got {self.room_timeout_s}"
            )
        if self.peer_timeout_s <= self.heartbeat_s:
            raise ConfigError(
                f"--tpla-peer-timeout-s must exceed --tpla-heartbeat-s, {self.heartbeat_s}; got {self.peer_timeout_s}"
            )

    def _sizes(self, device: str) -> tuple[int, int]:
        chunk_bytes, staging_bytes = DEFAULT_BYTES[device]
        staging_bytes = self.staging_bytes or max(staging_bytes, 2 * self.chunk_bytes)
        return self.chunk_bytes or min(chunk_bytes, staging_bytes), staging_bytes

    def on(self, device: str) -> Settings:
        """Fill in the sizes that depend on the kind of device ("cpu", "cuda") of the cache."""
        chunk_bytes, staging_bytes = self._sizes(device)
        return replace(self, chunk_bytes=chunk_bytes, staging_bytes=staging_bytes)

    def advertised(self, rank: int, own: tuple[str, int]) -> tuple[str, int]:
        """Return the host and port that decode servers get for a prefill rank that listens on ``own``.

        The rank's data channels come to the next port.

        Raises:
            ConfigError: ``advertise`` is neither HOST nor HOST:PORT.
        """
        if self.advertise is None:
            return own
        host, colon, port = self.advertise.rpartition(":")
        if not colon or self.advertise.endswith("]") or (host.count(":") and not host.startswith("[")):
            host, port = self.advertise, ""
        host = without_brackets(host)
        if not is_host(host) or (port and not (port.isdecimal() and 0 < int(port) + 2 * rank + 1 < 65536)):
            raise ConfigError(
                f"--tpla-advertise must be HOST or HOST:PORT, an IPv6 address with a port in brackets; got "
                f"{self.advertise!r}"
            )
        return host, int(port) + 2 * rank if port else own[1]

    @classmethod
    def variables(cls) -> dict[str, Field[Any]]:
        """Return the fields by the names of their variables."""
        return {ENV_PREFIX + entry.name.upper(): entry for entry in fields(cls)}

    def to_environment(self) -> dict[str, str]:
        """Return the variables that `from_environment` reads back."""
        values = {variable: getattr(self, entry.name) for variable, entry in self.variables().items()}
        return {variable: str(value) for variable, value in values.items() if value is not None}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings | None:
        """Return the settings of this process, or None where it is stock SGLang.

        Raises:
            ConfigError: an unreadable or invalid value, or a variable with our prefix that does not exist.
        """
        check_variables(environ, "environment")
        if ENV_PREFIX + "ROLE" not in environ:
            return None
        given = {name: field for name, field in cls.variables().items() if name in environ}
        return cls(**{field.name: parsed(environ[name], str(field.type), name) for name, field in given.items()})
