"""The launcher's configuration file: YAML with the launcher's keys and SGLang's flags by name.

The flags of one role are under ``prefill:``, ``decode:`` or ``router:``. ``environment:`` sets variables that the shell
does not set. A mistake raises `ConfigError`, which names the file and the key.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sglang_tpla.config import SERVER_VARIABLE, ConfigError, Settings, check_variables, did_you_mean
from sglang_tpla.launch.flags import REPEATED, ROLE_SECTIONS, canonical

OWN_PREFIX = "tpla-"
# The launcher's own keys are at the top of a file; a section may also have its own environment.
LAUNCHER_KEYS = ("role", "log-dir", "startup-timeout-s", "environment")
MAPPINGS = (*ROLE_SECTIONS, "environment")
# SGLang would read flags from the file that its own --config names, and no check here would see them.
COMMAND_LINE_ONLY = ("config", "dry-run", "help", "h")
SETTING_FIELDS = {
    OWN_PREFIX + entry.name.replace("_", "-"): entry for entry in fields(Settings) if entry.name != "role"
}
# The launcher sets these variables for its servers, and would ignore the file's environment.
VARIABLES_OF_SETTINGS = {
    variable: ("" if entry.name == "role" else OWN_PREFIX) + entry.name.replace("_", "-")
    for variable, entry in Settings.variables().items()
}
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
EXPONENT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")
FLAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class FileSource:
    """The contents of a configuration file.

    Args:
        path: the file, for messages.
        common: keys outside the sections.
        sections: keys of each role.
    """

    path: str = ""
    common: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def keys_for(self, section: str) -> dict[str, Any]:
        """Return a role's flags: its section over the common keys; beside sections, a router has only its own flags."""
        common = {} if section == "router" and self.sections else self.common
        merged = {**common, **self.sections.get(section, {})}
        return {name: value for name, value in merged.items() if name not in LAUNCHER_KEYS}


class _Written:
    """A number that is passed on as it was written.

    YAML reads 0612 as 394, 10:30 as 630 and 1_0 as 10; and 1.10 may be a name or a key, which is not 1.1.
    """

    text = ""

    def __str__(self) -> str:
        return self.text


class _Int(_Written, int):
    pass


class _Float(_Written, float):
    pass


def _as_text(node: yaml.Node) -> yaml.Node:
    """Return the node of a variable, in which true, yes and off remain text instead of becoming True and False."""
    if not node.tag.endswith(":bool"):
        return node
    return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a repeated key, of which the last would win silently.

    A number or a date that becomes a flag or a variable remains the text that it was, and so does a variable's true or
    false; inside JSON a number is a number.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in yaml's own classes)
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> _Int:
        result = _Int(super().construct_yaml_int(node))
        result.text = str(node.value)
        return result

    def construct_yaml_float(self, node: yaml.ScalarNode) -> _Float:
        result = _Float(super().construct_yaml_float(node))
        result.text = str(node.value)
        return result

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
                )
            seen.add(str(key.value))
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        return super().construct_document(self._with_text_variables(node, ROLE_SECTIONS))

    def _with_text_variables(self, scope: yaml.Node, sections: tuple[str, ...] = ()) -> yaml.Node:
        """Return a mapping of flags whose ``environment``, and that of its sections, holds text.

        The nodes are copies, since an anchor may give the same mapping to a flag, and its JSON needs a real true.
        """
        if not isinstance(scope, yaml.MappingNode):
            return scope
        self.flatten_mapping(scope)  # keys that << merges are variables as well
        pairs = []
        for key, value in scope.value:
            if key.value in sections:
                value = self._with_text_variables(value)
            elif key.value == "environment" and isinstance(value, yaml.MappingNode):
                self.flatten_mapping(value)
                texts = [(name, _as_text(variable)) for name, variable in value.value]
                value = yaml.MappingNode(value.tag, texts, value.start_mark, value.end_mark)
            pairs.append((key, value))
        return yaml.MappingNode(scope.tag, pairs, scope.start_mark, scope.end_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
# To YAML 1.1, and so to PyYAML, 1e6 is text, which JSON would then quote.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_file(path: str) -> FileSource:
    origin = f"--config {path}"
    try:
        loaded = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: expected flags by name; got values nested too deeply") from error
    # a tag that does not fit its value, such as !!timestamp x, raises one of the last two
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ConfigError(f"{origin}: expected YAML; {' '.join(str(error).split())}") from error
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{origin}: expected a mapping of flags at the top; got {type(loaded).__name__}")
    check_value(loaded, origin)
    sections = {
        name: _checked_keys(value, path, name)
        for name, value in loaded.items()
        if name in ROLE_SECTIONS and isinstance(value, dict)
    }
    common = {name: value for name, value in loaded.items() if name not in sections}
    for name, value in common.items():
        # A flag of SGLang may have a mapping, too, but none has nearly the name of a section.
        hint = did_you_mean(str(name), MAPPINGS, suffix=":")
        if isinstance(value, dict) and name not in MAPPINGS and hint != ".":
            raise ConfigError(f"{origin}: there is no section {name}{hint} The sections are {', '.join(MAPPINGS)}")
    return FileSource(path, _checked_keys(common, path), sections)


def check_value(value: Any, origin: str, around: tuple[int, ...] = ()) -> None:
    """Refuse values that no command line or environment holds; ``around``: ids of the lists and mappings around it."""
    if id(value) in around:
        raise ConfigError(f"{origin}: expected a value; got one that contains itself (a YAML anchor in its own value)")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_value(key, origin, (*around, id(value)))
            check_value(inner, f"{origin}: {key}" if not around else origin, (*around, id(value)))
    elif isinstance(value, list):
        for inner in value:
            check_value(inner, origin, (*around, id(value)))
    elif isinstance(value, str):
        check_text(value, origin)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ConfigError(f"{origin}: expected text, a number, a list or a mapping; got a {type(value).__name__}")


def check_text(text: str, origin: str) -> None:
    """Refuse text that the system accepts neither in a command nor in a variable."""
    try:
        good = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        good = False
    if not good:
        raise ConfigError(f"{origin}: expected text without NUL bytes and half characters; got {text!r}")


def check_own_names(names: Iterable[str], origin: str) -> None:
    """Refuse ``tpla-`` names that do not exist, with the nearest one that does."""
    for name in names:
        if name.startswith(OWN_PREFIX) and name not in SETTING_FIELDS:
            hint = did_you_mean(name, SETTING_FIELDS, "--")
            known = ", ".join("--" + known for known in SETTING_FIELDS)
            raise ConfigError(f"{origin}: there is no --{name}{hint} The settings are {known}")


def check_section_name(name: str, section: str, origin: str, *, is_mapping: bool = False) -> None:
    """Refuse names that are not flags of one role: other sections, and keys that are given once for all roles."""
    head = name.partition(".")[0]
    if head in ROLE_SECTIONS and (section != "router" or head not in REPEATED or head != name or is_mapping):
        raise ConfigError(f"{origin}: {name} stands inside {section}; sections hold flags, not other sections")
    once = name in COMMAND_LINE_ONLY or (name in LAUNCHER_KEYS and name not in ("environment", "log-dir"))
    if once:
        raise ConfigError(f"{origin}: {name} is the launcher's own and is given once, outside {section}")
    if not FLAG_NAME.fullmatch(name):
        raise ConfigError(f"{origin}: expected a flag's name after {section}, as in --{section}.tp-size; got {name!r}")


def _checked_keys(values: dict[Any, Any], path: str, section: str = "") -> dict[str, Any]:
    """Return the mapping with its keys in one spelling."""
    origin = f"--config {path}"
    result: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in values.items():
        if not isinstance(key, str) or not FLAG_NAME.fullmatch(key):
            raise ConfigError(f"{origin}: expected flag names as keys, such as tp-size; got {key!r}")
        name = canonical(key)
        if name in result:
            raise ConfigError(f"{origin}: {spelled[name]} and {key} are one flag; give it once")
        if section:
            check_section_name(name, section, origin, is_mapping=isinstance(value, dict))
        elif name in COMMAND_LINE_ONLY:
            raise ConfigError(f"{origin}: {key} is of the command line alone; give --{name} there")
        result[name], spelled[name] = value, key
    _check_environment(result.get("environment"), origin)
    check_own_names(result, origin)
    return result


def _check_environment(variables: Any, origin: str) -> None:
    if variables is not None and not isinstance(variables, dict):
        raise ConfigError(f"{origin}: environment must be a mapping of variables to values")
    for name, value in (variables or {}).items():
        if not isinstance(name, str) or not VARIABLE.fullmatch(name):
            raise ConfigError(f"{origin}: environment: expected a variable's name, such as NCCL_DEBUG; got {name!r}")
        if value is None or isinstance(value, (list, dict)):
            raise ConfigError(f'{origin}: environment: {name} needs one value ("" for an empty one); got {value!r}')
        if name in VARIABLES_OF_SETTINGS:
            flag = VARIABLES_OF_SETTINGS[name]
            raise ConfigError(f"{origin}: environment: {name} is a setting; give it as a key of the file, {flag}")
        if name == SERVER_VARIABLE:
            raise ConfigError(f"{origin}: environment: {name} is named by each server for its own processes; drop it")
    check_variables(variables or {}, f"{origin}: environment")
