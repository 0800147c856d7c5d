"""Turn options into processes: the command and the environment of every role."""

import errno
import importlib.metadata
import importlib.util
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_tpla.config import SERVER_VARIABLE, ConfigError, Layout, Settings, without_brackets
from sglang_tpla.launch import cpu
from sglang_tpla.launch.agreement import (
    check_alike,
    check_distinct,
    check_first_port,
    check_hosts,
    check_ports,
    check_settings_alike,
    for_router,
    for_server,
    router_key,
    transfer_ports,
)
from sglang_tpla.launch.flags import Argument, from_mapping, has, integer, split_tokens, to_tokens, value_of
from sglang_tpla.launch.options import Options
from sglang_tpla.reference_model.config_file import CheckpointError, read_config, whole

TRANSFER_BACKEND = "tpla"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000
DEFAULT_BOOTSTRAP_PORT = 8998
DEFAULT_GUESSES = 3  # SGLang's default for these models
MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "sglang_tpla"


@dataclass(frozen=True)
class Process:
    """One process to start.

    Args:
        role: ``prefill``, ``decode`` or ``router``.
        command: program and arguments.
        environment: variables to set; those with None are removed.
        url: address of its HTTP server.
    """

    role: str
    command: tuple[str, ...]
    environment: dict[str, str | None]
    url: str

    def full_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return `environ` with this process's changes."""
        return {name: value for name, value in {**environ, **self.environment}.items() if value is not None}

    def shell(self) -> str:
        """Return the command to paste into a shell, one flag a line."""
        removed = [f"-u {name}" for name, value in sorted(self.environment.items()) if value is None]
        added = [
            f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items()) if value is not None
        ]
        head = shlex.join(self.command[:3])
        flags = [shlex.join(argument.tokens) for argument in split_tokens(self.command[3:])]
        return " \\\n  ".join((["env", *removed, *added] if removed or added else []) + [head, *flags])


def plan(options: Options) -> list[Process]:
    """Return the processes of a role, checked as far as is possible before they start."""
    if options.role == "all":
        return _plan_all(options)
    if options.role == "router":
        return [_router(options.engine_arguments("router"), options)]
    return [_server(options.role, options.engine_arguments(options.role), options)]


def _plan_all(options: Options) -> list[Process]:
    """Plan prefill, decode and router on this machine, with ports counted up from the router's."""
    router = _with_defaults(options.engine_arguments("router"), host=DEFAULT_HOST, port=DEFAULT_PORT)
    port = integer(router, "port", DEFAULT_PORT)
    check_first_port(port)
    router = _with_defaults(router, prometheus_port=port + 4)
    prefill = _with_defaults(
        options.engine_arguments("prefill"), host=DEFAULT_HOST, port=port + 1, disaggregation_bootstrap_port=port + 3
    )
    decode = _with_defaults(options.engine_arguments("decode"), host=DEFAULT_HOST, port=port + 2)
    if name := next((n for n in ("ssl-certfile", "ssl-keyfile") if has(prefill, n) or has(decode, n)), None):
        raise ConfigError(
            f"--{name} does not go with --role all, whose servers talk to the router on this machine; to serve clients "
            "with TLS give the router --router.tls-cert-path and --router.tls-key-path"
        )
    servers = [_server("prefill", prefill, options), _server("decode", decode, options)]
    check_alike(prefill, decode)
    check_settings_alike(options.settings("prefill"), options.settings("decode"))
    check_distinct(
        {
            "the router": port,
            "its metrics": integer(router, "prometheus-port", 0),
            "the prefill server": integer(prefill, "port", 0),
            "the decode server": integer(decode, "port", 0),
            "the bootstrap server": integer(prefill, "disaggregation-bootstrap-port", 0),
            **transfer_ports(options.settings("prefill"), prefill),
        }
    )
    bootstrap = value_of(prefill, "disaggregation-bootstrap-port") or ""
    router += split_tokens(router_key(router, value_of(prefill, "api-key")))
    router += split_tokens(["--prefill", servers[0].url, bootstrap, "--decode", servers[1].url])
    return [*servers, _router(router, options)]


def _with_defaults(arguments: list[Argument], **defaults: object) -> list[Argument]:
    """Return the arguments, and those of `defaults` (flags with ``_`` for ``-``) that they lack."""
    missing = {name: value for name, value in defaults.items() if not has(arguments, name.replace("_", "-"))}
    return arguments + from_mapping(missing, "default")


def _server(role: str, arguments: list[Argument], options: Options) -> Process:
    settings = options.settings(role)
    check_hosts(role, arguments)
    check_ports(role, arguments)
    arguments = for_server(arguments)
    if role == "prefill":
        bootstrap = integer(arguments, "disaggregation-bootstrap-port", DEFAULT_BOOTSTRAP_PORT)
        port = integer(arguments, "port", DEFAULT_PORT)
        ports = {"the prefill server": port, "its bootstrap server": bootstrap}
        check_distinct(ports | transfer_ports(settings, arguments))
    if not value_of(arguments, "model-path"):
        raise ConfigError(f"a {role} server needs --model-path MODEL (a folder or a model's name)")
    if role == "decode":
        _check_layout(settings, arguments)
        _check_artifact(settings, arguments)
    for name, value in (("disaggregation-mode", role), ("disaggregation-transfer-backend", TRANSFER_BACKEND)):
        given = value_of(arguments, name)
        if given is None:
            arguments = [*arguments, *split_tokens([f"--{name}", value])]
        elif given != value:
            raise ConfigError(
                f"--role {role} means --{name} {value}; got --{name} {given}: drop that flag, or start stock "
                "SGLang with `python -m sglang.launch_server`"
            )
    arguments = _with_speculation(role, arguments)
    variables = {*Settings.variables(), SERVER_VARIABLE}
    # A variable that the shell still holds for another role must not reach this one.
    environment: dict[str, str | None] = dict.fromkeys(variables.intersection(options.environ))
    environment |= options.file_environment(role)
    environment |= settings.to_environment()
    if value_of(arguments, "device") == "cpu":
        known = {**options.environ, **options.file_environment(role)}
        environment |= cpu.environment(integer(arguments, "tp-size", 1), known)
    command = (sys.executable, "-m", "sglang.launch_server", *to_tokens(arguments))
    return Process(role, command, environment, _url(arguments))


def _with_speculation(role: str, arguments: list[Argument]) -> list[Argument]:
    """Add the flags that ``--speculative-algorithm`` implies: chains of guesses, verified by decode's own kernels.

    SGLang takes the numbers of guesses, of branches and of verified tokens only together, and in a chain any of them
    decides the others.
    """
    if not has(arguments, "speculative-algorithm"):
        return arguments
    numbers = ("speculative-num-steps", "speculative-num-draft-tokens", "speculative-eagle-topk")
    if any(has(arguments, name) for name in numbers):
        verified = integer(arguments, "speculative-num-draft-tokens", DEFAULT_GUESSES + 1)
        steps = integer(arguments, "speculative-num-steps", verified - 1)
        arguments = _with_defaults(
            arguments, speculative_num_steps=steps, speculative_eagle_topk=1, speculative_num_draft_tokens=steps + 1
        )
    return _with_defaults(arguments, speculative_attention_mode="decode") if role == "decode" else arguments


def _router(arguments: list[Argument], options: Options) -> Process:
    settings = [argument.name for argument in options.command_line if argument.name.startswith("tpla-")]
    if options.role == "router" and settings:
        raise ConfigError(f"the router has no settings of its own; got --{settings[0]}: give it to the decode server")
    if not has(arguments, "service-discovery"):
        for name, example in (("prefill", "URL BOOTSTRAP_PORT"), ("decode", "URL")):
            if not has(arguments, name):
                raise ConfigError(f"the router needs --{name} {example}, once for every {name} server")
    check_hosts("router", arguments)
    check_ports("router", arguments)
    arguments = for_router(arguments)
    if not has(arguments, "pd-disaggregation"):
        arguments = [*split_tokens(["--pd-disaggregation"]), *arguments]
    command = (sys.executable, "-m", "sglang_router.launch_router", *to_tokens(arguments))
    return Process("router", command, dict(options.file_environment("router")), _url(arguments))


def _url(arguments: Sequence[Argument]) -> str:
    host = without_brackets(value_of(arguments, "host") or DEFAULT_HOST)
    host = {"0.0.0.0": DEFAULT_HOST, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{integer(arguments, 'port', DEFAULT_PORT)}"


def _check_layout(settings: Settings, arguments: Sequence[Argument]) -> None:
    """Refuse groups that do not divide the ranks, or whose head shards do not divide the heads.

    Attention groups must divide the ranks too.
    """
    tp_size = integer(arguments, "tp-size", 1)
    flag = "dp-size" if has(arguments, "enable-dp-attention") else "attn-dp-size"
    attention_groups = max(1, integer(arguments, flag, 1))
    if tp_size % attention_groups:
        raise ConfigError(f"--{flag} must divide --tp-size {tp_size}; got {attention_groups}")
    tp_size //= attention_groups
    model_config = Path(value_of(arguments, "model-path") or "") / "config.json"
    heads = tp_size  # without a config, a number that all head shards divide
    if model_config.is_file():
        try:
            heads = whole(read_config(model_config), "num_attention_heads", default=tp_size)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
    Layout(tp_size=tp_size, groups=settings.groups, heads=heads)


def _check_artifact(settings: Settings, arguments: Sequence[Argument]) -> None:
    """Refuse a missing artifact, with the command that makes one."""
    if not settings.artifact or (path := Path(settings.artifact)).is_file():
        return
    if path.is_dir():
        raise ConfigError(f"--tpla-artifact {path}: expected a file; got a folder: name the artifact in it")
    raise ConfigError(
        f"--tpla-artifact {path}: no such file; make one with `python -m sglang_tpla.calibrate "
        f"--model-path {value_of(arguments, 'model-path')} --groups {settings.groups} --out {path}`"
    )


def check_installation(environ: Mapping[str, str] = os.environ) -> None:
    """Check that the servers about to start will find SGLang and load this plug-in.

    SGLang would silently serve unpatched where a plug-in is missing or filtered out.
    """
    if importlib.util.find_spec("sglang") is None:
        raise ConfigError(f"{sys.executable} has no SGLang; run `make python` and use the interpreter that it prints")
    names = {entry.name for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN_NAME not in names:
        raise ConfigError(
            f"{sys.executable} does not show the plug-in {PLUGIN_NAME} to SGLang (entry points {PLUGIN_GROUP}: "
            f"{sorted(names)}); install this package there, or use the interpreter that `make python` prints"
        )
    allowed = environ.get("SGLANG_PLUGINS", "")
    if allowed and PLUGIN_NAME not in [name.strip() for name in allowed.split(",")]:
        raise ConfigError(f"SGLANG_PLUGINS={allowed} keeps SGLang from loading {PLUGIN_NAME}; add it or unset that")


def check_model_path(process: Process) -> None:
    """Refuse a model's path that is no folder and that the Hugging Face hub cannot know.

    SGLang would ask the hub for it, for a minute, and end with the hub's words about names.
    """
    path = value_of(split_tokens(process.command[3:]), "model-path") if process.role != "router" else None
    if path is None or Path(path).is_dir() or "://" in path:
        return
    if Path(path).exists() or not MODEL_NAME.fullmatch(path):
        raise ConfigError(
            f"{process.role}: --model-path {path}: expected the folder of a checkpoint, or a model's name such as "
            f"deepseek-ai/DeepSeek-V3; got {'a file' if Path(path).exists() else 'a path where nothing is'}"
        )


def check_log_dir(log_dir: str | None) -> None:
    """Make the folder of the servers' logs, and check that files can be written there."""
    if log_dir is None:
        return
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--log-dir {log_dir}: expected a folder, or a place to make one; {error.strerror}"
        ) from error
    if not os.access(log_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"--log-dir {log_dir}: expected a folder to write to; this user may not")


def check_free(process: Process) -> None:
    """Refuse ports at which another process listens.

    A server would notice only after it has loaded its weights, and ``--role all`` would take the other process for it.
    """
    arguments = split_tokens(process.command[3:])
    for name, host_name in (("port", "host"), ("prometheus-port", "prometheus-host")):
        if name != "port" and not has(arguments, name):
            continue
        host, port = value_of(arguments, host_name) or DEFAULT_HOST, integer(arguments, name, DEFAULT_PORT)
        try:
            family, _, _, _, address = socket.getaddrinfo(
                without_brackets(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            socket.create_server(address, family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # the server itself reports any other error
                raise ConfigError(
                    f"{process.role}: --{name} {port}: another process listens there already; end it, or choose "
                    "another port"
                ) from error
