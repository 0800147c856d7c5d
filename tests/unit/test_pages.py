"""The links, anchors, flags and modules of pages exist, and a page names each benchmark and each result."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sglang_tpla.config import ENV_PREFIX, OF_TESTS, OTHER_VARIABLES, Settings

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = {".git", ".pytest_cache", "node_modules", "out"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not HIDDEN & set(path.relative_to(ROOT).parts))
LAUNCHER = {"tpla-" + entry.name.replace("_", "-") for entry in fields(Settings) if entry.name != "role"}
EVALUATE = {"tpla-url"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as hosts of Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(\s*([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(found), f"{found.name} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    flags = set(re.findall(r"--(tpla-[a-z-]+[a-z])\b(?!\*)", text))
    assert flags <= LAUNCHER | EVALUATE
    for module in re.findall(r"python -m (sglang_tpla[\w.]*\w)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_variables_are_those_of_the_launchers_page_and_of_the_code() -> None:
    """The page lists all variables that are not settings, and nothing in the repository reads or names another."""
    page = (ROOT / "docs" / "launcher.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`SGLANG_TPLA_.*?) \|", page, re.M)
    named = [name for row in rows for name in re.findall(rf"`({ENV_PREFIX}[A-Z_]+)\*?`", row)]
    assert sorted(named) == sorted((*OTHER_VARIABLES, *OF_TESTS))
    known = {*OTHER_VARIABLES, *Settings.variables()}
    for folder in ("sglang_tpla", "benchmarks", "examples", "docs", ".ci", "launch", "patches", "tests/gpu"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix not in (".py", ".md", ".sh", ".toml", ".yaml", ".cu", ".cuh", ".c") or "out" in path.parts:
                continue
            text = path.read_text(encoding="utf-8")
            joined = [ENV_PREFIX + tail for tail in re.findall(r'ENV_PREFIX \+ "([A-Z_]+)"', text)]
            for name in (*re.findall(rf"{ENV_PREFIX}[A-Z_]*[A-Z]_?", text), *joined):
                assert name in known or name.startswith(OF_TESTS), f"{path} names {name}, which is in no list"


def test_every_benchmark_is_named_by_its_page() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    scripts = [path.stem for path in (ROOT / "benchmarks").glob("*.py")]
    assert scripts and [name for name in scripts if not re.search(rf"`{name}(\.py)?\b", text)] == []


def test_every_result_is_named_by_a_page_or_a_module() -> None:
    naming = [*PAGES, *(ROOT / "sglang_tpla").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in naming)
    results = [path.name for path in (ROOT / "benchmarks" / "results").rglob("*.json")]
    assert results and [name for name in results if name not in text] == []
