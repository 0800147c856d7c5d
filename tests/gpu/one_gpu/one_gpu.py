"""A plug-in of SGLang for tests alone: several tensor-parallel ranks where there is one GPU.

NCCL refuses two ranks on one device. With ``ONE_GPU=gloo`` a server's collectives run over gloo, right and slow, and
not in CUDA graphs; each rank is a "node" of its own (``--nnodes T --node-rank t``), so that all of them take GPU 0. The
folder is put on PYTHONPATH, where its ``dist-info`` shows the plug-in.
"""

import os
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Hook what chooses the backend of the process groups."""
    if os.environ.get("ONE_GPU") == "gloo":
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.distributed.bootstrap._resolve_backend", gloo, HookType.AROUND)


def gloo(original: Callable[..., str], **kwargs: Any) -> str:
    """Around ``_resolve_backend``."""
    return "gloo"
