"""Flags as lists of tokens: split by section, taken from a YAML mapping, and layered over one another.

The launcher passes unknown flags to ``sglang.launch_server`` or ``sglang_router.launch_router`` token by token, so that
all their flags work, also those of later releases. The launcher compares only names, in one spelling.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_tpla.config import ConfigError

# SGLang accepts several spellings of these flags; an alias must not survive beside the name.
ALIASES = {
    "tp": "tp-size",
    "tensor-parallel-size": "tp-size",
    "dp": "dp-size",
    "data-parallel-size": "dp-size",
    "pp": "pp-size",
    "pipeline-parallel-size": "pp-size",
    "model": "model-path",
}
# The router takes these flags once for every server.
REPEATED = ("prefill", "decode")
ROLE_SECTIONS = ("prefill", "decode", "router")


@dataclass(frozen=True)
class Argument:
    """One flag as given.

    Args:
        name: the flag in one spelling: no leading dashes, ``-`` for ``_``, aliases resolved.
        tokens: the tokens of the command line, the flag itself first.
    """

    name: str
    tokens: tuple[str, ...]

    @property
    def values(self) -> list[str]:
        """The flag's values as they were written; empty for a bare flag."""
        flag, *values = self.tokens
        return [*flag.split("=", 1)[1:], *values]

    @property
    def value(self) -> str | None:
        """The flag's only value, or None for a bare flag.

        Raises:
            ConfigError: several values, as a shell makes of ``*``; the first alone would count.
        """
        if len(values := self.values) > 1:  # not shown: one may be a key
            raise ConfigError(f"--{self.name} takes one value; got {len(values)} values")
        return next(iter(values), None)


def canonical(flag: str) -> str:
    """Return one spelling for a flag's name.

    >>> canonical("--tensor_parallel_size=2")
    'tp-size'
    """
    name = flag.lstrip("-").split("=", 1)[0].replace("_", "-")
    return ALIASES.get(name, name)


def is_flag(token: str) -> bool:
    """Return whether a token starts a flag; negative numbers are values."""
    return bool(re.match(r"--?[A-Za-z]", token))


def split_tokens(tokens: Iterable[str]) -> list[Argument]:
    """Group a command line's tokens by flag."""
    grouped: list[list[str]] = []
    for token in tokens:
        if is_flag(token):
            grouped.append([token])
        elif token.startswith("--"):
            raise ConfigError(f"expected a flag's name after the dashes, such as --role; got {token!r}")
        elif grouped:
            grouped[-1].append(token)
        else:
            raise ConfigError(f"expected a flag such as --role on the command line; got {token!r} first")
    return [Argument(canonical(group[0]), tuple(group)) for group in grouped]


def for_section(arguments: Sequence[Argument], section: str) -> list[Argument]:
    """Return the flags written ``--prefill.NAME``, ``--decode.NAME`` or ``--router.NAME``, without that prefix."""
    prefix = section + "."
    return [
        Argument(
            canonical(argument.name[len(prefix) :]),
            ("--" + argument.tokens[0].lstrip("-").split(".", 1)[1], *argument.tokens[1:]),
        )
        for argument in arguments
        if argument.name.startswith(prefix)
    ]


def outside_sections(arguments: Sequence[Argument]) -> list[Argument]:
    """Return the flags that carry no section prefix."""
    return [
        argument
        for argument in arguments
        if "." not in argument.name or argument.name.partition(".")[0] not in ROLE_SECTIONS
    ]


def from_mapping(values: dict[str, Any], origin: str) -> list[Argument]:
    """Return the flags of a YAML mapping.

    ``true`` is a bare flag, ``false`` and ``null`` are no flag, a list is several values, and a mapping becomes JSON. A
    list under ``prefill`` or ``decode`` repeats the flag for every element.
    """
    arguments = []
    for key, value in values.items():
        name = canonical(key)
        flag = "--" + key.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            arguments.append(Argument(name, (flag,)))
        elif isinstance(value, list) and name in REPEATED:
            arguments += [Argument(name, (flag, *_words(item, f"{origin}: {key}"))) for item in value]
        else:
            arguments.append(Argument(name, (flag, *_words(value, f"{origin}: {key}"))))
    return arguments


def _words(value: Any, origin: str) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _words(item, origin)]
    if value is None or isinstance(value, bool):  # YAML reads yes, on and true as one value; a flag does not
        raise ConfigError(
            f"{origin}: expected text or numbers in the list; got {value}: put what the flag takes in quotes"
        )
    word = json.dumps(value) if isinstance(value, dict) else str(value)
    if is_flag(word) or word.startswith("--"):
        raise ConfigError(f"{origin}: expected a value; {word!r} would be read as a flag: give flags as keys")
    return [word]


def layered(*layers: Sequence[Argument]) -> list[Argument]:
    """Join layers, the strongest last, into one list: a flag of a stronger layer removes its namesakes below."""
    result: list[Argument] = []
    for layer in layers:
        names = {argument.name for argument in layer}
        result = [argument for argument in result if argument.name not in names] + list(layer)
    return result


def last(arguments: Sequence[Argument], name: str) -> Argument | None:
    """Return the last argument of a flag, which overrides the others, or None."""
    return next((argument for argument in reversed(arguments) if argument.name == name), None)


def value_of(arguments: Sequence[Argument], name: str) -> str | None:
    """Return the value of a flag, or None."""
    found = last(arguments, name)
    return None if found is None else found.value


def has(arguments: Sequence[Argument], name: str) -> bool:
    return last(arguments, name) is not None


def integer(arguments: Sequence[Argument], name: str, default: int) -> int:
    value = value_of(arguments, name)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"--{name} must be a whole number; got {value!r}") from error


def to_tokens(arguments: Sequence[Argument]) -> list[str]:
    return [token for argument in arguments for token in argument.tokens]
