"""A plug-in of SGLang for tests alone: several tensor-parallel ranks where there is one GPU.

NCCL refuses two ranks on one device. With ``ONE_GPU=gloo`` a server's collectives run over gloo, right and slow, and
not in CUDA graphs; each rank is a "node" of its own (``--nnodes T --node-rank t``), so that all of them take GPU 0.
With ``ONE_GPU=alone`` rank 0 runs without the others and its collectives do nothing, for timing one rank's own work:
its answers mean nothing. The folder is put on PYTHONPATH, where its ``dist-info`` shows the plug-in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Hook what chooses and makes process groups."""
    mode = os.environ.get("ONE_GPU")
    if mode is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    bootstrap = "sglang.srt.distributed.bootstrap"
    if mode == "gloo":
        HookRegistry.register(f"{bootstrap}._resolve_backend", gloo_backend, HookType.AROUND)
    elif mode == "alone":
        HookRegistry.register(f"{bootstrap}.init_distributed_environment", alone, HookType.AROUND)
    else:
        raise SystemExit(f"ONE_GPU must be gloo or alone; got {mode!r}")


def gloo_backend(original: Callable[..., str], **kwargs: Any) -> str:
    """Around ``_resolve_backend``."""
    return "gloo"


def alone(original: Callable[..., None], **kwargs: Any) -> None:
    """Around ``init_distributed_environment``: groups of the full size with no other member."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=kwargs["rank"], world_size=kwargs["world_size"])
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, **options: new_group(ranks, backend="fake")
    original(**kwargs)
