"""The FP8 row format: bytes, rounding against all 256 values of e4m3, and maps that go through it."""

import struct

import numpy as np
import pytest
import torch

from sglang_tpla.attention.fp8_rows import pack_rows, quantise, rounded, row_bytes, unpack_rows
from sglang_tpla.evaluate.cache import cached_maps


def e4m3_values() -> np.ndarray:
    """Every finite e4m3 value, from its bits: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities."""
    found = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        if exponent == 15 and mantissa == 7:
            continue  # NaN
        size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        found.append(-size if code >> 7 else size)
    return np.array(sorted(set(found)))


@pytest.mark.parametrize("w", [1, 33, 320])
def test_values_are_the_nearest_of_e4m3(w: int) -> None:
    z = torch.randn(9, w, generator=torch.Generator().manual_seed(w)) * torch.logspace(-6, 3, 9)[:, None]
    values, scale = quantise(z)
    wide = z.double().numpy()
    expected_scale = np.abs(wide).max(1, keepdims=True) / 448
    assert np.allclose(scale.numpy(), expected_scale, rtol=1e-6)
    table = e4m3_values()
    scaled = (z / scale).double().numpy()
    off = np.abs(scaled[..., None] - table).min(-1)
    assert np.allclose(np.abs(values.double().numpy() - scaled), off, rtol=0, atol=1e-12)
    # three mantissa bits: half a step in sixteen, but for what is smaller than the smallest normal number
    normal = np.abs(scaled) >= 2**-6
    error = np.abs(rounded(z).double().numpy() - wide)
    assert (error[normal] <= np.abs(wide)[normal] / 16 * (1 + 1e-5)).all()


def test_bytes_of_a_row() -> None:
    rows = pack_rows(torch.tensor([[448.0, -1.0, 0.0]]), torch.tensor([[1.0, -2.0]]))
    # e4m3 of 448, -1 and 0; float32 1.0; bfloat16 1 and -2
    assert bytes(rows[0].tolist()) == bytes([0x7E, 0xB8, 0x00]) + struct.pack("<f", 1.0) + bytes.fromhex(
        "803f00c0"
    )
    assert rows.shape == (1, row_bytes(3, 2)) and row_bytes(320, 64) == 452


def test_round_trip() -> None:
    z, key = torch.randn(5, 24), torch.randn(5, 6)
    z[2] = 0
    again, key_again = unpack_rows(pack_rows(z, key), 24)
    assert torch.equal(again, rounded(z)) and torch.equal(key_again, key.bfloat16().float())
    assert not again[2].any()
    assert torch.equal(rounded(again), again)  # once rounded, it stays


def test_empty() -> None:
    assert pack_rows(torch.zeros(0, 8), torch.zeros(0, 4)).shape == (0, row_bytes(8, 4))


def test_cached_maps() -> None:
    latent, z_map, other = torch.randn(2, 3, 8), torch.randn(8, 4), torch.randn(4, 8)
    maps = [[(z_map, other, other)]]
    assert cached_maps(maps, "exact") == maps
    ((fp8, _, b_map),) = cached_maps(maps, "fp8")[0]
    assert (
        not isinstance(fp8, torch.Tensor)
        and torch.equal(fp8(latent), rounded(latent @ z_map))
        and b_map is other
    )
    ((bf16, _, _),) = cached_maps(maps, "bf16")[0]
    assert not isinstance(bf16, torch.Tensor)
    assert torch.equal(bf16(latent), (latent @ z_map).bfloat16().float())
    with pytest.raises(ValueError, match="int4"):
        cached_maps(maps, "int4")
