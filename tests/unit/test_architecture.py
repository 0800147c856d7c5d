"""Which folders of the package may import which: read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sglang_tpla"
# folder -> folders of ours that it must not import
FORBIDDEN = {
    "calibrate": {"evaluate", "host", "launch", "transfer"},
    "evaluate": {"calibrate", "host", "launch", "transfer"},
    "measure": {"calibrate", "evaluate", "host", "launch", "transfer"},
    "artifact": {"calibrate", "evaluate", "host", "launch", "measure", "transfer"},
    "reference_model": {"artifact", "calibrate", "evaluate", "host", "launch", "measure", "transfer"},
    "host": {"calibrate", "evaluate"},
    "transfer": {"calibrate", "evaluate", "host", "launch", "measure"},
    "attention": {"calibrate", "evaluate", "host", "launch", "measure"},
}


def imports(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, imported module) of every import in a folder."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute here"
                yield file, f"{node.module}"
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_folders_import_only_what_they_may(folder: str) -> None:
    wrong = {f"sglang_tpla.{other}" for other in FORBIDDEN[folder]}
    found = [
        f"{file.relative_to(PACKAGE)} imports {module}"
        for file, module in imports(PACKAGE / folder)
        if any(module == other or module.startswith(f"{other}.") for other in wrong)
    ]
    assert not found


def test_only_the_host_imports_the_engine() -> None:
    found = [
        f"{file.relative_to(PACKAGE)} imports {module}"
        for file, module in imports(PACKAGE)
        if module.split(".")[0] == "sglang" and file.relative_to(PACKAGE).parts[0] != "host"
    ]
    assert not found
