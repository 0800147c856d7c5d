"""The ledger is the set of applied hooks; any difference ends the process before it serves."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_tpla.host import ledger
from tests.forking import Forks

ROOT = Path(__file__).resolve().parents[2]
LEDGER = tomllib.loads((ROOT / "patches" / "ledger.toml").read_text())["hook"]
RELEASE = importlib.metadata.version("sglang")

# The probe repeats SGLang's start of a process, then prints which hooks of ours the registry applied and whether each
# target's name leads to our code. (The router's package brings another plug-in.)
PROBE = """
import pkgutil
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
def ours(target):
    value = pkgutil.resolve_name(target)
    names = set()
    while value is not None:
        names.add(getattr(value, "__module__", ""))
        for cell in getattr(value, "__closure__", None) or ():
            names.add(getattr(cell.cell_contents, "__module__", ""))
        value = getattr(value, "__wrapped__", None)
    return any(str(name).startswith("sglang_tpla.") for name in names)
for target in sorted(HookRegistry._patched):
    if any(source.plugin_name == "sglang_tpla" for _, _, source in HookRegistry._hooks[target]):
        print("PATCHED", target, ours(target))
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks.start() as started:
        yield started


def run(forks: Forks, code: str, tmp_path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
    first, folder = ([], ROOT) if tmp_path is None else ([tmp_path], tmp_path)
    return forks.run("-c", code, env=base | {"CUDA_VISIBLE_DEVICES": ""} | env, cwd=folder, path=first)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_applied_set_is_the_ledger(forks: Forks, role: str) -> None:
    done = run(forks, PROBE, SGLANG_TPLA_ROLE=role, SGLANG_PLATFORM="sglang_tpla_cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    patched = dict(re.findall(r"^PATCHED (\S+) (\S+)$", done.stdout, re.M))
    expected = {
        hook.target_in(RELEASE)
        for hook in ledger.load()
        if {role, "cpu"} & set(hook.roles) and RELEASE in hook.ast_sha256
    }
    assert set(patched) == expected
    assert set(patched.values()) == {"True"}


def test_without_a_role_nothing_is_hooked(forks: Forks) -> None:
    done = run(forks, PROBE)
    assert done.returncode == 0 and "PATCHED" not in done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (
            lambda text: re.sub(rf'"{re.escape(RELEASE)}" = "\w{{8}}', f'"{RELEASE}" = "00000000', text),
            ("expected syntax tree", RELEASE),
        ),
        (lambda text: text.replace("utils.get_kv_class", "utils.get_kv_klass"), ("get_kv_klass",)),
    ],
    ids=["changed-function", "missing-function"],
)
def test_a_host_that_differs_stops_the_start(forks: Forks, tmp_path: Path, tamper, words: tuple[str, ...]) -> None:
    package = tmp_path / "sglang_tpla"
    package.symlink_to(ROOT / "sglang_tpla")
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "ledger.toml").write_text(tamper((ROOT / "patches" / "ledger.toml").read_text()))
    done = run(forks, PROBE + "\nprint('SERVES')", tmp_path, SGLANG_TPLA_ROLE="prefill")
    assert done.returncode != 0 and "SERVES" not in done.stdout
    assert "refuses to start" in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr[-2000:]
    if "missing-function" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        loud = run(
            forks, PROBE + "\nprint('SERVES')", tmp_path, SGLANG_TPLA_ROLE="prefill", SGLANG_TPLA_ALLOW_UNKNOWN_HOST="1"
        )
        assert "SERVES" in loud.stdout and "SGLANG_TPLA_ALLOW_UNKNOWN_HOST" in loud.stderr


def test_a_release_that_is_not_supported_stops_the_start(forks: Forks) -> None:
    """The message names the release, even if no hooked target changed."""
    code = f"""
from sglang_tpla.host import ledger
ledger.host_version = lambda: "{RELEASE}.post1"
"""
    done = run(forks, code + PROBE + "\nprint('SERVES')", SGLANG_TPLA_ROLE="prefill")
    assert done.returncode != 0 and "SERVES" not in done.stdout
    assert f"SGLang {RELEASE}.post1 is not supported (these are: 0.5.17, 0.5.19, 0.5.23)" in done.stderr
    loud = run(
        forks, code + PROBE + "\nprint('SERVES')", SGLANG_TPLA_ROLE="prefill", SGLANG_TPLA_ALLOW_UNKNOWN_HOST="1"
    )
    assert "SERVES" in loud.stdout and "SGLANG_TPLA_ALLOW_UNKNOWN_HOST" in loud.stderr


def test_a_hook_that_does_not_apply_stops_the_start(forks: Forks) -> None:
    """SGLang swallows a failure to apply, and this package must not."""
    code = """
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry._apply_target = classmethod(lambda cls, target, hooks: None)
"""
    done = run(forks, code + PROBE + "\nprint('SERVES')", SGLANG_TPLA_ROLE="prefill")
    assert done.returncode != 0 and "SERVES" not in done.stdout
    assert "did not apply" in done.stderr and "get_kv_class" in done.stderr


def test_bad_settings_stop_the_start(forks: Forks) -> None:
    done = run(forks, PROBE, SGLANG_TPLA_ROLE="decode", SGLANG_TPLA_GROUPS="two")
    assert done.returncode != 0 and "SGLANG_TPLA_GROUPS" in done.stderr and "'two'" in done.stderr


def test_the_hash_does_not_depend_on_python() -> None:
    """Empty fields that later Pythons add (``type_params`` since 3.12) are not in the text."""
    from sglang_tpla.host.ledger import canonical

    tree = ast.parse("def f(a, *, b=None):  # comment\n    return [a, -1]\n")
    assert canonical(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='a')], kwonlyargs=[arg(arg='b')], "
        "kw_defaults=[Constant()]), body=[Return(value=List(elts=[Name(id='a', ctx=Load()), "
        "UnaryOp(op=USub(), operand=Constant(value=1))], ctx=Load()))])])"
    )
    assert canonical(ast.parse("return None")) != canonical(ast.parse("return"))


def test_every_entry_says_why_and_until_when() -> None:
    for hook in LEDGER:
        assert hook["reason"] and hook["remove_when"] and hook["upstream"].startswith("https://github.com/"), hook[
            "target"
        ]
    places = [(hook["target"], role) for hook in LEDGER for role in hook["roles"]]
    assert len(set(places)) == len(places), "two hooks of one role on one target"


def test_importing_the_package_is_free_of_side_effects() -> None:
    code = """
import sys, threading
import sglang_tpla, sglang_tpla.config, sglang_tpla.plugin, sglang_tpla.calibrate, sglang_tpla.transfer
assert threading.active_count() == 1
assert not any(name == "sglang" or name.startswith("sglang.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
