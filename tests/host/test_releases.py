"""The ledger against SGLang's releases as they were published, from the table made of their wheels."""

from dataclasses import replace
from pathlib import Path

import pytest

from sglang_tpla.host import ledger, source_table

SUPPORTED = ledger.supported_releases()
BETWEEN = ("0.5.18", "0.5.20", "0.5.21", "0.5.22")


class Text:
    """A release with one module."""

    def __init__(self, text: str, release: str = "1.2.3") -> None:
        self.release, self._text = release, text

    def read(self, module: str) -> str | None:
        return self._text if module == "some.module" else None


@pytest.mark.parametrize("release", SUPPORTED)
def test_the_ledger_is_what_the_wheel_has(release: str) -> None:
    targets = source_table.recorded()[release]["targets"]
    for hook in ledger.load():
        if release in hook.ast_sha256:
            assert targets[hook.target_in(release)] == hook.ast_sha256[release], hook.target


@pytest.mark.filterwarnings("ignore")  # SGLang's own imports warn on a CPU
def test_the_installed_release_is_what_its_wheel_has() -> None:
    row = source_table.recorded()[ledger.host_version()]
    installed = ledger.Installed()
    for target, recorded in row["targets"].items():
        if recorded is None:
            with pytest.raises(ledger.LedgerError, match="has no"):
                ledger.target_hash(target, installed)
        else:
            assert ledger.target_hash(target, installed) == recorded, target


def test_the_table_covers_every_path_of_the_ledger() -> None:
    table = source_table.recorded()
    assert list(table) == [f"0.5.{n}" for n in range(17, 24)]
    for row in table.values():
        assert sorted(row["targets"]) == source_table.all_targets()
        assert len(row["wheel_sha256"]) == 64


@pytest.mark.parametrize("release", BETWEEN)
def test_releases_between_are_refused_by_name(release: str) -> None:
    targets, before = source_table.recorded()[release]["targets"], ledger.nearest(release, SUPPORTED)
    hooks = [hook for hook in ledger.load() if hook.applies_in(release, SUPPORTED)]
    differing = any(targets[hook.target_in(release)] != hook.ast_sha256[before] for hook in hooks)
    assert differing, f"nothing hooked changed in SGLang {release}: it could be supported by its hashes alone"
    assert release not in SUPPORTED


def test_no_hook_leaves_out_a_release_in_the_middle() -> None:
    """A hook may begin with a release and end with one."""
    for hook in ledger.load():
        listed = [number for number, release in enumerate(SUPPORTED) if release in hook.ast_sha256]
        assert set(hook.ast_sha256) <= set(SUPPORTED)
        assert listed and listed == list(range(listed[0], listed[-1] + 1)), hook.target


def test_targets_follow_the_release() -> None:
    hook = next(hook for hook in ledger.load() if hook.target.endswith("__post_init__"))
    assert hook.target_in("0.5.17") == hook.target_in("0.5.18") == hook.target
    assert hook.target_in("0.5.19") == hook.target_in("0.5.21") == hook.target_in("0.5.24")
    assert hook.target_in("0.5.23").endswith("ServerArgs.resolve_once")


@pytest.mark.parametrize(
    ("release", "expected"),
    [("0.5.16", "0.5.17"), ("0.5.18", "0.5.17"), ("0.5.19", "0.5.19"), ("0.5.22.post1", "0.5.19"), ("0.6.0", "0.5.23")],
)
def test_the_nearest_release(release: str, expected: str) -> None:
    assert ledger.nearest(release, SUPPORTED) == expected


def test_every_definition_of_a_name_counts() -> None:
    """A change of the body must be seen although overloads come first."""
    stub = "@overload\ndef f(a: int) -> int: ...\n"
    one, other = (Text(stub + f"def f(a):\n    return {value}\n") for value in (1, 2))
    assert ledger.target_hash("some.module.f", one) != ledger.target_hash("some.module.f", other)
    assert ledger.target_hash("some.module.f", one) != ledger.target_hash(
        "some.module.f", Text("def f(a):\n    return 1\n")
    )


def test_what_differs_and_what_is_missing_have_their_words() -> None:
    known = ledger.target_hash("some.module.f", Text("def f(): return 1"))
    hook = replace(ledger.load()[0], target="some.module.f", ast_sha256={"1.2.0": known}, targets={})
    assert ledger.check(hook, Text("def f(): return 1")) is None
    changed = ledger.check(hook, Text("def f(): return 2"))
    assert changed is not None and "some.module.f" in changed and "1.2.0" in changed and "1.2.3" in changed
    assert ledger.missing(hook, Text("def f(): return 2")) is None
    gone = ledger.missing(hook, Text("def g(): return 1"))
    assert gone == "SGLang 1.2.3 has no some.module.f (f is missing)"


def test_a_wheel_is_read_without_installing_it(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "sglang-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("some/module.py", "class A:\n    def f(self): return 1\n")
        wheel.writestr("some/__init__.py", "")
    source = source_table.Wheel(path)
    assert source.release == "9.9.9" and source.read("some") == "" and source.read("none") is None
    same = Text("class A:\n    def f(self):  # a comment\n        return 1\n")
    assert ledger.target_hash("some.module.A.f", source) == ledger.target_hash("some.module.A.f", same)
