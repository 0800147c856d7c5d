"""What differs between the supported SGLang releases, each thing asked of the release that is installed.

Every function says the same in all of them. Nothing here compares version numbers: each asks for the seam itself, so
that a release between two supported ones, where ``SGLANG_TPLA_ALLOW_UNKNOWN_HOST`` lets it start, gets the one it has.
The ledger (``patches/ledger.toml``) has the hooked targets of each release; ``docs/upgrading.md`` has the list of
differences.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

# Names of the switch for DeepGEMM's batched products, older one first; a release reads one of them.
DEEPGEMM_BMM = ("SGL_USE_DEEPGEMM_BMM", "SGLANG_USE_DEEPGEMM_BMM")


def resolved(args: Any) -> Any:
    """Server arguments as SGLang resolved them.

    Up to 0.5.18 the record itself is rewritten; since then it stays raw, and a view shows what was decided.
    """
    if hasattr(args, "get_model_config"):
        return args
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(args)


def is_resolved(args: Any) -> bool:
    """Whether this record has been through SGLang's resolution already (0.5.19 on: in a process before this one)."""
    return bool(getattr(args, "_resolution_finished", False))


def model_config(args: Any) -> Any:
    """SGLang's ModelConfig of a server's arguments."""
    if hasattr(args, "get_model_config"):
        return args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(args)


def decode_backend_name(args: Any) -> str:
    """The attention backend that computes decode steps, as SGLang resolved it."""
    if hasattr(args, "get_attention_backends"):
        return str(args.get_attention_backends()[1])
    from sglang.srt.arg_groups.model_override_base import attention_backends_of

    return str(attention_backends_of(resolved(args))[1])


def attention_groups(args: Any) -> int:
    """Attention groups of a server's ranks (data-parallel attention), before or after resolution; 1 without it."""
    if getattr(args, "enable_dp_attention", False):  # 0.5.23 turns the older pair of flags into attn_dp_size
        return int(args.dp_size)
    return int(getattr(args, "attn_dp_size", None) or 1)


def cpu_has_attention_groups() -> bool:
    """Whether data-parallel attention can run on a CPU: releases before 0.5.19 copy by a kernel and pin memory."""
    from sglang.srt.layers import dp_attention

    return hasattr(dp_attention, "memcpy_cpu")


def data_parallel_ranks(args: Any) -> int:
    """Ranks of a server among which its requests are dealt out, as replicas or as attention groups."""
    replicas = max(1, int(args.dp_size))
    return replicas if getattr(args, "enable_dp_attention", False) else replicas * attention_groups(args)


def uses_deepgemm_bmm() -> bool:
    """Whether SGLang is asked to keep absorbed weights in FP8 blocks, under either name of the switch."""
    return any(os.environ.get(name, "0").lower() in ("1", "true") for name in DEEPGEMM_BMM)


@contextlib.contextmanager
def attention_rank(rank: int, size: int) -> Iterator[None]:
    """While layers are built: their linear layers and head counts are those of rank ``rank`` of ``size``.

    The engine's groups stay as they are. Up to 0.5.20 linear layers take rank and size, later on a group; and later on
    ``override`` checks that the numbers agree with the groups, which ours must not. Then the same values are put
    where ``override`` puts them, without its check.
    """
    from sglang.srt import runtime_context
    from sglang.srt.layers import linear

    parallel = runtime_context.get_parallel()
    share: dict[str, Any] = {"attn_tp_rank": rank, "attn_tp_size": size}
    if not hasattr(runtime_context, "_validate_parallel"):
        with parallel.override(**share):
            yield
        return
    if hasattr(linear, "_LogicalGroup"):  # a share of the weights, without communication
        share["attn_tp_group"] = linear._LogicalGroup(rank_in_group=rank, world_size=size)
    saved = parallel._overrides
    parallel._overrides = {**saved, **share}
    try:
        yield
    finally:
        parallel._overrides = saved


def attention_share() -> dict[str, Any]:
    """Arguments of SGLang's linear layers for the share of this attention rank."""
    from sglang.srt.layers import linear
    from sglang.srt.runtime_context import get_parallel

    if hasattr(linear, "_LogicalGroup"):
        return {"parallel_group": "attn_tp"}
    parallel = get_parallel()
    return {"tp_rank": parallel.attn_tp_rank, "tp_size": parallel.attn_tp_size}


def speculates(args: Any | None) -> bool:
    """Whether a server guesses tokens; this process's where a caller was handed no arguments (0.5.19 on)."""
    if args is None:
        from sglang.srt.runtime_context import get_spec

        args = get_spec()
    return args.speculative_algorithm is not None


def factory_backends(factory: Any) -> dict[str, str]:
    """The attention backends "prefill" and "decode" that SGLang's ``DraftBackendFactory`` chooses between.

    Up to 0.5.17 it holds the server's arguments; later on it asks the process's settings.
    """
    args = getattr(factory, "server_args", None)
    if args is None:
        from sglang.srt.runtime_context import attention_backends

        prefill, decode = attention_backends()
    else:
        prefill, decode = args.prefill_attention_backend, args.decode_attention_backend
        prefill, decode = prefill or args.attention_backend, decode or args.attention_backend
    return {"prefill": str(prefill), "decode": str(decode)}


def reads_until_replay_ends() -> Any:
    """SGLang's word for a backend whose graph reads the page table to its end; None where it does not ask."""
    from sglang.srt.layers.attention import base_attn_backend

    ends = getattr(base_attn_backend, "SharedReadEnds", None)
    return None if ends is None else ends.POST_REPLAY
