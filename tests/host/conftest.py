"""SGLang in this process, on the CPU reference platform, with the decode layer's hooks and one real rank."""

import inspect
import os
import pkgutil
import warnings
from collections.abc import Iterator

import pytest

from tests.ports import free_ports

os.environ.setdefault("SGLANG_PLATFORM", "sglang_tpla_cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def imported() -> None:
    """SGLang and the modules that import it, without the warnings of SGLang's imports on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        import sglang_tpla.host.disaggregation.aborts
        import sglang_tpla.host.disaggregation.bootstrap_server
        import sglang_tpla.host.disaggregation.kv_manager
        import sglang_tpla.host.disaggregation.kv_sender_receiver
        import sglang_tpla.host.requests.admission
        import sglang_tpla.host.requests.edge
        import sglang_tpla.host.requests.guard  # noqa: F401


@pytest.fixture(scope="session")
def engine(imported: None, nano_mla: str) -> Iterator[None]:
    """SGLang's process-wide state: published arguments, gloo, one tensor-parallel rank, hooked layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.models.deepseek_v2  # noqa: F401
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    from sglang_tpla.host import compat, ledger

    torch.set_num_threads(1)
    args = ServerArgs(
        model_path=nano_mla,
        device="cpu",
        dtype="float32",
        max_total_tokens=4096,
        disable_shared_experts_fusion=True,  # Kimi-VL's loader does not know fused shared experts
    )
    if hasattr(runtime_context, "SpawnRanks"):  # later releases ask the launcher for the rank
        publish(args, role="test", ranks=runtime_context.SpawnRanks(world_rank=0))
    else:
        publish(args, role="test")
    (port,) = free_ports(1)
    init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"tcp://127.0.0.1:{port}"
    )
    initialize_model_parallel()
    older = "model_config" in inspect.signature(initialize_dp_attention).parameters
    initialize_dp_attention(args, *([compat.model_config(args)] if older else []))
    for hook in ledger.load():
        if hook.implementation.startswith(("sglang_tpla.host.model.attention_layer:", "sglang_tpla.host.cpu.rope:")):
            function = pkgutil.resolve_name(hook.implementation)
            HookRegistry.register(hook.target_in(ledger.host_version()), function, HookType(hook.kind))
    HookRegistry.apply_hooks()
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture(params=[False, True], ids=["separate", "one-write"])
def one_write(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether norm, projection and cache write are one step, as on a GPU; the twin replaces the kernel."""
    if request.param:
        from sglang_tpla.host.model import attention_layer

        monkeypatch.setattr(attention_layer, "defers", lambda latent: True)
    return request.param
