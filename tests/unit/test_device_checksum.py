"""XXH3 on a GPU: its twin against xxHash's own library, the kernels in Triton's interpreter against the twin."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from sglang_tpla.transfer import device_checksum

ROOT = Path(__file__).parents[2]
SIZES = [1, 200, 241, 1024, 1025, 1088, 1089, 2048, 2049, 5000, 33 * 1024 + 1, 40 * 1024 + 960, 70_001]


@pytest.mark.parametrize("size", SIZES)
def test_lanes_of_blocks_and_the_rest_are_xxh3(size: int) -> None:
    payload = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    blocks = (size - 1) // 1024
    lanes = device_checksum.block_lanes_reference(torch.from_numpy(payload[: blocks * 1024]))
    rest = payload[max(0, blocks * 1024 - 64) :]
    digest = device_checksum.end(lanes.numpy().view(np.uint64), blocks, rest, size)
    assert digest == xxhash.xxh3_64_digest(payload)


def test_kernels_equal_the_twin() -> None:
    """In a process of their own: Triton reads whether it is to interpret when it is imported."""
    program = """
import torch
from sglang_tpla.transfer.device_checksum import block_lanes, block_lanes_reference
for blocks in (1, 15, 16, 17, 32, 33, 70):
    payload = torch.randint(0, 256, (blocks * 1024,), dtype=torch.uint8)
    assert torch.equal(block_lanes(payload), block_lanes_reference(payload)), blocks
print("equal")
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout == "equal\n", ran.stderr
