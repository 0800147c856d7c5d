"""The package's rules: which folder may import which, what may import SGLang, and the common base of exceptions.

Imports are read from the syntax trees, those inside functions too, so that a lazy import cannot hide an edge.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sglang_tpla"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@cache
def allowed() -> dict[str, set[str]]:
    """Return for each folder the parts of the package that docs/architecture.md lets it import."""
    rows = re.findall(r"^\| `(\w+)/` \|.*\|([^|]*)\|$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    return {folder: {*re.findall(r"`(\w+)`", names), "errors", folder} for folder, names in rows}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return for each module every module that it imports, by full names."""
    trees = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    return {name: frozenset(imported(tree, trees)) for name, tree in trees.items()}


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[str]:
    """Yield the names of the modules that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & modules.keys() or {node.module}


def test_only_host_imports_sglang() -> None:
    found = {
        module
        for module, names in imports().items()
        if any(name.split(".")[0] in ("sglang", "sglang_router") for name in names)
    }
    assert found
    assert all(module.startswith("sglang_tpla.host.") for module in found), sorted(found)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_the_page_says(folder: str) -> None:
    edges = {
        (module, name)
        for module, names in imports().items()
        for name in names
        if module.startswith(f"sglang_tpla.{folder}.") and name.startswith("sglang_tpla.")
    }
    assert edges
    assert [edge for edge in sorted(edges) if edge[1].split(".")[1] not in allowed()[folder]] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    own = {module: {name for name in names if name in imports()} for module, names in imports().items()}
    try:
        TopologicalSorter({module: names - {module} for module, names in own.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' <- '.join(error.args[1])}")


def test_only_the_compat_module_knows_how_a_release_spells_its_arguments() -> None:
    """One module reads the arguments that later releases of SGLang lack; other code would break only with those."""
    gone = {"get_model_config", "get_attention_backends", "ps"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} .{node.attr}"
        for path in (PACKAGE / "host").rglob("*.py")
        if path.name != "compat.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in gone
    ]
    assert not found, f"{found}: use sglang_tpla.host.compat, or get_parallel()"


BLOCKING = {"zmq", "threading", "socket", "time"}  # modules that the state of an agent must not import
STATE = ["decode.rooms", "decode.credits", "decode.coverage", "prefill.rooms", "prefill.ended_rooms", "prefill.lanes"]
AGENTS = ["decode", "prefill"]


@pytest.mark.parametrize("module", STATE)
def test_state_neither_waits_nor_sends(module: str) -> None:
    names = {name.split(".")[0] for name in imports()[f"sglang_tpla.transfer.{module}"]}
    assert names.isdisjoint(BLOCKING), names & BLOCKING


def transfer_trees(folder: str = "") -> dict[Path, ast.Module]:
    """Return the syntax trees of transfer/, or of a folder in it."""
    paths = (PACKAGE / "transfer" / folder).rglob("*.py")
    return {path: ast.parse(path.read_text()) for path in paths}


def test_no_class_of_transfer_inherits_from_another() -> None:
    """An agent owns its parts instead. Exceptions and wire messages have no behaviour and may have a common base."""
    classes = [node for tree in transfer_trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    behaving = {node.name for node in classes if not node.name.endswith(("Error", "Message"))}
    bases = {ast.unparse(base).split("[")[0] for node in classes for base in node.bases}
    assert len(behaving) > 30 and behaving.isdisjoint(bases), behaving & bases


def test_no_module_reaches_for_what_is_private_to_another() -> None:
    """In host/, only our private names count: the ledger watches SGLang's private names."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    ours, reached = set(), set()
    for path, node in ((path, node) for path, tree in trees.items() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            ours.add(node.name)
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                reached.add((path.relative_to(PACKAGE), node.attr, f"{owner}.{node.attr}"))
            elif isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
    found = [text for path, name, text in reached if path.parts[0] != "host" or name in ours]
    assert ours and reached and not found, found


def test_one_module_reads_a_models_config() -> None:
    """Other modules that name ``config.json`` hand its path to that module, and do not parse it."""
    reads = {
        module_name(path)
        for path in PACKAGE.rglob("*.py")
        for nodes in [list(ast.walk(ast.parse(path.read_text())))]
        if any(isinstance(node, ast.Constant) and node.value == "config.json" for node in nodes)
        and any(isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads") for node in nodes)
    }
    checkpoint = "sglang_tpla.reference_model.checkpoint"  # parses its tensors' index
    assert "read_config" in (PACKAGE / "reference_model" / "checkpoint.py").read_text()
    assert reads - {checkpoint} == {"sglang_tpla.reference_model.config_file"}


@pytest.mark.parametrize("folder", AGENTS)
def test_each_attribute_of_the_state_is_written_by_one_module(folder: str) -> None:
    trees = transfer_trees(folder)
    state = trees[PACKAGE / "transfer" / folder / "state.py"]
    fields = {
        node.target.id
        for item in ast.walk(state)
        if isinstance(item, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in item.decorator_list)
        for node in item.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    writers: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and node.attr in fields
                and ast.unparse(node.value) != "self"
            ):
                writers.setdefault(node.attr, set()).add(path.name)
    assert len(writers) > 20
    shared = {attribute: sorted(names) for attribute, names in writers.items() if len(names) > 1}
    assert not shared, shared


def test_the_simulation_patches_no_constructor_and_no_clock() -> None:
    """The simulation hands in its threads, time and sockets; only C is off, because it needs the system's sockets."""
    patched = [
        ast.unparse(node)
        for path in (ROOT / "tests" / "wire").glob("simul*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and "patch" in ast.unparse(node.func)
    ]
    assert patched == ["mock.patch('sglang_tpla.transfer.memory.native.library', return_value=None)"]


# This exception tells a process to end, and is no error.
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
