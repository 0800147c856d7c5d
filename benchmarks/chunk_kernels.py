"""Time one chunk on a prefill GPU and a decode GPU: the kernels of `transfer.memory.row_kernels` beside their twins.

    python benchmarks/chunk_kernels.py [--out FILE]

Each row is one part of one chunk of DeepSeek V3's rows: 32,768 tokens of one layer, or 1,024 tokens of 30 layers. The
twins are PyTorch's own operations, some sixty for sketched rows. Times are medians, in turns: on an idle GPU, and while
another stream multiplies large matrices, as the next prompt does. Copies to and from the host are not in them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.decode_kernel import environment
from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows, PlainRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.transfer.memory import row_kernels, row_kernels_reference
from sglang_tpla.transfer.memory.layer_table import LayerTable
from sglang_tpla.transfer.memory.part_of_rows import make_part

D, ROPE = 512, 64
SKETCHED = GroupRows(SketchedRows.of(D, 2, 64, ROPE), 0)
ROWS: dict[str, tuple[LayerRows, Part]] = {
    "whole rows": (PlainRows(D, D, ROPE), Part.COMMON),
    "slices, g = 2, common": (PlainRows(288, 64, ROPE), Part.COMMON),
    "slices, g = 2, own": (PlainRows(288, 64, ROPE), Part.OWN),
    "sketched, g = 2, common": (SKETCHED, Part.COMMON),
    "sketched, g = 2, own": (SKETCHED, Part.OWN),
}
SHAPES = ((1, 32768), (30, 1024))  # layers and tokens
BUSY = 8192  # rows and columns of the matrices that the other stream multiplies
ROUNDS = 9


def time_us(run: Callable[[], object], busy: Callable[[], object] | None) -> float:
    """Return the microseconds from the first launch of ``run`` to its end, under the load of ``busy`` if given."""
    stream = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    if busy is not None:
        for _ in range(30):
            busy()
    with torch.cuda.stream(stream):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
    end.synchronize()
    us = 1000 * begin.elapsed_time(end)
    torch.cuda.synchronize()
    return us


def measure(name: str, layers: int, tokens: int) -> dict[str, Any]:
    """Return medians by direction, kernels and load."""
    rows, part = ROWS[name]
    pool = LayerTable([torch.randn(2 * tokens, D + ROPE, device="cuda").bfloat16() for _ in range(layers)])
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
    whole = rows.width == D and not rows.encoded
    z = None if whole else torch.randn(layers, D, rows.columns, device="cuda")
    row_format = RowFormat((rows,) * layers)
    items = row_format.item_dtype(pool.dtype)
    packed = torch.empty(layers * tokens * rows.part_items(part), dtype=items, device="cuda")
    target = LayerTable([torch.zeros(2 * tokens, rows.row_items, dtype=items, device="cuda") for _ in range(layers)])
    payload = packed.view(layers, tokens, -1)
    a = torch.randn(BUSY, BUSY, device="cuda").bfloat16()
    product = torch.empty_like(a)

    def read(kernels: ModuleType) -> Callable[[], object]:
        stacks = None if z is None else [kernels.weights(z)]
        return lambda: make_part(kernels, pool, D, range(layers), slots, stacks, part, packed, row_format)

    def write(kernels: ModuleType) -> Callable[[], object]:
        return lambda: kernels.scatter(target, range(layers), slots, rows.fields(part), payload)

    def busy() -> None:
        torch.mm(a, a, out=product)

    runs = {
        f"{way.__name__}, {label}, {load}": (way(kernels), other)
        for way in (read, write)
        for label, kernels in (("twins", row_kernels_reference), ("kernels", row_kernels))
        for load, other in (("idle", None), ("busy", busy))
    }
    for run, _ in runs.values():
        run()
    samples = [[time_us(run, other) for run, other in runs.values()] for _ in range(ROUNDS)]
    us = {key: statistics.median(times) for key, times in zip(runs, zip(*samples, strict=True), strict=True)}
    return {"rows": name, "layers": layers, "tokens": tokens, "payload_bytes": packed.nbytes, "us": us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "chunk_kernels.json")
    args = parser.parse_args()
    found = []
    for name in ROWS:
        for layers, tokens in SHAPES:
            row = measure(name, layers, tokens)
            found.append(row)
            us = row["us"]
            for way in ("read", "write"):
                times = [
                    f"{load} {us[f'{way}, twins, {load}']:.0f} and {us[f'{way}, kernels, {load}']:.0f} us"
                    for load in ("idle", "busy")
                ]
                print(f"{name}, {layers} x {tokens}, {way}: twins and kernels, {', '.join(times)}", flush=True)
            torch.cuda.empty_cache()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": environment(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
