"""The ledger of hooks: what is changed in SGLang, why, on which releases, and when it can go.

``patches/ledger.toml`` is the one list. Each entry names a target in SGLang, the function here that hooks it, and the
hash of the target's abstract syntax tree in every supported release; the hash is taken from the source file
without importing it. A target that changed stops the start.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sglang_tpla
from sglang_tpla.config import ROLES
from sglang_tpla.errors import SglangTplaError

CPU = "cpu"  # the CPU reference platform, in whatever role
UNCHECKED = "SGLANG_TPLA_ALLOW_UNKNOWN_HOST"


class LedgerError(SglangTplaError, RuntimeError):
    """The installed SGLang is not what the ledger was written for."""


@dataclass(frozen=True)
class Hook:
    """One change to SGLang.

    Args:
        target: dotted path of the function, method or class in SGLang.
        kind: ``before``, ``after``, ``around`` or ``replace``.
        implementation: ``module:name`` in this package.
        roles: server roles in which it is applied; ``cpu`` stands for the CPU reference platform.
        reason: what needs it.
        upstream: where the same seam is, or could be, in SGLang.
        remove_when: what makes it unnecessary.
        ast_sha256: release -> hash of the target's syntax tree.
    """

    target: str
    kind: str
    implementation: str
    roles: tuple[str, ...]
    reason: str
    upstream: str
    remove_when: str
    ast_sha256: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.kind not in ("before", "after", "around", "replace"):
            raise LedgerError(
                f"{self.target}: kind must be before, after, around or replace; got {self.kind!r}"
            )
        if not set(self.roles) <= {*ROLES, CPU}:
            raise LedgerError(f"{self.target}: roles must be among {(*ROLES, CPU)}; got {self.roles}")


def refuse(message: str) -> SystemExit:
    """The exception that ends a process with one clear message."""
    return SystemExit(f"sglang_tpla refuses to start: {message}")


def ledger_path() -> Path:
    """The ledger of this installation: beside the package in a checkout, inside it when installed."""
    package = Path(sglang_tpla.__file__).parent
    for folder in (package.parent / "patches", package / "patches"):
        if (folder / "ledger.toml").is_file():
            return folder / "ledger.toml"
    raise LedgerError(f"patches/ledger.toml is neither in {package} nor beside it; reinstall sglang_tpla")


@cache
def load() -> tuple[Hook, ...]:
    """All hooks, in the order of the file."""
    with ledger_path().open("rb") as file:
        entries: list[dict[str, Any]] = tomllib.load(file)["hook"]
    return tuple(Hook(**{**entry, "roles": tuple(entry["roles"])}) for entry in entries)


def host_version() -> str:
    """The installed SGLang release."""
    return version("sglang")


@cache
def _module_tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LedgerError(f"SGLang {host_version()} has no module {module}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent is no package: then the name is a class or a function
        return False


def canonical(node: Any) -> str:
    """A syntax tree as text, the same under every Python: fields that are absent or empty are left out.

    ``ast.dump`` is not: 3.12 gave functions and classes a field ``type_params``, and 3.13 stopped printing empty lists.
    """
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={canonical(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])
        )
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(canonical, node))}]"
    return repr(node)


def host_hash(target: str) -> str:
    """sha256 of the syntax tree of ``target`` in the installed SGLang (comments, layout and Python do not count).

    Raises:
        LedgerError: there is no such name.
    """
    parts = target.split(".")
    split = next(n for n in range(len(parts) - 1, 0, -1) if _is_module(".".join(parts[:n])))
    node: ast.AST = _module_tree(".".join(parts[:split]))
    for name in parts[split:]:
        node = next(
            (
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and child.name == name
            ),
            None,
        )  # type: ignore[assignment]
        if node is None:
            raise LedgerError(f"SGLang {host_version()} has no {target} ({name} is missing)")
    return hashlib.sha256(canonical(node).encode()).hexdigest()


def check(hook: Hook) -> str | None:
    """What is wrong with the target of one hook in the installed SGLang, or None."""
    release = host_version()
    expected = hook.ast_sha256.get(release)
    if expected is None:
        return f"{hook.target}: SGLang {release} is not in the ledger (it knows {', '.join(sorted(hook.ast_sha256))})"
    try:
        found = host_hash(hook.target)
    except LedgerError as error:
        return str(error)
    if found != expected:
        return f"{hook.target}: expected syntax tree {expected[:12]} of SGLang {release}, found {found[:12]}"
    return None


def main() -> None:
    """Print, for the installed SGLang, every target with its hash: what a new release needs in the ledger."""
    print(f"# SGLang {host_version()}")
    for hook in load():
        print(
            f'{hook.target}\n    "{host_version()}" = "{host_hash(hook.target)}"  # {check(hook) or "as known"}'
        )


if __name__ == "__main__":
    main()
