"""CPU reference platform: real SGLang servers on any x86 machine, without AMX, vllm or Triton.

This out-of-tree platform (entry point group ``sglang.srt.platforms``) is active only if
``SGLANG_PLATFORM=sglang_tpla_cpu`` asks for it, and chooses existing parts: gloo, the ``torch_native`` attention
backend, PyTorch sampling, and the absorbed MLA path. The class follows ``sglang/srt/platforms/interface.py`` and
``sglang/srt/mem_cache/kv_cache_configurator.py``. SGLang imports this module while it imports itself, so the methods
import everything else of SGLang.
"""

from typing import Any

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class CpuReferencePlatform(SRTPlatform):
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        from sglang_tpla.host.attention.supported import OURS
        from sglang_tpla.host.disaggregation.engine_memory import BYTES_CACHE
        from sglang_tpla.host.process import serves_decode

        # By now SGLang has chosen intel_amx for the device "cpu", but the kernels of intel_amx need AMX.
        if server_args.attention_backend in (None, "intel_amx"):
            # Only our own twin reads rows in bytes and takes several query tokens a request.
            ours = server_args.kv_cache_dtype == BYTES_CACHE or server_args.speculative_algorithm is not None
            server_args.attention_backend = OURS if ours and serves_decode() else "torch_native"
        server_args.sampling_backend = "pytorch"
        # Overlap scheduling hides CPU work behind a device; here both are the same cores.
        server_args.disable_overlap_schedule = True
        # An idle scheduler otherwise spins on a core that other processes need.
        server_args.sleep_on_idle = True

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Return the pool of one kind of model (from 0.5.22 on; older releases have a method a kind)."""
        return self.get_mla_kv_pool_cls() if kind == "mla" else None

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang_tpla.host.cpu.pool import CpuLatentPool

        return CpuLatentPool

    def get_paged_allocator_cls(self) -> Any:
        from sglang_tpla.host.cpu.pool import single_token_allocator

        return single_token_allocator

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Return True: before SGLang (0.5.21 on) asks, ``host/speculation.py`` has refused unsupported algorithms."""
        return True

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device(self, device_id: int = 0) -> Any:
        return torch.device("cpu")

    def get_torch_distributed_backend_str(self) -> str:
        return "gloo"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def init_backend(self) -> None:
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

        # torch_native reads keys from the pool, which holds latents, so only the absorbed path is right.
        AttentionBackendRegistry.register("torch_native", lambda attn, forward_batch: AttnForwardMethod.MLA)
