"""The differences between the supported SGLang releases, behind functions that mean the same in all of them.

No function compares version numbers. Each function looks for the seam itself in the installed release, so the answer is
also right in a release between two supported ones, which ``SGLANG_TPLA_ALLOW_UNKNOWN_HOST`` may let start. The ledger
(``patches/ledger.toml``) has the hooked targets of each release; ``docs/upgrading.md`` lists the differences.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

# The switch for DeepGEMM's batched products has two names, the older one first; a release reads one of them.
DEEPGEMM_BMM = ("SGL_USE_DEEPGEMM_BMM", "SGLANG_USE_DEEPGEMM_BMM")


def resolved(args: Any) -> Any:
    """Return the server arguments as SGLang resolved them.

    SGLang up to 0.5.18 rewrites the record itself; later releases leave it raw and show their decisions in a view.
    """
    if hasattr(args, "get_model_config"):
        return args
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(args)


def is_resolved(args: Any) -> bool:
    """Return whether SGLang has already resolved this record; from 0.5.19 on an earlier process may have done so."""
    return bool(getattr(args, "_resolution_finished", False))


def default_of(kind: type, name: str) -> Any:
    """Return the default of a ``ServerArgs`` argument, or None where the release has no such argument."""
    found = inspect.signature(kind).parameters.get(name)
    return None if found is None else found.default


def model_config(args: Any) -> Any:
    """Return SGLang's ModelConfig of a server's arguments."""
    if hasattr(args, "get_model_config"):
        return args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(args)


def decode_backend_name(args: Any) -> str:
    """Return the attention backend that computes decode steps, as SGLang resolved it."""
    if hasattr(args, "get_attention_backends"):
        return str(args.get_attention_backends()[1])
    from sglang.srt.arg_groups.model_override_base import attention_backends_of

    return str(attention_backends_of(resolved(args))[1])


def attention_groups(args: Any) -> int:
    """Return the number of attention groups (data-parallel attention), before or after resolution; 1 without them."""
    if getattr(args, "enable_dp_attention", False):  # 0.5.23 turns this older pair of flags into attn_dp_size
        return int(args.dp_size)
    return int(getattr(args, "attn_dp_size", None) or 1)


def attention_groups_flag(args: Any) -> str:
    """Return the flag by which a server was asked for attention groups."""
    return "--enable-dp-attention" if getattr(args, "enable_dp_attention", False) else "--attn-dp-size"


def cpu_has_attention_groups() -> bool:
    """Return whether data-parallel attention can run on a CPU; before 0.5.19 it needs a kernel and pinned memory."""
    from sglang.srt.layers import dp_attention

    return hasattr(dp_attention, "memcpy_cpu")


def data_parallel_ranks(args: Any) -> int:
    """Return the number of replicas or attention groups over which a server distributes its requests."""
    replicas = max(1, int(args.dp_size))
    return replicas if getattr(args, "enable_dp_attention", False) else replicas * attention_groups(args)


def uses_deepgemm_bmm() -> bool:
    """Return whether either name of the switch asks SGLang to keep absorbed weights in FP8 blocks."""
    return any(os.environ.get(name, "0").lower() in ("1", "true") for name in DEEPGEMM_BMM)


@contextlib.contextmanager
def attention_rank(rank: int, size: int) -> Iterator[None]:
    """Build layers with the linear layers and head counts of rank ``rank`` of ``size``.

    The engine's groups stay as they are. Linear layers take a rank and a size up to 0.5.20, and a group in later
    releases, whose ``override`` also checks that the numbers agree with the groups. Our numbers must differ from the
    groups, so in those releases this function stores the values where ``override`` would, without the check.
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
    """Return the arguments of SGLang's linear layers for the share of this attention rank."""
    from sglang.srt.layers import linear
    from sglang.srt.runtime_context import get_parallel

    if hasattr(linear, "_LogicalGroup"):
        return {"parallel_group": "attn_tp"}
    parallel = get_parallel()
    return {"tp_rank": parallel.attn_tp_rank, "tp_size": parallel.attn_tp_size}


def speculates(args: Any | None) -> bool:
    """Return whether a server guesses tokens; without arguments (from 0.5.19 on) the answer is about this process."""
    if args is None:
        from sglang.srt.runtime_context import get_spec

        args = get_spec()
    return args.speculative_algorithm is not None


def samples_by_seed(args: Any) -> bool:
    """Whether a server samples by the requests' seeds; the second flag turns the first one on, later than here."""
    return bool(
        getattr(args, "enable_deterministic_inference", False) or getattr(args, "rl_on_policy_target", None) is not None
    )


def factory_backends(factory: Any) -> dict[str, str]:
    """Return the attention backends "prefill" and "decode" between which SGLang's ``DraftBackendFactory`` chooses.

    The factory holds the server's arguments up to 0.5.17, and reads the process's settings later.
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
    """Return SGLang's constant for a backend whose graph reads the page table to its end, or None where it has none."""
    from sglang.srt.layers.attention import base_attn_backend

    ends = getattr(base_attn_backend, "SharedReadEnds", None)
    return None if ends is None else ends.POST_REPLAY


def captures_graphs() -> bool:
    """Return whether SGLang is capturing CUDA graphs in this process, or warming up for a capture."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

    return bool(get_is_capture_mode())


def control_group(scheduler: Any) -> Any:
    """Return the process group, on the CPU, of the ranks among which SGLang distributes control requests."""
    args = resolved(scheduler.server_args)
    local = attention_groups(args) > 1 and args.enable_dp_attention_local_control_broadcast
    return (scheduler.attn_tp_group if local else scheduler.tp_group).cpu_group
