"""Fit the planner's constants of a GPU to the kernels of a recorded `benchmarks/decode_layer.py` run.

    python benchmarks/fit_plan.py benchmarks/results/CARD/decode_layer_DATE.json

A kernel is modelled as ``overhead + max(bytes / bandwidth, operations / rate)`` a launch; the fit minimises the mean
absolute logarithm of modelled over measured time. FlashInfer's attention over single requests is taken as points, and
the cost of its split (`sglang_tpla/plan/flashinfer_split.py`) is divided out. The script prints `Rate` lines for
`sglang_tpla/plan/hardware.py`.
"""

import json
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.plan.flashinfer_split import Requests, uneven
from sglang_tpla.plan.hardware import H100, LONE_SHARE, Rate

ROPE = 64  # both models that decode_layer.py runs have this


def fit(kernels: list[dict[str, Any]], start: Rate) -> Rate:
    """Return the best constants for these kernels."""
    launches = np.array([k["launches"] for k in kernels])
    moved = np.array([k["bytes"] for k in kernels]) / launches
    flops = np.array([k["flops"] for k in kernels]) / launches
    seconds = np.array([k["us"] for k in kernels]) * 1e-6 / launches

    def loss(logs: np.ndarray) -> float:
        overhead, bandwidth, rate = np.exp(logs)
        times = overhead + np.maximum(moved / bandwidth, flops / rate)
        return float(np.mean(np.abs(np.log(times / seconds))))

    first = np.log([start.overhead_s, start.bytes_per_s, start.flops_per_s])
    options = {"maxiter": 4000, "xatol": 1e-5, "fatol": 1e-9}
    found = min(
        (minimize(loss, first + shift, method="Nelder-Mead", options=options) for shift in (-0.3, 0.0, 0.3)),
        key=lambda result: result.fun,
    )
    return Rate(*np.exp(found.x))


def evened(kernel: dict[str, Any]) -> dict[str, Any]:
    """Return the kernel with the bytes and operations that would take as long if FlashInfer split requests evenly."""
    if not kernel["rate"].startswith("flashinfer"):
        return kernel
    tokens = round(kernel["one_request_bytes"] / (2 * (kernel["width"] + ROPE)))
    split = uneven(Requests(kernel["batch"], tokens, kernel["heads"]), H100.multiprocessors, LONE_SHARE)
    return kernel | {"bytes": kernel["bytes"] * split.bytes, "flops": kernel["flops"] * split.products}


def single_requests(kernels: list[dict[str, Any]]) -> tuple[tuple[float, float], ...]:
    """Return (bytes, median seconds) of attention over one request; seconds never fall as bytes grow."""
    sizes = defaultdict(list)
    for kernel in kernels:
        sizes[float(kernel["one_request_bytes"])].append(kernel["us"] * 1e-6)
    points: list[tuple[float, float]] = []
    for size, seconds in sorted(sizes.items()):
        points.append((size, max(statistics.median(seconds), points[-1][1] if points else 0.0)))
    return tuple(points)


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    kinds = defaultdict(list)
    for kernel in report["kernels"]:
        kinds[kernel["rate"]].append(evened(kernel))
    for kind, kernels in kinds.items():
        alone = [k for k in kernels if kind.startswith("flashinfer") and k["batch"] == 1]
        rate = fit([k for k in kernels if k not in alone], H100.rates[kind])
        rate = replace(rate, one_request=single_requests(alone))
        ratios = []
        for k in kernels:
            n = k["launches"]
            once = rate.seconds(k["bytes"] / n, k["flops"] / n, k.get("one_request_bytes", 0.0))
            ratios.append(n * once * 1e6 / k["us"])
        cuts = statistics.quantiles(ratios, n=20)
        points = ", ".join(f"({size:.3g}, {seconds:.3g})" for size, seconds in rate.one_request)
        print(
            f'"{kind}": Rate({rate.overhead_s:.2e}, {rate.bytes_per_s:.3g}, {rate.flops_per_s:.3g}'
            + (f", ({points})" if points else "")
            + f"),  # {len(kernels)} kernels, over measured 5% {cuts[0]:.2f}, median {cuts[9]:.2f}, 95% {cuts[18]:.2f}"
        )


if __name__ == "__main__":
    main()
