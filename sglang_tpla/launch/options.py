"""The launcher's own options, each from the first source that has it: command line, file, environment, default.

The ``--tpla-*`` flags are the fields of `sglang_tpla.config.Settings`, so a new setting is one line there. A mistake
raises `ConfigError`, which names the value's origin.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from sglang_tpla.config import ENV_PREFIX, ConfigError, Settings, check_rows, check_variables, did_you_mean, parsed
from sglang_tpla.launch.flags import (
    ROLE_SECTIONS,
    Argument,
    for_section,
    from_mapping,
    layered,
    outside_sections,
    split_tokens,
    to_tokens,
)
from sglang_tpla.launch.options_file import (
    OWN_PREFIX,
    SETTING_FIELDS,
    FileSource,
    check_own_names,
    check_section_name,
    check_text,
    read_file,
)

ROLES = ("prefill", "decode", "router", "all")
ADDRESS = ("host", "port")
DEFAULT_STARTUP_TIMEOUT_S = 1800.0
# For each role the other role's settings: the sharing of the latent by decode ranks, and a prefill server's statistics
# and addresses.
OF_THE_OTHER_ROLE = {
    "prefill": ("groups", "artifact", "rows", "o_proj"),
    "decode": ("statistics_folder", "statistics_every_tokens", "listen_port", "advertise"),
}


@dataclass(frozen=True)
class Options:
    """The command line and the file, read but not yet resolved for a role.

    Args:
        role: ``prefill``, ``decode``, ``router`` or ``all``.
        dry_run: print the commands and start nothing.
        log_dir: folder of the servers' logs under ``all``; None is a temporary folder.
        startup_timeout_s: time within which ``all`` expects its servers to be healthy.
        command_line: all flags but these four.
        file: the configuration file.
        environ: the environment of the launcher.
    """

    role: str
    dry_run: bool
    log_dir: str | None
    startup_timeout_s: float
    command_line: list[Argument]
    file: FileSource
    environ: Mapping[str, str]

    def engine_arguments(self, section: str) -> list[Argument]:
        """Return the flags for SGLang or its router in one role, without the launcher's own; command line over file.

        Under ``all``, clients see the router: host and port outside the sections belong to the router, and all other
        flags outside the sections belong to the two servers.
        """
        common_file = from_mapping(self.file.keys_for(section), self.file.path)
        common = outside_sections(self.command_line)
        if self.role == "all":
            own_keys = self.file.sections.get(section, {})
            is_router = section == "router"
            shared = from_mapping({k: v for k, v in self.file.common.items() if k in ADDRESS}, self.file.path)
            common_file = [a for a in common_file if a.name not in ADDRESS or a.name in own_keys]
            common_file = layered(shared, common_file) if is_router else common_file
            common = [argument for argument in common if (argument.name in ADDRESS) == is_router]
        merged = layered(common_file, common, for_section(self.command_line, section))
        return [argument for argument in merged if not argument.name.startswith(OWN_PREFIX)]

    def file_environment(self, section: str) -> dict[str, str]:
        """Return the variables that the file sets for a role, the role's section first, unless the shell sets them."""
        scopes = (self.file.common, self.file.sections.get(section, {}))
        return {
            name: str(value)
            for scope in scopes
            for name, value in (scope.get("environment") or {}).items()
            if name not in self.environ
        }

    def settings(self, role: str) -> Settings:
        chosen: dict[str, Any] = {}
        file_keys = self.file.keys_for(role)
        section_keys = self.file.sections.get(role, {})
        common = {argument.name: argument for argument in outside_sections(self.command_line)}
        dotted = {argument.name: argument for argument in for_section(self.command_line, role)}
        for flag, entry in SETTING_FIELDS.items():
            variable = ENV_PREFIX + entry.name.upper()
            # A value for the whole trio, or one left in the shell, is meant for the other server alone.
            elsewhere = entry.name in OF_THE_OTHER_ROLE[role]
            if flag in dotted:
                found, origin = dotted[flag].value, f"--{role}.{flag}"
            elif flag in common and not (elsewhere and self.role == "all"):
                found, origin = common[flag].value, f"--{flag}"
            elif flag in file_keys and not (elsewhere and self.role == "all" and flag not in section_keys):
                found, origin = file_keys[flag], f"{flag} in {self.file.path}"
            elif variable in self.environ and not elsewhere:
                found, origin = self.environ[variable], variable
            else:
                continue
            chosen[entry.name] = convert(found, str(entry.type), origin)
            if entry.name == "rows":
                check_rows(chosen["rows"], origin)
        return Settings(role=role, **chosen)


def convert(value: Any, kind: str, origin: str) -> Any:
    if value is None or isinstance(value, (list, dict, bool)):
        raise ConfigError(f"{origin} needs one value of type {kind.removesuffix(' | None')}; got {value!r}")
    return parsed(str(value), kind, origin)


def check_command_line(arguments: Sequence[Argument]) -> None:
    """Refuse flags that must be mistakes, before any flag is passed on."""
    check_own_names([argument.name.rpartition(".")[2] for argument in arguments], "command line")
    for argument in arguments:
        for token in argument.tokens:
            check_text(token, f"--{argument.name}")
        section, dot, name = argument.name.partition(".")
        if dot and section in ROLE_SECTIONS:
            check_section_name(name, section, argument.tokens[0].split("=", 1)[0])
        elif dot:  # SGLang has no such flags
            hint = did_you_mean(section, ROLE_SECTIONS, "--", f".{name}")
            known = ", ".join(f"--{known}.FLAG" for known in ROLE_SECTIONS)
            raise ConfigError(f"command line: there is no --{argument.name}{hint} The flags of one role are {known}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    """Return the launcher's own command line, for its checks and its help."""
    result = _Parser(
        prog="python -m sglang_tpla.launch",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Start a prefill server, a TPLA decode server, the router, or all three.",
        epilog=(
            "Every other flag goes to sglang.launch_server or sglang_router.launch_router unchanged; their\n"
            "own --help lists them. With --role all, --prefill.FLAG, --decode.FLAG and --router.FLAG reach\n"
            "one of the three, --host and --port are the router's, and everything else is both servers'.\n"
            "Order of precedence: command line, --config, environment (SGLANG_TPLA_*), default."
        ),
    )
    result.add_argument("--role", choices=ROLES, help="what to start; may also stand in the file")
    result.add_argument("--config", metavar="FILE.yaml", help="flags by name, with sections per role")
    result.add_argument("--dry-run", action="store_true", help="print environment and command, start nothing")
    result.add_argument(
        "--startup-timeout-s",
        type=float,
        help=f"--role all: wait this long for health ({DEFAULT_STARTUP_TIMEOUT_S:.0f})",
    )
    result.add_argument("--log-dir", help="--role all: keep the servers' logs here; otherwise the router's own flag")
    group = result.add_argument_group("settings", "see sglang_tpla.config.Settings")
    for flag, entry in SETTING_FIELDS.items():
        default = "" if entry.default in (None, MISSING) else f" (default {entry.default})"
        kind = str(entry.type).removesuffix(" | None")
        group.add_argument("--" + flag, metavar=kind.upper(), help=documented(entry.name) + default)
    return result


def documented(name: str) -> str:
    """Return the settings' own documentation of a field."""
    found = re.search(rf"^\s+{name}: (.+(?:\n {{12}}.+)*)", Settings.__doc__ or "", re.MULTILINE)
    return " ".join(found[1].replace("``", "").rstrip(".").split()).replace("%", "%%") if found else name


def read(tokens: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Read the command line and the file that it names.

    Raises:
        ConfigError: a mistake in either.
        SystemExit: ``--help``.
    """
    check_variables(environ, "environment")
    arguments = split_tokens(tokens)
    check_command_line(arguments)
    # --log-dir is also a flag of the router, and belongs to the launcher only under "all".
    ours = ("role", "config", "dry-run", "startup-timeout-s", "help", "h")
    own = parser().parse_args(to_tokens([a for a in arguments if a.name in ours]))
    file = read_file(own.config) if own.config else FileSource()
    role = own.role or file.common.get("role") or environ.get(ENV_PREFIX + "ROLE")
    if role not in ROLES:
        raise ConfigError(f"--role must be one of {', '.join(ROLES)}; got {'nothing' if role is None else repr(role)}")
    rest = [argument for argument in arguments if argument.name not in ours]
    log_dir = None
    if role == "all":
        log_dir = next((convert(a.value, "str", "--log-dir") for a in rest if a.name == "log-dir"), None)
        if log_dir is None and (named := file.common.get("log-dir")):
            log_dir = convert(named, "str", f"log-dir in {file.path}")
        rest = [argument for argument in rest if argument.name != "log-dir"]
    return Options(
        role=role,
        dry_run=own.dry_run,
        log_dir=log_dir,
        startup_timeout_s=_startup_timeout_s(own.startup_timeout_s, file),
        command_line=rest,
        file=file,
        environ=environ,
    )


def _startup_timeout_s(given: float | None, file: FileSource) -> float:
    value, origin = given, "--startup-timeout-s"
    if given is None:
        value, origin = (
            file.common.get("startup-timeout-s", DEFAULT_STARTUP_TIMEOUT_S),
            f"startup-timeout-s in {file.path}",
        )
    found: float = convert(value, "float", origin)
    if not 0 < found < math.inf:
        raise ConfigError(f"{origin} must be positive and finite; got {found}")
    return found
