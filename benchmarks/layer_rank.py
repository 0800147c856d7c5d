"""One rank's attention layer of a decode step on a GPU, kernel by kernel, as the planner counts it.

Every kernel is a `Step` with the planner's name for it, so that the same code times a whole layer and each kernel
alone. Weights and caches are views of a few large random buffers, a different view for each layer of a graph, so that
the L2 cache holds none of them when they are read.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import layer_kernels as small
import torch
from decode_kernel import capture

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.write import write
from sglang_tpla.attention.flashinfer import FlashInferDecode
from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeAttention, DecodeShape, PageTable
from sglang_tpla.plan.cost import Load, Method, Precision, rank_work
from sglang_tpla.plan.model import PlanModel

DEVICE = torch.device("cuda:0")
EPS = 1e-6
SCALE = 192**-0.5
L2_BYTES = 160e6  # more than twice the L2 cache
LAYERS = 4
FP8 = torch.float8_e4m3fn
FP8_SCALE = 0.02 / 3


def time_graph(run: Callable[[], None], calls: int, repeats: int = 9, longest_s: float = 0.05) -> float:
    """Return the median seconds of one of ``calls`` calls, over replays of a graph of all of them.

    Two replays are not counted, then ``repeats`` are, or fewer (but three) if they take longer than ``longest_s``.
    """
    replay_ms = capture(run, 1)
    replay_ms()
    replay_ms()
    started, samples = time.monotonic(), []
    while len(samples) < 3 or (len(samples) < repeats and time.monotonic() - started < longest_s):
        samples.append(replay_ms())
    return statistics.median(samples) / 1e3 / calls


@dataclass
class Buffers:
    """Random device memory; weights and caches are views of it."""

    weights: torch.Tensor  # bf16, flat
    weights_fp8: torch.Tensor  # e4m3, flat
    cache: torch.Tensor  # bf16, flat
    cos_sin: torch.Tensor
    pages: dict[int, torch.Tensor] = field(default_factory=dict)
    backends: dict[tuple[str, DecodeShape], DecodeAttention] = field(default_factory=dict)

    @classmethod
    def make(cls, cache_bytes: float) -> Buffers:
        """Make and fill the buffers, with ``cache_bytes`` for all caches together."""
        weights = torch.empty(1 << 30, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02)
        fp8 = torch.empty(1 << 30, dtype=FP8, device=DEVICE)
        for part in fp8.split(1 << 28):
            part.copy_(torch.randn(part.shape, device=DEVICE) * 3)
        cache = torch.empty(int(cache_bytes) // 2, dtype=torch.bfloat16, device=DEVICE)
        for part in cache.split(1 << 30):
            part.normal_()
        angles = torch.rand(1 << 17, 32, device=DEVICE) * 6.28
        return cls(weights, fp8, cache, torch.cat([angles.cos(), angles.sin()], 1))

    def order(self, tokens: int) -> torch.Tensor:
        """Return slots in random order, made once for a number of tokens."""
        if tokens not in self.pages:
            self.pages.clear()
            self.pages[tokens] = torch.randperm(tokens, device=DEVICE).to(torch.int32)
        return self.pages[tokens]

    def backend(self, kernel: str, shape: DecodeShape) -> DecodeAttention:
        """Return the attention kernel for a shape, made once."""
        key = (kernel, shape)
        if key not in self.backends:
            if kernel == "hopper":
                self.backends[key] = HopperDecode(shape, SCALE, 128, DEVICE)
            else:
                self.backends[key] = FlashInferDecode(shape, SCALE, DEVICE, kernel.removeprefix("flashinfer_"))
        return self.backends[key]


@dataclass(frozen=True)
class Step:
    """One kernel: the planner's name, a function that gives layer i's call, the bytes that differ between layers."""

    piece: str
    bind: Callable[[int], Callable[[], object]]
    layer_bytes: float


def run_all(steps: Sequence[Step], layers: int) -> Callable[[], None]:
    """Return a function that runs all steps of several layers, one after another."""
    calls = [step.bind(layer) for layer in range(layers) for step in steps]

    def run() -> None:
        for call in calls:
            call()

    return run


class RankLayer:
    """The busiest rank's layer under one method at one load; TPLA writes the cache with one kernel."""

    def __init__(self, model: PlanModel, method: Method, load: Load, precision: Precision, buffers: Buffers) -> None:
        self.work = work = rank_work(model, method, load, precision, (9, 0))
        self.model, self.method, self.precision, self.buffers = model, method, precision, buffers
        self._used = 0
        batch, heads, w = work.batch, work.heads, work.rows.width
        latent, rope, nope, value = model.latent_dim, model.rope_dim, model.nope_dim, model.value_dim
        rank = model.q_lora_rank or 0
        torch.manual_seed(batch)
        x = self._fresh(batch, model.hidden)
        joint = self._fresh(batch, rank + latent + rope)
        normed_q, normed_c = self._fresh(batch, rank), self._fresh(batch, latent)
        query = self._fresh(batch, heads * (nope + rope))
        per_head = query.view(batch, heads, nope + rope)
        q_latent, q_rope = self._fresh(heads, batch, w), per_head[..., nope:]
        attended = self._fresh(batch, work.read_heads, w)
        own = attended  # the output of this rank's heads; under DCP, that of the merge
        values, self.out = self._fresh(batch, work.heads * value), self._fresh(batch, model.hidden)
        ones = torch.ones(max(rank, latent), dtype=torch.bfloat16, device=DEVICE)
        key = joint[:, rank + latent :]
        raw = joint[:, rank : rank + latent]
        tokens = batch * work.context_tokens
        pages = buffers.order(tokens)
        starts = torch.arange(batch, device=DEVICE, dtype=torch.int32) * work.context_tokens
        lengths = torch.full((batch,), work.context_tokens, dtype=torch.int32, device=DEVICE)
        slots = pages[(starts + work.context_tokens - 1).long()].contiguous()
        positions = lengths.long() - 1
        table = PageTable(pages, starts)

        def rows(layer: int) -> torch.Tensor:
            size = tokens * (w + rope)
            offset = (layer % (buffers.cache.numel() // size)) * size
            return buffers.cache[offset : offset + size].view(tokens, w + rope)

        steps = [self._linear("down", model.down_parameters // model.hidden, x, joint)]
        prepare = "norm, rope, cache write"

        def add(piece: str, bind: Callable[[int], Callable[[], object]], layer_bytes: float = 0.0) -> None:
            steps.append(Step(piece, bind, layer_bytes))

        norm_query = partial(small.rms_norm, joint[:, :rank], ones[:rank], EPS, normed_q)
        norm_latent = partial(small.rms_norm, raw, ones[:latent], EPS, normed_c)
        if method.kind == "tpla":
            if rank:
                add(prepare, lambda _: norm_query)
        else:
            add(prepare, lambda _: partial(beside, norm_query, norm_latent) if rank else norm_latent)
        steps.append(self._linear("query", heads * (nope + rope), normed_q if rank else x, query))
        # The absorbed weights have SGLang's layout: the dimension that is summed over is contiguous.
        kc, vc = self._weights(heads, w, nope), self._weights(heads, value, w)
        q_nope = per_head[..., :nope].transpose(0, 1)
        absorbed_bytes = 2 * heads * nope * w
        add("absorb", lambda i: partial(torch.bmm, q_nope, kc(i).transpose(1, 2), out=q_latent), absorbed_bytes)
        turn = (buffers.cos_sin, positions)
        if method.kind == "tpla":
            z = None if w == latent else [torch.randn(latent, w, device=DEVICE) / 16 for _ in range(LAYERS)]
            norm = (ones[:latent], EPS)

            def new_rows(i: int) -> Callable[[], object]:
                kept = z[i % LAYERS] if z else None
                return partial(write, CacheWrite(raw, key, slots, rows(i), *norm, kept, *turn, q_rope))

            add(prepare, new_rows)
        else:
            add(prepare, lambda _: partial(small.rotate, q_rope, key, *turn))
            add(prepare, lambda i: partial(small.write_rows, normed_c, key, slots, rows(i)))

        backend = buffers.backend(work.rows.kernel, DecodeShape(w, work.read_heads, rope))
        backend.plan(table, lengths)
        asked = (q_latent.transpose(0, 1), q_rope)
        if method.kind == "dcp":  # the gather brings every rank's queries
            asked = tuple(self._fresh(batch, model.heads, width) for width in (w, rope))
        add("attention", lambda i: partial(backend.run, *asked, rows(i), attended), 2 * tokens * (w + rope))
        if method.kind == "dcp":
            parts = self._fresh(method.ranks, batch, heads, w)
            sums = torch.randn(method.ranks, batch, heads, device=DEVICE)
            own = self._fresh(batch, heads, w)
            add("merge", lambda _: partial(small.merge, parts, sums, own))
        into = values.view(batch, heads, value).transpose(0, 1)
        by_head = own.transpose(0, 1)
        add("value", lambda i: partial(torch.bmm, by_head, vc(i).transpose(1, 2), out=into), 2 * heads * w * value)
        summed = self._fresh(batch, work.out_heads * value) if method.scatter else values
        steps.append(self._linear("output", model.hidden, summed, self.out))
        self.steps = steps

    def _fresh(self, *shape: int) -> torch.Tensor:
        """Return a random bf16 tensor with memory behind its last row, for products that need a multiple of 16 rows."""
        padded = (shape[0] + 15, *shape[1:])
        return torch.empty(padded, dtype=torch.bfloat16, device=DEVICE).normal_()[: shape[0]]

    def _weights(self, *shape: int, fp8: bool = False) -> Callable[[int], torch.Tensor]:
        """Return a function that gives each layer a different view of random memory."""
        pool = self.buffers.weights_fp8 if fp8 else self.buffers.weights
        size = torch.Size(shape).numel()
        start = self._used
        self._used += LAYERS * size
        if self._used > pool.numel():
            raise ValueError(f"{LAYERS} layers of weights need more than the {pool.numel()} values there are")

        def view(layer: int) -> torch.Tensor:
            offset = (start + layer * size) % (pool.numel() - size) // 128 * 128
            return pool[offset : offset + size].view(shape)

        return view

    def _linear(self, name: str, columns: int, x: torch.Tensor, out: torch.Tensor) -> Step:
        """Return the step ``out = x W^T``; with FP8 weights the activations are quantised first, as in SGLang."""
        inner = x.shape[1]
        if self.precision.weights == "bf16":
            weight = self._weights(columns, inner)
            return Step(name, lambda i: partial(torch.mm, x, weight(i).t(), out=out), 2 * columns * inner)
        weight = self._weights(columns, inner, fp8=True)
        linear = Fp8Linear(x, columns, weight, out)
        return Step(name, linear.bind, columns * inner)


def beside(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Run two kernels on two streams, as SGLang runs its two norms in a graph."""
    if DEVICE.type != "cuda":
        first()
        second()
        return
    here, other = torch.cuda.current_stream(), side_stream()
    other.wait_stream(here)
    first()
    with torch.cuda.stream(other):
        second()
    here.wait_stream(other)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Return the second stream."""
    return torch.cuda.Stream()


class Fp8Linear:
    """A block-FP8 product through PyTorch (cuBLASLt), with a scale for 1 x 128 activations and 128 x 128 weights.

    A deployment on Hopper has DeepGEMM, which moves the same bytes but compiles a kernel for each shape; SGLang's
    Triton kernel was slower at every shape here (1.2 to 2.3 times, untuned, one H100).
    """

    def __init__(self, x: torch.Tensor, columns: int, weight: Callable[[int], torch.Tensor], out: torch.Tensor) -> None:
        self.x, self.weight, self.columns = x, weight, columns
        tokens, self.inner = x.shape
        self.padded = -(-tokens // 16) * 16
        self.quantised = torch.zeros(self.padded, self.inner, dtype=FP8, device=DEVICE)
        self.padded_out = out.as_strided((self.padded, columns), out.stride())

    def bind(self, layer: int) -> Callable[[], object]:
        """Return a call that only quantises and multiplies: rows beyond the batch are zeros already."""
        weight = self.weight(layer).t()  # [inner, columns]
        scale_a = torch.ones(self.inner // 128, self.padded, device=DEVICE).t()
        scale_b = torch.full((-(-self.columns // 128), self.inner // 128), FP8_SCALE, device=DEVICE).t()

        def run() -> None:
            small.quantise(self.x, self.quantised, scale_a, 128)
            torch._scaled_mm(self.quantised, weight, scale_a, scale_b, out_dtype=torch.bfloat16, out=self.padded_out)

        return run
