"""How a server on the CPU reference platform starts its processes: forked from the first one, not spawned.

SGLang spawns because a forked process cannot use CUDA. Here there is none, and spawning makes every rank and the
detokenizer import all of SGLang again: some ten seconds of processor time and 700 MB each. Forks share both.
After ``_set_envs_and_config`` in ``sglang/srt/entrypoints/engine.py``, which runs before any thread is started.
"""

from __future__ import annotations

import multiprocessing
from typing import Any


def fork_ranks(result: Any, server_args: Any) -> None:
    """Let the server's next processes be forks of this one."""
    if server_args.device == "cpu":
        multiprocessing.set_start_method("fork", force=True)
