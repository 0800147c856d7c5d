"""Compare the planner's times of decode steps with those that ``headline.py`` measured.

    python benchmarks/plan_beside_headline.py RESULT.json...

The planner prices attention. This script prices the rest of a step of ``headline.py`` by the same rates: the products
of the dense feed-forward part, three small kernels (two norms and the activation) and its all-reduce. A result of
``headline.py --alone`` has no collectives, and none are priced. Both sides omit sampling and logits. For each load the
script also compares the method measured fastest with the one planned fastest.
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from sglang_tpla.plan.cost import Load, Method, Precision, price, rank_work
from sglang_tpla.plan.hardware import GPUS, LINKS, Gpu, Link
from sglang_tpla.plan.model import PlanModel, find

MODELS = {"v3": "deepseek-v3", "k2": "kimi-k2"}
NO_LINK = Link("left out", 0.0, 1e18)
SMALL_KERNELS = 3
CLOSE = 0.1


@dataclass(frozen=True)
class Step:
    """One row of a result: the measured time and the planner's."""

    job: str
    requests: int
    context: int
    measured_ms: float
    planned_ms: float
    attention_ms: float  # attention's part of planned_ms, which the planner prints

    @property
    def ratio(self) -> float:
        return self.planned_ms / self.measured_ms


def method_of(name: str, ranks: int) -> tuple[Method, Precision]:
    """Return the planner's method for a name in ``headline.py``, and its precision."""
    cache = Precision("bf16", "fp8" if name.startswith("mla-fp8") else "bf16")
    if name.startswith("mla") or name == "dp":
        return Method("dp" if name == "dp" else "tp", ranks), cache
    if found := re.fullmatch(r"dcp(\d)", name):
        return Method("dcp", int(found[1])), cache
    if name == "g1-8bit":
        return Method("tpla", ranks, 1, 512, rows="sketched"), cache
    found = re.fullmatch(r"g(\d)(-sketched)?(-scatter)?", name)
    if found is None:
        raise ValueError(f"{name} is no method of headline.py")
    rows, shared = ("sketched", 64) if found[2] else ("plain", 0)
    return Method("tpla", ranks, int(found[1]), shared, bool(found[3]), rows), cache


def feed_forward_s(model: PlanModel, rows: int, ranks: int, intermediate: int, gpu: Gpu, link: Link) -> float:
    """Return the seconds of one dense feed-forward part on one of ``ranks``, with the norms of a layer."""
    held = intermediate / ranks
    seconds = SMALL_KERNELS * gpu.rates["small"].seconds(0, 0) + link.seconds(
        "all_reduce", 2 * rows * model.hidden, ranks
    )
    for inner, columns in ((model.hidden, 2 * held), (held, model.hidden)):
        moved = 2 * (inner * columns + rows * (inner + columns))
        seconds += gpu.rates["gemm_bf16"].seconds(moved, 2 * rows * inner * columns)
    return seconds


def steps_of(report: dict[str, Any], gpu: Gpu) -> list[Step]:
    """Return every row of a result with the planner's time."""
    ranks, found = report.get("ranks", 2), []
    for row in report["rows"]:
        short, name = row["job"].split("-", 1)
        model = find(MODELS[short])
        method, precision = method_of(name, ranks)
        # Each rank of data-parallel attention ran alone, with the whole feed-forward part.
        alone = report.get("alone", False) or method.kind == "dp"
        link = NO_LINK if alone else LINKS["nvlink"]
        work = rank_work(model, method, Load(row["requests"], row["context"]), precision, gpu.capability)
        attention = price(work, gpu, link).layer_s
        sharing = 1 if method.kind == "dp" else ranks
        rest = feed_forward_s(model, work.batch, sharing, report.get("intermediate", 512), gpu, link)
        planned = (1e3 * model.layers * seconds for seconds in (attention + rest, attention))
        found.append(Step(row["job"], row["requests"], row["context"], row["step_ms"], *planned))
    return found


def choices(steps: list[Step]) -> list[tuple[Step, Step]]:
    """Return the steps measured fastest and planned fastest, for each model and load that several methods have."""
    loads = defaultdict(list)
    for step in steps:
        loads[step.job.split("-")[0], step.requests, step.context].append(step)
    return [
        (min(found, key=lambda s: s.measured_ms), min(found, key=lambda s: s.planned_ms))
        for found in loads.values()
        if len(found) > 1
    ]


def main() -> None:
    for path in sys.argv[1:]:
        report = json.loads(Path(path).read_text())
        steps = steps_of(report, GPUS["h200"])
        print(path)
        for s in steps:
            print(
                f"{s.job:>24} {s.requests:>4} x {s.context:<7} measured {s.measured_ms:7.2f} ms, planned "
                f"{s.planned_ms:7.2f} (attention {s.attention_ms:7.2f}), {s.ratio:.2f}"
            )
        close = sum(abs(s.ratio - 1) <= CLOSE for s in steps)
        print(f"within {CLOSE:.0%}: {close} of {len(steps)}")
        found = choices(steps)
        print(f"the same fastest method: {sum(a is b for a, b in found)} of {len(found)}")
        for fastest, chosen in found:
            if fastest is not chosen:
                print(
                    f"  {fastest.requests} x {fastest.context}: {fastest.job}, planned {chosen.job}, which takes "
                    f"{chosen.measured_ms / fastest.measured_ms:.2f} times as long"
                )


if __name__ == "__main__":
    main()
