"""A plug-in of SGLang, only for tests, that runs several tensor-parallel ranks on one GPU.

NCCL refuses two ranks on one device. With ``ONE_GPU=gloo`` a server's collectives run over gloo: they are right but
slow, and cannot be in CUDA graphs. Each rank is a separate "node" (``--nnodes T --node-rank t``), so that all of them
take GPU 0. Tests put this folder on PYTHONPATH, where SGLang finds the plug-in by its ``dist-info``.
"""

import os
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Hook the function that chooses the backend of the process groups."""
    if os.environ.get("ONE_GPU") == "gloo":
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.distributed.bootstrap._resolve_backend", gloo, HookType.AROUND)


def gloo(original: Callable[..., str], **kwargs: Any) -> str:
    """Return gloo in place of ``_resolve_backend``'s choice."""
    return "gloo"
