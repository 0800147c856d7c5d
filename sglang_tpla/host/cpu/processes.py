"""Fork the processes of a server on the CPU reference platform instead of spawning them.

SGLang spawns because a forked process cannot use CUDA. Without CUDA, spawning only makes every rank and the detokenizer
import all of SGLang again: some ten seconds of processor time and 700 MB each. Forks share both. The hook comes after
``_set_envs_and_config`` of ``sglang/srt/entrypoints/engine.py``, which runs before any thread starts.
"""

import multiprocessing
from typing import Any


def fork_ranks(result: Any, server_args: Any) -> None:
    """Make the server's next processes forks of this one."""
    if server_args.device == "cpu":
        multiprocessing.set_start_method("fork", force=True)
