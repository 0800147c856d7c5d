"""The paged latent decode kernels of this package as an attention backend of SGLang: ``--attention-backend tpla``.

The backend serves the decode steps of a decode server, with CUDA graphs: before each step it refills page table and
lengths in fixed buffers and plans on the device, for every kind of layer, and reads nothing back. A speculating server
verifies a chain of guesses as several query tokens of a request, and runs its draft layer here as well. Kernels for
Hopper read plain and sketched rows; on a CPU the PyTorch twin reads them. A decode server computes no prompts, so no
other kind of extend is served. The class implements ``AttentionBackend`` of
``sglang/srt/layers/attention/base_attn_backend.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.runtime_context import get_parallel

from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import AttentionInputError, DecodeAttention, DecodeShape, PageTable
from sglang_tpla.attention.reference import ReferenceDecode
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.host import compat
from sglang_tpla.host.model.rows import row_format


@dataclass(frozen=True)
class Queries:
    """The query tokens of one backend's forwards.

    Args:
        per_request: query tokens of a request in a forward, which are the last tokens of its cache.
        ahead: tokens that the request's cache holds beyond SGLang's ``seq_lens`` when the forward attends.
    """

    per_request: int = 1
    ahead: int = 0

    @classmethod
    def of_runner(cls, runner: Any) -> Queries:
        """Return the queries of a model runner's own backend.

        SGLang's ``seq_lens`` leave the drafts out when the target verifies them, and include them all when verified
        tokens extend the draft layer.
        """
        args = compat.resolved(runner.server_args)
        if args.speculative_algorithm is None:
            return cls()
        drafts = int(args.speculative_num_draft_tokens)
        return cls(drafts, 0 if runner.is_draft_worker else drafts)


class TplaDecodeBackend(AttentionBackend):
    """The attention backend described above; a rank has one, and a draft model has more (`DraftSteps`).

    Args:
        runner: SGLang's ModelRunner, of the target or of the draft.
        queries: the queries of each forward; by default those of the runner's own backend.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, queries: Queries | None = None) -> None:
        super().__init__()
        config = runner.model_config
        self._queries = queries or Queries.of_runner(runner)
        self._is_draft = bool(runner.is_draft_worker)
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._device = torch.device(runner.device, runner.gpu_id)
        self._scale: float = config.scaling
        ranks = get_parallel().attn_tp_size
        self._heads: int = config.num_attention_heads // ranks
        self._rope_dim: int = config.qk_rope_head_dim
        self._dtype: torch.dtype = config.dtype
        self._shapes = self._layer_shapes(config)
        slots = self.req_to_token_pool.req_to_token  # [requests, max_context] int32
        # This checks once that the table is contiguous int32 and that positions fit 32 bits, as every step requires.
        self._table = PageTable.from_req_to_token(slots, torch.zeros(0, dtype=torch.int32, device=self._device))
        self._row_tokens = slots.shape[1]
        self.max_context_len: int = slots.shape[1]
        # Attention groups pad a step to a multiple of their ranks, which may be more requests than the pool holds.
        self._make_buffers(-(-self.req_to_token_pool.size // ranks) * ranks)

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """Return the last layer as the end of reads of SGLang's page table, because every layer's kernel reads it.

        SGLang calls this from 0.5.18 on; by default it takes reads to end before the first layer.
        """
        return compat.reads_until_replay_ends()

    def _layer_shapes(self, config: Any) -> list[DecodeShape]:
        """Return the shape of each layer; a draft model keeps the whole latent."""
        text = config.hf_text_config
        model = text.kv_lora_rank, self._rope_dim
        if self._is_draft:
            rows = RowFormat.plain(model[:1], model[:1], self._rope_dim)
        else:
            rows = row_format(*model, text.num_hidden_layers)
        others = {"query_len": self._queries.per_request, "dtype": self._dtype}
        return [DecodeShape.of_rows(layer, self._heads, **others) for layer in rows.layers]

    def _kernel(self, shape: DecodeShape) -> DecodeAttention:
        if self._device.type != "cuda":
            return ReferenceDecode(shape, self._scale)
        return HopperDecode(shape, self._scale, self._max_batch, self._device)

    def _make_buffers(self, max_batch: int) -> None:
        """Make fixed buffers for at most ``max_batch`` requests, and one kernel for each kind of layer."""
        self._max_batch = max_batch
        self._starts = torch.zeros(max_batch, dtype=torch.int32, device=self._device)
        self._lengths = torch.zeros(max_batch, dtype=torch.int32, device=self._device)
        self._kernels = {shape: self._kernel(shape) for shape in sorted(set(self._shapes), key=str)}
        self._verify_mask = self._make_verify_mask(max_batch)

    def _make_verify_mask(self, max_batch: int) -> Any:
        """Make the buffer into which SGLang writes the mask of a verified tree.

        Nothing reads the mask, since a chain is causal. Without the buffer SGLang allocates a mask over the whole
        context at every step.
        """
        if self._is_draft or self._queries.per_request == 1:
            return None
        from sglang.srt.layers.attention.verify_mask import maybe_create_verify_mask

        return maybe_create_verify_mask(
            is_draft_runner=False,
            skip_prefill=False,
            max_bs=max_batch,
            max_context_len=self.max_context_len,
            num_draft_tokens=self._queries.per_request,
            device=self._device,
            is_read=False,
        )

    @property
    def verify_mask(self) -> Any:
        return self._verify_mask

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Do nothing: a plan depends only on lengths, which are known before the drafts."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make larger buffers before the first capture if need be; from then on graphs keep their addresses."""
        if max_bs > self._max_batch:
            self._make_buffers(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of the requests that fill up a graph's batch; positions are lengths minus one."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if self._serves(forward_batch.forward_mode):
            self.plan(forward_batch)

    @staticmethod
    def _serves(mode: Any) -> bool:
        """Return whether the mode is a decode step, a verification of drafts, or the draft layer's extend after it."""
        return bool(mode.is_decode() or mode.is_target_verify() or mode.is_draft_extend_v2())

    def plan(self, forward_batch: Any) -> None:
        """Plan a forward over the requests of a batch in any of SGLang's modes."""
        batch = forward_batch.batch_size
        if batch == 0:
            return
        starts, lengths = self._starts[:batch], self._lengths[:batch]
        torch.mul(forward_batch.req_pool_indices[:batch], self._row_tokens, out=starts)
        torch.add(forward_batch.seq_lens[:batch], self._queries.ahead, out=lengths)
        table = PageTable(self._table.indices, starts)
        for kernel in self._kernels.values():
            kernel.plan(table, lengths)

    def forward_decode(
        self,
        q: torch.Tensor,  # [tokens, h, w], or [tokens, h, w + rope] without q_rope
        k: torch.Tensor | None,  # [tokens, 1, w], or [tokens, 1, w + rope] without k_rope
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,  # [tokens, h, rope]
        k_rope: torch.Tensor | None = None,  # [tokens, 1, rope]
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write the new tokens' rows and attend over the planned step; return ``[tokens, h * w]``."""
        shape = self._shapes[layer.layer_id if len(self._shapes) > 1 else 0]
        width, rope = shape.query_dim, shape.rope_dim
        cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        if shape.kind != "plain":
            cache = cache.view(torch.uint8)
        if k is not None and save_kv_cache:
            # These are plain rows; the layer has written sketched rows already.
            if k_rope is not None:
                self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
            else:
                self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        if q_rope is None:
            q, q_rope = q.view(-1, layer.tp_q_head_num, layer.head_dim).split((width, rope), dim=-1)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, shape.latent_dim)
        self._kernels[shape].run(
            q.view(-1, layer.tp_q_head_num, width), q_rope.view(-1, layer.tp_q_head_num, rope), cache, out
        )
        return out.flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,  # [requests * queries, h, ...], as in `forward_decode`
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Verify drafts or extend the draft layer, as a decode step with several query tokens of a request.

        Raises:
            AttentionInputError: a prompt, which a prefill server should have computed.
        """
        if self._serves(forward_batch.forward_mode):
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        raise AttentionInputError(
            "--attention-backend tpla computes decode steps only, and this server was asked to compute a prompt; "
            "add --prefill-attention-backend triton where a decode server must compute prompts"
        )
