"""The planner's constants of a GPU, fitted to the kernels of a recorded `benchmarks/decode_layer.py` run.

    python benchmarks/fit_plan.py benchmarks/results/CARD/decode_layer_DATE.json

A kernel is modelled as ``overhead + max(bytes / bandwidth, operations / rate)`` a launch, attention with a second
bandwidth for a single request; the fit minimises the mean squared logarithm of modelled over measured time. Prints
`Rate` lines for `sglang_tpla/plan/hardware.py`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.plan.hardware import H200, Rate


def modelled(logs: np.ndarray, moved: np.ndarray, flops: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Seconds a launch; ``logs``: of overhead, bandwidth, rate and the bandwidth of one request."""
    overhead, bandwidth, rate, alone = np.exp(logs)
    return overhead + np.maximum(np.maximum(moved / bandwidth, one / alone), flops / rate)


def fit(kernels: list[dict[str, Any]], start: Rate) -> tuple[Rate, np.ndarray]:
    """The best constants, and modelled over measured time of every kernel."""
    launches = np.array([k["launches"] for k in kernels])
    moved = np.array([k["bytes"] for k in kernels]) / launches
    flops = np.array([k["flops"] for k in kernels]) / launches
    one = np.array([k.get("one_request_bytes", 0.0) for k in kernels])
    seconds = np.array([k["us"] for k in kernels]) * 1e-6 / launches
    alone = min(start.one_request_bytes_per_s, 1e15)

    def loss(logs: np.ndarray) -> float:
        return float(np.mean(np.log(modelled(logs, moved, flops, one) / seconds) ** 2))

    first = np.log([start.overhead_s, start.bytes_per_s, start.flops_per_s, alone])
    options = {"maxiter": 8000, "maxfev": 8000, "xatol": 1e-5, "fatol": 1e-9}
    found = minimize(loss, first, method="Nelder-Mead", options=options)
    overhead, bandwidth, rate, alone = np.exp(found.x)
    limited = bool((one / alone > moved / bandwidth).any())
    fitted = Rate(overhead, bandwidth, rate, alone if limited else math.inf)
    return fitted, modelled(found.x, moved, flops, one) / seconds


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    kinds = defaultdict(list)
    for kernel in report["kernels"]:
        kinds[kernel["rate"]].append(kernel)
    for kind, kernels in kinds.items():
        rate, ratios = fit(kernels, H200.rates[kind])
        cuts = statistics.quantiles(ratios, n=20)
        alone = (
            "" if math.isinf(rate.one_request_bytes_per_s) else f", one {rate.one_request_bytes_per_s:.3g}"
        )
        print(
            f'"{kind}": Rate({rate.overhead_s:.2e}, {rate.bytes_per_s:.3g}, {rate.flops_per_s:.3g}{alone}),  '
            f"# {len(kernels)} kernels, over measured 5% {cuts[0]:.2f}, median {cuts[9]:.2f}, 95% {cuts[18]:.2f}"
        )


if __name__ == "__main__":
    main()
