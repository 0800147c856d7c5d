"""Sketched cache rows are compared with an independent formula, bit by bit in plain Python, and with golden bytes."""

import itertools
import math
import struct

import pytest
import torch

from sglang_tpla.cache_rows import sketched
from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.rounding_cost import DISTORTION
from tests.sketched_reference import REACH, STEP


@pytest.mark.parametrize(
    ("rows", "row_bytes", "w_pad"),
    [
        (SketchedRows.of(512, 1, 0, 64), 656, 512),
        (SketchedRows.of(512, 2, 64, 64), 544, 288),
        (SketchedRows.of(512, 4, 64, 64), 480, 176),
        (SketchedRows.of(512, 8, 64, 64), 464, 128),
        (SketchedRows.of(128, 2, 32, 32), 176, 80),
        (SketchedRows.of(128, 4, 32, 32), 164, 56),
        (SketchedRows.of(128, 8, 32, 32), 160, 44),
        (SketchedRows.of(128, 2, 32, 32, rope_bits=8), 144, 80),
        (SketchedRows.of(128, 2, 32, 32, sketch_bits=3), 172, 80),
        (SketchedRows.of(128, 1, 0, 32), 200, 128),
    ],
)
def test_the_bytes_of_a_row(rows: SketchedRows, row_bytes: int, w_pad: int) -> None:
    assert (rows.row_bytes, rows.w_pad) == (row_bytes, w_pad)
    assert rows.scales_offset == row_bytes - 8
    assert rows.sketch_offset + rows.sketch_bytes <= rows.scales_offset
    if row_bytes >= 256:  # every field starts where 16-byte loads need it
        assert row_bytes % 16 == w_pad % 16 == rows.sketch_offset % 16 == 0
    # Together all ranks of a host receive no more bytes than MLA's in bf16.
    assert rows.common_bytes + rows.groups * rows.own_bytes <= 2 * (rows.latent_dim + rows.rope_dim)


def _squared_error(step: float, levels: int) -> float:
    """Return the mean square error of a standard Gaussian on ``levels`` levels, a step apart and half a step from 0."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    total = 0.0
    for k in range(levels // 2):
        level, a, b = (k + 0.5) * step, k * step, (k + 1) * step if k < levels // 2 - 1 else 40.0
        mass, first = below(b) - below(a), density(a) - density(b)
        second = mass + a * density(a) - b * density(b)
        total += 2 * (second - 2 * level * first + level * level * mass)
    return total


@pytest.mark.parametrize("bits", sketched.SKETCH_BITS)
def test_the_step_is_the_best_for_a_gaussian(bits: int) -> None:
    steps = [k / 20000 for k in range(2000, 30000)]
    errors = [_squared_error(step, 1 << bits) for step in steps]
    best = min(range(len(steps)), key=errors.__getitem__)
    assert sketched.STEP[bits] == pytest.approx(steps[best], abs=1e-4)
    assert DISTORTION[bits] == pytest.approx(errors[best], rel=1e-3)  # the number that `calibrate` uses
    # Numbers that the format rounds have the error of their step, which their largest value may have enlarged.
    values = torch.randn(64, 4096, generator=torch.Generator().manual_seed(bits))
    codes, scale = sketched.quantise_sketch(values, bits)
    used = (scale.float() / values.square().mean(-1, keepdim=True).sqrt()).flatten().tolist()
    expected = sum(_squared_error(step, 1 << bits) for step in used) / len(used)
    assert min(used) >= steps[best] * (1 - 2**-8)
    found = sketched.sketch_values(codes, scale, bits)
    assert (found - values).square().mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", sketched.SKETCH_BITS)
def test_no_value_lies_far_beyond_the_last_level(bits: int) -> None:
    values = torch.randn(256, 96, generator=torch.Generator().manual_seed(bits))
    values[:, 7] = torch.linspace(-12, 12, 256)  # in standard deviations
    codes, scale = sketched.quantise_sketch(values, bits)
    beyond = values.abs() / scale.float() - ((1 << bits) - 1) / 2
    assert beyond.max().item() <= {2: 2.0, 3: 1.5, 4: 1.0}[bits] * 1.02 + 0.02
    assert (sketched.sketch_values(codes, scale, bits) - values).abs().max() <= beyond.clamp(
        min=0.51
    ).max() * scale.max()


def _bfloat16(value: float, *, up: bool = False) -> tuple[bytes, float]:
    word = int.from_bytes(struct.pack("<f", value), "little")
    high, low = word >> 16, word & 0xFFFF
    if up:  # round up to a value whose last bit is zero
        high = -(-(high * 65536 + low) // 131072) * 2
    else:
        high += low > 0x8000 or (low == 0x8000 and high & 1)
    return high.to_bytes(2, "little"), struct.unpack("<f", (high << 16).to_bytes(4, "little"))[0]


def _f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _bytes(values: list[float], turn: float = 0) -> tuple[bytes, bytes]:
    largest = max((abs(value) for value in values), default=0.0)
    scale_bytes, scale = _bfloat16(_f32(largest / 127), up=True) if largest else _bfloat16(1.0)
    steps = [_f32(value / scale) + (-turn if k % 2 else turn) for k, value in enumerate(values)]
    codes = [max(-127, min(127, round(_f32(step)))) for step in steps]
    return bytes(128 + code for code in codes), scale_bytes


def _row(rows: SketchedRows, group: int, shared, own, sketch, rope) -> bytes:
    """Return one row by the definition, computed with Python's integers instead of tensors."""
    d, g, n, b = rows.latent_dim, rows.groups, rows.own, rows.sketch_bits
    assert len(shared) + g * n == d
    turn = (-1) ** group / 4 if n else 0
    shared_codes, shared_scale = _bytes(shared, turn)
    own_codes, own_scale = _bytes(own)
    scale_bytes, blocks = _bfloat16(1.0)[0], b""
    if sketch:
        rms = math.sqrt(sum(x * x for x in sketch) / len(sketch))
        scale_bytes, scale = _bfloat16(_f32(max(rms * STEP[b], max(map(abs, sketch)) / REACH[b])))
        for j in range(g):
            stream = 0
            for k, x in enumerate(sketch[j * n : (j + 1) * n]):
                half = 1 << (b - 1)
                nearest = min(range(-half, half), key=lambda i: (abs(x - scale * (i + 0.5)), -i)) if scale else 0
                stream |= (half + nearest) << (k * b)
            if j != group:
                blocks += stream.to_bytes(n * b // 8, "little")
    if rows.rope_bits == 8:
        key, rope_scale = _bytes(rope, turn)
    else:
        key, rope_scale = b"".join(_bfloat16(x)[0] for x in rope), _bfloat16(1.0)[0]
    w = len(shared) + n
    bare = w + len(key) + len(blocks) + 8
    unit = 16 if bare >= 256 else 4
    columns = (shared_codes + own_codes).ljust(-(-w // unit) * unit if unit == 16 else w, b"\x80")
    body = columns + key + blocks
    size = -(-(len(body) + 8) // unit) * unit
    return body.ljust(size - 8, b"\0") + shared_scale + own_scale + scale_bytes + rope_scale


SHAPES = [
    SketchedRows.of(24, 2, 8, 6),
    SketchedRows.of(24, 1, 0, 6),
    SketchedRows.of(24, 2, 24, 5, rope_bits=8),
    SketchedRows.of(40, 4, 8, 4, sketch_bits=3, rope_bits=8),
    SketchedRows.of(48, 3, 0, 1, sketch_bits=2),
    SketchedRows.of(31, 3, 7, 3, sketch_bits=2),
    SketchedRows.of(128, 8, 32, 32, sketch_bits=4),
    SketchedRows.of(512, 8, 64, 64, sketch_bits=3),
]


@pytest.mark.parametrize("rows", SHAPES)
def test_rows_equal_the_definition_byte_for_byte(rows: SketchedRows) -> None:
    generator = torch.Generator().manual_seed(7)
    tokens = 12
    shared, own, rope = (torch.randn(tokens, n, generator=generator) for n in (rows.shared, rows.own, rows.rope_dim))
    sketch = torch.randn(tokens, rows.groups * rows.own, generator=generator)
    spread = torch.logspace(-4, 4, tokens)[:, None]
    shared, own, sketch, rope = shared * spread, own * spread, sketch * spread, rope * spread
    for group in range(rows.groups):
        packed = sketched.pack_rows(rows, group, shared, own, sketch, rope)
        assert packed.shape == (tokens, rows.row_bytes) and packed.dtype == torch.uint8
        for token in range(tokens):
            wanted = _row(rows, group, *(part[token].tolist() for part in (shared, own, sketch, rope)))
            assert bytes(packed[token].tolist()) == wanted


def test_golden_bytes() -> None:
    rows = SketchedRows.of(12, 2, 4, 2, sketch_bits=4)
    packed = sketched.pack_rows(
        rows,
        0,
        torch.tensor([1.25, -2.25, 127.0, 0.5]),
        torch.tensor([0.25, -0.25, 0.0, 0.125]),
        torch.tensor([9.0, 9.0, 9.0, 9.0, 0.1, -0.1, 9.0, -20.0]),
        torch.tensor([1.0, -1.5]),
    )
    pieces = (
        "827eff80",  # shared: 128 and, at scale 1, 1.5, -2.5, 127.25 and 0.25 rounded half to even
        "fe0280bf",  # own: 128 and, 0.25 / 127 rounded up to an even bfloat16 being the scale, 126, -126, 0 and 63
        "803fc0bf",  # rotary key in bfloat16
        "782a",  # group 1's block, low nibble first: 8 and, in whole steps below them, 0, -1, 2, -6
        "0000",  # up to a multiple of 4
        "803f023b5740803f",  # scales of shared, own, sketch (0.3352 of 10.03), rope
    )
    assert packed.numpy().tobytes().hex() == "".join(pieces)


@pytest.mark.parametrize("rows", [SketchedRows.of(512, 4, 64, 64), SketchedRows.of(24, 2, 8, 6)])
def test_two_groups_together_have_half_the_step_of_shared_columns(rows: SketchedRows) -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(200, n, generator=generator) for n in (rows.shared, rows.own, rows.latent_dim - rows.shared)]
    packed = [sketched.pack_rows(rows, group, *parts, torch.zeros(200, rows.rope_dim)) for group in range(2)]
    step = packed[0][:, rows.scales_offset :][:, :2].contiguous().view(torch.bfloat16).float()
    errors = [sketched.unpack_rows(rows, row).latent[:, : rows.shared] - parts[0] for row in packed]
    assert all((error.abs() <= step * 0.7501).all() for error in errors)
    both = sum(errors) / 2
    assert (both.abs() <= step * 0.2501).all()
    assert (both / step).square().mean() == pytest.approx(1 / 48, rel=0.1)
    # The error of each group is unbiased, over columns and over tokens.
    assert max(abs((error / step).mean().item()) for error in errors) < 0.02


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])  # the NaN of a CPU, and that of a GPU
def test_a_value_that_is_no_number_has_a_scale_that_is_none(bits: int) -> None:
    value = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    assert sketched.round_up_scale(value).isnan().all()
    assert sketched.quantise(value)[1].isnan().all()


def test_rows_of_zeros_are_zeros_and_one_huge_value_stays_finite() -> None:
    rows = SketchedRows.of(32, 2, 16, 4)
    zeros = [torch.zeros(1, n) for n in (16, 8, 16, 4)]
    packed = sketched.pack_rows(rows, 1, *zeros)
    found = sketched.unpack_rows(rows, packed)
    assert not any(part.any() for part in (found.latent, found.sketch, found.k_rope))
    one, none = "803f", "0000"
    assert packed.numpy().tobytes().hex() == "80" * 24 + none * 4 + "88" * 4 + one + one + none + one
    assert not any(part.any() for part in vars(sketched.unpack_rows(rows, torch.zeros_like(packed))).values())
    for value in (3e38, -3e38, 1e-38, 1e-45):
        parts = [torch.zeros(1, n) for n in (16, 8, 16, 4)]
        for part in parts:
            part[0, 0] = value
        found = sketched.unpack_rows(rows, sketched.pack_rows(rows, 1, *parts))
        assert all(torch.isfinite(part).all() for part in (found.latent, found.sketch, found.k_rope))
        assert found.latent[0, 0] == pytest.approx(value, rel=0.01, abs=1e-40)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_part_alone(value: float) -> None:
    rows = SketchedRows.of(40, 4, 8, 4, sketch_bits=3, rope_bits=8)
    for part in range(4):
        parts = [torch.ones(2, n) for n in (8, 8, 32, 4)]
        parts[part][1, 2] = value
        packed = sketched.pack_rows(rows, 2, *parts)
        scales = packed[:, rows.scales_offset :].contiguous().view(torch.bfloat16)
        wanted = torch.ones(2, 4, dtype=torch.bool)
        wanted[1, part] = False
        assert torch.equal(scales.isfinite(), wanted)


def test_parts_are_put_together_as_the_row() -> None:
    rows = SketchedRows.of(40, 4, 8, 4, sketch_bits=3, rope_bits=8)
    common = torch.randint(0, 256, (5, rows.common_bytes), dtype=torch.uint8)
    own = torch.randint(0, 256, (5, rows.own_bytes), dtype=torch.uint8)
    for group in range(4):
        found = sketched.assemble(rows, group, common, own)
        written = sorted((to, to + size) for _, to, size in (*rows.common_copies(group), *rows.own_copies()))
        # The pieces do not overlap, and with the padding they fill the row.
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(written))
        assert sum(stop - start for start, stop in written) == rows.w + rows.rope_bytes + rows.sketch_bytes + 8
        # Only the group's own block and the other rounding of shared columns and key are not taken.
        taken = sum(size for _, _, size in rows.common_copies(group))
        assert taken == rows.common_bytes - rows.block_bytes - rows.shared - rows.rope_bytes
        assert found.shape == (5, rows.row_bytes)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((128, 3, 32, 31, 32), "r \\+ g n = d"),
        ((128, 2, 118, 5, 32), "whole number of bytes"),
        ((128, 1, 64, 64, 32), "one group shares"),
        ((128, 2, 32, 48, 32, 5), "sketch bits"),
        ((128, 2, 32, 48, 32, 4, 4), "rope bits"),
        ((128, 2, -32, 80, 32), "not negative"),
    ],
)
def test_sizes_that_the_format_does_not_hold_are_refused(arguments: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SketchedRows(*arguments)


@pytest.mark.parametrize("size", [1, 2, 3, 12, 15, 48, 56, 128, 224])
def test_the_rotation_is_orthogonal_and_spreads(size: int) -> None:
    matrix = rotation(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-12 or size == 1
