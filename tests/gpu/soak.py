"""Run random decode steps for a given time and check each, to find races that tests meet once in a thousand runs.

python tests/gpu/soak.py SECONDS [SEED]

A step has a random shape of plain or sketched rows, batch, lengths, page size and order of pages. A few layers run back
to back on fresh queries, with poisoned outputs and without waiting in between. At the first wrong request, the script
names it and ends with code 1.
"""

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from decode_case import SCALE, random_case, relative_error

from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

BAR = 3e-3
MAX_BATCH = 64
WIDTHS = (64, 96, 128, 192, 256, 320)  # cover every mode, and compile in a minute
# (groups, shared columns, bits of the sketch, bits of the key); they cover every form of the kernel.
SKETCHED = ((1, 0, 4, 16), (2, 64, 4, 16), (2, 96, 4, 8), (4, 64, 3, 16), (8, 64, 4, 16), (8, 64, 2, 8))
DEVICE = "cuda:0"


def random_lengths(dice: random.Random) -> list[int]:
    """Return a batch's lengths, in one of the forms that are planned differently."""
    batch = dice.randint(1, MAX_BATCH)
    longest = dice.choice((64, 300, 1000, 9000))
    if dice.random() < 0.3:
        return [dice.randint(1, longest)] * batch
    return [dice.choice((0, 1, 63, 64, 65, dice.randint(1, longest))) for _ in range(batch)]


def random_shape(dice: random.Random) -> DecodeShape:
    """Return a layer's shape, with plain rows one time in three."""
    heads, query_len, page_size = dice.choice((8, 16, 32, 64, 128)), dice.randint(1, 4), dice.choice((1, 64))
    if dice.random() < 1 / 3:
        return DecodeShape(dice.choice(WIDTHS), heads, 64, query_len, page_size)
    groups, shared, bits, rope_bits = dice.choice(SKETCHED)
    rows = SketchedRows.of(512, groups, shared, 64, sketch_bits=bits, rope_bits=rope_bits)
    return DecodeShape.of_sketched(rows, heads, query_len, page_size)


def error_of(out: torch.Tensor, right: torch.Tensor) -> float:
    """Return the relative error, or the largest value if queries see nothing and zeros are right."""
    return relative_error(out, right) if right.norm() > 0 else out.float().abs().max().item()


def wrong_requests(out: torch.Tensor, right: torch.Tensor, query_len: int) -> list[tuple[int, float]]:
    """Return (request, relative error) of each request beyond twice the bar: one request errs more than the batch."""
    pairs = zip(out.split(query_len), right.split(query_len), strict=True)
    errors = [(request, error_of(*pair)) for request, pair in enumerate(pairs)]
    return [(request, error) for request, error in errors if not error <= 2 * BAR]


def main() -> int:
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**31
    dice = random.Random(seed)
    kernels: dict[DecodeShape, HopperDecode] = {}
    end, steps, launches, worst = time.monotonic() + seconds, 0, 0, 0.0
    while time.monotonic() < end:
        shape = random_shape(dice)
        if shape not in kernels:
            kernels[shape] = HopperDecode(shape, SCALE, MAX_BATCH, torch.device(DEVICE))
        lengths = random_lengths(dice)
        first = random_case(shape, lengths, dice.randrange(2**31), DEVICE)
        layers = [
            replace(
                first,
                q_latent=torch.randn_like(first.q_latent.float()).to(shape.dtype),
                q_rope=torch.randn_like(first.q_rope.float()).to(shape.dtype),
            )
            for _ in range(dice.randint(1, 6))
        ]
        empty = first.q_latent.new_empty(*first.q_latent.shape[:2], shape.latent_dim)
        outs = [torch.full_like(empty, float("nan")) for _ in layers]
        kernels[shape].plan(first.table, first.lengths)
        for layer, out in zip(layers, outs, strict=True):
            kernels[shape].run(layer.q_latent, layer.q_rope, layer.kv_cache, out)
        for number, (layer, out) in enumerate(zip(layers, outs, strict=True)):
            right = layer.reference()
            error = error_of(out, right)
            wrong = wrong_requests(out, right, shape.query_len)
            worst = max(worst, error)
            launches += 1
            if not error <= BAR or wrong:
                print(f"seed {seed}, step {steps}, layer {number}: {shape}, lengths {lengths}")
                print(f"error {error:.3g}; wrong requests: {wrong[:8]} ({len(wrong)} in all)")
                return 1
        steps += 1
    print(f"seed {seed}: {steps} steps, {launches} launches right, worst relative error {worst:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
