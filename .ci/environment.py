"""Make the Python environment of this checkout and print the path of its interpreter.

Two layers, both outside the checkout, in ``$SGLANG_TPLA_CACHE`` (default ``$XDG_CACHE_HOME/sglang_tpla`` or
``~/.cache/sglang_tpla``):

- ``env-<hash of the pins and the Python version>``: a virtual environment with every pinned package
  (some 8 GB), shared by all checkouts with the same pins;
- ``overlay-<hash of that, the checkout's path and its pyproject.toml>``: a tiny virtual environment that sees
  the first one's packages and has this checkout installed editable, so that every clone runs its own code and
  its own entry points.

``SGLANG=0.5.23`` in the environment asks for another supported SGLang release than the default one: its pins are
``requirements-0.5.23.txt``, and both of its layers are separate.

Each layer is built in place (virtual environments cannot be moved) under a lock, and carries a ``.complete`` file
only once it is whole: the next build removes the remains of an interrupted one. This file needs only the standard
library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHON_VERSION = (3, 11)
DEFAULT_RELEASE = "0.5.17"  # the SGLang release whose pins are requirements.txt
NEEDED_BYTES = 10 * 10**9  # space that the packages take while they are unpacked
COMPLETE = ".complete"
CHECKOUT_RECORD = ".checkout"


class EnvironmentFailure(Exception):
    """The environment cannot be made; the message says what to do."""


def say(text: str) -> None:
    """Print to stderr, because stdout carries only the interpreter's path."""
    print(text, file=sys.stderr, flush=True)


def cache_folder(environ: os._Environ[str] | dict[str, str] = os.environ) -> Path:
    """Return the folder of all environments of this project on this machine."""
    if own := environ.get("SGLANG_TPLA_CACHE"):
        return Path(own).expanduser().resolve()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().resolve() / "sglang_tpla"


def short_hash(*parts: bytes) -> str:
    """Return sixteen hex digits that change when any part does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def requirements_file(checkout: Path, environ: os._Environ[str] | dict[str, str] = os.environ) -> Path:
    """Return the file of pins of the SGLang release that ``SGLANG`` asks for, or of the default one.

    Raises:
        EnvironmentFailure: the project has no pins for that release.
    """
    release = environ.get("SGLANG") or DEFAULT_RELEASE
    default = checkout / "requirements.txt"
    file = default if release == DEFAULT_RELEASE else checkout / f"requirements-{release}.txt"
    if not file.is_file():
        others = (path.stem.removeprefix("requirements-") for path in checkout.glob("requirements-*.txt"))
        raise EnvironmentFailure(
            f"SGLANG={release}: {checkout} has no {file.name}; it has pins for SGLang "
            f"{', '.join(sorted({DEFAULT_RELEASE, *others}))}"
        )
    return file


def base_key(checkout: Path) -> str:
    """Return a hash of the pins, the Python version and the machine's architecture."""
    version = ".".join(map(str, sys.version_info[:2]))
    pins = requirements_file(checkout).read_bytes()
    return short_hash(pins, version.encode(), platform.machine().encode())


def overlay_key(checkout: Path) -> str:
    """Return a hash of the base, the checkout's path and its pyproject.toml."""
    return short_hash(base_key(checkout).encode(), os.fsencode(checkout), (checkout / "pyproject.toml").read_bytes())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system gives it back when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build holds {path}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def die_with_parent() -> None:
    """Have the kernel kill this child when its parent ends, even by SIGKILL; called before exec."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(command: Sequence[object], log: Path, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run a command with its output in `log`, handing each line to `on_line`.

    Raises:
        EnvironmentFailure: it failed; the message carries its last lines.
    """
    tail: deque[str] = deque(maxlen=30)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with (
        log.open("a") as sink,
        subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environ,
            preexec_fn=die_with_parent,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sink.write(line)
                tail.append(line)
                on_line(line)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code:
        shown = " ".join(str(part) for part in command)
        raise EnvironmentFailure(f"{shown}\nended with {code}; its last lines:\n{''.join(tail)}")


class InstallProgress:
    """One line about pip's work: redrawn on a terminal, printed now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.seen = total, 0
        self.terminal = sys.stderr.isatty()

    def __call__(self, line: str) -> None:
        if match := re.match(r"(?:Collecting|Processing) (?:\S*/)?([^\s=]+)", line):
            self.seen += 1
            self.show(f"[{self.seen:3d}/{self.total}] fetching {match[1]}", self.seen % 20 == 0)
        elif match := re.match(r"\s+Downloading (\S+) \(([\d.]+ [GM]B)\)", line):
            self.show(f"[{self.seen:3d}/{self.total}] downloading {match[1][:40]} ({match[2]})", False)
        elif line.startswith("Installing collected packages"):
            self.show(f"[{self.total}/{self.total}] unpacking (this takes a minute or two)", True)
        elif line.startswith("Successfully installed"):
            self.show("all packages are installed", True)

    def show(self, text: str, always: bool) -> None:
        if self.terminal:
            print(f"\r\033[K  {text}", end="" if not always else "\n", file=sys.stderr, flush=True)
        elif always:
            say(f"  {text}")


def works(python: Path) -> bool:
    """Return whether an environment's interpreter still runs (its Python may have been uninstalled)."""
    try:
        return subprocess.run([python, "-c", ""], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except OSError:
        return False


def build_once(folder: Path, build: Callable[[], None]) -> Path:
    """Run `build` for `folder` unless the folder is complete, and return its interpreter."""
    python = folder / "bin" / "python"
    if (folder / COMPLETE).exists() and works(python):
        return python
    with locked(folder.with_name(folder.name + ".lock")):
        if not ((folder / COMPLETE).exists() and works(python)):
            if folder.exists():
                say(f"removing the unfinished {folder}")
                # The marker goes first, so that an interruption here cannot leave a ruin that looks whole.
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)
            build()
            (folder / COMPLETE).touch()
    return python


def site_packages(folder: Path) -> Path:
    """Return the package folder of a virtual environment."""
    return folder / "lib" / "python{}.{}".format(*PYTHON_VERSION) / "site-packages"


def build_base(folder: Path, checkout: Path) -> None:
    """Install every pinned package into a fresh virtual environment at `folder`."""
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < NEEDED_BYTES:
        raise EnvironmentFailure(
            f"{folder.parent} has {free_bytes / 1e9:.1f} GB free, the environment needs "
            f"{NEEDED_BYTES / 1e9:.0f} GB; free some or point SGLANG_TPLA_CACHE at another disk"
        )
    requirements = requirements_file(checkout)
    total = sum("==" in line for line in requirements.read_text().splitlines())
    say(f"making the environment {folder}\n  {total} packages, some 8 GB: 4 to 10 minutes, once")
    venv.EnvBuilder(symlinks=True).create(folder)
    log = folder / "install.log"
    run([folder / "bin" / "python", "-m", "ensurepip", "--default-pip"], log)
    # The file is a whole lock: nothing is left to resolve.
    command = [folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--progress-bar", "off"]
    run([*command, "--disable-pip-version-check", "-r", requirements], log, InstallProgress(total))


def build_overlay(folder: Path, base: Path, checkout: Path) -> None:
    """Make the checkout's own virtual environment at `folder`, on top of the one at `base`."""
    say(f"making {folder} for {checkout}")
    venv.EnvBuilder(symlinks=True).create(folder)
    (folder / CHECKOUT_RECORD).write_text(str(checkout))
    # Use addsitedir and not a bare path, because the base has .pth files as well.
    link = f"import site; site.addsitedir({str(site_packages(base))!r})\n"
    (site_packages(folder) / "base_environment.pth").write_text(link)
    command = [base / "bin" / "python", "-m", "pip", "--python", folder / "bin" / "python", "install"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    try:
        run([*command, "-e", checkout], folder / "install.log")
    finally:
        # setuptools leaves a second copy of the metadata in the checkout; the installed one is in the overlay.
        shutil.rmtree(checkout / "sglang_tpla.egg-info", ignore_errors=True)
    check_overlay(folder, checkout)


def check_overlay(folder: Path, checkout: Path) -> None:
    """Make sure that the overlay runs this checkout and that SGLang will find its plug-in once.

    Raises:
        EnvironmentFailure: it does not.
    """
    program = (
        "import importlib.metadata as m, pathlib, sglang_tpla;"
        "print(pathlib.Path(sglang_tpla.__file__).resolve().parent.parent);"
        "print(len([e for e in m.entry_points(group='sglang.srt.plugins') if e.name == 'sglang_tpla']))"
    )
    done = subprocess.run([folder / "bin" / "python", "-I", "-c", program], capture_output=True, text=True)
    if done.returncode or done.stdout.split("\n")[:2] != [str(checkout), "1"]:
        raise EnvironmentFailure(
            f"{folder} should run {checkout} and show its plug-in once; it says "
            f"{done.stdout!r} {done.stderr!r}. Remove {folder} and try again"
        )


def prune(cache: Path) -> None:
    """Remove the overlays of checkouts that are gone."""
    for record in cache.glob(f"overlay-*/{CHECKOUT_RECORD}"):
        if not Path(record.read_text()).exists():
            (record.parent / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(record.parent, ignore_errors=True)
            record.parent.with_name(record.parent.name + ".lock").unlink(missing_ok=True)


def make(checkout: Path = CHECKOUT) -> Path:
    """Make the missing layers, and return the interpreter that runs this checkout.

    Raises:
        EnvironmentFailure: wrong Python, no disk space, no network, a broken pin.
    """
    if sys.version_info[:2] != PYTHON_VERSION or sys.platform != "linux":
        raise EnvironmentFailure(
            "SGLang's wheels and the pins are for Python {}.{} on Linux; this is Python {}.{} on {}. "
            "Run `make PYTHON=/path/to/python3.11 ...`".format(*PYTHON_VERSION, *sys.version_info[:2], sys.platform)
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError as error:
        raise EnvironmentFailure(
            f"{sys.executable} has no ensurepip; on Debian and Ubuntu install python3.11-venv, "
            "or run `make PYTHON=/path/to/another/python3.11 ...`"
        ) from error
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    base = cache / f"env-{base_key(checkout)}"
    overlay = cache / f"overlay-{overlay_key(checkout)}"
    build_once(base, lambda: build_base(base, checkout))
    prune(cache)
    return build_once(overlay, lambda: build_overlay(overlay, base, checkout))


def main() -> int:
    """Run the command line, which has no arguments, and return the exit code."""
    # SIGTERM must unwind like an interrupt, or pip would keep running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        print(make())
    except EnvironmentFailure as failure:
        say(f"error: {failure}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run starts over")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
