"""The planner's constants of a GPU, fitted to the kernels of a recorded `benchmarks/decode_layer.py` run.

    python benchmarks/fit_plan.py benchmarks/results/h200/decode_layer_DATE.json

A kernel is modelled as ``overhead + max(bytes / bandwidth, operations / rate)`` a launch; the fit minimises the mean
squared logarithm of modelled over measured time. Prints `Rate` lines for `sglang_tpla/plan/hardware.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.plan.hardware import H200, Rate


def modelled(logs: np.ndarray, moved: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """Seconds a launch; ``logs`` are the logarithms of overhead, bandwidth and rate."""
    overhead, bandwidth, rate = np.exp(logs)
    return overhead + np.maximum(moved / bandwidth, flops / rate)


def fit(kernels: list[dict[str, float]], start: Rate) -> tuple[Rate, np.ndarray]:
    """The best constants, and modelled over measured time of every kernel."""
    launches = np.array([k["launches"] for k in kernels])
    moved = np.array([k["bytes"] for k in kernels]) / launches
    flops = np.array([k["flops"] for k in kernels]) / launches
    seconds = np.array([k["us"] for k in kernels]) * 1e-6 / launches

    def loss(logs: np.ndarray) -> float:
        return float(np.mean(np.log(modelled(logs, moved, flops) / seconds) ** 2))

    first = np.log([start.overhead_s, start.bytes_per_s, start.flops_per_s])
    options = {"maxiter": 4000, "xatol": 1e-5, "fatol": 1e-9}
    found = minimize(loss, first, method="Nelder-Mead", options=options)
    return Rate(*np.exp(found.x)), modelled(found.x, moved, flops) / seconds


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    kinds = defaultdict(list)
    for kernel in report["kernels"]:
        kinds[kernel["rate"]].append(kernel)
    for kind, kernels in kinds.items():
        rate, ratios = fit(kernels, H200.rates[kind])
        cuts = statistics.quantiles(ratios, n=20)
        print(
            f'"{kind}": Rate({rate.overhead_s:.2e}, {rate.bytes_per_s:.3g}, {rate.flops_per_s:.3g}),  '
            f"# {len(kernels)} kernels, over measured 5% {cuts[0]:.2f}, median {cuts[9]:.2f}, 95% {cuts[18]:.2f}"
        )


if __name__ == "__main__":
    main()
