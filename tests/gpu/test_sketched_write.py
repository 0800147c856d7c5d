"""The kernel that writes sketched rows against its twin, at odd sizes and on odd rows."""

import sys
from pathlib import Path

import pytest
import torch

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.write import write

sys.path.insert(0, str(Path(__file__).parent))
from write_case import different_sketched_rows, sketched_write_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("d", "groups", "shared", "rope", "bits", "rope_bits", "rotate", "heads"),
    [
        (512, 1, 0, 64, 4, 16, "pairs", 16),
        (512, 2, 64, 64, 4, 16, "pairs", 32),
        (512, 4, 64, 64, 3, 8, "pairs", 64),
        (512, 8, 64, 64, 2, 16, "halves", 128),
        (128, 2, 32, 64, 4, 16, "pairs", 3),
        (96, 3, 24, 8, 4, 8, None, 0),
    ],
)
def test_kernel_equals_twin(
    d: int, groups: int, shared: int, rope: int, bits: int, rope_bits: int, rotate: str | None, heads: int
) -> None:
    for tokens in (0, 1, 2, 7, 8, 9, 33, 100, 128):
        for group in {0, groups - 1}:
            (ours, rows), (twin, _) = (
                sketched_write_case(
                    tokens,
                    d,
                    groups,
                    shared,
                    rope,
                    group,
                    bits,
                    rope_bits,
                    rotate,
                    torch.bfloat16,
                    tokens,
                    "cuda",
                    heads,
                )
                for _ in range(2)
            )
            write(ours.write(1e-6, rotate, sketched=rows))
            reference.write(twin.write(1e-6, rotate, sketched=rows))
            if tokens:
                assert not (why := different_sketched_rows(ours, twin, rows)), (tokens, group, why)
