"""SGLang's entry points: the general plug-in and the CPU reference platform."""

from __future__ import annotations


def cpu_platform() -> str | None:
    """Qualified name of the CPU platform class; SGLang calls this only where it is asked for."""
    return "sglang_tpla.host.platform.CpuReferencePlatform"


def register() -> None:
    """Install the hooks of this process's role."""
