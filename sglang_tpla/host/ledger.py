"""The ledger of hooks: every change to SGLang with its reason, its releases and the condition for its removal.

``patches/ledger.toml`` is the one list. The file names the supported releases; each entry names a target in SGLang, the
function here that hooks it, and the hash of the target's abstract syntax tree in every release in which it is hooked.
The hash is computed from the source file, without an import, and covers every definition of the name (overloads and
body). A changed target or an unsupported release stops the start. ``source_table.py`` makes the table of all targets in
all releases from their wheels.
"""

import argparse
import ast
import hashlib
import importlib.util
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import sglang_tpla
from sglang_tpla.config import ROLES
from sglang_tpla.errors import SglangTplaError

CPU = "cpu"  # the CPU reference platform, in any role


class LedgerError(SglangTplaError, RuntimeError):
    """An installed SGLang for which the ledger was not written."""


@dataclass(frozen=True)
class Hook:
    """One change to SGLang.

    Args:
        target: dotted path of the function, method or class in SGLang.
        kind: ``before``, ``after``, ``around`` or ``replace``.
        implementation: ``module:name`` in this package.
        roles: server roles in which the hook is applied; ``cpu`` stands for the CPU reference platform.
        reason: the need for the change.
        upstream: the place in SGLang where the same seam exists or could be added.
        remove_when: the event that makes the change unnecessary.
        ast_sha256: release -> hash of the target's syntax tree, for each supported release from ``since`` to ``until``.
        targets: release -> the target's dotted path, from that release on, where it differs from ``target``.
        since: the first supported release in which the hook is applied; None for the oldest.
        until: the last supported release in which the hook is applied; None for the newest.
    """

    target: str
    kind: str
    implementation: str
    roles: tuple[str, ...]
    reason: str
    upstream: str
    remove_when: str
    ast_sha256: Mapping[str, str]
    targets: Mapping[str, str] = field(default_factory=dict)
    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("before", "after", "around", "replace"):
            raise LedgerError(f"{self.target}: kind must be before, after, around or replace; got {self.kind!r}")
        if not set(self.roles) <= {*ROLES, CPU}:
            raise LedgerError(f"{self.target}: roles must be among {(*ROLES, CPU)}; got {self.roles}")
        if not self.ast_sha256:
            raise LedgerError(f"{self.target}: ast_sha256 must have the hash in every supported release")

    def target_in(self, release: str) -> str:
        """Return the target's dotted path in a release, which the newest listed release up to it decides."""
        earlier = [listed for listed in self.targets if version_key(listed) <= version_key(release)]
        return self.targets[max(earlier, key=version_key)] if earlier else self.target

    def applies_in(self, release: str, supported: Collection[str]) -> bool:
        """Return whether the hook is applied in a release; an unsupported release follows the nearest older one."""
        return nearest(release, supported) in self.ast_sha256


def version_key(release: str) -> tuple[int, ...]:
    """Turn a release into numbers that compare: ``0.5.17`` -> (0, 5, 17), without a suffix such as ``rc1``."""
    return tuple(int(number) for number in re.findall(r"(?:^|\.)(\d+)", release))


def nearest(release: str, supported: Collection[str]) -> str:
    """Return the newest supported release up to ``release``, or else the oldest one."""
    older = [listed for listed in supported if version_key(listed) <= version_key(release)]
    return max(older, key=version_key) if older else min(supported, key=version_key)


def refuse(message: str) -> SystemExit:
    """Make the exception that ends a process with one clear message."""
    return SystemExit(f"sglang_tpla refuses to start: {message}")


def ledger_path() -> Path:
    """Return the ledger of this installation: beside the package in a checkout, inside it when installed."""
    package = Path(sglang_tpla.__file__).parent
    for folder in (package.parent / "patches", package / "patches"):
        if (folder / "ledger.toml").is_file():
            return folder / "ledger.toml"
    raise LedgerError(f"patches/ledger.toml is neither in {package} nor beside it; reinstall sglang_tpla")


@cache
def _file() -> dict[str, Any]:
    with ledger_path().open("rb") as file:
        return tomllib.load(file)


@cache
def load() -> tuple[Hook, ...]:
    hooks = tuple(Hook(**{**entry, "roles": tuple(entry["roles"])}) for entry in _file()["hook"])
    for hook in hooks:  # otherwise a missing hash would silently leave the hook out of its release
        expected = {
            release
            for release in supported_releases()
            if version_key(hook.since or release) <= version_key(release) <= version_key(hook.until or release)
        }
        if set(hook.ast_sha256) != expected:
            raise LedgerError(
                f"{hook.target}: ast_sha256 has {', '.join(sorted(hook.ast_sha256))}; expected "
                f"{', '.join(sorted(expected))}: add the release, or since and until, "
                "the first and last that need the hook"
            )
    return hooks


@cache
def supported_releases() -> tuple[str, ...]:
    """Return the SGLang releases that this package runs beside, oldest first."""
    return tuple(_file()["releases"])


def host_version() -> str:
    return version("sglang")


class Source(Protocol):
    """A source of SGLang's files: the installation, or a wheel."""

    release: str

    def read(self, module: str) -> str | None:
        """Return the text of a module, or None where there is no such module."""


class Installed:
    """The source files of the SGLang that this interpreter would import."""

    def __init__(self) -> None:
        self.release = host_version()

    def read(self, module: str) -> str | None:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the parent is not a package, so the name is a class or a function
            return None
        if spec is None or spec.origin is None:
            return None
        return Path(spec.origin).read_text(encoding="utf-8")


def canonical(node: Any) -> str:
    """Turn a syntax tree into text that is the same under every Python, without absent or empty fields.

    ``ast.dump`` varies: 3.12 gave functions and classes a field ``type_params``, and 3.13 stopped printing empty lists.
    """
    if isinstance(node, ast.AST):
        fields = (f"{name}={canonical(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(canonical, node))}]"
    return repr(node)


def _definitions(parent: ast.AST, name: str) -> list[ast.AST]:
    """Return every definition of a name directly below ``parent``; a function may have overloads besides its body."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [child for child in ast.iter_child_nodes(parent) if isinstance(child, kinds) and child.name == name]


def target_hash(target: str, source: Source) -> str:
    """Return the sha256 of the syntax trees of all definitions of ``target``.

    Comments, layout and the version of Python do not change the hash.

    Raises:
        LedgerError: a name that does not exist.
    """
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        if (text := source.read(".".join(parts[:split]))) is not None:
            break
    else:
        raise LedgerError(f"SGLang {source.release} has no module {parts[0]}")
    found: list[ast.AST] = [_parsed(text)]
    for name in parts[split:]:
        found = _definitions(found[-1], name)  # a name means its last definition; the hash covers them all
        if not found:
            raise LedgerError(f"SGLang {source.release} has no {target} ({name} is missing)")
    return hashlib.sha256("\n".join(map(canonical, found)).encode()).hexdigest()


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def check(hook: Hook, source: Source | None = None) -> str | None:
    """Return the mismatch of one hook's target in the installed SGLang (or another source) as text, or None.

    In an unsupported release, a target is right if it is the same as in the nearest older supported release.
    """
    source = source or Installed()
    target = hook.target_in(source.release)
    known = nearest(source.release, hook.ast_sha256)
    try:
        found = target_hash(target, source)
    except LedgerError as error:
        return str(error)
    if found != hook.ast_sha256[known]:
        return (
            f"{target}: expected syntax tree {hook.ast_sha256[known][:12]} of SGLang {known}, found {found[:12]} "
            f"in {source.release}"
        )
    return None


def missing(hook: Hook, source: Source | None = None) -> str | None:
    """Return the error for a target that does not exist, so that no override can hook it; None where it exists."""
    source = source or Installed()
    try:
        target_hash(hook.target_in(source.release), source)
    except LedgerError as error:
        return str(error)
    return None


def main() -> None:
    """Print every target of the installed SGLang with its hash, as the ledger needs them for a new release."""
    argparse.ArgumentParser(prog="python -m sglang_tpla.host.ledger", description=main.__doc__).parse_args()
    release = host_version()
    print(f"# SGLang {release}; supported: {', '.join(supported_releases())}")
    for hook in load():
        target = hook.target_in(release)
        if not hook.applies_in(release, supported_releases()):
            print(f"{target}\n    # not hooked in this release")
            continue
        words = check(hook) or "as known"
        print(f'{target}\n    "{release}" = "{"" if missing(hook) else target_hash(target, Installed())}"  # {words}')


if __name__ == "__main__":
    main()
