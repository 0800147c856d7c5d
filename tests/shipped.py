"""What the repository ships, for tests: a trained checkpoint, its artifacts, and the commands as a user runs them."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "examples" / "nano-mla"
ARTIFACT = ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors"  # transform ``learned``
SKETCHED_ARTIFACT = ROOT / "examples" / "artifacts" / "nano-mla-g2-sketched.safetensors"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(name: str, *arguments: object) -> list[str]:
    """The words of ``python -m sglang_tpla.NAME``."""
    return [sys.executable, "-m", f"sglang_tpla.{name}", *map(str, arguments)]


def run_command(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    words = command(name, *arguments)
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=500)


def call_command(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call its ``main`` in this process, which has imported what a process of its own spends most of its time on."""
    words, out, err = [*map(str, arguments)], io.StringIO(), io.StringIO()
    main = importlib.import_module(f"sglang_tpla.{name}.__main__").main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
