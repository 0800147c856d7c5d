"""The example of two agents runs as its page says. The example checks every row itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_two_agents_move_a_cache_between_processes() -> None:
    command = [sys.executable, str(ROOT / "examples/two_agents.py"), "--groups", "2", "--tokens", "640"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["group 0", "group 1"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("SGLANG_TPLA_KYES", "did you mean SGLANG_TPLA_KEYS?"), ("SGLANG_TPLA_KEYS", "expected a key in /nonexistent")],
)
def test_keys_that_are_no_good_end_it_in_one_line(name: str, said: str) -> None:
    environ = os.environ | {name: "/nonexistent"}
    command = [sys.executable, str(ROOT / "examples/two_agents.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
