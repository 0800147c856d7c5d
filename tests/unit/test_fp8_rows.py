"""The FP8 row format: bytes, rounding against all 256 values of e4m3, and maps that go through it."""

import struct

import numpy as np
import pytest
import torch

from sglang_tpla.cache_rows import fp8 as fp8_rows
from sglang_tpla.cache_rows.fp8 import pack_common, pack_own, pack_rows, quantise, rounded, row_bytes, unpack_rows
from sglang_tpla.reference_model.cached_maps import cached_maps
from tests.fp8_reference import VALUES, assert_row


@pytest.mark.parametrize("w", [1, 33, 320])
def test_values_are_the_nearest_of_e4m3(w: int) -> None:
    z = torch.randn(9, w, generator=torch.Generator().manual_seed(w)) * torch.logspace(-6, 3, 9)[:, None]
    values, scale = quantise(z)
    wide = z.double().numpy()
    expected_scale = np.abs(wide).max(1, keepdims=True) / 448
    assert np.allclose(scale.numpy(), expected_scale, rtol=1e-6)
    scaled = (z / scale).double().numpy()
    off = np.abs(scaled[..., None] - VALUES[~np.isnan(VALUES)]).min(-1)
    assert np.allclose(np.abs(values.double().numpy() - scaled), off, rtol=0, atol=1e-12)
    # three mantissa bits: half a step in sixteen, but for what is smaller than the smallest normal number
    normal = np.abs(scaled) >= 2**-6
    error = np.abs(rounded(z, w).double().numpy() - wide)
    assert (error[normal] <= np.abs(wide)[normal] / 16 * (1 + 1e-5)).all()


def test_bytes_of_a_row() -> None:
    z = torch.zeros(1, 16)
    z[0, :3] = torch.tensor([896.0, -2.0, 0.0])
    z[0, 3:5] = torch.tensor([224.0, -0.5])
    key = torch.tensor([[1.0, -2.0, 0, 0, 0, 0, 0, 0.5]])
    rows = pack_rows(z, key, 3)
    expected = (
        bytes([0x7E, 0xB8, 0x00])  # 448, -1 and 0, times 2
        + bytes([0x7E, 0xB8])  # 448 and -1, times a half
        + bytes(11)
        + bytes.fromhex("803f00c0" + "0000" * 5 + "003f")
        + struct.pack("<ff", 2.0, 0.5)
        + bytes(8)
    )
    assert bytes(rows[0].tolist()) == expected
    assert rows.shape == (1, row_bytes(16, 8)) and row_bytes(320, 64) == 464
    assert fp8_rows.slice_width(464, 64) == 320


@pytest.mark.parametrize("shared", [0, 16, 20, 48])
def test_round_trip(shared: int) -> None:
    generator = torch.Generator().manual_seed(shared)
    z, key = torch.randn(5, 48, generator=generator), torch.randn(5, 8, generator=generator)
    z[:, shared:] *= 100
    z[2] = 0
    rows = pack_rows(z, key, shared)
    for row, one, turned in zip(rows, z, key, strict=True):
        assert_row(bytes(row.tolist()), one.double().numpy(), turned.bfloat16().float().numpy(), shared)
    again, key_again = unpack_rows(rows, 8, shared)
    assert torch.equal(again, rounded(z, shared)) and torch.equal(key_again, key.bfloat16().float())
    assert not again[2].any()
    assert torch.equal(rounded(again, shared), again)  # once rounded, it stays


def test_parts_are_the_rows_bytes_and_groups_have_the_common_ones_alike() -> None:
    common, key = torch.randn(4, 16), torch.randn(4, 8)
    groups = [torch.cat([common, torch.randn(4, 32) * size], dim=-1) for size in (1, 1000)]
    rows = [pack_rows(z, key, 16) for z in groups]
    for z, row in zip(groups, rows, strict=True):
        part, own = pack_common(common, key), pack_own(z[:, 16:])
        assert torch.equal(part, torch.cat([row[:, :16], row[:, 48:68]], dim=-1))
        assert torch.equal(own, torch.cat([row[:, 16:48], row[:, 68:72]], dim=-1))
    assert torch.equal(rows[0][:, :16], rows[1][:, :16])


def test_empty() -> None:
    assert pack_rows(torch.zeros(0, 16), torch.zeros(0, 8), 4).shape == (0, row_bytes(16, 8))


@pytest.mark.parametrize(("w", "rope", "word"), [(40, 64, "width 40"), (0, 64, "width 0"), (64, 12, "got 12")])
def test_rows_that_would_not_be_aligned(w: int, rope: int, word: str) -> None:
    assert word in (fp8_rows.unsupported_reason(w, rope) or "")
    assert fp8_rows.unsupported_reason(48, 32) is None


def test_cached_maps() -> None:
    latent, z_map, other = torch.randn(2, 3, 8), torch.randn(8, 4), torch.randn(4, 8)
    maps = [[(z_map, other, other)]]
    assert cached_maps(maps, "exact", [1]) == maps
    ((fp8, _, b_map),) = cached_maps(maps, "fp8", [1])[0]
    assert not isinstance(fp8, torch.Tensor) and torch.equal(fp8(latent), rounded(latent @ z_map, 1)) and b_map is other
    ((bf16, _, _),) = cached_maps(maps, "bf16", [1])[0]
    assert not isinstance(bf16, torch.Tensor)
    assert torch.equal(bf16(latent), (latent @ z_map).bfloat16().float())
    with pytest.raises(ValueError, match="int4"):
        cached_maps(maps, "int4", [1])
