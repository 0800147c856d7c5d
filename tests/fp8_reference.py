"""FP8 cache rows read by the letter of their description, byte by byte: no code of the package's."""

import struct

import numpy as np


def e4m3(code: int) -> float:
    """Value of an e4m3 byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code >> 7 else size


VALUES = np.array([e4m3(code) for code in range(256)])


def bfloat16(data: bytes) -> np.ndarray:
    """bfloat16 numbers: the upper halves of float32 ones."""
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def read_row(row: bytes, w: int, rope: int, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """The slice [w] in float64 and the rotated key [rope] of one row."""
    assert len(row) == w + 2 * rope + 16, "a row of another size"
    common, own, padding = struct.unpack("<ffQ", row[w + 2 * rope :])
    assert padding == 0, "the last eight bytes are not zero"
    values = VALUES[np.frombuffer(row[:w], dtype=np.uint8)]
    return values * np.where(np.arange(w) < shared, common, own), bfloat16(row[w : w + 2 * rope])


def assert_row(row: bytes, z: np.ndarray, k_rope: np.ndarray, shared: int) -> None:
    """A row is what a slice [w] (float64) and a key [rope] (of bfloat16 values) are to become.

    Scales are the largest magnitudes over 448; every value is as near as e4m3 allows, but for float32's rounding of the
    scaled value, which may fall on the other side of a tie.
    """
    w, rope = z.size, k_rope.size
    got, key = read_row(row, w, rope, shared)
    assert np.array_equal(key, k_rope)
    scales = struct.unpack("<ff", row[w + 2 * rope : w + 2 * rope + 8])
    for part, scale in ((slice(0, shared), scales[0]), (slice(shared, w), scales[1])):
        if not z[part].size:
            continue
        largest = np.abs(z[part]).max()
        assert np.isclose(scale, largest / 448 if largest else 1.0, rtol=1e-5)
        best = scale * np.abs(z[part, None] / scale - VALUES[~np.isnan(VALUES)]).min(-1)
        assert (np.abs(got[part] - z[part]) <= best + 1e-5 * largest).all()
