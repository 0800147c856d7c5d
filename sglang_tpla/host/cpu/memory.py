"""A memory budget for each rank of the CPU reference platform.

On a CPU every rank sees the memory of the whole machine and would take most of it for its cache; two ranks would take
it twice. Here each rank may use a twelfth of the machine's memory, or ``SGLANG_TPLA_CPU_MEMORY_BYTES``, for weights and
cache, beyond the memory that the process held when it first asked. The hook follows ``get_available_gpu_memory`` of
``sglang/srt/utils/common.py``.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import psutil
import torch

from sglang_tpla.config import CPU_MEMORY_VARIABLE, ConfigError, parsed

SHARE = 12


def budget_bytes() -> int:
    """Return the memory budget of one rank in bytes.

    Raises:
        ConfigError: the variable is not a whole number, or is negative.
    """
    given: int = parsed(os.environ.get(CPU_MEMORY_VARIABLE, "0"), "int", CPU_MEMORY_VARIABLE)
    if given < 0:
        raise ConfigError(
            f"{CPU_MEMORY_VARIABLE} must be a number of bytes, or 0 for a share of the machine; got {given}"
        )
    return given or psutil.virtual_memory().total // SHARE


@cache
def _baseline_bytes() -> int:
    return psutil.Process().memory_info().rss


def available_gib(
    original: Callable[..., float],
    device: str,
    gpu_id: int,
    distributed: bool = False,
    empty_cache: bool = True,
    cpu_group: Any = None,
) -> float:
    """Hook around ``get_available_gpu_memory``: return the GiB left of the budget, or the least over all ranks."""
    if device != "cpu":
        return original(device, gpu_id, distributed, empty_cache, cpu_group)
    baseline = _baseline_bytes()
    left = torch.tensor(float(budget_bytes() - (psutil.Process().memory_info().rss - baseline)))
    if distributed:
        torch.distributed.all_reduce(left, op=torch.distributed.ReduceOp.MIN, group=cpu_group)
    return left.item() / (1 << 30)
