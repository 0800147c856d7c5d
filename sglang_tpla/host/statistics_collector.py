"""Collect calibration statistics, second moments of latents and queries, on a prefill server while it serves.

The collector is meant for models that fit on no other machine. Each tensor-parallel rank sums over its own heads and
writes one file, a few megabytes a layer; ``calibrate --from-stats FILE...`` joins ranks and servers. The collector
watches the latent norm and the query projection of ``DeepseekV2AttentionMLA`` (``sglang/srt/models/deepseek_v2.py``).
"""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_tpla.host import compat
from sglang_tpla.host.process import model_identity, settings
from sglang_tpla.measure.statistics import FORMAT_VERSION, LayerMoments, Statistics, StatisticsMeta

logger = logging.getLogger(__name__)


class Collector:
    """Collects the moments of every layer on one rank.

    Args:
        meta: the model, and the first of this rank's heads.
        moments: one for each layer, on the model's device.
        path: file that every write replaces as a whole.
        every_tokens: tokens between two writes.
    """

    def __init__(self, meta: StatisticsMeta, moments: list[LayerMoments], path: Path, every_tokens: int) -> None:
        self.statistics = Statistics(meta, moments)
        self._path, self._every_tokens = path, every_tokens
        self._written = 0.0
        self._halves: list[dict[str, torch.Tensor]] = [{} for _ in moments]

    def watch(self, layer: int, attention: Any) -> None:
        """Hook the two modules of one layer."""
        queries = attention.q_b_proj if attention.q_lora_rank is not None else attention.q_proj
        shape = (attention.num_local_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim)
        attention.kv_a_layernorm.register_forward_hook(self._observer(layer, "latent", lambda out: out.flatten(0, -2)))
        queries.register_forward_hook(
            self._observer(layer, "q_nope", lambda out: out[0].view(-1, shape[0], shape[1] + shape[2])[..., : shape[1]])
        )

    def _observer(self, layer: int, name: str, pick: Callable[[Any], torch.Tensor]) -> Callable[..., None]:
        def observe(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            # A capture runs made-up decode steps, and its graph would replay the sums without the counts.
            if compat.captures_graphs():
                return
            halves = self._halves[layer]
            halves[name] = pick(output).detach()
            if len(halves) == 2:  # [tokens, d] and [tokens, local heads, qk_nope] of the same tokens
                # A health check is a prompt of one token, and routers send many. SGLang computes it only on an idle
                # server, so few health checks share a batch; those add one token each and are counted.
                if len(halves["latent"]) > 1:
                    self.statistics.layers[layer].update(halves["latent"], halves["q_nope"])
                halves.clear()
                if layer == len(self._halves) - 1:
                    self._write_if_due()

        return observe

    def _write_if_due(self) -> None:
        tokens = self.statistics.layers[-1].latent_count
        if tokens - self._written < self._every_tokens:
            return
        self._written = tokens
        try:
            self.statistics.save(self._path)
        except OSError as error:  # of a prompt's own step, which goes on; the next write has these sums as well
            logger.error("statistics of %d tokens were not written: %s", int(tokens), error)
            return
        logger.info("statistics of %d tokens in %s", int(tokens), self._path)


def observe_model(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Hook after ``ModelRunner.load_model``: watch every attention layer if a folder is set."""
    folder = settings().statistics_folder
    if folder is None or getattr(self, "is_draft_worker", False):
        return
    # Multimodal wrappers keep the language model beside their encoder.
    language_model = getattr(self.model, "language_model", None) or self.model
    attentions = [layer.self_attn for layer in language_model.model.layers]
    parallel, first = get_parallel(), attentions[0]
    server = compat.resolved(self.server_args)
    config, weights = model_identity(self.server_args).split(":")
    heads = first.num_local_heads
    meta = StatisticsMeta(
        format_version=FORMAT_VERSION,
        model_name=Path(server.model_path).name,
        config_hash=config,
        weights_hash=weights,
        corpus=f"traffic of {socket.gethostname()}:{server.port}",
        corpus_hash="",
        seed=0,
        first_head=parallel.attn_tp_rank * heads,
    )
    moments = [
        LayerMoments.zeros(first.kv_lora_rank, heads, first.qk_nope_head_dim, str(self.device)) for _ in attentions
    ]
    # The process number in the name keeps the sums from before a restart.
    rank = f"rank{parallel.attn_tp_rank}of{parallel.attn_tp_size}"
    name = f"{meta.model_name}-{server.port}-{rank}-{os.getpid()}.safetensors"
    collector = Collector(meta, moments, Path(folder) / name, settings().statistics_every_tokens)
    for index, attention in enumerate(attentions):
        collector.watch(index, attention)
    logger.info("collecting calibration statistics in %s", Path(folder) / name)
