"""Run a small step in every mode of the kernel. Use this script under compute-sanitizer:

compute-sanitizer --tool memcheck  python tests/gpu/sanitize_case.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize_case.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from decode_case import SCALE, random_case, relative_error

from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

SHAPES = [
    *(DecodeShape(w, heads, 64, n, page) for w, heads, n, page in ((256, 32, 1, 1), (96, 64, 2, 64), (320, 16, 1, 1))),
    DecodeShape.of_sketched(SketchedRows.of(512, 1, 0, 64), 16),
    DecodeShape.of_sketched(SketchedRows.of(512, 2, 64, 64), 32, 2, 64),
    DecodeShape.of_sketched(SketchedRows.of(512, 2, 96, 64, sketch_bits=3), 64),
    DecodeShape.of_sketched(SketchedRows.of(424, 2, 40, 64, sketch_bits=3, rope_bits=8), 64),
]
for shape in SHAPES:
    case = random_case(shape, [700, 0, 65, 1300], shape.latent_dim)
    kernel = HopperDecode(case.shape, SCALE, 4, torch.device("cuda:0"))
    kernel.plan(case.table, case.lengths)
    for _ in range(2):  # the second run starts before the first has ended
        out = torch.full_like(case.q_latent[..., : shape.latent_dim], float("nan"))
        kernel.run(case.q_latent, case.q_rope, case.kv_cache, out)
    torch.cuda.synchronize()
    print(shape, f"{relative_error(out, case.reference()):.2e}", flush=True)
