"""Commands that import SGLang, run by forks of one process that has imported the libraries SGLang imports.

These imports take ten seconds, ten times what SGLang's own modules take. A fork begins with neither SGLang nor this
package in memory, so that hooks, settings and refusals are those of a process of its own; what the libraries read from
the environment at import is that of the first process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# What takes long among the imports of SGLang's server. A release that needs other ones is only slower.
LIBRARIES = (
    "torch", "torch._inductor.kernel.flex", "torchvision", "triton", "transformers", "transformers.models.auto",
    "transformers.quantizers", "sklearn", "networkx", "flashinfer", "compressed_tensors", "openai", "fastapi",
    "aiohttp", "gguf", "xgrammar", "IPython", "uvicorn",
)  # fmt: skip
HANGS_S = 300


@dataclass(frozen=True)
class Forks:
    """The process whose forks run commands."""

    process: subprocess.Popen[bytes]

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Forks]:
        """Start the process and have it import the libraries; end it afterwards."""
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.forking"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        with process:
            try:
                yield cls(process)
            finally:
                process.kill()

    def run(
        self, *command: str, env: Mapping[str, str], cwd: Path = ROOT, path: Sequence[Path] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Do what ``python *command`` does, which is ``-m MODULE ...`` or ``-c CODE``, with ``path`` before others."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/err"]
            job = {"command": command, "env": dict(env), "cwd": str(cwd), "path": [*map(str, path)], "files": files}
            self.process.stdin.write(f"{json.dumps(job)}\n".encode())
            pid = int(self.process.stdout.readline())
            if not select.select([self.process.stdout], [], [], HANGS_S)[0]:
                os.killpg(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, HANGS_S, *(Path(file).read_bytes() for file in files))
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(command, code, *(Path(file).read_text() for file in files))


def serve() -> None:
    """Import the libraries, then fork once a line of stdin and answer with the fork's id and exit code."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    ours = [name for name in sys.modules if name.partition(".")[0] in ("sglang", "sglang_tpla", "sglang_router")]
    assert not ours, ours
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            pid = os.fork()
            if not pid:
                answers.close()
                become(**json.loads(line))
            print(pid, file=answers, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def become(command: list[str], env: dict[str, str], cwd: str, path: list[str], files: list[str]) -> NoReturn:
    """Run a command in this process, which ends with the command's exit code."""
    os.setsid()
    for number, file in enumerate(("/dev/null", *files)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = path
    os.execve = replaced  # type: ignore[assignment]
    try:
        python(command)
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def replaced(program: str, command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do what the program that a command replaces itself by would do, in place of `os.execve`."""
    assert program == sys.executable, program
    os.environ.clear()
    os.environ.update(environment)
    python(command[1:])
    sys.exit(0)


def python(command: Sequence[str]) -> None:
    """Do what ``python *command`` does."""
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    assert kind == "-c", kind
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    exec(what, module.__dict__)


if __name__ == "__main__":
    serve()
