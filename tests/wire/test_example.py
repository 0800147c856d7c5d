"""The example of two agents runs as its page says; it checks every row itself."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_agents_move_a_cache_between_processes() -> None:
    command = [sys.executable, str(ROOT / "examples/two_agents.py"), "--groups", "2", "--tokens", "640"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["group 0", "group 1"]
