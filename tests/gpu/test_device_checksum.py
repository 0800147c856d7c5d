"""The checksum of a payload on a GPU against xxHash's library."""

import numpy as np
import pytest
import torch
import xxhash

from sglang_tpla.transfer.device_checksum import DeviceChecksums

pytestmark = pytest.mark.gpu
SIZES = [
    1,
    200,
    241,
    1024,
    1025,
    1088,
    1089,
    2048,
    2049,
    5000,
    33 * 1024 + 1,
    70_001,
    9 << 20,
    (16 << 20) - 3,
]


def test_checksums_are_xxh3() -> None:
    checksums = DeviceChecksums(torch.device("cuda"))
    payloads = [torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda") for size in SIZES]
    ready = torch.cuda.Event()
    ready.record()
    pending = [checksums.start(payload, ready) for payload in payloads]  # all under way at once
    for payload, one in zip(payloads, pending, strict=True):
        assert one.digest() == xxhash.xxh3_64_digest(payload.cpu().numpy()), payload.numel()


def test_what_is_checked_is_what_is_there_when_it_is_ready() -> None:
    checksums, side = DeviceChecksums(torch.device("cuda")), torch.cuda.Stream()
    payload = torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        payload.fill_(7)
        ready = torch.cuda.Event()
        ready.record(side)
    digest = checksums.start(payload, ready).digest()
    assert digest == xxhash.xxh3_64_digest(np.full(4 << 20, 7, dtype=np.uint8))
