"""Make ``tpla`` one of SGLang's transfer backends, whose enumeration and class table are both closed."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from sglang.srt.disaggregation.base import KVArgs
from sglang.srt.disaggregation.utils import KVClassType
from sglang.srt.disaggregation.utils import TransferBackend as _Stock

# This enumeration has SGLang's members and ours, because SGLang compares them by identity within one class.
TransferBackend = Enum(  # type: ignore[misc]
    "TransferBackend", {**{member.name: member.value for member in _Stock}, "TPLA": "tpla"}
)


def kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: KVClassType) -> Any:
    """Hook around ``get_kv_class``: return this package's classes for ``tpla``."""
    if getattr(transfer_backend, "value", None) != "tpla":
        return original(transfer_backend, class_type)
    from sglang_tpla.host.disaggregation import bootstrap_server, kv_manager, kv_sender_receiver

    return {
        KVClassType.KVARGS: KVArgs,
        KVClassType.MANAGER: kv_manager.TplaKVManager,
        KVClassType.SENDER: kv_sender_receiver.TplaKVSender,
        KVClassType.RECEIVER: kv_sender_receiver.TplaKVReceiver,
        KVClassType.BOOTSTRAP_SERVER: bootstrap_server.TplaKVBootstrapServer,
    }[class_type]
