"""Sketched cache rows read by the letter of their description, byte by byte: no packing code of the package's."""

from dataclasses import dataclass

import numpy as np

from sglang_tpla.cache_rows.sketched import SketchedRows


def bfloat16(data: bytes) -> np.ndarray:
    """bfloat16 numbers: the upper halves of float32 ones."""
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


# the step of the best uniform quantiser of a Gaussian, in standard deviations, by bits (`test_sketched_rows` finds it)
STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
REACH = {2: 3.5, 3: 5, 4: 8.5}  # steps from zero to the largest value, at most


@dataclass(frozen=True)
class ReadRow:
    """The contents of one row: multiples of each field's scale, float64 scales, and the key's values."""

    shared: np.ndarray  # [r], -127 to 127
    own: np.ndarray  # [n]
    sketch: np.ndarray  # [(g - 1) n], halves of odd numbers
    key: np.ndarray  # [rope], -127 to 127 or bfloat16 values
    scales: np.ndarray  # [4]: shared, own, sketch, rope

    @property
    def latent(self) -> np.ndarray:
        """The columns at 8 bits."""
        return np.concatenate([self.shared * self.scales[0], self.own * self.scales[1]])

    @property
    def sketched(self) -> np.ndarray:
        """The other groups' columns."""
        return self.sketch * self.scales[2]

    @property
    def rope(self) -> np.ndarray:
        """The rotary key."""
        return self.key * self.scales[3]


def read_row(row: bytes, rows: SketchedRows) -> ReadRow:
    """Read one row."""
    r, n, g, rope = rows.shared, rows.own, rows.groups, rows.rope_dim
    key_bytes = rope * rows.rope_bits // 8
    sketch_bytes = (g - 1) * n * rows.sketch_bits // 8
    unit = 16 if r + n + key_bytes + sketch_bytes + 8 >= 256 else 4
    w_pad = -(-(r + n) // 16) * 16 if unit == 16 else r + n
    assert len(row) == -(-(w_pad + key_bytes + sketch_bytes + 8) // unit) * unit, "a row of another size"
    columns = _bytes(row[: r + n])
    assert all(byte == 128 for byte in row[r + n : w_pad]), "padded columns are not zero, whose code is 128"
    key = row[w_pad : w_pad + key_bytes]
    stream = row[w_pad + key_bytes : w_pad + key_bytes + sketch_bytes]
    assert not any(row[w_pad + key_bytes + sketch_bytes : -8]), "the bytes before the scales are not zero"
    bits = rows.sketch_bits
    whole = int.from_bytes(stream, "little")  # blocks are whole bytes, so the blocks are one stream
    found = [whole >> (k * bits) & ((1 << bits) - 1) for k in range((g - 1) * n)]
    return ReadRow(
        shared=columns[:r],
        own=columns[r:],
        sketch=np.array(found, dtype=np.float64) - ((1 << bits) - 1) / 2,
        key=_bytes(key) if rows.rope_bits == 8 else bfloat16(key),
        scales=bfloat16(row[-8:]).astype(np.float64),
    )


def _bytes(codes: bytes) -> np.ndarray:
    assert 0 not in codes, "no value has the code 0"
    return np.frombuffer(codes, dtype=np.uint8).astype(np.float64) - 128


def assert_row(row: bytes, rows: SketchedRows, group: int, z: np.ndarray, k_rope: np.ndarray) -> None:
    """A row is what projected columns [shared | own | sketch of all groups] (float64) and a key are to become.

    Bytes are the nearest ones but for float32's rounding, those of shared columns and of the key after the group's
    quarter of a step in turn up and down; a sketch code is the nearest level, but for the same.
    """
    got, r, n = read_row(row, rows), rows.shared, rows.own
    own, sketch = z[r : r + n], z[r + n :].reshape(rows.groups, n)
    turns = (-1.0) ** (np.arange(max(r, rows.rope_dim)) + group) / 4 if n else np.zeros(max(r, rows.rope_dim))
    if r:
        _assert_bytes(z[:r], got.shared, got.scales[0], z[:r] + got.scales[0] * turns[:r])
    if n:
        _assert_bytes(own, got.own, got.scales[1], own)
    if rows.rope_bits == 8:
        _assert_bytes(k_rope, got.key, got.scales[3], k_rope + got.scales[3] * turns[: rows.rope_dim])
    else:
        assert np.array_equal(got.key, k_rope)
    if not sketch.size:
        return
    rms = np.sqrt(np.square(sketch).mean())
    # rounded to bfloat16, which has 8 bits of precision
    step = max(rms * STEP[rows.sketch_bits], np.abs(sketch).max() / REACH[rows.sketch_bits])
    assert np.isclose(got.scales[2], step, rtol=2**-8 + 1e-5, atol=1e-38)
    others = np.delete(sketch, group, axis=0).ravel()
    levels = np.array([sign * (k + 0.5) for k in range(1 << (rows.sketch_bits - 1)) for sign in (-1, 1)])
    best = np.abs(others[:, None] - got.scales[2] * levels).min(1)
    assert (np.abs(others - got.sketched) <= best + 1e-5 * rms).all()


def _assert_bytes(values: np.ndarray, codes: np.ndarray, scale: float, turned: np.ndarray) -> None:
    """Codes, less 128, are the nearest to ``turned``; their scale is that of ``values``."""
    largest = np.abs(values).max()
    if not largest:
        assert scale == 1 and not codes.any()
        return
    # rounded up to a bfloat16 whose last bit is zero, which leaves 7 bits of precision
    assert largest / 127 * (1 - 1e-6) <= scale <= largest / 127 * (1 + 2**-6 + 1e-6)
    assert np.float32(scale).view(np.uint32) % 2**17 == 0
    assert (np.abs(turned - codes * scale) <= scale * (0.5 + 1e-4)).all()
