"""The planner is compared with arithmetic by hand, published model sizes, and limits with a known answer."""

import json
import math
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.rounding_cost import LayerCosts
from sglang_tpla.calibrate.sketch_layout import usual_rows
from sglang_tpla.calibrate.transforms import Basis
from sglang_tpla.plan.__main__ import main, parser, setting_of
from sglang_tpla.plan.choice import Setting, answer
from sglang_tpla.plan.cost import (
    Load,
    Method,
    Precision,
    ServedRows,
    attention_rate,
    break_even_tokens,
    methods,
    price,
    rank_work,
)
from sglang_tpla.plan.hardware import GPUS, H100, H200, LINKS, Gpu, Link, Rate
from sglang_tpla.plan.model import BUILT_IN, PlanModel, find
from sglang_tpla.transfer.memory.pool import CachePool

V3 = find("deepseek-v3")
FREE_LINK = Link("free", 0.0, 1e18)
BF16, FP8 = Precision(), Precision(weights="fp8")
EYE = torch.eye(512, dtype=torch.float64)
SMALL = Load(1, 1000)
# On this GPU only bytes cost: 1 TB/s, no overhead.
BYTES_ONLY = Gpu(
    "bytes", 1e12, (9, 0), 132, 1e12, 1e15, MappingProxyType({kind: Rate(0.0, 1e12, 1e30) for kind in H200.rates})
)


def setting(*arguments: str) -> Setting:
    return setting_of(parser().parse_args(arguments))


def test_break_even_of_the_design() -> None:
    """DeepSeek-V3, T = 8, g = 2, no shared dims: 38.8 MB of head weights over 512 bytes saved a token."""
    head_weights_bytes = 2 * (1536 * 16 * 192 + 16 * 128 * 7168)
    assert head_weights_bytes == 38_797_312
    method = Method("tpla", 8, groups=2)
    tokens = break_even_tokens(V3, method, BF16, 640)
    assert tokens == pytest.approx(head_weights_bytes / (1152 - 640))
    assert round(tokens, -3) == 76_000
    assert round(break_even_tokens(V3, method, FP8, 640), -3) == 38_000
    # If heads are summed before o_proj, only q_b_proj is held twice.
    scatter = Method("tpla", 8, groups=2, scatter=True)
    assert break_even_tokens(V3, scatter, BF16, 640) == pytest.approx(2 * 1536 * 16 * 192 / 512)
    # Rows as wide as MLA's save nothing.
    assert math.isinf(break_even_tokens(V3, method, BF16, 1152))


def test_break_even_is_where_the_modelled_times_cross() -> None:
    tpla, plain = Method("tpla", 8, groups=2), Method("tp", 8)
    even = int(break_even_tokens(V3, tpla, BF16, 640))
    for tokens, wins in ((int(0.98 * even), False), (int(1.02 * even), True)):
        times = [
            price(rank_work(V3, m, Load(1, tokens), BF16, (9, 0)), BYTES_ONLY, FREE_LINK).layer_s for m in (tpla, plain)
        ]
        assert (times[0] < times[1]) is wins


def test_plain_tp_by_hand() -> None:
    """The planner's bytes are those that a rank of 8 moves for one request of 1,000 tokens, added up."""
    weights = 7168 * (1536 + 512 + 64) + 1536 * 16 * 192 + 2 * 16 * 128 * 512 + 16 * 128 * 7168
    activations = (
        (7168 + 2112)  # down
        + (1536 + 16 * 192)  # query
        + 2 * 16 * (128 + 512)  # absorb, value
        + 16 * (2 * 512 + 64)  # attention's query and output
        + (7168 + 16 * 128)  # output
    )
    moved = 2 * weights + 2 * activations + 1000 * 1152
    work = rank_work(V3, Method("tp", 8), Load(1, 1000), BF16, (9, 0))
    assert price(work, BYTES_ONLY, FREE_LINK).layer_s == pytest.approx(moved / 1e12)


def test_collectives_by_hand() -> None:
    link = Link("link", 1e-5, 1e9)
    load = Load(4, 100)

    def seconds(method: Method) -> float:
        return price(rank_work(V3, method, load, BF16, (9, 0)), BYTES_ONLY, link).collectives_s

    hidden_bytes = 4 * 2 * 7168
    reduce = 1e-5 + 2 * hidden_bytes * 7 / 8 / 1e9
    assert seconds(Method("tp", 8)) == pytest.approx(reduce)
    assert seconds(Method("tpla", 8, 2)) == pytest.approx(reduce)
    head_out_bytes = 4 * 2 * 32 * 128
    assert seconds(Method("tpla", 8, 2, scatter=True)) == pytest.approx(reduce + 1e-5 + head_out_bytes / 2 / 1e9)
    query_bytes, out_bytes = 4 * 2 * 128 * 576, 4 * 2 * 128 * 514
    assert seconds(Method("dcp", 8)) == pytest.approx(reduce + 2e-5 + (query_bytes + out_bytes) * 7 / 8 / 1e9)
    assert seconds(Method("dp", 8)) == pytest.approx(1e-5 + hidden_bytes * 7 / 8 / 1e9)


def test_operations_bound_what_many_heads_read() -> None:
    """A rank of DCP attends with all 128 heads, at 2 (2 x 512 + 64) operations a head and token."""
    slow = Gpu("ops", 1e12, (9, 0), 132, 1e12, 1e12, {k: Rate(0.0, 1e30, 1e12) for k in H200.rates})
    work = rank_work(V3, Method("dcp", 8), Load(2, 8192), BF16, (9, 0))  # FlashInfer makes sixteen even chunks
    attention = price(work, slow, FREE_LINK).kernels_s["attention"]
    assert attention == pytest.approx(2 * 1024 * 128 * 2 * 1088 / 1e12)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("deepseek-v3", 671e9), ("kimi-k2", 1.03e12), ("deepseek-v2", 236e9), ("deepseek-v2-lite", 15.7e9)],
)
def test_built_in_models_have_their_published_size(name: str, parameters: float) -> None:
    m = find(name)
    attention = m.down_parameters + m.heads * (
        m.query_parameters_a_head + m.output_parameters_a_head + m.latent_dim * (m.nope_dim + m.value_dim)
    )
    total = m.layers * attention + m.other_parameters + m.table_parameters
    assert total == pytest.approx(parameters, rel=0.01)


def test_what_fits_by_hand() -> None:
    """DeepSeek-V2-Lite on 2 ranks has room for (half of 80 GB - weights) / cache bytes."""
    found = answer(
        setting(*["--model", "deepseek-v2-lite", "--gpu", "h100", "--ranks", "2", "--memory-fraction", "0.5"]),
        Load(1, 1000),
    )
    rows = {row.method.code: row for row in found.rows}
    plain = rows["TP"]
    attention = 2048 * 576 + 8 * (2048 * 192 + 128 * 2048 + 2 * 256 * 512)
    experts = 26 * (66 * 3 * 2048 * 1408 + 2048 * 64) + 3 * 2048 * 10944 + 2 * 2048 * 102400
    weights = 2 * 27 * attention + 2 * experts / 2
    assert plain.weight_bytes_per_rank == pytest.approx(weights)
    assert plain.tokens_that_fit == int((40e9 - weights) // (27 * 1152))
    assert rows["DCP"].tokens_that_fit == 2 * plain.tokens_that_fit
    assert rows["T2"].cache_bytes_per_token_and_rank == 27 * 2 * (320 + 64)
    assert rows["DCP"].cache_bytes_per_token_and_rank == 27 * 1152 / 2
    assert plain.weight_bytes_per_rank < rows["T2s"].weight_bytes_per_rank < rows["T2"].weight_bytes_per_rank


def test_short_contexts_stay_with_plain_tp() -> None:
    found = answer(setting("--weights-dtype", "fp8"), Load(4, 2048))
    assert found.recommended == Method("tp", 8)
    assert found.fastest is not None and found.fastest.code in ("TP", "MLA8")


def test_links_decide_between_dcp_and_tpla() -> None:
    load = Load(8, 65536)
    fast = answer(setting("--weights-dtype", "fp8", "--link-latency-us", "1", "--without", "dp"), load)
    assert fast.recommended is not None and fast.recommended.kind == "dcp"
    arguments = ("--weights-dtype", "fp8", "--link-latency-us", "200", "--without", "dp")
    slow = answer(setting(*arguments), load)
    assert slow.recommended == Method("tpla", 8, 1, 512, rows="sketched")  # within the margin of the fastest
    slow = answer(setting(*arguments, "--margin", "0", "--rows", "sketched"), load)
    assert slow.recommended is not None and slow.recommended.kind == "tpla" and slow.recommended.groups > 1
    assert any("rounds the cache" in reason for reason in slow.reasons)
    slices = answer(setting(*arguments, "--margin", "0", "--rows", "plain"), load)
    assert slices.recommended is not None and slices.recommended.groups > 1
    assert any("approximate" in reason for reason in slices.reasons)


def test_an_approximation_must_gain_the_margin() -> None:
    load = Load(8, 65536)
    arguments = ["--weights-dtype", "fp8", "--without", "dp", "dcp", "--margin"]
    eager, strict = (answer(setting(*arguments, margin), load) for margin in ("0", "0.9"))
    assert eager.recommended == eager.fastest == strict.fastest
    assert eager.fastest is not None and not eager.fastest.exact
    assert strict.recommended == Method("tp", 8)
    assert any("--margin" in reason for reason in strict.reasons)


def test_tpla_where_nothing_exact_fits() -> None:
    load = Load(1, 700_000)
    found = answer(setting("--weights-dtype", "fp8", "--without", "dcp", "dp", "--margin", "0.9"), load)
    assert found.recommended is not None and found.recommended.kind == "tpla"
    assert "plain TP does not fit" in found.reasons[0]
    none = answer(setting("--weights-dtype", "bf16"), Load(1, 1))
    assert none.recommended is None and "weights alone" in none.reasons[0]


def test_data_parallel_splits_requests_not_a_request() -> None:
    method = Method("dp", 8)
    one, eight = (rank_work(V3, method, Load(batch, 1000), BF16, (9, 0)) for batch in (1, 8))
    assert one.pieces == eight.pieces
    # On H200s, each of the eight ranks has room for 397,224 tokens.
    exact = setting("--weights-dtype", "fp8", "--without", "dcp", "tpla")
    for load, fits in ((Load(8, 380_000), True), (Load(9, 380_000), False), (Load(1, 380_000), True)):
        assert [row.fits for row in answer(exact, load).rows if row.method.kind == "dp"] == [fits]
    none = answer(exact, Load(1, 1_000_000))
    assert none.recommended is None
    assert "397,224 a rank, where the busiest would have 1 whole requests of 1,000,000" in none.reasons[0]


def test_groups_of_any_number_are_priced_as_calibrate_makes_their_rows() -> None:
    """Three groups do not divide 512 - 64 columns, so calibrate shares 56 columns; with six groups it shares 80."""
    found = answer(setting("--model", "kimi-k2", "--ranks", "6", "--gpus", "32"), Load(1, 1000))
    rows = {row.method.code: row for row in found.rows}
    for code, groups, shared in (("T3.8", 3, 56), ("T6.8", 6, 80)):
        made = usual_rows([LayerCosts(Basis(EYE, EYE), 0 * EYE, 0 * EYE)], 64, groups, 4, 16)[0]
        assert rows[code].refused is None and made.shared == rows[code].method.shared_dims == shared
        assert rows[code].cache_bytes_per_token_and_rank == 61 * made.row_bytes
    assert (made.shared, made.row_bytes) == (80, 480)


def test_where_every_method_is_impossible_no_weight_is_blamed() -> None:
    found = answer(
        setting("--gpu", "a100", "--ranks", "2", "--without", "tp", "dp", "dcp", "--rows", "sketched"), SMALL
    )
    assert {row.refused is None for row in found.rows} == {False}
    assert found.reasons == ("nothing fits: every method is impossible here, for the reason beside it",)


def test_slices_are_widened_to_what_a_kernel_serves() -> None:
    load = Load(1, 1000)
    widths = {
        capability: [
            rank_work(V3, Method("tpla", 8, g, r), load, BF16, capability).rows.width
            for g, r in ((2, 0), (4, 128), (8, 64), (4, 100))
        ]
        for capability in ((9, 0), (8, 0))
    }
    assert widths[9, 0] == [256, 224, 128, 224]
    assert widths[8, 0] == [256, 256, 128, 256]


def test_bytes_of_every_format() -> None:
    """The bytes of a token, layer and rank of DeepSeek-V3 at T = 8 are those of the row formats."""
    found = answer(setting("--weights-dtype", "fp8", "--cache-dtype", "fp8"), Load(16, 32768))
    rows = {row.method.code: row.cache_bytes_per_token_and_rank / 61 for row in found.rows}
    assert rows["TP"] == 576  # SGLang's own FP8 cache
    assert rows["MLA8"] == 512 + 128 + 16
    assert (rows["T2.8"], rows["T4.8"], rows["T8.8"]) == (544, 480, 464)
    assert (rows["T2"], rows["T4"], rows["T8"]) == tuple(2 * (w + 64) for w in (320, 224, 192))
    assert all(rows[f"T2{kind}"] == rows[f"T2{kind}s"] for kind in ("", ".8"))


@pytest.mark.parametrize(
    ("code", "rows", "size"),
    [
        ("T2", RowFormat.plain([320], [0], 64), 2 * 384),
        ("T2.8", RowFormat.sketched([SketchedRows.of(512, 2, 64, 64)], 1), 544),
    ],
)
def test_a_row_has_one_size_for_planner_kernel_pool_and_wire(code: str, rows: RowFormat, size: int) -> None:
    found = answer(setting(), Load(16, 32768))
    planned = {row.method.code: row.cache_bytes_per_token_and_rank / 61 for row in found.rows}[code]
    (layer,) = rows.layers
    shape = DecodeShape.of_rows(layer, heads=32)
    pool = CachePool([torch.empty(64, shape.cache_dim, dtype=shape.cache_dtype)], 512, 64, 64, encoding=rows)
    assert planned == size
    assert rows.row_bytes(torch.bfloat16) == [size]
    assert shape.cache_dim * shape.cache_dtype.itemsize == size
    assert pool.layers[0][0].nbytes == pool.payload_bytes(range(1), 1, Part.FULL) == size


def test_sketched_rows_by_hand() -> None:
    """A rank of 8 moves these bytes for one request at g = 2: r = 64, n = 224, w = 288 of 512 columns, and a sketch."""
    method = Method("tpla", 8, 2, 64, rows="sketched")
    work = rank_work(V3, method, Load(1, 1000), BF16, (9, 0))
    pieces = {piece.name: piece for piece in work.pieces}
    heads, query = 32, 288 + 224
    assert (work.rows.width, work.rows.query_columns, work.rows.row_bytes) == (288, query, 544)
    attended = query + 288 + 64
    assert pieces["attention"].moved_bytes == 1000 * 544 + heads * attended * 2
    assert pieces["attention"].flops == 2 * 1000 * heads * attended
    assert pieces["absorb"].flops == 2 * heads * 128 * query and pieces["value"].flops == 2 * heads * 128 * 288
    assert pieces["norm, rope, cache write"].flops == 2 * 512 * (288 + 2 * 224)


def test_slices_must_beat_the_8_bit_cache() -> None:
    """If 8-bit MLA beats plain TP, TPLA on several groups is compared with 8-bit MLA, and not with bf16."""
    load = Load(16, 32768)
    base = ["--weights-dtype", "fp8", "--without", "dcp", "dp"]
    found = answer(setting(*base, "--margin", "0.15"), load)
    assert found.recommended is not None and found.recommended.code == "MLA8"
    assert any("less than the 15%" in reason for reason in found.reasons)
    assert any("0.0002 nats" in reason for reason in found.reasons)
    rows = {row.method.code: row for row in found.rows}
    best = min((row for row in found.rows if row.method.groups > 1), key=lambda row: row.layer_s)
    assert best.layer_s < 0.85 * rows["TP"].layer_s  # it would have been chosen if compared with bf16


def test_what_is_not_there_is_said_in_its_row() -> None:
    """A row says that groups do not divide the latent, or that a GPU has no kernel for such rows."""
    odd = answer(setting("--groups", "2", "--shared-dims", "63"), Load(1, 1000))
    refused = {row.method.code: row.refused for row in odd.rows}
    assert "r + g n = d" in (refused["T2.8"] or "") and refused["T2"] is None
    old = answer(setting("--gpu", "a100", "--groups", "2"), Load(1, 1000))
    refused = {row.method.code: row.refused for row in old.rows}
    for code, size in (("MLA8", 656), ("T2.8", 544)):
        assert f"reads sketched rows of {size} bytes" in (refused[code] or "") and "DecodeShape" not in refused[code]


def test_one_rank_is_plain_or_8_bit_mla() -> None:
    model = find("deepseek-v2-lite")
    assert [method.code for method in methods(1, model)] == ["TP", "MLA8"]
    found = answer(setting(*["--model", "deepseek-v2-lite", "--ranks", "1"]), Load(1, 100))
    assert found.rows[0].price is not None and found.rows[0].price.collectives_s == 0


def test_other_gpus_scale_from_the_measured_one() -> None:
    measured, scaled = H100.rates["flashinfer_fa3"], GPUS["h200"].rates["flashinfer_fa3"]
    assert scaled.bytes_per_s == pytest.approx(measured.bytes_per_s * 4.8 / 3.35)
    assert scaled.overhead_s == measured.overhead_s
    # A request with bytes in proportion takes equally long.
    assert scaled.alone_s(4.8e7) == pytest.approx(measured.alone_s(3.35e7))
    doubled = H100.with_numbers(sheet_bytes_per_s=6.7e12).rates["hopper"]
    assert doubled.bytes_per_s == pytest.approx(2 * H100.rates["hopper"].bytes_per_s)
    assert doubled.flops_per_s == H100.rates["hopper"].flops_per_s


def test_one_request_lies_between_its_points() -> None:
    rate = Rate(1e-6, 1e12, 1e15, one_request=((1e6, 10e-6), (3e6, 30e-6), (5e6, 40e-6)))
    assert [rate.alone_s(size) for size in (1.0, 1e6, 2e6, 4e6, 7e6)] == pytest.approx(
        [10e-6, 10e-6, 20e-6, 35e-6, 50e-6]
    )
    assert rate.seconds(2e6, 0, 2e6) == pytest.approx(20e-6)
    assert rate.seconds(1e9, 0, 2e6) == pytest.approx(1001e-6)
    assert rate.seconds(2e6, 0) == pytest.approx(3e-6)


def slices(width: int) -> ServedRows:
    return ServedRows(width, width, 2 * (width + 64), width, "hopper")


def test_slices_are_read_at_the_rate_of_their_width() -> None:
    assert [attention_rate(slices(width)) for width in (64, 224, 256, 288)] == [
        *("hopper", "hopper", "hopper_256", "hopper_wide")
    ]


def test_h200_attention_agrees_with_the_recorded_run() -> None:
    """Times are within 8% (one within 20%), half within 4%, of benchmarks/decode_kernel.py on an H200.

    The planner's rates are those of today's kernel. At 128 heads, where tensor cores are the bottleneck, the recorded
    kernel was slower.
    """
    path = Path(__file__).parents[2] / "benchmarks/results/h200/decode_kernel_apart_2026-11-25.json"
    ratios = []
    for row in json.loads(path.read_text())["rows"]:
        batch, context = row["batch"], row["tokens"]
        for kernel, w, heads, measured_ms in (
            ("flashinfer_fa3", 512, row["mla_heads"], row["mla_ms"]),
            (attention_rate(slices(row["latent_dim"])), row["latent_dim"], row["heads"], row["tpla_ms"]),
        ):
            values = context * (w + 64)
            moved = 2 * batch * (values + heads * (2 * w + 64))
            flops = 2 * batch * context * heads * (2 * w + 64)
            ratios.append(H200.rates[kernel].seconds(moved, flops, 2 * values) * 1e3 / measured_ms)
    off = sorted(abs(math.log(ratio)) for ratio in ratios)
    assert off[-1] < math.log(1.2) and off[-2] < math.log(1.08)
    assert off[len(off) // 2] < math.log(1.04)


def test_json_and_text_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "h100", "--weights-dtype", "fp8", "--gpus", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["provenance"]["measured"] and not report["provenance"]["from_data_sheets"]
    (load,) = report["loads"]
    labels = [row["method"] for row in load["methods"]]
    assert len(labels) == len(set(labels)) == 4 + 2 * 6
    for row in load["methods"]:
        if row["refused"]:
            continue
        assert row["step_s"] == pytest.approx(61 * (sum(row["kernels_s"].values()) + row["collectives_s"]))
    assert main(["--gpu", "b200", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["provenance"]["measured"]
    assert main(["--gpu-bandwidth-gb-s", "5000", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["provenance"]["measured"]
    assert main(["--weights-dtype", "fp8", "--batch", "1", "16"]) == 0
    out = capsys.readouterr().out
    assert out.count("recommended: ") == 2 and "measured: h200" in out
    assert "assumed: nvlink" in out and "from data sheets: h200" in out
    assert "over all loads" in out


def test_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights-dtype", "fp8", "--map", "--batch", "1", "999", "--context", "512", "131072"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[0] == "1" and lines[-2].split()[1] in ("TP", "MLA8")
    assert lines[-1].split() == ["999", lines[-1].split()[1], "-"]


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BUILT_IN["kimi-k2"]))
    by_file, by_folder, built_in = find(str(path)), find(str(tmp_path)), find("Kimi-K2")
    assert by_file == by_folder

    def unnamed(m: PlanModel) -> dict[str, object]:
        return {k: v for k, v in vars(m).items() if k != "name"}

    assert unnamed(by_file) == unnamed(built_in)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model nothing", "--model must be one of"),
        ("--gpu tpu", "--gpu must be one of"),
        ("--link string", "--link must be one of"),
        ("--ranks 0", "--ranks must be at least 1"),
        ("--ranks 8 --gpus 4", "--gpus at least --ranks"),
        ("--groups 3", "divide --ranks 8"),
        ("--shared-dims 512", "between 0 and 511"),
        ("--batch 0", "at least 1"),
        ("--batch many", "invalid int value"),
        (f"--batch {10**320}", "at most 1,000,000,000,000"),
        (f"--context 1 {10**400}", "at most 1,000,000,000,000"),
        ("--weights-dtype int4", "must be one of bf16, fp8"),
        ("--cache-dtype int8", "must be one of bf16, fp8"),
        ("--rows plain fp8", "--rows: fp8 asks for FP8 rows, which were retired"),
        ("--gpu-memory-gb -1", "must be positive"),
        ("--gpu-memory-gb inf", "must be positive and below"),
        ("--gpu-tflops 1e-308", "must be positive and below"),
        ("--link-gb-s 1e-308", "positive bandwidth, below"),
        ("--link-latency-us inf", "positive bandwidth, below"),
        ("--ranks 1000000000000", "at most 100000"),
        ("--link-gb-s 0", "positive bandwidth"),
        ("--memory-fraction 2", "must lie in (0, 1]"),
        ("--ranks 1 --without tp tpla", "leaves no method"),
    ],
)
def test_mistakes_are_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "JSON object"),
        ('{"hidden_size": 8}', "has no 'num_hidden_layers'"),
        (json.dumps(BUILT_IN["deepseek-v3"] | {"kv_lora_rank": "512"}), "kv_lora_rank to be a whole number from 1"),
        (json.dumps(BUILT_IN["deepseek-v3"] | {"vocab_size": None}), "has no 'vocab_size'"),
        (json.dumps(BUILT_IN["deepseek-v3"] | {"intermediate_size": [1]}), "intermediate_size to be a whole number"),
        (
            json.dumps(BUILT_IN["deepseek-v3"] | {"first_k_dense_replace": "x"}),
            "first_k_dense_replace to be a whole number",
        ),
        (json.dumps(BUILT_IN["deepseek-v3"] | {"q_lora_rank": {}}), "q_lora_rank to be a whole number"),
        (json.dumps(BUILT_IN["deepseek-v3"] | {"n_shared_experts": 1.5}), "n_shared_experts to be a whole number"),
        (json.dumps(BUILT_IN["deepseek-v3"] | {"kv_lora_rank": 10**40}), "kv_lora_rank to be a whole number"),
    ],
)
def test_bad_configs(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert main(["--model", str(path)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_every_link_and_gpu_gives_an_answer() -> None:
    for gpu in GPUS:
        for link in LINKS:
            arguments = ["--model", "deepseek-v2-lite", "--gpu", gpu, "--link", link, "--ranks", "4"]
            assert answer(setting(*arguments), Load(4, 4096)).recommended is not None


def test_speculation_multiplies_operations_and_not_the_cache() -> None:
    """A step's products have more rows, and the cache is read once for all of them; the figures are by hand."""
    plain = Method("tp", 8)
    one = rank_work(V3, plain, Load(16, 32768), BF16, (9, 0))
    four = rank_work(V3, plain, Load(16, 32768, 4, 2.5), BF16, (9, 0))
    before, after = ({piece.name: piece for piece in work.pieces} for work in (one, four))
    assert all(after[name].flops == 4 * piece.flops for name, piece in before.items())
    rows = 16 * V3.heads // 8 * (2 * 512 + 64) * 2  # bytes of a step's queries and outputs, for one token a request
    assert after["attention"].moved_bytes - before["attention"].moved_bytes == 3 * rows
    assert [c.size_bytes for c in four.collectives] == [4 * c.size_bytes for c in one.collectives]


def test_speculation_in_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--verified-tokens", "4", "--accepted-length", "2.5", "--batch", "16"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "verifying 4 tokens a request, of which 2.5 are kept" in table and "ms a token" in table
    assert "beside DCP" in table
    assert main([*arguments, "--json"]) == 0
    (load,) = json.loads(capsys.readouterr().out)["loads"]
    assert all(row["step_s"] == pytest.approx(2.5 * row["token_s"]) for row in load["methods"])
    assert main(["--verified-tokens", "2", "--accepted-length", "3"]) == 2
    assert "--accepted-length between 1 and that" in capsys.readouterr().err
