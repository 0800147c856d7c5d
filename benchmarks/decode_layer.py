"""One rank's attention layer of a decode step under every method, on one GPU; collectives are modelled.

    python benchmarks/decode_layer.py [--out FILE] [--models ...] [--ranks ...] [--weights ...] [--budget-s S]
    python benchmarks/decode_layer.py --report FILE      # tables and maps of a recorded run; needs no GPU

DeepSeek-V3 and Kimi-K2 shapes, random weights in bf16 and block FP8, bf16 cache: stock MLA under plain TP (FlashInfer
fa3 at 512 + 64), TPLA at every g with head weights replicated and with a reduce-scatter before o_proj (slices on our
kernel), a rank of decode context parallelism (the same FlashInfer kernel, all heads, 1/T of the tokens), and of
data-parallel attention. **Measured**: all of the rank's kernels, down-projection to o_proj, in a CUDA graph of four
layers, medians. **Modelled**: collectives, from the planner's table of links. Each kernel is timed alone too, which is
what the planner's constants are fitted to (`benchmarks/fit_plan.py`).
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.plan.cost import Load, Method, Precision, price, rank_work
from sglang_tpla.plan.hardware import GPUS, LINKS, Gpu, Link
from sglang_tpla.plan.model import PlanModel, find

BATCHES = (1, 4, 16, 64, 128)
CONTEXTS = (2048, 8192, 32768, 131072)
WRITE_WIDTHS = (None, 320, 256, 224, 192, 128)
CACHE_BYTES = 40e9  # the largest load's cache is 19 GB a layer


def methods(ranks: int) -> list[Method]:
    """Return every method; slices share d/4 = 128 values, and g = 2 is also measured without (width 256)."""
    sliced = [g for g in (2, 4, 8) if g <= ranks]
    return [
        Method("tp", ranks),
        Method("tpla", ranks, 1),
        *(Method("tpla", ranks, g, 128, scatter) for g in sliced for scatter in (False, True)),
        Method("tpla", ranks, 2, 0),
        Method("dcp", ranks),
        Method("dp", ranks),
    ]


def name_of(method: Method) -> str:
    """Return the method's name in the JSON, which marks g = 2 without shared values."""
    return method.label + (", nothing shared" if method.groups == 2 and not method.shared_dims else "")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on the GPU, and return the report."""
    import torch
    from decode_kernel import environment
    from layer_rank import Buffers

    started = time.monotonic()
    buffers = Buffers.make(CACHE_BYTES)
    report: dict[str, Any] = {"environment": environment(), "gpu": torch.cuda.get_device_name()}
    report |= {"copy_gb_s": round(copy_bytes_per_s(buffers) / 1e9), "layers": [], "kernels": [], "not_run": []}
    report["writes"] = measure_writes(buffers)
    report["g1_against_stock_relative_error"] = equality(buffers)
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    seen: set[tuple[Any, ...]] = set()
    for ranks in arguments.ranks:
        for name in arguments.models:
            for weights in arguments.weights:
                at = f"{name} T={ranks} {weights}"
                if time.monotonic() - started > arguments.budget_s:
                    report["not_run"].append(at)
                    continue
                ends = started + arguments.budget_s
                try:
                    block(report, buffers, find(name), ranks, weights, arguments, seen, ends)
                except RuntimeError as error:
                    if not report["layers"]:
                        raise
                    report["not_run"].append(f"{at}: {error}")
                    print(f"{at} failed: {error}", flush=True)
                print(f"{at}: {time.monotonic() - started:.0f} s so far", flush=True)
                save(report, arguments.out)
    report["seconds"] = time.monotonic() - started
    report["gpu_memory_peak_bytes"] = torch.cuda.max_memory_allocated()
    return report


def copy_bytes_per_s(buffers: Any) -> float:
    """Return the bytes a second that a large device-to-device copy reads and writes: the card's memory bandwidth."""
    from layer_rank import time_graph

    half = buffers.cache[: 1 << 31].view(2, -1)
    return 2 * half[0].nbytes / time_graph(partial(half[0].copy_, half[1]), 1)


def block(
    report: dict[str, Any],
    buffers: Any,
    model: PlanModel,
    ranks: int,
    weights: str,
    arguments: argparse.Namespace,
    seen: set[tuple[Any, ...]],
    ends: float,
) -> None:
    """Measure all methods and loads of one model, number of ranks and dtype until ``ends`` (on the monotonic clock)."""
    from layer_rank import L2_BYTES, LAYERS, RankLayer, run_all, time_graph

    first = RankLayer(model, Method("tp", ranks), Load(arguments.batches[0], 2048), Precision(weights), buffers)
    time_graph(run_all(first.steps, LAYERS), LAYERS, 50)  # warm-up: libraries choose kernels, the clock rises
    for batch in arguments.batches:
        save(report, arguments.out)
        for context in arguments.contexts:
            if time.monotonic() > ends:
                report["not_run"].append(f"{model.name} T={ranks} {weights} {batch} x {context}")
                continue
            for method in methods(ranks):
                load, precision = Load(batch, context), Precision(weights)
                layer = RankLayer(model, method, load, precision, buffers)
                seconds = time_graph(run_all(layer.steps, LAYERS), LAYERS)
                report["layers"].append(
                    {"model": model.name, "ranks": ranks, "weights": weights, "batch": batch}
                    | {"context": context, "method": name_of(method), "us": round(seconds * 1e6, 2)}
                )
                for piece in layer.work.pieces:
                    key = (piece, layer.work.batch, layer.work.rows.width)
                    if key in seen:
                        continue
                    seen.add(key)
                    steps = [step for step in layer.steps if step.piece == piece.name]
                    layer_bytes = sum(step.layer_bytes for step in steps)
                    copies = int(min(32, max(LAYERS, L2_BYTES / layer_bytes))) if layer_bytes else 32
                    seconds = time_graph(run_all(steps, copies), copies, 5, 0.02)
                    report["kernels"].append(
                        {"name": piece.name, "rate": piece.rate, "bytes": piece.moved_bytes}
                        | {"flops": piece.flops, "launches": piece.launches, "batch": layer.work.batch}
                        | ({"one_request_bytes": o} if (o := piece.one_request_bytes) else {})
                        | {"width": layer.work.rows.width, "heads": layer.work.read_heads}
                        | {"us": round(seconds * 1e6, 2)}
                    )


def equality(buffers: Any) -> float:
    """Return the relative error of TPLA's layer output at g = 1 against stock's, with the same weights and cache."""
    from layer_rank import RankLayer, run_all

    outs = []
    for method in (Method("tp", 8), Method("tpla", 8, 1)):
        layer = RankLayer(find("deepseek-v3"), method, Load(4, 2048), Precision(), buffers)
        run_all(layer.steps, 1)()
        outs.append(layer.out.float().clone())
    return ((outs[0] - outs[1]).norm() / outs[0].norm()).item()


def measure_writes(buffers: Any) -> list[dict[str, Any]]:
    """Time norm, projection, rope of queries and key, and cache write of a step: in one kernel, and in one each."""
    import layer_kernels as small
    import torch
    from layer_rank import DEVICE, EPS, time_graph

    from sglang_tpla.attention.cache_write.inputs import CacheWrite
    from sglang_tpla.attention.cache_write.write import write
    from sglang_tpla.transfer.memory.projection import project_latent

    rows = []
    for batch in BATCHES:
        for width in WRITE_WIDTHS:
            w, heads = width or 512, 32 if width else 16
            joint = torch.randn(batch, 576, device=DEVICE).bfloat16()
            latent, key = joint[:, :512], joint[:, 512:]
            query = torch.randn(batch, heads, 192, device=DEVICE).bfloat16()[..., 128:]
            weight = torch.ones(512, device=DEVICE, dtype=torch.bfloat16)
            z = None if width is None else torch.randn(512, w, device=DEVICE) / 16
            slots = torch.randperm(4096, device=DEVICE)[:batch]
            positions = slots.clone()
            cache = torch.zeros(4096, w + 64, device=DEVICE, dtype=torch.bfloat16)
            normed = torch.empty(batch, 512, device=DEVICE, dtype=torch.bfloat16)

            new = CacheWrite(latent, key, slots, cache, weight, EPS, z, buffers.cos_sin, positions, query)

            def fused(new: CacheWrite = new) -> None:
                write(new)

            def separate(a=(latent, key, weight, normed, z, positions, slots, cache, query)) -> None:
                latent, key, weight, normed, z, positions, slots, cache, query = a
                small.rms_norm(latent, weight, EPS, normed)
                kept = normed if z is None else project_latent(normed, z)
                small.rotate(query, key, buffers.cos_sin, positions)
                small.write_rows(kept, key, slots, cache)

            times = {}
            for name, run in (("fused", fused), ("separate", separate)):
                times[name] = time_graph(lambda run=run: [run() for _ in range(16)] and None, 16)
            rows.append(
                {"batch": batch, "width": width}
                | {f"{name}_us": round(seconds * 1e6, 2) for name, seconds in times.items()}
            )
    return rows


def save(report: dict[str, Any], path: Path) -> None:
    """Write JSON with one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        else:
            body = json.dumps(value)
        parts.append(f' "{key}": {body}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def method_named(name: str, ranks: int) -> Method:
    """Return the method that `name_of` named."""
    return next(m for m in methods(ranks) if name_of(m) == name)


def link_seconds(row: dict[str, Any], link: Link) -> float:
    """Return the modelled seconds of a measured row's collectives."""
    method = method_named(row["method"], row["ranks"])
    load = Load(row["batch"], row["context"])
    work = rank_work(find(row["model"]), method, load, Precision(row["weights"]), (9, 0))
    return sum(link.seconds(join.kind, join.size_bytes, join.ranks) for join in work.collectives)


def blocks_of(report: dict[str, Any]) -> dict[tuple[str, int, str], dict[tuple[int, int], dict[str, Any]]]:
    """Return (model, ranks, weights) -> (batch, context) -> method -> row."""
    blocks: dict[Any, Any] = defaultdict(lambda: defaultdict(dict))
    for row in report["layers"]:
        at = blocks[row["model"], row["ranks"], row["weights"]]
        at[row["batch"], row["context"]][row["method"]] = row
    return blocks


def text(report: dict[str, Any], ranks: list[int] | None = None) -> str:
    """Return tables of the measurements, maps that add the modelled collectives, and a comparison with the planner."""
    out = []
    for (model, size, weights), loads in blocks_of(report).items():
        if ranks and size not in ranks:
            continue
        names = [name_of(m) for m in methods(size)]
        head = [method_named(name, size).code for name in names]
        head = [h + "'" if "nothing shared" in name else h for h, name in zip(head, names, strict=True)]
        out += [f"### {model}, T = {size}, {weights} weights: measured, us a layer, no collectives", ""]
        out.append("| batch x context | " + " | ".join(head) + " |\n" + "|---" * (len(head) + 1) + "|")
        for (batch, context), rows in loads.items():
            cells = [f"{rows[name]['us']:.0f}" if name in rows else "" for name in names]
            out.append(f"| {batch} x {context:,} | " + " | ".join(cells) + " |")
        for link in LINKS.values():
            out += ["", f"fastest, with modelled collectives on {link.name}:", "", *map_lines(loads, link)]
        out.append("")
    return "\n".join(out + write_lines(report) + fit_lines(report))


def map_lines(loads: dict[tuple[int, int], dict[str, Any]], link: Link) -> list[str]:
    """Return a table by batch and context: the fastest method, and how far ahead of plain TP it is."""
    contexts = sorted({context for _, context in loads})
    lines = ["| batch | " + " | ".join(f"{c:,}" for c in contexts) + " |", "|---" * (len(contexts) + 1) + "|"]
    for batch in sorted({batch for batch, _ in loads}):
        cells = []
        for context in contexts:
            times = {
                name: row["us"] * 1e-6 + link_seconds(row, link)
                for name, row in loads.get((batch, context), {}).items()
                if name != "TPLA g=1"  # this is plain TP by another path
            }
            if not times:
                cells.append("")
                continue
            best = min(times, key=lambda name: times[name])
            code = method_named(best, next(iter(loads.values()))[best]["ranks"]).code
            cells.append(f"{code} {times['plain TP'] / times[best]:.2f}")
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return lines


def write_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines about the fused cache write, and about g = 1 against stock."""
    lines = ["### norm, projection, rope and cache write: one kernel / one each, us (measured)", ""]
    widths = list(dict.fromkeys(row["width"] for row in report["writes"]))
    lines.append("| tokens | " + " | ".join(f"w {w}" if w else "whole latent" for w in widths) + " |")
    lines.append("|---" * (len(widths) + 1) + "|")
    for batch in dict.fromkeys(row["batch"] for row in report["writes"]):
        cells = [f"{r['fused_us']:.1f} / {r['separate_us']:.1f}" for r in report["writes"] if r["batch"] == batch]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    ratios = defaultdict(list)
    for loads in blocks_of(report).values():
        for (batch, _), rows in loads.items():
            if "TPLA g=1" in rows:
                ratios[batch].append(rows["TPLA g=1"]["us"] / rows["plain TP"]["us"])
    lines += ["", "TPLA at g = 1 against the stock layer, ratio of measured times:", ""]
    lines += [
        f"- batch {batch}: median {statistics.median(values):.3f}, worst {max(values):.3f} ({len(values)} cases)"
        for batch, values in sorted(ratios.items())
    ]
    error = report["g1_against_stock_relative_error"]
    return [*lines, "", f"Relative difference of the two layers' outputs: {error:.1e}.", ""]


def card_of(report: dict[str, Any]) -> Gpu:
    """Return the planner's GPU of a recorded run."""
    return next(gpu for name, gpu in GPUS.items() if name in report["gpu"].lower())


def planned_s(row: dict[str, Any], gpu: Gpu) -> float:
    """Return the planner's time of a measured row: all kernels of a layer, without collectives."""
    method = method_named(row["method"], row["ranks"])
    load = Load(row["batch"], row["context"])
    work = rank_work(find(row["model"]), method, load, Precision(row["weights"]), gpu.capability)
    return price(work, gpu, Link("none", 0.0, 1e29)).layer_s


def planner_ratios(report: dict[str, Any]) -> dict[str, list[float]]:
    """Return the planner's time over the measured time, by method."""
    found = defaultdict(list)
    for row in report["layers"]:
        found[row["method"]].append(planned_s(row, card_of(report)) * 1e6 / row["us"])
    return found


def planner_choices(report: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return for every load and link the method measured fastest, the planner's choice, and the choice's extra cost."""
    found = []
    for loads in blocks_of(report).values():
        for rows in loads.values():
            others = {name: row for name, row in rows.items() if name != "TPLA g=1"}
            planned = {name: planned_s(row, card_of(report)) for name, row in others.items()}
            for link in LINKS.values():
                joins = {name: link_seconds(row, link) for name, row in others.items()}
                real = {name: row["us"] * 1e-6 + joins[name] for name, row in others.items()}
                best = min(real, key=lambda name: real[name])
                chosen = min(planned, key=lambda name: planned[name] + joins[name])
                found.append((best, chosen, real[chosen] / real[best]))
    return found


def fit_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines that compare the planner's times and choices with the measurements."""
    lines = ["### The planner against this run (its time over the measured one, layers without collectives)", ""]
    lines += ["| method | cases | 5% | median | 95% |", "|---|---|---|---|---|"]
    found = planner_ratios(report)
    for name, values in {**found, "all": [v for vs in found.values() for v in vs]}.items():
        cuts = statistics.quantiles(values, n=20) if len(values) > 1 else values * 19
        lines.append(f"| {name} | {len(values)} | {cuts[0]:.2f} | {cuts[9]:.2f} | {cuts[18]:.2f} |")
    choices = planner_choices(report)
    costs = sorted(cost for *_, cost in choices)
    same = sum(best == chosen for best, chosen, _ in choices)
    lines += ["", f"Of {len(choices)} loads and links the planner names the fastest method in {same}; its choice takes"]
    lines += [
        f"at most {costs[int(0.9 * len(costs))]:.2f} times the fastest's time in nine of ten, {costs[-1]:.2f} at worst."
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "decode_layer.json")
    parser.add_argument("--models", nargs="+", default=["deepseek-v3", "kimi-k2"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--weights", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing new after this long")
    parser.add_argument("--report", type=Path, help="print a recorded run")
    arguments = parser.parse_args()
    if arguments.report:
        print(text(json.loads(arguments.report.read_text())))
        return
    report = measure(arguments)
    save(report, arguments.out)
    print(text(report, [max(arguments.ranks)]))


if __name__ == "__main__":
    main()
