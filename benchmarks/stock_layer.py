"""SGLang's own MLA attention layer beside this package's, in one process on one GPU, under CUDA graphs.

    python benchmarks/stock_layer.py [--out FILE] [--ranks 8] [--weights bf16 fp8] [--loads 1x8192 16x8192 ...]

Both are SGLang's ``DeepseekV2AttentionMLA`` at DeepSeek-V3's sizes with one rank's heads and random weights: once as
SGLang builds it (FlashInfer fa3), once hooked as a decode server hooks it, with g = 1 (the same weights, the same cache
and the same attention kernel) and with g = 2 on this package's kernel. No collective runs: a rank's ``o_proj`` is not
reduced. Four layers a graph, more weights than the L2 cache holds; graphs take turns, medians over replays. The kernels
of a replay are listed too, as the profiler saw them. Needs SGLang.
"""

import argparse
import json
import os
import pkgutil
import socket
import statistics
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.plan.model import BUILT_IN, PlanModel, find

LAYERS = 4
EPS = 1e-6
DEVICE = "cuda"
LOADS = ("1x2048", "1x8192", "1x32768", "4x8192", "16x8192", "64x8192")


class OneGroup:
    """Stands where the artifact does: the maps of every layer."""

    def __init__(self, maps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        self._maps = maps
        self.meta = SimpleNamespace(widths=[maps[0][0].shape[1]])

    def maps(self, layer: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Z, A and B of a group."""
        return self._maps[group]


def start_engine() -> None:
    """SGLang's process-wide state for one rank, with the decode layer's hooks."""
    os.environ.setdefault("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
    os.environ.setdefault("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "0")
    import sglang.srt.models.deepseek_v2  # noqa: F401
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    from sglang_tpla.host import ledger

    folder = tempfile.mkdtemp(prefix="stock_layer_")
    example = json.loads((Path(__file__).parents[1] / "examples/nano-mla/config.json").read_text())
    sizes = BUILT_IN["deepseek-v3"] | {"num_hidden_layers": LAYERS, "num_key_value_heads": 128}
    Path(folder, "config.json").write_text(json.dumps(example | sizes))
    args = ServerArgs(
        model_path=folder,
        device=DEVICE,
        dtype="bfloat16",
        attention_backend="flashinfer",
        max_total_tokens=4096,
        skip_tokenizer_init=True,
    )
    publish(args, role="benchmark")
    initialize_fp8_gemm_config(args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    init_distributed_environment(backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=address)
    initialize_model_parallel()
    initialize_dp_attention(args, args.get_model_config())
    for hook in ledger.load():
        if hook.implementation.startswith("sglang_tpla.host.model.attention_layer:"):
            HookRegistry.register(hook.target, pkgutil.resolve_name(hook.implementation), HookType(hook.kind))
    HookRegistry.apply_hooks()


def build(
    model: PlanModel, ranks: int, groups: int, width: int, weights: str, stock: bool, one_write: bool
) -> list[Any]:
    """Layers of rank 0, weights drawn from one seed."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.models.deepseek_common.deepseek_weight_loader import DeepseekV2WeightLoaderMixin
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
    from sglang.srt.runtime_context import get_parallel

    from sglang_tpla.config import Layout
    from sglang_tpla.host.model import attention_layer as hooked
    from sglang_tpla.host.process import Slice

    d = model.latent_dim
    if width == d:
        maps = [(torch.eye(d), torch.eye(d), torch.eye(d))] * groups
    else:
        g = torch.Generator().manual_seed(1)
        z = [torch.randn(d, width, generator=g) / d**0.5 for _ in range(groups)]
        maps = [(m, m.T.contiguous(), m.T.contiguous()) for m in z]
    part = None if stock else Slice(Layout(ranks, groups, model.heads), 0, OneGroup(maps))  # type: ignore[arg-type]
    hooked.make_slice = lambda heads, rank, size: part
    hooked.settings = lambda: SimpleNamespace(o_proj="replicate")
    hooked.defers = lambda latent: one_write
    quantised = None
    if weights == "fp8":
        quantised = Fp8Config(
            is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
        )
    config = SimpleNamespace(
        rms_norm_eps=EPS, rope_interleave=True, architectures=["DeepseekV3ForCausalLM"], num_hidden_layers=LAYERS
    )
    side_stream = torch.cuda.Stream()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    layers = []
    with get_parallel().override(attn_tp_rank=0, attn_tp_size=ranks), torch.device(DEVICE):
        for index in range(LAYERS):
            attention = DeepseekV2AttentionMLA(
                config=config,
                hidden_size=model.hidden,
                num_heads=model.heads,
                qk_nope_head_dim=model.nope_dim,
                qk_rope_head_dim=model.rope_dim,
                v_head_dim=model.value_dim,
                q_lora_rank=model.q_lora_rank,
                kv_lora_rank=d,
                rope_theta=10000.0,
                rope_scaling={
                    "factor": 40.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
                max_position_embeddings=4096,
                quant_config=quantised,
                reduce_results=False,
                layer_id=index,
                prefix=f"model.layers.{index}.self_attn",
                alt_stream=side_stream,
            )
            layers.append(attention)
    torch.set_default_dtype(torch.float32)
    for attention in layers:
        fill(attention)
        for module in attention.modules():
            method = getattr(module, "quant_method", None)
            if method is not None and hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading(module)

    class Holder(DeepseekV2WeightLoaderMixin, torch.nn.Module):
        """As much of a model as the loader's last step needs."""

    holder = Holder()
    holder.model = torch.nn.Module()
    holder.model.layers = torch.nn.ModuleList([torch.nn.Module() for _ in layers])
    for shell, attention in zip(holder.model.layers, layers, strict=True):
        shell.self_attn = attention
    holder.model.start_layer, holder.model.end_layer = 0, LAYERS
    holder.config, holder.quant_config = config, quantised
    holder.post_load_weights()
    return layers


def fill(attention: torch.nn.Module) -> None:
    """Random weights whose outputs have about unit size."""
    for name, parameter in attention.named_parameters():
        if "scale" in name:
            parameter.data.fill_(0.02 / 3)
        elif "layernorm" in name:
            parameter.data.normal_(1.0, 0.1)
        elif parameter.dtype == torch.float8_e4m3fn:
            parameter.data.copy_(torch.randn(parameter.shape, device=DEVICE) * 3)
        else:
            parameter.data.normal_(0.0, 0.02)


class Step:
    """A decode step of some layers over a random cache: planned, captured, replayed."""

    def __init__(
        self, layers: list[Any], model: PlanModel, ranks: int, groups: int, batch: int, context: int, ours: bool
    ) -> None:
        from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
        from sglang.srt.runtime_context import get_parallel

        width = getattr(layers[0], "tpla_width", model.latent_dim)
        g = torch.Generator(DEVICE).manual_seed(2)
        pool = MLATokenToKVPool(
            batch * context + 64, 1, torch.bfloat16, width, model.rope_dim, LAYERS, DEVICE, enable_memory_saver=False
        )
        for buffer in pool.kv_buffer:
            buffer.normal_(generator=g)
        slots = torch.randperm(batch * context, generator=g, device=DEVICE).view(batch, context).int() + 1
        runner = SimpleNamespace(
            model_config=SimpleNamespace(
                context_len=context,
                num_attention_heads=model.heads * groups,
                kv_lora_rank=width,
                qk_nope_head_dim=model.nope_dim,
                qk_rope_head_dim=model.rope_dim,
                v_head_dim=model.value_dim,
                scaling=layers[0].scaling,
                dtype=torch.bfloat16,
            ),
            device=DEVICE,
            gpu_id=0,
            dtype=torch.bfloat16,
            kv_cache_dtype=torch.bfloat16,
            page_size=1,
            req_to_token_pool=SimpleNamespace(req_to_token=slots, size=batch),
            token_to_kv_pool=pool,
            token_to_kv_pool_allocator=SimpleNamespace(),
            server_args=SimpleNamespace(page_size=1),
        )
        with get_parallel().override(attn_tp_rank=0, attn_tp_size=ranks):
            if ours:
                from sglang_tpla.host.attention import backend as decode_attention

                decode_attention.artifact = lambda: SimpleNamespace(meta=SimpleNamespace(widths=[width]))
                self.backend: Any = decode_attention.TplaDecodeBackend(runner)
                self.backend.decode_attention_backend_str = "tpla"
            else:
                self.backend = FlashInferMLAAttnBackend(runner, skip_prefill=True)
        lengths = torch.full((batch,), context, dtype=torch.int64, device=DEVICE)
        positions = lengths - 1
        self.batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=batch,
            input_ids=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
            req_pool_indices=torch.arange(batch, device=DEVICE),
            seq_lens=lengths,
            seq_lens_cpu=lengths.cpu(),
            out_cache_loc=slots[:, -1].long().contiguous(),
            seq_lens_sum=batch * context,
            positions=positions,
        )
        self.layers, self.positions = layers, positions
        self.x = torch.randn(batch, model.hidden, generator=g, device=DEVICE).bfloat16()
        self.pool = pool
        self.out = self.x
        self.graph = self._capture()

    def _forward(self) -> torch.Tensor:
        from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context

        out = self.x
        for attention in self.layers:
            inputs = AttentionInputs(self.x, self.batch, attention.prepare_qkv_latent)
            get_attn_tp_context().set_attn_inputs(inputs)
            out = attention(self.positions, self.x, self.batch, zero_allocator=None)
            get_attn_tp_context().clear_attn_inputs()
        return out

    def _capture(self) -> torch.cuda.CUDAGraph:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
        from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.backend)), model_capture_mode():
            size = self.batch.batch_size
            self.backend.init_cuda_graph_state(size, size)
            self.backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
            for _ in range(2):
                self._forward()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self.backend.init_forward_metadata_in_graph(self.batch)
                self.out = self._forward()
        self.backend.init_forward_metadata_out_graph(self.batch)
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def replay_s(self) -> float:
        """One replay's seconds a layer."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / LAYERS

    def kernels(self) -> list[dict[str, Any]]:
        """Kernels of one layer of a replay, in the order they ran; microseconds as the profiler saw them."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.graph.replay()
            torch.cuda.synchronize()
        events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda e: e.time_range.start)
        last = events[-(len(events) // LAYERS) :]
        first = last[0].time_range.start
        return [
            {"name": e.name[:120], "us": round(e.time_range.elapsed_us(), 2)}
            | {"start_us": round(e.time_range.start - first, 2)}
            for e in last
        ]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, saved as it comes."""
    from decode_kernel import environment

    model = find("deepseek-v3")
    report: dict[str, Any] = {"environment": environment(), "gpu": torch.cuda.get_device_name(), "rows": []}
    report["kernels"] = {}
    start_engine()
    forms = {  # stock, groups, width, one kernel for the write, our attention kernel
        "stock": (True, 1, 512, False, False),
        "g=1, separate kernels": (False, 1, 512, False, False),
        "g=1": (False, 1, 512, True, False),
        "g=2, width 256": (False, 2, 256, True, True),
        "g=2, width 320": (False, 2, 320, True, True),
        "g=2, width 320, separate kernels": (False, 2, 320, False, True),
    }
    for weights in arguments.weights:
        built: dict[str, list[Any]] = {}
        for name, (stock, groups, width, one_write, _) in forms.items():
            with report_failure(report, f"{name}, {weights}"):
                built[name] = build(model, arguments.ranks, groups, width, weights, stock, one_write)
        for load in arguments.loads:
            batch, context = (int(part) for part in load.split("x"))
            steps: dict[str, Step] = {}
            for name, layers in built.items():
                _, groups, _, one_write, ours = forms[name]
                from sglang_tpla.host.model import attention_layer as hooked

                hooked.defers = lambda latent, one=one_write: one
                with report_failure(report, f"{name}, {weights}, {load}"):
                    steps[name] = Step(layers, model, arguments.ranks, groups, batch, context, ours)
            samples: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(arguments.replays):
                for name, step in steps.items():
                    samples[name].append(step.replay_s())
            for name, seconds in samples.items():
                cuts = statistics.quantiles(seconds, n=10)
                row = {"form": name, "weights": weights, "ranks": arguments.ranks, "batch": batch}
                row |= {"context": context, "us": round(statistics.median(seconds) * 1e6, 3)}
                row |= {"p10_us": round(cuts[0] * 1e6, 3), "p90_us": round(cuts[-1] * 1e6, 3)}
                if "stock" in steps:
                    row["ratio"] = round(statistics.median(seconds) / statistics.median(samples["stock"]), 4)
                    if forms[name][1] == 1:  # the same function of the same weights and cache
                        right = steps["stock"].out.float()
                        error = (steps[name].out.float() - right).norm() / right.norm()
                        row["error_against_stock"] = float(error)
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if load in arguments.list_kernels:
                    with report_failure(report, f"profile of {name}, {weights}, {load}"):
                        report["kernels"][f"{name}, {weights}, {load}"] = steps[name].kernels()
            save(report, arguments.out)
    return report


class report_failure(nullcontext):
    """One form's failure is written down and the others go on."""

    def __init__(self, report: dict[str, Any], what: str) -> None:
        super().__init__()
        self._report, self._what = report, what

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if error is None:
            return False
        text = "".join(traceback.format_exception(kind, error, trace))
        print(f"{self._what} failed:\n{text}", flush=True)
        self._report.setdefault("failed", {})[self._what] = text[-2000:]
        return isinstance(error, Exception)


def save(report: dict[str, Any], path: Path) -> None:
    """JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "stock_layer.json")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--weights", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--loads", nargs="+", default=list(LOADS), help="BATCHxCONTEXT")
    parser.add_argument("--list-kernels", nargs="+", default=["1x8192"], help="loads whose kernels are listed")
    parser.add_argument("--replays", type=int, default=100)
    arguments = parser.parse_args()
    save(compare(arguments), arguments.out)


if __name__ == "__main__":
    main()
