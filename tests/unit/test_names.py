"""Every name that tests, benchmarks and examples take from this project exists, even in files that no CPU runs.

GPU tests, slow tests and benchmarks are not part of the default suite, so a renamed function would break them unseen.
Names are read from the syntax trees; nothing is imported.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sglang_tpla", "tests", "benchmarks", "examples")
BESIDE = ("tests/gpu", "benchmarks")  # folders whose files are imported by their bare names
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
KEPT = {"__doc__", "__file__", "__name__", "__path__"}  # every module has these names


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def found(module: str) -> Path | None:
    """Return the file or the folder of a module of this project, or None for any other module."""
    for root in (ROOT, *(ROOT / folder for folder in BESIDE)):
        path = root.joinpath(*module.split("."))
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if path.is_dir() and module.split(".")[0] in FOLDERS:
            return path
    return None


@cache
def bound(path: Path) -> set[str]:
    """Return the names that a module or a package has: its own, those that it imports, and the modules inside."""
    if path.is_dir():
        own = bound(path / "__init__.py") if (path / "__init__.py").is_file() else set()
        return own | {inner.stem for inner in path.iterdir()}
    names = set(KEPT)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def missing(path: Path) -> Iterator[str]:
    """Yield ``line: module.name`` for every name that a file takes from this project's modules and that is missing."""
    modules: dict[str, str] = {}  # a name in this file -> the module of ours that it means
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname or "." not in alias.name:
                    modules[alias.asname or alias.name] = alias.name
                if alias.name.split(".")[0] in FOLDERS and found(alias.name) is None:
                    yield f"{node.lineno}: {alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            home = found(node.module)
            if home is None:
                if node.module.split(".")[0] in FOLDERS:
                    yield f"{node.lineno}: {node.module}"
                continue
            for alias in node.names:
                if alias.name not in bound(home):
                    yield f"{node.lineno}: {node.module}.{alias.name}"
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    # A name that the file also binds to something else says nothing about the module.
    rebound = {node.arg for node in ast.walk(tree_of(path)) if isinstance(node, ast.arg)}
    rebound |= {
        node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree_of(path)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)) or node.value.id in rebound:
            continue
        home = found(modules[node.value.id]) if node.value.id in modules else None
        if home is not None and isinstance(node.ctx, ast.Load) and node.attr not in bound(home):
            yield f"{node.lineno}: {modules[node.value.id]}.{node.attr}"


def test_every_name_that_a_file_takes_exists() -> None:
    assert len(FILES) > 300
    assert not [f"{path.relative_to(ROOT)}:{name}" for path in FILES for name in missing(path)]


def test_a_renamed_function_is_found(tmp_path: Path) -> None:
    path = tmp_path / "stale.py"
    path.write_text(
        "import decode_case\nfrom sglang_tpla.plan import model\nfrom sglang_tpla.plan.model import find, from_config\n"
        "from sglang_tpla.gone import anything\nmodel.find, model.gone, decode_case.SCALE, decode_case.GONE\n"
    )
    assert list(missing(path)) == [
        "3: sglang_tpla.plan.model.from_config", "4: sglang_tpla.gone", "5: sglang_tpla.plan.model.gone",
        "5: decode_case.GONE",
    ]  # fmt: skip
