"""What the repository ships, for tests: a trained checkpoint, its artifacts, and the commands as a user runs them."""

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
