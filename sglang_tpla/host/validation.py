"""Refuse settings that cannot work together: at start, in the first process, with one message each.

The hook is around ``ServerArgs.__post_init__`` in ``sglang/srt/server_args.py``: it checks flags before SGLang rewrites
them, and the model and the attention backend after SGLang has resolved them. Each check raises one of `REFUSALS`, which
names the setting to drop; the process then ends with that text.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.environ import envs

from sglang_tpla.artifact.artifact import ArtifactError
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.attention.backends import device_capability
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape
from sglang_tpla.config import ConfigError, Layout, fp8_rows_retired
from sglang_tpla.host import compat, speculation
from sglang_tpla.host.attention.supported import OURS, preferred_backend, require_engine_backend
from sglang_tpla.host.cpu.memory import budget_bytes
from sglang_tpla.host.disaggregation.engine_memory import BYTES_CACHE, CACHE_DTYPES
from sglang_tpla.host.ledger import refuse
from sglang_tpla.host.model.architectures import check_architectures
from sglang_tpla.host.model.rows import row_format, sketched
from sglang_tpla.host.process import artifact, name_server, settings
from sglang_tpla.reference_model.checkpoint import Checkpoint, CheckpointError, local_checkpoint
from sglang_tpla.reference_model.config_file import check_query_scaling, language_config, read_whole_config
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.room import TransferError

REFUSALS = (ConfigError, ArtifactError, CheckpointError, AttentionInputError, TransferError)
SPARSE = "index_topk"  # DSA models (DeepSeek V3.2, GLM-5) carry an indexer over the whole latent


def check_server_args(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Check arguments before and after SGLang resolves them; a record that comes resolved has been checked before."""
    if compat.is_resolved(self):
        original(self, *args, **kwargs)
        return
    try:
        check_flags(self)
        if settings().role == "decode" and sketched():
            self.kv_cache_dtype = BYTES_CACHE
        if settings().statistics_folder is not None:
            self.disable_prefill_cuda_graph = True  # a graph's replay does not run the collector's Python
        check_address(self)
        check_statistics_folder()
        name_server(self.dist_init_addr, self.nnodes)
        check_config(self.model_path, found := local_config(self.model_path))
        check_sizes(found)
        original(self, *args, **kwargs)
        check_model(compat.resolved(self))
    except REFUSALS as error:
        raise refuse(str(error)) from error


def check_flags(args: Any) -> None:
    role = settings().role
    if args.disaggregation_mode != role or args.disaggregation_transfer_backend != "tpla":
        raise ConfigError(
            f"a {role} server runs with --disaggregation-mode {role} --disaggregation-transfer-backend tpla; got "
            f"{args.disaggregation_mode!r} and {args.disaggregation_transfer_backend!r}: drop those flags, the "
            "launcher sets them"
        )
    sliced = settings().artifact is not None
    graphs = prompt_graphs(args)
    refusals = [
        (sliced and args.dcp_size > 1, "--dcp-size", "decode context parallelism (DCP) gathers every rank's queries "
         "against one whole latent, and TPLA ranks hold different slices"),
        (args.attn_cp_size > 1, "--attn-cp-size", "decode servers ask the first of a prompt's context ranks for its "
         "rows, and the rooms of the others, for which nobody asks, would fail every request"),
        (args.enable_hierarchical_cache, "--enable-hierarchical-cache", "the hierarchical cache backs up rank 0's "
         "cache for all ranks, and TPLA ranks hold different slices"),
        (args.disaggregation_decode_enable_offload_kvcache, "--disaggregation-decode-enable-offload-kvcache",
         "the offload manager assumes that all ranks hold the same latent cache"),
        (args.enable_hisparse, "--enable-hisparse", "it indexes the whole latent"),
        *newer_refusals(args),
        *unchecked_ways_in(args),
        attention_groups_refusal(args),
        (args.allow_auto_truncate, "--allow-auto-truncate", "prefill and decode would each cut a prompt to a length "
         "of its own"),
        (args.pp_size > 1, "--pp-size", "pipeline stages are not transferred yet"),
        (sliced and compat.uses_deepgemm_bmm(), " and ".join(compat.DEEPGEMM_BMM),
         "it leaves the absorbed weights in FP8 blocks, which the maps cannot be folded into"),
        (sliced and bool(args.enable_lora), "--enable-lora", "adapters on kv_b_proj correct the unfolded weights"),
        (settings().statistics_folder is not None and graphs not in (None, "disabled"),
         f"--cuda-graph-backend-prefill {graphs}", "--tpla-statistics-folder adds prompts up in Python, which captured "
         "graphs do not run"),
        (role == "prefill" and args.kv_cache_dtype.startswith("fp8"), f"--kv-cache-dtype {args.kv_cache_dtype}",
         "prompts stay exact, and a decode server with --tpla-rows sketched gets 8-bit rows from any cache"),
        (role == "decode" and args.kv_cache_dtype.startswith("fp8") and not sketched(),
         f"--kv-cache-dtype {args.kv_cache_dtype}", fp8_rows_retired("it", "--tpla-rows sketched (which with "
         "--tpla-groups above 1 takes an artifact of `python -m sglang_tpla.calibrate --rows sketched`)")),
        (role == "decode" and args.kv_cache_dtype not in ("auto", BYTES_CACHE) and sketched(),
         f"--kv-cache-dtype {args.kv_cache_dtype}", "sketched rows are bytes of their own, whatever the model's dtype"),
    ]  # fmt: skip
    found = [f"{flag} does not go with sglang_tpla: {why}; drop {flag}" for bad, flag, why in refusals if bad]
    if args.device == "cpu" and args.page_size not in (None, 1):
        found.append(
            f"the CPU reference platform pages its cache by single tokens; got --page-size {args.page_size}, use "
            "--page-size 1"
        )
    if args.device == "cpu":
        budget_bytes()  # refuse a malformed variable here rather than in every rank
    found += speculation.unsupported_reasons(args, role)
    if found:  # report all reasons at once, because each further start has to load SGLang
        raise ConfigError("; also, ".join(found))


def attention_groups_refusal(args: Any) -> tuple[bool, str, str]:
    """Return the entry of ``check_flags`` for data-parallel attention that a CPU cannot run."""
    refused = compat.attention_groups(args) > 1 and args.device == "cpu" and not compat.cpu_has_attention_groups()
    return (
        refused,
        compat.attention_groups_flag(args),
        "this SGLang release pins memory for its attention groups, which takes a GPU; 0.5.19 and later do not",
    )


def prompt_graphs(args: Any) -> str | None:
    """Return the kind of CUDA graphs that any flag requests for prompts, or None if no flag does."""
    config = args.cuda_graph_config or {}  # --cuda-graph-config overrides --cuda-graph-backend-prefill
    phases = config if isinstance(config, dict) else config.to_dict()
    asked = phases.get("prefill", {}).get("backend", args.cuda_graph_backend_prefill)
    return None if asked is None else str(asked)


def unchecked_ways_in(args: Any) -> list[tuple[bool, str, str]]:
    """Return the entries of ``check_flags`` for flags that let requests bypass `requests/edge.py`.

    One request with a token outside the vocabulary would end the server.
    """
    return [
        (args.tokenizer_worker_num > 1, f"--tokenizer-worker-num {args.tokenizer_worker_num}", "SGLang loads no "
         "plug-in in the processes of its tokenizer workers, so that nobody would check what requests ask for"),
        (bool(args.grpc_mode or args.smg_grpc_mode), "--grpc-mode" if args.grpc_mode else "--smg-grpc-mode",
         "requests are checked where the HTTP server takes them, which this flag leaves out"),
        (bool(envs.SGLANG_RUST_SERVER.get()), "SGLANG_RUST_SERVER=1", "the Rust server hands requests to the scheduler "
         "unchecked, and its bootstrap server takes registrations from anyone"),
    ]  # fmt: skip


def newer_refusals(args: Any) -> list[tuple[bool, str, str]]:
    """Return the entries of ``check_flags`` for flags of later releases of SGLang; 0.5.17 has none of them."""

    def given(name: str) -> Any:
        return getattr(args, name, None)

    policy, threshold = (
        given("disaggregation_decode_allocation_policy"),
        given("disaggregation_decode_host_receive_threshold"),
    )
    # The threshold that means never is 0 up to 0.5.21, and 1 later.
    never = compat.default_of(type(args), "disaggregation_decode_host_receive_threshold")
    return [
        (bool(given("enable_kv_cache_sharding")), "--enable-kv-cache-sharding", "every prefill rank sends whole rows"),
        (policy not in (None, "early"), f"--disaggregation-decode-allocation-policy {policy}", "rows are sent while "
         "the prompt is computed, into slots that the decode server has allocated"),
        (threshold != never, f"--disaggregation-decode-host-receive-threshold {threshold}",
         "rows are received into the engine's own pool"),
        (bool(given("disaggregation_enable_kv_checksum")), "--disaggregation-enable-kv-checksum", "it compares whole "
         "rows of both sides; the agents check every frame by a checksum of their own"),
        (bool(given("enable_page_major_kv_layout")), "--enable-page-major-kv-layout", "the transfer reads one row a "
         "token"),
        (bool(given("enable_unified_memory")), "--enable-unified-memory", "the transfer reads the pool's own rows"),
        (bool(given("enable_pd_role_switch")), "--enable-pd-role-switch", "layers, cache and agent are made for one "
         "role"),
        (given("disaggregation_decode_retraction_backup") == "host_pool",
         "--disaggregation-decode-retraction-backup host_pool", "it copies rows of a size that SGLang reckons from the "
         "latent's width, which is not that of sketched rows or of layers that differ"),
        (bool(given("enable_unified_cache_external_linker")), "--enable-unified-cache-external-linker", "the store "
         "takes the latent cache for the same on all ranks, and TPLA ranks hold different slices"),
    ]  # fmt: skip


def check_address(args: Any) -> None:
    """Check that keys can be read, that no plain TCP leaves loopback and that the bootstrap port is free."""
    security = Security.from_environment(settings().role)
    if settings().role != "prefill":
        return
    security.check(args.host, "a prefill server on")
    if args.node_rank == 0:
        from sglang_tpla.host.disaggregation.bootstrap_server import listening, port_taken

        # If the port were taken, the server would look healthy while its requests went to another server.
        place = args.host, args.disaggregation_bootstrap_port
        try:
            listening(*place).close()
        except OSError as error:
            raise ConfigError(port_taken(*place, error)) from error


def check_statistics_folder() -> None:
    """Check that statistics can be kept, which are first written after thousands of tokens."""
    folder = settings().statistics_folder
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--tpla-statistics-folder {folder}: expected a folder to write to; {error.strerror}"
        ) from error


def local_config(model_path: str) -> dict[str, Any]:
    """Return the whole config of a checkpoint folder, read before SGLang acts on it; empty for a model of the hub."""
    return read_whole_config(model_path) if Path(model_path).is_dir() else {}


def check_config(model_path: str, config: dict[str, Any]) -> None:
    """Refuse models that are not served, by their architecture and by the settings of the cache in their config.

    Args:
        config: the model's whole config, in which the language model's may be nested.
    """
    check_architectures(model_path, config.get("architectures") or ())
    config = language_config(config)
    check_query_scaling(config)
    if config.get(SPARSE) is not None:
        raise ConfigError(
            f"{model_path} uses DeepSeek sparse attention (its config has {SPARSE!r}): the indexer needs the whole "
            "latent on every rank; serve it with stock SGLang"
        )
    if config and config.get("kv_lora_rank") is None:
        raise ConfigError(
            f"{model_path} has no latent cache (no kv_lora_rank in its config); sglang_tpla serves DeepSeek V2, V3 and "
            "Kimi K2 shaped models"
        )


def check_sizes(config: dict[str, Any]) -> None:
    """Check a local model's constants and the artifact's sizes, before SGLang plans its layers by both."""
    if not config:
        return
    config_hash(config)  # refuses values that no model has; later every server tells the others this hash
    if settings().role == "decode" and (loaded := artifact()) is not None:
        loaded.check_sizes(config)


def check_model(args: Any) -> None:
    """Check the model's config, the artifact and the resolved backend."""
    config = compat.model_config(args)
    text = config.hf_text_config
    check_config(args.model_path, {**text.to_dict(), "architectures": config.hf_config.architectures})
    speculation.check_draft(args, text, config.dtype)
    if settings().role == "prefill":
        return
    attention_ranks = args.tp_size // compat.attention_groups(args)
    layout = Layout(attention_ranks, settings().groups, text.num_attention_heads)
    if settings().o_proj == "scatter" and layout.local_heads % layout.groups:
        raise ConfigError(
            f"--tpla-o-proj scatter deals {layout.heads} heads out evenly over {attention_ranks} ranks, which does not "
            "come out; use --tpla-o-proj replicate"
        )
    loaded = artifact()
    backend = compat.decode_backend_name(args)
    if loaded is not None:
        folder = local_checkpoint(args.model_path, args.revision)
        loaded.check_model(Checkpoint(folder).config, weights_hash(folder), layout.groups)
        check_blocks(text, getattr(config.hf_config, "quantization_config", None), layout)
    draft = DecodeShape(
        text.kv_lora_rank,
        text.num_attention_heads // attention_ranks,
        rope_dim=text.qk_rope_head_dim,
        dtype=config.dtype,
    )
    shapes = slice_shapes(args, config)
    capability = device_capability(torch.device(args.device))
    own = loaded is not None or sketched()
    speculation.check_backends(args, backend, shapes if own else [], draft, capability)
    if not own and backend != OURS:
        return  # plain MLA on a stock backend
    if len(shapes) > 1 and backend == "flashinfer":
        raise ConfigError(
            f"{settings().artifact} has layers of widths {[shape.latent_dim for shape in shapes]}, and "
            "--attention-backend flashinfer plans one width for all layers; use another backend or an artifact without "
            "a per-layer policy"
        )
    for shape in shapes:
        require_engine_backend(backend, shape, capability)


def check_blocks(text: Any, quantization: dict[str, Any] | None, layout: Layout) -> None:
    """Check that block-quantised weights are cut between blocks.

    SGLang checks this only for a split into T parts; with T/g head shards it would silently take other blocks' scales.
    """
    block = (quantization or {}).get("weight_block_size")
    if not block or layout.head_shards == 1:
        return
    sizes = (
        ("q_b_proj", text.qk_nope_head_dim + text.qk_rope_head_dim, block[0]),
        ("kv_b_proj", text.qk_nope_head_dim + text.v_head_dim, block[0]),
        ("o_proj", text.v_head_dim, block[1]),
    )
    for name, head_size, size in sizes:
        if layout.local_heads * head_size % size:
            raise ConfigError(
                f"a head shard of {name} has {layout.local_heads} heads of {head_size} = "
                f"{layout.local_heads * head_size} values, which end inside a block of {size} that has one scale; use "
                f"fewer head shards than {layout.head_shards} (--tp-size / --tpla-groups)"
            )


def slice_shapes(args: Any, config: Any) -> list[DecodeShape]:
    """Return the shapes of one rank's attention layers, one for each kind of layer.

    Args:
        config: the engine's ModelConfig, whose heads are H*g already (``host/model/model_config.py``).
    """
    attention_ranks = args.tp_size // compat.attention_groups(args)
    text = config.hf_text_config
    rows = row_format(text.kv_lora_rank, text.qk_rope_head_dim, text.num_hidden_layers)
    kept = CACHE_DTYPES.get(args.kv_cache_dtype, config.dtype)
    shapes = {
        DecodeShape.of_rows(
            layer,
            config.num_attention_heads // attention_ranks,
            page_size=args.page_size or 1,
            dtype=config.dtype if rows.encoded else kept,
        )
        for layer in rows.layers
    }
    return sorted(shapes, key=lambda shape: (shape.latent_dim, shape.cache_dim, str(shape)))


def default_backend(original: Callable[..., str], self: Any, use_mla_backend: bool, model_config: Any) -> str:
    """Hook around ``ServerArgs._get_default_attn_backend``, which chooses a backend for the whole latent."""
    stock = original(self, use_mla_backend, model_config)
    args = compat.resolved(self)
    if artifact() is None and not sketched():
        return stock
    if args.speculative_algorithm is not None:
        return OURS  # no other backend verifies guesses on a slice; `check_model` refuses unsupported shapes
    return preferred_backend(slice_shapes(args, model_config), device_capability(torch.device(args.device)), stock)
