"""Run kernels in Triton's interpreter, in a process of its own, because Triton chooses it at import."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def interpret(script: str) -> None:
    """Run a script beside the kernels' cases in ``tests/gpu``; it must end with 0."""
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS / 'gpu'}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
