"""SGLang's entry points: the general plug-in and the CPU reference platform.

SGLang swallows any ordinary exception of a plug-in and serves on without it, so whatever goes wrong here ends the
process with ``SystemExit`` instead.
"""


def cpu_platform() -> str | None:
    """Return the qualified name of the CPU platform class; SGLang calls this only where it is asked for."""
    import os

    return (
        "sglang_tpla.host.cpu.platform.CpuReferencePlatform"
        if os.environ.get("SGLANG_PLATFORM") == "sglang_tpla_cpu"
        else None
    )


def register() -> None:
    """Install the hooks of this process's role.

    Raises:
        SystemExit: bad settings, an unknown SGLang, or a hook that did not apply.
    """
    try:
        from sglang_tpla.host import hooks

        hooks.register()
    except Exception as error:
        raise SystemExit(f"sglang_tpla refuses to start: {type(error).__name__}: {error}") from error
