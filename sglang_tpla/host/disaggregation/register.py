"""Make ``tpla`` one of SGLang's transfer backends: its enumeration and its class table are both closed."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from sglang.srt.disaggregation.base import KVArgs
from sglang.srt.disaggregation.utils import KVClassType
from sglang.srt.disaggregation.utils import TransferBackend as _Stock

# The members of SGLang's enumeration and ours; SGLang compares them by identity within this one class.
TransferBackend = Enum(  # type: ignore[misc]
    "TransferBackend", {**{member.name: member.value for member in _Stock}, "TPLA": "tpla"}
)


def kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: KVClassType) -> Any:
    """Around ``get_kv_class``."""
    if getattr(transfer_backend, "value", None) != "tpla":
        return original(transfer_backend, class_type)
    from sglang_tpla.host.disaggregation import bootstrap_server
    from sglang_tpla.host.disaggregation import kv_manager as ours

    return {
        KVClassType.KVARGS: KVArgs,
        KVClassType.MANAGER: ours.TplaKVManager,
        KVClassType.SENDER: ours.TplaKVSender,
        KVClassType.RECEIVER: ours.TplaKVReceiver,
        KVClassType.BOOTSTRAP_SERVER: bootstrap_server.TplaKVBootstrapServer,
    }[class_type]
