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
    found = torch.empty(device_checksum.FOUND_BYTES, dtype=torch.uint8)
    device_checksum.find_reference(torch.from_numpy(payload), found)
    assert device_checksum.end(found.numpy(), size) == xxhash.xxh3_64_digest(payload)


def test_kernels_equal_the_twin() -> None:
    """In a process of their own: Triton reads whether it is to interpret when it is imported."""
    program = """
import torch
from sglang_tpla.transfer.device_checksum import FOUND_BYTES, find, find_reference
for size in (1, 1024, 1025, 16 * 1024, 16 * 1024 + 1, 64 * 1024 + 1, 65 * 1024 + 1, 150 * 1024 + 960):
    payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
    ours, twin = torch.zeros(2, FOUND_BYTES, dtype=torch.uint8)
    find(payload, ours)
    find_reference(payload, twin)
    assert torch.equal(ours, twin), size
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
