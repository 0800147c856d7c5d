"""Apply the ledger's hooks in this process, and prove that they are in place or stop the process.

SGLang logs and swallows a hook that fails to apply and then serves unpatched. So this module applies the hooks, looks
each target up again, and ends the process if one is missing, with the ``SystemExit`` that SGLang's plug-in loader lets
through.
"""

import logging
import os
import pkgutil
from collections.abc import Callable, Collection
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_tpla.config import UNCHECKED_VARIABLE, ConfigError, Settings
from sglang_tpla.host import ledger, process
from sglang_tpla.host.attention.supported import OURS

logger = logging.getLogger(__name__)


def is_in_place(hook: ledger.Hook, function: Callable[..., Any]) -> bool:
    """Return whether the target in SGLang now leads to ``function``."""
    current = pkgutil.resolve_name(hook.target_in(ledger.host_version()))
    if isinstance(function, type):
        return current is function
    while current is not None:
        cells = [cell.cell_contents for cell in getattr(current, "__closure__", None) or ()]
        if any(content is function for content in cells):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def install(roles: Collection[str]) -> None:
    """Check, apply and verify every hook of the process's roles.

    Raises:
        SystemExit: an unknown host, or a hook that is not in place.
    """
    release, supported = ledger.host_version(), ledger.supported_releases()
    hooks = [hook for hook in ledger.load() if set(roles) & set(hook.roles) and hook.applies_in(release, supported)]
    problems = [problem for hook in hooks if (problem := ledger.check(hook))]
    if hooks and release not in supported:
        problems.insert(0, f"SGLang {release} is not supported (these are: {', '.join(supported)})")
    if gone := [words for hook in hooks if (words := ledger.missing(hook))]:
        raise ledger.refuse(
            f"the installed SGLang lacks what has to be hooked, so that {UNCHECKED_VARIABLE}=1 cannot help: "
            f"{'; '.join(gone)}. Install one of SGLang {', '.join(supported)}"
        )
    if problems and os.environ.get(UNCHECKED_VARIABLE) == "1":
        logger.warning("%s=1: going on although %s", UNCHECKED_VARIABLE, "; ".join(problems))
    elif problems:
        raise ledger.refuse(
            "the installed SGLang differs from what its hooks were written for: "
            + "; ".join(problems)
            + f". Install a supported release, or set {UNCHECKED_VARIABLE}=1 to go on at your own risk"
        )
    functions = [pkgutil.resolve_name(hook.implementation) for hook in hooks]
    for hook, function in zip(hooks, functions, strict=True):
        HookRegistry.register(hook.target_in(release), function, HookType(hook.kind))
    HookRegistry.apply_hooks()
    missing = [h.target_in(release) for h, f in zip(hooks, functions, strict=True) if not is_in_place(h, f)]
    if missing:
        raise ledger.refuse(f"these hooks did not apply: {', '.join(missing)} (SGLang's log above says why)")
    process.HOOKED[:] = [hook.target for hook in hooks]


def register() -> None:
    """Run the plug-in's entry point.

    Raises:
        SystemExit: bad settings, or a refusal by `install`.
    """
    try:
        settings = Settings.from_environment(os.environ)
    except ConfigError as error:
        raise ledger.refuse(str(error)) from error
    roles = {settings.role} if settings else set()
    if os.environ.get("SGLANG_PLATFORM") == "sglang_tpla_cpu":
        roles.add(ledger.CPU)
    install(roles)
    if settings is None:
        return
    # SGLang's command line refuses names that a plug-in has not added to its choices.
    from sglang.srt.server_args import add_attention_backend_choices, add_disagg_transfer_backend_choices

    add_disagg_transfer_backend_choices(["tpla"])
    if settings.role == "decode":
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        add_attention_backend_choices([OURS])
        register_attention_backend(OURS)(decode_backend)


def decode_backend(runner: Any) -> Any:
    """Make our attention backend for a model runner; only then are its kernels imported."""
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    return TplaDecodeBackend(runner)
