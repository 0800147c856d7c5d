"""The backends of the draft model's attention on a server that speculates.

SGLang's ``DraftBackendFactory`` (``sglang/srt/speculative/draft_utils.py``) makes a backend for each guessed token but
the last, and one that extends the draft's cache by verified tokens. The factory's tables are closed and lack ``tpla``
and ``torch_native``. The factory also records its choice nowhere, so a draft layer would take the target's backend for
its own and hand over keys in the wrong form.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_spec

from sglang_tpla.host import compat
from sglang_tpla.host.attention.supported import OURS

PLAIN = "torch_native"


class DraftSteps:
    """Backends with this package's kernels for a draft model that guesses a chain: one for each guess but the last.

    Guess i is computed with i + 1 tokens in the cache beyond the verified ones.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, steps: int) -> None:
        from sglang_tpla.host.attention.backend import Queries, TplaDecodeBackend

        # The last guess needs no forward after it.
        self.attn_backends = [TplaDecodeBackend(runner, Queries(1, step + 1)) for step in range(steps - 1)]

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Prepare all backends before the first capture."""
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan all guesses of an eager step."""
        self.init_forward_metadata_out_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan all guesses of an eager step, a capture or a replay."""
        for backend in self.attn_backends:
            backend.plan(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Do nothing, because plans are made outside of the graph."""


def guessing_backend(original: Callable[..., Any], self: Any) -> Any:
    """Hook around ``create_decode_backend``: make the guesses' backend, or None where each request has one guess."""
    name = chosen(self, "decode")
    if self.speculative_num_steps > 1 and name == OURS:
        return DraftSteps(self.draft_model_runner, self.speculative_num_steps)
    if name == PLAIN:  # a prefill server of the CPU platform, which never guesses
        return None
    return named(original(self), name)


def extending_backend(original: Callable[..., Any], self: Any) -> Any:
    """Hook around ``create_draft_extend_backend``: make the backend with which the draft layer follows the target."""
    name = chosen(self, get_spec().speculative_attention_mode)
    runner = self.draft_model_runner
    if name == PLAIN:
        return named(runner.attn_backend, name)
    if name != OURS:
        return named(original(self), name)
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    own = runner.attn_backend  # our backend, unless the server computes prompts with another one
    return named(own if isinstance(own, TplaDecodeBackend) else TplaDecodeBackend(runner), name)


def capture_graphs(original: Callable[[Any], None], self: Any) -> None:
    """Hook around ``EagleDraftWorker._capture_cuda_graphs``: capture the draft layer's extend over our kernels as well.

    SGLang captures that extend only for a list of its own backends, and never on a CPU.
    """
    if self.device == "cpu":
        self.cuda_graph_runner = self.cuda_graph_runner_for_draft_extend = None
        return
    original(self)
    from sglang.srt.environ import envs
    from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import EAGLEDraftExtendCudaGraphRunner

    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    graphs = self.target_worker.model_runner.decode_cuda_graph_runner is not None
    wanted = graphs and not envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get()
    ours = isinstance(self.draft_extend_attn_backend, TplaDecodeBackend)
    if wanted and ours and self.cuda_graph_runner_for_draft_extend is None:
        self.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(self)


def chosen(factory: Any, mode: str) -> str:
    """Return the backend that the factory would choose, for "prefill" or for "decode"."""
    return factory.draft_attn_backend or compat.factory_backends(factory)[mode]


def named(backend: Any, name: str) -> Any:
    """Mark a backend with its name, as SGLang marks a model runner's own backend."""
    for one in getattr(backend, "attn_backends", [backend]):
        if one is not None:
            one.prefill_attention_backend_str = one.decode_attention_backend_str = name
    return backend
