"""The machine of a benchmark, and the share of it that the benchmark takes."""

import os
import platform
import resource
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def memory_bytes(limit_gib: float) -> int:
    """Return the bytes that one process may hold: the limit, or a fourteenth of the free memory if that is less."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return min(int(limit_gib * 2**30), int(line.split()[1]) * 1024 // 14)
    return int(limit_gib * 2**30)


def machine() -> dict[str, Any]:
    """Return the description of the machine."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "python": platform.python_version(),
    }


def header(device: str) -> dict[str, Any]:
    """Return what every result of servers and GPUs begins with: date, device and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "sglang": version("sglang"),
        "torch": torch.__version__,
    }


def cpu_seconds() -> float:
    """Return the processor time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
