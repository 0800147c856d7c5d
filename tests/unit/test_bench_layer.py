"""The layer benchmark without a GPU: its rank layer on the CPU, its report, and the fit of the planner's constants."""

import json
import math
import subprocess
import sys
from pathlib import Path

import decode_layer
import numpy as np
import pytest
from fit_plan import fit

from sglang_tpla.plan.hardware import LINKS, Rate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Triton is interpreted, and twins replace attention and cache write: every step runs, and g = 1 is the stock layer.
ON_THE_CPU = """
import dataclasses, torch
import decode_layer, layer_rank
from sglang_tpla.attention import reference
from sglang_tpla.attention.cache_write.reference import write
from sglang_tpla.plan.model import find
from sglang_tpla.plan.cost import Load, Precision

layer_rank.DEVICE, layer_rank.LAYERS = torch.device("cpu"), 2
layer_rank.write = write

class Buffers(layer_rank.Buffers):
    def backend(self, kernel, shape):
        return reference.ReferenceDecode(shape, layer_rank.SCALE)

torch.manual_seed(0)
angles = torch.rand(64, 32)
buffers = Buffers(
    (0.05 * torch.randn(1 << 21)).bfloat16(), torch.zeros(1), torch.randn(1 << 18).bfloat16(),
    torch.cat([angles.cos(), angles.sin()], 1),
)
model = dataclasses.replace(
    find("deepseek-v3"), hidden=32, heads=16, q_lora_rank=32, latent_dim=128, nope_dim=16, value_dim=16
)
outs = {}
for method in decode_layer.methods(2):
    method = dataclasses.replace(method, shared_dims=min(method.shared_dims, 32))
    layer = layer_rank.RankLayer(model, method, Load(2, 20), Precision(), buffers)
    assert {step.piece for step in layer.steps} == {piece.name for piece in layer.work.pieces}
    layer_rank.run_all(layer.steps, 2)()
    assert layer.out.isfinite().all() and layer.out.norm() > 0, method
    outs[method] = layer.out.float()
plain, ours = list(outs.values())[:2]
print(((plain - ours).norm() / plain.norm()).item())
"""


def test_rank_layer_on_the_cpu() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", ON_THE_CPU],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS), "PATH": "/usr/bin:/bin", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(result.stdout) < 2e-2  # the interpreter truncates bfloat16 instead of rounding it


def made_up_report() -> dict[str, object]:
    """Return a report in which a layer takes 100 us, and a rank of DCP half of that."""
    rows = [
        {"model": "deepseek-v3", "ranks": 8, "weights": "bf16", "batch": batch, "context": context}
        | {"method": decode_layer.name_of(method), "us": 50.0 if method.kind == "dcp" else 100.0}
        for batch in (1, 16)
        for context in (2048, 8192)
        for method in decode_layer.methods(8)
        if method.kind != "dp"
    ]
    writes = [{"batch": 1, "width": None, "fused_us": 2.0, "separate_us": 6.0}]
    return {
        "layers": rows,
        "kernels": [],
        "writes": writes,
        "g1_against_stock_relative_error": 1e-3,
        "gpu": "NVIDIA H100",
    }


def test_report_separates_what_is_modelled() -> None:
    report = made_up_report()
    text = decode_layer.text(report)
    assert "| 1 x 2,048 | 100 | 100 |" in text
    assert "batch 16: median 1.000, worst 1.000 (2 cases)" in text
    loads = decode_layer.blocks_of(report)["deepseek-v3", 8, "bf16"]
    # On NVLink two more collectives of 10 us are less than the 50 us saved; on PCIe two of 30 us are more.
    assert "DCP" in "".join(decode_layer.map_lines(loads, LINKS["nvlink"]))
    assert "DCP" not in "".join(decode_layer.map_lines(loads, LINKS["pcie"]))


def test_fit_finds_the_constants_that_made_the_times() -> None:
    true = Rate(4e-6, 3.1e12, 4e14)
    dice = np.random.default_rng(0)
    kernels = []
    for _ in range(60):
        moved, flops = 10 ** dice.uniform(5, 9), 10 ** dice.uniform(8, 11.5)
        us = 2e6 * true.seconds(moved, flops) * dice.uniform(0.99, 1.01)
        kernels.append({"bytes": 2 * moved, "flops": 2 * flops, "launches": 2, "us": us})
    found = fit(kernels, Rate(1e-5, 1e12, 1e14))
    assert found.overhead_s == pytest.approx(true.overhead_s, rel=0.03)
    assert found.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.03)
    assert found.flops_per_s == pytest.approx(true.flops_per_s, rel=0.03)


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*/decode_layer_*.json")), ids=lambda p: p.stem)
def test_planner_agrees_with_recorded_runs(path: Path) -> None:
    """Nine in ten planned layers are within 12% of the measured time, and choices that differ cost little."""
    report = json.loads(path.read_text())
    assert len(report["layers"]) > 500
    off = sorted(abs(math.log(ratio)) for ratios in decode_layer.planner_ratios(report).values() for ratio in ratios)
    assert off[int(0.9 * len(off))] < math.log(1.12)
    choices = decode_layer.planner_choices(report)
    costs = sorted(cost for *_, cost in choices)
    assert sum(best == chosen for best, chosen, _ in choices) > 0.8 * len(choices)
    assert costs[int(0.9 * len(costs))] < 1.05
    assert costs[-1] < 1.2
    assert {best for best, *_ in choices} >= {"plain TP", "DCP", "DP attention", "TPLA g=2, nothing shared"}
