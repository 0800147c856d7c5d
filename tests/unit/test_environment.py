"""The environment's keys, locks and repairs; this test runs in the real environment."""

import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "environment.py"


@pytest.fixture
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_environment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "requirements.txt").write_text("a==1\n")
    (folder / "pyproject.toml").write_text("[project]\n")
    return folder


def test_cache_folder(environment: ModuleType, tmp_path: Path) -> None:
    folder = environment.cache_folder
    assert folder({"SGLANG_TPLA_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/x"}) == tmp_path
    assert folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "sglang_tpla"
    assert folder({}) == Path.home().resolve() / ".cache" / "sglang_tpla"


def test_keys_follow_what_they_must(environment: ModuleType, checkout: Path, tmp_path: Path) -> None:
    base, overlay = environment.base_key(checkout), environment.overlay_key(checkout)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("requirements.txt", "pyproject.toml"):
        (moved / name).write_bytes((checkout / name).read_bytes())
    assert environment.base_key(moved) == base, "clones with the same pins share one environment"
    assert environment.overlay_key(moved) != overlay, "every clone sees its own code"
    (checkout / "pyproject.toml").write_text("[project]\nname='b'\n")
    assert environment.base_key(checkout) == base
    assert environment.overlay_key(checkout) != overlay
    (checkout / "requirements.txt").write_text("a==2\n")
    assert environment.base_key(checkout) != base


def test_a_release_of_sglang_has_pins_and_an_environment_of_its_own(
    environment: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = environment.base_key(checkout), environment.overlay_key(checkout)
    (checkout / "requirements-0.5.23.txt").write_text("a==3\n")
    for release in ("", environment.DEFAULT_RELEASE):
        monkeypatch.setenv("SGLANG", release)
        assert (environment.base_key(checkout), environment.overlay_key(checkout)) == default
    monkeypatch.setenv("SGLANG", "0.5.23")
    assert environment.base_key(checkout) != default[0]
    assert environment.overlay_key(checkout) != default[1]
    monkeypatch.setenv("SGLANG", "0.5.22")
    with pytest.raises(environment.EnvironmentFailure, match=r"it has pins for SGLang 0\.5\.17, 0\.5\.23"):
        environment.base_key(checkout)


def stand_in(folder: Path) -> None:
    """Make a stand-in for a built environment: its interpreter runs, and it costs no time."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)


def test_a_complete_environment_is_not_built_again(environment: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "env-1"
    built: list[int] = []

    def build() -> None:
        built.append(1)
        stand_in(folder)

    for _ in range(2):
        assert environment.build_once(folder, build) == folder / "bin" / "python"
    assert built == [1]


def test_what_an_interrupted_build_left_is_built_anew(environment: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "env-1"

    def interrupted() -> None:
        stand_in(folder)
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment.build_once(folder, interrupted)
    environment.build_once(folder, lambda: stand_in(folder))
    assert not (folder / "half").exists()


def test_an_environment_whose_python_is_gone_is_built_anew(environment: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "env-1"
    environment.build_once(folder, lambda: stand_in(folder))
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to(tmp_path / "uninstalled")
    environment.build_once(folder, lambda: stand_in(folder))
    assert environment.works(folder / "bin" / "python")


def test_two_builds_at_once_build_once(environment: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "env-1"
    inside, go_on, built = threading.Event(), threading.Event(), []

    def slow() -> None:
        inside.set()
        assert go_on.wait(30)
        built.append("first")
        stand_in(folder)

    first = threading.Thread(target=environment.build_once, args=(folder, slow))
    second = threading.Thread(
        target=environment.build_once, args=(folder, lambda: (built.append("second"), stand_in(folder)))
    )
    first.start()
    assert inside.wait(30)
    second.start()
    go_on.set()
    first.join(30)
    second.join(30)
    assert built == ["first"]


def test_overlays_of_vanished_checkouts_go(environment: ModuleType, checkout: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, place in (("overlay-1", checkout), ("overlay-2", tmp_path / "gone")):
        (cache / name).mkdir(parents=True)
        (cache / name / environment.CHECKOUT_RECORD).write_text(str(place))
    environment.prune(cache)
    assert [path.name for path in cache.iterdir()] == ["overlay-1"]


def test_a_failing_command_tells_its_last_lines(environment: ModuleType, tmp_path: Path) -> None:
    program = "print('no such package'); raise SystemExit(3)"
    with pytest.raises(environment.EnvironmentFailure, match=r"ended with 3; its last lines:\nno such package"):
        environment.run([sys.executable, "-c", program], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "no such package\n"


def test_too_little_disk_is_told_before_anything_is_made(
    environment: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "NEEDED_BYTES", 10**18)
    with pytest.raises(environment.EnvironmentFailure, match="point SGLANG_TPLA_CACHE at another disk"):
        environment.build_base(tmp_path / "env-1", checkout)
    assert not (tmp_path / "env-1").exists()


def test_a_build_that_is_terminated_leaves_no_installer(tmp_path: Path) -> None:
    """SIGTERM during a build ends the installer too, and leaves nothing that looks complete."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "environment.py").write_bytes(SCRIPT.read_bytes())
    # This installation never ends, because it reads a pinned package from a pipe that nobody writes.
    os.mkfifo(tmp_path / "never")
    (tmp_path / "requirements.txt").write_text(f"-r {tmp_path / 'never'}\n")
    (tmp_path / "pyproject.toml").write_text("")
    cache = tmp_path / "cache"
    build = subprocess.Popen(
        [sys.executable, tmp_path / ".ci" / "environment.py"],
        env={**os.environ, "SGLANG_TPLA_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # Opening the pipe for writing succeeds once the installer reads it.
    with (tmp_path / "never").open("wb"):
        build.send_signal(signal.SIGTERM)
        output, _ = build.communicate(timeout=300)
    assert build.returncode == 128 + signal.SIGTERM
    assert output == b""
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert not (folder / ".complete").exists()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert str(tmp_path).encode() not in (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.mark.parametrize("file", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.stem)
def test_pins_are_exact_and_name_no_place(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 200
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+===?[A-Za-z0-9.!+]+", line), line


def test_every_supported_release_has_pins() -> None:
    releases = tomllib.loads((ROOT / "patches" / "ledger.toml").read_text())["releases"]
    pinned = [
        re.search(r"^sglang==(.+)$", file.read_text(), re.MULTILINE)[1]  # type: ignore[index]
        for file in ROOT.glob("requirements*.txt")
    ]
    assert sorted(pinned) == releases
    for release in releases[1:]:
        assert f"sglang=={release}\n" in (ROOT / f"requirements-{release}.txt").read_text()


def test_this_environment_is_the_pinned_one() -> None:
    """Wherever the tests run, the packages that matter are the pinned ones."""
    release = importlib.metadata.version("sglang")
    own = ROOT / f"requirements-{release}.txt"
    lines = (own if own.exists() else ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(re.split("={2,3}", line) for line in lines if "==" in line)
    for name in ("sglang", "sglang-router", "torch", "pyzmq", "msgspec", "transformers", "flashinfer-python"):
        assert importlib.metadata.version(name) == pins[name]


def test_the_plugin_shows_once() -> None:
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        entries = importlib.metadata.entry_points(group=group)
        assert [entry.value.split(":")[0] for entry in entries].count("sglang_tpla.plugin") == 1


def test_make_prints_the_interpreter_alone() -> None:
    """``make -s python`` prints one line for scripts: the path of an interpreter that runs this checkout."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    made = subprocess.run(["make", "-s", "python"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (python,) = made.stdout.splitlines()
    program = "import sglang_tpla; print(sglang_tpla.__file__)"
    ran = subprocess.run([python, "-I", "-c", program], cwd="/", capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()).resolve() == ROOT / "sglang_tpla" / "__init__.py"


def test_make_without_a_python_says_what_to_install() -> None:
    made = subprocess.run(["make", "-s", "python", "PYTHON="], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert made.stdout == ""
    assert "no Python 3.11 with ensurepip found; install python3.11" in made.stderr
