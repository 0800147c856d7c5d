"""Whoever uses the package can catch all that it raises by one name."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "sglang_tpla"
# How a process is told to end is no error.
NOT_ERRORS = {"StopRequested"}


def test_every_exception_has_the_one_base() -> None:
    bases: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(ast.unparse(base) for base in node.bases)

    def lineage(name: str) -> set[str]:
        return {name}.union(*(lineage(base) for base in bases.get(name, ())))

    builtin = {"Exception", "BaseException", "ValueError", "RuntimeError", "TypeError", "KeyError", "OSError"}
    builtin |= {"ConnectionError", "LookupError", "ArithmeticError"}
    raised = {name for name in bases if lineage(name) & builtin} - {"SglangTplaError"} - NOT_ERRORS
    assert raised and {name for name in raised if "SglangTplaError" not in lineage(name)} == set()
