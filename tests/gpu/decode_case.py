"""Random inputs of a decode step on the GPU, shared by tests, benchmark and sanitizer runs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeAttention, DecodeShape, PageTable
from sglang_tpla.attention.reference import latent_attention
from sglang_tpla.cache_rows import sketched

SCALE = 192**-0.5
BAR = 3e-3  # the largest relative error allowed
LENGTHS = (
    [1],
    [63, 64, 65, 4, 128],
    [1000, 77, 4097],
    [0, 5001, 0, 0, 1, 129, 0],
    [20011, 3],
    [300 + 17 * i for i in range(40)],
    [0] * 3 + [4, 700, 64] * 60,
)
REFILLS = [[3000] * 8, [1, 2, 3, 64, 65, 0, 2999, 1000], [0] * 7 + [3000], [17] * 8]


@dataclass(frozen=True)
class Case:
    """The inputs of one step; unused cache slots hold NaN, so that reading one shows in the output."""

    shape: DecodeShape
    table: PageTable
    lengths: torch.Tensor
    q_latent: torch.Tensor
    q_rope: torch.Tensor
    kv_cache: torch.Tensor

    def reference(self) -> torch.Tensor:
        """Return the output in float32."""
        inputs = self.q_latent, self.q_rope, self.kv_cache, self.table, self.lengths
        return latent_attention(self.shape, *inputs, SCALE)


def random_case(shape: DecodeShape, lengths: list[int], seed: int, device: str = "cuda") -> Case:
    """Make a case with pages in random order and with NaN in rows beyond a request's end."""
    generator = torch.Generator(device).manual_seed(seed)
    pages = [-(-length // shape.page_size) for length in lengths]
    indptr = torch.tensor([0, *pages], device=device).cumsum(0).to(torch.int32)
    total = sum(pages)
    order = torch.randperm(total + 5, generator=generator, device=device)[:total].to(torch.int32)
    slots = (total + 5) * shape.page_size
    # Bytes of 255 are NaN as bfloat16.
    poison = float("nan") if shape.cache_dtype != torch.uint8 else 255
    cache = torch.full((slots, shape.cache_dim), poison, dtype=shape.cache_dtype, device=device)
    for request, length in enumerate(lengths):
        token = torch.arange(length, device=device)
        page = order[indptr[request].long() + token // shape.page_size].long()
        if shape.sketched is not None:
            rows = random_sketched(shape.sketched, length, generator)
            cache[page * shape.page_size + token % shape.page_size] = rows
            continue
        rows = torch.randn(length, shape.latent_dim + shape.rope_dim, generator=generator, device=device)
        cache[page * shape.page_size + token % shape.page_size] = rows.to(shape.cache_dtype)
    tokens = len(lengths) * shape.query_len

    def query(width: int) -> torch.Tensor:
        return torch.randn(tokens, shape.heads, width, generator=generator, device=device).to(shape.dtype)

    return Case(
        shape=shape,
        table=PageTable.from_csr(indptr, order, shape.page_size),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        q_latent=query(shape.query_dim),
        q_rope=query(shape.rope_dim),
        kv_cache=cache,
    )


def random_sketched(rows: sketched.SketchedRows, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Make sketched rows of Gaussian tokens; scales differ between tokens."""

    def columns(count: int) -> torch.Tensor:
        values = torch.randn(tokens, count, generator=generator, device=generator.device)
        spread = torch.randn(tokens, 1, generator=generator, device=generator.device)
        return values * (spread * 0.3).exp()

    group = rows.groups - 1
    parts = (columns(count) for count in (rows.shared, rows.own, rows.groups * rows.own, rows.rope_dim))
    return sketched.pack_rows(rows, group, *parts)


def run_hopper(case: Case) -> torch.Tensor:
    """Run the Hopper kernel of the case's rows into a poisoned output."""
    kernel = HopperDecode(case.shape, SCALE, case.table.batch, case.lengths.device)
    kernel.plan(case.table, case.lengths)
    out = case.q_latent.new_full((*case.q_latent.shape[:2], case.shape.latent_dim), float("nan"))
    return kernel.run(case.q_latent, case.q_rope, case.kv_cache, out)


def assert_right_and_repeated(case: Case, more: int = 20) -> None:
    """The Hopper kernel is right, and ``more`` runs of one plan give the same bits."""
    first = run_hopper(case)
    assert relative_error(first, case.reference()) <= BAR or not case.lengths.any()
    kernel = HopperDecode(case.shape, SCALE, case.table.batch, case.lengths.device)
    kernel.plan(case.table, case.lengths)
    for _ in range(more):
        again = kernel.run(case.q_latent, case.q_rope, case.kv_cache, torch.full_like(first, float("nan")))
        assert torch.equal(first, again)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||out - reference|| / ||reference||; NaN anywhere gives NaN, which passes no comparison."""
    return ((out.float() - reference).norm() / reference.norm()).item()


def errors_of_replays(
    kernel: DecodeAttention, case: Case, batches: list[list[int]]
) -> Iterator[tuple[list[int], float]]:
    """Capture a plan and three runs in a CUDA graph, and yield the relative error after each refill of the inputs."""
    out = case.q_latent.new_empty(*case.q_latent.shape[:2], case.shape.latent_dim)

    def step() -> None:
        kernel.plan(case.table, case.lengths)
        for _ in range(3):
            kernel.run(case.q_latent, case.q_rope, case.kv_cache, out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in batches:
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.q_latent.normal_()
        out.fill_(float("nan"))
        graph.replay()
        yield lengths, relative_error(out, case.reference())
